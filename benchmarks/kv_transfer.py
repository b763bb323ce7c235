"""KV transfer between two processes of this host, all checks included, beside what the bare transports do.

    python -m benchmarks.kv_transfer [--rounds N] [--json PATH]

A prompt's KV (16 layers, 8 KV heads of 128, bfloat16, 2048 tokens: 128 MiB) goes from one paged cache to another,
from one process to another, through shared memory and over gRPC. In the same round, the same number of bytes goes

- through shared memory by a plain copy in, then a plain copy out, 2 MiB at a time, contiguous, signalled by a byte on
  a socket; and once more with six such slots, so that both processes copy at the same time,
- over a bare gRPC stream of 1 MiB messages to a third process, as raw bytes, answered one by one, eight in flight,
- over a TCP connection.

The ratio is taken within each round, since a busy machine slows all of them down; medians over the rounds are shown.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import torch

from fuseline.collectives.kv_transfer import KvReceiver, KvSender, KvTransferServicer, host_id
from fuseline.collectives.segment import OwnedSegment, attach_segment
from fuseline.runtime.handoff import KvReservation, Provenance, RankEndpoint
from fuseline.runtime.sharding import ModelShape, ParallelConfig, kv_range

SHAPE = ModelShape(
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    hidden_size=4096,
    intermediate_size=14336,
    vocab_size=128_256,
)
NUM_TOKENS, BLOCK_SIZE = 2048, 16
NUM_BLOCKS = NUM_TOKENS // BLOCK_SIZE
PARALLEL = ParallelConfig()
NUM_BYTES = SHAPE.num_layers * 2 * NUM_TOKENS * SHAPE.num_kv_heads * SHAPE.head_dim * 2
MIB = 1 << 20
SLOT_BYTES, NUM_SLOTS = 2 * MIB, 6
MESSAGE_BYTES, NUM_IN_FLIGHT = MIB, 8
TARGETS = {"shm": 0.7, "grpc": 0.8}
PROVENANCE = Provenance("benchmark", 0, "fingerprint", b"prefix", NUM_TOKENS, "bfloat16")


def empty_cache() -> torch.Tensor:
    shape = (SHAPE.num_layers, 2, NUM_BLOCKS, SHAPE.num_kv_heads, BLOCK_SIZE, SHAPE.head_dim)
    return torch.zeros(shape, dtype=torch.bfloat16)


def shuffled_blocks(seed: int) -> list[int]:
    """A block table as a pool gives it out after a while: no two blocks adjacent but by chance."""
    return [int(block_id) for block_id in np.random.default_rng(seed).permutation(NUM_BLOCKS)]


class DecodeSide:
    """The second process: a KV receiver, and the far ends of the bare transports."""

    def __init__(self) -> None:
        self.cache = empty_cache()
        self.receiver = KvReceiver(self.cache, kv_range(SHAPE, PARALLEL, 0))
        self.sink = np.ones(NUM_BYTES, np.uint8)

    async def serve(self) -> None:
        server = grpc.aio.server()
        servicer = KvTransferServicer(self.receiver, no_control_calls, no_control_calls)
        servicer.add_to_server(server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._serve_sockets, args=(listener,), daemon=True).start()
        tell(grpc=port, socket=listener.getsockname()[1])
        while line := await asyncio.to_thread(sys.stdin.readline):
            command = json.loads(line)
            if "open" in command:
                self.receiver.open(command["open"], PROVENANCE, shuffled_blocks(2), 0)
            else:
                self.receiver.verify(command["verify"], PROVENANCE)
                self.receiver.close(command["verify"])
            tell(done=True)
        await server.stop(0)
        servicer.close()

    def _serve_sockets(self, listener: socket.socket) -> None:
        while True:
            connection, _ = listener.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with connection, connection.makefile("rb") as commands:
                while line := commands.readline():
                    command = json.loads(line)
                    if command["transport"] == "tcp":
                        connection.sendall(b"k")  # nothing may follow the command until it is read
                        receive_exactly(connection, self.sink)
                        connection.sendall(b"k")
                    else:
                        self._copy_out(connection, attach_segment(**command["segment"]))

    def _copy_out(self, signals: socket.socket, segment: np.ndarray) -> None:
        signals.sendall(b"k")  # attached
        for start in range(0, NUM_BYTES, SLOT_BYTES):
            slot = start % len(segment)
            signals.recv(1)
            np.copyto(self.sink[start : start + SLOT_BYTES], segment[slot : slot + SLOT_BYTES])
            signals.sendall(b"k")


async def serve_bare() -> None:
    """The third process: takes messages and looks at none."""

    async def push(messages: AsyncIterator[bytes], _context: object) -> AsyncIterator[bytes]:
        async for _ in messages:
            yield b"k"

    server = grpc.aio.server()
    handlers = {"Push": grpc.stream_stream_rpc_method_handler(push)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("Bare", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    tell(grpc=port)
    await asyncio.to_thread(sys.stdin.readline)
    await server.stop(0)


async def no_control_calls(_request: Any, _context: Any) -> Any:
    raise NotImplementedError("this benchmark pushes only")


def tell(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


def receive_exactly(connection: socket.socket, into: np.ndarray) -> None:
    view, position = into.data, 0
    while position < len(view):
        position += connection.recv_into(view[position : position + 4 * MIB])


class PrefillSide:
    """This process: each method moves the same number of bytes to the other one and returns the seconds it took."""

    def __init__(self) -> None:
        self._peer, ports = start_process("--decode-side")
        self._bare_peer, bare_ports = start_process("--bare-side")
        self._address = f"127.0.0.1:{ports['grpc']}"
        self._socket = socket.create_connection(("127.0.0.1", ports["socket"]))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._channel = grpc.insecure_channel(f"127.0.0.1:{bare_ports['grpc']}")
        self._segment = OwnedSegment(SLOT_BYTES * NUM_SLOTS)
        self._source = np.random.default_rng(0).integers(0, 256, NUM_BYTES, np.uint8)
        cache = empty_cache()
        cache.view(torch.uint8).view(-1).copy_(torch.from_numpy(self._source))
        self._sender = KvSender(cache, SHAPE, PARALLEL, 0)
        self._remote_sender = KvSender(cache, SHAPE, PARALLEL, 0)
        self._num_transfers = 0

    def close(self) -> None:
        self._sender.close()
        self._remote_sender.close()
        self._segment.close()
        self._channel.close()
        self._socket.close()
        self._peer.communicate()
        self._bare_peer.communicate()

    def kv_shm(self) -> float:
        return self._transfer(self._sender, host_id(), "shm")

    def kv_grpc(self) -> float:
        return self._transfer(self._remote_sender, "another host", "grpc")

    def plain_shm(self) -> float:
        return self._copy_through(num_slots=1)

    def overlapped_shm(self) -> float:
        return self._copy_through(NUM_SLOTS)

    def _copy_through(self, num_slots: int) -> float:
        segment = self._segment
        offer = {"pid": segment.pid, "fd": segment.fd, "name": segment.name, "num_bytes": len(segment.data)}
        self._socket.sendall(json.dumps({"transport": "shm", "segment": offer}).encode() + b"\n")
        self._socket.recv(1)
        free = num_slots
        started = time.perf_counter()
        for start in range(0, NUM_BYTES, SLOT_BYTES):
            if not free:
                free += len(self._socket.recv(NUM_SLOTS))
            slot = start % len(segment.data)
            np.copyto(segment.data[slot : slot + SLOT_BYTES], self._source[start : start + SLOT_BYTES])
            free -= 1
            self._socket.sendall(b"k")
        while free < num_slots:
            free += len(self._socket.recv(NUM_SLOTS))
        return time.perf_counter() - started

    def bare_grpc(self) -> float:
        in_flight = threading.Semaphore(NUM_IN_FLIGHT)
        payload = self._source[:MESSAGE_BYTES].tobytes()

        def messages() -> Iterator[bytes]:
            for _ in range(NUM_BYTES // MESSAGE_BYTES):
                in_flight.acquire()
                yield payload

        started = time.perf_counter()
        for _ in self._channel.stream_stream("/Bare/Push", None, None)(messages()):
            in_flight.release()
        return time.perf_counter() - started

    def tcp(self) -> float:
        self._socket.sendall(b'{"transport": "tcp"}\n')
        self._socket.recv(1)
        started = time.perf_counter()
        for start in range(0, NUM_BYTES, MESSAGE_BYTES):
            self._socket.sendall(self._source[start : start + MESSAGE_BYTES].data)
        self._socket.recv(1)
        return time.perf_counter() - started

    def _transfer(self, sender: KvSender, peer_host_id: str, transport: str) -> float:
        self._num_transfers += 1
        reservation_id = f"benchmark-{self._num_transfers}"
        endpoint = RankEndpoint(0, self._address, peer_host_id, kv_range(SHAPE, PARALLEL, 0))
        self._ask(open=reservation_id)
        started = time.perf_counter()
        sender.start(KvReservation(reservation_id, PROVENANCE, 0, (endpoint,)), shuffled_blocks(1))
        for layer in range(SHAPE.num_layers):
            sender.push(reservation_id, layer, 0, NUM_TOKENS)
        summary = sender.finish(reservation_id).result(timeout=120)
        elapsed = time.perf_counter() - started
        assert (summary.num_bytes, summary.transport) == (NUM_BYTES, transport)
        self._ask(verify=reservation_id)
        return elapsed

    def _ask(self, **command: object) -> None:
        assert self._peer.stdin is not None
        self._peer.stdin.write(json.dumps(command) + "\n")
        self._peer.stdin.flush()
        assert hear(self._peer) == {"done": True}


def start_process(role: str) -> tuple[subprocess.Popen[str], dict[str, Any]]:
    command = [sys.executable, "-m", "benchmarks.kv_transfer", role]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return process, hear(process)


def hear(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    facts: dict[str, Any] = json.loads(process.stdout.readline())
    return facts


@dataclass(frozen=True)
class Figures:
    """Throughputs in GB/s (1e9 bytes), medians over the rounds; ratios are medians of per-round ratios."""

    num_bytes: int
    num_rounds: int
    gb_per_s: dict[str, float]
    ratio: dict[str, float]
    target: dict[str, float]
    machine: str


def measure(num_rounds: int) -> Figures:
    side = PrefillSide()
    ways: tuple[Callable[[], float], ...] = (
        side.kv_shm,
        side.plain_shm,
        side.overlapped_shm,
        side.kv_grpc,
        side.bare_grpc,
        side.tcp,
    )
    try:
        for way in ways:
            way()  # connects, touches every page
        rounds = [{way.__name__: way() for way in ways} for _ in range(num_rounds)]
    finally:
        side.close()
    return Figures(
        num_bytes=NUM_BYTES,
        num_rounds=num_rounds,
        gb_per_s={
            way.__name__: NUM_BYTES / 1e9 / statistics.median(seconds[way.__name__] for seconds in rounds)
            for way in ways
        },
        ratio={
            "shm": statistics.median(seconds["plain_shm"] / seconds["kv_shm"] for seconds in rounds),
            "shm, overlapped": statistics.median(seconds["overlapped_shm"] / seconds["kv_shm"] for seconds in rounds),
            "grpc": statistics.median(seconds["bare_grpc"] / seconds["kv_grpc"] for seconds in rounds),
        },
        target=TARGETS,
        machine=f"{platform.machine()}, {len(os.sched_getaffinity(0))} CPUs",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="KV transfer throughput between two processes of this host")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    for role in ("--decode-side", "--bare-side"):
        parser.add_argument(role, action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.decode_side:
        asyncio.run(DecodeSide().serve())
        return
    if arguments.bare_side:
        asyncio.run(serve_bare())
        return
    figures = measure(arguments.rounds)
    names = {
        "kv_shm": "KV transfer, shared memory",
        "plain_shm": "plain copy in, then out, shared memory",
        "overlapped_shm": "plain copy in and out at the same time",
        "kv_grpc": "KV transfer, gRPC",
        "bare_grpc": "bare gRPC stream, 1 MiB messages",
        "tcp": "TCP",
    }
    print(f"{figures.num_bytes / MIB:.0f} MiB, median of {figures.num_rounds} interleaved rounds, {figures.machine}")
    for name, gb_per_s in figures.gb_per_s.items():
        print(f"{names[name]:<40} {gb_per_s:6.2f} GB/s")
    for name, ratio in figures.ratio.items():
        target = f" (target {figures.target[name]})" if name in figures.target else ""
        print(f"{name}: {ratio:.2f} of the bare transport{target}")
    if arguments.json:
        arguments.json.write_text(json.dumps(asdict(figures), indent=2) + "\n")


if __name__ == "__main__":
    main()
