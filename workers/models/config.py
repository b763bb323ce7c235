"""What the shared decoder needs to know of a model, and the parsing that all families have in common.

Configurations come in two dialects. transformers 4 writes ``rope_theta`` and ``rope_scaling`` side by side and the
dtype as ``torch_dtype``; transformers 5 writes one ``rope_parameters`` object and ``dtype``. Both are read, and a
file that states both must agree with itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ...runtime.errors import InvalidArgumentError
from ...runtime.sharding import ModelShape
from ..quantization.config import Quantization, parse_quantization
from .config_fields import ConfigFields

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KV_DTYPES = {**DTYPES, "int8": torch.int8}
DEFAULT_ROPE_THETA = 10000.0
MAX_LAYERS = 4096
ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "llama3")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding, with every default resolved.

    Attributes:
        kind: one of ``ROPE_KINDS``.
        original_max_position: context length of pretraining, before scaling.
        attention_scaling: factor on cosines and sines.
        low_freq_factor, high_freq_factor: of llama3.
        beta_fast, beta_slow, truncate: of yarn.
    """

    kind: str
    theta: float
    factor: float
    original_max_position: int
    attention_scaling: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class WeightNames:
    """What a family calls its tensors; the defaults are those of Llama and of most that followed it.

    ``layer`` takes the layer's index; the names below it are completed with ``.weight`` and ``.bias``.
    """

    embedding: str = "model.embed_tokens.weight"
    layer: str = "model.layers.{}."
    attention_norm: str = "input_layernorm"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    query_norm: str = "self_attn.q_norm"
    key_norm: str = "self_attn.k_norm"
    attention_out: str = "self_attn.o_proj"
    mlp_norm: str = "post_attention_layernorm"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    norm: str = "model.norm.weight"
    head: str = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """A decoder-only transformer with RMSNorm, rotary embedding, grouped-query attention and a gated SiLU MLP.

    Attributes:
        architecture: as ``config.json`` names it.
        sliding_windows: per layer, tokens that a query sees, itself included; None for all.
        dtype: the checkpoint's, None when the configuration does not say.
        eos_token_ids: of ``config.json``, then those that ``generation_config.json`` adds.
        quantization: of the checkpoint, None when it holds floats.
    """

    architecture: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    sliding_windows: tuple[int | None, ...]
    qkv_bias: bool
    attention_out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    dtype: str | None
    eos_token_ids: tuple[int, ...]
    quantization: Quantization | None = None
    names: WeightNames = WeightNames()

    def shape(self) -> ModelShape:
        """The numbers that decide how the model can be cut up."""
        return ModelShape(
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            vocab_size=self.vocab_size,
        )

    def resolve_max_model_len(self, requested: int | None) -> int:
        """The longest sequence to serve: what was asked for, else ``max_position_embeddings``.

        Raises:
            InvalidArgumentError: longer than the positions the model, with its rope scaling, was made for.
        """
        limit = self.max_position_embeddings
        if self.rope.kind in ("linear", "dynamic", "yarn"):
            limit = max(limit, int(self.rope.original_max_position * self.rope.factor))
        if requested is None:
            return self.max_position_embeddings
        if not 1 <= requested <= limit:
            raise InvalidArgumentError(
                f"max_model_len must be between 1 and {limit}, the positions of this model, got {requested}",
                field="max_model_len",
                value=requested,
                limit=limit,
            )
        return requested


def common_config(
    fields: ConfigFields,
    architecture: str,
    *,
    num_kv_heads: int,
    head_dim: int,
    sliding_windows: tuple[int | None, ...],
    qkv_bias: bool = False,
    attention_out_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
) -> DecoderConfig:
    """Read what all families share; what they differ in comes as arguments.

    Raises:
        ModelFormatError: a field is missing, malformed, unsupported or at odds with another.
    """
    _refuse_unsupported(fields)
    num_heads = fields.integer("num_attention_heads")
    if num_heads % num_kv_heads:
        raise fields.error("num_key_value_heads", f"a divisor of num_attention_heads={num_heads}")
    if head_dim % 2:
        raise fields.error("head_dim", f"even, since rotary embedding rotates pairs ({head_dim} follows)")
    max_position = fields.integer("max_position_embeddings")
    return DecoderConfig(
        architecture=architecture,
        num_layers=num_layers(fields),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        hidden_size=fields.integer("hidden_size"),
        intermediate_size=fields.integer("intermediate_size"),
        vocab_size=fields.integer("vocab_size"),
        max_position_embeddings=max_position,
        rms_norm_eps=fields.number("rms_norm_eps"),
        rope=parse_rope(fields, max_position),
        sliding_windows=sliding_windows,
        qkv_bias=qkv_bias,
        attention_out_bias=attention_out_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        tie_word_embeddings=fields.flag("tie_word_embeddings", default=False),
        dtype=_parse_dtype(fields),
        eos_token_ids=eos_ids(fields, fields.integer("vocab_size")),
        quantization=parse_quantization(fields.nested("quantization_config")),
    )


def num_layers(fields: ConfigFields) -> int:
    """``num_hidden_layers``, bounded so that lists by layer stay small whatever a file claims."""
    return fields.integer("num_hidden_layers", maximum=MAX_LAYERS)


def default_head_dim(fields: ConfigFields) -> int:
    """``head_dim``, else the hidden size divided among the heads."""
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    if "head_dim" not in fields and hidden % heads:
        raise fields.error("hidden_size", f"a multiple of num_attention_heads={heads}, or head_dim be given")
    return fields.integer("head_dim", default=hidden // heads)


def windows_by_layer(fields: ConfigFields) -> tuple[int | None, ...]:
    """Qwen's rule: ``layer_types`` decide; without them, layers from ``max_window_layers`` on use the window.

    The window exists only with ``use_sliding_window``.
    """
    layers = num_layers(fields)
    window = None
    if fields.flag("use_sliding_window", default=False) and "sliding_window" in fields:
        window = fields.integer("sliding_window")
    if "layer_types" not in fields:
        if window is None:
            return (None,) * layers
        full = fields.integer("max_window_layers", minimum=0)
        return tuple(None if layer < full else window for layer in range(layers))
    layer_types = fields.texts("layer_types")
    if len(layer_types) != layers:
        raise fields.error("layer_types", f"one entry for each of num_hidden_layers={layers} layers")
    if not set(layer_types) <= {"full_attention", "sliding_attention"}:
        raise fields.error("layer_types", "made of full_attention and sliding_attention")
    if "sliding_attention" in layer_types and window is None:
        raise fields.error(
            "sliding_window", "given, with use_sliding_window, since layer_types name sliding_attention"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in layer_types)


def eos_ids(fields: ConfigFields, vocab_size: int) -> tuple[int, ...]:
    """The end-of-sequence tokens that a configuration names."""
    ids = fields.integers("eos_token_id")
    if any(token >= vocab_size for token in ids):
        raise fields.error("eos_token_id", f"less than vocab_size={vocab_size}")
    return tuple(ids)


def _refuse_unsupported(fields: ConfigFields) -> None:
    if "auto_map" in fields:
        raise fields.error("auto_map", "absent: code that comes with a model is never run")
    if fields.text("hidden_act", default="silu") not in ("silu", "swish"):
        raise fields.error("hidden_act", "silu")


def _parse_dtype(fields: ConfigFields) -> str | None:
    names = {
        field: fields.text(field).removeprefix("torch.") for field in ("dtype", "torch_dtype") if field in fields
    }
    for field, name in names.items():
        if name not in DTYPES:
            raise fields.error(field, f"one of {', '.join(DTYPES)}")
    if len(set(names.values())) > 1:
        raise fields.error("dtype", f"the same as torch_dtype={names['torch_dtype']}")
    return next(iter(names.values()), None)


def parse_rope(fields: ConfigFields, max_position: int) -> RopeConfig:
    """Read the rotary embedding in either dialect, with transformers' defaults."""
    rope = _rope_fields(fields)
    theta = rope.number("rope_theta", default=fields.number("rope_theta", default=DEFAULT_ROPE_THETA))
    if fields.number("rope_theta", default=theta) != theta:
        raise fields.error("rope_theta", f"the same as rope_parameters.rope_theta={theta}")
    for place in (fields, rope):
        if place.number("partial_rotary_factor", default=1.0) != 1.0:
            raise place.error("partial_rotary_factor", "1: the whole head is rotated")
    kind = _rope_kind(rope)
    if kind == "default":
        return RopeConfig(kind, theta, 1.0, max_position)
    if kind in ("linear", "dynamic"):
        return RopeConfig(kind, theta, rope.number("factor"), max_position)
    original = rope.integer("original_max_position_embeddings", default=max_position)
    original = fields.integer("original_max_position_embeddings", default=original)
    if kind == "yarn":
        return _parse_yarn(rope, theta, original, max_position)
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if high <= low:
        raise rope.error("high_freq_factor", f"more than low_freq_factor={low}")
    return RopeConfig(kind, theta, rope.number("factor"), original, low_freq_factor=low, high_freq_factor=high)


def _rope_fields(fields: ConfigFields) -> ConfigFields:
    """The object that describes the scaling: ``rope_parameters``, or ``rope_scaling`` of the older dialect."""
    newer, older = fields.nested("rope_parameters"), fields.nested("rope_scaling")
    if newer is not None and older is not None:
        for name in older.names():
            if name not in ("type", "rope_type") and older.value(name) != newer.value(name):
                raise older.error(name, f"the same as in rope_parameters, {newer.value(name)!r}")
        if _rope_kind(older) != _rope_kind(newer):
            raise fields.error("rope_scaling", f"of the same type as rope_parameters, {_rope_kind(newer)}")
    rope = newer or older or ConfigFields(fields.path, {})
    for name in rope.names():
        if isinstance(rope.value(name), dict):
            raise rope.error(name, "a plain value: parameters by layer type are not supported")
    return rope


def _rope_kind(rope: ConfigFields) -> str:
    name = "rope_type" if "rope_type" in rope else "type"
    kind = rope.text(name, default="default")
    if kind not in ROPE_KINDS:
        raise rope.error(name, f"one of {', '.join(ROPE_KINDS)}")
    return kind


def _parse_yarn(rope: ConfigFields, theta: float, original: int, max_position: int) -> RopeConfig:
    if theta <= 1:
        raise rope.error("rope_theta", "more than 1")
    factor = rope.number("factor", default=max_position / original)
    if "attention_factor" in rope:
        scaling = rope.number("attention_factor")
    elif "mscale" in rope and "mscale_all_dim" in rope:
        scaling = _yarn_mscale(factor, rope.number("mscale")) / _yarn_mscale(factor, rope.number("mscale_all_dim"))
    else:
        scaling = _yarn_mscale(factor, 1.0)
    return RopeConfig(
        "yarn",
        theta,
        factor,
        original,
        attention_scaling=scaling,
        beta_fast=rope.number("beta_fast", default=32.0),
        beta_slow=rope.number("beta_slow", default=1.0),
        truncate=rope.flag("truncate", default=True),
    )


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
