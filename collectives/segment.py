"""Memory that processes of one host share, for a transfer of KV or between the ranks of a group.

The segment is a memfd: it has no name in any file system, so that nothing can be left behind, whoever crashes and
however (no /dev/shm file, no resource tracker), and no mount's size limits it. The others open it through the
owner's /proc entry, which the kernel allows to processes of the same user. It is sealed against shrinking, so that
no owner can make another fault on a page that is gone, and its name, which the kernel shows to whoever opened it,
is unguessable, so that no stranger can make anyone open anything else.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import mmap
import os
import re
import secrets
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..runtime.errors import UnavailableError

Bytes = NDArray[np.uint8]
MAX_SEGMENT_BYTES = 1 << 30
_NAME = re.compile(r"fuseline-kv-[0-9a-f]{32}")
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


@functools.cache
def host_id() -> str:
    """Equal exactly for processes that can share segments: same boot, process namespace and user.

    Where there are no memfds or no /proc it is different for every process, so that nobody tries.
    """
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text()
        namespace = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return secrets.token_hex(16)
    if not hasattr(os, "memfd_create"):
        return secrets.token_hex(16)
    return hashlib.sha256(f"{boot_id} {namespace} {os.geteuid()}".encode()).hexdigest()[:32]


class OwnedSegment:
    """A segment that this process made and others may map. Its pages are taken at once, not at first touch.

    Raises:
        UnavailableError: there is no memory for it.
    """

    def __init__(self, num_bytes: int) -> None:
        self.name = f"fuseline-kv-{secrets.token_hex(16)}"
        self.pid = os.getpid()
        try:
            self.fd = os.memfd_create(self.name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise UnavailableError(f"cannot make shared memory: {error}") from error
        try:
            os.posix_fallocate(self.fd, 0, num_bytes)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
            self.data: Bytes = np.frombuffer(mmap.mmap(self.fd, num_bytes), np.uint8)
        except OSError as error:
            os.close(self.fd)
            raise UnavailableError(f"cannot make {num_bytes} bytes of shared memory: {error}") from error

    def close(self) -> None:
        """Let nobody attach any more. The memory goes when the last view into it does, in either process."""
        os.close(self.fd)


def attach_segment(pid: int, fd: int, name: str, num_bytes: int, *, writable: bool = False) -> Bytes:
    """Map the segment that process ``pid`` owns, for reading, or for both.

    Raises:
        UnavailableError: it cannot be opened, or is not what it should be. Nothing stays open.
    """
    if not _NAME.fullmatch(name) or not 0 < num_bytes <= MAX_SEGMENT_BYTES:
        raise UnavailableError("refused to attach: not a segment of Fuseline")
    link, target = Path(f"/proc/{pid}/fd/{fd}"), Path(f"/memfd:{name} (deleted)")
    try:
        if link.readlink() != target:  # looked at before it is opened: opening some files has effects
            raise UnavailableError("refused to attach: another file")
        opened = os.open(link, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise UnavailableError(f"cannot attach shared memory of process {pid}: {error}") from error
    try:
        if Path(f"/proc/self/fd/{opened}").readlink() != target:
            raise UnavailableError("refused to attach: another file")
        if os.fstat(opened).st_size != num_bytes or not fcntl.fcntl(opened, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            raise UnavailableError("refused to attach: another size, or not sealed")
        prot = mmap.PROT_READ | mmap.PROT_WRITE if writable else mmap.PROT_READ
        return np.frombuffer(mmap.mmap(opened, num_bytes, prot=prot), np.uint8)
    except OSError as error:
        raise UnavailableError(f"cannot attach shared memory of process {pid}: {error}") from error
    finally:
        os.close(opened)
