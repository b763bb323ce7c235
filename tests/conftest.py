"""Fixtures that tests of several folders share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def demo_path() -> Path:
    """The bundled model."""
    return Path(__file__).parent.parent / "workers" / "models" / "demo"
