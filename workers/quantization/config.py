"""What ``--quantization`` and a checkpoint's ``quantization_config`` say, and what follows for each linear layer.

Three kinds of quantised checkpoints are read as they come: GPTQ, AWQ and compressed-tensors, the latter with 8-bit
weights and activations or with packed 4-bit weights. Floats are rounded to nearest while they load. What cannot run
is refused here, by field and value, before a weight is read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ...kernels.quantized import ACTIVATION_BLOCK
from ...runtime.config import QUANTIZATIONS, check_choice
from ...runtime.errors import InvalidArgumentError
from ..models.config_fields import ConfigFields

WHOLE_ROW = -1
ROUNDED = "round-to-nearest"
GPTQ, AWQ, COMPRESSED_TENSORS = "gptq", "awq", "compressed-tensors"
METHODS = (GPTQ, AWQ, COMPRESSED_TENSORS)
MAX_GROUP = 2**20
# A pattern that a checkpoint brings along must not be one that takes for ever to match.
MAX_PATTERN_CHARS = 256
MAX_PATTERN_REPEATS = 4


@dataclass(frozen=True, slots=True)
class LinearFormat:
    """How a linear layer's weight is stored, or is to be rounded.

    Attributes:
        method: ``ROUNDED`` or one of ``METHODS``.
        bits: 8 or 4.
        group: input channels per scale, or ``WHOLE_ROW``; int8 is always by row.
        zeros: whether there are zero points.
        zero_offset: to add to stored zero points.
        act_order: ``g_idx`` names each input channel's group, in any order.
    """

    method: str
    bits: int
    group: int = WHOLE_ROW
    zeros: bool = False
    zero_offset: int = 0
    act_order: bool = False


INT8 = LinearFormat(ROUNDED, 8)
ROUNDINGS = {
    "int8": INT8,
    "int4": LinearFormat(ROUNDED, 4, 32, zeros=True),
    "int4_g64": LinearFormat(ROUNDED, 4, 64, zeros=True),
    "int4_g128": LinearFormat(ROUNDED, 4, 128, zeros=True),
}


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a model's linear layers are held in memory.

    Attributes:
        name: the value of ``--quantization`` that this is; never "auto" or "none".
        linear: of the layers' projections.
        head: of ``lm_head``; None keeps the checkpoint's floats.
        ignored: modules that a quantised checkpoint left as they were, by name or, after ``re:``, by pattern.
    """

    name: str
    linear: LinearFormat
    head: LinearFormat | None
    ignored: tuple[str, ...] = ()

    def format_of(self, module: str) -> LinearFormat | None:
        """The format of a layer's projection, None if it holds floats."""
        return None if any(_matches(pattern, module) for pattern in self.ignored) else self.linear


def resolve_quantization(requested: str, stored: Quantization | None) -> Quantization | None:
    """What a value of ``--quantization`` means for a checkpoint; None for floats.

    Args:
        requested: "auto" follows the checkpoint; a method's name demands that it is the checkpoint's.
        stored: of ``parse_quantization``.

    Raises:
        InvalidArgumentError: the value is unknown, or is not what the checkpoint holds.
    """
    check_choice("quantization", requested, QUANTIZATIONS)
    if requested == "auto" or (stored is not None and requested == stored.name):
        return stored
    if stored is not None or requested in METHODS:
        found = "not quantised" if stored is None else f"quantised with {stored.name}"
        raise InvalidArgumentError(
            f"quantization={requested} does not fit a checkpoint that is {found}",
            field="quantization",
            value=requested,
        )
    if requested == "none":
        return None
    return Quantization(requested, ROUNDINGS[requested], head=INT8)


def parse_quantization(fields: ConfigFields | None) -> Quantization | None:
    """Read a ``quantization_config``; None when there is none.

    Raises:
        ModelFormatError: it is malformed, or describes what cannot run.
    """
    if fields is None:
        return None
    method = fields.text("quant_method", default="")
    parsers = {GPTQ: _parse_gptq, AWQ: _parse_awq, COMPRESSED_TENSORS: _parse_compressed_tensors}
    if method not in parsers:
        raise fields.error("quant_method", f"one of {', '.join(METHODS)}")
    return parsers[method](fields)


def _parse_gptq(fields: ConfigFields) -> Quantization:
    _demand(fields, "bits", (4,))
    if dynamic := fields.nested("dynamic"):
        for rule in dynamic.names():
            raise dynamic.error(rule, "absent: modules that differ from the rest are not supported")
    checkpoint_format = fields.text("checkpoint_format", default="gptq")
    if checkpoint_format not in ("gptq", "gptq_v2"):
        raise fields.error("checkpoint_format", "gptq or gptq_v2")
    linear = LinearFormat(
        GPTQ,
        4,
        _group(fields, "group_size"),
        zeros=not fields.flag("sym", default=False),
        zero_offset=1 if checkpoint_format == "gptq" else 0,
        act_order=fields.flag("desc_act", default=False),
    )
    return Quantization(GPTQ, linear, head=linear if fields.flag("lm_head", default=False) else None)


def _parse_awq(fields: ConfigFields) -> Quantization:
    _demand(fields, "bits", (4,))
    if fields.text("version", default="gemm").lower() != "gemm":
        raise fields.error("version", "gemm")
    linear = LinearFormat(AWQ, 4, _group(fields, "group_size"), zeros=fields.flag("zero_point", default=True))
    # AutoAWQ skips every module whose name contains one of these.
    skipped = tuple(f"re:.*{re.escape(name)}" for name in fields.texts("modules_to_not_convert"))
    return Quantization(AWQ, linear, head=None, ignored=skipped)


def _parse_compressed_tensors(fields: ConfigFields) -> Quantization:
    for field in ("kv_cache_scheme", "transform_config"):
        if fields.value(field):
            raise fields.error(field, "absent")
    if (sparsity := fields.nested("sparsity_config")) and sparsity.text("format", default="dense") != "dense":
        raise sparsity.error("format", "dense")
    groups = fields.nested("config_groups")
    if groups is None or len(groups.names()) != 1:
        raise fields.error("config_groups", "one group of modules, the linear layers")
    group = groups.nested(groups.names()[0])
    if group is None or group.texts("targets") != ["Linear"]:
        raise groups.error(groups.names()[0], "an object whose targets are Linear")
    weights = group.nested("weights")
    if weights is None or weights.text("type", default="int") != "int" or weights.flag("dynamic", default=False):
        raise group.error("weights", "given, of type int and not dynamic")
    inputs = group.nested("input_activations")
    linear = _compressed_format(weights, inputs)
    if inputs is not None:
        _demand(inputs, "num_bits", (8,))
        if inputs.text("type", default="int") != "int" or not inputs.flag("dynamic", default=False):
            raise group.error("input_activations", "of type int and dynamic")
    wanted = "int-quantized" if linear.bits == 8 else "pack-quantized"
    holder = group if "format" in group else fields
    if holder.text("format") != wanted:
        raise holder.error("format", wanted)
    ignored = tuple(fields.texts("ignore"))
    for pattern in ignored:
        _check_pattern(fields, pattern)
    head = None if any(_matches(pattern, "lm_head") for pattern in ignored) else linear
    return Quantization(COMPRESSED_TENSORS, linear, head, ignored)


def _compressed_format(weights: ConfigFields, inputs: ConfigFields | None) -> LinearFormat:
    _demand(weights, "num_bits", (8, 4))
    bits, symmetric = weights.integer("num_bits"), weights.flag("symmetric", default=True)
    if bits == 8:
        if inputs is None:
            raise weights.error("num_bits", "4 where activations are not quantised")
        if not symmetric:
            raise weights.error("symmetric", "true for 8 bits")
        if weights.text("strategy", default="") != "channel":
            raise weights.error("strategy", "channel for 8 bits")
        return LinearFormat(COMPRESSED_TENSORS, 8)
    by_group = weights.text("strategy", default="group") == "group"
    if not by_group and weights.text("strategy") != "channel":
        raise weights.error("strategy", "group or channel")
    return LinearFormat(
        COMPRESSED_TENSORS,
        4,
        _group(weights, "group_size") if by_group else WHOLE_ROW,
        zeros=not symmetric,
        act_order=weights.text("actorder", default="") in ("group", "dynamic"),
    )


def _demand(fields: ConfigFields, field: str, allowed: tuple[int, ...]) -> None:
    if type(fields.value(field)) is not int or fields.value(field) not in allowed:
        raise fields.error(field, " or ".join(map(str, allowed)))


def _group(fields: ConfigFields, field: str) -> int:
    """A group size; ``WHOLE_ROW`` as -1."""
    group = fields.integer(field, minimum=WHOLE_ROW, maximum=MAX_GROUP)
    if group != WHOLE_ROW and (group < 1 or group % ACTIVATION_BLOCK):
        raise fields.error(field, f"{WHOLE_ROW} or a multiple of {ACTIVATION_BLOCK}")
    return group


def _check_pattern(fields: ConfigFields, pattern: str) -> None:
    repeats = len(re.findall(r"[*+?{]", pattern))
    if len(pattern) > MAX_PATTERN_CHARS or repeats > MAX_PATTERN_REPEATS or re.search(r"\)[*+?{]", pattern):
        raise fields.error("ignore", f"made of names and of patterns with at most {MAX_PATTERN_REPEATS} repeats")
    try:
        re.compile(pattern.removeprefix("re:"))
    except re.error as error:
        raise fields.error("ignore", f"made of names and regular expressions ({error})") from error


def _matches(pattern: str, module: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return pattern == module
