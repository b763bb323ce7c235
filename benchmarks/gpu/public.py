"""The public ClusterFusion kernel (github.com/xinhao-luo/ClusterFusion) as one more thing to compare with.

Its batch variant, since the others synchronise the device in every call. It holds Llama-2-7B's shape only, in
float16, with a page table of single tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from .device import Launch
from .inputs import rotary
from .shapes import Shape

SHAPE_NAME = "Llama-2-7B"
NAME = "public clusterfusion"
SOURCES = (
    "pybind.cpp",
    "H100/llama/llama_kernel_dispatch.cu",
    "H100/llama/llama_kernel_sglang_dispatch.cu",
    "H100/llama/llama_kernel_batch_sglang_dispatch.cu",
    "H100/deepseek/deepseek_kernel_dispatch.cu",
    "H100/norm/norm_kernel_dispatch.cu",
)
EPS = 1e-6


@cache
def load(checkout: Path) -> Any:
    """Build and import the checkout's extension; takes a minute or two."""
    from torch.utils.cpp_extension import load as build

    return build(
        "clusterfusion_public",
        [str(checkout / "include" / source) for source in SOURCES],
        extra_cflags=["-O3", "-std=c++17", "-DCOMPILE_SM90"],
        extra_cuda_cflags=["-O3", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "-DCOMPILE_SM90"],
        extra_ldflags=["-lcuda"],
    )


def attention_launches(
    extension: Any, shape: Shape, context: int, num_sets: int, device: torch.device
) -> list[Launch]:
    """Calls of its attention block for one sequence, each with weights and cache of its own."""

    def half(*size: int, std: float) -> torch.Tensor:
        return torch.empty(size, dtype=torch.float16, device=device).normal_(0, std)

    hidden = shape.hidden
    slots = torch.randperm(context, device=device).int()
    indptr = torch.tensor([0, context], dtype=torch.int32, device=device)
    positions = torch.tensor([context - 1], device=device)
    cos_sin = torch.cat(rotary(torch.arange(context, device=device), shape.head_dim), dim=1).contiguous()
    launches: list[Launch] = []
    for _ in range(num_sets):
        keys, values = half(context, hidden, std=1.0), half(context, hidden, std=1.0)
        pointers = [torch.tensor([cache.data_ptr()], dtype=torch.uint64, device=device) for cache in (keys, values)]
        call = partial(
            extension.llama_decoder_layer_batch_decode_sglang,
            half(1, hidden, std=1.0),
            half(1, hidden, std=1.0),
            half(1, hidden, std=1.0),
            half(1, hidden, std=1.0),
            half(3 * hidden, hidden, std=hidden**-0.5),
            half(hidden, hidden, std=hidden**-0.5),
            indptr,
            slots,
            *pointers,
            0,
            half(hidden, std=0.1),
            EPS,
            positions,
            cos_sin,
        )
        launches.append(_Holding(call, (keys, values)))
    return launches


@dataclass(frozen=True, eq=False)
class _Holding:
    """A call, and the tensors that it knows by address only."""

    call: Launch
    tensors: tuple[torch.Tensor, ...]

    def __call__(self) -> object:
        return self.call()
