"""What a user installs is what git tracks: an editable install hides a forgotten subfolder, a wheel does not."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fuseline

ROOT = Path(fuseline.__file__).parent
PARTS = ("runtime", "kernels", "collectives", "workers", "cluster", "proto")


def test_the_wheel_holds_what_git_tracks(tmp_path: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "--quiet", ROOT, source], check=True)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*build, "-w", str(tmp_path), str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = {
        name.removeprefix("fuseline/") for name in zipfile.ZipFile(wheel).namelist() if name.startswith("fuseline/")
    }
    committed = subprocess.run(["git", "ls-files", *PARTS], cwd=source, check=True, capture_output=True, text=True)
    assert packed - {"__init__.py", "py.typed"} == set(committed.stdout.split())


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, fuseline; print([m for m in ('torch', 'ray', 'grpc', 'numpy') if m in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert answer.stdout.strip() == "[]"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="LLMM"):
        _ = fuseline.LLMM
