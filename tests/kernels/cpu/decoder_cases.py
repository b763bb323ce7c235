"""Random decoders for the native code to run, what they compute written out in float64, and steps to run them by.

Blocks are handed out in random order from a cache full of NaN, and block tables hold no block behind a context.
"""

from __future__ import annotations

import ctypes
import random
from dataclasses import dataclass, field

import numpy as np
import torch
from hypothesis import strategies as st

from fuseline.kernels.cpu.decoder import CpuDecoder, CpuStep, DecoderPlan
from fuseline.kernels.kv_rows import dequantize_rows, quantize_rows, row_width
from fuseline.kernels.types import AttentionSpec, AttentionWeights, MlpWeights, StepMetadata

Tensor = torch.Tensor
VOCAB = 37
THETA = 1000.0
EPS = 1e-3


@dataclass(frozen=True)
class Layer:
    spec: AttentionSpec
    attention: AttentionWeights
    mlp: MlpWeights


@dataclass(frozen=True)
class Shape:
    """``kv_dtype`` is that of the cache, where it is not the weights'."""

    dtype: torch.dtype = torch.float32
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    hidden: int = 24
    inner: int = 40
    windows: tuple[int | None, ...] = (None, 5)
    biases: bool = True
    qk_norm: bool = True
    kv_dtype: torch.dtype | None = None

    @property
    def cache_dtype(self) -> torch.dtype:
        return self.kv_dtype or self.dtype


shapes = st.builds(
    lambda dtype, group, kv_heads, head_dim, hidden, inner, windows, biases, qk_norm, kv_dtype: Shape(
        dtype, group * kv_heads, kv_heads, head_dim, hidden, inner, tuple(windows), biases, qk_norm, kv_dtype
    ),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([1, 2, 3, 4, 7]),
    st.integers(1, 3),
    st.sampled_from([2, 6, 8, 10, 16, 24, 32, 72]),
    st.integers(1, 40),
    st.integers(1, 600),
    st.lists(st.one_of(st.none(), st.integers(1, 300)), min_size=1, max_size=3),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, torch.int8]),
)


def make_plan(shape: Shape, seed: int) -> DecoderPlan:
    generator = torch.Generator().manual_seed(seed)

    def randn(*size: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        return (mean + scale * torch.randn(size, generator=generator)).to(shape.dtype)

    def matrix(rows: int, cols: int, scale: float = 1.0) -> Tensor:
        return randn(rows, cols, scale=scale * cols**-0.5)

    def norm(size: int) -> Tensor:
        return randn(size, scale=0.2, mean=1.0)

    def layer(window: int | None) -> Layer:
        size, hidden = shape.head_dim, shape.hidden
        rows = (shape.heads + 2 * shape.kv_heads) * size
        attention = AttentionWeights(
            norm=norm(hidden),
            qkv=matrix(rows, hidden, 1.5),
            out=matrix(hidden, shape.heads * size),
            qkv_bias=randn(rows, scale=0.3) if shape.biases else None,
            out_bias=randn(hidden, scale=0.3) if shape.biases else None,
            q_norm=norm(size) if shape.qk_norm else None,
            k_norm=norm(size) if shape.qk_norm else None,
        )
        mlp = MlpWeights(
            norm=norm(hidden),
            gate_up=matrix(2 * shape.inner, hidden, 2.0),
            down=matrix(hidden, shape.inner),
            gate_up_bias=randn(2 * shape.inner, scale=0.3) if shape.biases else None,
            down_bias=randn(hidden, scale=0.3) if shape.biases else None,
        )
        spec = AttentionSpec(shape.heads, shape.kv_heads, size, size**-0.5, EPS, window)
        return Layer(spec, attention, mlp)

    layers = tuple(layer(window) for window in shape.windows)
    embedding = randn(VOCAB, shape.hidden)
    return DecoderPlan(layers, embedding, 0, VOCAB, norm(shape.hidden), matrix(VOCAB, shape.hidden), EPS)


def inverse_frequencies(head_dim: int) -> Tensor:
    return THETA ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def rounded(kv: Tensor, dtype: torch.dtype) -> Tensor:
    """Float64 [..., D] as a cache gives it back."""
    kv = kv.float()
    return (dequantize_rows(quantize_rows(kv)) if dtype == torch.int8 else kv.to(dtype)).double()


def written_out(plan: DecoderPlan, token_ids: list[int], cache_dtype: torch.dtype) -> Tensor:
    """float64[tokens, VOCAB] of one sequence; only the KV is rounded, as the cache does."""
    assert plan.embedding is not None
    assert plan.norm is not None
    assert isinstance(plan.head, Tensor)
    head_dim = plan.layers[0].spec.head_dim
    x = plan.embedding[token_ids].double()
    positions = torch.arange(len(token_ids))
    angles = (positions[:, None].float() * inverse_frequencies(head_dim)).double()
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]

    def rms(x: Tensor, weight: Tensor | None) -> Tensor:
        return x if weight is None else x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()

    def linear(x: Tensor, weight: object, bias: Tensor | None) -> Tensor:
        assert isinstance(weight, Tensor)
        y = x @ weight.double().T
        return y if bias is None else y + bias.double()

    def rotate(x: Tensor) -> Tensor:
        half = head_dim // 2
        turned = torch.complex(x[..., :half], x[..., half:]) * turns
        return torch.cat((turned.real, turned.imag), -1)

    for layer in plan.layers:
        spec, weights, mlp = layer.spec, layer.attention, layer.mlp
        heads = linear(rms(x, weights.norm), weights.qkv, weights.qkv_bias).view(len(x), -1, head_dim)
        query, key, value = torch.split(heads, [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], 1)
        query, key = rotate(rms(query, weights.q_norm)), rotate(rms(key, weights.k_norm))
        group = spec.num_heads // spec.num_kv_heads
        key, value = (rounded(kv, cache_dtype).repeat_interleave(group, 1) for kv in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query, key) * spec.scale
        hidden = positions > positions[:, None]
        if spec.sliding_window is not None:
            hidden |= positions <= positions[:, None] - spec.sliding_window
        attended = torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), value)
        x = x + linear(attended.flatten(1), weights.out, weights.out_bias)
        gate, up = linear(rms(x, mlp.norm), mlp.gate_up, mlp.gate_up_bias).chunk(2, -1)
        x = x + linear(gate * gate.sigmoid() * up, mlp.down, mlp.down_bias)
    return rms(x, plan.norm) @ plan.head.double().T


@dataclass
class Sequence:
    token_ids: list[int]
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0


class Runner:
    """Runs steps over sequences; hands out blocks."""

    def __init__(
        self,
        library: ctypes.CDLL,
        plan: DecoderPlan,
        block_size: int,
        num_blocks: int = 400,
        seed: int = 0,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        self.decoder = CpuDecoder(library, plan)
        spec = plan.layers[0].spec
        dtype = kv_dtype or plan.layers[0].attention.norm.dtype
        self.poison = -1 if dtype == torch.int8 else float("nan")  # bytes of all ones make a scale of NaN
        shape = (len(plan.layers), 2, num_blocks, spec.num_kv_heads, block_size, row_width(spec.head_dim, dtype))
        self.cache = torch.full(shape, self.poison, dtype=dtype)
        self.inv_freq = inverse_frequencies(spec.head_dim)
        self._free = random.Random(seed).sample(range(num_blocks), num_blocks)

    def metadata(self, work: list[tuple[Sequence, int]]) -> tuple[StepMetadata, Tensor]:
        """The step of the next so many tokens of each sequence, and those tokens."""
        size = self.cache.shape[4]
        positions: list[int] = []
        slots: list[int] = []
        tokens: list[int] = []
        for sequence, n in work:
            start, end = sequence.num_computed, sequence.num_computed + n
            while len(sequence.blocks) * size < end:
                sequence.blocks.append(self._free.pop())
            positions += range(start, end)
            slots += [sequence.blocks[p // size] * size + p % size for p in range(start, end)]
            tokens += sequence.token_ids[start:end]
            sequence.num_computed = end
        width = max(len(sequence.blocks) for sequence, _ in work) + 1
        tables = np.full((len(work), width), 2**30, np.int32)
        for row, (sequence, _) in enumerate(work):
            tables[row, : len(sequence.blocks)] = sequence.blocks
        starts = np.cumsum([0, *(n for _, n in work)], dtype=np.int32)
        contexts = np.array([sequence.num_computed for sequence, _ in work], np.int32)
        step = StepMetadata(
            positions=torch.tensor(positions),
            slot_mapping=torch.tensor(slots),
            query_start=torch.from_numpy(starts),
            context_lens=torch.from_numpy(contexts),
            block_tables=torch.from_numpy(tables),
            query_start_host=starts,
            context_lens_host=contexts,
            max_query_len=max(n for _, n in work),
            max_context_len=int(contexts.max()),
        )
        return step, torch.tensor(tokens)

    def begin(self, work: list[tuple[Sequence, int]]) -> CpuStep:
        step, tokens = self.metadata(work)
        wanted = torch.arange(len(tokens))
        return self.decoder.begin(step, self.cache, tokens, None, wanted, self.inv_freq)

    def run(self, work: list[tuple[Sequence, int]]) -> list[Tensor]:
        """Logits of all tokens of each sequence."""
        logits = self.decoder.run(self.begin(work), 0, self.decoder.num_ops)
        return list(torch.split(logits, [n for _, n in work]))

    def release(self, sequence: Sequence) -> None:
        """Give a sequence's blocks up, full of NaN again."""
        self.cache[:, :, sequence.blocks] = self.poison
        self._free += sequence.blocks
        sequence.blocks, sequence.num_computed = [], 0


def draw_tokens(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(VOCAB), k=length)


def random_schedule(
    runner: Runner, prompts: list[list[int]], seed: int, max_chunk: int = 300, preempts: bool = False
) -> list[Tensor]:
    """All logits of all sequences, computed in random mixes of chunks and single tokens.

    With ``preempts`` a sequence now and then loses its blocks and is computed anew.
    """
    draw = random.Random(seed)
    sequences = [Sequence(prompt) for prompt in prompts]
    logits: list[list[Tensor]] = [[] for _ in sequences]
    num_preempted = 0
    while waiting := [i for i, s in enumerate(sequences) if s.num_computed < len(s.token_ids)]:
        chosen = draw.sample(waiting, draw.randint(1, len(waiting)))
        work = []
        for i in chosen:
            left = len(sequences[i].token_ids) - sequences[i].num_computed
            work.append((sequences[i], min(left, draw.choice([1, 1, 2, draw.randint(1, max_chunk)]))))
        for i, part in zip(chosen, runner.run(work), strict=True):
            logits[i].append(part)
        if preempts and num_preempted < 3 and draw.random() < 0.2:
            i = draw.randrange(len(sequences))
            runner.release(sequences[i])
            logits[i] = []
            num_preempted += 1
    return [torch.cat(parts) for parts in logits]
