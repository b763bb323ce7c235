"""Everything but attention: embedding, norms, linear layers, rotary embedding, activation."""

from __future__ import annotations

import torch
import torch.nn.functional as F

Tensor = torch.Tensor


def embedding(token_ids: Tensor, weight: Tensor, vocab_start: int, vocab_size: int) -> Tensor:
    """See ``ops.embedding``."""
    rows = weight.shape[0]
    if rows == vocab_size:
        return F.embedding(token_ids, weight)
    if rows == 0:
        return weight.new_zeros(token_ids.shape[0], weight.shape[1])
    local = token_ids - vocab_start
    elsewhere = (local < 0) | (local >= rows)
    return F.embedding(local.masked_fill(elsewhere, 0), weight).masked_fill_(elsewhere[:, None], 0)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ``ops.rms_norm``. Computed in float32, rounded once."""
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (scaled * weight).to(x.dtype)


def add_rms_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See ``ops.add_rms_norm``."""
    if delta is not None:
        x = x + delta
    return x, rms_norm(x, weight, eps)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See ``ops.linear``."""
    return F.linear(x, weight, bias)


def rotary_cos_sin(positions: Tensor, inv_freq: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """See ``ops.rotary_cos_sin``."""
    angles = positions[:, None].float() * inv_freq
    cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if scaling == 1.0 else (cos.mul_(scaling), sin.mul_(scaling))


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See ``ops.rotary_embedding``. Computed in float32, rounded once."""
    first, second = x.float().chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    rotated = torch.cat(
        (torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)), -1
    )
    return rotated.to(x.dtype)


def silu_and_mul(x: Tensor) -> Tensor:
    """See ``ops.silu_and_mul``."""
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up
