"""What `make` says of the torch that pip would take, and what it asks pip for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import fuseline

ROOT = Path(fuseline.__file__).parent


def told(*required: str) -> str:
    report = {"install": [{"metadata": {"name": "torch", "version": "2.13.0", "requires_dist": list(required)}}]}
    script = [sys.executable, str(ROOT / ".ci" / "torch_wheel.py")]
    return subprocess.run(script, input=json.dumps(report), capture_output=True, text=True, check=True).stdout


def test_cuda_is_told_of_and_nothing_else() -> None:
    assert told("filelock", "numpy; extra == 'x'") == ""
    for name in (
        "nvidia-nccl-cu13==2.28; platform_system == 'Linux'",
        "cuda-bindings>=13; platform_system == 'Linux'",
    ):
        assert told("filelock", name).startswith(
            "note: there is no NVIDIA driver here, but pip would install torch 2.13.0"
        )


@pytest.mark.parametrize("index", ["", "https://example.org/cpu"])
def test_the_index_is_for_torch_alone(index: str) -> None:
    made = [f"TORCH_INDEX={index}", "HAS_DRIVER="]
    lines = subprocess.run(
        ["make", "--dry-run", "--always-make", ".venv/bin/.installed", *made],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert lines.count(f'--index-url {index} "torch==2.13.0"') == (2 if index else 0)
    assert lines.count("--index-url") == (2 if index else 0)
    assert lines.count('"torch==2.13.0"') == 2
    assert '--editable ".[dev]"' in lines
