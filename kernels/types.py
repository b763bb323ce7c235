"""What the ops take besides plain tensors: a step's metadata, and the weights of the blocks of a decoder layer.

Shapes use these names: T tokens of the step, B sequences, S rows whose logits are wanted, W width of a block table,
H hidden size, N query heads, K KV heads, D head size, I intermediate size, V vocabulary rows. N, K, I and V are this
rank's share.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from .errors import KernelArgumentError
from .packed import PackedWeight
from .quantized import QuantizedWeight
from .stacked import StackedWeight

Tensor = torch.Tensor
Weight = Tensor | StackedWeight | QuantizedWeight | PackedWeight
"""A linear layer's matrix [out, in]."""
FLOAT_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


@dataclass(frozen=True, eq=False)
class StepMetadata:
    """Where a step's tokens stand in their sequences and in the paged KV cache.

    A sequence's tokens are adjacent and in order; sequence ``i`` owns tokens ``[query_start[i], query_start[i+1])``
    at the last positions of its context. Prefill chunks and decodes may be mixed freely.

    Attributes:
        positions: int64[T], position of each token in its sequence.
        slot_mapping: int64[T], ``block_id * block_size + offset``: where each token's KV is written.
        query_start: int32[B + 1], cumulative tokens.
        context_lens: int32[B], KV length of each sequence, this step's tokens included.
        block_tables: int32[B, W], block ids; entries past a sequence's context are never read.
        query_start_host, context_lens_host: the same values for the host to read without waiting for the device.
        max_query_len: most tokens of one sequence; 1 means that the step only decodes.
        max_context_len: longest context.
    """

    positions: Tensor
    slot_mapping: Tensor
    query_start: Tensor
    context_lens: Tensor
    block_tables: Tensor
    query_start_host: NDArray[np.int32]
    context_lens_host: NDArray[np.int32]
    max_query_len: int
    max_context_len: int

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.positions.shape[0]

    @property
    def num_seqs(self) -> int:
        """B."""
        return self.context_lens.shape[0]


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Numbers of an attention block that are not in its weights' shapes.

    Attributes:
        num_heads, num_kv_heads: on this rank.
        scale: of the scores before softmax.
        eps: of the block's RMSNorms.
        sliding_window: tokens that a query sees, itself included; None for all.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    eps: float
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise KernelArgumentError(f"num_heads={self.num_heads} is not a multiple of {self.num_kv_heads} KV heads")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise KernelArgumentError(f"sliding_window must be at least 1, got {self.sliding_window}")


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class AttentionWeights:
    """Weights of one attention block: RMSNorm, QKV, per-head norms of Q and K, output projection.

    Attributes:
        norm: [H].
        qkv: [(N + 2K) * D, H], rows of Q, then K, then V.
        qkv_bias: [(N + 2K) * D].
        q_norm, k_norm: [D].
        out: [H, N * D].
        out_bias: [H]; with tensor parallelism on one rank only, since the partial outputs are summed.
    """

    norm: Tensor
    qkv: Weight
    out: Weight
    qkv_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    out_bias: Tensor | None = None

    def check(self, spec: AttentionSpec) -> None:
        """Refuse weights whose shapes do not fit ``spec``; called once per layer, not per step.

        Raises:
            KernelArgumentError: naming the weight and both shapes.
        """
        if (self.q_norm is None) != (self.k_norm is None):
            raise KernelArgumentError("q_norm and k_norm come together or not at all")
        hidden = self.norm.shape[0]
        rows = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
        expected = {
            "norm": (hidden,),
            "qkv": (rows, hidden),
            "qkv_bias": (rows,),
            "q_norm": (spec.head_dim,),
            "k_norm": (spec.head_dim,),
            "out": (hidden, spec.num_heads * spec.head_dim),
            "out_bias": (hidden,),
        }
        _check_weights(self, expected, self.norm)


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class MlpWeights:
    """Weights of one gated MLP block.

    Attributes:
        norm: [H].
        gate_up: [2 * I, H], rows of gate, then up.
        down: [H, I].
        gate_up_bias: [2 * I].
        down_bias: [H]; with tensor parallelism on one rank only.
    """

    norm: Tensor
    gate_up: Weight
    down: Weight
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    def check(self) -> None:
        """Refuse weights whose shapes do not fit one another; called once per layer, not per step.

        Raises:
            KernelArgumentError: naming the weight and both shapes.
        """
        hidden, inner = self.down.shape
        expected = {
            "norm": (hidden,),
            "gate_up": (2 * inner, hidden),
            "down": (hidden, inner),
            "gate_up_bias": (2 * inner,),
            "down_bias": (hidden,),
        }
        _check_weights(self, expected, self.norm)


def float_weight(weight: Weight) -> Tensor:
    """A weight that is not quantised, in one piece and in rows, for kernels that take no others; others are copied.

    Raises:
        KernelArgumentError: it is quantised.
    """
    if isinstance(weight, QuantizedWeight):
        raise KernelArgumentError(f"expected a float weight, got one of int{weight.bits}")
    if isinstance(weight, PackedWeight):
        return weight.unpack()
    return torch.cat(weight.parts) if isinstance(weight, StackedWeight) else weight


def _check_weights(weights: object, expected: dict[str, tuple[int, ...]], like: Tensor) -> None:
    for name, shape in expected.items():
        tensor: Weight | None = getattr(weights, name)
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise KernelArgumentError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
        if not isinstance(tensor, QuantizedWeight) and (
            tensor.dtype != like.dtype or tensor.dtype not in FLOAT_DTYPES
        ):
            raise KernelArgumentError(f"{name} is {tensor.dtype}, expected {like.dtype}, one of the float types")
        if tensor.device != like.device:
            raise KernelArgumentError(f"{name} is on {tensor.device}, expected {like.device}")
