"""The engine's thread: nothing lost, nothing waits for ever, one wake-up per step, and a slow reader slows nobody."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest

from fuseline.runtime.config import CacheConfig, EngineConfig, ModelInfo, SchedulerConfig
from fuseline.runtime.engine import Engine
from fuseline.runtime.errors import (
    AlreadyExistsError,
    CancelledError,
    DeadlineExceededError,
    ErrorCode,
    FuselineError,
    InternalError,
    InvalidArgumentError,
    ResourceExhaustedError,
    UnavailableError,
)
from fuseline.runtime.plan import StepPlan, StepResult
from fuseline.runtime.request import FinishReason, Phase, Request, SequenceOutput
from fuseline.runtime.sampling_params import SamplingParams
from fuseline.runtime.sharding import ModelShape
from fuseline.tests.timing import PATIENTLY_S
from fuseline.workers.engine_thread import EngineThread
from fuseline.workers.request_stream import RequestStream

MODEL = ModelInfo("m", "f", ModelShape(2, 2, 2, 8, 16, 32, 100), "float32", 64, (99,))


class CountingExecutor:
    """Samples 1, 2, 3, ... ; a step ends when the gate lets it."""

    def __init__(self) -> None:
        self.gate = threading.Semaphore(0)
        self.is_open = True
        self.failure: Exception | None = None
        self.num_steps = 0
        self._plans: deque[StepPlan] = deque()
        self._next = 0

    def submit(self, plan: StepPlan) -> None:
        self._plans.append(plan)

    def collect(self) -> StepResult:
        if not self.is_open:
            assert self.gate.acquire(timeout=30)
        if self.failure is not None:
            raise self.failure
        plan = self._plans.popleft()
        self.num_steps += 1
        num_samples = int(plan.samples.sum())
        tokens = np.arange(self._next, self._next + num_samples, dtype=np.int32) % 90 + 1
        self._next += num_samples
        return StepResult(plan.step_id, tokens)


@dataclasses.dataclass
class Setup:
    engine: Engine
    executor: CountingExecutor
    thread: EngineThread
    failures: list[FuselineError]

    async def start(self, request_id: str, max_tokens: int = 4, **options: object) -> RequestStream:
        stream = await self.thread.open_stream(request_id)
        await self.thread.add(request(request_id, max_tokens, **options))
        return stream


def request(request_id: str, max_tokens: int = 4, **options: object) -> Request:
    return Request(request_id, (1, 2, 3), SamplingParams(max_tokens=max_tokens), **options)  # type: ignore[arg-type]


@asynccontextmanager
async def running(max_live: int = 8) -> AsyncIterator[Setup]:
    executor, failures = CountingExecutor(), list[FuselineError]()
    config = EngineConfig(MODEL, CacheConfig(16, 4), SchedulerConfig(4, 32, 8, handoff_timeout_s=30))
    engine = Engine(config, executor, time.monotonic)
    thread = EngineThread(engine, max_live=max_live, on_failure=failures.append)
    try:
        async with asyncio.timeout(PATIENTLY_S):
            yield Setup(engine, executor, thread, failures)
    finally:
        executor.is_open = True
        executor.gate.release(100)
        await thread.stop(10)
    engine.check_integrity()
    assert engine.stats().num_free_blocks == 16
    assert engine.stats().num_leaked_blocks == 0


async def read_all(stream: RequestStream) -> list[int]:
    tokens: list[int] = []
    while True:
        output = await stream.get()
        tokens += output.token_ids
        if output.finish_reason is not None:
            return tokens


async def test_outputs_arrive_in_order_and_blocks_go_home() -> None:
    async with running() as s:
        stream = await s.start("a", 5)
        assert await read_all(stream) == [1, 2, 3, 4, 5]
        await s.thread.close_stream(stream)
        assert s.thread.num_live == 0
        assert (await s.thread.stats()).num_free_blocks == 16


async def test_a_refusal_reaches_the_caller_and_the_engine_lives_on() -> None:
    async with running() as s:
        stream = await s.thread.open_stream("bad")
        with pytest.raises(InvalidArgumentError):
            await s.thread.add(Request("bad", (1000,), SamplingParams()))
        await s.thread.close_stream(stream)
        assert len(await read_all(await s.start("good", 2))) == 2


async def test_a_slow_reader_finds_everything_as_one_output() -> None:
    async with running() as s:
        slow, fast = await s.start("slow", 10), await s.start("fast", 20)
        await read_all(fast)
        output = await slow.get()
        assert len(output.token_ids) == 10
        assert output.finish_reason is FinishReason.LENGTH


async def test_no_steps_and_no_wakeups_while_there_is_nothing_to_do() -> None:
    async with running() as s:
        told = asyncio.Event()
        s.thread.watchers.add(told)
        await s.thread.open_stream("r")
        await s.thread.reserve(request("r", phase=Phase.DECODE))
        await told.wait()  # the last that there is to say of the reservation
        wakeups = 0
        call_soon = s.thread._loop.call_soon_threadsafe

        def counting(*args: object, **kwargs: object) -> object:
            nonlocal wakeups
            wakeups += 1
            return call_soon(*args, **kwargs)  # type: ignore[arg-type]

        s.thread._loop.call_soon_threadsafe = counting  # type: ignore[method-assign,assignment]
        await asyncio.sleep(0.3)  # a reservation waits; an engine that polls would show
        assert (s.executor.num_steps, wakeups) == (0, 0)
        stream = await s.start("a", 30)
        await read_all(stream)
        assert wakeups <= s.executor.num_steps + 3


async def test_a_deadline_ends_a_request_without_anyone_asking() -> None:
    async with running() as s:
        await s.thread.open_stream("r")
        stream = s.thread._streams["r"]
        await s.thread.reserve(request("r", phase=Phase.DECODE, deadline=time.monotonic() + 0.05))
        with pytest.raises(DeadlineExceededError):
            await stream.get()
        # The blocks stay until the transfer is known to have stopped.
        assert (await s.thread.stats()).num_free_blocks < 16
        await s.thread.close_stream(stream)
        assert (await s.thread.stats()).num_free_blocks == 16


async def test_closing_ends_a_request_in_the_middle_of_a_step() -> None:
    async with running() as s:
        s.executor.is_open = False
        stream = await s.start("a", 50)
        closing = s.thread.close_stream(stream)
        s.executor.gate.release(2)
        await closing
        s.executor.is_open = True
        assert (await s.thread.stats()).num_running == 0


async def test_a_retry_waits_for_its_predecessors_cleanup() -> None:
    async with running() as s:
        first = await s.start("a", 50)
        retry = asyncio.create_task(s.start("a", 3))
        await asyncio.sleep(0)
        await s.thread.close_stream(first)
        assert len(await read_all(await retry)) == 3
        with pytest.raises(AlreadyExistsError):
            await s.thread.open_stream("a")


async def test_nothing_of_the_predecessor_reaches_the_retry() -> None:
    async with running() as s:
        for _ in range(20):
            first = await s.start("a", 50)
            await first.get()
            s.thread.close_stream(first)
            second = await s.start("a", 3)
            assert len(await read_all(second)) == 3
            await s.thread.close_stream(second)


async def test_more_requests_than_the_limit_are_refused() -> None:
    async with running(max_live=2) as s:
        for name in "ab":
            await s.thread.open_stream(name)
        with pytest.raises(ResourceExhaustedError):
            await s.thread.open_stream("c")


async def test_a_lost_rank_ends_every_request_with_its_code() -> None:
    async with running() as s:
        s.executor.is_open = False
        streams = [await s.start("a", 50)]
        streams += [await s.thread.open_stream(name) for name in "bc"]
        adding = [s.thread.add(request(name, 50)) for name in "bc"]
        s.executor.gate.release()  # between this step and the next one, the engine hears of b and c
        await asyncio.gather(*adding)
        s.executor.failure = UnavailableError("rank 1 is gone")
        s.executor.gate.release()
        for stream in streams:
            with pytest.raises(UnavailableError, match="rank 1 is gone"):
                while True:
                    await stream.get()
        assert [error.message for error in s.failures] == ["rank 1 is gone"]
        with pytest.raises(UnavailableError):
            await s.thread.open_stream("d")
        for stream in streams:
            await s.thread.close_stream(stream)


@pytest.mark.parametrize("where", ["step", "command"])
async def test_a_bug_ends_every_request_and_is_told_once(where: str, caplog: pytest.LogCaptureFixture) -> None:
    async with running() as s:
        s.executor.is_open = False
        stream = await s.start("a", 50)
        if where == "step":
            s.executor.failure = ZeroDivisionError("a bug")
            s.executor.gate.release()
        else:
            command = s.thread.call(lambda engine: 1 // 0)
            s.executor.gate.release()
            with pytest.raises(InternalError):
                await command
        with pytest.raises(InternalError):
            while True:
                await stream.get()
        assert [error.code for error in s.failures] == [ErrorCode.INTERNAL]
        assert "ZeroDivisionError" in caplog.text


async def test_stopping_ends_live_requests_and_later_commands() -> None:
    async with running() as s:
        s.executor.is_open = False
        stream = await s.start("a", 50)
        stopping = asyncio.create_task(s.thread.stop(10))
        await asyncio.sleep(0)
        s.executor.gate.release(5)
        await stopping
        with pytest.raises(UnavailableError):
            while True:
                await stream.get()
        with pytest.raises(UnavailableError):
            await s.thread.stats()
        await s.thread.close_stream(stream)


async def test_a_caller_that_is_cancelled_loses_only_its_answer() -> None:
    async with running() as s:
        stream = await s.thread.open_stream("r")
        reserving = asyncio.ensure_future(s.thread.reserve(request("r", phase=Phase.DECODE)))
        reserving.cancel()
        await asyncio.sleep(0)
        await s.thread.close_stream(stream)
        assert (await s.thread.stats()).num_free_blocks == 16


async def test_a_commit_that_ends_the_sequence_ends_its_stream() -> None:
    async with running() as s:
        stream = await s.thread.open_stream("r")
        await s.thread.reserve(request("r", max_tokens=1, phase=Phase.DECODE))
        await s.thread.commit("r", 7)
        output = await stream.get()
        assert (output.token_ids, output.finish_reason) == ((), FinishReason.LENGTH)


async def test_a_stream_tells_how_it_ended() -> None:
    for reason, expected in (
        (FinishReason.ABORT, CancelledError),
        (FinishReason.DEADLINE, DeadlineExceededError),
        (FinishReason.ERROR, InternalError),
    ):
        stream = RequestStream("a")
        stream.put(SequenceOutput("a", (1,)))
        stream.put(SequenceOutput("a", finish_reason=reason))
        stream.put(SequenceOutput("a", (2,)))
        for _ in range(2):
            with pytest.raises(expected):
                await stream.get()
