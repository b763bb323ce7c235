"""What the blocks are compared with: a decode layer as a good engine runs it without fused blocks.

Matrix products by cuBLAS, attention by the fastest backend of torch's SDPA or by FlashInfer, and what is elementwise
compiled into single kernels where the compiler is there; the caller captures all of it in a CUDA graph. The residual
stream is bfloat16, which is to the baseline's favour.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fuseline.kernels.types import AttentionSpec, AttentionWeights, MlpWeights, StepMetadata, float_weight

Tensor = torch.Tensor
Attend = Callable[[Tensor], Tensor]
BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
FLASHINFER_WORKSPACE_BYTES = 128 << 20


def add_rms_norm(residual: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = residual + delta
    x = total.float()
    return total, (x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.float()).to(total.dtype)


def rotate_append(
    heads: Tensor,
    num_q: int,
    norms: tuple[Tensor, Tensor] | None,
    rotary: tuple[Tensor, Tensor],
    key_slots: Tensor,
    value_slots: Tensor,
) -> Tensor:
    """Queries [T, N, D], normalised if they are to be and rotated; keys and values go to their slots [T, K, D]."""
    num_rotated = num_q + key_slots.shape[1]
    x = heads[:, :num_rotated].float()
    if norms is not None:
        scale = (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        x = x * scale * torch.cat((norms[0].expand(num_q, -1), norms[1].expand(num_rotated - num_q, -1))).float()
    low, high = x.chunk(2, -1)
    cos, sin = rotary[0][:, None], rotary[1][:, None]
    rotated = torch.cat((low * cos - high * sin, high * cos + low * sin), -1).to(heads.dtype)
    key_slots.copy_(rotated[:, num_q:])
    value_slots.copy_(heads[:, num_rotated:])
    return rotated[:, :num_q]


def silu_and_mul(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


@dataclass(frozen=True, slots=True)
class Elementwise:
    """The three pieces between the products, each one kernel when compiled."""

    add_rms_norm: Callable[..., tuple[Tensor, Tensor]]
    rotate_append: Callable[..., Tensor]
    silu_and_mul: Callable[[Tensor], Tensor]
    compiled: bool


def elementwise(device: torch.device) -> Elementwise:
    """Compiled on a GPU where Triton is, plain otherwise."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return Elementwise(add_rms_norm, rotate_append, silu_and_mul, compiled=False)
    fused: list[Any] = [torch.compile(piece, dynamic=False) for piece in (add_rms_norm, rotate_append, silu_and_mul)]
    torch._dynamo.config.recompile_limit = 64  # one for each shape that is measured
    return Elementwise(fused[0], fused[1], fused[2], compiled=True)


class Pipeline:
    """Decode blocks of separate kernels."""

    def __init__(self, pieces: Elementwise) -> None:
        self._pieces = pieces

    def attention_block(
        self,
        residual: Tensor,
        delta: Tensor,
        weights: AttentionWeights,
        spec: AttentionSpec,
        rotary: tuple[Tensor, Tensor],
        slots: tuple[Tensor, Tensor],
        attend: Attend,
    ) -> tuple[Tensor, Tensor]:
        """As ``ops.attention_block``; ``slots`` is where the new keys and values go, [B, K, D] each."""
        residual, normed = self._pieces.add_rms_norm(residual, delta, weights.norm, spec.eps)
        heads = F.linear(normed, float_weight(weights.qkv), weights.qkv_bias).view(normed.shape[0], -1, spec.head_dim)
        norms = None if weights.q_norm is None or weights.k_norm is None else (weights.q_norm, weights.k_norm)
        attended = attend(self._pieces.rotate_append(heads, spec.num_heads, norms, rotary, *slots))
        return residual, F.linear(attended.reshape(normed.shape[0], -1), float_weight(weights.out), weights.out_bias)

    def mlp_block(self, residual: Tensor, delta: Tensor, weights: MlpWeights, eps: float) -> tuple[Tensor, Tensor]:
        """As ``ops.mlp_block``."""
        residual, normed = self._pieces.add_rms_norm(residual, delta, weights.norm, eps)
        inner = self._pieces.silu_and_mul(F.linear(normed, float_weight(weights.gate_up), weights.gate_up_bias))
        return residual, F.linear(inner, float_weight(weights.down), weights.down_bias)

    def head(self, residual: Tensor, delta: Tensor, norm: Tensor, weight: Tensor, eps: float) -> Tensor:
        """bfloat16 logits of all rows."""
        return F.linear(self._pieces.add_rms_norm(residual, delta, norm, eps)[1], weight)


def sdpa(spec: AttentionSpec, contiguous: Tensor, backend: SDPBackend) -> Attend:
    """Attention over contiguous keys and values [2, B, K, S, D]; query heads of a KV head stand in for queries."""

    def attend(query: Tensor) -> Tensor:
        grouped = query.reshape(query.shape[0], spec.num_kv_heads, -1, spec.head_dim)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(grouped, contiguous[0], contiguous[1], scale=spec.scale)

    return attend


def usable_backends(spec: AttentionSpec, contiguous: Tensor) -> list[SDPBackend]:
    """Those of SDPA's backends that take these shapes on this device; the plain one where no other does."""
    query = contiguous.new_zeros(contiguous.shape[1], spec.num_heads, spec.head_dim)
    usable: list[SDPBackend] = []
    for backend in BACKENDS:
        if usable and backend is SDPBackend.MATH:
            break  # never faster, and slow at the longest contexts
        try:
            sdpa(spec, contiguous, backend)(query)
        except RuntimeError:  # torch's only way to say that a backend does not take something
            continue
        usable.append(backend)
    return usable


def has_flashinfer() -> bool:
    """Whether FlashInfer can be imported."""
    return importlib.util.find_spec("flashinfer") is not None


def flashinfer(spec: AttentionSpec, kv: Tensor, step: StepMetadata) -> Attend:
    """FlashInfer's paged decode attention over [2, blocks, K, block size, D], planned for this step."""
    import flashinfer as library

    block_size, device = kv.shape[3], kv.device
    lens = step.context_lens
    counts = (lens + block_size - 1) // block_size
    starts = F.pad(counts.cumsum(0), (1, 0)).int()
    indices = torch.cat([step.block_tables[row, : int(count)] for row, count in enumerate(counts)]).int()
    workspace = torch.empty(FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    wrapper = library.BatchDecodeWithPagedKVCacheWrapper(
        workspace,
        "HND",
        use_cuda_graph=True,
        use_tensor_cores=spec.num_heads // spec.num_kv_heads >= 4,
        paged_kv_indptr_buffer=starts,
        paged_kv_indices_buffer=indices,
        paged_kv_last_page_len_buffer=((lens - 1) % block_size + 1).int(),
    )
    wrapper.plan(
        starts,
        indices,
        ((lens - 1) % block_size + 1).int(),
        spec.num_heads,
        spec.num_kv_heads,
        spec.head_dim,
        block_size,
        q_data_type=kv.dtype,
        kv_data_type=kv.dtype,
        sm_scale=spec.scale,
    )
    return lambda query: wrapper.run(query, (kv[0], kv[1]))
