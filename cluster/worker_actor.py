"""Worker processes as Ray actors: one for a replica's first rank, which serves, and one for each further rank."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util.placement_group import PlacementGroup, get_current_placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ..runtime.errors import InternalError
from ..runtime.role import WorkerRole
from .messages import WorkerSpec, answer, unpack
from .placement import place
from .worker_host import HostedWorker, WorkerHost

if TYPE_CHECKING:
    from ..workers.launcher import RankProcess

CONTROLLER_NAME = "controller"
ORPHAN_CHECK_S = 5.0
ORPHAN_CHECKS = 6  # in a row without a controller; it may take a while to restart
KILLED = -9

logger = logging.getLogger(__name__)


class RankActor:
    """A rank beyond the first: a process given over to ``run_rank``. Ray ends it with the first rank's."""

    def pid(self) -> int:
        """Its process id; asked before ``run``, which occupies the process."""
        return os.getpid()

    def run(self, bootstrap: bytes) -> None:
        """Be the rank, until the first rank hangs up."""
        from ..workers.rank import run_rank
        from ..workers.rank_protocol import BOOTSTRAP_CODEC

        log_to_stderr()
        run_rank(BOOTSTRAP_CODEC.decode(bootstrap))


class RayRank:
    """A ``RankProcess`` that is an actor."""

    def __init__(self, actor: Any, bootstrap: bytes) -> None:
        self._actor = actor
        self._pid = actor.pid.remote()
        self._end = actor.run.remote(bootstrap)

    @property
    def pid(self) -> int | None:
        """Its process id, once it runs."""
        try:
            pid: int = ray.get(self._pid, timeout=0)
        except (GetTimeoutError, RayError):
            return None
        return pid

    def exit_code(self) -> int | None:
        """See ``RankProcess``."""
        try:
            ray.get(self._end, timeout=0)
        except GetTimeoutError:
            return None
        except RayActorError:
            return KILLED
        except RayError:
            logger.exception("a rank failed")
            return 1
        return 0

    def stop(self, timeout_s: float) -> None:
        """See ``RankProcess``."""
        ray.wait([self._end], timeout=timeout_s)
        ray.kill(self._actor)


class RayLauncher:
    """A ``RankLauncher`` that places ranks in their replica's placement group."""

    def __init__(self, spec: WorkerSpec, group: PlacementGroup, host: str) -> None:
        self.host = host
        self._placement = place(spec.config, spec.slot.pool)
        self._group = group

    def launch(self, rank: int, address: str, token: bytes, device_type: str) -> RankProcess:
        """See ``RankLauncher``. Ray shows each rank its own GPU only."""
        from ..workers.rank_protocol import BOOTSTRAP_CODEC, RankBootstrap

        strategy = PlacementGroupSchedulingStrategy(
            self._group, placement_group_bundle_index=self._placement.bundle_index(rank)
        )
        resources = self._placement.rank
        actor = (
            ray.remote(RankActor)
            .options(
                num_cpus=resources.num_cpus, num_gpus=resources.gpus, max_restarts=0, scheduling_strategy=strategy
            )
            .remote()
        )
        device = "cuda:0" if device_type == "cuda" else "cpu"
        return RayRank(actor, BOOTSTRAP_CODEC.encode(RankBootstrap(rank, address, token, device)))


class WorkerActor:
    """A replica's first rank. Every method answers with a packed message, errors included; see messages.py."""

    def __init__(self, spec: bytes) -> None:
        log_to_stderr()
        self._spec = unpack(spec, WorkerSpec)
        group = get_current_placement_group()
        if group is None:
            raise InternalError("a worker actor belongs in a placement group")
        self._group = group
        node_address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        self._listen_host = node_address if self._spec.config.bind_node_address else "127.0.0.1"
        self._host = WorkerHost(self._spec, self._make, node_address)
        self._host.start()
        self._orphan_check = asyncio.get_running_loop().create_task(self._end_without_controller())

    def _make(self, spec: WorkerSpec) -> HostedWorker:
        from .model_worker import ModelWorker

        return ModelWorker(spec, RayLauncher(spec, self._group, self._listen_host))

    async def report(self, version: int) -> bytes:
        """See ``WorkerHost.report``."""
        return await answer(self._host.report(version))

    async def set_role(self, role: str) -> bytes:
        """See ``WorkerHost.set_role``."""
        return await answer(self._host.set_role(WorkerRole(role)))

    async def drain(self) -> bytes:
        """See ``WorkerHost.drain``."""
        return await answer(self._host.drain())

    async def load(self) -> bytes:
        """See ``WorkerHost.load``."""
        return await answer(self._host.load())

    async def stop(self) -> bytes:
        """See ``WorkerHost.stop``; the process is then the caller's to kill."""
        return await answer(self._host.stop())

    async def _end_without_controller(self) -> None:
        """A worker outlives its controller's crash, but not the cluster's end, however that came about."""
        missing = 0
        while missing < ORPHAN_CHECKS:
            await asyncio.sleep(ORPHAN_CHECK_S)
            missing = 0 if await asyncio.to_thread(_controller_exists) else missing + 1
        logger.error("the controller is gone for good: ending")
        await self._host.stop()
        await asyncio.to_thread(remove_placement_group, self._group)  # which ends this process, too
        os._exit(1)


def _controller_exists() -> bool:
    try:
        ray.get_actor(CONTROLLER_NAME)
    except (ValueError, RayError):  # there is none, or Ray does not answer
        return False
    return True


def log_to_stderr() -> None:
    """Ray keeps each process's standard error in a file of its session."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
