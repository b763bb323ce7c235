"""Fuseline: a distributed inference runtime for large language models.

The public face; everything is imported on first use, so that ``import fuseline`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .cluster.client import AsyncClient, Client
    from .runtime.sampling_params import SamplingParams
    from .workers.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "AsyncClient", "Client", "SamplingParams", "__version__"]

_HOMES = {
    "LLM": ".workers.llm",
    "SamplingParams": ".runtime.sampling_params",
    "Client": ".cluster.client",
    "AsyncClient": ".cluster.client",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)
