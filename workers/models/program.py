"""The program that a decoder's step runs: input, two blocks per layer, output.

Ops are numbered: 0 is the input, ``1 + 2 * i`` and ``2 + 2 * i`` are the attention and the MLP block of layer ``i``,
and the last is the output. Whoever walks a step runs ranges of ops and may stop between any two, to all-reduce what
the last one left or to send KV on its way.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch

from ...collectives.communicator import Communicator
from ...collectives.shared_memory import SharedMemoryCommunicator
from ...kernels import ops
from ...kernels.cpu.decoder import AllReduceError, CpuDecoder, CpuStep, DecoderPlan
from ...kernels.cpu.library import native_library
from ..forward_batch import ForwardBatch
from ..layers.rotary import RotaryEmbedding
from ..weights import DecoderWeights
from .config import DecoderConfig

Tensor = torch.Tensor


class StepProgram(Protocol):
    """One rank's ops: ``begin``, then ranges that follow one another, make a step. One thread, one step at a time.

    Attributes:
        all_reduces: whether ``run`` itself makes the sums over the tensor-parallel ranks.
    """

    all_reduces: bool

    def begin(self, batch: ForwardBatch, kv_cache: Tensor, hidden: Tensor | None) -> None:
        """Start a step; see ``DecoderModel.forward`` for the arguments."""

    def run(self, begin: int, end: int) -> Tensor:
        """Run ops ``[begin, end)``.

        Returns:
            What the last of them left. After the input or a block it is a sum over the tensor-parallel ranks, or
            this rank's part of it, for the caller to all-reduce in place before the next op (hidden states that were
            given are no such part). After the output it is the logits float32[S, V] of this rank's vocabulary, or on
            an earlier stage the hidden states.

        Raises:
            UnavailableError: a peer is gone.
        """


def make_program(config: DecoderConfig, weights: DecoderWeights, tp: Communicator) -> StepProgram:
    """The fastest program that this machine runs the weights with, which are as ``prepare_weights`` leaves them."""
    rotary = RotaryEmbedding(config.rope, config.head_dim, weights.layers[0].attention.norm.device)
    if weights.layers[0].attention.norm.device.type == "cpu" and (library := native_library()) is not None:
        plan = DecoderPlan(
            weights.layers,
            weights.embedding,
            weights.vocab_start,
            config.vocab_size,
            weights.norm,
            weights.head,
            config.rms_norm_eps,
            config.rope.attention_scaling,
        )
        shared = tp if isinstance(tp, SharedMemoryCommunicator) else None
        all_reduce = None if shared is None else shared.native_all_reduce()
        return NativeProgram(CpuDecoder(library, plan, all_reduce), rotary, shared)
    return BlockProgram(config, weights, rotary)


class NativeProgram:
    """A range of ops is one call of the native decoder: a whole step, where nothing interrupts it.

    Args:
        shared: the communicator whose all-reduce the decoder calls; None when it has none to call.
    """

    def __init__(self, decoder: CpuDecoder, rotary: RotaryEmbedding, shared: SharedMemoryCommunicator | None) -> None:
        self.all_reduces = shared is not None
        self._decoder = decoder
        self._rotary = rotary
        self._shared = shared
        self._step: CpuStep

    def begin(self, batch: ForwardBatch, kv_cache: Tensor, hidden: Tensor | None) -> None:
        """See ``StepProgram``."""
        inv_freq = self._rotary.inv_freq(batch)
        self._step = self._decoder.begin(batch, kv_cache, batch.token_ids, hidden, batch.logits_indices, inv_freq)

    def run(self, begin: int, end: int) -> Tensor:
        """See ``StepProgram``."""
        try:
            return self._decoder.run(self._step, begin, end)
        except AllReduceError as error:
            if self._shared is not None:
                self._shared.check(error.status)
            raise


class BlockProgram:
    """Every op is one of ``kernels.ops``: torch's reference, or what stands behind it on a GPU."""

    all_reduces = False

    def __init__(self, config: DecoderConfig, weights: DecoderWeights, rotary: RotaryEmbedding) -> None:
        self._config = config
        self._weights = weights
        self._rotary = rotary
        self._windows = frozenset(layer.spec.sliding_window for layer in weights.layers)
        self._dtype = weights.layers[0].attention.norm.dtype
        # The step under way.
        self._batch: ForwardBatch
        self._kv_cache: Tensor
        self._attention: ops.AttentionPlan
        self._cos_sin: tuple[Tensor, Tensor]
        self._residual: Tensor
        self._delta: Tensor | None

    def begin(self, batch: ForwardBatch, kv_cache: Tensor, hidden: Tensor | None) -> None:
        """See ``StepProgram``."""
        self._batch, self._kv_cache = batch, kv_cache
        self._attention = ops.plan_attention(batch, kv_cache, self._windows, self._dtype)
        self._cos_sin = self._rotary.cos_sin(batch)
        self._delta = None
        if hidden is not None:
            self._residual = hidden

    def run(self, begin: int, end: int) -> Tensor:
        """See ``StepProgram``."""
        last = 2 * len(self._weights.layers) + 1
        result = self._residual if begin > 0 else self._input()
        for op in range(max(begin, 1), end):
            result = self._output() if op == last else self._block(*divmod(op - 1, 2))
        return result

    def _input(self) -> Tensor:
        if self._weights.embedding is not None:
            self._residual = ops.embedding(
                self._batch.token_ids, self._weights.embedding, self._weights.vocab_start, self._config.vocab_size
            )
        return self._residual

    def _block(self, index: int, is_mlp: int) -> Tensor:
        layer = self._weights.layers[index]
        if is_mlp:
            self._residual, delta = ops.mlp_block(self._residual, self._delta, layer.mlp, layer.spec.eps)
        else:
            self._residual, delta = ops.attention_block(
                self._residual,
                self._delta,
                layer.attention,
                layer.spec,
                self._cos_sin,
                self._kv_cache[index],
                self._attention,
            )
        self._delta = delta
        return delta

    def _output(self) -> Tensor:
        if self._weights.norm is None or self._weights.head is None:
            return self._residual if self._delta is None else self._residual + self._delta
        return ops.head(
            self._residual,
            self._delta,
            self._weights.norm,
            self._weights.head,
            self._batch.logits_indices,
            self._config.rms_norm_eps,
        )


def prepare_weights(weights: DecoderWeights, kv_dtype: torch.dtype) -> DecoderWeights:
    """In the form that the ops are fastest with over such a KV cache.

    They may take the memory of those given, but for the embedding.
    """
    layers = tuple(
        replace(
            layer,
            attention=ops.prepare_attention(layer.attention, layer.spec, kv_dtype),
            mlp=ops.prepare_mlp(layer.mlp),
        )
        for layer in weights.layers
    )
    head = weights.head
    if head is not None:
        head = ops.prepare_head(head, keep=head is weights.embedding)
    return replace(weights, layers=layers, head=head)
