"""Mistral 7B and models of the same build."""

from __future__ import annotations

from .config import DecoderConfig, common_config, default_head_dim, num_layers
from .config_fields import ConfigFields

ARCHITECTURE = "MistralForCausalLM"


def decoder_config(fields: ConfigFields) -> DecoderConfig:
    """No biases; one sliding window for all layers, unless it is null."""
    layers = num_layers(fields)
    # transformers takes an absent window for one of 4096, and only null for none: guess neither.
    if not fields.states("sliding_window"):
        raise fields.error("sliding_window", "given: an integer, or null for none")
    window = fields.integer("sliding_window") if "sliding_window" in fields else None
    kind = "full_attention" if window is None else "sliding_attention"
    if "layer_types" in fields and fields.texts("layer_types") != [kind] * layers:
        raise fields.error("layer_types", f"{kind} for every layer, as sliding_window says")
    return common_config(
        fields,
        ARCHITECTURE,
        num_kv_heads=fields.integer("num_key_value_heads"),
        head_dim=default_head_dim(fields),
        sliding_windows=(window,) * layers,
    )
