"""The decoder that all families share: executes a plan of blocks over the ops, on one rank of a group.

The plan is ``DecoderWeights.layers``, data that is fixed when the model is loaded. A step walks it once; nothing in
the walk depends on values on the device, so the same walk can be captured in a CUDA graph or handed over to one
native call.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ...collectives.communicator import Communicator
from ...kernels import ops
from ...runtime.errors import InvalidArgumentError
from ...runtime.sharding import ParallelConfig, kv_range, vocab_range
from ..forward_batch import ForwardBatch
from ..layers.rotary import RotaryEmbedding
from ..memory import lazy_zeros
from ..weights import DecoderWeights
from .config import DecoderConfig

Tensor = torch.Tensor


class DecoderModel:
    """One rank's share of a decoder.

    Attributes:
        config: of the whole model.
        weights: this rank's, in execution order; they never require gradients.
    """

    def __init__(
        self,
        config: DecoderConfig,
        parallel: ParallelConfig,
        rank: int,
        weights: DecoderWeights,
        tp: Communicator,
    ) -> None:
        self.config = config
        self.weights = weights
        self._parallel = parallel
        self._rank = rank
        self._tp = tp
        first = weights.layers[0]
        self._dtype = first.attention.qkv.dtype
        self._device = first.attention.qkv.device
        self._windows = frozenset(layer.spec.sliding_window for layer in weights.layers)
        self._rotary = RotaryEmbedding(config.rope, config.head_dim, self._device)

    def new_kv_cache(self, num_blocks: int, block_size: int) -> Tensor:
        """Zeros for this rank's layers and KV heads: [layers, 2, num_blocks, kv_heads, block_size, head_dim]."""
        held = kv_range(self.config.shape(), self._parallel, self._rank)
        shape = (held.num_layers, 2, num_blocks, held.num_heads, block_size, self.config.head_dim)
        return lazy_zeros(shape, self._dtype, self._device)

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
        residual = self._embed(batch) if hidden is None else hidden
        delta: Tensor | None = None
        plan = ops.plan_attention(batch, kv_cache, self._windows, self._dtype)
        rotary = self._rotary.cos_sin(batch)
        for local, layer in enumerate(self.weights.layers):
            residual, delta = ops.attention_block(
                residual, delta, layer.attention, layer.spec, rotary, kv_cache[local], plan
            )
            if on_layer is not None:
                on_layer(layer.index)
            delta = self._tp.all_reduce(delta)
            residual, delta = ops.mlp_block(residual, delta, layer.mlp, layer.spec.eps)
            delta = self._tp.all_reduce(delta)
        if self.weights.norm is None or self.weights.head is None:
            return residual if delta is None else residual + delta
        logits = ops.head(
            residual, delta, self.weights.norm, self.weights.head, batch.logits_indices, self.config.rms_norm_eps
        )
        return self._gather_logits(logits)

    def _embed(self, batch: ForwardBatch) -> Tensor:
        if self.weights.embedding is None:
            raise InvalidArgumentError("a later pipeline stage needs the hidden states of the one before it")
        rows = ops.embedding(
            batch.token_ids, self.weights.embedding, self.weights.vocab_start, self.config.vocab_size
        )
        return self._tp.all_reduce(rows)

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
