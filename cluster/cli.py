"""The command ``fuseline``; see ``commands/``."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Entry point of the console script."""
    # Read when gRPC is imported; without it gRPC's core tells of every connection that a peer closes.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    from .commands.app import run

    sys.exit(run(sys.argv[1:]))
