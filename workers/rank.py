"""One rank of a group: its device, communicators, weights, KV cache and model runner.

The group's first rank lives in the process that runs the engine. Every other one is a process of its own, started by
a ``RankLauncher`` as ``python -m fuseline.workers.rank`` with a ``RankBootstrap`` on standard input, or by calling
``run_rank`` in a process that is given over to it. Such a process ends when the first rank hangs up, for whatever
reason: no rank outlives its group.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import sys
import threading

import torch

from ..collectives.communicator import GroupCommunicators, make_communicators
from ..collectives.step_channel import StepChannel
from ..runtime.config import CacheConfig, EngineConfig
from ..runtime.errors import (
    FuselineError,
    InternalError,
    ModelFormatError,
    ResourceExhaustedError,
    UnavailableError,
)
from ..runtime.plan import StepPlan, StepResult
from .loader import load_model, model_info, resolve_model
from .memory import kv_budget_bytes, max_kv_blocks
from .model_runner import ModelRunner
from .models.decoder import DecoderModel
from .models.registry import load_model_config
from .rank_protocol import (
    BOOTSTRAP_CODEC,
    CODEC,
    COMPUTE_MESSAGES,
    AllocateCache,
    Loaded,
    LoadModel,
    RankBootstrap,
    Ready,
    Shutdown,
    failure_of,
)

logger = logging.getLogger(__name__)
_MAX_QUEUED = 256  # computing messages; the pipeline's depth bounds them far below


class RankWorker:
    """A rank's state, driven by messages; ``compute`` is called by one thread.

    Args:
        host: the address of this machine that peers reach.
    """

    def __init__(self, rank: int, device: torch.device, host: str) -> None:
        self.rank = rank
        self._device = device
        self._host = host
        self._config: LoadModel | None = None
        self._communicators: GroupCommunicators | None = None
        self._model: DecoderModel | None = None
        self._runner: ModelRunner | None = None

    def compute(self, message: object) -> Loaded | Ready | StepResult | None:
        """Work off one computing message.

        Raises:
            FuselineError: it failed, and the group with it.
        """
        try:
            if isinstance(message, StepPlan):
                if self._runner is None:
                    raise InternalError("a step came before the KV cache was made")
                return self._runner.execute(message)
            if isinstance(message, LoadModel):
                return self._load(message)
            if isinstance(message, AllocateCache):
                return self._allocate(message)
        except (torch.cuda.OutOfMemoryError, MemoryError) as error:
            raise ResourceExhaustedError(f"rank {self.rank} is out of memory: {error}", rank=self.rank) from error
        except FuselineError:
            raise
        except Exception as error:  # a bug or a broken device: the group must hear of it, typed
            logger.exception("rank %d failed", self.rank)
            raise InternalError(f"{type(error).__name__}: {error}", rank=self.rank) from error
        raise InternalError(f"{type(message).__name__} is not for computing")

    def _load(self, config: LoadModel) -> Loaded:
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        path = resolve_model(config.model)
        info, parallel = config.info, config.parallel
        if (
            self.rank > 0
            and (found := model_info(path, info.dtype, info.max_model_len).fingerprint) != info.fingerprint
        ):
            raise ModelFormatError(
                f"{path} is not the model that the first rank has: fingerprint {found}, not {info.fingerprint}",
                path=path,
            )
        self._communicators = make_communicators(
            config.store_address, parallel, self.rank, self._device, config.timeout_s, self._host
        )
        self._model = load_model(
            path, load_model_config(path), info.dtype, self._device, parallel, self.rank, self._communicators
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
        engine_config = EngineConfig(
            config.info, CacheConfig(message.num_blocks, config.block_size), config.scheduler, config.parallel
        )
        self._runner = ModelRunner(
            model,
            model.new_kv_cache(message.num_blocks, config.block_size),
            engine_config,
            communicators.pp,
            is_first_of_stage=communicators.tp.rank == 0,
        )
        return Ready()

    def close(self) -> None:
        """Hang up on the other ranks and let go of the memory; from any thread, idempotent.

        A step under way on another thread fails with UnavailableError as soon as it needs a peer.
        """
        if self._communicators is not None:
            self._communicators.close()
        self._model = self._runner = None


def run_rank(bootstrap: RankBootstrap) -> None:
    """Be a rank until the first one says ``Shutdown``; takes the calling process for itself.

    When the first rank disappears the process exits at once with status 1, even from the middle of a step.

    Raises:
        UnavailableError: the first rank cannot be reached.
        FuselineError: the rank failed; the first one has been told.
    """
    channel = StepChannel.connect(bootstrap.address, bootstrap.token, bootstrap.rank, CODEC)
    worker = RankWorker(bootstrap.rank, torch.device(bootstrap.device), channel.local_host)
    inbox: queue.Queue[object] = queue.Queue(_MAX_QUEUED)
    threading.Thread(target=_read, args=(channel, bootstrap.rank, inbox), name="rank-reader", daemon=True).start()
    while not isinstance(message := inbox.get(), Shutdown):
        try:
            reply = worker.compute(message)
        except FuselineError as error:
            channel.send(failure_of(error))
            raise
        if reply is not None:
            channel.send(reply)
    worker.close()


def _read(channel: StepChannel, rank: int, inbox: queue.Queue[object]) -> None:
    while True:
        try:
            message = channel.receive()
        except FuselineError as error:
            logger.error("rank %d ends: %s", rank, error)  # noqa: TRY400  # the trace says nothing more
            os._exit(1)
        if isinstance(message, (*COMPUTE_MESSAGES, Shutdown)):
            inbox.put(message)
            if isinstance(message, Shutdown):
                return


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
