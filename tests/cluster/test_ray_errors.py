"""Ray's errors in few words."""

import pytest

from fuseline.cluster.ray_errors import in_short

OF_ANOTHER_PROCESS = """The actor died because of an error raised in its creation task, ray::controller:C.__init__()
^^^^^^^^^^
  File "messages.py", line 114, in decode
    raise TypeError
fuseline.runtime.errors.InvalidArgumentError: malformed message
"""

OF_A_KILLED_PROCESS = """The actor died unexpectedly before finishing this task.
\tclass_name: WorkerActor
\tpid: 29112
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker \
unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the OOM killer"""


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("The actor died.\n Some common causes include: (1) memory", "The actor died."),
        ("Get timed out:\n some object(s) not ready.", "Get timed out: some object(s) not ready."),
        (OF_ANOTHER_PROCESS, "fuseline.runtime.errors.InvalidArgumentError: malformed message"),
        (
            OF_A_KILLED_PROCESS,
            "the process has ended: Worker unexpectedly exits with a connection error code 2. End of file.",
        ),
        ("The actor died.\n\tpid: 7\nIt was killed.", "The actor died. It was killed."),
        ("", "RuntimeError"),
    ],
)
def test_the_cause_is_left(text: str, short: str) -> None:
    assert in_short(RuntimeError(text)) == short
