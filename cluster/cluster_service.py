"""The ``Cluster`` service: what operators see and want, answered from the controller. Hosted by the gateway."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import grpc.aio

from .. import __version__
from ..proto.fuseline.v1 import cluster_pb2, cluster_pb2_grpc, worker_pb2
from ..runtime.errors import InvalidArgumentError, ResourceExhaustedError, UnavailableError
from ..runtime.role import WorkerRole
from ..workers.grpc_errors import answering
from .membership import ReplicaState
from .messages import ControllerStatus, ReplicaRow
from .reconcile import POOLS, Target
from .status import role_from_wire, role_to_wire

POLL_S = 10.0  # longest single wait at the controller, so that a caller who went away is noticed
MAX_WAITING = 32  # callers that wait for the controller; it answers so many calls at a time, and others need it, too
DRAIN_TIMEOUT_S = 3600.0  # for a caller who sets no deadline; the drain itself is bounded by the configuration

_STATES = {
    ReplicaState.STARTING: cluster_pb2.REPLICA_STATE_STARTING,
    ReplicaState.READY: cluster_pb2.REPLICA_STATE_READY,
    ReplicaState.DRAINING: cluster_pb2.REPLICA_STATE_DRAINING,
    ReplicaState.DRAINED: cluster_pb2.REPLICA_STATE_DRAINING,
    ReplicaState.FAILED: cluster_pb2.REPLICA_STATE_FAILED,
}
Snapshots = Mapping[str, worker_pb2.WorkerSnapshot]
Context = grpc.aio.ServicerContext[Any, Any]


class ClusterControl(Protocol):
    """A ``Controller``, here or in another process."""

    async def status(self, version: int = -1, timeout_s: float = 0.0) -> ControllerStatus:
        """See ``Controller.status``."""

    async def set_target(self, target: Target) -> None:
        """See ``Controller.set_target``."""

    async def drain(self, worker_id: str, timeout_s: float) -> int:
        """See ``Controller.drain``."""


class ClusterService(cluster_pb2_grpc.ClusterServicer):
    """See cluster.proto.

    Attributes:
        snapshots: tells what each worker in sight last said of itself, by worker id; the gateway's to set.
    """

    def __init__(self, control: ClusterControl, stop: Callable[[], None]) -> None:
        """``stop`` is called when someone asks for the cluster's end; it must return at once."""
        self.snapshots: Callable[[], Snapshots] = dict
        self._control = control
        self._stop = stop
        self._num_waiting = 0

    async def GetStatus(self, request: cluster_pb2.GetStatusRequest, context: Context) -> cluster_pb2.ClusterStatus:
        """What should be and what is."""
        async with answering(context):
            return status_to_wire(await self._control.status(), self.snapshots())

    async def SetTarget(self, request: cluster_pb2.SetTargetRequest, context: Context) -> cluster_pb2.ClusterStatus:
        """Change pool sizes; with ``wait``, answer when they are reached, or a pool has failed to get there."""
        async with answering(context):
            target = _target_from_wire(request, (await self._control.status()).target)
            if not request.wait:
                await self._control.set_target(target)
                return status_to_wire(await self._control.status(), self.snapshots())
            with self._waiting():
                await self._control.set_target(target)
                return status_to_wire(await self._reached(target), self.snapshots())

    async def Drain(self, request: cluster_pb2.DrainRequest, context: Context) -> cluster_pb2.DrainResponse:
        """Take a worker out; answers when it is gone or shortly before the call's deadline passes."""
        async with answering(context):
            left_s = context.time_remaining()
            timeout_s = DRAIN_TIMEOUT_S if left_s is None else max(0.0, left_s - min(1.0, left_s / 2))
            with self._waiting():
                num_left = await self._control.drain(request.worker_id, min(timeout_s, DRAIN_TIMEOUT_S))
            return cluster_pb2.DrainResponse(num_left=num_left)

    async def Stop(self, request: cluster_pb2.StopRequest, context: Context) -> cluster_pb2.StopResponse:
        """Begin to end the cluster."""
        self._stop()
        return cluster_pb2.StopResponse()

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Around a wait that may be long.

        Raises:
            ResourceExhaustedError: too many wait already; nothing has been done.
        """
        if self._num_waiting >= MAX_WAITING:
            raise ResourceExhaustedError(
                f"{self._num_waiting} callers are waiting for the cluster already, at most {MAX_WAITING} may",
                value=self._num_waiting,
                limit=MAX_WAITING,
                retry_after_s=1,
            )
        self._num_waiting += 1
        try:
            yield
        finally:
            self._num_waiting -= 1

    async def _reached(self, target: Target) -> ControllerStatus:
        """The status once the target is reached.

        Raises:
            UnavailableError: it is not, and will not be.
        """
        status = await self._control.status()
        while not (status.reached and status.target == target):
            if status.failed:
                raise UnavailableError(f"the target is not reached: {status.failed}")
            if status.target != target:
                raise UnavailableError("the target has been changed by someone else meanwhile")
            status = await self._control.status(status.version, POLL_S)
        return status


def status_to_wire(status: ControllerStatus, snapshots: Snapshots) -> cluster_pb2.ClusterStatus:
    """The status as operators get it, with what the gateway knows of each worker's load."""
    message = cluster_pb2.ClusterStatus(model=status.config.name, version=__version__, uptime_s=status.uptime_s)
    for pool in POOLS:
        parallel = status.config.pool(pool).parallel
        message.target.add(
            role=role_to_wire(pool),
            num_replicas=status.target.size(pool),
            tensor_parallel_size=parallel.tensor_parallel_size,
            pipeline_parallel_size=parallel.pipeline_parallel_size,
        )
    message.replicas.extend(_row_to_wire(row, snapshots.get(row.worker_id)) for row in status.replicas)
    return message


def _row_to_wire(row: ReplicaRow, snapshot: worker_pb2.WorkerSnapshot | None) -> cluster_pb2.ReplicaStatus:
    return cluster_pb2.ReplicaStatus(
        worker_id=row.worker_id,
        role=role_to_wire(row.role),
        state=_STATES[row.state],
        address=row.address,
        node=row.node,
        pids=row.pids,
        num_restarts=row.num_restarts,
        age_s=row.age_s,
        snapshot=snapshot,
        message=row.message,
        loaded_bytes=row.loading.done_bytes,
        total_bytes=row.loading.total_bytes,
    )


def _target_from_wire(request: cluster_pb2.SetTargetRequest, present: Target) -> Target:
    """The target that the request makes of the present one.

    Raises:
        InvalidArgumentError: a pool that does not exist, is named twice, or may not have that size.
    """
    sizes = {pool: present.size(pool) for pool in POOLS}
    named: set[WorkerRole] = set()
    for size in request.sizes:
        pool = role_from_wire(size.role)
        if pool not in POOLS or pool in named:
            problem = "is named twice" if pool in named else "is no pool; pools are prefill and decode"
            raise InvalidArgumentError(f"{pool} {problem}", field="sizes", value=str(pool))
        named.add(pool)
        sizes[pool] = size.num_replicas
    return Target(sizes[WorkerRole.PREFILL], sizes[WorkerRole.DECODE])
