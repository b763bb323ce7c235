"""Prefill on one worker, decode on another, over real gRPC: the tokens are those of one engine alone."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
import pytest_asyncio

from fuseline.runtime.request import FinishReason
from fuseline.runtime.role import WorkerRole
from fuseline.tests.workers.worker_cases import (
    Worker,
    compute_locally,
    disaggregate,
    fresh_prompt,
    make_request,
    open_prefill,
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
HEAD_DIM, LAYERS_TIMES_KV_HEADS = 64, 6 * 2  # of the demo model
FEW = [REQUESTS[index] for index in (0, 2, 3, 5)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def prefill() -> AsyncIterator[Worker]:
    async with worker(WorkerRole.PREFILL) as started:
        yield started


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def decode() -> AsyncIterator[Worker]:
    async with worker(WorkerRole.DECODE, block_size=8, num_kv_blocks=512) as started:
        yield started


@pytest.fixture(scope="module")
def expected() -> dict[str, list[int]]:
    """What the embedded LLM generates."""
    prompts = [list(request.prompt_token_ids) for request in REQUESTS]
    params = [dataclasses.replace(request.params, seed=request.seed) for request in REQUESTS]
    with LLM("demo", device="cpu", dtype="float32", num_threads=1) as llm:
        outputs = llm.generate(prompts, params)
    return {
        request.request_id: list(output.outputs[0].token_ids)
        for request, output in zip(REQUESTS, outputs, strict=True)
    }


async def test_two_workers_generate_what_one_engine_does(
    prefill: Worker, decode: Worker, expected: dict[str, list[int]]
) -> None:
    results = await asyncio.gather(*[disaggregate(prefill, decode, request) for request in REQUESTS])
    for request, result in zip(REQUESTS, results, strict=True):
        assert result.token_ids == expected[request.request_id], request
        assert result.finish_reason is FinishReason.LENGTH
        assert result.handed_off is not None
        assert result.handed_off.num_bytes > 0
        assert result.handed_off.transport == "shm"
        wanted = len(result.token_ids) if request.params.logprobs is not None else 0
        assert sum(len(output.logprobs) for output in result.outputs) == wanted
    await prefill.released()
    await decode.released()


async def test_decode_wants_only_what_its_prefix_cache_lacks(prefill: Worker, decode: Worker) -> None:
    prompt = prompt_of(100, 20)
    first, second = make_request(prompt), make_request(prompt)
    once = await disaggregate(prefill, decode, first)
    again = await disaggregate(prefill, decode, second)
    assert once.token_ids == again.token_ids
    assert once.handed_off and again.handed_off and again.reservation
    assert again.reservation.num_cached_tokens == 96
    assert again.handed_off.num_bytes * 25 == once.handed_off.num_bytes  # 4 tokens instead of 100
    assert (await decode.snapshot()).num_prefix_cache_hit_tokens >= 96


async def test_one_worker_does_both_parts_when_asked(decode: Worker, expected: dict[str, list[int]]) -> None:
    results = await asyncio.gather(*[compute_locally(decode, request) for request in FEW])
    assert [result.token_ids for result in results] == [expected[request.request_id] for request in FEW]
    await decode.released()


async def test_a_sequence_that_ends_with_its_first_token_is_not_handed_off(prefill: Worker, decode: Worker) -> None:
    result = await disaggregate(prefill, decode, make_request(prompt_of(20), max_tokens=1))
    assert (len(result.token_ids), result.finish_reason) == (1, FinishReason.LENGTH)
    assert result.handed_off is None
    await prefill.released()
    await decode.released()


async def test_the_last_token_may_be_the_first_of_decode(
    prefill: Worker, decode: Worker, expected: dict[str, list[int]]
) -> None:
    tokens = expected[REQUESTS[5].request_id]
    stop = dataclasses.replace(REQUESTS[5].params, stop_token_ids=(tokens[1],))
    result = await disaggregate(prefill, decode, dataclasses.replace(REQUESTS[5], request_id="stops", params=stop))
    assert result.token_ids == tokens[:2] or tokens[0] == tokens[1]
    assert result.finish_reason is FinishReason.STOP


async def test_prefill_without_a_reservation_gives_one_token_and_keeps_nothing(prefill: Worker) -> None:
    request = make_request(prompt_of(20))
    events = [event async for event in open_prefill(prefill, request, None)]
    assert [event.WhichOneof("event") for event in events] == ["first_token"]
    assert len(events[0].first_token.token_ids) == 1
    await prefill.released()


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
async def test_layouts_may_differ(expected: dict[str, list[int]], kv_cache_dtype: str) -> None:
    async with AsyncExitStack() as stack:
        prefill, decode = await asyncio.gather(
            stack.enter_async_context(worker(WorkerRole.PREFILL, 2, 1, kv_cache_dtype=kv_cache_dtype)),
            stack.enter_async_context(worker(WorkerRole.DECODE, 1, 2, block_size=8, kv_cache_dtype=kv_cache_dtype)),
        )
        results = await asyncio.gather(*[disaggregate(prefill, decode, request) for request in FEW])
        if kv_cache_dtype == "int8":
            alone = [dataclasses.replace(request, request_id=f"{request.request_id} alone") for request in FEW]
            wanted = [(await compute_locally(decode, request)).token_ids for request in alone]
        else:
            wanted = [expected[request.request_id] for request in FEW]
        assert [result.token_ids for result in results] == wanted
        num_tokens, handed_off = len(FEW[2].prompt_token_ids), results[2].handed_off
        assert handed_off is not None
        row_bytes = HEAD_DIM + 4 if kv_cache_dtype == "int8" else HEAD_DIM * 4
        assert handed_off.num_bytes == num_tokens * LAYERS_TIMES_KV_HEADS * 2 * row_bytes
        await prefill.released()
        await decode.released()


async def test_one_rank_hands_off_to_two(prefill: Worker, expected: dict[str, list[int]]) -> None:
    async with worker(WorkerRole.DECODE, 2, 1) as decode:
        results = await asyncio.gather(*[disaggregate(prefill, decode, request) for request in FEW])
        assert [result.token_ids for result in results] == [expected[request.request_id] for request in FEW]
        await decode.released()
    await prefill.released()


async def test_preemption_during_a_handoff_changes_no_token(decode: Worker) -> None:
    """A prefill worker short of blocks gives those of sequences that it is handing off to more urgent ones."""
    patient = [make_request(fresh_prompt(400 + 10 * index), temperature=1.0, seed=index) for index in range(5)]
    urgent = [dataclasses.replace(make_request(fresh_prompt(400), max_tokens=2), priority=-1) for _ in range(5)]
    async with worker(WorkerRole.PREFILL, num_kv_blocks=48, max_num_batched_tokens=32) as cramped:

        async def in_the_way() -> None:
            for request in urgent:
                await compute_locally(cramped, request)

        handed_off, _ = await asyncio.gather(
            asyncio.gather(*[disaggregate(cramped, decode, request) for request in patient]), in_the_way()
        )
        assert (await cramped.engine.stats()).num_preemptions > 0
        await cramped.released()
    for request, result in zip(patient, handed_off, strict=True):
        alone = await compute_locally(decode, dataclasses.replace(request, request_id="alone"))
        assert result.token_ids == alone.token_ids
    await decode.released()
