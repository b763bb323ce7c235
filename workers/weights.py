"""Which slices of which tensors a rank holds, and where they go: the layout of a sharded decoder.

Tensor parallelism is Megatron's: Q, K, V, gate and up are cut by rows, so that each rank owns whole heads and whole
MLP channels; the output and down projections are cut by columns and leave partial sums. Their biases belong to the
first rank alone, or they would be added once per rank. Norms are on every rank. Embedding and head are cut by
vocabulary rows. A pipeline stage holds its own layers; the first also the embedding, the last also norm and head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..kernels.types import AttentionSpec, AttentionWeights, MlpWeights
from ..runtime.sharding import ParallelConfig, check_shardable, kv_range, split_evenly, vocab_range
from .checkpoint import TensorSlice
from .models.config import DecoderConfig

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False, slots=True)
class DecoderLayer:
    """One layer of the plan that a model executes: two blocks.

    Attributes:
        index: among all layers of the model.
    """

    index: int
    spec: AttentionSpec
    attention: AttentionWeights
    mlp: MlpWeights


@dataclass(frozen=True, eq=False, slots=True)
class DecoderWeights:
    """What one rank holds.

    Attributes:
        embedding: vocabulary rows from ``vocab_start`` on; None unless on the first stage.
        layers: this stage's, in order.
        norm, head: None unless on the last stage. With tied embeddings on a single stage ``head`` is ``embedding``.
    """

    vocab_start: int
    embedding: Tensor | None
    layers: tuple[DecoderLayer, ...]
    norm: Tensor | None
    head: Tensor | None


@dataclass(frozen=True, eq=False, slots=True)
class WeightPiece:
    """A slice to read, and where to write it."""

    source: TensorSlice
    out: Tensor


class WeightLayout:
    """Allocates a rank's weights, uninitialised, and lists the pieces that fill them completely.

    Attributes:
        weights: to be filled.
        pieces: disjoint slices to read, in no particular order.
    """

    def __init__(
        self, config: DecoderConfig, parallel: ParallelConfig, rank: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        check_shardable(config.shape(), parallel)
        self._config = config
        self._names = config.names
        self._dtype = dtype
        self._device = device
        self._tp_size = parallel.tensor_parallel_size
        self._pp_rank, self._tp_rank = divmod(rank, self._tp_size)
        self._kv = kv_range(config.shape(), parallel, rank)
        self.pieces: list[WeightPiece] = []
        self.weights = self._layout(is_last=self._pp_rank == parallel.pipeline_parallel_size - 1)

    def _layout(self, is_last: bool) -> DecoderWeights:
        config = self._config
        start, end = vocab_range(config.vocab_size, self._tp_size, self._tp_rank)
        embedding = norm = head = None
        if self._pp_rank == 0:
            embedding = self._vocab_shard(self._names.embedding, start, end)
        layers = tuple(self._layer(index) for index in range(self._kv.layer_start, self._kv.layer_end))
        if is_last:
            norm = self._whole(self._names.norm, config.hidden_size)
            if not config.tie_word_embeddings:
                head = self._vocab_shard(self._names.head, start, end)
            else:
                head = embedding if embedding is not None else self._vocab_shard(self._names.embedding, start, end)
        return DecoderWeights(start, embedding, layers, norm, head)

    def _layer(self, index: int) -> DecoderLayer:
        config = self._config
        spec = AttentionSpec(
            num_heads=config.num_heads // self._tp_size,
            num_kv_heads=self._kv.num_heads,
            head_dim=config.head_dim,
            scale=config.head_dim**-0.5,
            eps=config.rms_norm_eps,
            sliding_window=config.sliding_windows[index],
        )
        prefix = self._names.layer.format(index)
        attention, mlp = self._attention(prefix, spec), self._mlp(prefix)
        attention.check(spec)
        mlp.check()
        return DecoderLayer(index, spec, attention, mlp)

    def _attention(self, prefix: str, spec: AttentionSpec) -> AttentionWeights:
        config, names = self._config, self._names
        size, hidden = config.head_dim, config.hidden_size
        queries = split_evenly(config.num_heads * size, self._tp_size, self._tp_rank)
        keys = (self._kv.head_start * size, self._kv.head_end * size)
        parts = [
            (prefix + names.query, config.num_heads * size, *queries),
            (prefix + names.key, config.num_kv_heads * size, *keys),
            (prefix + names.value, config.num_kv_heads * size, *keys),
        ]
        weights = AttentionWeights(
            norm=self._whole(f"{prefix}{names.attention_norm}.weight", hidden),
            qkv=self._stacked(parts, "weight", hidden),
            out=self._columns(f"{prefix}{names.attention_out}.weight", hidden, config.num_heads * size, *queries),
        )
        if config.qkv_bias:
            weights = replace(weights, qkv_bias=self._stacked(parts, "bias"))
        if config.qk_norm:
            q_norm = self._whole(f"{prefix}{names.query_norm}.weight", size)
            weights = replace(weights, q_norm=q_norm, k_norm=self._whole(f"{prefix}{names.key_norm}.weight", size))
        if config.attention_out_bias and self._tp_rank == 0:
            weights = replace(weights, out_bias=self._whole(f"{prefix}{names.attention_out}.bias", hidden))
        return weights

    def _mlp(self, prefix: str) -> MlpWeights:
        config, names = self._config, self._names
        hidden, inner = config.hidden_size, config.intermediate_size
        channels = split_evenly(inner, self._tp_size, self._tp_rank)
        parts = [(prefix + names.gate, inner, *channels), (prefix + names.up, inner, *channels)]
        weights = MlpWeights(
            norm=self._whole(f"{prefix}{names.mlp_norm}.weight", hidden),
            gate_up=self._stacked(parts, "weight", hidden),
            down=self._columns(f"{prefix}{names.down}.weight", hidden, inner, *channels),
        )
        if config.mlp_bias:
            weights = replace(weights, gate_up_bias=self._stacked(parts, "bias"))
            if self._tp_rank == 0:
                weights = replace(weights, down_bias=self._whole(f"{prefix}{names.down}.bias", hidden))
        return weights

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self._dtype, device=self._device)

    def _add(self, out: Tensor, source: TensorSlice) -> Tensor:
        self.pieces.append(WeightPiece(source, out))
        return out

    def _whole(self, name: str, size: int) -> Tensor:
        return self._add(self._empty(size), TensorSlice(name, (size,), 0, 0, size))

    def _vocab_shard(self, name: str, start: int, end: int) -> Tensor:
        shape = (self._config.vocab_size, self._config.hidden_size)
        return self._add(self._empty(end - start, shape[1]), TensorSlice(name, shape, 0, start, end))

    def _columns(self, name: str, rows: int, columns: int, start: int, end: int) -> Tensor:
        return self._add(self._empty(rows, end - start), TensorSlice(name, (rows, columns), 1, start, end))

    def _stacked(self, parts: list[tuple[str, int, int, int]], kind: str, *width: int) -> Tensor:
        """Row slices of several tensors, given as (name, rows in all, start, end), one under the other."""
        out = self._empty(sum(end - start for _, _, start, end in parts), *width)
        row = 0
        for name, rows, start, end in parts:
            source = TensorSlice(f"{name}.{kind}", (rows, *width), 0, start, end)
            self._add(out[row : row + end - start], source)
            row += end - start
        return out


def tensor_names(config: DecoderConfig) -> set[str]:
    """Every tensor that a checkpoint of this configuration has, and no other."""
    layout = WeightLayout(config, ParallelConfig(), 0, torch.float32, torch.device("meta"))
    return {piece.source.name for piece in layout.pieces}
