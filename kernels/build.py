"""Compile-and-cache: C++ or CUDA sources to a shared library, once per machine and content.

A library's file name holds a hash over everything it depends on: sources, headers, flags, and the compiler's version.
Beside it lies a checksum of its content, so that a damaged file is noticed and built again. Processes that want the
same library at once wait for the one that builds it. Object files are cached alike, so that a change of one source
compiles one file.

The cache is ``$FUSELINE_CACHE``, or ``~/.cache/fuseline/kernels`` (see ``user_cache``); it holds the newest
``MAX_LIBRARIES`` libraries of each name and the newest ``MAX_OBJECTS`` object files.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

from .errors import BuildError, CompilerNotFoundError

MAX_LIBRARIES = 12
MAX_OBJECTS = 512
COMPILE_TIMEOUT_S = 600.0
# A compiler's complaint is quoted up to here.
MAX_OUTPUT = 8000


@dataclass(frozen=True, slots=True)
class LibrarySource:
    """What a shared library is made of.

    Attributes:
        name: of the library; part of the file's name.
        sources: one object file each.
        headers: whatever the sources include beside the system's own; only their content counts.
        flags: for compiling.
        link_flags: for linking, ``-shared`` or its like included.
    """

    name: str
    sources: tuple[Path, ...]
    headers: tuple[Path, ...]
    flags: tuple[str, ...]
    link_flags: tuple[str, ...] = ("-shared",)


def user_cache(name: str) -> Path:
    """Where this user's cache of that name belongs; whoever uses it makes it, and checks whose it is.

    In the home folder; where there is none that can be written, as for a user whom only a container's start knows, in
    the one for temporary files.
    """
    home = os.path.expanduser("~")  # noqa: PTH111  Path would raise for a user without a home
    folder = Path(home, ".cache", "fuseline", name)
    # False where one may not even look; Path.exists() would raise.
    exists = next(path for path in (folder, *folder.parents) if os.path.exists(path))  # noqa: PTH110
    if Path(home).is_absolute() and exists.is_dir() and os.access(exists, os.W_OK | os.X_OK):
        return folder
    return Path(gettempdir()) / f"fuseline-{os.getuid()}-{name}"


def cache_folder() -> Path:
    """Where libraries are kept."""
    given = os.environ.get("FUSELINE_CACHE")
    return Path(given) if given else user_cache("kernels")


def find_compiler(*candidates: str) -> str:
    """The first of these programs that there is.

    Raises:
        CompilerNotFoundError: none of them.
    """
    for candidate in candidates:
        if candidate and (path := shutil.which(candidate)):
            return path
    raise CompilerNotFoundError(f"no compiler: found none of {', '.join(filter(None, candidates))}")


def build_library(source: LibrarySource, compiler: str, jobs: int = 1) -> Path:
    """The compiled library, from the cache if it is there.

    Args:
        compiler: a program that understands ``-c`` and ``-o``; see ``find_compiler``.
        jobs: sources to compile at once.

    Raises:
        CompilerNotFoundError: the compiler cannot be run.
        BuildError: it refuses the sources, takes too long, or the cache cannot be written.
    """
    version = _run([compiler, "--version"], "")
    try:
        headers = _digest(*(part for path in source.headers for part in (path.name, path.read_bytes())))
        keys = {
            path: _digest("object", version, *source.flags, headers, path.name, path.read_bytes())
            for path in source.sources
        }
        key = _digest("library", version, *source.link_flags, *keys.values())
        folder = cache_folder()
        library = folder / f"{source.name}-{key[:32]}.so"
        _make_private(folder / "objects")
        if _intact(library):
            return library
        with _lock(folder / f"{source.name}.lock"):
            if not _intact(library):
                with ThreadPoolExecutor(jobs) as pool:
                    objects = list(pool.map(lambda path: _compile(source, compiler, path, keys[path]), keys))
                _publish([compiler, *map(str, objects), *source.link_flags], library)
                _prune(folder / "objects", "*.o", MAX_OBJECTS)
                _prune(folder, f"{source.name}-*.so", MAX_LIBRARIES)
    except OSError as error:
        raise BuildError(f"{source.name} cannot be built: {error}") from error
    return library


def _compile(source: LibrarySource, compiler: str, path: Path, key: str) -> Path:
    target = cache_folder() / "objects" / f"{path.stem}-{key[:32]}.o"
    if not _intact(target):
        _publish([compiler, *source.flags, "-c", str(path)], target)
    return target


def _publish(command: list[str], target: Path) -> None:
    """Run a compiler whose output appears under its name complete or not at all, its checksum first."""
    with TemporaryDirectory(dir=target.parent, prefix=".building-") as scratch:
        output = Path(scratch) / target.name
        _run([*command, "-o", str(output)], f" for {target.name}")
        checksum = output.with_suffix(".sha256")
        checksum.write_text(_digest(output.read_bytes()))
        checksum.replace(target.with_suffix(".sha256"))
        output.replace(target)


def _run(command: list[str], purpose: str) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=COMPILE_TIMEOUT_S, check=False
        )
    except OSError as error:
        raise CompilerNotFoundError(f"cannot run {command[0]}: {error}") from error
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command[0]} took more than {COMPILE_TIMEOUT_S:.0f} s{purpose}") from error
    if done.returncode:
        raise BuildError(f"{command[0]} failed{purpose}:\n{(done.stderr or done.stdout)[:MAX_OUTPUT]}")
    return done.stdout


def _intact(path: Path) -> bool:
    """Whether a file is there and is what was published; a hit counts as use."""
    try:
        if path.with_suffix(".sha256").read_text() != _digest(path.read_bytes()):
            return False
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _make_private(folder: Path) -> None:
    """What lies here is loaded and run, so nobody else may write here."""
    for path in (folder.parent, folder):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
        if status.st_uid != os.getuid() or status.st_mode & 0o022:
            raise BuildError(
                f"the kernel cache {path} can be written by others; set FUSELINE_CACHE to a folder of yours"
            )


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released with the file, also when the process dies
        yield


def _prune(folder: Path, pattern: str, keep: int) -> None:
    """Remove the files used longest ago. One that is in use stays mapped though its name is gone."""
    by_age = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in by_age[keep:]:
        path.unlink(missing_ok=True)
        path.with_suffix(".sha256").unlink(missing_ok=True)
