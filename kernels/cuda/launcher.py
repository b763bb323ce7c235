"""Queues a block on the current stream: cut into launches that fit, each planned once, with scratch memory.

Nothing here waits for the device, and all of it can be captured in a CUDA graph once it has run on the stream.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from ..errors import LaunchError
from .choices import LaunchTable, default_table
from .launch import Launch, Problem, Scratch, plan_launch
from .library import CudaLibrary, load_library

Tensor = torch.Tensor
CAPABILITY = (9, 0)
MAX_PLANS = 4096


class Launcher:
    """Launches the kernels of one library; holds what was chosen and allocated for them.

    Args:
        table: launches that are not left to the model.
    """

    def __init__(self, library: CudaLibrary, table: LaunchTable) -> None:
        self.library = library
        self._table = table
        self._scratch = Scratch()
        self._plans: dict[tuple[object, ...], tuple[Launch, int]] = {}
        self._last: dict[torch.device, torch.cuda.Stream] = {}

    def launch(self, problem: Problem, batch: int, device: torch.device) -> Iterator[tuple[slice, ctypes.Structure]]:
        """The rows of each launch that a batch takes, and its arguments; the caller sets the pointers to tensors.

        The launch is queued when the caller comes back for the next one.

        Raises:
            KernelArgumentError: the block fits in no way.
            LaunchError: the device cannot run it.
        """
        plan, scratch_bytes = self._plan(problem, batch, device)
        with _on(device):
            self._take_turn(device)
            scratch = self._scratch.get(problem.key, scratch_bytes, device)
            stream = torch.cuda.current_stream(device).cuda_stream
            for first in range(0, batch, plan.max_batch):
                rows = slice(first, min(first + plan.max_batch, batch))
                args = self._arguments(problem, rows.stop - rows.start, plan)
                args.workspace, args.stream = scratch.data_ptr(), stream
                yield rows, args
                self.library.launch(problem.entry, ctypes.byref(args))

    def _take_turn(self, device: torch.device) -> None:
        """Wait on the device for what another stream launched last.

        A block's CTAs wait for one another, so all must be resident: two blocks on two streams, each with part of its
        CTAs placed, would wait for ever. Who replays graphs with blocks on several streams must order them likewise.
        """
        stream = torch.cuda.current_stream(device)
        last = self._last.get(device)
        if last is not None and last != stream and not torch.cuda.is_current_stream_capturing():
            stream.wait_stream(last)
        self._last[device] = stream

    def _plan(self, problem: Problem, batch: int, device: torch.device) -> tuple[Launch, int]:
        key = (problem.key, batch, device)
        found = self._plans.get(key)
        if found is None:
            if torch.cuda.get_device_capability(device) != CAPABILITY:
                raise LaunchError(f"{torch.cuda.get_device_name(device)} is not a Hopper GPU")
            with _on(device):
                plan = plan_launch(self.library, problem, batch, self._table)
            # The largest batch of one launch, so that scratch memory is allocated once.
            sized = self._arguments(problem, plan.max_batch, plan)
            found = plan, self.library.call(f"fl_cuda_{problem.name}_workspace", ctypes.byref(sized))
            if len(self._plans) >= MAX_PLANS:
                self._plans.clear()
            self._plans[key] = found
        return found

    def _arguments(self, problem: Problem, batch: int, plan: Launch) -> ctypes.Structure:
        args = problem.arguments(batch)
        args.launch = self.library.header.structs["fl_launch"](
            cluster=plan.cluster,
            num_clusters=plan.num_clusters,
            stages=plan.stages,
            dependent=1,
            max_shared_bytes=plan.max_shared_bytes,
        )
        return args


@cache
def default_launcher() -> Launcher:
    """Of this process's library.

    Raises:
        BuildError: there is none.
        LaunchError: the table of launches that the environment names cannot be read.
    """
    return Launcher(load_library(), default_table())


def set_pointers(args: ctypes.Structure, **tensors: Tensor | None) -> None:
    """Fill pointer fields; None is null."""
    for name, tensor in tensors.items():
        setattr(args, name, None if tensor is None else tensor.data_ptr())


def of_rows(tensor: Tensor | None, rows: slice) -> Tensor | None:
    """Those rows of an optional tensor."""
    return None if tensor is None else tensor[rows]


@contextmanager
def _on(device: torch.device) -> Iterator[None]:
    """Launch on this device, without the cost of switching where it is the current one."""
    if device.index == torch.cuda.current_device():
        yield
    else:
        with torch.cuda.device(device):
            yield
