"""Hugging Face transformers, eager: the loop of ``generate`` without its bookkeeping."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from .base import Generation

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class TransformersEngine:
    version = transformers.__version__

    def __init__(self, model: Any) -> None:
        self._model = model

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Generation:
        ids = torch.tensor(prompts)
        cache, tokens, times = transformers.DynamicCache(), [], []
        for _ in range(num_tokens):
            out = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids = out.logits[:, -1].argmax(-1, keepdim=True)
            tokens.append(ids[:, 0].tolist())
            times.append(time.monotonic())
        return Generation([list(column) for column in zip(*tokens, strict=True)], [times] * len(prompts))


def prepare(checkpoint: Path, converted: Path, mode: str) -> None:
    """Nothing: the checkpoint is in its own format."""


def load(checkpoint: Path, converted: Path, mode: str, num_threads: int) -> TransformersEngine:
    torch.set_num_threads(num_threads)
    return TransformersEngine(_load(checkpoint, DTYPES[mode]))


def _load(checkpoint: Path, dtype: torch.dtype) -> Any:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    return model.eval()


@torch.inference_mode()
def ranks(checkpoint: Path, prompts: list[list[int]], continuations: list[list[list[int]]]) -> list[list[int]]:
    """How many tokens the float32 model prefers to each token of each continuation of the prompts, given those
    before it: 0 where it is its own choice. One list for each of ``continuations``, which hold one per prompt."""
    model = _load(checkpoint, torch.float32)
    found = []
    for tokens in continuations:
        both = torch.tensor([prompt + more for prompt, more in zip(prompts, tokens, strict=True)])
        start = len(prompts[0]) - 1
        logits = model(input_ids=both, use_cache=False).logits[:, start:-1]
        chosen = logits.gather(-1, both[:, start + 1 :, None])
        found.append((logits > chosen).sum(-1).flatten().tolist())
    return found
