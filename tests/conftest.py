"""Fixtures that tests of several folders share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# Read when gRPC is imported. Ray forks to start its processes; where gRPC has run, as in tests before, its handlers
# may end the child before it is Ray's.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def demo_path() -> Path:
    """The bundled model."""
    return Path(__file__).parent.parent / "workers" / "models" / "demo"
