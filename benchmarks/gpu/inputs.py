"""Random weights, caches and steps, made on the device from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from fuseline.kernels import ops
from fuseline.kernels.types import AttentionSpec, AttentionWeights, MlpWeights, StepMetadata, float_weight

from .shapes import Shape

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class Layer:
    """One decoder layer."""

    spec: AttentionSpec
    attention: AttentionWeights
    mlp: MlpWeights


def prepared_attention(weights: AttentionWeights, spec: AttentionSpec) -> AttentionWeights:
    """In the form that the op takes, beside those given."""
    qkv, out = float_weight(weights.qkv).clone(), float_weight(weights.out).clone()
    return ops.prepare_attention(replace(weights, qkv=qkv, out=out), spec, weights.norm.dtype)


def prepared_mlp(weights: MlpWeights) -> MlpWeights:
    """Likewise."""
    gate_up, down = float_weight(weights.gate_up).clone(), float_weight(weights.down).clone()
    return ops.prepare_mlp(replace(weights, gate_up=gate_up, down=down))


class Source:
    """Random tensors in a row from one seed; the same on every run of a device type."""

    def __init__(self, device: torch.device, seed: int, dtype: torch.dtype = torch.bfloat16) -> None:
        self.device = device
        self.dtype = dtype
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, std: float = 1.0, mean: float = 0.0, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
        return values.normal_(mean, std, generator=self.generator)

    def layer(self, shape: Shape, *, bias: bool = False) -> Layer:
        """A layer whose activations keep a size of about one, as trained ones do."""
        spec = AttentionSpec(shape.heads, shape.kv_heads, shape.head_dim, shape.head_dim**-0.5, 1e-6)
        return Layer(spec, self.attention(shape, bias=bias), self.mlp(shape, bias=bias))

    def attention(self, shape: Shape, *, bias: bool = False) -> AttentionWeights:
        attended = shape.heads * shape.head_dim
        return AttentionWeights(
            norm=self.normal(shape.hidden, std=0.1, mean=1.0),
            qkv=self.normal(shape.qkv_rows, shape.hidden, std=shape.hidden**-0.5),
            out=self.normal(shape.hidden, attended, std=attended**-0.5),
            qkv_bias=self.normal(shape.qkv_rows) if bias else None,
            q_norm=self.normal(shape.head_dim, std=0.1, mean=1.0) if shape.qk_norm else None,
            k_norm=self.normal(shape.head_dim, std=0.1, mean=1.0) if shape.qk_norm else None,
            out_bias=self.normal(shape.hidden) if bias else None,
        )

    def mlp(self, shape: Shape, *, bias: bool = False) -> MlpWeights:
        return MlpWeights(
            norm=self.normal(shape.hidden, std=0.1, mean=1.0),
            gate_up=self.normal(2 * shape.inner, shape.hidden, std=shape.hidden**-0.5),
            down=self.normal(shape.hidden, shape.inner, std=shape.inner**-0.5),
            gate_up_bias=self.normal(2 * shape.inner) if bias else None,
            down_bias=self.normal(shape.hidden) if bias else None,
        )

    def stream(self, batch: int, hidden: int) -> Tensor:
        return self.normal(batch, hidden, dtype=torch.float32)


def rotary(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the usual frequencies."""
    inv_freq = 10000.0 ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angles = positions[:, None].float() * inv_freq
    return angles.cos(), angles.sin()


def decode_step(
    contexts: Sequence[int],
    block_size: int,
    num_blocks: int,
    device: torch.device,
    seed: int = 0,
    first_block: int = 0,
) -> StepMetadata:
    """A step of one new token a sequence, its blocks drawn without order from ``[first_block, num_blocks)``.

    Entries of the block tables past a context are out of range: whoever reads them finds out.
    """
    needed = [-(-context // block_size) for context in contexts]
    order = np.random.default_rng(seed).permutation(np.arange(first_block, num_blocks))
    if sum(needed) > order.shape[0]:
        raise ValueError(f"{sum(needed)} blocks are needed, there are {order.shape[0]}")
    tables = np.full((len(contexts), max(needed)), 2**31 - 1, np.int32)
    taken = 0
    for row, count in enumerate(needed):
        tables[row, :count] = order[taken : taken + count]
        taken += count
    lens = np.array(contexts, np.int32)
    last = lens - 1
    slots = tables[np.arange(len(contexts)), last // block_size].astype(np.int64) * block_size + last % block_size
    starts = np.arange(len(contexts) + 1, dtype=np.int32)

    def move(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    return StepMetadata(
        positions=move(last.astype(np.int64)),
        slot_mapping=move(slots),
        query_start=move(starts),
        context_lens=move(lens),
        block_tables=move(tables),
        query_start_host=starts,
        context_lens_host=lens,
        max_query_len=1,
        max_context_len=int(lens.max()),
    )


def context_rows(step: StepMetadata, row: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Blocks and offsets of a sequence's tokens in order, int64[context] each."""
    tokens = torch.arange(int(step.context_lens_host[row]), device=step.block_tables.device)
    return step.block_tables[row].long()[tokens // block_size], tokens % block_size


def poison_unused(kv_layer: Tensor, step: StepMetadata) -> None:
    """NaN and infinities wherever no context of the step has a token, the new tokens' own slots included."""
    used = torch.zeros(kv_layer.shape[1], kv_layer.shape[3], dtype=torch.bool, device=kv_layer.device)
    for row in range(step.num_seqs):
        blocks, offsets = context_rows(step, row, kv_layer.shape[3])
        used[blocks[:-1], offsets[:-1]] = True
    unused = ~used[None, :, None, :, None]
    kv_layer.masked_fill_(unused, float("nan"))
    kv_layer[..., 1].masked_fill_(unused[..., 0], float("inf"))
