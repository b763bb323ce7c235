"""The decoder that all families share: executes a plan of blocks over the ops, on one rank of a group.

The plan is ``DecoderWeights.layers``, data that is fixed when the model is loaded; a ``StepProgram`` made from it
runs any range of its ops. A step walks the program once, in one call where nothing is to be done in between; nothing
in the walk depends on values on the device, so the same walk can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F

from ...collectives.communicator import Communicator
from ...kernels.kv_rows import row_width
from ...runtime.errors import InvalidArgumentError
from ...runtime.sharding import ParallelConfig, kv_range, vocab_range
from ..forward_batch import ForwardBatch
from ..memory import lazy_zeros
from ..weights import DecoderWeights
from .config import DecoderConfig
from .program import NativeProgram, make_program, prepare_weights

Tensor = torch.Tensor


class DecoderModel:
    """One rank's share of a decoder.

    Args:
        kv_dtype: of its caches: that of the weights, or int8.

    Attributes:
        config: of the whole model.
        weights: this rank's, in execution order; they never require gradients.
        is_native: whether the process's team of threads computes, rather than torch.
    """

    def __init__(
        self,
        config: DecoderConfig,
        parallel: ParallelConfig,
        rank: int,
        weights: DecoderWeights,
        tp: Communicator,
        kv_dtype: torch.dtype,
    ) -> None:
        self._device = weights.layers[0].attention.norm.device
        self._kv_dtype = kv_dtype
        self.config = config
        # Those given are not kept: their memory may be taken.
        self.weights = weights = prepare_weights(weights, kv_dtype)
        self._parallel = parallel
        self._rank = rank
        self._tp = tp
        self._program = make_program(config, weights, tp)
        self.is_native = isinstance(self._program, NativeProgram)
        # The ranges in which a step runs: op by op when sums are to be made between them, up to every attention block
        # when someone waits for the KV of its layer, or all at once.
        end = self._num_ops = 2 * len(weights.layers) + 2
        every = tuple(pairwise(range(end + 1)))
        self._sums = tp.world_size > 1 and not self._program.all_reduces
        self._ranges = every if self._sums else ((0, end),)
        self._layer_ranges = every if self._sums else tuple(pairwise((0, *range(2, end + 1, 2))))

    def new_kv_cache(self, num_blocks: int, block_size: int) -> Tensor:
        """Zeros for this rank's layers and KV heads: [layers, 2, num_blocks, kv_heads, block_size, row_width]."""
        held = kv_range(self.config.shape(), self._parallel, self._rank)
        shape = (held.num_layers, 2, num_blocks, held.num_heads, block_size)
        return lazy_zeros((*shape, row_width(self.config.head_dim, self._kv_dtype)), self._kv_dtype, self._device)

    def forward(
        self,
        batch: ForwardBatch,
        kv_cache: Tensor,
        hidden: Tensor | None = None,
        on_layer: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Compute one step. Collective over the tensor-parallel ranks; changes ``kv_cache``.

        Args:
            batch: the same on all ranks.
            kv_cache: of ``new_kv_cache``.
            hidden: float32[T, hidden_size], the previous stage's result; None on the first stage. Not changed.
            on_layer: called with a layer's index in the whole model once the step's KV of that layer is written
                (queued, on a GPU).

        Returns:
            On the last stage float32 logits [S, vocab_size]; complete on the first tensor-parallel rank only, the
            others get no rows. On earlier stages float32[T, hidden_size] for the next one.

        Raises:
            InvalidArgumentError: ``hidden`` is missing.
            KernelArgumentError: batch, cache and model do not fit one another.
            UnavailableError: a peer is gone.
        """
        if hidden is None and self.weights.embedding is None:
            raise InvalidArgumentError("a later pipeline stage needs the hidden states of the one before it")
        self._program.begin(batch, kv_cache, hidden)
        for begin, end in self._ranges if on_layer is None else self._layer_ranges:
            result = self._program.run(begin, end)
            if on_layer is not None and end % 2 == 0 and end < self._num_ops:
                on_layer(self.weights.layers[end // 2 - 1].index)
            if self._sums and end < self._num_ops and (begin > 0 or hidden is None):
                self._tp.all_reduce(result)
        return result if self.weights.head is None else self._gather_logits(result)

    def _gather_logits(self, logits: Tensor) -> Tensor:
        """float32[S, vocab_size] on the first rank, of the ranks' shards, which may differ by a row."""
        size = self._tp.world_size
        if size == 1:
            return logits
        bounds = [vocab_range(self.config.vocab_size, size, rank) for rank in range(size)]
        widest = bounds[0][1] - bounds[0][0]
        padded = F.pad(logits, (0, widest - logits.shape[1]))
        gathered = self._tp.all_gather(padded[None], dim=0)
        if self._tp.rank != 0:
            return gathered.new_empty((0, self.config.vocab_size), dtype=torch.float32)
        return torch.cat([gathered[rank, :, : end - start] for rank, (start, end) in enumerate(bounds)], 1)
