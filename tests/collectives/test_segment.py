from __future__ import annotations

import os
import tempfile

import numpy as np
import pytest

from fuseline.collectives.segment import OwnedSegment, attach_segment
from fuseline.runtime.errors import UnavailableError

SIZE = 1 << 16
NAME = "fuseline-kv-" + "0" * 32


def test_what_one_writes_the_other_reads() -> None:
    segment = OwnedSegment(SIZE)
    view = attach_segment(segment.pid, segment.fd, segment.name, SIZE)
    segment.data[:] = np.arange(SIZE) % 251
    assert np.array_equal(view, segment.data)
    assert not view.flags.writeable
    segment.close()
    segment.data[0] = 99
    assert view[0] == 99, "attached memory outlives the owner's descriptor"
    with pytest.raises(UnavailableError):
        attach_segment(segment.pid, segment.fd, segment.name, SIZE)


def test_has_no_name_in_any_file_system() -> None:
    segment = OwnedSegment(SIZE)
    assert os.fstat(segment.fd).st_nlink == 0, "nothing to unlink, so nothing to leave behind"
    segment.close()


def test_cannot_shrink_under_a_reader() -> None:
    segment = OwnedSegment(SIZE)
    with pytest.raises(PermissionError):
        os.ftruncate(segment.fd, 0)
    segment.close()


def test_only_segments_of_the_right_name_size_and_seals_are_attached() -> None:
    segment = OwnedSegment(SIZE)
    unsealed = os.memfd_create(NAME, os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, SIZE)
    with tempfile.TemporaryFile() as file:
        file.truncate(SIZE)
        for pid, fd, name, num_bytes in (
            (segment.pid, segment.fd, NAME, SIZE),
            (segment.pid, segment.fd, segment.name, SIZE // 2),
            (segment.pid, segment.fd, segment.name, 2 * SIZE),
            (segment.pid, segment.fd, segment.name, 0),
            (segment.pid, segment.fd, "../../etc/passwd", SIZE),
            (segment.pid, segment.fd + 1000, segment.name, SIZE),
            (2**31, segment.fd, segment.name, SIZE),
            (os.getpid(), file.fileno(), segment.name, SIZE),
            (os.getpid(), unsealed, NAME, SIZE),
        ):
            with pytest.raises(UnavailableError):
                attach_segment(pid, fd, name, num_bytes)
    os.close(unsealed)
    segment.close()
