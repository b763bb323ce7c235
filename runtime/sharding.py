"""Which layers, heads and vocabulary rows a rank holds. Pure arithmetic, shared by weights, KV cache and transfer.

Rank order inside a group: ``rank = pp_rank * tensor_parallel_size + tp_rank``. Layers are split over pipeline
stages as evenly as possible, earlier stages taking the remainder. Attention heads are split evenly over tensor
ranks; when there are fewer KV heads than tensor ranks, each KV head is replicated on
``tensor_parallel_size / num_kv_heads`` consecutive ranks (Megatron-LM, vLLM).
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import InvalidArgumentError, ModelFormatError


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The numbers of a decoder that decide how it can be cut up."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class ParallelConfig:
    """How many ranks a group has, along each axis."""

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1

    def __post_init__(self) -> None:
        for name in ("tensor_parallel_size", "pipeline_parallel_size"):
            value = getattr(self, name)
            if not 1 <= value <= 64:
                raise InvalidArgumentError(f"{name} must be between 1 and 64, got {value}", field=name, value=value)

    @property
    def world_size(self) -> int:
        """Ranks in the group."""
        return self.tensor_parallel_size * self.pipeline_parallel_size


@dataclass(frozen=True, slots=True)
class KvRange:
    """The rectangle of KV that a rank holds: layers ``[layer_start, layer_end)`` by KV heads likewise."""

    layer_start: int
    layer_end: int
    head_start: int
    head_end: int

    @property
    def num_layers(self) -> int:
        """Layers in the range."""
        return self.layer_end - self.layer_start

    @property
    def num_heads(self) -> int:
        """KV heads in the range."""
        return self.head_end - self.head_start

    def intersect(self, other: KvRange) -> KvRange | None:
        """The common rectangle, or None when the two do not touch."""
        layer_start, layer_end = max(self.layer_start, other.layer_start), min(self.layer_end, other.layer_end)
        head_start, head_end = max(self.head_start, other.head_start), min(self.head_end, other.head_end)
        if layer_start >= layer_end or head_start >= head_end:
            return None
        return KvRange(layer_start, layer_end, head_start, head_end)


def check_shardable(shape: ModelShape, parallel: ParallelConfig) -> None:
    """Refuse a parallelism that the model's shape does not divide into.

    Raises:
        ModelFormatError: naming the dimension, its size and the parallel size.
    """
    tp, pp = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    for name, size in (("num_attention_heads", shape.num_heads), ("intermediate_size", shape.intermediate_size)):
        if size % tp:
            raise ModelFormatError(
                f"{name}={size} is not divisible by tensor_parallel_size={tp}",
                field=name,
                value=size,
                tensor_parallel_size=tp,
            )
    if max(shape.num_kv_heads, tp) % min(shape.num_kv_heads, tp):
        raise ModelFormatError(
            f"num_key_value_heads={shape.num_kv_heads} and tensor_parallel_size={tp} do not divide one another",
            field="num_key_value_heads",
            value=shape.num_kv_heads,
            tensor_parallel_size=tp,
        )
    if shape.num_layers < pp:
        raise ModelFormatError(
            f"num_hidden_layers={shape.num_layers} is less than pipeline_parallel_size={pp}",
            field="num_hidden_layers",
            value=shape.num_layers,
            pipeline_parallel_size=pp,
        )


def split_evenly(total: int, parts: int, index: int) -> tuple[int, int]:
    """Start and end of part ``index`` when ``total`` is cut into ``parts``, the first parts taking the remainder."""
    size, extra = divmod(total, parts)
    start = index * size + min(index, extra)
    return start, start + size + (index < extra)


def kv_range(shape: ModelShape, parallel: ParallelConfig, rank: int) -> KvRange:
    """The layers and KV heads whose cache lives on ``rank``."""
    pp_rank, tp_rank = divmod(rank, parallel.tensor_parallel_size)
    layer_start, layer_end = split_evenly(shape.num_layers, parallel.pipeline_parallel_size, pp_rank)
    if shape.num_kv_heads >= parallel.tensor_parallel_size:
        head_start, head_end = split_evenly(shape.num_kv_heads, parallel.tensor_parallel_size, tp_rank)
    else:
        head_start = tp_rank * shape.num_kv_heads // parallel.tensor_parallel_size
        head_end = head_start + 1
    return KvRange(layer_start, layer_end, head_start, head_end)


def vocab_range(vocab_size: int, tensor_parallel_size: int, tp_rank: int) -> tuple[int, int]:
    """The vocabulary rows ``[start, end)`` of embedding and head that live on ``tp_rank``; may differ by one row."""
    return split_evenly(vocab_size, tensor_parallel_size, tp_rank)
