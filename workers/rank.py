"""One rank of a group: its device, communicators, weights, KV cache and model runner.

The group's first rank lives in the process that runs the engine. Every other one is a process of its own, started by
a ``RankLauncher`` as ``python -m fuseline.workers.rank`` with a ``RankBootstrap`` on standard input, or by calling
``run_rank`` in a process that is given over to it. Such a process ends when the first rank hangs up, for whatever
reason: no rank outlives its group.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..collectives.communicator import GroupCommunicators, make_communicators
from ..collectives.segment import host_id
from ..collectives.step_channel import StepChannel
from ..kernels.cpu.threads import set_num_threads
from ..runtime.config import EngineConfig
from ..runtime.errors import (
    FuselineError,
    InternalError,
    ModelFormatError,
    ResourceExhaustedError,
    UnavailableError,
)
from ..runtime.handoff import TransferSummary
from ..runtime.plan import StepPlan, StepResult
from ..runtime.sharding import kv_range
from .handoffs import KvPush, RankHandoffs
from .loader import Progress, load_model, model_info, resolve_model
from .memory import kv_budget_bytes, max_kv_blocks
from .model_runner import ModelRunner
from .models.decoder import DecoderModel
from .models.registry import load_model_config
from .rank_protocol import (
    BOOTSTRAP_CODEC,
    CODEC,
    AllocateCache,
    Call,
    CallAnswer,
    CallDone,
    CallFailed,
    CancelHandoff,
    CloseReservation,
    FinishHandoff,
    HandoffDone,
    Loaded,
    Loading,
    LoadModel,
    OpenReservation,
    RankBootstrap,
    Ready,
    Shutdown,
    StartHandoff,
    VerifyReservation,
    failure_of,
)

if TYPE_CHECKING:
    from ..collectives.kv_transfer import KvReceiver, KvSender
    from .kv_server import KvServer

logger = logging.getLogger(__name__)
_LOADING_LOG_S = 2.0
_LOADING_TOLD_S = 0.2
_MAX_QUEUED = 256  # computing messages; the pipeline's depth bounds them far below


@dataclass(frozen=True, slots=True)
class Job:
    """A computing message, and the KV that a step pushes after each of its layers."""

    message: LoadModel | AllocateCache | StepPlan
    pushes: tuple[KvPush, ...] = ()


class RankWorker:
    """A rank's state, driven by messages.

    ``accept`` and ``call`` take messages in the order in which they arrive; ``compute`` works off the accepted ones
    in the same order, on one thread of its own if need be.

    Args:
        host: the address of this machine that peers reach.
        progress: of loading the weights, see ``load_model``; it is logged as well.
    """

    def __init__(self, rank: int, device: torch.device, host: str, progress: Progress | None = None) -> None:
        self.rank = rank
        self.kv_receiver: KvReceiver | None = None
        self._device = device
        self._host = host
        self._progress = progress
        self._config: LoadModel | None = None
        self._communicators: GroupCommunicators | None = None
        self._model: DecoderModel | None = None
        self._runner: ModelRunner | None = None
        self._sender: KvSender | None = None
        self._handoffs: RankHandoffs | None = None
        self._server: KvServer | None = None

    def accept(self, message: LoadModel | AllocateCache | StepPlan) -> Job:
        """A computing message has arrived; ``compute`` is to be called with what this returns."""
        if isinstance(message, StepPlan) and self._handoffs is not None:
            return Job(message, self._handoffs.observe(message))
        return Job(message)

    def compute(self, job: Job) -> Loaded | Ready | StepResult | None:
        """Work off one computing message.

        Raises:
            FuselineError: it failed, and the group with it.
        """
        message = job.message
        try:
            if isinstance(message, StepPlan):
                return self._step(message, job.pushes)
            return self._load(message) if isinstance(message, LoadModel) else self._allocate(message)
        except (torch.cuda.OutOfMemoryError, MemoryError) as error:
            raise ResourceExhaustedError(f"rank {self.rank} is out of memory: {error}", rank=self.rank) from error
        except FuselineError:
            raise
        except Exception as error:  # a bug or a broken device: the group must hear of it, typed
            logger.exception("rank %d failed", self.rank)
            raise InternalError(f"{type(error).__name__}: {error}", rank=self.rank) from error

    def call(self, call: Call, answer: Callable[[CallAnswer], None]) -> None:
        """Serve a call; ``answer`` is called once, now or, when a transfer has ended, from another thread."""
        try:
            if isinstance(call, FinishHandoff):
                future = self._transfers()[1].finish(call.handoff_id)
                future.add_done_callback(lambda done: answer(_finished(call.call_id, done)))
                return
            self._serve(call)
        except FuselineError as error:
            answer(_failed(call.call_id, error))
        except Exception as error:  # a bug: whoever called must hear of it, typed
            logger.exception("a call failed on rank %d", self.rank)
            answer(_failed(call.call_id, error))
        else:
            answer(CallDone(call.call_id))

    def _serve(self, call: Call) -> None:
        receiver, handoffs = self._transfers()
        match call:
            case OpenReservation(_, reservation, block_ids):
                receiver.open(
                    reservation.reservation_id, reservation.provenance, block_ids, reservation.num_cached_tokens
                )
            case VerifyReservation(_, reservation_id, provenance):
                receiver.verify(reservation_id, provenance)
            case CloseReservation(_, reservation_id):
                receiver.close(reservation_id)
            case StartHandoff(_, handoff_id, reservation):
                handoffs.start(handoff_id, reservation)
            case CancelHandoff(_, handoff_id):
                handoffs.cancel(handoff_id)

    def _transfers(self) -> tuple[KvReceiver, RankHandoffs]:
        if self.kv_receiver is None or self._handoffs is None:
            raise InternalError("this group was not started to transfer KV")
        return self.kv_receiver, self._handoffs

    def _step(self, plan: StepPlan, pushes: tuple[KvPush, ...]) -> StepResult | None:
        runner, sender = self._runner, self._sender
        if runner is None:
            raise InternalError("a step came before the KV cache was made")
        if not pushes or sender is None:
            return runner.execute(plan)

        def on_layer(layer: int) -> None:
            for push in pushes:
                sender.push(push.reservation_id, layer, push.start, push.end)

        return runner.execute(plan, on_layer)

    def _load(self, config: LoadModel) -> Loaded:
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        else:
            set_num_threads(config.num_threads)
        path = resolve_model(config.model)
        info, parallel = config.info, config.parallel
        if self.rank > 0:
            found = model_info(path, info.dtype, info.max_model_len, quantization=info.quantization).fingerprint
            if found != info.fingerprint:
                raise ModelFormatError(
                    f"{path} is not the model that the first rank has: fingerprint {found}, not {info.fingerprint}",
                    path=path,
                )
        self._communicators = make_communicators(
            config.store_address, parallel, self.rank, self._device, config.timeout_s, self._host
        )
        self._model = load_model(
            path,
            load_model_config(path),
            info.dtype,
            info.kv_dtype,
            self._device,
            parallel,
            self.rank,
            self._communicators,
            _LoadingReporter(self.rank, self._progress),
            info.quantization,
        )
        self._config = config
        if config.num_kv_blocks is not None:
            return Loaded(config.num_kv_blocks)
        budget = config.kv_cache_memory_bytes
        if budget is None:
            budget = kv_budget_bytes(self._device, info, config.scheduler, parallel, config.memory_fraction)
        return Loaded(max_kv_blocks(info, config.scheduler, parallel, self.rank, config.block_size, budget))

    def _allocate(self, message: AllocateCache) -> Ready:
        config, model, communicators = self._config, self._model, self._communicators
        if config is None or model is None or communicators is None:
            raise InternalError("the KV cache was asked for before the model was loaded")
        cache = message.cache
        engine_config = EngineConfig(config.info, cache, config.scheduler, config.parallel)
        kv_cache = model.new_kv_cache(cache.num_blocks, cache.block_size)
        self._runner = ModelRunner(
            model, kv_cache, engine_config, communicators.pp, is_first_of_stage=communicators.tp.rank == 0
        )
        return self._prepare_transfers(kv_cache, config) if config.transfers_kv else Ready()

    def _prepare_transfers(self, kv_cache: torch.Tensor, config: LoadModel) -> Ready:
        # With gRPC, which takes a while to import, and which a group that hands nothing over can do without.
        from ..collectives.kv_transfer import KvReceiver, KvSender
        from .kv_server import KvServer

        shape, parallel = config.info.shape, config.parallel
        self.kv_receiver = KvReceiver(kv_cache, kv_range(shape, parallel, self.rank))
        self._sender = KvSender(kv_cache, shape, parallel, self.rank)
        self._handoffs = RankHandoffs(self._sender)
        if self.rank > 0:
            self._server = KvServer(self.kv_receiver, self._host)
        return Ready(self._server.address if self._server is not None else "", host_id())

    def close(self) -> None:
        """Hang up on the other ranks and let go of the memory; from any thread, idempotent.

        A step under way on another thread fails with UnavailableError as soon as it needs a peer.
        """
        if self._communicators is not None:
            self._communicators.close()
        if self._server is not None:
            self._server.close()
        if self._sender is not None:
            self._sender.close()
        self._model = self._runner = None


class _LoadingReporter:
    """Tells how far a rank's weights are read, from time to time and at the end; logs it if it takes long."""

    def __init__(self, rank: int, progress: Progress | None) -> None:
        self._rank = rank
        self._progress = progress
        self._told_at = -math.inf
        self._logged_at = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._progress is not None and (done == total or now - self._told_at >= _LOADING_TOLD_S):
            self._told_at = now
            self._progress(done, total)
        if now - self._logged_at >= _LOADING_LOG_S:
            self._logged_at = now
            logger.info("rank %d: %d of %d MiB of weights loaded", self._rank, done >> 20, total >> 20)


def run_rank(bootstrap: RankBootstrap) -> None:
    """Be a rank until the first one says ``Shutdown``; takes the calling process for itself.

    When the first rank disappears the process exits at once with status 1, even from the middle of a step.

    Raises:
        UnavailableError: the first rank cannot be reached.
        FuselineError: the rank failed; the first one has been told.
    """
    channel = StepChannel.connect(bootstrap.address, bootstrap.token, bootstrap.rank, CODEC)
    worker = RankWorker(
        bootstrap.rank,
        torch.device(bootstrap.device),
        channel.local_host,
        lambda done, total: channel.send(Loading(done, total)),
    )
    inbox: queue.Queue[Job | None] = queue.Queue(_MAX_QUEUED)
    threading.Thread(target=_read, args=(channel, worker, inbox), name="rank-reader", daemon=True).start()
    while (job := inbox.get()) is not None:
        try:
            reply = worker.compute(job)
        except FuselineError as error:
            channel.send(failure_of(error))
            raise
        if reply is not None:
            channel.send(reply)
    worker.close()


def _read(channel: StepChannel, worker: RankWorker, inbox: queue.Queue[Job | None]) -> None:
    """Take messages until the end. Without this thread nobody would notice a lost channel: what ends it otherwise,
    ends the process."""

    def answer(message: CallAnswer) -> None:
        try:
            channel.send(message)
        except UnavailableError as error:
            logger.warning("rank %d cannot answer: %s", worker.rank, error)

    try:
        while not isinstance(message := channel.receive(), Shutdown):
            if isinstance(message, LoadModel | AllocateCache | StepPlan):
                inbox.put(worker.accept(message))
            else:
                worker.call(message, answer)
        inbox.put(None)
    except FuselineError as error:
        logger.error("rank %d ends: %s", worker.rank, error)  # noqa: TRY400  # the trace says nothing more
        os._exit(1)
    except Exception:
        logger.exception("rank %d ends", worker.rank)
        os._exit(1)


def _finished(call_id: int, future: Future[TransferSummary]) -> CallAnswer:
    error = future.exception()
    return HandoffDone(call_id, future.result()) if error is None else _failed(call_id, error)


def _failed(call_id: int, error: BaseException) -> CallFailed:
    if not isinstance(error, FuselineError):
        error = InternalError(f"{type(error).__name__}: {error}")
    return CallFailed(call_id, failure_of(error))


def main() -> int:
    """Entry point of ``python -m fuseline.workers.rank``."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the first rank decides
    try:
        run_rank(BOOTSTRAP_CODEC.decode(sys.stdin.buffer.read()))
    except UnavailableError as error:
        logger.error("%s", error)  # noqa: TRY400  # a peer went first, which is not this rank's story to tell
        return 1
    except FuselineError:
        return 1
    return 0


if __name__ == "__main__":
    # Communicator and device threads may still wait for peers that are gone; nothing is left to be saved.
    status = main()
    sys.stderr.flush()
    os._exit(status)
