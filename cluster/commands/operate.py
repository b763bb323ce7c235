"""``fuseline scale``, ``status`` and ``stop``: what an operator does to a running cluster."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Annotated

import typer

from ...runtime.errors import InvalidArgumentError
from ..client import Client
from ..status import ClusterStatus, ReplicaStatus
from .common import DEFAULT, Address, reporting

PIPED_COLUMNS = 1000  # for a table in a pipe or file, where nothing is to be cut
_STYLES = {"ready": "green", "starting": "yellow", "draining": "yellow", "failed": "red"}


@reporting
def scale(
    sizes: Annotated[list[str], typer.Argument(metavar="POOL=N...", help="Such as: decode=3 prefill=1")],
    address: Address = DEFAULT,
    wait: Annotated[bool, typer.Option("--wait", help="Return when the pools are there.")] = False,
    timeout: Annotated[
        float | None, typer.Option(help="Wait no longer than so many seconds; the target stands.")
    ] = None,
) -> None:
    """Set how many replicas pools should have.

    Pools that are not named keep their size. Shrinking a pool lets its replicas finish what they have.
    """
    with Client(address) as client:
        status = client.scale(_parsed(sizes), wait=wait, timeout=timeout)
    typer.echo("target: " + ", ".join(f"{pool.role}={pool.num_replicas}" for pool in status.target))


@reporting
def status(
    address: Address = DEFAULT,
    as_json: Annotated[bool, typer.Option("--json", help="Everything there is, for programs.")] = False,
) -> None:
    """Show what should be and what is."""
    with Client(address) as client:
        seen = client.status()
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(seen), indent=2))
    else:
        _show(seen)


@reporting
def stop(address: Address = DEFAULT) -> None:
    """End a cluster, once requests under way have finished.

    They have the drain timeout for it, but 30 seconds at most.
    """
    with Client(address) as client:
        client.stop()
    typer.echo("stopping")


def _parsed(sizes: list[str]) -> dict[str, int]:
    parsed: dict[str, int] = {}
    for size in sizes:
        pool, equals, count = size.partition("=")
        if not equals or not count.isdecimal():
            raise InvalidArgumentError(
                f"a pool's size is written as decode=3, got {size!r}", field="size", value=size
            )
        if pool in parsed:
            raise InvalidArgumentError(f"{pool} is given twice", field="size", value=size)
        parsed[pool] = int(count)
    return parsed


def _show(seen: ClusterStatus) -> None:
    # Its import costs more than the rest of the command.
    from rich.console import Console
    from rich.table import Table

    target = ", ".join(
        f"{pool.role}={pool.num_replicas} (TP {pool.tensor_parallel_size}, PP {pool.pipeline_parallel_size})"
        for pool in seen.target
    )
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("worker", "role", "state", "run", "wait", "KV blocks", "restarts", "age"):
        table.add_column(column, justify="left" if column in ("worker", "role", "state") else "right", no_wrap=True)
    for replica in seen.replicas:
        table.add_row(*_row(replica))
    console = Console(width=None if sys.stdout.isatty() else PIPED_COLUMNS)
    head = f"{seen.model}: {target}; up {seen.uptime_s:.0f} s; Fuseline {seen.version}"
    console.print(head, highlight=False, soft_wrap=True)
    console.print(table)
    for replica in seen.replicas:
        if told := "; ".join(filter(None, (replica.progress, replica.message))):
            console.print(f"{replica.worker_id}: {told}", markup=False, soft_wrap=True)


def _row(replica: ReplicaStatus) -> tuple[str, ...]:
    style = _STYLES.get(replica.state, "dim")
    load = replica.load
    numbers = ("", "", "")
    if load is not None:
        used = load.num_total_blocks - load.num_free_blocks
        numbers = (str(load.num_running), str(load.num_waiting), f"{used}/{load.num_total_blocks}")
    return (
        replica.worker_id,
        replica.role.value,
        f"[{style}]{replica.state}[/{style}]",
        *numbers,
        str(replica.num_restarts),
        f"{replica.age_s:.0f} s",
    )
