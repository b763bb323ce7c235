"""What a worker is for. A role is a policy, not a class: the same engine serves all three."""

from __future__ import annotations

from enum import StrEnum


class WorkerRole(StrEnum):
    """Which part of a request a worker takes; the names are those of the wire's ``WorkerRole``."""

    PREFILL = "prefill"  # prompts, whose KV goes to a decode worker
    DECODE = "decode"  # sequences whose KV comes from a prefill worker, while there is one
    MIXED = "mixed"  # whole requests, as when there is no prefill pool; takes handed-off sequences as well
