"""A small random model and a mix of requests that tests of the embedded LLM share."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from fuseline.runtime.sampling_params import SamplingParams
from fuseline.tests.checkpoints import build_model, write_checkpoint
from fuseline.workers.llm import LLM, RequestOutput

DEMO = Path(__file__).parents[2] / "workers" / "models" / "demo"
SMALL_LLM: dict[str, Any] = {"device": "cpu", "block_size": 4, "max_model_len": 128, "max_num_seqs": 8}


def write_tiny(path: Path, **overrides: object) -> PreTrainedModel:
    """A random llama that the demo's tokenizer fits loosely: it can decode the ids."""
    model: PreTrainedModel = build_model("llama", 3, **overrides)
    write_checkpoint(path, model)
    shutil.copy(DEMO / "tokenizer.json", path / "tokenizer.json")
    return model


def mixed_requests() -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts that share prefixes, under every kind of sampling."""
    rng = np.random.default_rng(0)
    shared = rng.integers(3, 101, 24).tolist()
    prompts = [shared[: 4 + 5 * i] + rng.integers(3, 101, 1 + 7 * (i % 3)).tolist() for i in range(4)]
    prompts += [shared + rng.integers(3, 101, 3).tolist() for _ in range(3)] + [shared]
    base: dict[str, Any] = {"max_tokens": 30, "ignore_eos": True}
    params = [
        SamplingParams(temperature=0.0, **base),
        SamplingParams(temperature=1.0, seed=5, **base),
        SamplingParams(temperature=1.3, top_p=0.8, top_k=40, seed=6, logprobs=2, **base),
        SamplingParams(temperature=0.0, repetition_penalty=1.3, frequency_penalty=0.5, **base),
        SamplingParams(temperature=0.8, min_p=0.1, presence_penalty=1.0, seed=7, **base),
        SamplingParams(temperature=1.0, seed=8, n=3, **base),
        SamplingParams(temperature=0.0, logprobs=1, prompt_logprobs=2, max_tokens=9),
        SamplingParams(temperature=1.0, seed=9, min_tokens=5, max_tokens=12, stop_token_ids=(7, 8, 9, 10, 11)),
    ]
    return prompts, params


def tokens_of(outputs: list[RequestOutput]) -> list[list[tuple[int, ...]]]:
    """Only what was chosen."""
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


def logprobs_of(outputs: list[RequestOutput]) -> list[list[float]]:
    """Of all tokens, prompts' included, that have some."""
    return [
        [entry.logprob for entry in (*(output.prompt_logprobs or ()), *(completion.logprobs or ()))]
        for output in outputs
        for completion in output.outputs
    ]


def run_mixed(path: Path, **options: Any) -> list[RequestOutput]:
    """The mixed requests on a fresh LLM in float32."""
    with LLM(str(path), **{**SMALL_LLM, **options}) as llm:
        outputs = llm.generate(*mixed_requests())
        llm.group.engine.check_integrity()
    return outputs
