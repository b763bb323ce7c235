"""Everything but attention: embedding, norms, linear layers, rotary embedding, activation."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..quantized import QuantizedWeight
from ..stacked import StackedWeight
from ..types import Weight, float_weight
from . import quantized

Tensor = torch.Tensor


def embedding(token_ids: Tensor, weight: Tensor, vocab_start: int, vocab_size: int) -> Tensor:
    """See ``ops.embedding``."""
    rows = weight.shape[0]
    if rows == vocab_size:
        return F.embedding(token_ids, weight).float()
    if rows == 0:
        return weight.new_zeros((token_ids.shape[0], weight.shape[1]), dtype=torch.float32)
    local = token_ids - vocab_start
    elsewhere = (local < 0) | (local >= rows)
    return F.embedding(local.masked_fill(elsewhere, 0), weight).float().masked_fill_(elsewhere[:, None], 0)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ``ops.rms_norm``. Computed in float32, rounded once."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    # eps + norm**2 / n: as few passes and temporaries as torch allows.
    scale = torch.addcmul(torch.full((), eps, device=x.device), norm, norm, value=1 / x.shape[-1]).rsqrt_()
    return (x * scale).mul_(weight).to(weight.dtype)


def add_rms_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See ``ops.add_rms_norm``."""
    if delta is not None:
        x = x + delta
    return x, rms_norm(x, weight, eps)


def linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """See ``ops.linear``."""
    if isinstance(weight, QuantizedWeight):
        return quantized.linear(x, weight, bias).to(x.dtype)
    if isinstance(weight, StackedWeight):
        return torch.cat([F.linear(x, *part) for part in zip(weight.parts, weight.split(bias), strict=True)], -1)
    return F.linear(x, float_weight(weight), bias)


def rotary_cos_sin(positions: Tensor, inv_freq: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """See ``ops.rotary_cos_sin``."""
    angles = positions[:, None].float() * inv_freq
    cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if scaling == 1.0 else (cos.mul_(scaling), sin.mul_(scaling))


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See ``ops.rotary_embedding``. Computed in float32, rounded once."""
    halves = x.float().view(x.shape[0], x.shape[1], 2, -1)
    cos, sin = cos[:, None], sin[:, None]
    rotated = halves * cos[:, :, None]
    rotated[:, :, 0].addcmul_(halves[:, :, 1], sin, value=-1)
    rotated[:, :, 1].addcmul_(halves[:, :, 0], sin)
    return rotated.view(x.shape).to(x.dtype)


def silu_and_mul(x: Tensor) -> Tensor:
    """See ``ops.silu_and_mul``."""
    gate, up = x.chunk(2, -1)
    return F.silu(gate).mul_(up)
