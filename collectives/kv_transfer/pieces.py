"""A piece of KV in transfer: what it claims to be, and why it may be refused."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import IntEnum

import xxhash

from ...proto.fuseline.v1 import kv_transfer_pb2 as pb
from ...runtime.errors import ProvenanceError
from ...runtime.handoff import Provenance
from ..segment import Bytes


@dataclass(frozen=True, slots=True)
class Piece:
    """KV of some tokens, heads and one layer; its bytes are K, then V, each ``[head, token, row_width]``.

    Attributes:
        provenance: ``provenance_digest`` of what the sender believes it sends.
        layer, head_start, head_end, token_start, token_end: of the whole model and prompt, not of a rank.
        num_bytes, checksum: of the bytes, see ``checksum``.
    """

    reservation_id: str
    epoch: int
    provenance: int
    layer: int
    head_start: int
    head_end: int
    token_start: int
    token_end: int
    num_bytes: int
    checksum: int


class Refusal(IntEnum):
    """Why a piece was not taken; the numbers are the wire's."""

    LATE = pb.REFUSAL_LATE
    STALE = pb.REFUSAL_STALE
    MISMATCH = pb.REFUSAL_MISMATCH
    OUT_OF_RANGE = pb.REFUSAL_OUT_OF_RANGE
    TRUNCATED = pb.REFUSAL_TRUNCATED
    CORRUPT = pb.REFUSAL_CORRUPT

    @property
    def worth_retrying(self) -> bool:
        """Whether the same piece may be taken when it is sent again."""
        return self in (Refusal.TRUNCATED, Refusal.CORRUPT)


class PieceRefusedError(ProvenanceError):
    """A piece was refused; nothing was written."""

    def __init__(self, reason: Refusal, message: str, **details: object) -> None:
        super().__init__(message, reason=reason.name, **details)
        self.reason = reason


def checksum(data: Bytes) -> int:
    """xxh3_64 over contiguous bytes, seed 0. Does not hold the interpreter lock for long, does not copy."""
    return xxhash.xxh3_64_intdigest(data.data)


def provenance_digest(provenance: Provenance) -> int:
    """64 bits that change with any field of the provenance; each piece carries them."""
    sha = hashlib.sha256()
    for field in (
        provenance.request_id,
        str(provenance.epoch),
        provenance.model_fingerprint,
        provenance.prefix_hash.hex(),
        str(provenance.num_tokens),
        provenance.dtype,
    ):
        encoded = field.encode()
        sha.update(len(encoded).to_bytes(4, "little") + encoded)
    return int.from_bytes(sha.digest()[:8], "little")
