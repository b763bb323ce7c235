"""What a group's first rank and another one say to each other on their channel.

Computing messages (``LoadModel``, ``AllocateCache``, ``StepPlan``) are worked off in order by the rank's compute
thread. Calls, which are about KV transfer, are answered beside the computation, under their ``call_id``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_args

from ..collectives.messages import MessageCodec
from ..runtime.config import CacheConfig, ModelInfo, SchedulerConfig
from ..runtime.errors import ErrorCode, FuselineError, make_error
from ..runtime.handoff import KvReservation, Provenance, TransferSummary
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
        num_threads: for computing on a CPU; None: native kernels take the cores there are, torch what it likes.
        memory_fraction: of a GPU, that weights, KV cache and work space may take together.
        num_kv_blocks: taken as given, whatever the memory; None: as many as fit.
        kv_cache_memory_bytes: for this rank's KV cache; None: from the free memory.
        transfers_kv: whether to prepare for handing KV off and taking it over.
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
    transfers_kv: bool


@dataclass(frozen=True, slots=True)
class Loading:
    """Told now and then before ``Loaded``: so many bytes of weights are read, of so many that this rank reads."""

    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Loaded:
    """The weights are in memory; so many KV blocks fit beside them, or were asked for."""

    max_num_blocks: int


@dataclass(frozen=True, slots=True)
class AllocateCache:
    """Make the KV cache; answered by ``Ready``."""

    cache: CacheConfig


@dataclass(frozen=True, slots=True)
class Ready:
    """The rank can run steps.

    Attributes:
        kv_address: of its own ``KvTransfer`` service; empty on the first rank, whose service is the worker's, and
            where no KV is transferred.
        host_id: see ``RankEndpoint``.
    """

    kv_address: str = ""
    host_id: str = ""


@dataclass(frozen=True, slots=True)
class RankFailure:
    """The rank cannot go on, and with it the group."""

    code: ErrorCode
    message: str
    details: dict[str, str]


@dataclass(frozen=True, slots=True)
class Shutdown:
    """End in order."""


@dataclass(frozen=True, slots=True)
class OpenReservation:
    """Take KV into these blocks; see ``KvReceiver.open``."""

    call_id: int
    reservation: KvReservation
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class VerifyReservation:
    """Has exactly this KV arrived in full? See ``KvReceiver.verify``."""

    call_id: int
    reservation_id: str
    provenance: Provenance


@dataclass(frozen=True, slots=True)
class CloseReservation:
    """Write no byte of it any more; see ``KvReceiver.close``."""

    call_id: int
    reservation_id: str


@dataclass(frozen=True, slots=True)
class StartHandoff:
    """Push the KV of the sequence of this name while it is computed; see ``RankHandoffs``."""

    call_id: int
    handoff_id: str
    reservation: KvReservation


@dataclass(frozen=True, slots=True)
class FinishHandoff:
    """Push what is left; answered by ``HandoffDone`` when all is acknowledged."""

    call_id: int
    handoff_id: str


@dataclass(frozen=True, slots=True)
class CancelHandoff:
    """Read no byte for it any more."""

    call_id: int
    handoff_id: str


@dataclass(frozen=True, slots=True)
class CallDone:
    """A call has succeeded."""

    call_id: int


@dataclass(frozen=True, slots=True)
class HandoffDone:
    """A ``FinishHandoff`` has succeeded."""

    call_id: int
    summary: TransferSummary


@dataclass(frozen=True, slots=True)
class CallFailed:
    """A call has failed; the rank and its group go on."""

    call_id: int
    failure: RankFailure


Call = OpenReservation | VerifyReservation | CloseReservation | StartHandoff | FinishHandoff | CancelHandoff
CallAnswer = CallDone | HandoffDone | CallFailed
CODEC = MessageCodec(
    [
        LoadModel,
        Loading,
        Loaded,
        AllocateCache,
        Ready,
        StepPlan,
        StepResult,
        RankFailure,
        Shutdown,
        *get_args(Call),
        *get_args(CallAnswer),
    ]
)
BOOTSTRAP_CODEC = MessageCodec([RankBootstrap])


def failure_of(error: FuselineError) -> RankFailure:
    """The error as a message."""
    return RankFailure(error.code, error.message, error.details)


def error_of(failure: RankFailure, where: str) -> FuselineError:
    """The typed error that a rank reported; ``where`` goes in front of its message."""
    return make_error(failure.code, f"{where}: {failure.message}", failure.details)
