"""``fuseline serve`` from start to end: Ray, replicas, gateway, and the way out again.

The main thread starts and closes Ray, whose processes end with the thread that started them, and runs the gateway's
event loop in between. The first SIGINT or SIGTERM, or the ``Stop`` of the Cluster service, ends serving in order: no
new requests, those under way finish within a bound, then everything is cleared away. The second signal ends at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType

from .. import __version__
from ..runtime.config import ModelInfo
from ..runtime.errors import InternalError, UnavailableError
from ..workers.loader import check_cut, model_info, resolve_model, runnable_dtype
from ..workers.tokenizer import Tokenizer
from .cli import INTERRUPTED
from .cluster_config import ClusterConfig, PoolConfig, is_loopback
from .cluster_service import ClusterControl, ClusterService
from .gateway import Gateway, GatewayConfig, join_address
from .processes import descendants, end_all
from .ray_backend import RayBackend
from .replica_news import LossNews, StartNews
from .tasks import watched
from .wording import counted

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)
LONG_POLL_S = 10.0
RAY_CONNECT_TIMEOUT_S = 5.0
MAX_GRACE_S = 30.0  # for streams to end when the cluster does; a longer drain_timeout is for replicas that leave it
PREFILL_QUEUE_STEPS = 4  # a worker's queue of others' prompts is kept below so many full steps

STDOUT = 1

Say = Callable[[str], None]


def run_cluster(config: ClusterConfig, say: Say) -> None:
    """Serve until told to stop; returns when nothing is left. Must run in the main thread.

    Raises:
        FuselineError: it cannot be served; nothing is left behind.
        KeyboardInterrupt: told to stop while Ray was starting.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    started_at = time.monotonic()
    with _signals() as stopping:
        path = resolve_model(config.model)
        model = model_info(
            path,
            dtype=config.dtype,
            max_model_len=config.limits.max_model_len,
            name=config.name,
            device=config.device,
            quantization=config.quantization,
            kv_cache_dtype=config.kv_cache_dtype,
        )
        for pool in (config.prefill, config.decode):
            check_cut(path, pool.parallel, config.quantization)
        tokenizer = Tokenizer.load(path)
        _check_port(config)
        _check_ray(config.ray_address)
        say(f"fuseline {__version__} serves {config.name}")
        say(f"{_pool('prefill', config.prefill)}, {_pool('decode', config.decode)}")
        if not is_loopback(config.host):
            say(f"listening on {config.host}: whoever can reach this address can use, scale and stop the cluster")
        say(f"joining Ray at {config.ray_address}" if config.ray_address else "starting Ray")
        with RayBackend.start(config) as backend:
            stopping.listen()  # Ray has taken SIGTERM
            stopping.directory = backend.log_dir
            if config.dtype == "auto":
                model = replace(model, dtype=runnable_dtype(model.dtype, backend.config.device))
            say(_numbers(model))
            asyncio.run(_serve(backend, model, tokenizer, stopping, started_at, say))
            say("stopping workers")
    say("stopped")


class _Stopping:
    """Being told to stop, by a signal or by a caller, before and while an event loop runs.

    Attributes:
        directory: to remove when this process has to end at once.
    """

    def __init__(self) -> None:
        self.directory: Path | None = None
        self._asked = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._event = asyncio.Event()

    @property
    def is_asked(self) -> bool:
        """Whether someone has told to stop."""
        return self._asked

    def listen(self) -> None:
        """Take the signals."""
        for number in SIGNALS:
            signal.signal(number, self.on_signal)

    def attach(self) -> None:
        """From now on ``wait`` in the running loop is told."""
        self._loop = asyncio.get_running_loop()
        if self._asked:
            self._event.set()

    async def wait(self) -> None:
        """Return when told to stop."""
        await self._event.wait()

    def ask(self) -> None:
        """Stop in order."""
        self._asked = True
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._event.set)

    def on_signal(self, _number: int, _frame: FrameType | None) -> None:
        """The first signal asks, or interrupts what runs without a loop; the second ends this process at once."""
        if self._asked:
            end_all(descendants(os.getpid()), 0)
            if self.directory is not None:
                shutil.rmtree(self.directory, ignore_errors=True)
            os._exit(INTERRUPTED)
        self.ask()
        if self._loop is None:
            # Ray takes a while to end. Not ``say``, which may be what is interrupted.
            with suppress(OSError):
                os.write(STDOUT, b"interrupted: clearing away\n")
            raise KeyboardInterrupt


@contextmanager
def _signals() -> Iterator[_Stopping]:
    stopping = _Stopping()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    stopping.listen()
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


async def _serve(
    backend: RayBackend, model: ModelInfo, tokenizer: Tokenizer, stopping: _Stopping, started_at: float, say: Say
) -> None:
    """The gateway's life, on a cluster whose replicas are being started."""
    config = backend.config
    limits = config.limits
    gateway_config = GatewayConfig(
        host=config.host,
        port=config.port,
        block_size=limits.block_size,
        enable_prefix_caching=limits.enable_prefix_caching,
        max_queued_tokens=PREFILL_QUEUE_STEPS * limits.max_num_batched_tokens,
    )
    service = ClusterService(backend.controller, stop=stopping.ask)
    gateway = Gateway(gateway_config, model, tokenizer, backend.membership, service)
    service.snapshots = gateway.pool.snapshots
    stopping.attach()
    port = await gateway.start()
    try:
        telling = asyncio.create_task(_wait_ready(backend, gateway, say))
        ended = asyncio.create_task(_ended(backend, gateway, stopping))
        await asyncio.wait({telling, ended}, return_when=asyncio.FIRST_COMPLETED)
        if telling.done() and not ended.done():
            telling.result()
            say(f"ready in {time.monotonic() - started_at:.1f} s: {join_address(config.host, port)} (Ctrl-C stops)")
            telling = watched(_tell_losses(backend.controller, say), _note_silence)
        await asyncio.wait({ended})
        telling.cancel()
        await asyncio.gather(telling, return_exceptions=True)
        ended.result()
        say(f"stopping, {counted(gateway.num_sequences, 'sequence')} under way")
    finally:
        await gateway.stop(min(config.drain_timeout_s, MAX_GRACE_S))


async def _ended(backend: RayBackend, gateway: Gateway, stopping: _Stopping) -> None:
    """Return when told to stop.

    Raises:
        UnavailableError: Ray has ended, and there is nothing left to serve with.
        InternalError: a bug ended what the gateway cannot do without.
    """
    asked = asyncio.create_task(stopping.wait())
    lost, failed = asyncio.create_task(backend.lost()), asyncio.create_task(gateway.failed())
    try:
        await asyncio.wait({asked, lost, failed}, return_when=asyncio.FIRST_COMPLETED)
        if stopping.is_asked:
            return
        if failed.done():
            raise InternalError(f"the gateway has failed: {failed.result()!r}")
        raise UnavailableError("Ray has ended: one of its servers is gone")
    finally:
        for task in (asked, lost, failed):
            task.cancel()


async def _wait_ready(backend: RayBackend, gateway: Gateway, say: Say) -> None:
    """Tell how the replicas come up; return when the first requests can be served and the target is reached.

    Raises:
        UnavailableError: a replica has failed too often in a row, and why.
    """
    told = StartNews()
    while True:
        status = await backend.controller.status()
        if status.failed:
            raise UnavailableError(f"a worker does not start: {status.failed}")
        if news := told.news(status, time.monotonic()):
            say(news)
        if status.reached:
            break
        status = await backend.controller.status(status.version, LONG_POLL_S)
    await gateway.wait_ready()


async def _tell_losses(control: ClusterControl, say: Say) -> None:
    """Tell of replicas that are lost; goes on until it is cancelled."""
    told, version = LossNews(), -1
    while True:
        try:
            status = await control.status(version, LONG_POLL_S)
        except UnavailableError:  # whether the controller comes back is for others to judge
            await asyncio.sleep(LONG_POLL_S)
            continue
        version = status.version
        for line in told.news(status):
            say(line)


def _note_silence(error: BaseException) -> None:
    logger.error("replicas that are lost are not told of any more", exc_info=error)


def _numbers(model: ModelInfo) -> str:
    """How the model is held, which ``auto`` leaves open, and how long a sequence may be."""
    weights = model.dtype if model.quantization == "none" else f"{model.dtype}, linear layers {model.quantization}"
    return f"weights {weights}; KV cache {model.kv_dtype}; at most {model.max_model_len} tokens a sequence"


def _pool(name: str, pool: PoolConfig) -> str:
    if not pool.num_replicas:
        return f"no {name} worker"
    parallel = pool.parallel
    workers = counted(pool.num_replicas, f"{name} worker")
    if parallel.world_size == 1:
        return workers
    return f"{workers} of TP {parallel.tensor_parallel_size}, PP {parallel.pipeline_parallel_size}"


def _check_port(config: ClusterConfig) -> None:
    """Refuse a port that is taken before Ray is started for nothing.

    Raises:
        UnavailableError: the gateway could not listen there.
    """
    with socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            raise UnavailableError(
                f"cannot listen on {join_address(config.host, config.port)}: {error.strerror or error}",
                field="grpc_port",
            ) from error


def _check_ray(address: str) -> None:
    """Refuse a Ray cluster that nobody answers for: Ray itself would go on trying for ever.

    Raises:
        UnavailableError: nothing listens there.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal():
        return  # "auto", or none
    try:
        socket.create_connection((host, int(port)), RAY_CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UnavailableError(f"no Ray cluster answers at {address}: {reason}", field="ray_address") from error
