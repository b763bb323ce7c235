"""Starts the ranks of a group beyond the first: here as processes on this machine."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from typing import Protocol

import torch

from ..runtime.errors import ResourceExhaustedError, UnavailableError
from .rank_protocol import BOOTSTRAP_CODEC, RankBootstrap


class RankProcess(Protocol):
    """A rank that was started."""

    @property
    def pid(self) -> int | None:
        """Its process id, if known, on its own machine."""

    def exit_code(self) -> int | None:
        """How it ended, None while it runs; must not block for long. -9 stands for "killed" where none is known."""

    def stop(self, timeout_s: float) -> None:
        """Give it so long to end by itself, then end it by force; idempotent."""


class RankLauncher(Protocol):
    """Starts ranks somewhere.

    Attributes:
        host: the address of this machine that the ranks can reach; the group listens on it.
    """

    host: str

    def launch(self, rank: int, address: str, token: bytes, device_type: str) -> RankProcess:
        """Start ``run_rank(RankBootstrap(rank, address, token, device))`` in a process of its own.

        The launcher assigns the device, "cpu" or "cuda:n", as the process sees it. Returns without waiting.

        Raises:
            ResourceExhaustedError: there is no room for the rank.
            UnavailableError: it cannot be started.
        """


class LocalLauncher:
    """Ranks as subprocesses of this one; on GPUs rank n takes device n."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self.host = host

    def launch(self, rank: int, address: str, token: bytes, device_type: str) -> RankProcess:
        """See ``RankLauncher``."""
        if device_type == "cuda" and rank >= torch.cuda.device_count():
            raise ResourceExhaustedError(
                f"rank {rank} needs a GPU of its own, this machine has {torch.cuda.device_count()}",
                value=rank + 1,
                limit=torch.cuda.device_count(),
            )
        device = f"cuda:{rank}" if device_type == "cuda" else "cpu"
        # -P: the current directory is no place to import from.
        try:
            process = subprocess.Popen([sys.executable, "-P", "-m", "fuseline.workers.rank"], stdin=subprocess.PIPE)
        except OSError as error:
            raise UnavailableError(f"rank {rank} cannot be started: {error}", rank=rank) from error
        bootstrap = BOOTSTRAP_CODEC.encode(RankBootstrap(rank, address, token, device))
        # Not an argument, since it holds a secret. A process that dies before it reads is noticed by its exit code.
        with contextlib.suppress(BrokenPipeError), process.stdin or contextlib.nullcontext() as stdin:
            if stdin is not None:
                stdin.write(bootstrap)
        return LocalRank(process)


class LocalRank:
    """A subprocess."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.pid: int | None = process.pid

    def exit_code(self) -> int | None:
        """See ``RankProcess``."""
        return self._process.poll()

    def stop(self, timeout_s: float) -> None:
        """See ``RankProcess``."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
