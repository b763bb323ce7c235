"""Quantised models behind workers: prefill and decode apart, ranks in processes of their own."""

from __future__ import annotations

import asyncio
import dataclasses
from contextlib import AsyncExitStack

from fuseline.runtime.errors import ProvenanceError
from fuseline.runtime.role import WorkerRole
from fuseline.tests.workers.worker_cases import (
    compute_locally,
    disaggregate,
    error_of,
    make_request,
    open_decode,
    open_prefill,
    prompt_of,
    worker,
)
from fuseline.workers.llm import LLM

REQUESTS = [make_request(prompt_of(length, seed), max_tokens=12) for seed, length in enumerate((5, 40, 600))]


async def test_prefill_and_decode_workers_generate_what_one_engine_does() -> None:
    with LLM("demo", device="cpu", dtype="float32", quantization="int8", num_threads=1) as llm:
        outputs = llm.generate([list(request.prompt_token_ids) for request in REQUESTS], REQUESTS[0].params)
    async with AsyncExitStack() as stack:
        prefill = await stack.enter_async_context(worker(WorkerRole.PREFILL, quantization="int8"))
        decode = await stack.enter_async_context(worker(WorkerRole.DECODE, block_size=8, quantization="int8"))
        results = await asyncio.gather(*[disaggregate(prefill, decode, request) for request in REQUESTS])
        for result, output in zip(results, outputs, strict=True):
            assert result.token_ids == list(output.outputs[0].token_ids)


async def test_kv_of_a_model_rounded_otherwise_is_refused() -> None:
    request = dataclasses.replace(REQUESTS[1], request_id="mismatch")
    async with AsyncExitStack() as stack:
        prefill = await stack.enter_async_context(worker(WorkerRole.PREFILL, quantization="int8"))
        decode = await stack.enter_async_context(worker(WorkerRole.DECODE))
        decoding = await open_decode(decode, request)
        error = await error_of(open_prefill(prefill, request, decoding.reservation))
        assert isinstance(error, ProvenanceError)
        decoding.call.cancel()


async def test_ranks_in_processes_of_their_own_share_a_quantised_model() -> None:
    async with worker(WorkerRole.MIXED, 2, quantization="int8") as sharded:
        results = await asyncio.gather(*[compute_locally(sharded, request) for request in REQUESTS])
        assert [len(result.token_ids) for result in results] == [12, 12, 12]
        # Each rank rounds its own slices, so not every token need be that of one rank; most are.
        with LLM("demo", device="cpu", dtype="float32", quantization="int8", num_threads=1) as llm:
            outputs = llm.generate([list(request.prompt_token_ids) for request in REQUESTS], REQUESTS[0].params)
        pairs = zip(results, outputs, strict=True)
        assert sum(result.token_ids[0] == output.outputs[0].token_ids[0] for result, output in pairs) >= 2
