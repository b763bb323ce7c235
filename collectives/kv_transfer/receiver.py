"""The decode side of a transfer: writes pieces into reserved KV blocks, and knows when all have arrived.

Ownership. A reservation's blocks belong to the receiver from ``open`` to ``close``. Every copy into them is made
under the reservation's lock, after a look at whether it is still open; ``close`` takes the same lock. So when
``close`` has returned, no byte of the reservation is written any more, however late a piece arrives, and the blocks
may hold another sequence. Nothing but this process writes here: a sender only offers bytes.
"""

from __future__ import annotations

import hashlib
import hmac
import threading
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from torch import Tensor

from ...runtime.errors import (
    AlreadyExistsError,
    InvalidArgumentError,
    NotFoundError,
    ProvenanceError,
    ResourceExhaustedError,
)
from ...runtime.handoff import Provenance
from ...runtime.sharding import KvRange
from ..segment import Bytes, host_id
from .cache_access import BlockIds, cache_access
from .intervals import IntervalSet
from .pieces import Piece, PieceRefusedError, Refusal, checksum, provenance_digest

MAX_RESERVATIONS = 4096


@dataclass(frozen=True, slots=True)
class KvReceiverStats:
    """Counters since the start, and how many reservations are open now.

    Attributes:
        num_bytes: of the accepted pieces.
        num_duplicates: pieces whose tokens were all there already; acknowledged, not written.
        num_late, num_stale, num_mismatched, num_out_of_range, num_truncated, num_corrupt: refused, see ``Refusal``.
        num_failed_verifications: reservations that were not complete, or not what decode had asked for.
    """

    num_open: int = 0
    num_accepted: int = 0
    num_bytes: int = 0
    num_duplicates: int = 0
    num_late: int = 0
    num_stale: int = 0
    num_mismatched: int = 0
    num_out_of_range: int = 0
    num_truncated: int = 0
    num_corrupt: int = 0
    num_failed_verifications: int = 0


_COUNTED_AS = {
    Refusal.LATE: "num_late",
    Refusal.STALE: "num_stale",
    Refusal.MISMATCH: "num_mismatched",
    Refusal.OUT_OF_RANGE: "num_out_of_range",
    Refusal.TRUNCATED: "num_truncated",
    Refusal.CORRUPT: "num_corrupt",
}


class _Reservation:
    """State of an open reservation; everything mutable is guarded by ``lock``."""

    __slots__ = (
        "arrived",
        "block_ids",
        "closed",
        "digest",
        "lock",
        "num_cached_tokens",
        "provenance",
        "reservation_id",
    )

    def __init__(
        self,
        reservation_id: str,
        provenance: Provenance,
        block_ids: BlockIds,
        num_cached_tokens: int,
        kv_range: KvRange,
    ) -> None:
        self.reservation_id = reservation_id
        self.provenance = provenance
        self.digest = provenance_digest(provenance)
        self.block_ids = block_ids
        self.num_cached_tokens = num_cached_tokens
        self.lock = threading.Lock()
        self.closed = False
        self.arrived = {
            (layer, head): IntervalSet()
            for layer in range(kv_range.layer_start, kv_range.layer_end)
            for head in range(kv_range.head_start, kv_range.head_end)
        }


class KvReceiver:
    """Takes KV for one decode rank. Thread-safe; no call waits for longer than one piece's copy.

    Args:
        kv_cache: ``[num_layers, 2, num_blocks, num_kv_heads, block_size, row_width]``, contiguous.
        kv_range: which layers and KV heads of the model those are.
    """

    def __init__(self, kv_cache: Tensor, kv_range: KvRange) -> None:
        self._cache = cache_access(kv_cache, kv_range)
        self._lock = threading.Lock()  # guards what follows
        self._open: dict[bytes, _Reservation] = {}
        self._counts = dict.fromkeys((field.name for field in fields(KvReceiverStats)), 0)

    @property
    def kv_range(self) -> KvRange:
        """What this rank holds."""
        return self._cache.kv_range

    @property
    def host_id(self) -> str:
        """Of this process, for its ``RankEndpoint``."""
        return host_id()

    def open(
        self, reservation_id: str, provenance: Provenance, block_ids: Sequence[int], num_cached_tokens: int
    ) -> None:
        """Accept pieces of the prompt's tokens from ``num_cached_tokens`` on, into the sequence's block table.

        Raises:
            AlreadyExistsError: the reservation is open.
            ResourceExhaustedError: too many are.
            InvalidArgumentError: blocks, tokens or dtype do not fit this cache.
        """
        blocks = np.asarray(block_ids, np.int64)
        self._check_fits(provenance, blocks, num_cached_tokens)
        reservation = _Reservation(reservation_id, provenance, blocks, num_cached_tokens, self._cache.kv_range)
        with self._lock:
            if _key(reservation_id) in self._open:
                raise AlreadyExistsError("the KV reservation is open already", request_id=provenance.request_id)
            if len(self._open) >= MAX_RESERVATIONS:
                raise ResourceExhaustedError(f"{MAX_RESERVATIONS} KV reservations are open", limit=MAX_RESERVATIONS)
            self._open[_key(reservation_id)] = reservation

    def accept(self, piece: Piece, data: Bytes) -> None:
        """Check the piece and write it in place. A piece that has arrived before is acknowledged, not written.

        ``data`` must not change until this returns.

        Raises:
            PieceRefusedError: nothing was written.
        """
        try:
            written = self._accept(piece, data)
        except PieceRefusedError as refused:
            self._count(_COUNTED_AS[refused.reason])
            raise
        self._count("num_accepted" if written else "num_duplicates", len(data) if written else 0)

    def verify(self, reservation_id: str, provenance: Provenance) -> None:
        """Return if exactly this KV has arrived in full; from then on nothing more is written to its tokens.

        Raises:
            ProvenanceError: something is missing, or is of another request, epoch, model, prefix or dtype.
            NotFoundError: the reservation is not open.
        """
        reservation = self._find(reservation_id)
        if reservation is None:
            raise NotFoundError("no such KV reservation is open", request_id=provenance.request_id)
        try:
            self._verify(reservation, provenance)
        except ProvenanceError:
            self._count("num_failed_verifications")
            raise

    def close(self, reservation_id: str) -> None:
        """Write no further byte of the reservation; idempotent. When it returns, the blocks may be reused."""
        reservation = self._find(reservation_id)
        if reservation is None:
            return
        with reservation.lock:  # a copy under way ends first
            reservation.closed = True
        with self._lock:
            self._open.pop(_key(reservation_id), None)

    def stats(self) -> KvReceiverStats:
        """The counters now."""
        with self._lock:
            return KvReceiverStats(**{**self._counts, "num_open": len(self._open)})

    def _accept(self, piece: Piece, data: Bytes) -> bool:
        reservation = self._find(piece.reservation_id)
        if reservation is None:
            raise PieceRefusedError(Refusal.LATE, "the KV reservation is closed, or never was open")
        self._check_claims(piece, reservation)
        self._check_bytes(piece, data)
        heads = (piece.head_start, piece.head_end)
        tokens = (piece.token_start, piece.token_end)
        with reservation.lock:
            if reservation.closed:
                raise PieceRefusedError(Refusal.LATE, "the KV reservation was closed meanwhile")
            arrived = [reservation.arrived[piece.layer, head] for head in range(*heads)]
            if all(of_head.covers(*tokens) for of_head in arrived):
                return False
            self._cache.scatter(piece.layer, heads, tokens, reservation.block_ids, data)
            for of_head in arrived:
                of_head.add(*tokens)
        return True

    def _check_claims(self, piece: Piece, reservation: _Reservation) -> None:
        provenance, mine = reservation.provenance, self._cache.kv_range
        details = {"request_id": provenance.request_id, "layer": piece.layer}
        if piece.epoch != provenance.epoch:
            raise PieceRefusedError(Refusal.STALE, f"KV of epoch {piece.epoch}, not {provenance.epoch}", **details)
        if piece.provenance != reservation.digest:
            raise PieceRefusedError(Refusal.MISMATCH, "KV of another model, prefix, request or dtype", **details)
        if not (
            mine.layer_start <= piece.layer < mine.layer_end
            and mine.head_start <= piece.head_start < piece.head_end <= mine.head_end
            and reservation.num_cached_tokens <= piece.token_start < piece.token_end <= provenance.num_tokens
        ):
            raise PieceRefusedError(
                Refusal.OUT_OF_RANGE,
                f"KV of layer {piece.layer}, heads {piece.head_start}..{piece.head_end}, tokens {piece.token_start}.."
                f"{piece.token_end}: this rank asked for tokens {reservation.num_cached_tokens}.."
                f"{provenance.num_tokens} of {mine}",
                **details,
            )

    def _check_bytes(self, piece: Piece, data: Bytes) -> None:
        heads, tokens = piece.head_end - piece.head_start, piece.token_end - piece.token_start
        needed = 2 * heads * tokens * self._cache.head_bytes
        if len(data) != needed or piece.num_bytes != needed:
            raise PieceRefusedError(Refusal.TRUNCATED, f"{len(data)} bytes of KV came, {needed} are needed")
        if checksum(data) != piece.checksum:
            raise PieceRefusedError(Refusal.CORRUPT, "the checksum of the KV is wrong", layer=piece.layer)

    def _verify(self, reservation: _Reservation, provenance: Provenance) -> None:
        for field in fields(Provenance):
            theirs, mine = getattr(provenance, field.name), getattr(reservation.provenance, field.name)
            if theirs != mine:
                raise ProvenanceError(
                    f"{field.name} of the KV is {theirs!r}, decode asked for {mine!r}",
                    field=field.name,
                    request_id=reservation.provenance.request_id,
                )
        wanted = (reservation.num_cached_tokens, provenance.num_tokens)
        with reservation.lock:
            missing = [
                (layer, head, gaps)
                for (layer, head), arrived in reservation.arrived.items()
                if (gaps := arrived.missing(*wanted))
            ]
        if missing:
            layer, head, gaps = missing[0]
            raise ProvenanceError(
                f"KV is incomplete: {len(missing)} of {len(reservation.arrived)} (layer, head) pairs lack tokens,"
                f" first layer {layer}, head {head}, tokens {gaps[0][0]}..{gaps[0][1]}",
                field="coverage",
                request_id=provenance.request_id,
            )

    def _check_fits(self, provenance: Provenance, block_ids: BlockIds, num_cached_tokens: int) -> None:
        cache = self._cache
        if provenance.dtype != self._cache.dtype:
            raise InvalidArgumentError(
                f"KV of {provenance.dtype} cannot go into a cache of {self._cache.dtype}", field="dtype"
            )
        if not 0 <= num_cached_tokens < provenance.num_tokens or num_cached_tokens % cache.block_size:
            raise InvalidArgumentError(
                f"num_cached_tokens={num_cached_tokens} is not a number of whole blocks of {cache.block_size} below"
                f" num_tokens={provenance.num_tokens}",
                field="num_cached_tokens",
            )
        if len(block_ids) * cache.block_size < provenance.num_tokens:
            raise InvalidArgumentError(f"{len(block_ids)} blocks do not hold {provenance.num_tokens} tokens")
        if block_ids.min() < 0 or block_ids.max() >= cache.num_blocks:
            raise InvalidArgumentError(f"block ids reach beyond the pool of {cache.num_blocks}", field="block_ids")

    def _find(self, reservation_id: str) -> _Reservation | None:
        # Looked up by hash and compared in constant time, so that timing tells nothing about an open id.
        with self._lock:
            reservation = self._open.get(_key(reservation_id))
        if reservation is None:
            return None
        same = hmac.compare_digest(reservation.reservation_id.encode(), reservation_id.encode())
        return reservation if same else None

    def _count(self, name: str, num_bytes: int = 0) -> None:
        with self._lock:
            self._counts[name] += 1
            self._counts["num_bytes"] += num_bytes


def _key(reservation_id: str) -> bytes:
    return hashlib.sha256(reservation_id.encode()).digest()
