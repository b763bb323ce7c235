"""The controller over worker processes that live in memory: what it does when they come, go, fail and fall silent."""

import asyncio

import pytest

from fuseline.cluster import controller as controller_module
from fuseline.cluster.controller import Controller
from fuseline.cluster.membership import ReplicaState
from fuseline.cluster.messages import Loading
from fuseline.cluster.reconcile import Target
from fuseline.runtime.errors import NotFoundError, ResourceExhaustedError
from fuseline.runtime.role import WorkerRole
from fuseline.tests.cluster.memory_cluster import CONFIG, LIMITS, Cluster, Store, Worker, reached, running, until
from fuseline.tests.timing import PROMPTLY_S


async def test_it_starts_what_the_configuration_asks_for() -> None:
    cluster = Cluster()
    async with running(cluster) as controller:
        prefill, decode = await reached(controller)
        assert prefill.startswith("prefill-0-")
        assert decode.startswith("decode-0-")
        view = await controller.watch(-1, 5)
        assert {info.worker_id: (info.role, info.state, info.address) for info in view.replicas} == {
            prefill: (WorkerRole.PREFILL, ReplicaState.READY, "127.0.0.1:1"),
            decode: (WorkerRole.DECODE, ReplicaState.READY, "127.0.0.1:1"),
        }
    assert cluster.num_started == 2


async def test_status_tells_how_much_of_the_weights_is_read() -> None:
    cluster = Cluster(on_start=lambda worker: None)
    async with running(cluster) as controller:
        status = await until(controller, lambda status: len(status.replicas) == 2)
        worker_id = status.replicas[0].worker_id
        cluster.workers[worker_id].read(Loading(3, 12))
        status = await until(controller, lambda status: status.replicas[0].loading == Loading(3, 12))
        assert status.replicas[1].loading == Loading()


async def test_a_dead_worker_is_replaced_by_another_one_in_its_slot() -> None:
    cluster = Cluster()
    async with running(cluster) as controller:
        _, before = await reached(controller)
        cluster.kill(before)
        await until(controller, lambda status: any(row.num_restarts for row in status.replicas))
        _, after = await reached(controller)
        assert after != before
        assert after.startswith("decode-0-")
        row = (await controller.status()).replicas[1]
        assert (row.worker_id, row.num_restarts) == (after, 1)


async def test_a_watcher_sees_the_death_before_the_replacement_is_ready() -> None:
    cluster = Cluster()
    async with running(cluster) as controller:
        _, before = await reached(controller)
        view = await controller.watch(-1, 5)
        cluster.on_start = lambda worker: None
        cluster.kill(before)
        while before in {info.worker_id for info in view.replicas}:
            view = await controller.watch(view.version, 5)
            states = {info.worker_id: info.state for info in view.replicas}
            assert states.get(before) in (None, ReplicaState.READY, ReplicaState.FAILED)
        unchanged = await controller.watch(view.version, 0.01)
        assert ReplicaState.STARTING in {info.state for info in unchanged.replicas}


async def test_scaling_down_drains_the_least_loaded_and_waits_for_it() -> None:
    cluster = Cluster()
    async with running(cluster) as controller:
        await controller.set_target(Target(1, 3))
        decoders = (await reached(controller))[1:]
        for worker_id, load in zip(decoders, (3, 1, 2), strict=True):
            cluster.workers[worker_id].load = load
        await controller.set_target(Target(1, 2))
        status = await until(controller, lambda s: any(row.state is ReplicaState.DRAINING for row in s.replicas))
        assert {row.worker_id for row in status.replicas if row.state is ReplicaState.DRAINING} == {decoders[1]}
        assert not status.reached
        assert decoders[1] in cluster.workers
        cluster.finish(decoders[1])
        assert (await reached(controller))[1:] == [decoders[0], decoders[2]]
        assert cluster.num_started == 4


async def test_a_target_that_cannot_be_held_changes_nothing() -> None:
    store = Store()
    async with running(Cluster(), store) as controller:
        with pytest.raises(ResourceExhaustedError, match=r"the cluster is too small: wanted 2\.25 CPUs"):
            await controller.set_target(Target(1, 8))
        assert controller.target == Target(1, 1)
        assert store.target is None


async def test_a_new_controller_finds_workers_and_target_of_the_old_one() -> None:
    cluster, store = Cluster(), Store()
    async with running(cluster, store) as controller:
        await controller.set_target(Target(1, 2))
        before = await reached(controller)
        version = (await controller.watch(-1, 5)).version
    lost = before.pop()
    cluster.kill(lost)
    async with running(cluster, store) as controller:
        assert controller.target == Target(1, 2)
        assert (await controller.watch(version, 5)).version != version
        after = await reached(controller)
    assert set(before) < set(after)
    assert cluster.num_started == 4


async def test_a_new_controller_goes_on_counting_what_a_place_has_lost() -> None:
    cluster, store = Cluster(), Store()
    async with running(cluster, store) as controller:
        _, first = await reached(controller)
        cluster.kill(first)
        await until(controller, lambda status: any(row.num_restarts for row in status.replicas))
        both = await reached(controller)
    async with running(cluster, store) as controller:
        assert await reached(controller) == both
        assert not (await controller.status()).replicas[1].message
        cluster.kill(both[1])
        await until(controller, lambda status: any(row.num_restarts == 2 for row in status.replicas))


async def test_a_worker_that_keeps_failing_is_shown_with_its_reason_and_tried_again() -> None:
    cluster = Cluster(on_start=lambda worker: worker.become(ReplicaState.FAILED, "no such model"))
    async with running(cluster) as controller:
        status = await until(controller, lambda status: status.failed != "")
        assert "no such model" in status.failed
        row = next(row for row in status.replicas if row.state is ReplicaState.FAILED)
        assert row.worker_id in ("prefill-0", "decode-0")
        assert row.num_restarts >= 3
        assert "times in a row" in row.message
        cluster.on_start = lambda worker: worker.become(ReplicaState.READY)
        await reached(controller)
        assert (await controller.status()).failed == ""


async def test_draining_a_worker_by_hand_replaces_it() -> None:
    cluster = Cluster()
    async with running(cluster) as controller:
        _, before = await reached(controller)
        cluster.workers[before].load = 2
        assert await controller.drain(before, 0.05) == 2
        drain = asyncio.create_task(controller.drain(before, 5))
        await until(controller, lambda s: sum(row.state is ReplicaState.READY for row in s.replicas) == 2)
        cluster.finish(before)
        assert await drain == 0
        assert before not in await reached(controller)
        with pytest.raises(NotFoundError, match="there is no replica 'nobody'; there are: decode-0"):
            await controller.drain("nobody", 1)


async def test_without_prefill_workers_decode_workers_change_their_role_and_back() -> None:
    cluster = Cluster()
    async with running(cluster) as controller:
        _, decode = await reached(controller)
        await controller.set_target(Target(0, 1))
        assert await reached(controller) == [decode]
        assert cluster.workers[decode].report.role is WorkerRole.MIXED
        await controller.set_target(Target(1, 1))
        assert (await reached(controller))[1] == decode
        assert cluster.workers[decode].report.role is WorkerRole.DECODE


async def test_a_silent_worker_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller_module, "SILENCE_TIMEOUT_S", 0.05)  # workers in memory have no heartbeat
    cluster = Cluster()
    async with running(cluster) as controller:
        await until(controller, lambda status: status.failed != "")
        assert "it has been silent for 0.05 s" in (await controller.status()).failed
        assert cluster.num_started > 2


async def test_a_bug_ends_the_controller_rather_than_losing_a_replica() -> None:
    def fail(worker: Worker) -> None:
        raise RuntimeError("a bug")

    controller = Controller(CONFIG, Cluster(on_start=fail), Store(), LIMITS)
    with pytest.raises(RuntimeError, match="a bug"):
        await asyncio.wait_for(controller.run(), PROMPTLY_S)


async def test_it_can_be_cancelled_just_as_it_is_woken() -> None:
    """asyncio.wait_for, before Python 3.12, then forgets that it was cancelled."""
    cluster = Cluster()
    controller = Controller(CONFIG, cluster, Store(), LIMITS)
    task = asyncio.create_task(controller.run())
    await reached(controller)
    controller._note_change()
    task.cancel()
    async with asyncio.timeout(PROMPTLY_S):
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_closing_ends_every_worker() -> None:
    cluster = Cluster()
    async with running(cluster) as controller:
        await reached(controller)
        await asyncio.wait_for(controller.close(), PROMPTLY_S)
        assert cluster.workers == {}
        assert (await controller.watch(-1, 1)).replicas == ()
