"""The life of a worker process, over workers that do as each test says."""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import asynccontextmanager

import pytest

from fuseline.cluster import worker_host
from fuseline.cluster.cluster_config import ClusterConfig
from fuseline.cluster.membership import ReplicaState
from fuseline.cluster.messages import Loading, ReplicaReport, WorkerSpec
from fuseline.cluster.reconcile import Slot
from fuseline.cluster.worker_host import WorkerHost
from fuseline.runtime.errors import ModelFormatError, UnavailableError
from fuseline.runtime.role import WorkerRole
from fuseline.tests.timing import PROMPTLY_S

SPEC = WorkerSpec("decode-0-ab", Slot(WorkerRole.DECODE, 0), WorkerRole.DECODE, 2, ClusterConfig(device="cpu"))


class Worker:
    """Does nothing until told; its events belong to the host's loop, so tests reach them through ``tell``."""

    def __init__(self, start_error: Exception | None = None) -> None:
        self.start_error = start_error
        self.role: WorkerRole | None = None
        self.stopped = False
        self.num_under_way = 1
        self.read = Loading()
        self.may_start, self.broken, self.finished = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.loop: Future[asyncio.AbstractEventLoop] = Future()

    async def start(self) -> str:
        self.loop.set_result(asyncio.get_running_loop())
        await self.may_start.wait()
        if self.start_error is not None:
            raise self.start_error
        return "127.0.0.1:1"

    async def failed(self) -> str:
        await self.broken.wait()
        return "rank 1 is gone"

    async def set_role(self, role: WorkerRole) -> None:
        self.role = role

    def load(self) -> int:
        return self.num_under_way

    def loading(self) -> Loading:
        return self.read

    def pids(self) -> tuple[int, ...]:
        return (7, 8)

    async def drain(self) -> None:
        await self.finished.wait()
        self.num_under_way = 0

    async def stop(self, grace_s: float) -> None:
        self.stopped = True

    def tell(self, event: asyncio.Event) -> None:
        self.loop.result(PROMPTLY_S).call_soon_threadsafe(event.set)


@asynccontextmanager
async def hosting(worker: Worker) -> AsyncIterator[WorkerHost]:
    host = WorkerHost(SPEC, lambda spec: worker, "here")
    host.start()
    try:
        yield host
    finally:
        await asyncio.wait_for(host.stop(), PROMPTLY_S)
    assert worker.stopped


async def until(host: WorkerHost, state: ReplicaState) -> ReplicaReport:
    async with asyncio.timeout(PROMPTLY_S):
        report = await host.report(-1)
        while report.state is not state:
            report = await host.report(report.version)
        return report


async def test_from_loading_to_drained() -> None:
    worker = Worker()
    async with hosting(worker) as host:
        starting = await host.report(-1)
        assert (starting.state, starting.address, starting.ready_age_s) == (ReplicaState.STARTING, "", None)
        worker.tell(worker.may_start)
        ready = await until(host, ReplicaState.READY)
        assert (ready.address, ready.pids, ready.load, ready.num_restarts) == ("127.0.0.1:1", (7, 8), 1, 2)
        assert ready.ready_age_s is not None
        assert 0 <= ready.ready_age_s <= ready.age_s
        await host.drain()
        assert (await until(host, ReplicaState.DRAINING)).load == 1
        worker.tell(worker.finished)
        assert (await until(host, ReplicaState.DRAINED)).load == 0


@pytest.mark.parametrize(
    ("error", "reason"),
    [(ModelFormatError("no such model"), "no such model"), (RuntimeError("a bug"), "RuntimeError: a bug")],
)
async def test_a_worker_that_cannot_start_says_why(error: Exception, reason: str) -> None:
    worker = Worker(error)
    worker.may_start.set()
    async with hosting(worker) as host:
        assert (await until(host, ReplicaState.FAILED)).reason == reason


@pytest.mark.parametrize("draining", [False, True])
async def test_a_worker_that_breaks_says_why(draining: bool) -> None:
    worker = Worker()
    worker.may_start.set()
    async with hosting(worker) as host:
        await until(host, ReplicaState.READY)
        if draining:
            await host.drain()
            await until(host, ReplicaState.DRAINING)
        worker.tell(worker.broken)
        assert (await until(host, ReplicaState.FAILED)).reason == "rank 1 is gone"


async def test_a_new_role_reaches_the_worker_and_the_report() -> None:
    worker = Worker()
    worker.may_start.set()
    async with hosting(worker) as host:
        before = await until(host, ReplicaState.READY)
        assert before.role is WorkerRole.DECODE
        await host.set_role(WorkerRole.MIXED)
        after = await host.report(before.version)
        assert (after.role, worker.role) == (WorkerRole.MIXED, WorkerRole.MIXED)


async def test_without_news_a_report_still_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_host, "HEARTBEAT_S", 0.01)
    async with hosting(Worker()) as host:
        version = (await host.report(-1)).version
        assert (await host.report(version)).version == version


async def test_what_is_read_is_told_while_it_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_host, "LOADING_S", 0.01)
    worker = Worker()
    async with hosting(worker) as host:
        seen = await host.report(-1)
        for loading in (Loading(10, 200), Loading(200, 200)):
            worker.read = loading
            version = seen.version
            async with asyncio.timeout(PROMPTLY_S):
                while seen.loading != loading:
                    seen = await host.report(seen.version)
            assert (seen.state, seen.version) == (ReplicaState.STARTING, version + 1)


async def test_a_worker_can_be_stopped_while_it_starts_and_then_answers_no_more() -> None:
    worker = Worker()
    async with hosting(worker) as host:
        await host.report(-1)
        await asyncio.wait_for(host.stop(), PROMPTLY_S)
        with pytest.raises(UnavailableError, match="worker decode-0-ab has ended"):
            await host.report(-1)
