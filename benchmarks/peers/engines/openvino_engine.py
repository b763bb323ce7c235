"""OpenVINO GenAI."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai

from .base import Generation

WEIGHT_FORMATS = {"fp16": "fp16", "int8": "int8", "int4": "int4"}


class OpenVinoEngine:
    version = openvino_genai.__version__

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Generation:
        ids = np.array(prompts, np.int64)
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        started = time.monotonic()
        result = self._pipeline.generate(
            inputs, max_new_tokens=num_tokens, min_new_tokens=num_tokens, ignore_eos=True, do_sample=False
        )
        ended = time.monotonic()
        # The pipeline notes when each token came, by a clock of its own: the last came when it returned.
        raw = result.perf_metrics.raw_metrics
        noted = [stamp / 1000 for stamp in raw.m_new_token_times]
        times = [ended - (noted[-1] - stamp) for stamp in noted]
        if times[0] < started:
            raise ValueError("the pipeline's times do not fit the call's")
        return Generation([list(tokens) for tokens in result.tokens], [times] * len(prompts))


def prepare(checkpoint: Path, converted: Path, mode: str) -> None:
    """Export it as Optimum does."""
    subprocess.run(
        [
            Path(sys.executable).with_name("optimum-cli"),
            *("export", "openvino", "--model", checkpoint, "--task", "text-generation-with-past"),
            *("--weight-format", WEIGHT_FORMATS[mode], converted),
        ],
        check=True,
    )


def load(checkpoint: Path, converted: Path, mode: str, num_threads: int) -> OpenVinoEngine:
    pipeline = openvino_genai.LLMPipeline(str(converted), "CPU", INFERENCE_NUM_THREADS=num_threads)
    return OpenVinoEngine(pipeline)
