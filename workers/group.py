"""A model on a group of ranks, with the engine that drives it: what a worker process, or an ``LLM``, is built on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..collectives.communicator import CommunicatorStore
from ..collectives.step_channel import StepChannel, StepListener
from ..kernels.cpu.threads import usable_cores
from ..runtime.config import (
    DEVICES,
    GPU_MEMORY_UTILIZATION,
    TIMEOUT_S,
    CacheConfig,
    EngineConfig,
    SchedulerConfig,
    check_choice,
    check_range,
)
from ..runtime.engine import Engine
from ..runtime.errors import InvalidArgumentError, UnavailableError
from ..runtime.handoff import RankEndpoint
from ..runtime.sharding import ParallelConfig, kv_range
from .executor import GroupExecutor
from .launcher import LocalLauncher, RankLauncher, RankProcess
from .loader import Progress, check_cut, model_info, resolve_model
from .rank import RankWorker
from .rank_protocol import CODEC, AllocateCache, Loaded, Loading, LoadModel, Ready

if TYPE_CHECKING:
    from ..collectives.kv_transfer import KvReceiver


@dataclass(frozen=True, slots=True)
class GroupConfig:
    """What a group should be; everything has a default but the model.

    Attributes:
        model: "demo", a directory, or the id of a Hugging Face repository.
        name: it is served under; the directory's name when empty.
        device: "cpu", "cuda", or "auto" for cuda where there is one.
        dtype: of weights and computation; "auto" takes the checkpoint's, or float32 on a CPU with neither
            native kernels nor instructions for that.
        quantization: of the linear layers, one of ``runtime.config.QUANTIZATIONS``; "auto" takes the checkpoint's.
        kv_cache_dtype: "int8", with a scale for each head of each token, or "auto" for that of the weights.
        max_model_len: None takes what the model was made for.
        num_kv_blocks: None takes what ``kv_cache_memory_bytes`` has room for.
        kv_cache_memory_bytes: per rank. None: what ``gpu_memory_utilization`` leaves on a GPU; on a CPU an eighth of
            the free memory, at most 2 GiB, shared by the ranks. Never more than ``max_num_seqs`` sequences can fill.
        num_threads: of each rank on a CPU. None: the cores this process may use (affinity, cgroup), shared by the
            ranks; a single rank then leaves torch's own setting alone.
        transfers_kv: whether KV is handed off to, or taken over from, other groups.
        start_timeout_s: for all ranks to have started and loaded.
        step_timeout_s: for one step, and each exchange in it.
    """

    model: str
    name: str = ""
    device: str = "auto"
    dtype: str = "auto"
    quantization: str = "auto"
    kv_cache_dtype: str = "auto"
    max_model_len: int | None = None
    parallel: ParallelConfig = ParallelConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    block_size: int = 16
    num_kv_blocks: int | None = None
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    enable_prefix_caching: bool = True
    num_threads: int | None = None
    transfers_kv: bool = False
    start_timeout_s: float = 600.0
    step_timeout_s: float = 300.0

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("gpu_memory_utilization", self.gpu_memory_utilization, *GPU_MEMORY_UTILIZATION),
            ("num_threads", 1 if self.num_threads is None else self.num_threads, 1, 4096),
            ("num_kv_blocks", 1 if self.num_kv_blocks is None else self.num_kv_blocks, 1, 2**31 - 1),
            ("start_timeout_s", self.start_timeout_s, *TIMEOUT_S),
            ("step_timeout_s", self.step_timeout_s, *TIMEOUT_S),
        ):
            check_range(name, value, low, high)
        check_choice("device", self.device, DEVICES)


class ModelGroup:
    """A running group. The engine belongs to one thread; ``close`` may come from any.

    Attributes:
        config: as asked for.
        engine_config: with everything resolved.
        model_path: directory of the model on this machine.
        kv_receiver: of the first rank, for the worker's ``KvTransfer`` service; None without ``transfers_kv``.
    """

    def __init__(
        self,
        config: GroupConfig,
        engine_config: EngineConfig,
        model_path: Path,
        executor: GroupExecutor,
        ranks: Sequence[Ready],
        kv_receiver: KvReceiver | None,
        store: CommunicatorStore | None,
        clock: Callable[[], float],
    ) -> None:
        self.config = config
        self.engine_config = engine_config
        self.model_path = model_path
        self.executor = executor
        self.engine = Engine(engine_config, executor, clock)
        self.kv_receiver = kv_receiver
        self._ranks = tuple(ranks)
        self._store = store

    @classmethod
    def start(
        cls,
        config: GroupConfig,
        launcher: RankLauncher | None = None,
        clock: Callable[[], float] = time.monotonic,
        progress: Progress | None = None,
    ) -> ModelGroup:
        """Start all ranks, load the model, make the KV cache. Blocks; on failure nothing is left behind.

        Args:
            launcher: of the ranks beyond the first; None starts them on this machine.
            clock: of the engine.
            progress: called from time to time, from any thread but one at a time, with the bytes of weights that all
                ranks have read and will have read, as far as they have told.

        Raises:
            NotFoundError, ModelFormatError, InvalidArgumentError: of model and configuration.
            ResourceExhaustedError: not enough memory or devices.
            UnavailableError: a rank did not start, or died.
        """
        launcher = launcher or LocalLauncher()
        device = _resolve_device(config.device)
        path = resolve_model(config.model)
        info = model_info(
            path,
            dtype=config.dtype,
            max_model_len=config.max_model_len,
            name=config.name,
            device=device,
            quantization=config.quantization,
            kv_cache_dtype=config.kv_cache_dtype,
        )
        parallel, scheduler = config.parallel, config.scheduler
        check_cut(path, parallel, info.quantization)
        # What can be refused is refused here; the number of blocks is settled once the weights are in memory.
        cache = CacheConfig(config.num_kv_blocks or 1, config.block_size, config.enable_prefix_caching)
        engine_config = EngineConfig(info, cache, scheduler, parallel)
        load = LoadModel(
            model=config.model,
            info=info,
            parallel=parallel,
            scheduler=scheduler,
            block_size=config.block_size,
            store_address="",
            timeout_s=config.step_timeout_s,
            num_threads=_threads_per_rank(config),
            memory_fraction=config.gpu_memory_utilization,
            num_kv_blocks=config.num_kv_blocks,
            kv_cache_memory_bytes=config.kv_cache_memory_bytes,
            transfers_kv=config.transfers_kv,
        )
        store: CommunicatorStore | None = None
        deadline = time.monotonic() + config.start_timeout_s
        others: dict[int, tuple[StepChannel, RankProcess]] = {}
        if parallel.world_size > 1:
            store = CommunicatorStore(launcher.host, config.start_timeout_s)
            load = replace(load, store_address=store.address)
            others = _launch(launcher, parallel.world_size, device, config.start_timeout_s)
        loading = _GroupLoading(progress)
        first = RankWorker(
            0,
            torch.device("cuda:0" if device == "cuda" else "cpu"),
            launcher.host,
            lambda done, total: loading.note(0, Loading(done, total)),
        )
        executor = GroupExecutor(first, others, config.step_timeout_s, loading.note)
        try:
            loaded = executor.ask(load, Loaded, max(0.1, deadline - time.monotonic()))
            cache = replace(cache, num_blocks=min(answer.max_num_blocks for answer in loaded))
            engine_config = replace(engine_config, cache=cache)
            ranks = executor.ask(AllocateCache(cache), Ready, max(0.1, deadline - time.monotonic()))
            return cls(config, engine_config, path, executor, ranks, first.kv_receiver, store, clock)
        except BaseException:
            executor.close()
            if store is not None:
                store.close()
            raise

    def kv_endpoints(self, first_address: str) -> tuple[RankEndpoint, ...]:
        """Where this group's ranks take KV; ``first_address`` is that of the worker's own service."""
        model, parallel = self.engine_config.model, self.engine_config.parallel
        return tuple(
            RankEndpoint(
                rank=rank,
                address=ready.kv_address or first_address,
                host_id=ready.host_id,
                kv_range=kv_range(model.shape, parallel, rank),
            )
            for rank, ready in enumerate(self._ranks)
        )

    def close(self) -> None:
        """End the ranks and free the memory; idempotent. The engine, if it is still used, sees UnavailableError."""
        self.executor.close()
        if self._store is not None:
            self._store.close()


class _GroupLoading:
    """Adds up what the ranks have read."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._lock = threading.Lock()
        self._ranks: dict[int, Loading] = {}

    def note(self, rank: int, loading: Loading) -> None:
        """A rank has told."""
        if self._progress is None:
            return
        with self._lock:
            self._ranks[rank] = loading
            told = self._ranks.values()
            self._progress(sum(rank.done_bytes for rank in told), sum(rank.total_bytes for rank in told))


def _launch(
    launcher: RankLauncher, world_size: int, device: str, timeout_s: float
) -> dict[int, tuple[StepChannel, RankProcess]]:
    """Start the ranks beyond the first and wait until they have called in."""
    listener = StepListener(launcher.host, CODEC)
    processes: dict[int, RankProcess] = {}

    def check() -> None:
        for rank, process in processes.items():
            if (code := process.exit_code()) is not None:
                raise UnavailableError(f"rank {rank} ended with exit code {code} before it called in", rank=rank)

    try:
        for rank in range(1, world_size):
            processes[rank] = launcher.launch(rank, listener.address, listener.token, device)
        channels = listener.accept(set(processes), timeout_s, check)
    except BaseException:
        for process in processes.values():
            process.stop(0.0)
        raise
    finally:
        listener.close()
    return {rank: (channels[rank], processes[rank]) for rank in processes}


def _resolve_device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise InvalidArgumentError("device=cuda, but torch sees no CUDA device", field="device", value=device)
    return device


def _threads_per_rank(config: GroupConfig) -> int | None:
    world_size = config.parallel.world_size
    if config.num_threads is not None or world_size == 1:
        return config.num_threads
    return max(1, usable_cores() // world_size)
