"""Communicators: how the ranks of one group exchange tensors while they compute.

Ranks on the CPUs of one machine exchange through shared memory, others over gloo or NCCL. Every communicator stands
for itself, nothing is built on torch's default group, so that several models (and several ranks, as threads) may live
in one process. Reductions add in rank order on every transport, whatever the size of the tensor or the place of an
element in it: a row's result then depends neither on the batch around it nor on the schedule, which exact
continuation rests on, and all ranks hold the same bits. (Gloo's and NCCL's own all-reduce give that for two ranks,
where a + b = b + a, but not for more: a ring adds each chunk in another order.)
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import torch
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from ..runtime.errors import InvalidArgumentError, UnavailableError
from ..runtime.sharding import ParallelConfig
from .process_group import join_process_group
from .shared_memory import join_shared_memory
from .tensors import check_dim, check_source, checked


class Communicator(Protocol):
    """The ranks that exchange tensors along one axis of a group.

    All calls are collective and synchronous: every rank makes the same calls in the same order with tensors of the
    same shape and dtype, contiguous, on the communicator's device. One thread calls at a time; ``close`` may come
    from any thread. On CUDA a call returns when the work is queued on the current stream.

    Raises (every call but ``close``):
        UnavailableError: a peer is gone, or did not take part within the timeout. The communicator is then closed,
            which makes the remaining peers fail at once as well.
        InvalidArgumentError: the tensor is not contiguous, or the peer is not another rank of the group.
    """

    @property
    def rank(self) -> int:
        """This rank, from 0."""

    @property
    def world_size(self) -> int:
        """How many ranks take part."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in rank order, in place; returns the same tensor. 16-bit floats add in float32."""

    def all_gather(self, tensor: Tensor, dim: int) -> Tensor:
        """The ranks' tensors concatenated along ``dim`` in rank order; a new tensor."""

    def broadcast(self, tensor: Tensor, src: int) -> Tensor:
        """Overwrite the tensor with that of rank ``src``; returns the same tensor."""

    def send(self, tensor: Tensor, dst: int) -> None:
        """Hand the tensor to rank ``dst``, which must ``recv`` it; waits for it on the CPU."""

    def recv(self, tensor: Tensor, src: int) -> Tensor:
        """Overwrite the tensor with what rank ``src`` sends; returns the same tensor."""

    def barrier(self) -> None:
        """Return when every rank has called."""

    def close(self) -> None:
        """Give the connections back; idempotent. Peers that wait for this rank fail at once."""


class SoloCommunicator:
    """The only rank of its group: nothing to exchange, nothing that can fail."""

    rank = 0
    world_size = 1

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """See ``Communicator``."""
        return checked(tensor)

    def all_gather(self, tensor: Tensor, dim: int) -> Tensor:
        """See ``Communicator``."""
        check_dim(tensor, dim)
        return checked(tensor).clone()

    def broadcast(self, tensor: Tensor, src: int) -> Tensor:
        """See ``Communicator``."""
        check_source(src, 1)
        return checked(tensor)

    def send(self, tensor: Tensor, dst: int) -> None:
        """Always refused: there is no peer."""
        raise InvalidArgumentError(f"rank {dst} is not a peer in a group of 1", rank=dst)

    def recv(self, tensor: Tensor, src: int) -> Tensor:
        """Always refused: there is no peer."""
        raise InvalidArgumentError(f"rank {src} is not a peer in a group of 1", rank=src)

    def barrier(self) -> None:
        """See ``Communicator``."""

    def close(self) -> None:
        """See ``Communicator``."""


class CommunicatorStore:
    """Where the ranks of one group find each other: a small key-value server, up as long as the group.

    It is held by whoever starts the ranks, and has no authentication: bind it where only they can reach it.

    Raises:
        UnavailableError: ``host`` is no address of this machine.
    """

    def __init__(self, host: str = "127.0.0.1", timeout_s: float = 60.0) -> None:
        try:
            listener = socket.create_server((host, 0))
        except OSError as error:
            raise UnavailableError(f"cannot listen on {host}: {error}", host=host) from error
        port = listener.getsockname()[1]
        self.address = f"{host}:{port}"
        self._store: TCPStore | None = TCPStore(
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
            master_listen_fd=listener.detach(),  # torch itself would bind to every interface
        )

    def close(self) -> None:
        """Stop serving; idempotent. Communicators that are already made stay up."""
        self._store = None


@dataclass(frozen=True, slots=True)
class GroupCommunicators:
    """What one rank of a group talks through.

    Attributes:
        tp: the tensor-parallel ranks of its pipeline stage; ``tp.rank`` is its tp_rank.
        pp: the ranks with its tp_rank on all stages; ``pp.rank`` is its pp_rank.
    """

    tp: Communicator
    pp: Communicator

    def close(self) -> None:
        """Close both; idempotent."""
        self.tp.close()
        self.pp.close()


def make_communicators(
    store_address: str,
    parallel: ParallelConfig,
    rank: int,
    device: torch.device,
    timeout_s: float,
    host: str = "127.0.0.1",
    shared_memory: bool = True,
) -> GroupCommunicators:
    """Join the group as ``rank``; returns when all peers have.

    Args:
        store_address: of the group's ``CommunicatorStore``; not looked at when the group has one rank.
        device: "cpu" for shared memory or gloo, "cuda:n" for NCCL.
        timeout_s: for joining, and later for every call.
        host: the address of this machine that gloo binds to and peers reach. NCCL chooses by NCCL_SOCKET_IFNAME.
        shared_memory: between CPUs, where all ranks of an axis are on one machine and can; the same for every rank.

    Raises:
        UnavailableError: the store or a peer cannot be reached in time.
    """
    pp_rank, tp_rank = divmod(rank, parallel.tensor_parallel_size)
    if not 0 <= rank < parallel.world_size:
        raise InvalidArgumentError(f"rank {rank} is not in a group of {parallel.world_size}", rank=rank)
    store = None if parallel.world_size == 1 else _join_store(store_address, timeout_s)

    def join(name: str, rank: int, size: int) -> Communicator:
        if store is None or size == 1:
            return SoloCommunicator()
        axis = PrefixStore(name, store)
        if shared_memory and device.type == "cpu":
            communicator = join_shared_memory(axis, name, rank, size, timeout_s)
            if communicator is not None:
                return communicator
        return join_process_group(axis, name, rank, size, device, timeout_s, host)

    tp = join(f"tp{pp_rank}", tp_rank, parallel.tensor_parallel_size)
    try:
        return GroupCommunicators(tp, join(f"pp{tp_rank}", pp_rank, parallel.pipeline_parallel_size))
    except UnavailableError:
        tp.close()
        raise


def _join_store(address: str, timeout_s: float) -> Store:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise InvalidArgumentError(f"store_address must be host:port, got {address!r}", store_address=address)
    try:
        return TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=timeout_s))
    except RuntimeError as error:
        raise UnavailableError(f"no communicator store at {address}: {error}", store_address=address) from error
