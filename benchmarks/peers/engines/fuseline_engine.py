"""This runtime, through its Python interface."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fuseline
from fuseline.runtime.request import SequenceOutput
from fuseline.workers.llm import LLM

from .base import Generation

MODES: dict[str, dict[str, Any]] = {
    "bf16": {"dtype": "bfloat16"},
    "fp32": {"dtype": "float32"},
    "int8": {"dtype": "bfloat16", "quantization": "int8"},
    "int4": {"dtype": "bfloat16", "quantization": "int4"},
}


class _TimedLLM(LLM):
    """Notes when each token came out of the engine, on the way that ``generate`` goes anyway."""

    def __init__(self, model: str, **options: Any) -> None:
        super().__init__(model, **options)
        self.times: dict[str, list[float]] = {}

    def _take_up(self, outputs: list[SequenceOutput], live: dict[str, Any]) -> tuple[int, list[Any]]:
        now = time.monotonic()
        for output in outputs:
            self.times.setdefault(output.request_id, []).extend([now] * len(output.token_ids))
        return super()._take_up(outputs, live)


class FuselineEngine:
    version = getattr(fuseline, "__version__", "")

    def __init__(self, llm: _TimedLLM) -> None:
        self._llm = llm

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Generation:
        params = fuseline.SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        self._llm.times.clear()
        outputs = self._llm.generate(prompts, params, progress=False)
        return Generation([list(output.outputs[0].token_ids) for output in outputs], list(self._llm.times.values()))


def prepare(checkpoint: Path, converted: Path, mode: str) -> None:
    """Nothing: it reads the checkpoint."""


def load(checkpoint: Path, converted: Path, mode: str, num_threads: int) -> FuselineEngine:
    llm = _TimedLLM(
        str(checkpoint),
        device="cpu",
        max_model_len=1024,
        max_num_seqs=16,
        enable_prefix_caching=False,
        num_threads=num_threads,
        **MODES[mode],
    )
    return FuselineEngine(llm)
