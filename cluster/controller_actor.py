"""The controller as a Ray actor, and Ray as its backend.

The actor is named, so that workers find it, and restarted by Ray when it dies. Worker actors are named and detached:
they and their placement groups outlive a controller, whose successor finds them by name. Only the target is kept, in
the key-value store of Ray's control service (GCS).
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable
from typing import Any, TypeVar

import ray
from ray.exceptions import RayActorError, RayError
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put
from ray.util import list_named_actors, placement_group_table
from ray.util.placement_group import get_placement_group, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ..runtime.errors import UnavailableError
from ..runtime.role import WorkerRole
from .cluster_config import ClusterConfig
from .controller import Controller
from .messages import Count, Done, ReplicaReport, WorkerSpec, answer, pack, unpack
from .placement import STRATEGY, Resources, place
from .ray_errors import in_short
from .reconcile import Target
from .tasks import watched
from .worker_actor import CONTROLLER_NAME, WorkerActor, log_to_stderr

TARGET_KEY = b"target"
STOP_CALL_S = 10.0  # for a worker to end in order before it is killed
MAX_CONCURRENCY = 64  # calls that an actor holds at a time; long polls among them

logger = logging.getLogger(__name__)
T = TypeVar("T")


class ControllerActor:
    """A ``Controller`` in a process of its own. Every method answers with a packed message, errors included."""

    def __init__(self, config: bytes) -> None:
        log_to_stderr()
        namespace = ray.get_runtime_context().namespace
        self._store = GcsTargetStore(namespace)
        self._controller = Controller(unpack(config, ClusterConfig), RayReplicas(namespace), self._store)
        self._loop = watched(self._controller.run(), _end)

    async def status(self, version: int, timeout_s: float) -> bytes:
        """See ``Controller.status``."""
        return await answer(self._controller.status(version, timeout_s))

    async def watch(self, version: int, timeout_s: float) -> bytes:
        """See ``Controller.watch``."""
        return await answer(self._controller.watch(version, timeout_s))

    async def set_target(self, target: bytes) -> bytes:
        """See ``Controller.set_target``."""
        return await answer(self._controller.set_target(unpack(target, Target)))

    async def drain(self, worker_id: str, timeout_s: float) -> bytes:
        """See ``Controller.drain``."""
        return await answer(self._controller.drain(worker_id, timeout_s))

    async def close(self) -> bytes:
        """See ``Controller.close``; nothing of the cluster is left in Ray afterwards but this actor."""
        closed = await answer(self._controller.close())
        self._store.delete()
        return closed


def _end(error: BaseException) -> None:
    """A controller that has stopped reconciling by a bug is of no use: Ray starts another."""
    logger.critical("the controller failed", exc_info=error)
    os._exit(1)


class GcsTargetStore:
    """A ``TargetStore`` in Ray's control service."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace.encode()

    def load(self) -> Target | None:
        """See ``TargetStore``."""
        data = _internal_kv_get(TARGET_KEY, namespace=self._namespace)
        return None if data is None else unpack(data, Target)

    def save(self, target: Target) -> None:
        """See ``TargetStore``."""
        _internal_kv_put(TARGET_KEY, pack(target), overwrite=True, namespace=self._namespace)

    def delete(self) -> None:
        """Keep nothing."""
        _internal_kv_del(TARGET_KEY, namespace=self._namespace)


class RayReplicas:
    """A ``ReplicaBackend``: a replica is a placement group with a worker actor in it, both by the worker's name."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._actors: dict[str, Any] = {}
        self._alive: set[str] = set()  # those that have answered: they can be asked to stop

    async def nodes(self) -> list[Resources]:
        """See ``ReplicaBackend``."""
        return await asyncio.to_thread(cluster_nodes)

    async def find(self) -> list[str]:
        """See ``ReplicaBackend``. Gives back the room of replicas that died while there was no controller."""
        found = [name for name in list_named_actors() if name != CONTROLLER_NAME]
        self._actors = {name: ray.get_actor(name) for name in found}
        prefix = self._group_name("")
        for group in placement_group_table().values():
            name = str(group["name"])
            if name.startswith(prefix) and group["state"] != "REMOVED" and name[len(prefix) :] not in self._actors:
                remove_placement_group(get_placement_group(name))
        return found

    async def start(self, spec: WorkerSpec) -> None:
        """See ``ReplicaBackend``. Ray starts the actor once the group is placed."""
        placement = place(spec.config, spec.slot.pool)
        bundle = _demand(placement.bundle)
        group = placement_group(
            [bundle] * placement.num_bundles,
            strategy=STRATEGY,
            name=self._group_name(spec.worker_id),
            lifetime="detached",
        )
        self._actors[spec.worker_id] = (
            ray.remote(WorkerActor)
            .options(
                name=spec.worker_id,
                lifetime="detached",
                num_cpus=placement.rank.num_cpus,
                num_gpus=placement.rank.gpus,
                max_restarts=0,
                max_concurrency=MAX_CONCURRENCY,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0),
            )
            .remote(pack(spec))
        )

    async def report(self, worker_id: str, version: int) -> ReplicaReport:
        """See ``ReplicaBackend``."""
        report = unpack(await _ask(self._actor(worker_id).report.remote(version)), ReplicaReport)
        if worker_id in self._actors:
            self._alive.add(worker_id)
        return report

    async def set_role(self, worker_id: str, role: WorkerRole) -> None:
        """See ``ReplicaBackend``."""
        unpack(await _ask(self._actor(worker_id).set_role.remote(str(role))), Done)

    async def drain(self, worker_id: str) -> None:
        """See ``ReplicaBackend``."""
        unpack(await _ask(self._actor(worker_id).drain.remote()), Done)

    async def load(self, worker_id: str) -> int:
        """See ``ReplicaBackend``."""
        return unpack(await _ask(self._actor(worker_id).load.remote()), Count).value

    async def stop(self, worker_id: str) -> None:
        """See ``ReplicaBackend``."""
        actor = self._actors.pop(worker_id, None)
        if worker_id in self._alive:
            self._alive.remove(worker_id)
            try:
                async with asyncio.timeout(STOP_CALL_S):
                    await _ask(actor.stop.remote())
            except (UnavailableError, TimeoutError) as error:
                logger.info("%s is killed without having ended in order: %s", worker_id, error)
        if actor is not None:
            ray.kill(actor)
        try:
            group = get_placement_group(self._group_name(worker_id))
        except ValueError:
            return
        remove_placement_group(group)

    def _actor(self, worker_id: str) -> Any:
        actor = self._actors.get(worker_id)
        if actor is None:
            raise UnavailableError(f"there is no process of {worker_id}")
        return actor

    def _group_name(self, worker_id: str) -> str:
        """Names of placement groups are one space for all who use the Ray cluster."""
        return f"{self._namespace}/{worker_id}"


def cluster_nodes() -> list[Resources]:
    """What each living node has."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    found = [node["Resources"] for node in nodes if node["Alive"]]
    return [Resources.of(resources.get("CPU", 0), resources.get("GPU", 0)) for resources in found]


def _demand(resources: Resources) -> dict[str, float]:
    demand = {"CPU": resources.num_cpus}
    return {**demand, "GPU": float(resources.gpus)} if resources.gpus else demand


async def _ask(call: Awaitable[bytes]) -> bytes:
    """The answer of an actor.

    Raises:
        UnavailableError: it died, or never came to life, and why as far as Ray knows.
    """
    try:
        return await call
    except RayActorError as error:
        raise UnavailableError(in_short(error)) from error
    except RayError as error:
        raise UnavailableError(f"{type(error).__name__}: {in_short(error)}") from error
