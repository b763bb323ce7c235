"""Ranks with KV caches and nothing else: both ends of KV transfer, for tests.

Whatever the layout, a prompt's KV is one tensor ``[layer, 2, token, head, head_dim]`` here, written into and read out
of paged caches token by token, by plain indexing.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import torch

from fuseline.collectives.kv_transfer import KvReceiver, KvSender, KvTransferServicer, TransferLimits, host_id
from fuseline.proto.fuseline.v1 import kv_transfer_pb2 as pb
from fuseline.runtime.handoff import KvReservation, Provenance, RankEndpoint, token_prefix_hash
from fuseline.runtime.sharding import KvRange, ModelShape, ParallelConfig, kv_range

T = TypeVar("T")
SHAPE = ModelShape(
    num_layers=5, num_heads=8, num_kv_heads=2, head_dim=8, hidden_size=64, intermediate_size=128, vocab_size=100
)
UNTOUCHED = -7.0  # what decode caches are filled with
NUM_BLOCKS = 16
ONE_RANK = ParallelConfig()
SMALL = TransferLimits(
    inline_parcel_bytes=4096, num_inline_parcels=2, shared_parcel_bytes=4096, num_shared_parcels=2, ack_timeout_s=20
)


def prompt_kv(num_tokens: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Random KV of a prompt."""
    shape = (SHAPE.num_layers, 2, num_tokens, SHAPE.num_kv_heads, SHAPE.head_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def provenance(num_tokens: int, dtype: torch.dtype = torch.float32, request_id: str = "request") -> Provenance:
    """What both sides believe."""
    name = str(dtype).removeprefix("torch.")
    return Provenance(request_id, 1, "fingerprint", token_prefix_hash(range(num_tokens)), num_tokens, name)


def empty_cache(held: KvRange, block_size: int, dtype: torch.dtype) -> torch.Tensor:
    """A rank's pool of ``NUM_BLOCKS`` blocks."""
    shape = (held.num_layers, 2, NUM_BLOCKS, held.num_heads, block_size, SHAPE.head_dim)
    return torch.full(shape, UNTOUCHED, dtype=dtype)


class Servers:
    """KvTransfer servers on an event loop of their own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._servers: dict[str, tuple[grpc.aio.Server, KvTransferServicer]] = {}

    def serve(self, receiver: KvReceiver) -> str:
        """The address of a new server."""
        return self._run(self._serve(receiver))

    def stop(self, address: str) -> None:
        """End a server as a dying process would: without waiting for anyone."""
        server, servicer = self._servers.pop(address)
        self._run(server.stop(grace=None))
        servicer.close()

    def close(self) -> None:
        """Stop all."""
        for address in tuple(self._servers):
            self.stop(address)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _serve(self, receiver: KvReceiver) -> str:
        server = grpc.aio.server()
        servicer = KvTransferServicer(receiver, _commit, _abort)
        servicer.add_to_server(server)
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        self._servers[address] = server, servicer
        return address

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=30)


async def _commit(request: pb.CommitRequest, _context: object) -> pb.CommitResponse:
    return pb.CommitResponse()


async def _abort(request: pb.AbortRequest, _context: object) -> pb.AbortResponse:
    return pb.AbortResponse()


class DecodeRank:
    """A cache and its receiver; ``endpoint`` is where it takes KV, by shared memory if ``transport`` is "shm"."""

    def __init__(
        self,
        servers: Servers,
        transport: str,
        parallel: ParallelConfig = ONE_RANK,
        rank: int = 0,
        block_size: int = 8,
        dtype: torch.dtype = torch.float32,
        receiver_class: type[KvReceiver] = KvReceiver,
    ) -> None:
        self.kv_range = kv_range(SHAPE, parallel, rank)
        self.block_size = block_size
        self.cache = empty_cache(self.kv_range, block_size, dtype)
        self.receiver = receiver_class(self.cache, self.kv_range)
        self.address = servers.serve(self.receiver)
        self.endpoint = RankEndpoint(
            rank, self.address, host_id() if transport == "shm" else "another host", self.kv_range
        )

    def read(self, num_tokens: int, block_ids: list[int]) -> torch.Tensor:
        """The prompt's KV ``[local layer, 2, token, local head, head_dim]`` as it is in the cache."""
        size = self.block_size
        return torch.stack([self.cache[:, :, block_ids[t // size], :, t % size] for t in range(num_tokens)], dim=2)

    def part_of(self, kv: torch.Tensor) -> torch.Tensor:
        """What of a prompt's KV this rank ought to hold."""
        return _part(kv, self.kv_range)


class PrefillRank:
    """A cache with a prompt's KV in it, and its sender."""

    def __init__(
        self,
        kv: torch.Tensor,
        block_ids: list[int],
        parallel: ParallelConfig = ONE_RANK,
        rank: int = 0,
        block_size: int = 4,
        limits: TransferLimits = SMALL,
    ) -> None:
        self.kv_range = kv_range(SHAPE, parallel, rank)
        self.block_ids = block_ids
        self.cache = empty_cache(self.kv_range, block_size, kv.dtype)
        part = _part(kv, self.kv_range)
        for token in range(kv.shape[2]):
            self.cache[:, :, block_ids[token // block_size], :, token % block_size] = part[:, :, token]
        self.sender = KvSender(self.cache, SHAPE, parallel, rank, limits)

    @property
    def layers(self) -> range:
        """The layers it computes."""
        return range(self.kv_range.layer_start, self.kv_range.layer_end)


@dataclass(frozen=True)
class Handoff:
    """A reservation, and the decode ranks' blocks for it."""

    reservation: KvReservation
    block_ids: list[int]

    @property
    def id(self) -> str:
        """Of the reservation."""
        return self.reservation.reservation_id


def reserve(
    ranks: Iterable[DecodeRank], expected: Provenance, block_ids: list[int], num_cached_tokens: int = 0
) -> Handoff:
    """Open a reservation on every rank of a decode group."""
    ranks = list(ranks)
    reservation_id = secrets.token_hex(16)
    for rank in ranks:
        rank.receiver.open(reservation_id, expected, block_ids, num_cached_tokens)
    endpoints = tuple(rank.endpoint for rank in ranks)
    return Handoff(KvReservation(reservation_id, expected, num_cached_tokens, endpoints), block_ids)


def _part(kv: torch.Tensor, held: KvRange) -> torch.Tensor:
    return kv[held.layer_start : held.layer_end, :, :, held.head_start : held.head_end]
