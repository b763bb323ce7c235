import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuseline.cluster.cluster_config import ClusterConfig, PoolConfig
from fuseline.cluster.placement import ReplicaPlacement, Resources, check_room, fits, place
from fuseline.cluster.reconcile import Target
from fuseline.runtime.errors import ResourceExhaustedError
from fuseline.runtime.role import WorkerRole
from fuseline.runtime.sharding import ParallelConfig

CPU = ClusterConfig().on("cpu")
GPU = ClusterConfig(decode=PoolConfig(1, ParallelConfig(4, 2))).on("cuda")


def test_a_tensor_parallel_group_is_one_bundle_and_a_stage_each() -> None:
    placement = place(GPU, WorkerRole.DECODE)
    assert placement == ReplicaPlacement(Resources.of(1, 1), ranks_per_bundle=4, num_bundles=2)
    assert placement.bundle == Resources.of(4, 4)
    assert [placement.bundle_index(rank) for rank in range(8)] == [0] * 4 + [1] * 4


def test_ranks_may_be_placed_apart_when_told() -> None:
    placement = place(replace(GPU, allow_cross_node_tp=True), WorkerRole.DECODE)
    assert placement == ReplicaPlacement(Resources.of(1, 1), ranks_per_bundle=1, num_bundles=8)


def test_eight_small_replicas_share_two_cores_and_a_ninth_does_not() -> None:
    check_room(CPU, Target(4, 4), [Resources.of(2, 0)])
    with pytest.raises(ResourceExhaustedError) as caught:
        check_room(CPU, Target(4, 5), [Resources.of(2, 0)])
    assert caught.value.message == (
        "the cluster is too small: wanted 2.25 CPUs (0.25 CPUs for each of 4 prefill workers,"
        " 0.25 CPUs for each of 5 decode workers), found 2 CPUs on 1 node"
    )
    assert caught.value.details["needed_cpus"] == "2.25"
    assert caught.value.details["total_cpus"] == "2"


def test_gpus_on_two_nodes_do_not_make_a_group_of_four() -> None:
    nodes = [Resources.of(64, 2), Resources.of(64, 2)]
    config = ClusterConfig(decode=PoolConfig(1, ParallelConfig(4))).on("cuda")
    with pytest.raises(ResourceExhaustedError, match="found 128 CPUs and 4 GPUs on 2 nodes, at most 64 CPUs"):
        check_room(config, Target(0, 1), nodes)
    with pytest.raises(ResourceExhaustedError, match=r"wanted 4 CPUs and 4 GPUs \(2 parts of 2 CPUs and 2 GPUs,"):
        check_room(replace(config, decode=PoolConfig(1, ParallelConfig(2, 2))), Target(0, 1), nodes[:1])
    check_room(replace(config, allow_cross_node_tp=True), Target(0, 1), nodes)
    check_room(replace(config, decode=PoolConfig(1, ParallelConfig(2, 2))), Target(0, 1), nodes)


def test_a_cluster_without_nodes_holds_nothing() -> None:
    with pytest.raises(ResourceExhaustedError, match="0 CPUs on 0 nodes"):
        check_room(CPU, Target(0, 1), [])


bundles = st.builds(Resources, st.integers(1, 3), st.integers(0, 2))
nodes = st.lists(st.builds(Resources, st.integers(0, 6), st.integers(0, 4)), max_size=3)


@settings(max_examples=200, deadline=None)
@given(bundles, st.integers(1, 3), bundles, st.integers(0, 3), nodes)
def test_room_is_found_exactly_when_some_assignment_exists(
    first: Resources, num_first: int, second: Resources, num_second: int, nodes: list[Resources]
) -> None:
    wanted = [(first, num_first)] + [(second, num_second)] * (num_second > 0)
    parts = [first] * num_first + [second] * num_second

    def holds(assignment: tuple[int, ...]) -> bool:
        for index, node in enumerate(nodes):
            here = [part for part, where in zip(parts, assignment, strict=True) if where == index]
            if sum(p.cpu_units for p in here) > node.cpu_units or sum(p.gpus for p in here) > node.gpus:
                return False
        return True

    expected = any(holds(each) for each in itertools.product(range(len(nodes)), repeat=len(parts)))
    assert fits(wanted, nodes) is expected
