"""ONNX Runtime GenAI."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai

from .base import Generation


class OnnxRuntimeEngine:
    version = onnxruntime_genai.__version__

    def __init__(self, model: Any) -> None:
        self._model = model

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Generation:
        length = len(prompts[0]) + num_tokens
        params = onnxruntime_genai.GeneratorParams(self._model)
        params.set_search_options(
            batch_size=len(prompts), do_sample=False, max_length=length, min_length=length, num_beams=1
        )
        generator = onnxruntime_genai.Generator(self._model, params)
        generator.append_tokens(np.array(prompts, np.int32))
        steps, times = [], []
        for _ in range(num_tokens):
            generator.generate_next_token()
            steps.append([int(token) for token in generator.get_next_tokens()])
            times.append(time.monotonic())
        return Generation([list(column) for column in zip(*steps, strict=True)], [times] * len(prompts))


def prepare(checkpoint: Path, converted: Path, mode: str) -> None:
    """Build it with the project's model builder."""
    subprocess.run(
        [
            *(sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", checkpoint, "-o", converted),
            *("-p", mode, "-e", "cpu", "-c", converted / "cache"),
        ],
        check=True,
    )


def load(checkpoint: Path, converted: Path, mode: str, num_threads: int) -> OnnxRuntimeEngine:
    path = converted / "genai_config.json"
    config = json.loads(path.read_text())
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = num_threads
    path.write_text(json.dumps(config))
    return OnnxRuntimeEngine(onnxruntime_genai.Model(str(converted)))
