"""Every family against transformers: the same checkpoint, the same tokens, the same logits."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from fuseline.tests.checkpoints import (
    FAMILIES,
    build_model,
    reference_greedy,
    reference_logits,
    write_checkpoint,
)
from fuseline.tests.workers.models.driver import random_schedule, run_group

MAX_ABS = 1e-4
ROPES: dict[str, dict[str, object]] = {
    "default": {"rope_type": "default", "rope_theta": 50000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn-all": {
        "rope_type": "yarn",
        "rope_theta": 1000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
        "truncate": False,
    },
    # The ramp would end beyond the last dimension.
    "yarn-clamped": {"rope_type": "yarn", "rope_theta": 3.0, "factor": 2.0, "original_max_position_embeddings": 128},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 3.0},
}


def tokens(seed: int, length: int, vocab_size: int = 101) -> list[int]:
    return random.Random(seed).choices(range(vocab_size), k=length)


def draw_config(family: str, seed: int) -> dict[str, object]:
    """A random small configuration of a family."""
    draw = random.Random(f"{family}{seed}")
    kv_heads = draw.choice([1, 2, 3])
    heads = kv_heads * draw.choice([1, 2, 4])
    head_dim = draw.choice([16, 32, 64])
    config: dict[str, object] = {
        "vocab_size": draw.choice([97, 128, 301]),
        "hidden_size": heads * draw.choice([16, 24]),
        "intermediate_size": draw.choice([40, 72]),
        "num_hidden_layers": draw.choice([1, 2, 4]),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "tie_word_embeddings": draw.random() < 0.5,
        "rms_norm_eps": draw.choice([1e-6, 1e-3]),
        "rope_parameters": dict(ROPES[draw.choice(["default", "linear", "llama3", "yarn"])]),
    }
    if family == "llama":
        config["attention_bias"], config["mlp_bias"] = draw.random() < 0.5, draw.random() < 0.5
    if family == "mistral":
        config["sliding_window"] = draw.choice([None, 5, 32])
    if family == "qwen3":
        config["attention_bias"] = draw.random() < 0.5
    if family in ("qwen2", "qwen3"):
        config["use_sliding_window"] = draw.random() < 0.7
        config["sliding_window"] = draw.choice([3, 20])
        config["max_window_layers"] = draw.choice([0, 1, 2])
    return config


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_greedy_tokens_are_those_of_transformers(family: str, seed: int, tmp_path: Path) -> None:
    config = draw_config(family, seed)
    model = build_model(family, seed, **config)
    write_checkpoint(tmp_path, model, transformers_4=seed % 2 == 1)
    prompts = [tokens(seed + i, length, 97) for i, length in enumerate((75, 1, 33, 16))]
    with run_group(tmp_path, block_size=(4, 16)[seed % 2], seed=seed) as driver:
        for prompt, logits in zip(prompts, random_schedule(driver, prompts, seed), strict=True):
            assert (logits - reference_logits(model, prompt)).abs().max() < MAX_ABS
        greedy = driver.greedy(prompts[1:3], 6)
    assert greedy == [reference_greedy(model, prompt, 6) for prompt in prompts[1:3]]


@pytest.mark.parametrize("rope", ROPES)
def test_rope_scaling_at_long_positions(rope: str, tmp_path: Path) -> None:
    model = build_model("llama", 3, rope_parameters=dict(ROPES[rope]))
    write_checkpoint(tmp_path, model, transformers_4=rope in ("yarn", "dynamic"))
    prompt = tokens(1, 700)
    with run_group(tmp_path, block_size=16) as driver:
        (logits,) = random_schedule(driver, [prompt], 5, max_chunk=400)
    assert (logits - reference_logits(model, prompt)).abs().max() < MAX_ABS


def test_the_tests_configurations_tell_the_ropes_apart(tmp_path: Path) -> None:
    """If two kinds gave the same logits, a test above could pass for the wrong reason."""
    prompt = tokens(1, 300)
    models = [build_model("llama", 3, rope_parameters=dict(rope)) for rope in ROPES.values()]
    logits = [reference_logits(model, prompt) for model in models]
    for i, one in enumerate(logits):
        assert all((one - other).abs().max() > 0.05 for other in logits[:i])


def test_dynamic_rope_generates_as_transformers_does_across_the_limit(tmp_path: Path) -> None:
    """Prompts within, up to and beyond max_position_embeddings in one batch; decoding crosses the limit."""
    rope = dict(ROPES["dynamic"])
    model = build_model("llama", 4, rope_parameters=rope, max_position_embeddings=32)
    write_checkpoint(tmp_path, model)
    prompts = [tokens(1, 28), tokens(2, 32), tokens(3, 50)]
    with run_group(tmp_path) as driver:
        greedy = driver.greedy(prompts, 10)
    for prompt, generated in zip(prompts, greedy, strict=True):
        fresh = build_model("llama", 4, rope_parameters=dict(rope), max_position_embeddings=32)
        assert generated == reference_greedy(fresh, prompt, 10)


@pytest.mark.parametrize("window", [1, 7, 64, 300])
def test_sliding_windows_smaller_than_the_sequence(window: int, tmp_path: Path) -> None:
    model = build_model("mistral", 2, sliding_window=window, max_position_embeddings=1024)
    write_checkpoint(tmp_path, model)
    prompts = [tokens(1, 620), tokens(2, 90)]
    with run_group(tmp_path, block_size=16) as driver:
        for prompt, logits in zip(prompts, random_schedule(driver, prompts, 1, max_chunk=600), strict=True):
            assert (logits - reference_logits(model, prompt)).abs().max() < MAX_ABS
        (whole,) = random_schedule(driver, prompts[:1], 2, max_chunk=620)
        assert (whole - reference_logits(model, prompts[0])).abs().max() < MAX_ABS


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_is_as_close_to_float32_as_transformers(family: str, dtype: str, tmp_path: Path) -> None:
    model = build_model(family, 5)
    write_checkpoint(tmp_path, model, dtype=getattr(torch, dtype))
    prompts = [tokens(i, 60) for i in range(3)]
    exact = torch.cat([reference_logits(model, prompt) for prompt in prompts])
    half = model.to(getattr(torch, dtype))
    theirs = torch.cat([reference_logits(half, prompt) for prompt in prompts])
    with run_group(tmp_path, dtype=dtype) as driver:
        ours = torch.cat(random_schedule(driver, prompts, 0))
    assert (ours - exact).abs().max() < 2 * (theirs - exact).abs().max()
    assert (ours - exact).square().mean() < 1.2 * (theirs - exact).square().mean()


def test_the_bundled_model(demo_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(demo_path, dtype=torch.float32)
    prompts = [tokens(i, length, 4096) for i, length in enumerate((300, 40))]
    with run_group(demo_path, block_size=16) as driver:
        for prompt, logits in zip(prompts, random_schedule(driver, prompts, 0), strict=True):
            assert (logits - reference_logits(model, prompt)).abs().max() < MAX_ABS
