"""The blocks of a shape as the launcher plans them, and tables that take its place."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from fuseline.kernels.cuda.attention import attention_problem
from fuseline.kernels.cuda.choices import LaunchTable, default_table
from fuseline.kernels.cuda.head import head_problem
from fuseline.kernels.cuda.launch import Problem
from fuseline.kernels.cuda.launcher import default_launcher
from fuseline.kernels.cuda.library import CudaLibrary
from fuseline.kernels.cuda.mlp import mlp_problem

from .shapes import BLOCK_SIZE, CONTEXTS, EPS, Shape

TABLE = "FUSELINE_LAUNCHES"


def problems(library: CudaLibrary, shape: Shape) -> tuple[Problem, Problem, Problem]:
    """MLP block, attention block and head."""
    cache = (2, 65536, shape.kv_heads, BLOCK_SIZE, shape.head_dim)
    width = max(CONTEXTS) // BLOCK_SIZE
    return (
        mlp_problem(library, shape.hidden, shape.inner, EPS),
        attention_problem(library, shape.hidden, shape.heads, cache, width, scale=1.0, eps=EPS, window=0),
        head_problem(library, shape.hidden, shape.vocab, 0, EPS),
    )


@contextmanager
def launched_by(table: LaunchTable) -> Iterator[None]:
    """In here the ops are launched as a table says, and as always where it says nothing."""
    before = os.environ.get(TABLE)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "launches.json"
        path.write_text(json.dumps(table.records()))
        try:
            _use(str(path))
            yield
        finally:
            _use(before)


def _use(path: str | None) -> None:
    if path is None:
        os.environ.pop(TABLE, None)
    else:
        os.environ[TABLE] = path
    default_table.cache_clear()
    default_launcher.cache_clear()
