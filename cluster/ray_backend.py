"""The driver's side of Ray: starts or joins it, starts the controller there, talks to it, and clears everything away.

Ray itself is imported when a backend starts and not before: what a private Ray goes by it reads from the environment
at import.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from ..runtime.errors import (
    DeadlineExceededError,
    FuselineError,
    InvalidArgumentError,
    ResourceExhaustedError,
    UnavailableError,
)
from .cluster_config import ClusterConfig
from .membership import MembershipView
from .messages import ControllerStatus, Count, Done, pack, unpack
from .placement import Resources, check_room
from .processes import Process, children, end_all, family, has_word, is_alive, program
from .ray_errors import in_short
from .ray_folder import RayFolder
from .reconcile import Target

if TYPE_CHECKING:
    from collections.abc import Callable

# A private Ray, one that lives and dies with this process. None of these is set when an existing cluster is joined.
PRIVATE_RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Despite its name this decides, on Linux too, whether Ray's servers listen on more than loopback.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Ray would start as many idle Python processes as there are cores, none of which our runtime_env could use.
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_AUTH_MODE": "token",
    # What each call of an actor did, for a dashboard that there is not; ending would wait 5 s to hand the rest in.
    "RAY_task_events_report_interval_ms": "0",
}
AUTH_TOKEN = "RAY_AUTH_TOKEN"  # noqa: S105  drawn once per process, since Ray reads it once
OBJECT_STORE_BYTES = 80 * 2**20  # Ray's minimum is 75 MiB; nothing but small messages goes through Ray
CONTROLLER_RESTARTS = 100
CALL_TIMEOUT_S = 30.0  # for the controller to answer, a restart of it included
RETRY_S = 0.2
LONG_POLL_S = 30.0
CLOSE_TIMEOUT_S = 30.0
# What is left then is killed with its Ray. It has nothing to lose: no request is under way any more.
PRIVATE_CLOSE_TIMEOUT_S = 4.0
PROCESSES_END_S = 5.0
ALIVE_CHECK_S = 0.5
# Without either of them Ray is of no use; only its own processes would wait for them, for a minute.
SERVERS = ("gcs_server", "raylet")

logger = logging.getLogger(__name__)
T = TypeVar("T")


class RayBackend:
    """A Ray cluster, private or joined, with a controller on it.

    Start and close it in the main thread: a private Ray's processes end with the thread that started them, and signal
    handlers are set. Until someone else handles SIGTERM it raises SystemExit. When this process is killed without
    closing, a private Ray and its workers die with it (two of Ray's own helpers notice after a minute); in a joined
    Ray the workers end within ORPHAN_CHECKS * ORPHAN_CHECK_S.

    Attributes:
        config: with the device resolved.
        log_dir: where a private Ray keeps the logs of its processes until it is closed; None in a joined cluster.
    """

    def __init__(self, config: ClusterConfig, controller: RayController, private: _PrivateRay | None) -> None:
        self.config = config
        self.controller = controller
        self.membership = RayMembership(controller)
        self.log_dir = private.folder.path if private else None
        self._private = private

    @classmethod
    def start(cls, config: ClusterConfig) -> RayBackend:
        """Start or join Ray and start the controller, which starts the replicas. Blocks for some seconds.

        Raises:
            ResourceExhaustedError: the cluster is too small for the configuration; nothing is left behind.
            UnavailableError: Ray cannot be started or reached.
            InvalidArgumentError: the cluster has several nodes, and the configuration keeps workers on loopback.
        """
        if "ray" in sys.modules and sys.modules["ray"].is_initialized():
            raise UnavailableError("this process is already connected to a Ray cluster")
        namespace = f"fuseline-{secrets.token_hex(4)}"
        private = None if config.ray_address else _PrivateRay()
        try:
            ray = private.start(namespace) if private else _joined_ray(config.ray_address, namespace)
            from .controller_actor import MAX_CONCURRENCY, ControllerActor, cluster_nodes
            from .worker_actor import CONTROLLER_NAME

            config = resolve(config, cluster_nodes())
            options: dict[str, Any] = {
                "name": CONTROLLER_NAME,
                "num_cpus": 0,
                "max_restarts": CONTROLLER_RESTARTS,
                "max_concurrency": MAX_CONCURRENCY,
            }
            actor = ray.remote(ControllerActor).options(**options).remote(pack(config))
        except BaseException:
            _shut_down(private, 0.0)  # it may not know yet what it has started, and then ends nothing
            raise
        return cls(config, RayController(actor, private), private)

    def close(self) -> None:
        """Stop all replicas and the controller, leave Ray, and end a private Ray; bounded, idempotent."""
        self.membership.close()
        in_order = self.controller.close(CLOSE_TIMEOUT_S if self._private is None else PRIVATE_CLOSE_TIMEOUT_S)
        _shut_down(self._private, PROCESSES_END_S if in_order else 0.0)

    async def lost(self) -> None:
        """Return when a private Ray's servers have ended without having been told to; of a joined one never."""
        while self._private is None or self._private.is_alive():  # noqa: ASYNC110  # no event tells
            await asyncio.sleep(ALIVE_CHECK_S)

    def __enter__(self) -> RayBackend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class RayController:
    """A ``Controller`` in another process. Calls wait while Ray restarts it, within their own bounds.

    Raises, beside what the controller itself raises:
        UnavailableError: it cannot be reached.
    """

    def __init__(self, actor: Any, private: _PrivateRay | None) -> None:
        self._actor = actor
        self._private = private
        self._closed = False

    async def status(self, version: int = -1, timeout_s: float = 0.0) -> ControllerStatus:
        """See ``Controller.status``."""
        return await self._call(ControllerStatus, lambda: self._actor.status.remote(version, timeout_s), timeout_s)

    async def watch(self, version: int, timeout_s: float) -> MembershipView:
        """See ``Controller.watch``."""
        return await self._call(MembershipView, lambda: self._actor.watch.remote(version, timeout_s), timeout_s)

    async def set_target(self, target: Target) -> None:
        """See ``Controller.set_target``."""
        await self._call(Done, lambda: self._actor.set_target.remote(pack(target)))

    async def drain(self, worker_id: str, timeout_s: float) -> int:
        """See ``Controller.drain``."""
        answer = await self._call(Count, lambda: self._actor.drain.remote(worker_id, timeout_s), timeout_s)
        return answer.value

    def close(self, timeout_s: float) -> bool:
        """Let it stop all replicas, then end it. Blocks at most so long; returns whether it has stopped them."""
        import ray
        from ray.exceptions import GetTimeoutError, RayError

        if self._closed:
            return True
        self._closed = True
        in_order = False
        try:
            answer = self._actor.close.remote()
            deadline = time.monotonic() + timeout_s
            while not ray.wait([answer], timeout=ALIVE_CHECK_S)[0] and time.monotonic() < deadline:
                if self._private is not None and not self._private.is_alive():
                    return False  # as when a signal was meant for all of us; the replicas end with Ray
            unpack(ray.get(answer, timeout=0), Done)
            in_order = True
        except (RayError, GetTimeoutError, FuselineError) as error:
            logger.info("the replicas were not stopped in order: %s", in_short(error))
        ray.kill(self._actor)
        return in_order

    async def _call(self, kind: type[T], call: Callable[[], Awaitable[bytes]], extra_s: float = 0.0) -> T:
        """Call until it answers; a call that died with the controller is made again, which all of them bear."""
        from ray.exceptions import RayActorError, RayError

        reason: RayError | None = None
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S + extra_s):
                while not self._closed:
                    try:
                        return unpack(await call(), kind)
                    except RayActorError as error:
                        reason = error
                        await asyncio.sleep(RETRY_S)
        except TimeoutError as error:
            why = "too slow" if reason is None else in_short(reason)
            raise UnavailableError(f"the controller does not answer: {why}") from error
        except RayError as error:
            raise UnavailableError(f"the controller cannot be reached: {in_short(error)}") from error
        raise UnavailableError("the cluster is closed")


class RayMembership:
    """A ``Membership`` told by the controller."""

    def __init__(self, controller: RayController) -> None:
        self._controller = controller
        self._closed = False

    def close(self) -> None:
        """End every watch, within LONG_POLL_S or when its task is cancelled."""
        self._closed = True

    async def watch(self) -> AsyncIterator[MembershipView]:
        """See ``Membership.watch``."""
        version = -1
        while not self._closed:
            try:
                view = await self._controller.watch(version, LONG_POLL_S)
            except (UnavailableError, DeadlineExceededError) as error:
                logger.warning("the last known replicas stand: %s", error.message)
                await asyncio.sleep(RETRY_S)
                continue
            if view.version != version:
                version = view.version
                yield view


class _PrivateRay:
    """A Ray of our own on this machine.

    Attributes:
        folder: that its processes log to, and are known by.
    """

    def __init__(self) -> None:
        try:
            self.folder = RayFolder()
        except OSError as error:
            raise UnavailableError(f"there is no room for Ray's folder: {error}") from error
        self._servers: set[Process] = set()

    def start(self, namespace: str) -> Any:
        """Start it; returns the module."""
        os.environ.update(PRIVATE_RAY_ENVIRONMENT)
        os.environ.setdefault(AUTH_TOKEN, secrets.token_hex(32))
        ray = _init(
            address="local",
            namespace=namespace,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            _temp_dir=str(self.folder.path),
        )
        started = self._started()
        self._servers = {process for process in started if program(process) in SERVERS}
        # Autoscaler, dashboard and log monitor: nobody looks at what they tell, and each is a Python process that
        # would now compete with the workers that start. In the end Ray would wait for one after the other.
        for helper in started - self._servers:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(helper.pid, signal.SIGKILL)
                os.waitpid(helper.pid, 0)
        return ray

    def is_alive(self) -> bool:
        """Whether all of its servers are."""
        return all(is_alive(process) for process in self._servers)

    def _started(self) -> set[Process]:
        """What was started from this process."""
        return {process for process in children(os.getpid()) if has_word(process.pid, str(self.folder.path))}


def _joined_ray(address: str, namespace: str) -> Any:
    """Connect to a Ray cluster that others run; returns the module."""
    return _init(address=address, namespace=namespace)


def _init(**options: Any) -> Any:
    import ray

    handler = signal.getsignal(signal.SIGTERM)
    try:
        # Ray would put this process's folder on the path of its workers, where a bare ``runtime`` or ``proto`` might
        # lie beside fuseline's. An empty folder, copied to the workers now, keeps it off.
        with tempfile.TemporaryDirectory(dir=options.get("_temp_dir")) as empty:
            environment = {"working_dir": empty}
            ray.init(log_to_driver=False, logging_level=logging.ERROR, runtime_env=environment, **options)
        # Ray would print a coloured paragraph to standard output for a worker that is killed, log_to_driver or not.
        ray._private.worker._worker_logs_enabled = False
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        why, _, _ = str(error).strip().partition("\n")
        raise UnavailableError(f"Ray cannot be started or reached: {why}") from error
    finally:
        # Ray has put a handler of its own there that aborts the process after 3 s, whatever it is doing by then.
        signal.signal(signal.SIGTERM, _exit if handler in (signal.SIG_DFL, None) else handler)
    return ray


def _exit(signum: int, frame: FrameType | None) -> None:
    """End as if the signal had done it, but in order."""
    sys.exit(128 + signum)


def _shut_down(private: _PrivateRay | None, patience_s: float) -> None:
    """Leave Ray; kill what has not ended of a private one within so many seconds, then remove its files."""
    processes = family(str(private.folder.path)) if private else set()
    if "ray" in sys.modules:  # its import may have been interrupted
        sys.modules["ray"].shutdown()
    if private:
        end_all(processes, patience_s)
        private.folder.remove()


def resolve(config: ClusterConfig, nodes: list[Resources]) -> ClusterConfig:
    """Decide on the device, and refuse what a cluster of these nodes cannot do.

    Raises:
        InvalidArgumentError: it has several, and workers would listen on loopback.
        ResourceExhaustedError: they are too small.
    """
    if len(nodes) > 1 and not config.bind_node_address:
        raise InvalidArgumentError(
            f"the Ray cluster has {len(nodes)} nodes, but workers listen on loopback only;"
            " bind_node_address lets them listen on their nodes' addresses",
            field="bind_node_address",
            value=config.bind_node_address,
        )
    target = Target(config.prefill.num_replicas, config.decode.num_replicas)
    if config.device == "auto":
        try:
            check_room(config.on("cuda"), target, nodes)
        except ResourceExhaustedError:
            config = config.on("cpu")
        else:
            return config.on("cuda")
    check_room(config, target, nodes)
    return config
