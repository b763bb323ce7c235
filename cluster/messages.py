"""What crosses between controller, worker processes and gateway: frozen dataclasses, packed with a schema.

Ray would pickle what it is given. It is given bytes: an answer is a packed dataclass, or a packed ``Failure``, so
that typed errors arrive as what they were and nothing is ever unpickled.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from ..collectives.messages import MessageCodec
from ..runtime.errors import ErrorCode, FuselineError, InvalidArgumentError, make_error
from ..runtime.role import WorkerRole
from .cluster_config import ClusterConfig
from .membership import MembershipView, ReplicaState
from .reconcile import Slot, Target


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """What a worker process is told when it starts."""

    worker_id: str
    slot: Slot
    role: WorkerRole
    num_restarts: int
    config: ClusterConfig


@dataclass(frozen=True, slots=True)
class Loading:
    """Bytes of weights that a replica's ranks have read, and will have read as far as they know; 0 before they do."""

    done_bytes: int = 0
    total_bytes: int = 0


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """A worker process's account of itself. Ages in seconds, since two processes have no clock in common.

    Attributes:
        version: changes with every change of what is below, ages excepted.
        ready_age_s: since it became READY; None before.
        address: ``host:port`` of its gRPC services; empty until it listens.
        pids: one per rank, as far as known.
        load: requests under way.
        loading: how far it is.
        reason: why it FAILED.
    """

    version: int
    worker_id: str
    slot: Slot
    role: WorkerRole
    state: ReplicaState
    num_restarts: int
    age_s: float
    ready_age_s: float | None
    address: str
    node: str
    pids: tuple[int, ...]
    load: int
    loading: Loading
    reason: str


@dataclass(frozen=True, slots=True)
class ReplicaRow:
    """One line of a cluster's status: a replica, or a slot that waits to be filled (its name stands for the id)."""

    worker_id: str
    role: WorkerRole
    state: ReplicaState
    address: str
    node: str
    pids: tuple[int, ...]
    num_restarts: int
    age_s: float
    loading: Loading
    message: str


@dataclass(frozen=True, slots=True)
class ControllerStatus:
    """What should be and what is.

    Attributes:
        version: differs from that of every other state of the replicas.
        reached: whether the target is reached: every replica wanted is READY in its role, none is surplus.
        failed: the reason, when a pool lacks replicas that have failed too often in a row.
    """

    version: int
    config: ClusterConfig
    target: Target
    replicas: tuple[ReplicaRow, ...]
    uptime_s: float
    reached: bool
    failed: str


@dataclass(frozen=True, slots=True)
class Count:
    """A bare number as an answer."""

    value: int


@dataclass(frozen=True, slots=True)
class Done:
    """An answer without content."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A FuselineError as an answer."""

    code: ErrorCode
    message: str
    details: Mapping[str, str]


T = TypeVar("T")
_CODEC = MessageCodec(
    (ClusterConfig, WorkerSpec, ReplicaReport, ControllerStatus, MembershipView, Target, Count, Done, Failure)
)


def pack(message: object) -> bytes:
    """One message as bytes; a FuselineError becomes a ``Failure``.

    Raises:
        InvalidArgumentError: not one of the messages above.
    """
    if isinstance(message, FuselineError):
        message = Failure(message.code, message.message, message.details)
    return _CODEC.encode(message)


async def answer(call: Awaitable[object]) -> bytes:
    """What an actor's method gives back: the packed result of ``call``, a number as ``Count``, or its error."""
    try:
        result = await call
    except FuselineError as error:
        return pack(error)
    if result is None:
        return pack(Done())
    return pack(Count(result) if isinstance(result, int) else result)


def unpack(data: bytes, kind: type[T]) -> T:
    """The message of type ``kind`` in ``data``.

    Raises:
        FuselineError: ``data`` is a Failure: the error that it tells of.
        InvalidArgumentError: not a message, or one of another type.
    """
    message = _CODEC.decode(data)
    if isinstance(message, Failure):
        raise make_error(message.code, message.message, message.details)
    if not isinstance(message, kind):
        raise InvalidArgumentError(f"expected a {kind.__name__}, got a {type(message).__name__}")
    return message
