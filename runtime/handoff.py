"""The names that a handoff of KV from a prefill group to a decode group goes by, and what proves it."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from .sharding import KvRange, ModelShape, ParallelConfig, kv_range


@dataclass(frozen=True, slots=True)
class RankEndpoint:
    """Where one rank of a decode group takes KV.

    Attributes:
        address: ``host:port`` of its ``KvTransfer`` service.
        host_id: equal exactly for processes that can share memory.
        kv_range: layers and KV heads that the rank holds.
    """

    rank: int
    address: str
    host_id: str
    kv_range: KvRange


@dataclass(frozen=True, slots=True)
class Provenance:
    """What a decode engine demands of KV before it commits it; both sides compute it for themselves.

    Attributes:
        epoch: the attempt; KV of another attempt is stale.
        model_fingerprint: see ``ModelInfo``.
        prefix_hash: ``token_prefix_hash`` of the prompt.
        num_tokens: prompt length in tokens.
        dtype: of the KV bytes, see ``ModelInfo.kv_dtype``.
    """

    request_id: str
    epoch: int
    model_fingerprint: str
    prefix_hash: bytes
    num_tokens: int
    dtype: str


@dataclass(frozen=True, slots=True)
class KvReservation:
    """A decode engine's promise of room: blocks are held until commit, abort or expiry.

    Attributes:
        reservation_id: unguessable, unique; every pushed piece carries it.
        num_cached_tokens: leading tokens (whole blocks) that decode already holds and does not want sent.
        endpoints: one per rank of the decode group; the first also takes the commit.
    """

    reservation_id: str
    provenance: Provenance
    num_cached_tokens: int
    endpoints: tuple[RankEndpoint, ...]


@dataclass(frozen=True, slots=True)
class TransferSummary:
    """How a handoff of one rank went.

    Attributes:
        num_bytes: of KV, acknowledged.
        transfer_s: first push to last acknowledgement.
        transport: "shm", "grpc", "grpc+shm", or "none" when this rank had nothing to send.
    """

    num_bytes: int
    transfer_s: float
    transport: str


def token_prefix_hash(token_ids: Sequence[int]) -> bytes:
    """SHA-256 over the token ids as little-endian int32."""
    return hashlib.sha256(struct.pack(f"<{len(token_ids)}i", *token_ids)).digest()


def transfer_ranges(
    shape: ModelShape, source: ParallelConfig, source_rank: int, endpoints: Sequence[RankEndpoint]
) -> list[tuple[RankEndpoint, KvRange]]:
    """What ``source_rank`` of a prefill group sends to each rank of a decode group.

    Over all source ranks every (layer, head) of every destination is sent exactly once: where tensor ranks of the
    source hold replicas of a KV head, its destinations are dealt out among the replicas.
    """
    mine = kv_range(shape, source, source_rank)
    replicas = max(1, source.tensor_parallel_size // shape.num_kv_heads)
    replica = source_rank % source.tensor_parallel_size % replicas
    sends = []
    for endpoint in endpoints:
        common = mine.intersect(endpoint.kv_range)
        if common is not None and endpoint.rank % replicas == replica:
            sends.append((endpoint, common))
    return sends
