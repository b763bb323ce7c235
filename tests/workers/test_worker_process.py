"""Workers as processes of their own: ready, killed in the middle of a transfer, told to stop, orphaned."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from fuseline.proto.fuseline.v1 import worker_pb2
from fuseline.runtime.errors import UnavailableError
from fuseline.runtime.role import WorkerRole
from fuseline.tests.timing import PATIENTLY_S, PROMPTLY_S
from fuseline.tests.workers.kv_proxy import kv_proxy, through
from fuseline.tests.workers.worker_cases import (
    Client,
    compute_locally,
    disaggregate,
    error_of,
    fresh_prompt,
    make_request,
    open_decode,
    open_prefill,
    prompt_of,
    worker,
)
from fuseline.workers import wire

SERVER = [sys.executable, "-P", "-m", "fuseline.workers.server"]
OPTIONS = ["--dtype", "float32", "--device", "cpu", "--num-threads", "1", "--num-kv-blocks", "256"]
OPTIONS += ["--max-num-batched-tokens", "64"]


class WorkerProcess(Client):
    """A worker started from the command line."""

    def __init__(self, process: asyncio.subprocess.Process, ready: dict[str, Any]) -> None:
        super().__init__(str(ready["address"]))
        self.process = process
        self.ready = ready

    @property
    def pid(self) -> int:
        """Of the worker, which may be a child of the process that was started."""
        (pid,) = self.ready["pids"]
        return int(pid)

    async def all_free(self) -> None:
        async with asyncio.timeout(PROMPTLY_S):
            snapshot = await until(self, lambda snapshot: snapshot.num_free_blocks == snapshot.num_total_blocks)
        assert snapshot.num_leaked_blocks == 0


async def until(client: Client, happened: Callable[[worker_pb2.WorkerSnapshot], bool]) -> worker_pb2.WorkerSnapshot:
    """Watch a worker until it tells of something."""
    watch = client.worker.Watch(worker_pb2.WatchRequest(min_interval_ms=10))
    async for snapshot in watch:
        if happened(snapshot):
            watch.cancel()
            break
    found: worker_pb2.WorkerSnapshot = snapshot
    return found


@asynccontextmanager
async def worker_process(role: str, command: tuple[str, ...] = ()) -> AsyncIterator[WorkerProcess]:
    """Kills what is left of it at the end."""
    process = await asyncio.create_subprocess_exec(
        *command, *SERVER, "--role", role, *OPTIONS, stdout=asyncio.subprocess.PIPE, start_new_session=True
    )
    try:
        assert process.stdout is not None
        started = WorkerProcess(process, json.loads(await asyncio.wait_for(process.stdout.readline(), PATIENTLY_S)))
        yield started
        await started.channel.close(None)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def test_a_decode_worker_killed_in_a_transfer_ends_the_prefill_which_serves_on() -> None:
    async with worker_process("prefill") as prefill, worker_process("decode") as decode:
        assert decode.ready["role"] == "decode"
        request = make_request(prompt_of(100), temperature=1.0, seed=3, max_tokens=12)
        alone = await compute_locally(prefill, make_request(prompt_of(100), temperature=1.0, seed=3, max_tokens=12))
        assert (await disaggregate(prefill, decode, request)).token_ids == alone.token_ids
        request = make_request(fresh_prompt(1500))
        decoding = await open_decode(decode, request)
        decode.process.send_signal(signal.SIGSTOP)  # so that it cannot take everything before it is killed
        prefilling = aiter(open_prefill(prefill, request, decoding.reservation))
        await anext(prefilling)
        decode.process.kill()
        assert isinstance(await error_of(decoding.events), UnavailableError)
        assert isinstance(await error_of(prefilling), UnavailableError)
        await prefill.all_free()
        await drain_by_signal(prefill)


async def drain_by_signal(told: WorkerProcess) -> None:
    """What runs is finished, then the process ends well."""
    request = wire.request_to_wire(make_request(fresh_prompt(50), max_tokens=200))
    events = aiter(told.decode.Decode(worker_pb2.DecodeRequest(sequence=request, local_prefill=True)))
    num_tokens = len((await anext(events)).output.token_ids)
    told.process.terminate()
    async for event in events:
        num_tokens += len(event.output.token_ids)
    assert num_tokens == 200
    assert await asyncio.wait_for(told.process.wait(), PATIENTLY_S) == 0


async def test_a_prefill_worker_dies_with_its_parent_in_a_transfer() -> None:
    in_a_shell = ("/bin/sh", "-c", '"$@" & wait', "sh")
    async with AsyncExitStack() as stack:
        decode = await stack.enter_async_context(worker(WorkerRole.DECODE))
        proxy = await stack.enter_async_context(kv_proxy(decode))
        prefill = await stack.enter_async_context(worker_process("prefill", in_a_shell))
        proxy.may_go_on.clear()
        request = make_request(fresh_prompt(1500))
        decoding = await open_decode(decode, request)
        prefilling = open_prefill(prefill, request, through(proxy, decoding.reservation))
        await proxy.arrived.wait()
        ended = asyncio.Event()
        watching = os.pidfd_open(prefill.pid)
        asyncio.get_running_loop().add_reader(watching, ended.set)
        prefill.process.kill()  # the shell, which says nothing to its child
        assert isinstance(await error_of(prefilling), UnavailableError)
        await asyncio.wait_for(ended.wait(), PROMPTLY_S)
        asyncio.get_running_loop().remove_reader(watching)
        os.close(watching)
        decoding.call.cancel()
        await decode.released()


async def test_a_worker_that_cannot_start_says_why_in_a_line() -> None:
    process = await asyncio.create_subprocess_exec(
        *SERVER, "--tensor-parallel-size", "3", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await asyncio.wait_for(process.communicate(), PATIENTLY_S)
    assert process.returncode == 1
    assert out == b""
    assert b"tensor_parallel_size=3" in err.splitlines()[-1]
    assert b"Traceback" not in err
