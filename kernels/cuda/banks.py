"""Shared memory's banks: how many passes a warp's access takes, and the swizzle that keeps it at the fewest.

Shared memory has 32 banks of 4 bytes. A warp is served in passes; one pass reads one word from each bank, and
lanes that want the same word share it. Accesses of 8 and 16 bytes a lane go half a warp and a quarter of a warp at a
time. ldmatrix reads each of its 8x8 matrices, eight rows of 16 bytes, as a quarter of a warp.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

NUM_BANKS = 32
WORD_BYTES = 4
WARP = 32


def swizzle_128b(address: int) -> int:
    """The 128-byte swizzle: the 16-byte column within 128 bytes, xor the row among eight (an involution)."""
    return address ^ (((address >> 7) & 7) << 4)


def passes(addresses: Sequence[int], access_bytes: int) -> int:
    """Passes that one access of a warp takes.

    Args:
        addresses: a byte address a lane, multiples of ``access_bytes``; fewer than 32 when lanes are off.
        access_bytes: 4, 8 or 16 a lane.
    """
    lanes = WARP * WORD_BYTES // access_bytes
    parts = (addresses[first : first + lanes] for first in range(0, len(addresses), lanes))
    return sum(_conflicts(part, access_bytes) for part in parts)


def fewest_passes(addresses: Sequence[int], access_bytes: int) -> int:
    """Passes if no two words wanted were in one bank: the distinct bytes over what a pass delivers."""
    words = {address // WORD_BYTES + i for address in addresses for i in range(access_bytes // WORD_BYTES)}
    return -(-len(words) // NUM_BANKS)


def ldmatrix_passes(row_addresses: Sequence[int]) -> int:
    """Passes of an ldmatrix whose matrices' rows start at these addresses, eight a matrix."""
    matrices = (row_addresses[first : first + 8] for first in range(0, len(row_addresses), 8))
    return sum(_conflicts(matrix, 16) for matrix in matrices)


def _conflicts(addresses: Iterable[int], access_bytes: int) -> int:
    """The most distinct words that one bank has to deliver."""
    wanted: dict[int, set[int]] = defaultdict(set)
    for address in addresses:
        if address % access_bytes:
            raise ValueError(f"address {address} is no multiple of {access_bytes}")
        for word in range(address // WORD_BYTES, (address + access_bytes) // WORD_BYTES):
            wanted[word % NUM_BANKS].add(word)
    return max(map(len, wanted.values()), default=0)
