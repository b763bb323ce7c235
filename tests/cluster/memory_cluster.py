"""A backend of the controller whose worker processes live in memory, and helpers to run a controller over it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from fuseline.cluster.cluster_config import ClusterConfig, PoolConfig
from fuseline.cluster.cluster_service import ClusterControl
from fuseline.cluster.controller import Controller
from fuseline.cluster.membership import ReplicaState
from fuseline.cluster.messages import ControllerStatus, Loading, ReplicaReport, WorkerSpec
from fuseline.cluster.placement import Resources
from fuseline.cluster.reconcile import Limits, Target
from fuseline.runtime.errors import UnavailableError
from fuseline.runtime.role import WorkerRole
from fuseline.tests.timing import PATIENTLY_S

CONFIG = ClusterConfig(device="cpu", prefill=PoolConfig(1), decode=PoolConfig(1))
LIMITS = Limits(start_timeout_s=PATIENTLY_S, drain_timeout_s=PATIENTLY_S, first_delay_s=0.01, max_delay_s=0.05)


@dataclass
class Worker:
    spec: WorkerSpec
    report: ReplicaReport
    load: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def read(self, loading: Loading) -> None:
        self.report = replace(self.report, version=self.report.version + 1, loading=loading)
        self.changed.set()

    def become(self, state: ReplicaState, reason: str = "") -> None:
        self.report = replace(
            self.report,
            version=self.report.version + 1,
            state=state,
            reason=reason,
            address="127.0.0.1:1",
            ready_age_s=0.0 if state is ReplicaState.READY else self.report.ready_age_s,
        )
        self.changed.set()


@dataclass
class Cluster:
    """Worker processes in memory. ``on_start`` says what becomes of each one that is started."""

    workers: dict[str, Worker] = field(default_factory=dict)
    num_started: int = 0
    on_start: Callable[[Worker], None] = lambda worker: worker.become(ReplicaState.READY)

    async def nodes(self) -> list[Resources]:
        return [Resources.of(2, 0)]

    async def find(self) -> list[str]:
        return list(self.workers)

    async def start(self, spec: WorkerSpec) -> None:
        starting = ReplicaReport(
            0,
            spec.worker_id,
            spec.slot,
            spec.role,
            ReplicaState.STARTING,
            spec.num_restarts,
            0.0,
            None,
            "",
            "n",
            (),
            0,
            Loading(),
            "",
        )
        self.workers[spec.worker_id] = Worker(spec, starting)
        self.num_started += 1
        self.on_start(self.workers[spec.worker_id])

    async def report(self, worker_id: str, version: int) -> ReplicaReport:
        worker = self._worker(worker_id)
        while worker.report.version == version:
            worker.changed.clear()
            await worker.changed.wait()
            self._worker(worker_id)
        return worker.report

    async def set_role(self, worker_id: str, role: WorkerRole) -> None:
        self._worker(worker_id).report = replace(self._worker(worker_id).report, role=role)

    async def drain(self, worker_id: str) -> None:
        self._worker(worker_id).become(ReplicaState.DRAINING)
        if not self._worker(worker_id).load:
            self._worker(worker_id).become(ReplicaState.DRAINED)

    async def load(self, worker_id: str) -> int:
        return self._worker(worker_id).load

    async def stop(self, worker_id: str) -> None:
        self.kill(worker_id)

    def kill(self, worker_id: str) -> None:
        worker = self.workers.pop(worker_id, None)
        if worker is not None:
            worker.changed.set()

    def finish(self, worker_id: str) -> None:
        self.workers[worker_id].load = 0
        self.workers[worker_id].become(ReplicaState.DRAINED)

    def _worker(self, worker_id: str) -> Worker:
        if worker_id not in self.workers:
            raise UnavailableError(f"process of {worker_id} died")
        return self.workers[worker_id]


class Store:
    target: Target | None = None

    def load(self) -> Target | None:
        return self.target

    def save(self, target: Target) -> None:
        self.target = target


@asynccontextmanager
async def running(cluster: Cluster, store: Store | None = None) -> AsyncIterator[Controller]:
    """A controller at work; at the end it dies without closing anything."""
    controller = Controller(CONFIG, cluster, store or Store(), LIMITS)
    task = asyncio.create_task(controller.run())
    try:
        yield controller
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(
    controller: ClusterControl, condition: Callable[[ControllerStatus], bool], timeout_s: float = PATIENTLY_S
) -> ControllerStatus:
    """The first status that fulfils the condition."""
    async with asyncio.timeout(timeout_s):
        status = await controller.status()
        while not condition(status):
            status = await controller.status(status.version, 1.0)
        return status


async def reached(controller: ClusterControl) -> list[str]:
    """Worker ids once the target is reached."""
    return [row.worker_id for row in (await until(controller, lambda status: status.reached)).replicas]
