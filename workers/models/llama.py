"""Llama 2, 3, 3.1, 3.2 and models of the same build."""

from __future__ import annotations

from .config import DecoderConfig, common_config, default_head_dim, num_layers
from .config_fields import ConfigFields

ARCHITECTURE = "LlamaForCausalLM"


def decoder_config(fields: ConfigFields) -> DecoderConfig:
    """Biases are optional, on all four attention projections at once; every layer attends to everything."""
    attention_bias = fields.flag("attention_bias", default=False)
    return common_config(
        fields,
        ARCHITECTURE,
        num_kv_heads=fields.integer("num_key_value_heads", default=fields.integer("num_attention_heads")),
        head_dim=default_head_dim(fields),
        sliding_windows=(None,) * num_layers(fields),
        qkv_bias=attention_bias,
        attention_out_bias=attention_bias,
        mlp_bias=fields.flag("mlp_bias", default=False),
    )
