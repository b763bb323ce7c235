"""Puts the commands together."""

from __future__ import annotations

import typer

from ... import __version__
from . import generate, operate, serve

app = typer.Typer(
    name="fuseline",
    help="A distributed inference runtime for large language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(serve.serve)
app.command()(generate.generate)
app.command()(operate.scale)
app.command()(operate.status)
app.command()(operate.stop)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fuseline {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Show the version."
    ),
) -> None:
    """A distributed inference runtime for large language models."""
