"""How long ``fuseline serve`` takes to its first token, and what an idle cluster holds in memory.

    python -m benchmarks.startup [--model demo] [--prefill 1] [--decode 2] [--rounds 3] [--json PATH]

Each round starts the command anew in an empty folder and tells the time of each phase by its output: until Ray is
being started (imports, model and tokenizer), until the replicas are (Ray and the controller), until all are ready
(worker processes, weights, KV pool), until the first token of a first request. Medians over the rounds are shown.
Memory is read of every process that descends from the command once that request is done: resident (RSS), which counts
shared pages in every process, and proportional (PSS), which can be added up. CPU seconds say what the start costs
whatever else the machine is doing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from fuseline.cluster.client import Client
from fuseline.cluster.processes import descendants
from fuseline.runtime.sampling_params import SamplingParams

PHASES = {"starting Ray": "imports_s", "loading on": "ray_s", "ready in": "workers_s"}
SERVE = "from fuseline.cluster.cli import main; main()"
START_TIMEOUT_S, STOP_TIMEOUT_S = 600.0, 60.0


@dataclass(frozen=True, slots=True)
class ProcessUse:
    """What one process of the cluster holds and has used so far."""

    name: str
    rss_mib: float
    pss_mib: float
    cpu_s: float


@dataclass(frozen=True, slots=True)
class Round:
    """Seconds of each phase, their sum, what it took to stop, and the memory in between."""

    imports_s: float
    ray_s: float
    workers_s: float
    first_token_s: float
    total_s: float
    stop_s: float
    processes: tuple[ProcessUse, ...]


def measure(model: str, prefill: int, decode: int) -> Round:
    options = ["--prefill", str(prefill), "--decode", str(decode), "--grpc-port", "0"]
    with tempfile.TemporaryDirectory() as folder:
        started_at = time.monotonic()
        server = subprocess.Popen(
            [sys.executable, "-P", "-c", SERVE, "serve", model, *options],
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
        )
        try:
            return _run(server, started_at)
        finally:
            server.kill()
            server.wait()


def _run(server: subprocess.Popen[str], started_at: float) -> Round:
    times = {"": started_at}
    address = _follow(server, times)
    with Client(address) as client, client.generate("Once upon a time", SamplingParams(max_tokens=1)) as stream:
        next(stream)
        times["first_token_s"] = time.monotonic()
        list(stream)
    processes = tuple(sorted(_use_of(server.pid), key=lambda process: -process.pss_mib))
    stopped_at = time.monotonic()
    server.send_signal(signal.SIGTERM)
    server.wait(STOP_TIMEOUT_S)
    names, moments = list(times), list(times.values())
    spans = {name: moment - before for name, before, moment in zip(names[1:], moments, moments[1:], strict=False)}
    return Round(
        **spans,
        total_s=times["first_token_s"] - started_at,
        stop_s=time.monotonic() - stopped_at,
        processes=processes,
    )


def _follow(server: subprocess.Popen[str], times: dict[str, float]) -> str:
    """Note when each phase ends, in order; returns the gateway's address once it is told."""
    assert server.stdout is not None
    said = []
    for line in server.stdout:
        said.append(line)
        for start, name in PHASES.items():
            if line.startswith(start) and name not in times:
                times[name] = time.monotonic()
        if line.startswith("ready in"):
            return line.split(": ")[1].split()[0]
        if time.monotonic() > times[""] + START_TIMEOUT_S:
            break
    sys.exit("".join(["fuseline serve has not become ready:\n", *said]))


def _use_of(pid: int) -> list[ProcessUse]:
    pids = [pid, *(process.pid for process in descendants(pid))]
    found = []
    for each in pids:
        command = Path(f"/proc/{each}/cmdline").read_bytes().decode().replace("\0", " ").strip()
        lines = Path(f"/proc/{each}/smaps_rollup").read_text().splitlines()[1:]
        kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        stat = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
        cpu_s = (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")
        found.append(ProcessUse(_name(command), kib["Rss"] / 1024, kib["Pss"] / 1024, cpu_s))
    return found


def _name(command: str) -> str:
    """What a process is, in a few words."""
    if command.startswith("ray::"):
        return command.split(".")[0]
    if SERVE in command:
        return "fuseline serve (gateway)"
    return next((Path(word).name for word in command.split() if "/ray/" in word), command[:40])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--prefill", type=int, default=1)
    parser.add_argument("--decode", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the rounds there")
    args = parser.parse_args()
    rounds = [measure(args.model, args.prefill, args.decode) for _ in range(args.rounds)]

    def median(of: Callable[[Round], float]) -> float:
        return statistics.median(of(each) for each in rounds)

    print(
        f"{args.model}, prefill {args.prefill}, decode {args.decode}; {platform.machine()}, {os.cpu_count()} cores,"
    )
    print(f"load {os.getloadavg()[0]:.1f}; median (range) of {args.rounds} rounds, in seconds")
    for name in ("imports_s", "ray_s", "workers_s", "first_token_s", "total_s", "stop_s"):
        values = [getattr(each, name) for each in rounds]
        print(f"  {name:14} {statistics.median(values):7.2f}  ({min(values):.2f} to {max(values):.2f})")
    print("processes of the last round: resident MiB, proportional MiB, CPU seconds until then")
    for process in rounds[-1].processes:
        print(f"  {process.rss_mib:7.0f} {process.pss_mib:7.0f} {process.cpu_s:7.2f}  {process.name}")
    pss_mib = median(lambda each: sum(process.pss_mib for process in each.processes))
    cpu_s = median(lambda each: sum(process.cpu_s for process in each.processes))
    print(f"  {'':7} {pss_mib:7.0f} {cpu_s:7.2f}  all, median of the rounds")
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(each) for each in rounds], indent=1))


if __name__ == "__main__":
    main()
