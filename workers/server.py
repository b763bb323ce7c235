"""The worker process: one group of ranks with its engine, served over gRPC.

``python -m fuseline.workers.server --model demo --role decode`` runs one by itself; a cluster runs the same
``WorkerServer`` inside processes of its own.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from ..collectives.kv_transfer import KvReceiver, KvTransferServicer
from ..proto.fuseline.v1 import kv_transfer_pb2, worker_pb2, worker_pb2_grpc
from ..runtime.errors import FuselineError, InvalidArgumentError, UnavailableError
from ..runtime.role import WorkerRole
from .engine_thread import EngineThread
from .group import ModelGroup
from .grpc_options import SERVER_OPTIONS
from .services.channels import ChannelCache
from .services.decode import DecodeServicer
from .services.leases import Leases
from .services.prefill import PrefillServicer
from .services.ranks import RankCalls
from .services.status import WorkerServicer

CLEANUP_TIMEOUT_S = 15.0
ENGINE_STOP_TIMEOUT_S = 30.0
SPARE_RPCS = 256  # beside those of requests: KV streams, watchers, health checks, drains
SERVICES = (
    *(service.full_name for service in worker_pb2.DESCRIPTOR.services_by_name.values()),
    *(service.full_name for service in kv_transfer_pb2.DESCRIPTOR.services_by_name.values()),
)

logger = logging.getLogger(__name__)


class WorkerServer:
    """Serves one group. Made and used on one event loop; ``start`` once, then ``stop`` once.

    Args:
        worker_id: unique in the cluster; part of every snapshot.
        role: told to routers; every worker answers every RPC.
        group: owned from now on: a thread of this object runs its engine, and ``stop`` closes it.
        host: to listen on, and where other workers reach this one.
        port: 0 lets the system choose.

    Attributes:
        address: ``host:port``.

    Raises:
        UnavailableError: the address cannot be listened on. The group is still the caller's.
        InvalidArgumentError: the group was not started with ``transfers_kv``. Likewise.
    """

    def __init__(
        self, worker_id: str, role: WorkerRole, group: ModelGroup, host: str = "127.0.0.1", port: int = 0
    ) -> None:
        if group.kv_receiver is None:
            raise InvalidArgumentError("a worker's group must be started with transfers_kv", field="transfers_kv")
        self.worker_id = worker_id
        self._group = group
        config = group.engine_config
        max_live = config.scheduler.max_num_queued + config.scheduler.max_num_seqs
        self._server = grpc.aio.server(options=SERVER_OPTIONS, maximum_concurrent_rpcs=2 * max_live + SPARE_RPCS)
        try:
            self.address = f"{host}:{self._server.add_insecure_port(f'{host}:{port}')}"
        except RuntimeError as error:
            raise UnavailableError(f"cannot listen on {host}:{port}: {error}", address=f"{host}:{port}") from error
        self._failed: asyncio.Future[FuselineError] = asyncio.get_running_loop().create_future()
        self._leases = Leases()
        self._channels = ChannelCache()
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # its stubs know only the other one
        self._tasks: set[asyncio.Task[None]] = set()
        self._engine = EngineThread(group.engine, max_live=max_live, on_failure=self._on_failure)
        self._ranks = RankCalls(group.executor, group.kv_endpoints(self.address))
        self._status = WorkerServicer(worker_id, role, config, self._engine, self._leases, self.drain)
        self._add_services(group.kv_receiver)
        # A rank may be lost while the engine has nothing to do.
        loop, lost = asyncio.get_running_loop(), group.executor.failed
        lost.add_done_callback(lambda done: loop.call_soon_threadsafe(self._engine.fail, done.result()))

    @property
    def role(self) -> WorkerRole:
        """As routers are told it."""
        return self._status.role

    @property
    def num_live(self) -> int:
        """Requests under way."""
        return self._leases.num_held

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the ranks, this one's first, as far as the group knows them."""
        return (os.getpid(), *self._group.executor.pids)

    async def start(self) -> int:
        """Serve; returns the port."""
        await self._tell_health(is_serving=True)
        await self._server.start()
        logger.info("%s worker %s serves on %s", self.role, self.worker_id, self.address)
        return int(self.address.rpartition(":")[2])

    async def failed(self) -> FuselineError:
        """Wait until the engine can no longer run; returns why. The server then only refuses: stop it."""
        return await asyncio.shield(self._failed)

    async def set_role(self, role: WorkerRole) -> None:
        """Tell routers another role; requests under way go on."""
        await self._health.set(self.role.value, health_pb2.HealthCheckResponse.NOT_SERVING)
        self._status.role = role
        await self._tell_health(is_serving=not self._leases.is_draining and not self._failed.done())
        self._engine.notify_watchers()

    async def drain(self, timeout_s: float) -> int:
        """Admit no more; wait for requests under way. Returns how many are left. Draining is for good."""
        self._leases.is_draining = True
        await self._tell_health(is_serving=False)
        self._engine.notify_watchers()
        return await self._leases.drained(timeout_s)

    async def stop(self, grace_s: float) -> None:
        """Drain for so long, end what is left, then close everything, the group included.

        Raises:
            InternalError: a step did not come to its end, and was left behind.
        """
        num_left = await self.drain(grace_s)
        if num_left:
            logger.warning("%d requests did not end within %g s and are ended now", num_left, grace_s)
        try:
            await self._server.stop(None)
            await self._leases.cleaned_up(CLEANUP_TIMEOUT_S)
            await self._channels.close()
            await self._engine.stop(ENGINE_STOP_TIMEOUT_S)
        finally:
            await asyncio.to_thread(self._transfer.close)
            await asyncio.to_thread(self._group.close)
        logger.info("worker %s has stopped", self.worker_id)

    def _add_services(self, receiver: KvReceiver) -> None:
        model = self._group.engine_config.model
        prefill = PrefillServicer(self._engine, self._ranks, self._leases, model, self._channels)
        decode = DecodeServicer(self._engine, self._ranks, self._leases, model)
        self._transfer = KvTransferServicer(receiver, decode.commit, decode.abort)
        worker_pb2_grpc.add_PrefillServiceServicer_to_server(prefill, self._server)
        worker_pb2_grpc.add_DecodeServiceServicer_to_server(decode, self._server)
        worker_pb2_grpc.add_WorkerServicer_to_server(self._status, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._transfer.add_to_server(self._server)

    async def _tell_health(self, *, is_serving: bool) -> None:
        values = health_pb2.HealthCheckResponse
        for name in ("", self.role.value, *SERVICES):
            await self._health.set(name, values.SERVING if is_serving else values.NOT_SERVING)

    def _on_failure(self, error: FuselineError) -> None:
        logger.error("worker %s can no longer serve: %s", self.worker_id, error)
        self._failed.set_result(error)
        task = asyncio.create_task(self._tell_health(is_serving=False))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


if __name__ == "__main__":
    from .server_main import main

    sys.exit(main())
