"""Puts the commands together and runs them: whatever goes wrong ends as one line and an exit code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from ... import __version__
from . import generate, operate, serve

# What the parser raises. Its base class is in click or in a copy of it, depending on typer's version.
_UsageError: Any = typer.BadParameter.__bases__[0]

# Rich's help would cut the names of long options where a terminal is 80 columns wide.
app = typer.Typer(name="fuseline", add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.command()(serve.serve)
app.command()(generate.generate)
app.command()(operate.scale)
app.command()(operate.status)
app.command()(operate.stop)


@app.callback(invoke_without_command=True)
def _fuseline(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False
) -> None:
    """A distributed inference runtime for large language models."""
    if version:
        typer.echo(f"fuseline {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def run(arguments: Sequence[str]) -> int:
    """Run a command line; returns the exit code: 2 for what cannot be understood, 1 for what does not work."""
    try:
        code = app(list(arguments), standalone_mode=False)
    except _UsageError as error:
        typer.echo(f"fuseline: {' '.join(error.format_message().split())}", err=True)
        return int(error.exit_code)
    return code if isinstance(code, int) else 0
