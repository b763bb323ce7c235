"""What a worker process of a cluster runs: the model's group of ranks behind the worker's gRPC server."""

from __future__ import annotations

import asyncio

from ..runtime.role import WorkerRole
from ..workers.group import GroupConfig, ModelGroup
from ..workers.launcher import RankLauncher
from ..workers.server import WorkerServer
from .cluster_config import ClusterConfig
from .messages import Loading, WorkerSpec


class ModelWorker:
    """A ``HostedWorker``; see worker_host.py.

    Args:
        launcher: of the ranks beyond the first; the server listens on its host.
    """

    def __init__(self, spec: WorkerSpec, launcher: RankLauncher) -> None:
        self._spec = spec
        self._launcher = launcher
        self._role = spec.role
        self._server: WorkerServer | None = None
        self._loading = Loading()

    async def start(self) -> str:
        """See ``HostedWorker``. Cancelling it leaves a thread that loads on; the process should then end."""
        config = group_config(self._spec.config, self._spec.slot.pool)
        group = await asyncio.to_thread(ModelGroup.start, config, self._launcher, progress=self._note_loading)
        try:
            server = WorkerServer(self._spec.worker_id, self._role, group, self._launcher.host)
        except BaseException:
            await asyncio.to_thread(group.close)
            raise
        self._server = server
        await server.start()
        return server.address

    async def failed(self) -> str:
        """See ``HostedWorker``."""
        return (await self._started().failed()).message

    async def set_role(self, role: WorkerRole) -> None:
        """See ``HostedWorker``."""
        self._role = role
        if self._server is not None:
            await self._server.set_role(role)

    def load(self) -> int:
        """See ``HostedWorker``."""
        return 0 if self._server is None else self._server.num_live

    def loading(self) -> Loading:
        """See ``HostedWorker``."""
        return self._loading

    def pids(self) -> tuple[int, ...]:
        """See ``HostedWorker``."""
        return () if self._server is None else self._server.pids

    async def drain(self) -> None:
        """See ``HostedWorker``. What is left when the configured time is up ends with the worker."""
        await self._started().drain(self._spec.config.drain_timeout_s)

    async def stop(self, grace_s: float) -> None:
        """See ``HostedWorker``."""
        if self._server is not None:
            await self._server.stop(grace_s)

    def _note_loading(self, done: int, total: int) -> None:
        self._loading = Loading(done, total)

    def _started(self) -> WorkerServer:
        if self._server is None:
            raise RuntimeError("the worker has not been started")
        return self._server


def group_config(config: ClusterConfig, pool: WorkerRole) -> GroupConfig:
    """What a group of ``pool`` is to be; needs a resolved device. A share of a CPU is still one thread."""
    limits = config.limits
    return GroupConfig(
        model=config.model,
        name=config.name,
        device=config.device,
        dtype=config.dtype,
        quantization=config.quantization,
        kv_cache_dtype=config.kv_cache_dtype,
        max_model_len=limits.max_model_len,
        parallel=config.pool(pool).parallel,
        scheduler=limits.scheduler(),
        block_size=limits.block_size,
        num_kv_blocks=limits.num_blocks,
        gpu_memory_utilization=limits.gpu_memory_utilization,
        enable_prefix_caching=limits.enable_prefix_caching,
        num_threads=max(1, int(config.num_cpus_per_rank(pool))) if config.device == "cpu" else None,
        start_timeout_s=config.start_timeout_s,
        transfers_kv=True,
    )
