"""What must hold of the kernels' tiles at every shape they take: coverage, balance, banks, bytes under way."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuseline.kernels.cuda import layout
from fuseline.kernels.cuda.banks import fewest_passes, ldmatrix_passes, passes

TILES = layout.tiles()
WARPS = TILES["LINEAR_WARPS"]
# Rows and columns of every weight of the models that are measured.
WEIGHTS = [
    (12288, 4096),
    (4096, 4096),
    (22016, 4096),
    (4096, 11008),
    (6144, 4096),
    (28672, 4096),
    (4096, 14336),
    (24576, 4096),
    (4096, 12288),
    (4096, 1024),
    (1024, 2048),
    (6144, 1024),
    (1024, 3072),
    (151936, 4096),
]


def streamed(rows: int, cols: int, num_clusters: int, cluster: int) -> Counter[tuple[int, int]]:
    """How often each unit's group of SLICE_COLS columns is read by the whole grid."""
    seen: Counter[tuple[int, int]] = Counter()
    size = TILES["SLICE_COLS"]
    for index in range(num_clusters):
        for rank in range(cluster):
            for warp in range(WARPS):
                for piece in layout.pieces(rows, cols, index, num_clusters, rank, cluster, warp):
                    assert piece.begin % size == piece.end % size == 0
                    assert 0 < piece.end - piece.begin <= TILES["PIECE_COLS"]
                    seen.update((piece.unit, group) for group in range(piece.begin // size, piece.end // size))
    return seen


@settings(max_examples=40, deadline=None)
@given(
    units=st.integers(1, 60),
    groups=st.integers(8, 40),
    num_clusters=st.integers(1, 70),
    cluster=st.sampled_from([1, 2, 4, 8]),
)
def test_every_weight_element_is_read_once(units: int, groups: int, num_clusters: int, cluster: int) -> None:
    seen = streamed(16 * units, TILES["SLICE_COLS"] * groups, num_clusters, cluster)
    assert seen == Counter({(unit, group): 1 for unit in range(units) for group in range(groups)})


def test_work_that_does_not_divide_keeps_some_warps_longer() -> None:
    """256 units over 15 clusters of 8 warps are two or three each; over 16 they are two."""
    assert layout.busiest_warp_share(4096, 16) == 1.0
    assert layout.busiest_warp_share(4096, 15) == pytest.approx(3 / (256 / 120))


@pytest.mark.parametrize(("rows", "cols"), WEIGHTS)
@pytest.mark.parametrize("cluster", [1, 2, 4, 8])
def test_slices_differ_by_a_group_at_most(rows: int, cols: int, cluster: int) -> None:
    sizes = [end - begin for begin, end in (layout.slice_of(cols, rank, cluster) for rank in range(cluster))]
    assert sum(sizes) == cols
    assert max(sizes) - min(sizes) <= TILES["SLICE_COLS"]


def test_weights_are_loaded_without_bank_conflicts() -> None:
    for step in range(TILES["PIECE_COLS"] // TILES["STEP_COLS"]):
        addresses = layout.fragment_addresses(step)
        assert passes(addresses, 16) == fewest_passes(addresses, 16) == 4


@pytest.mark.parametrize("batch", range(1, 65))
def test_activations_are_loaded_without_bank_conflicts(batch: int) -> None:
    for tile in range((batch + 7) // 8):
        for step in range(0, 16, 2):
            assert ldmatrix_passes(layout.x_row_addresses(batch, tile, step)) == 4


@pytest.mark.parametrize("head_dim", [64, 128])
def test_keys_and_values_are_loaded_without_bank_conflicts(head_dim: int) -> None:
    fragments = layout.tile_tokens(head_dim) // 16
    for fragment in range(fragments):
        for upper in (0, 1):
            for j in range(head_dim // 32):
                assert passes(layout.key_addresses(head_dim, fragment, upper, j), 16) == 4
        for n in range(4):
            for c in range(head_dim // 64):
                assert passes(layout.value_addresses(head_dim, fragment, n, c), 16) == 4


@pytest.mark.parametrize("head_dim", [64, 128])
def test_keys_and_values_of_a_tile_are_read_once(head_dim: int) -> None:
    fragments, chunk = layout.tile_tokens(head_dim) // 16, TILES["ATTN_CHUNK_BYTES"]
    keys = [
        address
        for fragment in range(fragments)
        for upper in (0, 1)
        for j in range(head_dim // 32)
        for address in layout.key_addresses(head_dim, fragment, upper, j)
    ]
    values = [
        address
        for fragment in range(fragments)
        for n in range(4)
        for c in range(head_dim // 64)
        for address in layout.value_addresses(head_dim, fragment, n, c)
    ]
    pitch = TILES["ATTN_CHUNK_PITCH"]
    whole = [first * pitch + 16 * i for first in range(TILES["ATTN_CHUNKS"]) for i in range(chunk // 16)]
    assert sorted(keys) == sorted(values) == whole


@settings(max_examples=60, deadline=None)
@given(context=st.integers(1, 131072), window=st.integers(0, 5000), head_dim=st.sampled_from([64, 128]))
def test_every_token_that_is_seen_is_in_one_tile_of_one_node(context: int, window: int, head_dim: int) -> None:
    span, tokens = layout.KvSpan.of(context, window), layout.tile_tokens(head_dim)
    nodes = span.nodes()
    assert 1 <= len(nodes) <= TILES["ATTN_MAX_NODES"] + 1
    tiles = [tile for node in nodes for tile in span.tiles_of(node, head_dim)]
    assert tiles == list(range(tiles[0], tiles[-1] + 1))
    assert tiles[0] * tokens <= span.begin < (tiles[0] + 1) * tokens
    assert tiles[-1] * tokens < span.end <= (tiles[-1] + 1) * tokens


def test_enough_is_in_flight_for_the_memory() -> None:
    """4.3 TB/s at up to 0.9 us, by 120 of 132 multiprocessors: two CTAs of three stages, or one of six, do."""
    needed = layout.bytes_in_flight_needed(4.3e12, 0.9e-6, 120)
    ring = WARPS * TILES["PIECE_BYTES"]
    assert 3 * ring > 2 * needed
    assert 2 * (3 * ring + layout.RESERVED_SHARED_BYTES) < layout.MULTIPROCESSOR_SHARED_BYTES


@pytest.mark.parametrize(
    ("registers", "threads", "ctas"),
    [("MLP_MAX_REGISTERS", "LINEAR_THREADS", 2), ("ATTN_MAX_REGISTERS", "ATTN_THREADS", 1)],
)
def test_register_budgets_let_ctas_be_resident(registers: str, threads: str, ctas: int) -> None:
    assert TILES[registers] * TILES[threads] * ctas <= layout.MULTIPROCESSOR_REGISTERS


@pytest.mark.parametrize("block", ["MLP", "HEAD"])
def test_shared_memory_budgets_are_half_of_a_multiprocessor_s(block: str) -> None:
    needed = TILES[f"{block}_MAX_SHARED_BYTES"] + layout.RESERVED_SHARED_BYTES
    assert 2 * needed <= layout.MULTIPROCESSOR_SHARED_BYTES


def test_a_cta_of_each_block_fits_beside_one_of_the_next() -> None:
    """As the launches overlap: MLP after attention, attention after MLP, the head after MLP."""
    for other in ("ATTN_MAX_REGISTERS", "HEAD_MAX_REGISTERS"):
        registers = TILES["MLP_MAX_REGISTERS"] + TILES[other]
        assert registers * TILES["LINEAR_THREADS"] <= layout.MULTIPROCESSOR_REGISTERS
