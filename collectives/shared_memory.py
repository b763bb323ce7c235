"""The communicator between CPU ranks of one machine, over memory that they share.

The first rank makes a segment that has no name (see ``segment``), the others map it through its /proc
entry, and all of them watch each other's processes by pidfd. The exchange itself is native code: see
``kernels/csrc/exchange/exchange.h``. Nothing is left behind by whoever dies, however.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import ExitStack

from torch import Tensor
from torch._C._distributed_c10d import Store

from ..kernels.exchange import (
    MAX_RANKS,
    REDUCIBLE,
    Exchange,
    ExchangeError,
    NativeAllReduce,
    exchange_library,
    num_bytes,
)
from ..runtime.errors import UnavailableError
from .segment import Bytes, OwnedSegment, attach_segment, host_id
from .tensors import check_dim, check_peer, check_source, checked, concatenate, sum_in_order

logger = logging.getLogger(__name__)


class SharedMemoryCommunicator:
    """A communicator between ranks that share memory.

    A dead peer is noticed within milliseconds, one that closes at once, a hung one after the timeout.
    """

    def __init__(self, exchange: Exchange, name: str) -> None:
        self._exchange: Exchange | None = exchange
        self._name = name
        self._rank = exchange.rank
        self._world_size = exchange.world_size

    @property
    def rank(self) -> int:
        """See ``Communicator``."""
        return self._rank

    @property
    def world_size(self) -> int:
        """See ``Communicator``."""
        return self._world_size

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """See ``Communicator``."""
        if tensor.dtype in REDUCIBLE:
            self._run("all_reduce", lambda exchange: exchange.all_reduce(checked(tensor)))
        else:
            tensor.copy_(sum_in_order(self._gather("all_reduce", tensor)))
        return tensor

    def all_gather(self, tensor: Tensor, dim: int) -> Tensor:
        """See ``Communicator``."""
        check_dim(tensor, dim)
        return concatenate(self._gather("all_gather", tensor), dim)

    def broadcast(self, tensor: Tensor, src: int) -> Tensor:
        """See ``Communicator``."""
        check_source(src, self._world_size)
        self._run("broadcast", lambda exchange: exchange.broadcast(checked(tensor), src))
        return tensor

    def send(self, tensor: Tensor, dst: int) -> None:
        """See ``Communicator``."""
        check_peer(dst, self._rank, self._world_size)
        self._run("send", lambda exchange: exchange.send(checked(tensor), dst))

    def recv(self, tensor: Tensor, src: int) -> Tensor:
        """See ``Communicator``."""
        check_peer(src, self._rank, self._world_size)
        self._run("recv", lambda exchange: exchange.recv(checked(tensor), src))
        return tensor

    def barrier(self) -> None:
        """See ``Communicator``."""
        self._run("barrier", lambda exchange: exchange.barrier())

    def close(self) -> None:
        """See ``Communicator``. A call under way in another thread fails, and keeps the memory until it has."""
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.close()

    def native_all_reduce(self) -> NativeAllReduce:
        """For native code that computes several layers in one call; ``check`` what it returns."""
        if self._exchange is None:
            raise self._closed("all_reduce")
        return self._exchange.native_all_reduce()

    def check(self, code: int) -> None:
        """Raise the UnavailableError that a native all-reduce's result stands for, if any."""
        if code:
            raise self._lost("all_reduce", ExchangeError(code))

    def _gather(self, operation: str, tensor: Tensor) -> Tensor:
        parts = checked(tensor).new_empty(self._world_size, *tensor.shape)
        self._run(operation, lambda exchange: exchange.all_gather(tensor, parts))
        return parts

    def _run(self, operation: str, call: Callable[[Exchange], None]) -> None:
        exchange = self._exchange
        if exchange is None:
            raise self._closed(operation)
        try:
            call(exchange)
        except ExchangeError as error:
            raise self._lost(operation, error) from error

    def _closed(self, operation: str) -> UnavailableError:
        return UnavailableError(f"{self._name}: {operation} on a closed communicator", operation=operation)

    def _lost(self, operation: str, error: ExchangeError) -> UnavailableError:
        self._exchange = None
        return UnavailableError(
            f"{self._name}: rank {self._rank} of {self._world_size} lost a peer during {operation}: {error}",
            operation=operation,
            rank=self._rank,
        )


def join_shared_memory(
    store: Store, name: str, rank: int, size: int, timeout_s: float
) -> SharedMemoryCommunicator | None:
    """Join the others through shared memory; None, on every rank, when any of them cannot.

    Args:
        timeout_s: of every later call; joining takes as long as the store waits.

    Raises:
        UnavailableError: a peer did not come in time.
    """
    library = exchange_library() if size <= MAX_RANKS and hasattr(os, "pidfd_open") else None
    place = f"{host_id()} {os.getpid()}" if library is not None else ""
    exchange, refusal = None, ""
    with ExitStack() as until_attached:
        try:
            places = _tell_all(store, "place", rank, size, place)
            if library is None or not all(places) or len({each.split()[0] for each in places}) > 1:
                return None
            pids = [int(each.split()[1]) for each in places]
            try:
                data = _segment(store, rank, pids[0], num_bytes(library, size), until_attached)
                exchange = Exchange(library, data, rank, pids, timeout_s)
            except (UnavailableError, OSError) as error:
                refusal = str(error)
            refusals = [each for each in _tell_all(store, "refusal", rank, size, refusal) if each]
        except RuntimeError as error:  # torch names a store's timeout by no type of its own
            raise UnavailableError(f"{name}: rank {rank} of {size} could not join: {error}", rank=rank) from error
    if exchange is None or refusals:
        logger.warning("%s: the ranks cannot share memory, gloo takes its place: %s", name, refusals[0])
        return None
    return SharedMemoryCommunicator(exchange, name)


def _tell_all(store: Store, key: str, rank: int, size: int, text: str) -> list[str]:
    """Every rank's text, in rank order, when all have told theirs."""
    store.set(f"shm-{key}-{rank}", text)
    return [store.get(f"shm-{key}-{peer}").decode() for peer in range(size)]


def _segment(store: Store, rank: int, owner_pid: int, size: int, until_attached: ExitStack) -> Bytes:
    """The first rank's segment, mapped; it can be attached until ``until_attached`` is left."""
    if rank > 0:
        fd, _, segment_name = store.get("shm-segment").decode().partition(" ")
        if not segment_name:
            raise UnavailableError("the first rank has no shared memory")
        return attach_segment(owner_pid, int(fd), segment_name, size, writable=True)
    try:
        segment = OwnedSegment(size)
    except UnavailableError:
        store.set("shm-segment", "")
        raise
    until_attached.callback(segment.close)
    store.set("shm-segment", f"{segment.fd} {segment.name}")
    return segment.data
