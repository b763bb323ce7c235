"""Packed copies of weights, made once for each set of weights and kept as long as it lives.

A packed copy lies beside the original, which plain torch needs for whatever the fused blocks do not take, prompts
first of all: so weights take twice their memory on a GPU. ``prepare`` makes the copies when a model is loaded, before
the rest of the memory is given to the KV cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.weak import WeakIdKeyDictionary

from ..types import AttentionSpec, AttentionWeights, MlpWeights, float_weight
from . import packing

Tensor = torch.Tensor
_packed: WeakIdKeyDictionary = WeakIdKeyDictionary()


@dataclass(frozen=True, slots=True)
class PackedAttention:
    """``AttentionWeights.qkv`` and ``out`` as the attention block takes them."""

    qkv: Tensor
    out: Tensor


@dataclass(frozen=True, slots=True)
class PackedMlp:
    """``MlpWeights.gate_up`` and ``down`` as the MLP block takes them."""

    gate_up: Tensor
    down: Tensor


def packed_attention(weights: AttentionWeights, head_dim: int) -> PackedAttention:
    """The packed copy of an attention block's weights."""
    found: PackedAttention | None = _packed.get(weights)  # type: ignore[no-untyped-call]
    if found is None:
        qkv = packing.interleave_halves(float_weight(weights.qkv), head_dim)
        found = PackedAttention(packing.pack(qkv), packing.pack(float_weight(weights.out)))
        _packed[weights] = found
    return found


def packed_mlp(weights: MlpWeights) -> PackedMlp:
    """The packed copy of an MLP block's weights."""
    found: PackedMlp | None = _packed.get(weights)  # type: ignore[no-untyped-call]
    if found is None:
        gate_up = float_weight(weights.gate_up)
        gate_up = packing.interleave_halves(gate_up, gate_up.shape[0])
        found = PackedMlp(packing.pack(gate_up), packing.pack(float_weight(weights.down)))
        _packed[weights] = found
    return found


def packed_table(weight: Tensor) -> Tensor:
    """The packed copy of a head's weight [V, H], with rows of zeros up to a multiple of 16."""
    found: Tensor | None = _packed.get(weight)  # type: ignore[no-untyped-call]
    if found is None:
        found = packing.pack(weight)
        _packed[weight] = found
    return found


def unpack_attention(packed: PackedAttention, spec: AttentionSpec) -> PackedAttention:
    """Row-major weights again, as in ``AttentionWeights``."""
    rows = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    qkv = packing.separate_halves(packing.unpack(packed.qkv, rows), spec.head_dim)
    return PackedAttention(qkv, packing.unpack(packed.out, packed.out.shape[0] * packing.UNIT_ROWS))


def unpack_mlp(packed: PackedMlp) -> PackedMlp:
    """Row-major weights again, as in ``MlpWeights``."""
    gate_up = packing.unpack(packed.gate_up, packed.gate_up.shape[0] * packing.UNIT_ROWS)
    down = packing.unpack(packed.down, packed.down.shape[0] * packing.UNIT_ROWS)
    return PackedMlp(packing.separate_halves(gate_up, gate_up.shape[0]), down)
