"""Prefill and decode apart or together, on the same machine with the same number of processes and cores.

    python -m benchmarks.disaggregation [--json PATH] [--requests N] [--rates 1 2 4] [--model demo]

Two loads, each over real worker processes and gRPC, driven as the gateway drives them (which adds its own hop):

hops:   one request at a time; where its time to the first decoded token goes.
        reserve   decode stream opened to reservation received
        prefill   prefill stream opened to first token received: the TTFT that a user sees is reserve + prefill
        transfer  first token to "handed_off": what of the transfer was not hidden behind the computation, and the
                  commit, which verifies on every rank
        resume    "handed_off" to the first decoded token: what is left of the first decode step
rates:  requests arrive at random (Poisson) at each rate, over one prefill and one decode worker, then over two mixed
        ones that take turns. TTFT is from arrival to the first token, TPOT the mean gap of a request's later tokens.

Expect colocation to win TTFT as long as there is no queue, and disaggregation to hold TPOT when long prompts arrive.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np

from fuseline.proto.fuseline.v1 import worker_pb2, worker_pb2_grpc
from fuseline.runtime.request import Request
from fuseline.runtime.sampling_params import SamplingParams
from fuseline.workers import wire
from fuseline.workers.grpc_options import CHANNEL_OPTIONS

VOCAB_SIZE = 4096
HOP_PROMPTS = (64, 512, 1500)


@dataclass(frozen=True)
class Hops:
    """Medians over requests, in milliseconds.

    Attributes:
        overlap: share of the transfer, first push to commit, that passed while the prompt was being computed.
    """

    num_prompt_tokens: int
    reserve_ms: float
    prefill_ms: float
    transfer_ms: float
    resume_ms: float
    num_bytes: int
    transport: str
    overlap: float


@dataclass(frozen=True)
class RateFigure:
    """One load on one arrangement of two workers."""

    arrangement: str
    requests_per_s: float
    num_requests: int
    ttft_p50_ms: float
    ttft_p99_ms: float
    tpot_p50_ms: float
    tpot_p99_ms: float
    output_tokens_per_s: float


class Worker:
    """A worker process and its stubs."""

    def __init__(self, address: str) -> None:
        self.channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self.prefill = worker_pb2_grpc.PrefillServiceStub(self.channel)
        self.decode = worker_pb2_grpc.DecodeServiceStub(self.channel)


@asynccontextmanager
async def worker_process(role: str, model: str) -> AsyncIterator[Worker]:
    """One worker with one computing thread, as its own process."""
    command = [sys.executable, "-P", "-m", "fuseline.workers.server", "--model", model, "--role", role]
    command += ["--num-threads", "1", "--device", "cpu", "--max-num-batched-tokens", "256"]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        if process.stdout is None:
            raise RuntimeError("the worker has no output")
        ready = json.loads(await asyncio.wait_for(process.stdout.readline(), 120))
        worker = Worker(ready["address"])
        yield worker
        await worker.channel.close(None)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()


@dataclass
class Trace:
    """When what of a request arrived, in seconds on this process's clock."""

    started: float = 0.0
    reserved: float = 0.0
    first_token: float = 0.0
    handed_off: float = 0.0
    second_token: float = 0.0
    ended: float = 0.0
    num_tokens: int = 0
    handoff: Any = None

    def count(self, num_tokens: int) -> None:
        """So many tokens have just arrived."""
        now = time.perf_counter()
        if not self.num_tokens:
            self.first_token = now
        elif not self.second_token:
            self.second_token = now
        self.num_tokens += num_tokens
        self.ended = now


def make_request(name: str, num_prompt_tokens: int, max_tokens: int, seed: int) -> Request:
    """A prompt that no prefix cache knows, and an answer of exactly ``max_tokens``."""
    prompt = np.random.default_rng(seed).integers(1, VOCAB_SIZE, num_prompt_tokens).tolist()
    return Request(name, tuple(prompt), SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True))


async def run_apart(prefill: Worker, decode: Worker, request: Request) -> Trace:
    """Prompt on one worker, the rest on the other."""
    trace = Trace(started=time.perf_counter())
    message = wire.request_to_wire(request)
    decoding = decode.decode.Decode(worker_pb2.DecodeRequest(sequence=message))
    events = aiter(decoding)
    reservation = (await anext(events)).reserved
    trace.reserved = time.perf_counter()
    async for event in prefill.prefill.Prefill(worker_pb2.PrefillRequest(sequence=message, reservation=reservation)):
        if event.WhichOneof("event") == "first_token":
            trace.count(1)
        else:
            trace.handed_off, trace.handoff = time.perf_counter(), event.handed_off
    async for event in events:
        trace.count(len(event.output.token_ids))
    return trace


async def run_together(worker: Worker, request: Request) -> Trace:
    """All on one worker."""
    trace = Trace(started=time.perf_counter())
    message = worker_pb2.DecodeRequest(sequence=wire.request_to_wire(request), local_prefill=True)
    async for event in worker.decode.Decode(message):
        trace.count(len(event.output.token_ids))
    return trace


async def measure_hops(prefill: Worker, decode: Worker, num_requests: int) -> list[Hops]:
    """Where the time of a lone request goes, by prompt length."""
    found = []
    for num_tokens in HOP_PROMPTS:
        traces = []
        for index in range(num_requests + 2):
            request = make_request(f"hops-{num_tokens}-{index}", num_tokens, 4, seed=num_tokens * 1000 + index)
            traces.append(await run_apart(prefill, decode, request))
        traces = traces[2:]  # the first ones connect

        def median_ms(values: list[float]) -> float:
            return round(statistics.median(values) * 1e3, 3)

        hidden = [
            1 - (trace.handed_off - trace.first_token) / trace.handoff.transfer_s
            for trace in traces
            if trace.handoff.transfer_s > 0
        ]
        found.append(
            Hops(
                num_prompt_tokens=num_tokens,
                reserve_ms=median_ms([trace.reserved - trace.started for trace in traces]),
                prefill_ms=median_ms([trace.first_token - trace.reserved for trace in traces]),
                transfer_ms=median_ms([trace.handed_off - trace.first_token for trace in traces]),
                resume_ms=median_ms([max(0.0, trace.second_token - trace.handed_off) for trace in traces]),
                num_bytes=traces[0].handoff.num_bytes,
                transport=traces[0].handoff.transport,
                overlap=round(max(0.0, statistics.median(hidden)), 3),
            )
        )
    return found


async def measure_rate(arrangement: str, workers: list[Worker], rate: float, num_requests: int) -> RateFigure:
    """Poisson arrivals of prompts of 32 to 1024 tokens with answers of 32; the same ones for both arrangements."""
    rng = np.random.default_rng(0)
    gaps = rng.exponential(1 / rate, num_requests)
    lengths = np.exp(rng.uniform(np.log(32), np.log(1024), num_requests)).astype(int)

    async def one(index: int) -> Trace:
        await asyncio.sleep(float(gaps[: index + 1].sum()))
        name = f"{arrangement}-{rate}-{index}"
        request = make_request(name, int(lengths[index]), 32, seed=int(rate * 1000) * 10_000 + index)
        if arrangement == "apart":
            return await run_apart(workers[0], workers[1], request)
        return await run_together(workers[index % 2], request)

    start = time.perf_counter()
    traces = await asyncio.gather(*[one(index) for index in range(num_requests)])
    elapsed = time.perf_counter() - start
    ttft = np.array([trace.first_token - trace.started for trace in traces]) * 1e3
    tpot = np.array([(trace.ended - trace.first_token) / (trace.num_tokens - 1) for trace in traces]) * 1e3
    return RateFigure(
        arrangement=arrangement,
        requests_per_s=rate,
        num_requests=num_requests,
        ttft_p50_ms=round(float(np.percentile(ttft, 50)), 2),
        ttft_p99_ms=round(float(np.percentile(ttft, 99)), 2),
        tpot_p50_ms=round(float(np.percentile(tpot, 50)), 3),
        tpot_p99_ms=round(float(np.percentile(tpot, 99)), 3),
        output_tokens_per_s=round(sum(trace.num_tokens for trace in traces) / elapsed, 1),
    )


async def run(options: argparse.Namespace) -> dict[str, Any]:
    """All measurements; both arrangements get the same two processes' worth of machine, one after the other."""
    rates: list[RateFigure] = []
    async with AsyncExitStack() as stack:
        prefill = await stack.enter_async_context(worker_process("prefill", options.model))
        decode = await stack.enter_async_context(worker_process("decode", options.model))
        hops = await measure_hops(prefill, decode, options.requests)
        for rate in options.rates:
            rates.append(await measure_rate("apart", [prefill, decode], rate, options.rate_requests))
    async with AsyncExitStack() as stack:
        mixed = [await stack.enter_async_context(worker_process("mixed", options.model)) for _ in range(2)]
        for worker in mixed:
            await run_together(worker, make_request("warm", 64, 4, seed=1))
        for rate in options.rates:
            rates.append(await measure_rate("together", mixed, rate, options.rate_requests))
    return {
        "benchmark": "disaggregation",
        "model": options.model,
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "hops": [asdict(hop) for hop in hops],
        "rates": [asdict(figure) for figure in rates],
    }


def report(result: dict[str, Any]) -> None:
    """Two tables."""
    print(f"{result['model']} on {result['machine']}\n")
    print(f"{'prompt':>7}{'reserve':>10}{'prefill':>10}{'transfer':>10}{'resume':>9}  ms   KiB of KV  overlap")
    for hop in result["hops"]:
        print(
            f"{hop['num_prompt_tokens']:>7}{hop['reserve_ms']:>10.2f}{hop['prefill_ms']:>10.2f}"
            f"{hop['transfer_ms']:>10.2f}{hop['resume_ms']:>9.2f}     {hop['num_bytes'] // 1024:>9}"
            f"  {hop['overlap']:>6.0%}  {hop['transport']}"
        )
    print(f"\n{'':<10}{'req/s':>7}{'TTFT p50':>10}{'p99':>9}{'TPOT p50':>10}{'p99':>8}  ms   tokens/s")
    for figure in result["rates"]:
        print(
            f"{figure['arrangement']:<10}{figure['requests_per_s']:>7g}{figure['ttft_p50_ms']:>10.1f}"
            f"{figure['ttft_p99_ms']:>9.1f}{figure['tpot_p50_ms']:>10.2f}{figure['tpot_p99_ms']:>8.2f}"
            f"{figure['output_tokens_per_s']:>14.1f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Disaggregated against colocated serving on one machine.")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--requests", type=int, default=20, help="lone requests per prompt length")
    parser.add_argument("--rates", type=float, nargs="*", default=[1.0, 2.0, 4.0], help="requests per second")
    parser.add_argument("--rate-requests", type=int, default=40, help="requests at each rate")
    parser.add_argument("--json", type=Path, default=None, help="write the figures there as well")
    options = parser.parse_args()
    result = asyncio.run(run(options))
    report(result)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
