"""What a group's first rank and another one say to each other on their channel.

Computing messages (``LoadModel``, ``AllocateCache``, ``StepPlan``) are worked off in order by the rank's compute
thread. Everything else is answered at once, beside the computation.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..collectives.messages import MessageCodec
from ..runtime.config import ModelInfo, SchedulerConfig
from ..runtime.errors import (
    AlreadyExistsError,
    CancelledError,
    DeadlineExceededError,
    ErrorCode,
    FuselineError,
    InternalError,
    InvalidArgumentError,
    ModelFormatError,
    NotFoundError,
    ProvenanceError,
    ResourceExhaustedError,
    UnavailableError,
)
from ..runtime.plan import StepPlan, StepResult
from ..runtime.sharding import ParallelConfig


@dataclass(frozen=True, slots=True)
class RankBootstrap:
    """All that a new rank needs to find its group; the rest comes over the channel. ``token`` is a secret.

    Attributes:
        address: ``host:port`` of the first rank's ``StepListener``.
        device: "cpu" or "cuda:n", as the launcher assigns it.
    """

    rank: int
    address: str
    token: bytes = field(repr=False)
    device: str


@dataclass(frozen=True, slots=True)
class LoadModel:
    """Join the communicators and load this rank's weights; answered by ``Loaded``.

    Attributes:
        model: name or path, resolved on the rank's own host.
        info: as the first rank read it; the rank's own files must agree.
        store_address: of the group's ``CommunicatorStore``.
        timeout_s: of joining, and of every collective call.
        num_threads: for computing on a CPU; None leaves torch's setting alone.
        memory_fraction: of a GPU, that weights, KV cache and work space may take together.
        num_kv_blocks: taken as given, whatever the memory; None: as many as fit.
        kv_cache_memory_bytes: for this rank's KV cache; None: from the free memory.
    """

    model: str
    info: ModelInfo
    parallel: ParallelConfig
    scheduler: SchedulerConfig
    block_size: int
    store_address: str
    timeout_s: float
    num_threads: int | None
    memory_fraction: float
    num_kv_blocks: int | None
    kv_cache_memory_bytes: int | None


@dataclass(frozen=True, slots=True)
class Loaded:
    """The weights are in memory; so many KV blocks fit beside them, or were asked for."""

    max_num_blocks: int


@dataclass(frozen=True, slots=True)
class AllocateCache:
    """Make the KV cache; answered by ``Ready``."""

    num_blocks: int


@dataclass(frozen=True, slots=True)
class Ready:
    """The rank can run steps."""


@dataclass(frozen=True, slots=True)
class RankFailure:
    """The rank cannot go on, and with it the group."""

    code: ErrorCode
    message: str
    details: dict[str, str]


@dataclass(frozen=True, slots=True)
class Shutdown:
    """End in order."""


COMPUTE_MESSAGES = (LoadModel, AllocateCache, StepPlan)
CODEC = MessageCodec([LoadModel, Loaded, AllocateCache, Ready, StepPlan, StepResult, RankFailure, Shutdown])
BOOTSTRAP_CODEC = MessageCodec([RankBootstrap])

_ERROR_TYPES: dict[ErrorCode, type[FuselineError]] = {
    kind.code: kind
    for kind in (
        InvalidArgumentError,
        NotFoundError,
        AlreadyExistsError,
        ModelFormatError,
        ResourceExhaustedError,
        UnavailableError,
        DeadlineExceededError,
        CancelledError,
        ProvenanceError,
        InternalError,
    )
}


def failure_of(error: FuselineError) -> RankFailure:
    """The error as a message."""
    return RankFailure(error.code, error.message, error.details)


def error_of(failure: RankFailure, where: str) -> FuselineError:
    """The typed error that a rank reported; ``where`` goes in front of its message."""
    error = _ERROR_TYPES[failure.code](f"{where}: {failure.message}")
    error.details.update(failure.details)
    return error
