"""Models of the kernels' tiles: who reads what, where it lies in shared memory, how much is under way.

The sizes are those of the kernels' own headers; the arithmetic is that of ``linear.cuh`` and ``kv_split.cuh``, and
functions are named as there. What holds for these models (every weight is read once, no load has bank
conflicts, enough bytes are in flight) is tested for every shape that is supported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from .header import SOURCE_FOLDER, read_headers

# Of Hopper: a multiprocessor's shared memory, what the system takes of it for each CTA, and a CTA's most.
MULTIPROCESSOR_SHARED_BYTES = 228 * 1024
RESERVED_SHARED_BYTES = 1024
MAX_SHARED_BYTES = 227 * 1024
MULTIPROCESSOR_REGISTERS = 65536


@cache
def tiles() -> Mapping[str, int]:
    """The constants of all ``*_tiles.h``."""
    return read_headers(*sorted(SOURCE_FOLDER.glob("*_tiles.h"))).constants


def bytes_in_flight_needed(bytes_per_s: float, latency_s: float, multiprocessors: int) -> float:
    """Little's law: what each multiprocessor must have under way to keep up the bandwidth."""
    return bytes_per_s * latency_s / multiprocessors


# ---- linear layers (linear.cuh)


@dataclass(frozen=True, slots=True)
class Piece:
    """What one bulk copy brings: columns ``[begin, end)`` of a unit of 16 rows."""

    unit: int
    begin: int
    end: int


def slice_of(cols: int, rank: int, cluster: int) -> tuple[int, int]:
    """Columns of a matrix that CTA ``rank`` of a cluster takes."""
    size = tiles()["SLICE_COLS"]
    groups = cols // size
    return groups * rank // cluster * size, groups * (rank + 1) // cluster * size


def units_of(total: int, cluster_index: int, num_clusters: int, warp: int) -> range:
    """Units that one warp of every CTA of a cluster takes."""
    begin, end = total * cluster_index // num_clusters, total * (cluster_index + 1) // num_clusters
    return range(begin + warp, end, tiles()["LINEAR_WARPS"])


def pieces(
    rows: int, cols: int, cluster_index: int, num_clusters: int, rank: int, cluster: int, warp: int
) -> Iterator[Piece]:
    """What one warp streams of a [rows, cols] weight, in order."""
    begin, end = slice_of(cols, rank, cluster)
    step = tiles()["PIECE_COLS"]
    for unit in units_of(rows // tiles()["UNIT_ROWS"], cluster_index, num_clusters, warp):
        for col in range(begin, end, step):
            yield Piece(unit, col, min(col + step, end))


def busiest_warp_share(rows: int, num_clusters: int) -> float:
    """Units of the busiest warp over the mean: what uneven division costs where every warp is needed."""
    total, warps = rows // tiles()["UNIT_ROWS"], tiles()["LINEAR_WARPS"]
    counts = [
        len(units_of(total, index, num_clusters, warp)) for index in range(num_clusters) for warp in range(warps)
    ]
    return max(counts) * len(counts) / total


def fragment_addresses(step: int) -> list[int]:
    """Where the lanes read step ``step`` of a piece, 16 bytes each."""
    return [step * tiles()["STEP_BYTES"] + 16 * lane for lane in range(32)]


def x_row_addresses(batch: int, tile: int, step: int) -> list[int]:
    """Where an ldmatrix reads tokens 8 * tile... of x at two steps from ``step``: eight rows of four matrices."""
    chunk = (batch | 1) * tiles()["CHUNK_BYTES"]
    first = step * tiles()["STEP_COLS"] // tiles()["CHUNK_COLS"]
    return [(first + lane // 8) * chunk + (8 * tile + lane % 8) * tiles()["CHUNK_BYTES"] for lane in range(32)]


# ---- attention (kv_split.cuh, kv_stream.cuh, kv_softmax.cuh)


@dataclass(frozen=True, slots=True)
class KvSpan:
    """The tokens ``[begin, end)`` that a row sees, in nodes of ``node_tokens``."""

    begin: int
    end: int
    node_tokens: int

    @classmethod
    def of(cls, context: int, window: int = 0) -> KvSpan:
        """Of a row with this context; window 0 is none."""
        begin = context - window if 0 < window < context else 0
        node_tokens = tiles()["ATTN_NODE_TOKENS"]
        while context - begin > tiles()["ATTN_MAX_NODES"] * node_tokens:
            node_tokens *= 2
        return cls(begin, context, node_tokens)

    def nodes(self) -> range:
        """Their numbers within the row's positions."""
        if self.end <= 0:
            return range(0)
        return range(self.begin // self.node_tokens, (self.end - 1) // self.node_tokens + 1)

    def tiles_of(self, node: int, head_dim: int) -> range:
        """Tiles of a node, by number within the row's positions."""
        tokens = tile_tokens(head_dim)
        start = node * self.node_tokens
        return range(max(start, self.begin) // tokens, -(-min(start + self.node_tokens, self.end) // tokens))


def tile_tokens(head_dim: int) -> int:
    """Tokens of one KV tile."""
    return tiles()["ATTN_TILE_BYTES"] // (2 * head_dim)


def key_addresses(head_dim: int, fragment: int, upper: int, j: int) -> list[int]:
    """Where the lanes read keys from a slot, 16 bytes each: row g of a fragment, or its row g + 8."""
    return [
        _token_address(head_dim, lane // 8, lane // 4 % 2, fragment, upper) + 16 * (lane % 4) + 64 * j
        for lane in range(32)
    ]


def value_addresses(head_dim: int, fragment: int, n: int, c: int) -> list[int]:
    """Where the lanes read values: token ``2t + n % 2 + 8 * (n / 2)`` of a fragment, dimensions by g."""
    return [
        _token_address(head_dim, lane % 4, n % 2, fragment, n // 2) + 16 * (lane // 4) + 128 * c for lane in range(32)
    ]


def _token_address(head_dim: int, pair: int, odd: int, fragment: int, upper: int) -> int:
    chunk = (pair + 2 * odd) % tiles()["ATTN_CHUNKS"]
    return chunk * tiles()["ATTN_CHUNK_PITCH"] + (4 * fragment + odd + 2 * upper) * 2 * head_dim
