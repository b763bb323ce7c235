"""The command ``fuseline``; see ``commands/``."""

from __future__ import annotations

import os
import sys

INTERRUPTED = 130  # what shells report for Ctrl-C


def main() -> None:
    """Entry point of the console script."""
    # Read when gRPC is imported. Without the first its core tells of every connection that a peer closes; with what
    # the second turns off, which nothing here needs, it may crash processes that are forked beside it.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    try:
        from .commands.app import run  # takes long enough for a Ctrl-C

        code = run(sys.argv[1:])
    except KeyboardInterrupt:
        code = INTERRUPTED
    sys.exit(code)
