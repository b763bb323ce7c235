"""The decoder of a rank as one native object: any range of a step's ops is one call.

Ops are numbered as in ``decoder.h``: 0 is the input, ``1 + 2 * i`` and ``2 + 2 * i`` are the blocks of layer ``i``,
the last is the output. Everything that does not change from step to step is described and checked once, when the
decoder is made; a step hands over pointers into its batch and its cache.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_not
from typing import NamedTuple, Protocol

import torch

from ..checks import check_lengths, check_step, describe
from ..errors import KernelArgumentError
from ..exchange import NativeAllReduce
from ..kv_rows import row_width
from ..stacked import StackedWeight
from ..types import AttentionSpec, AttentionWeights, MlpWeights, StepMetadata, Weight
from .linear import DTYPES, QUANTIZED, LinearWeight, describe_weight
from .structures import MAX_GATE_UP_PARTS, MAX_QKV_PARTS, NativeLayer, NativeModel, NativeStep

Tensor = torch.Tensor
KV_DTYPES = {**DTYPES, torch.int8: QUANTIZED[8]}
_FAILURES = {
    -2: "a token id is outside the vocabulary",
    -3: "a slot is outside the KV cache",
    -4: "a block id is outside the KV cache",
    -5: "an index of logits_indices is not a token of the step",
}


class LayerPlan(Protocol):
    """One layer of what a decoder executes."""

    @property
    def spec(self) -> AttentionSpec:
        """Numbers of both blocks."""

    @property
    def attention(self) -> AttentionWeights:
        """The first block."""

    @property
    def mlp(self) -> MlpWeights:
        """The second."""


@dataclass(frozen=True, eq=False, slots=True)
class DecoderPlan:
    """What one rank executes.

    Attributes:
        layers: in order, at least one; KV heads and head sizes are the same in all.
        embedding: [rows, H], vocabulary rows from ``vocab_start`` on; None unless on the first pipeline stage.
        norm, head: [H] and [rows, H]; None unless on the last.
        eps: of ``norm``.
        rotary_scaling: of cosines and sines.
    """

    layers: Sequence[LayerPlan]
    embedding: Tensor | None
    vocab_start: int
    vocab_size: int
    norm: Tensor | None
    head: Weight | None
    eps: float
    rotary_scaling: float = 1.0


class _Given(NamedTuple):
    """The tensors that a step is described by; see ``CpuDecoder.begin``."""

    positions: Tensor
    slot_mapping: Tensor
    query_start: Tensor
    context_lens: Tensor
    block_tables: Tensor
    kv_cache: Tensor
    token_ids: Tensor | None
    hidden: Tensor | None
    logits_indices: Tensor
    inv_freq: Tensor


@dataclass(eq=False, frozen=True, slots=True)
class StepLayout:
    """All of a step's description that follows from which tensors it was given, and not from what they hold.

    Attributes:
        given: what ``native`` points to; kept for that.
        native: for the native code; ``output``, ``prepared`` and ``has_delta`` are set anew for each step.
        residual, delta: float32[T, H], the stream between ops.
        rotary: float32[2, T, D / 2], cosines and sines.
        num_rows: of the output.
    """

    given: _Given
    native: NativeStep
    residual: Tensor
    delta: Tensor
    rotary: Tensor
    num_rows: int


@dataclass(eq=False, slots=True)
class CpuStep:
    """A step under way.

    Attributes:
        output: what the last op writes: float32[S, V], or float32[T, H] without a head.
    """

    layout: StepLayout
    output: Tensor


class CpuDecoder:
    """A rank's decoder. Used by one thread at a time; several decoders may share the process's team of threads.

    Args:
        library: of ``native_library``.
        plan: its tensors are kept, not copied (but for norms and biases that are not float32).
        all_reduce: to run between the ops; None when whoever runs them does that, or there is nothing to reduce.

    Raises:
        KernelArgumentError: the weights do not fit one another, or are not on the CPU.
        MemoryError: there is none for the activations.
    """

    def __init__(self, library: ctypes.CDLL, plan: DecoderPlan, all_reduce: NativeAllReduce | None = None) -> None:
        self._keep: list[Weight] = []
        _check_plan(plan)
        spec = plan.layers[0].spec
        self._head_dim, self._num_kv_heads = spec.head_dim, spec.num_kv_heads
        self._num_layers = len(plan.layers)
        self._hidden = plan.layers[0].attention.norm.shape[0]
        self._embeds = plan.embedding is not None
        self._width = self._hidden if plan.head is None else plan.head.shape[0]
        self._has_head = plan.head is not None
        layers = (NativeLayer * len(plan.layers))(*map(self._layer, plan.layers))
        model = NativeModel(
            layers=layers,
            num_layers=len(layers),
            hidden=self._hidden,
            vocab_start=plan.vocab_start,
            vocab_size=plan.vocab_size,
            norm=self._float(plan.norm),
            eps=plan.eps,
            rotary_scaling=plan.rotary_scaling,
            embeds=plan.embedding is not None,
            has_head=plan.head is not None,
        )
        if plan.embedding is not None:
            model.embedding = self._weight(plan.embedding)
        if plan.head is not None:
            model.head = self._weight(plan.head)
        if all_reduce is not None:
            model.all_reduce, model.all_reduce_handle = all_reduce.function, all_reduce.handle
        self._all_reduce = all_reduce  # keeps its owner
        # Of the last step, if the next one is likely to have the same. One will do: microbatches of pipeline stages
        # alternate between buffers, but then the later stages, given new hidden states, describe every step anew.
        self._layout: StepLayout | None = None
        self._step: CpuStep | None = None  # the last that began: steps of one layout share its memory
        library.fl_cpu_decoder_create.restype = ctypes.c_void_p
        handle = library.fl_cpu_decoder_create(ctypes.byref(model))
        if handle is None:
            raise MemoryError("no memory for the activations of a decoder")
        self._handle = ctypes.c_void_p(handle)
        weakref.finalize(self, library.fl_cpu_decoder_destroy, self._handle)
        self._run = library.fl_cpu_decoder_run
        self._run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]

    @property
    def num_ops(self) -> int:
        """Input, two blocks per layer, output."""
        return 2 * self._num_layers + 2

    def begin(
        self,
        step: StepMetadata,
        kv_cache: Tensor,
        token_ids: Tensor | None,
        hidden: Tensor | None,
        logits_indices: Tensor,
        inv_freq: Tensor,
    ) -> CpuStep:
        """Describe a step. What it points to must not change before its last op has run, nor may another one begin.

        A step of the very same tensors as the last one is described at once: decodes in the same buffers.

        Args:
            kv_cache: [layers, 2, num_blocks, K, block_size, row_width], contiguous; see ``kv_rows``.
            token_ids: int64[T], on the first stage.
            hidden: float32[T, H], on later ones; not changed.
            logits_indices: int64[S].
            inv_freq: float32[D / 2], or [T, D / 2] when frequencies differ by token.

        Raises:
            KernelArgumentError: shapes, dtypes or strides do not fit.
        """
        given = _Given(
            step.positions,
            step.slot_mapping,
            step.query_start,
            step.context_lens,
            step.block_tables,
            kv_cache,
            token_ids,
            hidden,
            logits_indices,
            inv_freq,
        )
        layout = self._layout
        if layout is None or any(map(is_not, layout.given, given)):
            layout = self._lay_out(step, given)
            self._layout = layout if self._embeds and step.max_query_len == 1 else None
        else:
            check_lengths(step, kv_cache.shape[4])
        output = torch.empty(layout.num_rows, self._width)
        native = layout.native
        native.output, native.prepared, native.has_delta = output.data_ptr(), 0, 0
        self._step = CpuStep(layout, output)
        return self._step

    def _lay_out(self, step: StepMetadata, given: _Given) -> StepLayout:
        """Check and describe what was given, with memory for what the step computes but for its output."""
        check_step(step, given.kv_cache)
        self._check_cache(given.kv_cache)
        num_tokens, half = step.num_tokens, self._head_dim // 2
        if self._embeds:
            residual = torch.empty(num_tokens, self._hidden)
            _check_index("token_ids", given.token_ids, num_tokens)
        else:
            _check_floats("hidden", given.hidden, (num_tokens, self._hidden))
            residual = given.hidden.clone()  # type: ignore[union-attr]  # checked
        _check_index("logits_indices", given.logits_indices, None)
        per_token = given.inv_freq.dim() == 2
        _check_floats("inv_freq", given.inv_freq, (num_tokens, half) if per_token else (half,))
        _check_contiguous(given)
        delta, rotary = torch.empty_like(residual), torch.empty(2, num_tokens, half)
        num_logits = given.logits_indices.shape[0]
        native = NativeStep(
            num_tokens=num_tokens,
            num_seqs=step.num_seqs,
            num_logits=num_logits,
            token_ids=None if given.token_ids is None else given.token_ids.data_ptr(),
            positions=given.positions.data_ptr(),
            slots=given.slot_mapping.data_ptr(),
            logits_indices=given.logits_indices.data_ptr(),
            query_start=given.query_start.data_ptr(),
            context_lens=given.context_lens.data_ptr(),
            block_tables=given.block_tables.data_ptr(),
            table_stride=given.block_tables.stride(0),
            inv_freq=given.inv_freq.data_ptr(),
            inv_freq_stride=half if per_token else 0,
            cos=rotary[0].data_ptr(),
            sin=rotary[1].data_ptr(),
            residual=residual.data_ptr(),
            delta=delta.data_ptr(),
            kv_data=given.kv_cache.data_ptr(),
            num_blocks=given.kv_cache.shape[2],
            block_size=given.kv_cache.shape[4],
            kv_dtype=KV_DTYPES[given.kv_cache.dtype],
        )
        return StepLayout(given, native, residual, delta, rotary, num_logits if self._has_head else num_tokens)

    def run(self, step: CpuStep, begin: int, end: int) -> Tensor:
        """Run ops ``[begin, end)``, the next ones of the step.

        Returns:
            What the last of them left: the layout's ``residual`` after the input, its ``delta`` after a block (both
            to be all-reduced by the caller when there is something to reduce and no ``all_reduce`` was given), else
            ``step.output``.

        Raises:
            KernelArgumentError: an id in the step is out of range, or another step has begun; nothing has been
                computed.
            MemoryError: there is none for the step's intermediate results.
            AllReduceError: what ``all_reduce`` failed with.
        """
        if not 0 <= begin < end <= self.num_ops:
            raise KernelArgumentError(f"ops [{begin}, {end}) are not among {self.num_ops}")
        if step is not self._step:
            raise KernelArgumentError("another step has begun")
        status = self._run(self._handle, ctypes.addressof(step.layout.native), begin, end)
        if status != 0:
            raise _failure(status)
        if end == self.num_ops:
            return step.output
        return step.layout.residual if end == 1 else step.layout.delta

    def _layer(self, layer: LayerPlan) -> NativeLayer:
        spec, attention, mlp = layer.spec, layer.attention, layer.mlp
        native = NativeLayer(
            out=self._weight(attention.out, attention.out_bias),
            down=self._weight(mlp.down, mlp.down_bias),
            attention_norm=self._float(attention.norm),
            q_norm=self._float(attention.q_norm),
            k_norm=self._float(attention.k_norm),
            mlp_norm=self._float(mlp.norm),
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            window=spec.sliding_window or 0,
            scale=spec.scale,
            eps=spec.eps,
        )
        qkv = self._parts(attention.qkv, attention.qkv_bias, MAX_QKV_PARTS)
        gate_up = self._parts(mlp.gate_up, mlp.gate_up_bias, MAX_GATE_UP_PARTS)
        native.num_qkv, native.qkv[: len(qkv)] = len(qkv), qkv
        native.num_gate_up, native.gate_up[: len(gate_up)] = len(gate_up), gate_up
        return native

    def _parts(self, weight: Weight, bias: Tensor | None, most: int) -> list[LinearWeight]:
        if not isinstance(weight, StackedWeight):
            return [self._weight(weight, bias)]
        if len(weight.parts) > most:
            raise KernelArgumentError(f"a weight of {len(weight.parts)} parts where there is room for {most}")
        return [self._weight(*part) for part in zip(weight.parts, weight.split(bias), strict=True)]

    def _weight(self, weight: Weight, bias: Tensor | None = None) -> LinearWeight:
        if bias is not None:
            bias = bias.float().contiguous()
            self._keep.append(bias)
        self._keep.append(weight)
        return describe_weight(weight, bias)

    def _float(self, tensor: Tensor | None) -> int | None:
        """The address of a float32 copy, or of the tensor itself if it is that."""
        if tensor is None:
            return None
        kept = tensor.float().contiguous()
        self._keep.append(kept)
        return kept.data_ptr()

    def _check_cache(self, kv_cache: Tensor) -> None:
        width = row_width(self._head_dim, kv_cache.dtype)
        expected = (self._num_layers, 2, kv_cache.shape[2], self._num_kv_heads, kv_cache.shape[4], width)
        if tuple(kv_cache.shape) != expected or kv_cache.dtype not in KV_DTYPES or not kv_cache.is_contiguous():
            raise KernelArgumentError(f"the cache must be {expected}, contiguous, got {describe(kv_cache)}")
        if kv_cache.device.type != "cpu":
            raise KernelArgumentError(f"the cache must be on the CPU, got {describe(kv_cache)}")


class AllReduceError(RuntimeError):
    """The native all-reduce between two ops failed; the step cannot go on.

    Attributes:
        status: what it returned.
    """

    def __init__(self, status: int) -> None:
        super().__init__(f"the all-reduce between two ops failed with status {status}")
        self.status = status


def _failure(status: int) -> Exception:
    if status > 0:
        return AllReduceError(status)
    if status in _FAILURES:
        return KernelArgumentError(_FAILURES[status])
    return MemoryError("no memory for the intermediate results of a step")


def _check_contiguous(given: _Given) -> None:
    for name in ("positions", "slot_mapping", "query_start", "context_lens"):
        if not getattr(given, name).is_contiguous():
            raise KernelArgumentError(f"{name} must be contiguous")
    if given.block_tables.shape[1] > 1 and given.block_tables.stride(1) != 1:
        raise KernelArgumentError("rows of block_tables must be contiguous")


def _check_plan(plan: DecoderPlan) -> None:
    if not plan.layers:
        raise KernelArgumentError("a decoder has at least one layer")
    first = plan.layers[0]
    hidden = first.attention.norm.shape[0]
    for layer in plan.layers:
        layer.attention.check(layer.spec)
        layer.mlp.check()
        if layer.attention.norm.shape != (hidden,) or layer.mlp.norm.shape != (hidden,):
            raise KernelArgumentError("the layers of a decoder have one hidden size")
        if (layer.spec.num_kv_heads, layer.spec.head_dim) != (first.spec.num_kv_heads, first.spec.head_dim):
            raise KernelArgumentError(f"{layer.spec} does not share a cache with {first.spec}")
        if layer.spec.num_heads != first.spec.num_heads or layer.spec.head_dim % 2:
            raise KernelArgumentError(f"{layer.spec} does not share a plan with {first.spec}, or has an odd head_dim")
    for name, table in (("embedding", plan.embedding), ("head", plan.head)):
        if table is not None and (len(table.shape) != 2 or table.shape[1] != hidden):
            raise KernelArgumentError(f"{name} must be [rows, {hidden}], got {tuple(table.shape)}")
    if (plan.norm is None) != (plan.head is None) or (plan.norm is not None and plan.norm.shape != (hidden,)):
        raise KernelArgumentError(f"norm and head come together, the norm as [{hidden}]")


def _check_index(name: str, index: Tensor | None, length: int | None) -> None:
    if index is None or index.dtype != torch.int64 or index.dim() != 1 or index.device.type != "cpu":
        raise KernelArgumentError(
            f"{name} must be int64[n] on the CPU, got {index if index is None else describe(index)}"
        )
    if not index.is_contiguous() or (length is not None and index.shape[0] != length):
        raise KernelArgumentError(f"{name} must be int64[{length}], contiguous, got {describe(index)}")


def _check_floats(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if (
        tensor is None
        or tuple(tensor.shape) != shape
        or tensor.dtype != torch.float32
        or tensor.device.type != "cpu"
        or not tensor.is_contiguous()
    ):
        got = None if tensor is None else describe(tensor)
        raise KernelArgumentError(f"{name} must be float32{list(shape)} on the CPU, contiguous, got {got}")
