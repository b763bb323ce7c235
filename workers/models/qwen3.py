"""Qwen3, dense."""

from __future__ import annotations

from .config import DecoderConfig, common_config, windows_by_layer
from .config_fields import ConfigFields

ARCHITECTURE = "Qwen3ForCausalLM"
DEFAULT_HEAD_DIM = 128


def decoder_config(fields: ConfigFields) -> DecoderConfig:
    """Every head of Q and K is normed before it is rotated; the head size does not follow from the hidden size."""
    attention_bias = fields.flag("attention_bias", default=False)
    return common_config(
        fields,
        ARCHITECTURE,
        num_kv_heads=fields.integer("num_key_value_heads"),
        head_dim=fields.integer("head_dim", default=DEFAULT_HEAD_DIM),
        sliding_windows=windows_by_layer(fields),
        qkv_bias=attention_bias,
        attention_out_bias=attention_bias,
        qk_norm=True,
    )
