"""Communicators: how the ranks of one group exchange tensors while they compute.

Every communicator is built on its own process group object, never on torch's default group, so that several models
(and several ranks, as threads) may live in one process. Reductions add in rank order whatever the size of the tensor
or the place of an element in it: a row's result then depends neither on the batch around it nor on the schedule,
which exact continuation rests on, and all ranks hold the same bits. (Gloo's and NCCL's own all-reduce give that for
two ranks, where a + b = b + a, but not for more: a ring adds each chunk in another order.)
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Backend, PrefixStore, Store, TCPStore

from ..runtime.errors import InvalidArgumentError, UnavailableError
from ..runtime.sharding import ParallelConfig

# Up to this size a reduction gathers everything and adds locally: one exchange instead of two. Beyond it the bytes
# dominate, so every rank first reduces its share, then the shares are gathered; the result is the same, bit for bit.
GATHER_LIMIT_BYTES = 256 * 1024


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
        return _checked(tensor)

    def all_gather(self, tensor: Tensor, dim: int) -> Tensor:
        """See ``Communicator``."""
        if not -tensor.dim() <= dim < tensor.dim():
            raise InvalidArgumentError(f"dim {dim} is not a dimension of a {tensor.dim()}-d tensor", dim=dim)
        return _checked(tensor).clone()

    def broadcast(self, tensor: Tensor, src: int) -> Tensor:
        """See ``Communicator``."""
        if src != 0:
            raise InvalidArgumentError(f"rank {src} is not in a group of 1", rank=src)
        return _checked(tensor)

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


class ProcessGroupCommunicator:
    """A communicator over one of torch's process groups: gloo on a CPU, NCCL on CUDA.

    A dead gloo peer is noticed at once (its sockets close), a hung one after the timeout. NCCL notices both by its
    own watchdog after the timeout; whoever runs the group learns of a dead rank sooner, by the step channel.
    """

    def __init__(self, group: Backend, name: str, rank: int, world_size: int) -> None:
        self._group: Backend | None = group
        self._name = name
        self._rank = rank
        self._world_size = world_size

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
        flat = _checked(tensor).view(-1)
        if self._world_size == 2:
            self._run("all_reduce", lambda group: group.allreduce([flat]))
        elif flat.nbytes <= GATHER_LIMIT_BYTES:
            parts = flat.new_empty(self._world_size, flat.numel())
            self._run("all_reduce", lambda group: group._allgather_base(parts.view(-1), flat))
            flat.copy_(_sum_in_order(parts))
        else:
            self._reduce_by_shares(flat)
        return tensor

    def all_gather(self, tensor: Tensor, dim: int) -> Tensor:
        """See ``Communicator``."""
        if not -tensor.dim() <= dim < tensor.dim():
            raise InvalidArgumentError(f"dim {dim} is not a dimension of a {tensor.dim()}-d tensor", dim=dim)
        parts = _checked(tensor).new_empty(self._world_size, *tensor.shape)
        self._run("all_gather", lambda group: group._allgather_base(parts.view(-1), tensor.view(-1)))
        if dim % tensor.dim() == 0:
            return parts.flatten(0, 1)
        return torch.cat(parts.unbind(), dim)

    def broadcast(self, tensor: Tensor, src: int) -> Tensor:
        """See ``Communicator``."""
        if not 0 <= src < self._world_size:
            raise InvalidArgumentError(f"rank {src} is not in a group of {self._world_size}", rank=src)
        self._run("broadcast", lambda group: group.broadcast(_checked(tensor), src))
        return tensor

    def send(self, tensor: Tensor, dst: int) -> None:
        """See ``Communicator``."""
        self._check_peer(dst)
        self._run("send", lambda group: group.send([_checked(tensor)], dst, 0))

    def recv(self, tensor: Tensor, src: int) -> Tensor:
        """See ``Communicator``."""
        self._check_peer(src)
        self._run("recv", lambda group: group.recv([_checked(tensor)], src, 0))
        return tensor

    def barrier(self) -> None:
        """See ``Communicator``."""
        self._run("barrier", lambda group: group.barrier())

    def close(self) -> None:
        """See ``Communicator``. A call under way in another thread keeps the connections until it ends."""
        self._group = None

    def _reduce_by_shares(self, flat: Tensor) -> None:
        share = -(-flat.numel() // self._world_size)
        padded = flat if share * self._world_size == flat.numel() else flat.new_zeros(share * self._world_size)
        if padded is not flat:
            padded[: flat.numel()] = flat
        parts = flat.new_empty(self._world_size, share)
        self._run("all_reduce", lambda group: group.alltoall_base(parts.view(-1), padded, [], []))
        mine = _sum_in_order(parts).to(flat.dtype)
        self._run("all_reduce", lambda group: group._allgather_base(padded, mine))
        if padded is not flat:
            flat.copy_(padded[: flat.numel()])

    def _check_peer(self, peer: int) -> None:
        if peer == self._rank or not 0 <= peer < self._world_size:
            raise InvalidArgumentError(
                f"rank {peer} is not a peer of rank {self._rank} in a group of {self._world_size}", rank=peer
            )

    def _run(self, operation: str, start: _Operation) -> None:
        group = self._group
        if group is None:
            raise UnavailableError(f"{self._name}: {operation} on a closed communicator", operation=operation)
        try:
            start(group).wait()
        except RuntimeError as error:  # torch names neither a lost peer nor a timeout by a type of its own
            self._group = None
            raise UnavailableError(
                f"{self._name}: rank {self._rank} of {self._world_size} lost a peer during {operation}: {error}",
                operation=operation,
                rank=self._rank,
            ) from error


class _Operation(Protocol):
    def __call__(self, group: Backend, /) -> dist.Work: ...


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
) -> GroupCommunicators:
    """Join the group as ``rank``; returns when all peers have.

    Args:
        store_address: of the group's ``CommunicatorStore``; not looked at when the group has one rank.
        device: "cpu" for gloo, "cuda:n" for NCCL.
        timeout_s: for joining, and later for every call.
        host: the address of this machine that gloo binds to and peers reach. NCCL chooses by NCCL_SOCKET_IFNAME.

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
        return _join_group(PrefixStore(name, store), name, rank, size, device, timeout_s, host)

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


def _join_group(
    store: Store, name: str, rank: int, size: int, device: torch.device, timeout_s: float, host: str
) -> ProcessGroupCommunicator:
    timeout = timedelta(seconds=timeout_s)
    try:
        if device.type == "cuda":
            nccl = dist.ProcessGroupNCCL.Options()
            nccl._timeout = timeout
            group: Backend = dist.ProcessGroupNCCL(store, rank, size, nccl)
        else:
            gloo = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # its stub says Options
            gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
            gloo._timeout = timeout
            gloo._threads = 1
            group = dist.ProcessGroupGloo(store, rank, size, gloo)
        communicator = ProcessGroupCommunicator(group, name, rank, size)
    except RuntimeError as error:
        raise UnavailableError(f"{name}: rank {rank} of {size} could not join: {error}", rank=rank) from error
    communicator.barrier()
    return communicator


def _checked(tensor: Tensor) -> Tensor:
    if not tensor.is_contiguous():
        raise InvalidArgumentError(f"the tensor is not contiguous: shape {tuple(tensor.shape)}, {tensor.stride()}")
    return tensor


def _sum_in_order(parts: Tensor) -> Tensor:
    """Sum over the first dimension, from first to last: ``torch.sum`` promises no order."""
    total = parts[0].float() if parts.dtype in (torch.bfloat16, torch.float16) else parts[0].clone()
    for part in parts[1:]:
        total += part
    return total
