"""vLLM's CPU build, in this process."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import vllm

from .base import Generation

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


class VllmEngine:
    version = vllm.__version__

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Generation:
        params = vllm.SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
        requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = self._llm.generate(requests, params, use_tqdm=False)
        times = []
        for output in outputs:
            # Only the first and the last token's times are kept; between them the steps are alike.
            first, last = output.metrics.first_token_ts, output.metrics.last_token_ts
            steps = max(1, num_tokens - 1)
            times.append([first + (last - first) * step / steps for step in range(num_tokens)])
        return Generation([list(output.outputs[0].token_ids) for output in outputs], times)


def prepare(checkpoint: Path, converted: Path, mode: str) -> None:
    """Nothing: it reads the checkpoint."""


def load(checkpoint: Path, converted: Path, mode: str, num_threads: int) -> VllmEngine:
    llm = vllm.LLM(
        str(checkpoint),
        dtype=DTYPES[mode],
        max_model_len=1024,
        max_num_seqs=16,
        enable_prefix_caching=False,
        disable_log_stats=False,
    )
    return VllmEngine(llm)
