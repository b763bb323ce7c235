"""Random checkpoints of every family, written by transformers, which then serves as the independent reference.

Weights are drawn so that everything matters to the logits: norms differ from one, biases from zero, attention scores
spread over several units.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
SMALL: dict[str, object] = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def build_model(family: str, seed: int = 0, **overrides: Any) -> Any:
    """A random float32 model of transformers, small unless overridden, with eager attention."""
    defaults = dict(SMALL)
    if family == "mistral":
        defaults["sliding_window"] = None
    config_class = getattr(transformers, f"{_CLASSES[family]}Config")
    model_class = getattr(transformers, f"{_CLASSES[family]}ForCausalLM")
    config = config_class(**{**defaults, **overrides})
    config._attn_implementation = "eager"
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.2 * noise)
            elif name.endswith(".bias"):
                parameter.copy_(0.3 * noise)
            elif "q_proj" in name or "k_proj" in name:
                parameter.copy_(1.7 * noise / parameter.shape[1] ** 0.5)
            else:
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
    return model


def write_checkpoint(
    path: Path,
    model: Any,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    transformers_4: bool = False,
) -> Path:
    """Save ``model`` in ``dtype`` under ``path``; with ``transformers_4`` its config.json as that release wrote it.

    Leaves ``model`` in float32 with the values that were saved.
    """
    model.to(dtype).save_pretrained(path, max_shard_size=max_shard_size)
    model.float()
    if transformers_4:
        config_path = path / "config.json"
        config = json.loads(config_path.read_text())
        config["torch_dtype"] = config.pop("dtype")
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
        config.pop("layer_types", None)
        config_path.write_text(json.dumps(config, indent=2))
    return path


def edit_config(path: Path, **changes: object) -> None:
    """Change fields of a checkpoint's config.json; the value ``...`` removes one."""
    config_path = path / "config.json"
    config = json.loads(config_path.read_text())
    for field, value in changes.items():
        if value is ...:
            config.pop(field, None)
        else:
            config[field] = value
    config_path.write_text(json.dumps(config))


def reference_logits(model: Any, token_ids: list[int]) -> torch.Tensor:
    """float32[len(token_ids), vocab_size], of one forward pass over all of them."""
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([token_ids]), use_cache=False).logits[0]
    return logits.float()


def reference_greedy(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    """What transformers generates, greedily, end of sequence ignored."""
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    generated: list[int] = out[0, len(prompt) :].tolist()
    return generated
