"""Qwen2 and Qwen2.5."""

from __future__ import annotations

from .config import DecoderConfig, common_config, default_head_dim, windows_by_layer
from .config_fields import ConfigFields

ARCHITECTURE = "Qwen2ForCausalLM"


def decoder_config(fields: ConfigFields) -> DecoderConfig:
    """Q, K and V always have biases, nothing else has; a sliding window may start at some layer."""
    return common_config(
        fields,
        ARCHITECTURE,
        num_kv_heads=fields.integer("num_key_value_heads"),
        head_dim=default_head_dim(fields),
        sliding_windows=windows_by_layer(fields),
        qkv_bias=True,
    )
