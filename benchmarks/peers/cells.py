"""Cells: one peer in one mode on one model, each in a process of its own that is stopped when it takes too long."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .checkpoints import VOCAB_SIZE
from .engines.measure import MARK

# Finds the adapters without putting this repository's folders, whose names are common, before a peer's modules.
LAUNCH = (
    "import runpy, sys; sys.path.append(sys.argv.pop(1)); "
    "runpy.run_module('peers.engines.measure', run_name='__main__', alter_sys=True)"
)
BENCHMARKS = Path(__file__).parent.parent
PREPARE_TIMEOUT_S = 1800.0
MAX_ERROR = 300

FLOAT, INT8, INT4 = "float", "8 bit", "4 bit"
BYTES_PER_WEIGHT = {FLOAT: 2.0, INT8: 1.0, INT4: 0.5}
OURS = "fuseline"


@dataclass(frozen=True, slots=True)
class Peer:
    """A runtime that can be measured.

    Attributes:
        adapter: its module in ``engines``.
        module: what must be importable.
        modes: what each of its modes is compared with.
    """

    adapter: str
    module: str
    modes: dict[str, str]


PEERS = {
    OURS: Peer("fuseline_engine", "fuseline", {"bf16": FLOAT, "fp32": FLOAT, "int8": INT8, "int4": INT4}),
    "transformers": Peer("transformers_engine", "transformers", {"bf16": FLOAT, "fp32": FLOAT}),
    "llama.cpp": Peer(
        "llama_cpp_engine", "llama_cpp", {"bf16": FLOAT, "f16": FLOAT, "q8_0": INT8, "q4_0": INT4, "q4_k_m": INT4}
    ),
    "ctranslate2": Peer("ctranslate2_engine", "ctranslate2", {"fp32": FLOAT, "int8": INT8}),
    "openvino": Peer("openvino_engine", "openvino_genai", {"fp16": FLOAT, "int8": INT8, "int4": INT4}),
    "onnxruntime": Peer("onnxruntime_engine", "onnxruntime_genai", {"fp32": FLOAT, "int4": INT4}),
    "vllm": Peer("vllm_engine", "vllm", {"bf16": FLOAT, "fp32": FLOAT}),
}


@dataclass
class Cell:
    """One measurement of one peer's mode, and what came of it; rates are in tokens per second."""

    model: str
    peer: str
    mode: str
    round: int
    version: str = ""
    start_s: float | None = None
    prefill: list[float] = field(default_factory=list)
    decode: dict[str, list[float]] = field(default_factory=dict)
    peak_rss_mib: float | None = None
    check_prompts: list[list[int]] = field(default_factory=list)
    check_token_ids: list[list[int]] = field(default_factory=list)
    error: str = ""

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What it is a measurement of."""
        return self.model, self.peer, self.mode, self.round

    def take(self, figures: dict[str, Any]) -> None:
        """Take up one line of what the process told."""
        if "decode" in figures:
            self.decode.setdefault(str(figures["batch"]), []).append(figures["decode"])
        elif "prefill" in figures:
            self.prefill.append(figures["prefill"])
        else:
            for name, value in figures.items():
                setattr(self, name, value)


class Laboratory:
    """Runs cells and remembers them, so that a run that was interrupted can go on.

    Args:
        work: for checkpoints, converted models, logs and the cells so far.
        pythons: the interpreter of each peer.
    """

    def __init__(self, work: Path, pythons: dict[str, str], timeout_s: float, *, resume: bool) -> None:
        self._work = work
        self._pythons = pythons
        self._timeout_s = timeout_s
        self._file = work / "cells.jsonl"
        self.cells: list[Cell] = []
        work.mkdir(parents=True, exist_ok=True)
        if resume and self._file.exists():
            self.cells = [Cell(**json.loads(line)) for line in self._file.read_text().splitlines()]
        else:
            self._file.write_text("")

    def installed(self, peer: str) -> bool:
        """Whether the peer can be imported where it should."""
        code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({PEERS[peer].module!r}) is None)"
        try:
            return subprocess.run([self._pythons[peer], "-c", code], cwd=self._work, check=False).returncode == 0
        except OSError:
            return False

    def run(self, cell: Cell, checkpoint: Path) -> Cell:
        """Measure a cell, unless it has been; failures are noted in it."""
        for known in self.cells:
            if known.key == cell.key:
                return known
        converted = self._converted(cell.model, cell.peer, cell.mode)
        if converted.exists():
            try:
                self._measure(cell, checkpoint, converted)
            except (subprocess.TimeoutExpired, ChildProcessError) as error:
                cell.error = _told(error)
        else:
            cell.error = "there is no converted model"
        self.cells.append(cell)
        with self._file.open("a") as file:
            file.write(json.dumps(asdict(cell)) + "\n")
        return cell

    def prepare(self, model: str, peer: str, mode: str, checkpoint: Path) -> str:
        """Convert a model, unless it has been; returns why it could not be done, if so."""
        converted = self._converted(model, peer, mode)
        if converted.exists():
            return ""
        partial = converted.with_name(f"{converted.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            self._call(Cell(model, peer, mode, 0), checkpoint, partial, "prepare", PREPARE_TIMEOUT_S)
        except (subprocess.TimeoutExpired, ChildProcessError) as error:
            return _told(error)
        partial.rename(converted)
        return ""

    def _converted(self, model: str, peer: str, mode: str) -> Path:
        return self._work / "converted" / f"{model}-{peer}-{mode}"

    def _measure(self, cell: Cell, checkpoint: Path, converted: Path) -> None:
        log = self._log(cell, "measure")
        try:
            self._call(cell, checkpoint, converted, "measure", self._timeout_s)
        finally:
            for line in log.read_text(errors="replace").splitlines():
                if line.startswith(MARK):
                    cell.take(json.loads(line.removeprefix(MARK)))

    def _log(self, cell: Cell, action: str) -> Path:
        return self._work / "logs" / f"{cell.model}-{cell.peer}-{cell.mode}-{cell.round}-{action}.log"

    def _call(self, cell: Cell, checkpoint: Path, converted: Path, action: str, timeout_s: float) -> None:
        log = self._log(cell, action)
        log.parent.mkdir(exist_ok=True)
        job = {
            "action": action,
            "engine": PEERS[cell.peer].adapter,
            "checkpoint": str(checkpoint),
            "converted": str(converted),
            "mode": cell.mode,
            "num_threads": len(os.sched_getaffinity(0)),
            "vocab_size": VOCAB_SIZE,
            "seed": cell.round,
            "launched_at": time.monotonic(),
        }
        with log.open("w") as output:
            process = subprocess.Popen(
                [self._pythons[cell.peer], "-c", LAUNCH, str(BENCHMARKS), json.dumps(job)],
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self._work,
                start_new_session=True,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )
            try:
                status = process.wait(timeout_s)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if status:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            reasons = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]
            raise ChildProcessError(f"exit status {status}: {' '.join((reasons or lines)[:1])} (see {log})")


def _told(error: Exception) -> str:
    if isinstance(error, subprocess.TimeoutExpired):
        return f"took more than {error.timeout:.0f} s"
    return str(error)[:MAX_ERROR]


def check_agreement(cells: list[Cell], checkpoint: Path) -> dict[tuple[str, str], list[int]]:
    """For each peer's mode, how many tokens the float32 reference prefers to each token that it chose.

    Raises:
        ImportError: there are no transformers, which are the reference.
    """
    from .engines.transformers_engine import ranks

    checked = {(cell.peer, cell.mode): cell for cell in reversed(cells) if cell.check_token_ids}
    if not checked:
        return {}
    prompts = next(iter(checked.values())).check_prompts
    return dict(
        zip(checked, ranks(checkpoint, prompts, [cell.check_token_ids for cell in checked.values()]), strict=True)
    )
