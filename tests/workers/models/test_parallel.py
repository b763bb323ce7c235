"""Sharded models against transformers: ranks are threads, joined by real gloo communicators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fuseline.runtime.errors import InvalidArgumentError, ModelFormatError
from fuseline.tests.checkpoints import build_model, reference_logits, write_checkpoint
from fuseline.tests.workers.models.driver import random_schedule, run_group
from fuseline.tests.workers.models.test_families import MAX_ABS, tokens

# Uneven vocabulary shards (101 rows), KV heads replicated where there are fewer than ranks, biases that must be added
# once, norms of Q and K, windows that start at a later layer, which may fall into a later stage.
MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "llama": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 1},
    ),
    "mistral": ("mistral", {"sliding_window": 6, "num_attention_heads": 8, "num_key_value_heads": 4}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    "qwen3": ("qwen3", {"attention_bias": True, "tie_word_embeddings": True, "head_dim": 32}),
}
LAYOUTS = [(1, 2), (2, 1), (4, 1), (2, 2), (1, 3)]


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_sharded_logits_are_those_of_transformers(name: str, tp: int, pp: int, tmp_path: Path) -> None:
    family, overrides = MODELS[name]
    model = build_model(family, 7, **overrides)
    write_checkpoint(tmp_path, model, max_shard_size="40KB")
    prompts = [tokens(i, length) for i, length in enumerate((37, 20, 1))]
    with run_group(tmp_path, tp=tp, pp=pp) as driver:
        for prompt, logits in zip(prompts, random_schedule(driver, prompts, tp + pp), strict=True):
            assert logits.shape == (len(prompt), 101)
            assert (logits - reference_logits(model, prompt)).abs().max() < MAX_ABS


def test_more_ranks_than_vocabulary_rows(tmp_path: Path) -> None:
    model = build_model("llama", 1, vocab_size=3)
    write_checkpoint(tmp_path, model)
    prompt = tokens(1, 20, 3)
    with run_group(tmp_path, tp=4) as driver:
        (logits,) = random_schedule(driver, [prompt], 0)
    assert (logits - reference_logits(model, prompt)).abs().max() < MAX_ABS


def test_a_step_may_want_no_logits(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, build_model("llama"))
    with run_group(tmp_path) as driver:
        batch = driver.batch_of(tokens(1, 9), num_logits=0)
        assert driver.models[0].forward(batch, driver.caches[0]).shape == (0, 101)


def test_on_layer_names_layers_of_the_whole_model_after_their_kv_is_written(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, build_model("llama", num_hidden_layers=3))
    seen: list[int] = []
    with run_group(tmp_path, pp=2) as driver:
        batch = driver.batch_of(tokens(1, 9), num_logits=1)
        first, second = driver.models
        cache = driver.caches[1]
        slots = batch.slot_mapping

        def on_layer(index: int) -> None:
            seen.append(index)
            written = cache[index - 2].transpose(2, 3).flatten(1, 2)[:, slots]
            assert torch.isfinite(written).all()

        hidden = first.forward(batch, driver.caches[0], on_layer=seen.append)
        assert torch.isnan(cache).all()
        second.forward(batch, cache, hidden, on_layer)
        with pytest.raises(InvalidArgumentError, match="hidden"):
            second.forward(batch, cache)
    assert seen == [0, 1, 2]


@pytest.mark.parametrize(
    ("overrides", "tp", "pp", "message"),
    [
        ({"num_attention_heads": 4, "num_key_value_heads": 4}, 8, 1, "num_attention_heads=4"),
        ({"intermediate_size": 90}, 4, 1, "intermediate_size=90"),
        ({"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96}, 2, 1, "num_key_value_heads=3"),
        ({"num_hidden_layers": 1}, 1, 2, "num_hidden_layers=1"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(
    overrides: dict[str, Any], tp: int, pp: int, message: str, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, build_model("llama", **overrides))
    with pytest.raises(ModelFormatError, match=message), run_group(tmp_path, tp=tp, pp=pp):
        pass
