"""Folders of private Rays: locked while their owner lives, cleared away by the next start when it was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fuseline.cluster import ray_folder
from fuseline.cluster.ray_folder import LOCK, PREFIX, RayFolder

OWNER = """
import signal
from fuseline.cluster.ray_folder import RayFolder
folder = RayFolder()
(folder.path / "session").mkdir()
(folder.path / "session" / "log").write_text("said")
print(folder.path, flush=True)
signal.pause()
"""


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path


@contextmanager
def owner() -> Iterator[tuple[subprocess.Popen[str], Path]]:
    with subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, Path(process.stdout.readline().strip())
        finally:
            process.kill()


def test_a_folder_is_its_owners_alone_and_goes_with_it(root: Path) -> None:
    folder = RayFolder()
    assert folder.path.parent == root
    assert folder.path.stat().st_mode & 0o077 == 0
    (folder.path / "session").mkdir()
    (folder.path / "session_latest").symlink_to(folder.path / "session")
    folder.remove()
    folder.remove()
    assert list(root.iterdir()) == []


def test_what_a_killed_owner_left_goes_with_the_next_start(root: Path) -> None:
    with owner() as (process, path):
        living = RayFolder()
        assert (path / "session" / "log").exists()
        process.send_signal(signal.SIGKILL)
        process.wait()
        following = RayFolder()
    assert not path.exists()
    assert {entry.name for entry in root.iterdir()} == {living.path.name, following.path.name}
    living.remove()
    following.remove()


def test_what_is_not_known_to_be_left_behind_stays(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = root / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / LOCK).touch()
    (root / f"{PREFIX}link").symlink_to(elsewhere)
    without_lock = root / f"{PREFIX}without-lock"
    without_lock.mkdir()
    linked_lock = root / f"{PREFIX}linked-lock"
    linked_lock.mkdir()
    (linked_lock / LOCK).symlink_to(elsewhere / LOCK)
    of_another = root / f"{PREFIX}of-another"
    of_another.mkdir()
    (of_another / LOCK).touch()
    before = {entry.name for entry in root.iterdir()}
    uid = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    folder = RayFolder()
    assert {entry.name for entry in root.iterdir()} == before | {folder.path.name}
    folder.remove()
    monkeypatch.setattr(os, "getuid", lambda: uid)
    folder = RayFolder()
    assert {entry.name for entry in root.iterdir()} == before - {of_another.name} | {folder.path.name}
    folder.remove()


def test_a_start_clears_a_bounded_number(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_folder, "MAX_CLEARED", 2)
    for index in range(3):
        path = root / f"{PREFIX}{index}"
        path.mkdir()
        (path / LOCK).touch()
    RayFolder().remove()
    assert len(list(root.iterdir())) == 1
