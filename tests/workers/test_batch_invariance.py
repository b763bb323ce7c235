"""Whole generations of native kernels give the same bits whatever runs beside them, whatever holds the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fuseline.kernels.cpu.library import native_library
from fuseline.tests.workers.llm_cases import SMALL_LLM, logprobs_of, mixed_requests, tokens_of, write_tiny
from fuseline.workers.llm import LLM, RequestOutput

# One at a time and whole; crowded, in small chunks, over shared prefixes; preempted again and again.
ALONE = {"max_num_seqs": 1, "enable_prefix_caching": False, "max_num_batched_tokens": 2048}
COMPANY: list[dict[str, Any]] = [
    {"max_num_seqs": 8, "max_num_batched_tokens": 11, "num_threads": 2},
    {"max_num_seqs": 5, "max_num_batched_tokens": 64, "num_kv_blocks": 37, "num_threads": 3},
]


@pytest.mark.parametrize(
    ("dtype", "quantization", "kv_cache_dtype"),
    [
        ("bfloat16", "none", "auto"),
        ("float16", "none", "auto"),
        ("float32", "none", "auto"),
        ("bfloat16", "int8", "auto"),
        ("bfloat16", "int4", "auto"),
        ("bfloat16", "none", "int8"),
    ],
)
def test_generations_do_not_depend_on_their_company(
    dtype: str, quantization: str, kv_cache_dtype: str, tmp_path: Path
) -> None:
    if native_library() is None:
        pytest.skip("no compiler")
    write_tiny(tmp_path, num_hidden_layers=2)

    def generate(**options: Any) -> tuple[list[RequestOutput], int]:
        formats = {"dtype": dtype, "quantization": quantization, "kv_cache_dtype": kv_cache_dtype}
        with LLM(str(tmp_path), **{**SMALL_LLM, **formats, **options}) as llm:
            outputs = llm.generate(*mixed_requests())
            return outputs, llm.group.engine.stats().num_preemptions

    alone, _ = generate(**ALONE)
    assert any(logprobs_of(alone))
    for options in COMPANY:
        together, num_preemptions = generate(**options)
        assert tokens_of(together) == tokens_of(alone)
        assert logprobs_of(together) == logprobs_of(alone)
        assert num_preemptions > 0 or "num_kv_blocks" not in options
