"""Communicators over torch's process groups: gloo between CPUs, NCCL between GPUs."""

from __future__ import annotations

from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Backend, Store

from ..runtime.errors import UnavailableError
from .tensors import check_dim, check_peer, check_source, checked, concatenate, sum_in_order

# Up to this size a reduction gathers everything and adds locally: one exchange instead of two. Beyond it the bytes
# dominate, so every rank first reduces its share, then the shares are gathered; the result is the same, bit for bit.
GATHER_LIMIT_BYTES = 256 * 1024


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
        flat = checked(tensor).view(-1)
        if self._world_size == 2:
            self._run("all_reduce", lambda group: group.allreduce([flat]))
        elif flat.nbytes <= GATHER_LIMIT_BYTES:
            parts = flat.new_empty(self._world_size, flat.numel())
            self._run("all_reduce", lambda group: group._allgather_base(parts.view(-1), flat))
            flat.copy_(sum_in_order(parts))
        else:
            self._reduce_by_shares(flat)
        return tensor

    def all_gather(self, tensor: Tensor, dim: int) -> Tensor:
        """See ``Communicator``."""
        check_dim(tensor, dim)
        parts = checked(tensor).new_empty(self._world_size, *tensor.shape)
        self._run("all_gather", lambda group: group._allgather_base(parts.view(-1), tensor.view(-1)))
        return concatenate(parts, dim)

    def broadcast(self, tensor: Tensor, src: int) -> Tensor:
        """See ``Communicator``."""
        check_source(src, self._world_size)
        self._run("broadcast", lambda group: group.broadcast(checked(tensor), src))
        return tensor

    def send(self, tensor: Tensor, dst: int) -> None:
        """See ``Communicator``."""
        check_peer(dst, self._rank, self._world_size)
        self._run("send", lambda group: group.send([checked(tensor)], dst, 0))

    def recv(self, tensor: Tensor, src: int) -> Tensor:
        """See ``Communicator``."""
        check_peer(src, self._rank, self._world_size)
        self._run("recv", lambda group: group.recv([checked(tensor)], src, 0))
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
        mine = sum_in_order(parts).to(flat.dtype)
        self._run("all_reduce", lambda group: group._allgather_base(padded, mine))
        if padded is not flat:
            flat.copy_(padded[: flat.numel()])

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


def join_process_group(
    store: Store, name: str, rank: int, size: int, device: torch.device, timeout_s: float, host: str
) -> ProcessGroupCommunicator:
    """Join the others over gloo or NCCL; returns when all have.

    Raises:
        UnavailableError: a peer cannot be reached in time.
    """
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
