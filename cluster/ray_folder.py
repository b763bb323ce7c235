"""The folder of a private Ray, where its processes log, and the clearing away of folders whose owner was killed.

The owner holds a lock in its folder for as long as it lives, however it ends. What can be locked is nobody's.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

PREFIX = "fuseline-ray-"
LOCK = "owner.lock"
MAX_CLEARED = 16  # per start: a bound on what a user waits for


class RayFolder:
    """A new folder, locked until ``remove`` or the end of this process.

    Attributes:
        path: in the system's temporary directory; for this user only.
    """

    def __init__(self) -> None:
        """Make it, and clear away some that earlier processes of this user have left behind."""
        root = Path(tempfile.gettempdir())
        for stale in _stale(root):
            _clear(stale)
        # Under its final name it has its lock from the first moment on.
        unlocked = Path(tempfile.mkdtemp(prefix=f"new-{PREFIX}"))
        self._lock = os.open(unlocked / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.path = unlocked.rename(root / unlocked.name.removeprefix("new-"))

    def remove(self) -> None:
        """Delete it and all in it; idempotent."""
        _clear(self.path)
        with contextlib.suppress(OSError):
            os.close(self._lock)


def _stale(root: Path) -> Iterator[Path]:
    """Folders of this user under ``root`` that nobody holds, a few of them."""
    num_found = 0
    for path in root.glob(f"{PREFIX}*"):
        if num_found == MAX_CLEARED:
            return
        if _is_own(path) and _is_free(path / LOCK):
            num_found += 1
            yield path


def _is_own(path: Path) -> bool:
    """Whether it is a real folder that belongs to this user: names in a shared directory can be anybody's."""
    try:
        return path.is_dir() and not path.is_symlink() and path.lstat().st_uid == os.getuid()
    except OSError:
        return False


def _is_free(lock: Path) -> bool:
    """Whether the lock is there and nobody holds it; a folder without one is not known to be a Ray's."""
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _clear(path: Path) -> None:
    """Delete a folder, its lock last: what cannot be deleted now can be found again."""
    for entry in path.glob("*"):
        if entry.name == LOCK:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                entry.unlink()
    with contextlib.suppress(OSError):
        if all(entry.name == LOCK for entry in path.iterdir()):
            (path / LOCK).unlink()
            path.rmdir()
