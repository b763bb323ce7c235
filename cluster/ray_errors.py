"""What Ray's errors say, in few words: they come with advice, traces and addresses, over many lines."""

from __future__ import annotations

ADVICE = " Some common causes"


def in_short(error: BaseException) -> str:
    """The cause: the last line of a trace that came from another process, else what is said before any advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if any("ray::" in line or "Traceback" in line for line in lines):
        return lines[-1]
    what, _, _ = " ".join(lines).partition(ADVICE)
    return what
