"""Which resources a replica asks for, and whether a cluster can hold what is wanted. Pure.

A *bundle* is what Ray places as a whole on one node. The ranks of a tensor-parallel group exchange partial results
in every layer, so they share one bundle; pipeline stages only pass activations on and have a bundle each, which Ray
packs on as few nodes as it can. With ``allow_cross_node_tp`` every rank has its own bundle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..runtime.errors import ResourceExhaustedError
from ..runtime.role import WorkerRole
from .cluster_config import ClusterConfig
from .reconcile import POOLS, Target
from .wording import counted

STRATEGY = "PACK"  # of the bundles among each other
CPU_UNITS = 10_000  # Ray accounts in ten-thousandths; whole numbers keep the arithmetic exact


@dataclass(frozen=True, slots=True)
class Resources:
    """CPUs (in ``CPU_UNITS``) and whole GPUs: of a bundle, or of a node."""

    cpu_units: int
    gpus: int

    @classmethod
    def of(cls, num_cpus: float, num_gpus: float) -> Resources:
        """From Ray's floats."""
        return cls(round(num_cpus * CPU_UNITS), int(num_gpus))

    @property
    def num_cpus(self) -> float:
        """CPUs as a float."""
        return self.cpu_units / CPU_UNITS

    def times(self, count: int) -> Resources:
        """``count`` of these."""
        return Resources(self.cpu_units * count, self.gpus * count)

    def __str__(self) -> str:
        cpus = counted(self.num_cpus, "CPU")
        return f"{cpus} and {counted(self.gpus, 'GPU')}" if self.gpus else cpus


@dataclass(frozen=True, slots=True)
class ReplicaPlacement:
    """What one replica asks for.

    Attributes:
        rank: what each rank's process takes.
        ranks_per_bundle: rank ``r`` lives in bundle ``r // ranks_per_bundle``.
    """

    rank: Resources
    ranks_per_bundle: int
    num_bundles: int

    @property
    def bundle(self) -> Resources:
        """Each of the bundles."""
        return self.rank.times(self.ranks_per_bundle)

    def bundle_index(self, rank: int) -> int:
        """The bundle that ``rank`` lives in."""
        return rank // self.ranks_per_bundle


def place(config: ClusterConfig, pool: WorkerRole) -> ReplicaPlacement:
    """What a replica of ``pool`` asks for; needs a resolved device."""
    parallel = config.pool(pool).parallel
    rank = Resources.of(config.num_cpus_per_rank(pool), 1 if config.device == "cuda" else 0)
    if config.allow_cross_node_tp:
        return ReplicaPlacement(rank, 1, parallel.world_size)
    return ReplicaPlacement(rank, parallel.tensor_parallel_size, parallel.pipeline_parallel_size)


def check_room(config: ClusterConfig, target: Target, nodes: Sequence[Resources]) -> None:
    """Refuse a target that the nodes, were they empty, could never hold.

    Raises:
        ResourceExhaustedError: with what is needed and what there is.
    """
    demands = [(place(config, pool), target.size(pool)) for pool in POOLS]
    wanted = [(placement.bundle, placement.num_bundles * size) for placement, size in demands if size]
    if fits(wanted, nodes):
        return
    need = _total([bundle.times(count) for bundle, count in wanted])
    have = _total(nodes)
    largest = max(nodes, key=lambda node: (node.gpus, node.cpu_units), default=Resources(0, 0))
    pools = ", ".join(
        _demand_of(str(pool), placement, size) for pool, (placement, size) in zip(POOLS, demands, strict=True) if size
    )
    most = f", at most {largest} on one" if len(nodes) > 1 else ""
    raise ResourceExhaustedError(
        f"the cluster is too small: wanted {need} ({pools}), found {have} on {counted(len(nodes), 'node')}{most}",
        needed_cpus=f"{need.num_cpus:g}",
        needed_gpus=need.gpus,
        total_cpus=f"{have.num_cpus:g}",
        total_gpus=have.gpus,
        num_nodes=len(nodes),
    )


def _demand_of(pool: str, placement: ReplicaPlacement, size: int) -> str:
    """Such as "0.5 CPUs for 1 prefill worker", "2 parts of 1 CPU, each on one node, for each of 3 …"."""
    bundle, num_bundles = str(placement.bundle), placement.num_bundles
    wanted = bundle if num_bundles == 1 else f"{num_bundles} parts of {bundle}, each on one node,"
    return f"{wanted} for {'' if size == 1 else 'each of '}{counted(size, f'{pool} worker')}"


def _total(parts: Sequence[Resources]) -> Resources:
    return Resources(sum(part.cpu_units for part in parts), sum(part.gpus for part in parts))


def fits(wanted: Sequence[tuple[Resources, int]], nodes: Sequence[Resources]) -> bool:
    """Whether the bundles, of at most two kinds, can be dealt out to the nodes; exact.

    ``most[a]`` is the greatest number of second bundles that the nodes so far hold beside ``a`` first ones.
    """
    first, num_first = wanted[0]
    second, num_second = wanted[1] if len(wanted) > 1 else (Resources(0, 0), 0)
    most = [0] + [-1] * num_first
    for node in nodes:
        here = [
            min(_count(second, _rest(node, first.times(taken))), num_second)
            for taken in range(min(_count(first, node), num_first) + 1)
        ]
        new = list(most)
        for total in range(num_first + 1):
            for taken, beside in enumerate(here[: total + 1]):
                if most[total - taken] >= 0:
                    new[total] = max(new[total], most[total - taken] + beside)
        most = new
        if most[num_first] >= num_second:
            return True
    return False


def _rest(node: Resources, used: Resources) -> Resources:
    return Resources(node.cpu_units - used.cpu_units, node.gpus - used.gpus)


def _count(bundle: Resources, node: Resources) -> int:
    """How many such bundles a node holds."""
    by_cpu = node.cpu_units // bundle.cpu_units if bundle.cpu_units else 0
    return min(by_cpu, node.gpus // bundle.gpus) if bundle.gpus else by_cpu
