import pytest

from fuseline.cluster.cluster_config import ClusterConfig, EngineLimits, PoolConfig
from fuseline.cluster.membership import MembershipView, ReplicaInfo, ReplicaState
from fuseline.cluster.messages import (
    ControllerStatus,
    Count,
    Done,
    Loading,
    ReplicaReport,
    ReplicaRow,
    WorkerSpec,
    pack,
    unpack,
)
from fuseline.cluster.reconcile import Slot, Target
from fuseline.runtime.errors import InvalidArgumentError, ResourceExhaustedError
from fuseline.runtime.role import WorkerRole
from fuseline.runtime.sharding import ParallelConfig

CONFIG = ClusterConfig(
    model="some/model",
    device="cuda",
    prefill=PoolConfig(0),
    decode=PoolConfig(3, ParallelConfig(2, 2), num_cpus_per_rank=2),
    limits=EngineLimits(max_model_len=512, num_blocks=99),
    allow_cross_node_tp=True,
)
SLOT = Slot(WorkerRole.DECODE, 2)
MIXED, READY = WorkerRole.MIXED, ReplicaState.READY
ROW = ReplicaRow("decode-2-ab", MIXED, READY, "127.0.0.1:1", "node", (1, 2), 3, 4.5, Loading(5, 6), "why")


@pytest.mark.parametrize(
    "message",
    [
        CONFIG,
        WorkerSpec("decode-2-ab", SLOT, MIXED, 1, CONFIG),
        ReplicaReport(
            7, "decode-2-ab", SLOT, MIXED, READY, 1, 2.5, None, "127.0.0.1:1", "node", (1, 2), 3, Loading(5, 6), ""
        ),
        ControllerStatus(5, CONFIG, Target(0, 3), (ROW,), 9.5, False, "boom"),
        MembershipView(2**40, (ReplicaInfo("a", MIXED, ReplicaState.DRAINING, "h:1"),)),
        Target(1, 2),
        Count(3),
        Done(),
    ],
    ids=lambda message: type(message).__name__,
)
def test_messages_arrive_as_they_were_sent(message: object) -> None:
    assert unpack(pack(message), type(message)) == message


def test_an_error_arrives_as_what_it_was() -> None:
    sent = ResourceExhaustedError("too small", needed_cpus="4")
    with pytest.raises(ResourceExhaustedError, match="too small") as caught:
        unpack(pack(sent), Done)
    assert caught.value.details == {"needed_cpus": "4"}


def test_another_message_or_none_at_all_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="expected a Target, got a Done"):
        unpack(pack(Done()), Target)
    with pytest.raises(InvalidArgumentError, match="malformed"):
        unpack(b"\xc1", Target)
    with pytest.raises(InvalidArgumentError, match="decode must have 1 to 1024 replicas, got 0"):
        unpack(pack(Target(0, 1))[:-1] + b"\x00", Target)
