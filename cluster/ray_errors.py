"""What Ray's errors say, in few words: they come with advice, traces, names and addresses, over many lines."""

from __future__ import annotations

ADVICE = " Some common causes"
EXIT_DETAIL = "Worker exit detail: "


def in_short(error: BaseException) -> str:
    """The cause: the last line of a trace that came from another process, how a process ended, or else what is said
    before any advice, without the fields that name an actor."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("\t")]
    if not lines:
        return type(error).__name__
    if any("ray::" in line or "Traceback" in line for line in lines):
        return lines[-1]
    what, _, _ = " ".join(lines).partition(ADVICE)
    _, _, detail = what.partition(EXIT_DETAIL)
    return f"the process has ended: {detail}" if detail else what
