"""The gateway in front of real workers: what users get, what is refused, and that nothing stays behind."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from fuseline.cluster.generation import GenerateChunk
from fuseline.proto.fuseline.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from fuseline.runtime.errors import (
    AlreadyExistsError,
    DeadlineExceededError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
)
from fuseline.runtime.request import FinishReason
from fuseline.runtime.role import WorkerRole
from fuseline.runtime.sampling_params import SamplingParams, child_seed
from fuseline.tests.cluster.live_cluster import MODEL, TOKENIZER, LiveCluster, gateway_over, live_cluster
from fuseline.tests.cluster.scripted_worker import ScriptedWorker, output, until
from fuseline.tests.timing import PATIENTLY_S
from fuseline.workers.llm import LLM

PROMPT = "def fibonacci(n):\n    a, b = 0, 1\n"
LONG_PROMPT = PROMPT * 12  # several KV blocks
GREEDY = SamplingParams(temperature=0, max_tokens=24)
SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, seed=11, max_tokens=24)
FOREVER = SamplingParams(max_tokens=1900, ignore_eos=True)


@pytest.fixture
async def cluster() -> AsyncIterator[LiveCluster]:
    async with live_cluster() as live:
        yield live
        await live.empties()


async def test_the_text_is_that_of_one_process_and_goes_over_both_workers(cluster: LiveCluster) -> None:
    asked = (
        (PROMPT, GREEDY),
        (LONG_PROMPT, SAMPLED),
        (PROMPT, SamplingParams(n=3, temperature=1, seed=5, max_tokens=16)),
        (LONG_PROMPT, SamplingParams(stop=("\n",), temperature=1, seed=6, max_tokens=200)),
    )
    results = await asyncio.gather(*(cluster.client.complete(prompt, params) for prompt, params in asked))
    with LLM("demo", device="cpu", num_threads=1) as llm:
        for (prompt, params), result in zip(asked, results, strict=True):
            (expected,) = llm.generate([prompt], params)
            assert [c.text for c in result.completions] == [o.text for o in expected.outputs]
            assert [c.token_ids for c in result.completions] == [tuple(o.token_ids) for o in expected.outputs]
            assert [c.finish_reason for c in result.completions] == [o.finish_reason for o in expected.outputs]
            for completion in result.completions:
                assert (completion.summary.prefill_worker, completion.summary.decode_worker) == (
                    "prefill-0",
                    "decode-0",
                )


async def test_a_stream_comes_piece_by_piece_and_sums_up_at_the_end(cluster: LiveCluster) -> None:
    async with cluster.client.generate(PROMPT, GREEDY, request_id="mine") as stream:
        chunks = [chunk async for chunk in stream]
    assert len(chunks) > 2
    assert {chunk.request_id for chunk in chunks} == {"mine"}
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert all(chunk.summary is None for chunk in chunks[:-1])
    assert chunks[-1].finish_reason is FinishReason.LENGTH
    summary = chunks[-1].summary
    assert summary is not None
    token_ids = [token for chunk in chunks for token in chunk.token_ids]
    assert "".join(chunk.text for chunk in chunks) == TOKENIZER.decode(token_ids)
    assert (summary.num_prompt_tokens, summary.num_output_tokens) == (len(TOKENIZER.encode(PROMPT)), 24)
    assert 0 <= summary.queue_s <= summary.ttft_s <= summary.e2e_s
    assert summary.tpot_s == pytest.approx((summary.e2e_s - summary.ttft_s) / 23)


async def test_n_sequences_have_seeds_of_their_own_and_the_first_is_that_of_n_1(cluster: LiveCluster) -> None:
    several = await cluster.client.complete(LONG_PROMPT, SamplingParams(n=3, seed=9, max_tokens=12))
    assert [c.index for c in several.completions] == [0, 1, 2]
    for completion in several.completions:
        alone = SamplingParams(seed=child_seed(9, completion.index), max_tokens=12)
        assert (await cluster.client.complete(LONG_PROMPT, alone)).text == completion.text
    assert len({c.text for c in several.completions}) == 3
    assert several.completions[2].summary.num_cached_tokens > 0
    assert cluster.gateway.inference.finished == Counter({FinishReason.LENGTH: 6})


async def test_a_stop_string_cuts_the_text_and_ends_both_legs(cluster: LiveCluster) -> None:
    params = SamplingParams(temperature=0, max_tokens=1500, ignore_eos=True)
    async with cluster.client.generate(PROMPT, params) as stream:
        text = ""
        async for chunk in stream:
            text += chunk.text
            if len(text) > 40:
                break
    stop = text[30:34]
    result = await cluster.client.complete(PROMPT, SamplingParams(temperature=0, max_tokens=1500, stop=(stop,)))
    completion = result.completions[0]
    assert completion.finish_reason is FinishReason.STOP
    assert completion.summary.stop_reason == stop
    assert completion.text == text[: text.index(stop)]
    await cluster.empties()


async def test_a_sequence_of_one_token_is_over_with_prefill(cluster: LiveCluster) -> None:
    result = await cluster.client.complete(LONG_PROMPT, SamplingParams(max_tokens=1, n=3))
    for completion in result.completions:
        assert len(completion.token_ids) == 1
        assert completion.finish_reason is FinishReason.LENGTH
        assert (completion.summary.tpot_s, completion.summary.num_retries) == (0, 0)
    await cluster.empties()


async def test_logprobs_come_with_every_token(cluster: LiveCluster) -> None:
    params = SamplingParams(temperature=0, max_tokens=5, logprobs=3, prompt_logprobs=1, n=2)
    result = await cluster.client.complete(PROMPT, params)
    first, second = result.completions
    for completion in (first, second):
        assert [entry.token_id for entry in completion.logprobs] == list(completion.token_ids)
        assert all(len(entry.top) == 3 and entry.rank == 1 for entry in completion.logprobs)
    prompt_ids = TOKENIZER.encode(PROMPT)
    assert first.prompt_logprobs is not None
    assert [entry.token_id for entry in first.prompt_logprobs] == prompt_ids[1:]
    assert second.prompt_logprobs is None


async def test_a_prompt_that_decode_holds_is_not_sent_to_prefill_again(cluster: LiveCluster) -> None:
    first = await cluster.client.complete(LONG_PROMPT, GREEDY)
    # The router goes by the worker's next snapshot.
    await until(lambda: len(cluster.snapshots()["decode-0"].cached_prefixes) > 0)
    again = await cluster.client.complete(LONG_PROMPT, GREEDY)
    assert again.text == first.text
    assert again.completions[0].summary.prefill_worker == ""
    assert again.completions[0].summary.num_cached_tokens > 0
    salted = await cluster.client.complete(LONG_PROMPT, GREEDY, cache_salt="another tenant")
    assert salted.completions[0].summary.prefill_worker == "prefill-0"
    assert salted.completions[0].summary.num_cached_tokens == 0


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        ({"text": ""}, "prompt"),
        ({}, "prompt"),
        ({"token_ids": common_pb2.TokenIds()}, "prompt"),
        ({"token_ids": common_pb2.TokenIds(ids=[1, 4096])}, "prompt"),
        ({"token_ids": common_pb2.TokenIds(ids=[2**32 - 1])}, "prompt"),
        ({"text": "x " * 3000}, "prompt"),
        ({"text": "x" * 100_000}, "prompt"),
        ({"text": "x", "request_id": "r" * 125}, "request_id"),
        ({"text": "x", "cache_salt": "s" * 257}, "cache_salt"),
        ({"text": "x", "sampling_params": common_pb2.SamplingParams(n=0)}, "n"),
        ({"text": "x", "sampling_params": common_pb2.SamplingParams(n=129)}, "n"),
        ({"text": "x", "sampling_params": common_pb2.SamplingParams(temperature=-1)}, "temperature"),
        ({"text": "x", "sampling_params": common_pb2.SamplingParams(temperature=float("nan"))}, "temperature"),
        ({"text": "x", "sampling_params": common_pb2.SamplingParams(max_tokens=0)}, "max_tokens"),
        ({"text": "x", "sampling_params": common_pb2.SamplingParams(stop=[""])}, "stop"),
        ({"text": "x", "sampling_params": common_pb2.SamplingParams(stop_token_ids=[4096])}, "stop_token_ids"),
        ({"text": "x", "sampling_params": common_pb2.SamplingParams(logit_bias={4096: 1.0})}, "logit_bias"),
        ({"text": "x", "sampling_params": common_pb2.SamplingParams(seed=2**63)}, "seed"),
    ],
)
async def test_a_bad_request_is_refused_by_field_and_takes_nothing(request_: dict[str, Any], field: str) -> None:
    async with gateway_over([]) as cluster, grpc.aio.insecure_channel(cluster.address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as info:
            await stub.Generate(inference_pb2.GenerateRequest(**request_)).read()
        assert info.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        status = rpc_status.from_call(info.value)  # type: ignore[arg-type]
        bad, error = error_details_pb2.BadRequest(), error_details_pb2.ErrorInfo()
        assert status.details[0].Unpack(error)
        assert status.details[1].Unpack(bad)
        assert error.reason == "INVALID_ARGUMENT"
        assert [violation.field for violation in bad.field_violations] == [field]
        # No worker exists, so nothing was asked of one; and nothing is left in the gateway.
        assert cluster.gateway.num_sequences == 0
        assert not cluster.gateway.inference.finished


async def test_other_refusals_say_what_and_until_when(cluster: LiveCluster) -> None:
    with pytest.raises(NotFoundError, match="'gpt' is not served here, 'demo' is"):
        await cluster.client.complete(PROMPT, GREEDY, model="gpt")
    async with cluster.client.generate(PROMPT, FOREVER, request_id="same") as stream:
        await anext(stream)
        with pytest.raises(AlreadyExistsError, match="same"):
            await cluster.client.complete(PROMPT, GREEDY, request_id="same")
    await cluster.empties()
    await until(lambda: cluster.gateway.num_sequences == 0)
    assert (await cluster.client.complete(PROMPT, GREEDY, request_id="same")).request_id == "same"


async def test_admission_is_bounded_with_a_hint_to_retry() -> None:
    async with live_cluster(max_num_sequences=3) as cluster:
        async with cluster.client.generate(PROMPT, FOREVER) as stream:
            await anext(stream)
            with pytest.raises(ResourceExhaustedError) as info:
                await cluster.client.complete(PROMPT, SamplingParams(n=3))
            assert info.value.details["retry_after_s"] == "1"
            assert info.value.details["limit"] == "3"
            await cluster.client.complete(PROMPT, SamplingParams(n=2))
        await until(lambda: cluster.gateway.num_sequences == 0)
        await cluster.client.complete(PROMPT, SamplingParams(n=3))


async def test_more_than_fits_waits_in_the_gateway_and_is_served() -> None:
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    async with live_cluster(num_kv_blocks=20) as cluster:
        asked = [cluster.client.complete([7] * 150, params, cache_salt=str(index)) for index in range(8)]  # 10 blocks
        answers = asyncio.gather(*asked)
        await until(lambda: cluster.gateway.inference._dispatcher.num_waiting > 0)
        results = await answers
        assert len({result.text for result in results}) == 1
        assert sum(result.completions[0].summary.num_retries for result in results) == 0
        with pytest.raises(ResourceExhaustedError, match="the largest decode worker has 20"):
            await cluster.client.complete([7] * 400, params)
        await cluster.empties()


@pytest.mark.parametrize("num_chunks", [0, 1, 5])
async def test_a_client_that_leaves_frees_every_leg(cluster: LiveCluster, num_chunks: int) -> None:
    stream = cluster.client.generate(LONG_PROMPT, FOREVER)
    for _ in range(num_chunks):
        await anext(stream)
    if not num_chunks:
        await until(lambda: cluster.gateway.num_sequences == 1)
    await stream.aclose()
    await until(lambda: cluster.gateway.num_sequences == 0)
    await cluster.empties()
    assert cluster.gateway.inference.finished == Counter({FinishReason.ABORT: 1})


async def test_a_deadline_ends_every_leg_as_one(cluster: LiveCluster) -> None:
    chunks: list[GenerateChunk] = []
    num_tries = 0
    while not chunks:  # a busy machine may need longer for the first
        num_tries += 1
        with pytest.raises(DeadlineExceededError):
            async for chunk in cluster.client.generate(PROMPT, FOREVER, timeout=0.2 * 2**num_tries):
                chunks.append(chunk)
    await until(lambda: cluster.gateway.num_sequences == 0)
    await cluster.empties()
    assert cluster.gateway.inference.finished == Counter({FinishReason.DEADLINE: num_tries})


@asynccontextmanager
async def slow_client(cluster: LiveCluster) -> AsyncIterator[Any]:
    """The responses of a client that takes little at a time, when the workers are done and the gateway is not."""
    params = common_pb2.SamplingParams(n=4, max_tokens=100, logprobs=20, ignore_eos=True)
    small = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 8192)]
    async with grpc.aio.insecure_channel(cluster.address, options=small) as channel:
        call = inference_pb2_grpc.InferenceStub(channel).Generate(
            inference_pb2.GenerateRequest(text=PROMPT, sampling_params=params)
        )
        responses = aiter(call)
        await anext(responses)
        await until(lambda: cluster.snapshots()["decode-0"].num_finished == 4, PATIENTLY_S)
        await cluster.empties()
        assert cluster.gateway.num_sequences == 4  # what the client has not taken waits, as tokens
        yield responses
        call.cancel()


async def test_a_slow_client_holds_up_nobody_and_misses_nothing(cluster: LiveCluster) -> None:
    async with slow_client(cluster) as responses:
        quick = await cluster.client.complete(LONG_PROMPT, GREEDY)
        assert quick.completions[0].finish_reason is FinishReason.LENGTH
        rest = [response async for response in responses]
    assert sum(len(response.token_ids) for response in rest) == 399
    assert sum(len(response.logprobs) for response in rest) == 399
    assert sum(bool(response.finish_reason) for response in rest) == 4


async def test_a_client_that_leaves_while_it_is_written_to_is_no_failure(
    cluster: LiveCluster, caplog: pytest.LogCaptureFixture
) -> None:
    async with slow_client(cluster):
        pass
    await until(lambda: cluster.gateway.num_sequences == 0)
    assert cluster.gateway.inference.finished == Counter({FinishReason.ABORT: 4})
    assert not caplog.records


async def test_the_text_is_the_same_while_no_prefill_worker_is_there(cluster: LiveCluster) -> None:
    expected = await cluster.client.complete(LONG_PROMPT, SAMPLED)
    assert expected.completions[0].summary.prefill_worker == "prefill-0"
    cluster.membership.set(info for info in cluster.infos if info.role is WorkerRole.DECODE)
    await until(lambda: "prefill-0" not in cluster.snapshots())
    alone = await cluster.client.complete(LONG_PROMPT, SAMPLED, cache_salt="another tenant")
    assert alone.text == expected.text
    assert alone.completions[0].summary.prefill_worker == ""
    assert alone.completions[0].summary.num_cached_tokens == 0


async def test_health_follows_the_workers_and_reflection_names_the_services(cluster: LiveCluster) -> None:
    async with grpc.aio.insecure_channel(cluster.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        async def serving(service: str) -> bool:
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

        for service in ("", "prefill", "decode", "fuseline.v1.Inference"):
            assert await serving(service)
        cluster.membership.set(info for info in cluster.infos if info.role is WorkerRole.DECODE)
        await until(lambda: "prefill-0" not in cluster.snapshots())
        assert [await serving(service) for service in ("", "prefill", "decode")] == [True, False, True]
        cluster.membership.set(info for info in cluster.infos if info.role is WorkerRole.PREFILL)
        await until(lambda: "decode-0" not in cluster.snapshots() and "prefill-0" in cluster.snapshots())
        assert [await serving(service) for service in ("", "prefill", "decode")] == [False, True, False]
        with pytest.raises(UnavailableError, match="decode"):
            await cluster.client.complete(PROMPT, GREEDY)

        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([ask]))
        named = {service.name for service in (await call.read()).list_services_response.service}
        assert {"fuseline.v1.Inference", "grpc.health.v1.Health"} <= named


async def test_model_info(cluster: LiveCluster) -> None:
    told = await cluster.client.model_info()
    assert (told.name, told.fingerprint, told.vocab_size) == ("demo", MODEL.fingerprint, MODEL.shape.vocab_size)


async def test_stopping_lets_running_requests_finish_and_refuses_new_ones_by_name() -> None:
    finish = asyncio.Event()
    script = [output(8), finish, output(9, last=True)]
    async with (
        ScriptedWorker("decode-0", WorkerRole.MIXED, script) as worker,
        gateway_over([worker.info]) as cluster,
        grpc.aio.insecure_channel(cluster.address) as channel,
    ):
        watching = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        watched = aiter(watching)
        assert (await anext(watched)).status == health_pb2.HealthCheckResponse.SERVING
        running = cluster.client.generate(PROMPT, GREEDY)
        await anext(running)
        stopping = asyncio.create_task(cluster.gateway.stop(60))
        assert (await anext(watched)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        for _ in range(3):
            with pytest.raises(UnavailableError, match="the gateway is shutting down") as info:
                await cluster.client.complete(PROMPT, GREEDY)
            assert info.value.details["retry_after_s"] == "1"
        assert (await cluster.client.model_info()).name == "demo"
        finish.set()
        assert [chunk.finish_reason async for chunk in running] == [FinishReason.LENGTH]
        async with asyncio.timeout(30):  # whoever watches does not hold it up for as long as requests may take
            await stopping
        assert cluster.gateway.inference.finished == Counter({FinishReason.LENGTH: 1})


async def test_what_does_not_finish_in_time_is_cut_off_as_unavailable() -> None:
    async with (
        ScriptedWorker("decode-0", WorkerRole.MIXED, [output(8), asyncio.Event()]) as worker,
        gateway_over([worker.info]) as cluster,
    ):
        running = cluster.client.generate(PROMPT, GREEDY)
        assert (await anext(running)).token_ids == (8,)
        stopping = asyncio.create_task(cluster.gateway.stop(0.05))
        with pytest.raises(UnavailableError, match="lost after 1 token:"):
            await anext(running)
        await stopping
        await until(lambda: worker.ended == ["cancelled"])


async def test_a_gateway_that_cannot_tell_its_health_any_more_says_so(
    cluster: LiveCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    with monkeypatch.context() as broken:
        broken.setattr(health.aio.HealthServicer, "set", fail)  # type: ignore[attr-defined]
        cluster.gateway.pool.announce()
        async with asyncio.timeout(PATIENTLY_S):
            assert str(await cluster.gateway.failed()) == "a bug"
