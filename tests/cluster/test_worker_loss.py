"""Workers that are killed while they serve: what users see of it, and what is left on the others."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import pytest

from fuseline.cluster.membership import ReplicaInfo, ReplicaState
from fuseline.runtime.errors import UnavailableError
from fuseline.runtime.request import FinishReason
from fuseline.runtime.role import WorkerRole
from fuseline.runtime.sampling_params import SamplingParams
from fuseline.tests.cluster.live_cluster import gateway_over, group_config, worker
from fuseline.tests.cluster.scripted_worker import until
from fuseline.tests.timing import PROMPTLY_S

PROMPT = "class Stack:\n    def __init__(self):\n" * 4
SEEDED = SamplingParams(seed=3, max_tokens=20)


@dataclass
class Killable:
    info: ReplicaInfo
    process: asyncio.subprocess.Process


@asynccontextmanager
async def killable(worker_id: str, role: WorkerRole) -> AsyncIterator[Killable]:
    options = f"--role {role} --worker-id {worker_id} --device cpu --num-threads 1 --num-kv-blocks 256"
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "fuseline.workers.server",
        *options.split(),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        assert process.stdout is not None
        ready = json.loads(await process.stdout.readline())
        yield Killable(ReplicaInfo(worker_id, role, ReplicaState.READY, ready["address"]), process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_killed_workers_are_survived_until_text_depends_on_them() -> None:
    async with AsyncExitStack() as stack:
        doomed = (("prefill-0", WorkerRole.PREFILL), ("decode-0", WorkerRole.DECODE), ("decode-1", WorkerRole.DECODE))
        prefill, decode, other_decode = await asyncio.gather(
            *(stack.enter_async_context(killable(worker_id, role)) for worker_id, role in doomed)
        )
        survivor = await stack.enter_async_context(
            worker("prefill-1", WorkerRole.PREFILL, group_config(num_kv_blocks=256))
        )
        infos = [prefill.info, survivor, decode.info, other_decode.info]
        cluster = await stack.enter_async_context(gateway_over(infos))
        finished = cluster.gateway.inference.finished
        await until(lambda: len(cluster.snapshots()) == 4)
        expected = (await cluster.client.complete(PROMPT, SEEDED)).text

        await cluster.empties()
        # Stopped, a worker takes requests and answers nothing: killed then, it is killed in the middle of them.
        prefill.process.send_signal(signal.SIGSTOP)
        asked = asyncio.create_task(cluster.client.complete(PROMPT, SEEDED, cache_salt="a"))
        await until(lambda: cluster.gateway.num_sequences == 1)
        await until(lambda: cluster.snapshots()[decode.info.worker_id].num_free_blocks < 256)
        prefill.process.kill()
        result = (await asked).completions[0]
        assert result.text == expected
        assert (result.summary.prefill_worker, result.summary.num_retries) == ("prefill-1", 1)

        await cluster.empties()
        decode.process.send_signal(signal.SIGSTOP)
        asked = asyncio.create_task(cluster.client.complete(PROMPT, SEEDED, cache_salt="b"))
        await until(lambda: cluster.gateway.num_sequences == 1)
        decode.process.kill()
        result = (await asked).completions[0]
        assert result.text == expected
        assert (result.summary.decode_worker, result.summary.num_retries) == ("decode-1", 1)
        assert finished == Counter({FinishReason.LENGTH: 3})

        # The text so far came from the worker that dies now: an error, at once, and nothing stays with the other leg.
        stream = cluster.client.generate(PROMPT, SamplingParams(max_tokens=1500, ignore_eos=True))
        for _ in range(5):
            await anext(stream)
        other_decode.process.kill()
        with pytest.raises(UnavailableError, match="worker decode-1 was lost"):
            async with asyncio.timeout(PROMPTLY_S):
                async for _ in stream:
                    pass
        await until(lambda: set(cluster.snapshots()) == {"prefill-1"})
        await cluster.empties()
        with pytest.raises(UnavailableError, match="no decode worker") as info:
            await cluster.client.complete(PROMPT, SEEDED)
        assert info.value.details["retry_after_s"] == "1"
        assert finished == Counter({FinishReason.LENGTH: 3, FinishReason.ERROR: 2})
