"""Which slices of which tensors a rank holds, and where they go: the layout of a sharded decoder.

Tensor parallelism is Megatron's: Q, K, V, gate and up are cut by rows, so that each rank owns whole heads and whole
MLP channels; the output and down projections are cut by columns and leave partial sums. Their biases belong to the
first rank alone, or they would be added once per rank. Norms are on every rank. Embedding and head are cut by
vocabulary rows. A pipeline stage holds its own layers; the first also the embedding, the last also norm and head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ..kernels.stacked import StackedWeight
from ..kernels.types import AttentionSpec, AttentionWeights, MlpWeights, Weight
from ..runtime.errors import ModelFormatError
from ..runtime.sharding import ParallelConfig, check_shardable, kv_range, split_evenly, vocab_range
from .checkpoint import TensorSlice
from .models.config import DecoderConfig
from .quantization.config import ROUNDED, LinearFormat, Quantization
from .quantization.pieces import Allocate, Part, QuantizedPiece, new_piece
from .quantization.sources import Module

Tensor = torch.Tensor
View = Callable[[TensorSlice], Tensor | None]


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
        norm, head: None unless on the last stage. With tied embeddings on a single stage ``head`` is ``embedding``,
            unless it is quantised: the table itself never is, and the head is then a weight of its own.
    """

    vocab_start: int
    embedding: Tensor | None
    layers: tuple[DecoderLayer, ...]
    norm: Tensor | None
    head: Weight | None


@dataclass(frozen=True, eq=False, slots=True)
class WeightPiece:
    """A slice to read, and where to write it."""

    source: TensorSlice
    out: Tensor


class WeightLayout:
    """Maps a rank's weights or allocates them, uninitialised, and lists the pieces that fill these completely.

    Args:
        quantization: of the linear layers; None for floats.
        allocate: makes the tensors of quantised weights, asked in an order that depends on the arguments alone; None
            makes them as all others.
        view: of float matrices, where they can be used as they are stored; asked before anything is allocated for
            them. None to allocate everything.

    Attributes:
        weights: to be filled.
        pieces: disjoint slices to read, in no particular order.
        quantized: quantised weights to read.
        viewed: the slices that ``view`` gave.

    Raises:
        ModelFormatError: the model cannot be cut so.
    """

    def __init__(
        self,
        config: DecoderConfig,
        parallel: ParallelConfig,
        rank: int,
        dtype: torch.dtype,
        device: torch.device,
        quantization: Quantization | None = None,
        allocate: Allocate | None = None,
        view: View | None = None,
    ) -> None:
        check_shardable(config.shape(), parallel)
        self._config = config
        self._names = config.names
        self._dtype = dtype
        self._device = device
        self._quantization = quantization
        self._allocate = allocate or (lambda shape, dtype: torch.empty(shape, dtype=dtype, device=device))
        self._tp_size = parallel.tensor_parallel_size
        self._pp_rank, self._tp_rank = divmod(rank, self._tp_size)
        self._kv = kv_range(config.shape(), parallel, rank)
        self.pieces: list[WeightPiece] = []
        self.quantized: list[QuantizedPiece] = []
        self.viewed: list[TensorSlice] = []
        self._view = view
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
            head = self._head(start, end, embedding)
        return DecoderWeights(start, embedding, layers, norm, head)

    def _head(self, start: int, end: int, embedding: Tensor | None) -> Weight:
        config, tied = self._config, self._config.tie_word_embeddings
        name = self._names.embedding if tied else self._names.head
        form = self._quantization.head if self._quantization is not None else None
        if form is not None and (form.method == ROUNDED or not tied):
            module = Module(name.removesuffix(".weight"), config.vocab_size, config.hidden_size)
            return self._quantized(form, (Part(module, start, end),), (0, config.hidden_size))
        return embedding if tied and embedding is not None else self._vocab_shard(name, start, end)

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
            qkv=self._linear(parts, (hidden, 0, hidden)),
            out=self._linear(
                [(prefix + names.attention_out, hidden, 0, hidden)], (config.num_heads * size, *queries)
            ),
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
            gate_up=self._linear(parts, (hidden, 0, hidden)),
            down=self._linear([(prefix + names.down, hidden, 0, hidden)], (inner, *channels)),
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
        source = TensorSlice(name, shape, 0, start, end)
        views = self._views([source])
        return views[0] if views else self._add(self._empty(end - start, shape[1]), source)

    def _linear(self, parts: list[tuple[str, int, int, int]], columns: tuple[int, int, int]) -> Weight:
        """Slices of several layers, given as (module, rows in all, start, end), one under the other.

        ``columns`` are (columns in all, start, end) of each; they are cut only where there is one layer.
        """
        total, start, end = columns
        form = self._format([module for module, *_ in parts])
        if form is not None:
            stack = tuple(Part(Module(module, rows, total), first, last) for module, rows, first, last in parts)
            return self._quantized(form, stack, (start, end))
        if end - start == total:
            sources = [TensorSlice(f"{name}.weight", (rows, total), 0, *span) for name, rows, *span in parts]
        else:
            ((module, rows, _, _),) = parts
            sources = [TensorSlice(f"{module}.weight", (rows, total), 1, start, end)]
        views = self._views(sources)
        if views:
            return views[0] if len(views) == 1 else StackedWeight(tuple(views))
        if end - start == total:
            return self._stacked(parts, "weight", total)
        return self._add(self._empty(rows, end - start), sources[0])

    def _views(self, sources: list[TensorSlice]) -> list[Tensor]:
        """The slices where they are stored; none if not all can be had."""
        if self._view is None:
            return []
        views = [view for source in sources if (view := self._view(source)) is not None]
        if len(views) < len(sources):
            return []
        self.viewed += sources
        return views

    def _format(self, modules: list[str]) -> LinearFormat | None:
        """The format that layers have in common."""
        if self._quantization is None:
            return None
        forms = {self._quantization.format_of(module) for module in modules}
        if len(forms) > 1:
            raise ModelFormatError(
                f"of {', '.join(modules)}, which are computed as one layer, some are quantised and some are not",
                tensor=modules[0],
            )
        return forms.pop()

    def _quantized(self, form: LinearFormat, parts: tuple[Part, ...], cols: tuple[int, int]) -> Weight:
        piece = new_piece(form, parts, cols, self._allocate)
        self.quantized.append(piece)
        return piece.out

    def _stacked(self, parts: list[tuple[str, int, int, int]], kind: str, *width: int) -> Tensor:
        """Row slices of several tensors, given as (name, rows in all, start, end), one under the other."""
        out = self._empty(sum(end - start for _, _, start, end in parts), *width)
        row = 0
        for name, rows, start, end in parts:
            source = TensorSlice(f"{name}.{kind}", (rows, *width), 0, start, end)
            self._add(out[row : row + end - start], source)
            row += end - start
        return out


def tensor_names(config: DecoderConfig, quantization: Quantization | None = None) -> set[str]:
    """Every tensor that a checkpoint of this configuration has, and no other."""
    meta = torch.device("meta")
    layout = WeightLayout(config, ParallelConfig(), 0, torch.float32, meta, quantization)
    names = {piece.source.name for piece in layout.pieces}
    return names.union(*(piece.names() for piece in layout.quantized))


def check_layout(config: DecoderConfig, parallel: ParallelConfig, quantization: Quantization | None) -> None:
    """Refuse a way of cutting a model up that its shape or its quantisation does not allow; reads nothing.

    Raises:
        ModelFormatError: naming the numbers.
    """
    for rank in range(parallel.tensor_parallel_size):
        WeightLayout(config, parallel, rank, torch.float32, torch.device("meta"), quantization)
