import asyncio

from fuseline.cluster.membership import MembershipView, ReplicaInfo, ReplicaState, StaticMembership
from fuseline.runtime.role import WorkerRole


def replica(worker_id: str) -> ReplicaInfo:
    return ReplicaInfo(worker_id, WorkerRole.DECODE, ReplicaState.READY, "127.0.0.1:1")


async def test_every_watcher_gets_the_present_view_and_each_later_one() -> None:
    membership = StaticMembership([replica("a")])
    seen: list[list[str]] = [[], []]

    async def watch(into: list[str]) -> None:
        async for view in membership.watch():
            into.append(",".join(info.worker_id for info in view.replicas))

    watchers = [asyncio.create_task(watch(into)) for into in seen]
    for workers in (["a", "b"], []):
        await asyncio.sleep(0)
        membership.set(replica(worker) for worker in workers)
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    membership.close()
    await asyncio.wait_for(asyncio.gather(*watchers), 5)
    assert seen == [["a", "a,b", ""], ["a", "a,b", ""]]


async def test_a_slow_watcher_skips_to_the_latest_view() -> None:
    membership = StaticMembership()
    watch = membership.watch()
    assert await anext(watch) == MembershipView(0, ())
    for worker in "abc":
        membership.set([replica(worker)])
    latest = await anext(watch)
    assert latest == membership.view
    assert latest.replicas[0].worker_id == "c"
