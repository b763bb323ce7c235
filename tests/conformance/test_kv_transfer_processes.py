"""KV transfer between processes, some of which are killed. Run as a script, this file is the other process."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from fuseline.collectives.kv_transfer import KvReceiver, Piece
from fuseline.collectives.segment import Bytes
from fuseline.runtime.errors import ProvenanceError, UnavailableError
from fuseline.runtime.handoff import KvReservation, RankEndpoint
from fuseline.runtime.sharding import KvRange
from fuseline.tests.kv_ranks import DecodeRank, PrefillRank, Servers, prompt_kv, provenance, reserve
from fuseline.tests.timing import PROMPTLY_S

NUM_TOKENS = 37
SOURCE_BLOCKS = [9, 3, 4, 5, 15, 0, 1, 11, 7, 2]
DECODE_BLOCKS = [12, 13, 2, 8, 5]
EXPECTED = provenance(NUM_TOKENS)


@pytest.fixture(params=["shm", "grpc"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def servers() -> Iterator[Servers]:
    servers = Servers()
    yield servers
    servers.close()


@pytest.fixture(autouse=True)
def no_segments_of_other_tests() -> None:
    gc.collect()
    assert mapped_segments() == 0


class Process:
    """This file in another process; lines of JSON both ways."""

    def __init__(self, role: str) -> None:
        command = [sys.executable, __file__, role]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self._process.pid

    def tell(self, **facts: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(facts) + "\n")
        self._process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def kill(self) -> None:
        """As by ``kill -9``; returns when the process is gone."""
        self._process.kill()
        self._process.communicate()


@contextmanager
def other_process(role: str) -> Iterator[Process]:
    process = Process(role)
    try:
        yield process
    finally:
        process.kill()
    assert not [path for path in Path("/dev/shm").iterdir() if "fuseline" in path.name]  # noqa: S108


def mapped_segments() -> int:
    """Segments of KV transfer in this process' memory."""
    return Path("/proc/self/maps").read_text().count("fuseline-kv")


def unmapped() -> bool:
    """Whether all segments are unmapped promptly."""
    deadline = time.monotonic() + PROMPTLY_S
    while mapped_segments() and time.monotonic() < deadline:
        threading.Event().wait(0.02)
    return mapped_segments() == 0


def test_between_processes(transport: str) -> None:
    kv = prompt_kv(NUM_TOKENS)
    rank = PrefillRank(kv, SOURCE_BLOCKS)
    with other_process("decode") as decode:
        decode.tell(transport=transport, held_back=False)
        reservation = reservation_from(decode.hear())
        rank.sender.start(reservation, SOURCE_BLOCKS)
        for layer in rank.layers:
            rank.sender.push(reservation.reservation_id, layer, 0, NUM_TOKENS)
        summary = rank.sender.finish(reservation.reservation_id).result(30)
        assert (summary.transport, summary.num_bytes) == (transport, kv.nbytes)
        decode.tell(verify=True)
        assert decode.hear() == {"kv": kv.flatten().tolist()}
    rank.sender.close()
    assert unmapped()


def test_killed_receiver_is_noticed_at_once(transport: str) -> None:
    rank = PrefillRank(prompt_kv(NUM_TOKENS), SOURCE_BLOCKS)
    with other_process("decode") as decode:
        decode.tell(transport=transport, held_back=True)
        reservation = reservation_from(decode.hear())
        rank.sender.start(reservation, SOURCE_BLOCKS)
        future = rank.sender.finish(reservation.reservation_id)
        assert decode.hear() == {"entered": True}
        assert not future.done()
        decode.kill()
        with pytest.raises(UnavailableError):
            future.result(timeout=PROMPTLY_S)
    assert rank.sender.stats().num_open == 0
    rank.sender.close()
    assert unmapped()


def test_killed_sender_leaves_nothing_behind(servers: Servers, transport: str) -> None:
    decode = DecodeRank(servers, transport)
    handoff = reserve([decode], EXPECTED, DECODE_BLOCKS)
    with other_process("prefill") as prefill:
        prefill.tell(**asdict(handoff.reservation.endpoints[0]), reservation_id=handoff.id)
        assert prefill.hear() == {"acknowledged": 3}  # of five layers; the others will never come
        if transport == "shm":
            assert mapped_segments() == 1
        prefill.kill()
        assert unmapped()
    with pytest.raises(ProvenanceError, match="layer 3"):
        decode.receiver.verify(handoff.id, EXPECTED)
    assert torch.equal(decode.read(NUM_TOKENS, DECODE_BLOCKS)[:3], prompt_kv(NUM_TOKENS)[:3])
    decode.receiver.close(handoff.id)
    assert decode.receiver.stats().num_open == 0


def reservation_from(facts: dict[str, Any]) -> KvReservation:
    endpoint = RankEndpoint(0, facts["address"], facts["host_id"], KvRange(**facts["kv_range"]))
    return KvReservation(facts["reservation_id"], EXPECTED, 0, (endpoint,))


def say(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


class HeldBackReceiver(KvReceiver):
    """Says when the first piece has come, and never gets any further."""

    def accept(self, piece: Piece, data: Bytes) -> None:
        say(entered=True)
        threading.Event().wait()


def be_decode() -> None:
    """Reserve, and answer with the KV when all has come."""
    order = json.loads(sys.stdin.readline())
    servers = Servers()
    receiver_class = HeldBackReceiver if order["held_back"] else KvReceiver
    decode = DecodeRank(servers, order["transport"], receiver_class=receiver_class)
    handoff = reserve([decode], EXPECTED, DECODE_BLOCKS)
    say(**asdict(decode.endpoint), reservation_id=handoff.id)
    sys.stdin.readline()
    decode.receiver.verify(handoff.id, EXPECTED)
    say(kv=decode.read(NUM_TOKENS, DECODE_BLOCKS).flatten().tolist())
    sys.stdin.readline()


def be_prefill() -> None:
    """Push three of five layers, tell when they are acknowledged, and wait for the end."""
    facts = json.loads(sys.stdin.readline())
    rank = PrefillRank(prompt_kv(NUM_TOKENS), SOURCE_BLOCKS)
    reservation = reservation_from(facts)
    rank.sender.start(reservation, SOURCE_BLOCKS)
    for layer in range(3):
        rank.sender.push(reservation.reservation_id, layer, 0, NUM_TOKENS)
    layer_bytes = prompt_kv(NUM_TOKENS)[0].nbytes
    while rank.sender.stats().num_bytes < 3 * layer_bytes:
        threading.Event().wait(0.01)
    say(acknowledged=rank.sender.stats().num_bytes // layer_bytes)
    threading.Event().wait()


if __name__ == "__main__":
    {"decode": be_decode, "prefill": be_prefill}[sys.argv[1]]()
