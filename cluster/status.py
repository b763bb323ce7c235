"""What an operator sees of a cluster: frozen dataclasses and their reading from the wire. Light: no torch, no Ray."""

from __future__ import annotations

from dataclasses import dataclass

from ..proto.fuseline.v1 import cluster_pb2, worker_pb2
from ..runtime.errors import InvalidArgumentError
from ..runtime.role import WorkerRole
from ..workers.wire import ROLE_TO_WIRE, copied

KNOWN_ROLES = frozenset(ROLE_TO_WIRE.values())
_STATES: dict[int, str] = {
    cluster_pb2.REPLICA_STATE_STARTING: "starting",
    cluster_pb2.REPLICA_STATE_READY: "ready",
    cluster_pb2.REPLICA_STATE_DRAINING: "draining",
    cluster_pb2.REPLICA_STATE_FAILED: "failed",
}


@dataclass(frozen=True, slots=True)
class PoolTarget:
    """What a pool should be."""

    role: WorkerRole
    num_replicas: int
    tensor_parallel_size: int
    pipeline_parallel_size: int


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """A worker's own account of itself; counters are since its start. See ``WorkerSnapshot`` in worker.proto."""

    num_running: int
    num_waiting: int
    num_queued_tokens: int
    num_total_blocks: int
    num_free_blocks: int
    num_finished: int
    num_preemptions: int
    num_generated_tokens: int
    num_prefix_cache_hit_tokens: int
    num_prefix_cache_query_tokens: int
    num_leaked_blocks: int
    step_time_s: float


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """A replica as the controller sees it.

    Attributes:
        state: "starting", "ready", "draining" or "failed"; "unknown" from a gateway newer than this client.
        pids: one per rank.
        load: None until the worker has told it.
        message: why it failed, or what it waits for.
        loaded_bytes, total_bytes: of weights, all ranks together; 0 until known.
    """

    worker_id: str
    role: WorkerRole
    state: str
    address: str
    node: str
    pids: tuple[int, ...]
    num_restarts: int
    age_s: float
    load: ReplicaLoad | None
    message: str
    loaded_bytes: int
    total_bytes: int

    @property
    def progress(self) -> str:
        """How far a replica that loads is; empty when there is nothing to tell."""
        return progress_text(self.loaded_bytes, self.total_bytes) if self.state == "starting" else ""


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """What should be and what is."""

    model: str
    version: str
    target: tuple[PoolTarget, ...]
    replicas: tuple[ReplicaStatus, ...]
    uptime_s: float


def progress_text(done_bytes: int, total_bytes: int) -> str:
    """Such as "1.2 of 13.5 GB of weights read, 8 %"; empty when there is nothing to read, as far as is known."""
    if not total_bytes:
        return ""
    unit, name = (10**9, "GB") if total_bytes >= 10**9 else (10**6, "MB")
    read = f"{done_bytes / unit:.1f} of {total_bytes / unit:.1f} {name} of weights read"
    return f"{read}, {100 * done_bytes // total_bytes} %"


def role_to_wire(role: str) -> worker_pb2.WorkerRole:
    """A role's number, by name.

    Raises:
        InvalidArgumentError: there is no such role.
    """
    for known, value in ROLE_TO_WIRE.items():
        if known == role:
            return value
    raise InvalidArgumentError(f"there is no pool {role!r}; pools are prefill and decode", field="pool", value=role)


def role_from_wire(value: int) -> WorkerRole:
    """A role by its number.

    Raises:
        InvalidArgumentError: this version does not know it.
    """
    for role, known in ROLE_TO_WIRE.items():
        if known == value:
            return role
    raise InvalidArgumentError(f"unknown worker role {value}", field="role", value=value)


def status_from_wire(message: cluster_pb2.ClusterStatus) -> ClusterStatus:
    """The whole tree."""
    return ClusterStatus(
        model=message.model,
        version=message.version,
        target=tuple(_target_from_wire(target) for target in message.target),
        replicas=tuple(_replica_from_wire(replica) for replica in message.replicas),
        uptime_s=message.uptime_s,
    )


def _target_from_wire(message: cluster_pb2.PoolTarget) -> PoolTarget:
    return PoolTarget(
        role=role_from_wire(message.role),
        num_replicas=message.num_replicas,
        tensor_parallel_size=message.tensor_parallel_size,
        pipeline_parallel_size=message.pipeline_parallel_size,
    )


def _replica_from_wire(message: cluster_pb2.ReplicaStatus) -> ReplicaStatus:
    return ReplicaStatus(
        worker_id=message.worker_id,
        role=role_from_wire(message.role),
        state=_STATES.get(message.state, "unknown"),
        address=message.address,
        node=message.node,
        pids=tuple(message.pids),
        num_restarts=message.num_restarts,
        age_s=message.age_s,
        load=copied(ReplicaLoad, message.snapshot) if message.HasField("snapshot") else None,
        message=message.message,
        loaded_bytes=message.loaded_bytes,
        total_bytes=message.total_bytes,
    )
