"""Words that go with numbers."""

from __future__ import annotations


def counted(count: float, noun: str) -> str:
    """Such as "1 node", "2 nodes", "0.5 CPUs"."""
    return f"{count:g} {noun}" if count == 1 else f"{count:g} {noun}s"
