"""Prefill on one worker, decode on another, over real gRPC: the tokens are those of one engine alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from fuseline.runtime.request import FinishReason, Request
from fuseline.runtime.role import WorkerRole
from fuseline.runtime.sampling_params import SamplingParams
from fuseline.tests.workers.worker_cases import (
    Worker,
    disaggregate,
    make_request,
    prompt_of,
    worker,
)
from fuseline.workers.llm import LLM

pytestmark = pytest.mark.asyncio(loop_scope="module")

REQUESTS = [
    make_request([7]),
    make_request(prompt_of(16, 1)),
    make_request(prompt_of(33, 2), max_tokens=20),
    make_request(prompt_of(700, 3), max_tokens=6),  # several chunks
    make_request(prompt_of(40, 4), temperature=1.0, seed=11, logprobs=2),
    make_request(prompt_of(40, 5), temperature=1.3, top_p=0.8, top_k=50, seed=12, repetition_penalty=1.2),
    make_request(prompt_of(50, 6), presence_penalty=1.5, frequency_penalty=0.5, logit_bias={5: 3.0}),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def prefill() -> AsyncIterator[Worker]:
    async with worker(WorkerRole.PREFILL) as started:
        yield started


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def decode() -> AsyncIterator[Worker]:
    async with worker(WorkerRole.DECODE, block_size=8, num_kv_blocks=512) as started:
        yield started


@pytest.fixture(scope="module")
def expected() -> dict[str, tuple[int, ...]]:
    """What the embedded LLM generates."""
    with LLM("demo", device="cpu", dtype="float32", num_threads=1) as llm:
        outputs = llm.generate([list(r.prompt_token_ids) for r in REQUESTS], [params_of(r) for r in REQUESTS])
    return {
        request.request_id: output.outputs[0].token_ids for request, output in zip(REQUESTS, outputs, strict=True)
    }


def params_of(request: Request) -> SamplingParams:
    import dataclasses

    return dataclasses.replace(request.params, seed=request.seed)


async def test_two_workers_generate_what_one_engine_does(
    prefill: Worker, decode: Worker, expected: dict[str, tuple[int, ...]]
) -> None:
    results = await asyncio.gather(*[disaggregate(prefill, decode, request) for request in REQUESTS])
    for request, result in zip(REQUESTS, results, strict=True):
        assert result.token_ids == list(expected[request.request_id]), request
        assert result.finish_reason is FinishReason.LENGTH
        assert result.handed_off is not None
        assert result.handed_off.num_bytes > 0
        assert result.handed_off.transport == "shm"
        wanted = len(result.token_ids) if request.params.logprobs is not None else 0
        assert sum(len(output.logprobs) for output in result.outputs) == wanted
    await prefill.released()
    await decode.released()
