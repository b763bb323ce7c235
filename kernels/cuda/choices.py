"""Launches that were measured to be best, by the shape of a block's weights: a file, which overrides the model.

``python -m benchmarks.gpu --parts tune`` writes one as ``launches.json``. ``FUSELINE_LAUNCHES`` names the one to use;
without it, and for shapes and batches that are not in it, ``launch.plan_launch`` chooses. A list of

    {"block": "mlp", "weights": [[28672, 4096], [4096, 14336]], "cluster": 4,
     "launches": [{"batch": 16, "num_clusters": 32, "stages": 5, "max_shared_bytes": 232448}]}

The cluster size stands once for all batches, since a row's bits depend on it; a launch is for batches up to its own,
down to the next smaller one's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass, field
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from ..errors import LaunchError

Weights = tuple[tuple[int, int], ...]
CLUSTER_SIZES = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True)
class Spread:
    """How batches of up to ``batch`` tokens are launched; the rest is as in ``fl_launch``."""

    batch: int
    num_clusters: int
    stages: int
    max_shared_bytes: int


@dataclass(frozen=True, slots=True)
class Choice:
    """For a block, by its name in the library, whose weights have these rows and columns."""

    block: str
    weights: Weights
    cluster: int
    launches: tuple[Spread, ...]

    def spread(self, batch: int) -> Spread | None:
        """For a batch; None if it is larger than any that was measured."""
        fitting = [spread for spread in self.launches if spread.batch >= batch]
        return min(fitting, key=lambda spread: spread.batch, default=None)


@dataclass(frozen=True, slots=True)
class LaunchTable:
    """All of them; an empty one leaves every choice to the model."""

    choices: dict[tuple[str, Weights], Choice] = field(default_factory=dict)

    @classmethod
    def of(cls, choices: Iterable[Choice]) -> LaunchTable:
        """Later ones replace earlier ones of the same block."""
        return cls({(choice.block, choice.weights): choice for choice in choices})

    def find(self, block: str, weights: Weights) -> Choice | None:
        """What was chosen for this block, if anything."""
        return self.choices.get((block, weights))

    def records(self) -> list[dict[str, Any]]:
        """For the file."""
        return [asdict(choice) for choice in self.choices.values()]


def read_table(path: Path) -> LaunchTable:
    """A file's table.

    Raises:
        LaunchError: it cannot be read or is none.
    """
    try:
        return LaunchTable.of(_choice(**record) for record in json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise LaunchError(f"{path} is no table of launches: {error}") from error


@cache
def default_table() -> LaunchTable:
    """Of this process.

    Raises:
        LaunchError: ``FUSELINE_LAUNCHES`` names a file that is none.
    """
    path = os.environ.get("FUSELINE_LAUNCHES")
    return read_table(Path(path)) if path else LaunchTable()


def _choice(block: str, weights: list[list[int]], cluster: int, launches: list[dict[str, int]]) -> Choice:
    """Of a record. Raises ValueError or TypeError where it is none."""
    shapes = tuple((rows, cols) for rows, cols in weights)
    spreads = tuple(Spread(**launch) for launch in launches)
    numbers = (*chain(*shapes), cluster, *chain.from_iterable(map(astuple, spreads)))
    if not isinstance(block, str) or any(type(number) is not int or number < 1 for number in numbers):
        raise ValueError(f"{block!r}: every number must be a positive integer")
    if cluster not in CLUSTER_SIZES:
        raise ValueError(f"{block!r}: a cluster has {CLUSTER_SIZES} CTAs, not {cluster}")
    return Choice(block, shapes, cluster, spreads)
