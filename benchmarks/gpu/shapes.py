"""The model shapes that are measured, and the fewest bytes that a block must move."""

from __future__ import annotations

from dataclasses import dataclass

WEIGHT_BYTES = 2  # bfloat16
KV_BYTES = 2
STREAM_BYTES = 4  # the residual stream is float32


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one decoder; ``qk_norm`` when queries and keys are normalised per head."""

    name: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocab: int
    layers: int
    qk_norm: bool = False

    @property
    def qkv_rows(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def attention_weight_bytes(self) -> int:
        return (self.qkv_rows + self.heads * self.head_dim) * self.hidden * WEIGHT_BYTES

    @property
    def mlp_weight_bytes(self) -> int:
        return 3 * self.hidden * self.inner * WEIGHT_BYTES

    @property
    def kv_token_bytes(self) -> int:
        """Keys and values of one token in one layer."""
        return 2 * self.kv_heads * self.head_dim * KV_BYTES


SHAPES = (
    Shape("Llama-2-7B", 4096, 32, 32, 128, 11008, 32000, 32),
    Shape("Llama-3-8B", 4096, 32, 8, 128, 14336, 128256, 32),
    Shape("Qwen3-0.6B", 1024, 16, 8, 128, 3072, 151936, 28, qk_norm=True),
    Shape("Qwen3-8B", 4096, 32, 8, 128, 12288, 151936, 36, qk_norm=True),
)
BATCHES = (1, 4, 16, 64)
CONTEXTS = (1024, 4096, 16384)
BLOCK_SIZE = 16
EPS = 1e-6


def stream_bytes(shape: Shape, batch: int) -> int:
    """Residual and delta read, residual and delta written."""
    return 4 * batch * shape.hidden * STREAM_BYTES


def attention_bytes(shape: Shape, batch: int, context: int) -> int:
    """Weights once, all of the context's KV once, the new token's written; the context includes the new token."""
    return shape.attention_weight_bytes + batch * context * shape.kv_token_bytes + stream_bytes(shape, batch)


def mlp_bytes(shape: Shape, batch: int) -> int:
    return shape.mlp_weight_bytes + stream_bytes(shape, batch)


def head_bytes(shape: Shape, batch: int, *, logits: bool) -> int:
    """The table once, the rows read, and float32 logits when they are wanted."""
    wanted = batch * shape.vocab * 4 if logits else 0
    return shape.vocab * shape.hidden * WEIGHT_BYTES + 2 * batch * shape.hidden * STREAM_BYTES + wanted


def floor_us(num_bytes: int, bytes_per_s: float) -> float:
    """Microseconds that moving so much takes at a measured bandwidth."""
    return num_bytes / bytes_per_s * 1e6


def buffer_sets(num_bytes: int, l2_bytes: int) -> int:
    """How many sets of inputs to rotate through, so that what one run reads has left L2 before it is read again.

    Weights are read as the first to be evicted, so L2 may keep some of the oldest: many times its size are needed.
    """
    return max(1, -(-12 * l2_bytes // num_bytes))
