"""The same load on this runtime's cluster and on ``vllm serve``, in turns on one machine: goodput against rate.

    python -m benchmarks.serving_peers [--vllm VENV] [--model b05b] [--rates 0.1 0.2 0.4] [--requests 24] [--rounds 1]

Requests arrive at random (Poisson) whether earlier ones are done or not: the same prompts of 128 to 512 random tokens
and answers of 64 to 128, at the same moments for both. A request is good when it meets both objectives: time to first
token, and time per output token after it. Goodput is the rate of arrivals times the share of good ones. Each server
is started anew for each round, warmed up, and stopped; both get all cores and the same limits. The client, one
process for both, runs on the same cores.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from fuseline.cluster.client import AsyncClient
from fuseline.runtime.errors import FuselineError
from fuseline.runtime.sampling_params import SamplingParams

from .peers.checkpoints import SHAPES, VOCAB_SIZE, write
from .peers.engines.measure import FIRST_ID

WORK = Path("~/.cache/fuseline/peers").expanduser()
PROMPT_TOKENS, OUTPUT_TOKENS = (128, 512), (64, 128)
MAX_MODEL_LEN, MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS = 1024, 32, 512
START_TIMEOUT_S, STOP_TIMEOUT_S, REQUEST_TIMEOUT_S = 600.0, 60.0, 600.0
SERVE = "from fuseline.cluster.cli import main; main()"


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request, and when it comes, in seconds since the first."""

    at_s: float
    prompt: tuple[int, ...]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of it; both times infinite if it failed."""

    ttft_s: float
    tpot_s: float


@dataclass(frozen=True, slots=True)
class Figure:
    """One server under one rate, over the rounds; times are those of the requests that were answered."""

    server: str
    requests_per_s: float
    num_requests: int
    num_failed: int
    good_share: float
    goodput_per_s: float
    ttft_p50_s: float
    ttft_p95_s: float
    tpot_p50_s: float
    tpot_p95_s: float


# Streams the answer of a request: yields once for each piece that arrives.
Ask = Callable[[Arrival], AsyncIterator[None]]


def arrivals(rate: float, number: int, seed: Sequence[int]) -> list[Arrival]:
    """The same for the same arguments."""
    draw = np.random.default_rng(seed)
    moments = np.cumsum(draw.exponential(1 / rate, number))
    found = []
    for moment in moments - moments[0]:
        length, num_tokens = (int(draw.integers(low, high + 1)) for low, high in (PROMPT_TOKENS, OUTPUT_TOKENS))
        prompt = tuple(int(token) for token in draw.integers(FIRST_ID, VOCAB_SIZE, length))
        found.append(Arrival(float(moment), prompt, num_tokens))
    return found


async def run_load(ask: Ask, load: list[Arrival]) -> list[Answer]:
    """Send each request at its moment; returns when all are answered."""
    started = time.monotonic()

    async def one(arrival: Arrival) -> Answer:
        due = started + arrival.at_s
        await asyncio.sleep(due - time.monotonic())
        times = []
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                async for _ in ask(arrival):
                    times.append(time.monotonic())
        except (FuselineError, OSError) as error:  # TimeoutError is one
            print(f"a request failed: {type(error).__name__}: {error}", file=sys.stderr)
            return Answer(float("inf"), float("inf"))
        return Answer(times[0] - due, (times[-1] - times[0]) / (arrival.num_tokens - 1))

    return list(await asyncio.gather(*[one(arrival) for arrival in load]))


@asynccontextmanager
async def fuseline_server(model: Path, arguments: argparse.Namespace) -> AsyncIterator[Ask]:
    """``fuseline serve``: the gateway, the controller and the workers, on Ray."""
    options = [*arguments.fuseline_options.split(), "--grpc-port", "0", "--dtype", arguments.dtype]
    options += ["--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", str(MAX_NUM_SEQS)]
    options += ["--max-num-batched-tokens", str(MAX_NUM_BATCHED_TOKENS)]
    command = [sys.executable, "-P", "-c", SERVE, "serve", str(model), *options]
    async with _process(
        command, arguments.work / "logs" / "serving-fuseline.log", {}, asyncio.subprocess.PIPE
    ) as server:
        if server.stdout is None:
            raise RuntimeError("the server has no output")
        async with asyncio.timeout(START_TIMEOUT_S):
            async for line in server.stdout:
                if line.startswith(b"ready in"):
                    address = line.decode().split(": ")[1].split()[0]
                    break
            else:
                sys.exit("fuseline serve has not become ready")
        async with AsyncClient(address) as client:

            async def ask(arrival: Arrival) -> AsyncIterator[None]:
                params = SamplingParams(max_tokens=arrival.num_tokens, temperature=0.0, ignore_eos=True)
                async with client.generate(arrival.prompt, params) as stream:
                    async for chunk in stream:
                        if chunk.token_ids:
                            yield

            yield ask


@asynccontextmanager
async def vllm_server(model: Path, arguments: argparse.Namespace) -> AsyncIterator[Ask]:
    """``vllm serve`` and its OpenAI-compatible stream."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # What ``vllm serve`` runs; that itself does not start where the package has another name, as the CPU's has.
    command = [str(arguments.vllm / "bin" / "python"), "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(model), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", arguments.vllm_dtype or arguments.dtype, "--max-model-len", str(MAX_MODEL_LEN)]
    command += ["--max-num-seqs", str(MAX_NUM_SEQS), "--max-num-batched-tokens", str(MAX_NUM_BATCHED_TOKENS)]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1"}

    async def ask(arrival: Arrival) -> AsyncIterator[None]:
        body = {
            "model": str(model),
            "prompt": list(arrival.prompt),
            "max_tokens": arrival.num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        async for event in _post(port, "/v1/completions", body):
            if event != b"[DONE]" and json.loads(event)["choices"]:
                yield

    async with _process(command, arguments.work / "logs" / "serving-vllm.log", environment) as server:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not await _is_healthy(port):
            if server.returncode is not None or time.monotonic() > deadline:
                sys.exit("vllm serve has not become ready")
            await asyncio.sleep(0.5)
        yield ask


async def _post(port: int, path: str, body: dict[str, object]) -> AsyncIterator[bytes]:
    """The server-sent events that answer a POST. Each comes in a chunk of its own, so that lines are whole."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        payload = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nConnection: close\r\n"
        writer.write(f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload)
        await writer.drain()
        status = await reader.readline()
        if b" 200 " not in status:
            raise ConnectionError(f"{status.decode().strip()}: {(await reader.read(2000)).decode(errors='replace')}")
        async for line in reader:
            if line.startswith(b"data: "):
                yield line.removeprefix(b"data: ").strip()
    finally:
        writer.close()


async def _is_healthy(port: int) -> bool:
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.write(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
    status = await reader.readline()
    writer.close()
    return b" 200 " in status


@asynccontextmanager
async def _process(
    command: list[str], log: Path, environment: dict[str, str], stdout: int | None = None
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A server in a session of its own, all of which ends with it; what it says is logged, or to be read."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdout=stdout or output,
            stderr=output,
            start_new_session=True,
            env={**os.environ, **environment},
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.communicate(), STOP_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


SERVERS = {"fuseline": fuseline_server, "vllm": vllm_server}


async def measure(arguments: argparse.Namespace) -> list[Figure]:
    """All servers under all rates, in turns."""
    model = write(arguments.model, arguments.work / "checkpoints")
    answers: dict[tuple[str, float], list[Answer]] = {}
    for number in range(arguments.rounds):
        for name in arguments.servers:
            async with SERVERS[name](model, arguments) as ask:
                await run_load(ask, arrivals(1.0, 4, seed=(number, 0)))
                for index, rate in enumerate(arguments.rates, start=1):
                    # New prompts for each, lest the second rate find them in the prefix cache.
                    found = await run_load(ask, arrivals(rate, arguments.requests, seed=(number, index)))
                    answers.setdefault((name, rate), []).extend(found)
                    figure = summarise(name, rate, found, arguments)
                    print(f"round {number + 1}, {shown(figure)}", flush=True)
    return [summarise(name, rate, found, arguments) for (name, rate), found in answers.items()]


def summarise(server: str, rate: float, answers: list[Answer], arguments: argparse.Namespace) -> Figure:
    good = sum(a.ttft_s <= arguments.ttft and a.tpot_s <= arguments.tpot for a in answers) / len(answers)
    done = [answer for answer in answers if np.isfinite(answer.ttft_s)]
    ttft = [answer.ttft_s for answer in done] or [float("nan")]
    tpot = [answer.tpot_s for answer in done] or [float("nan")]
    return Figure(
        server=server,
        requests_per_s=rate,
        num_requests=len(answers),
        num_failed=len(answers) - len(done),
        good_share=good,
        goodput_per_s=good * rate,
        ttft_p50_s=float(np.percentile(ttft, 50)),
        ttft_p95_s=float(np.percentile(ttft, 95)),
        tpot_p50_s=float(np.percentile(tpot, 50)),
        tpot_p95_s=float(np.percentile(tpot, 95)),
    )


def shown(figure: Figure) -> str:
    return (
        f"{figure.server:9} {figure.requests_per_s:5.2f}/s: goodput {figure.goodput_per_s:5.3f}/s"
        f" ({figure.good_share:4.0%} good, {figure.num_failed} failed)"
        f"  TTFT p50 {figure.ttft_p50_s:6.2f} p95 {figure.ttft_p95_s:6.2f} s"
        f"  TPOT p50 {figure.tpot_p50_s * 1e3:6.1f} p95 {figure.tpot_p95_s * 1e3:6.1f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SHAPES, default="b05b")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.1, 0.2, 0.4], help="requests per second")
    parser.add_argument("--requests", type=int, default=24, help="at each rate, in each round")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--ttft", type=float, default=5.0, help="objective, seconds")
    parser.add_argument("--tpot", type=float, default=0.2, help="objective, seconds")
    parser.add_argument("--dtype", default="bfloat16", help="of both servers")
    parser.add_argument("--vllm-dtype", help="of vLLM alone, where another serves it better")
    parser.add_argument("--vllm", type=Path, metavar="VENV", help="the virtual environment that vLLM is installed in")
    parser.add_argument("--fuseline-options", default="--prefill 0 --decode 1", help="of fuseline serve")
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=list(SERVERS))
    parser.add_argument("--work", type=Path, default=WORK, help="checkpoints and logs")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    arguments = parser.parse_args()
    if "vllm" in arguments.servers and (arguments.vllm is None or not (arguments.vllm / "bin" / "python").exists()):
        print("vllm: not installed; name its environment with --vllm")
        arguments.servers.remove("vllm")
    figures = asyncio.run(measure(arguments))
    machine = f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    print(f"\n{arguments.model} on {machine}; good: TTFT <= {arguments.ttft} s and TPOT <= {arguments.tpot} s")
    for figure in figures:
        print(shown(figure))
    if arguments.json:
        result = {
            "model": arguments.model,
            "machine": machine,
            "ttft_s": arguments.ttft,
            "tpot_s": arguments.tpot,
            "figures": [asdict(figure) for figure in figures],
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
