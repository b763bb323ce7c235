"""What the commands share: the address option, and errors as one line instead of a traceback."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, NoReturn, ParamSpec, TypeVar

import typer

from ...runtime.errors import FuselineError, InvalidArgumentError
from ..cli import INTERRUPTED
from ..client import DEFAULT_ADDRESS

P = ParamSpec("P")
R = TypeVar("R")

FAILED = 1
MISUSED = 2

Address = Annotated[
    str, typer.Option(metavar="HOST:PORT", envvar="FUSELINE_ADDRESS", help="Where the cluster's gateway listens.")
]
DEFAULT = DEFAULT_ADDRESS


def reporting(command: Callable[P, R]) -> Callable[P, R]:
    """Let a command end with one line and an exit code where it would raise: 2 for bad values, 1 for the rest."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except FuselineError as error:
            fail(error.message, MISUSED if isinstance(error, InvalidArgumentError) else FAILED)
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None

    return wrapped


def fail(message: str, code: int = FAILED) -> NoReturn:
    """Say why on standard error, in one line, and exit."""
    typer.echo(f"fuseline: {' '.join(message.split())}", err=True)
    raise typer.Exit(code)
