"""KV handed from one group to another by the executors' calls, and let go of when a prefill is preempted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fuseline.collectives.kv_transfer import KvReceiver, KvSender
from fuseline.runtime.config import SchedulerConfig
from fuseline.runtime.errors import AlreadyExistsError, NotFoundError, ProvenanceError, UnavailableError
from fuseline.runtime.handoff import KvReservation, Provenance, RankEndpoint, token_prefix_hash
from fuseline.runtime.plan import AdmittedSequence, Int32Array, StepPlan
from fuseline.runtime.request import Phase, Request
from fuseline.runtime.sampling_params import SamplingParams
from fuseline.runtime.sharding import ModelShape, ParallelConfig, kv_range
from fuseline.tests.workers.llm_cases import write_tiny
from fuseline.workers.group import GroupConfig, ModelGroup
from fuseline.workers.handoffs import KvPush, RankHandoffs
from fuseline.workers.kv_server import KvServer

TIMEOUT_S = 20.0
SHAPE = ModelShape(2, 2, 2, 4, 8, 8, 16)
BLOCK_SIZE = 4
Transfer = tuple[torch.Tensor, torch.Tensor, KvSender, RankHandoffs, KvReservation]


def start_group(path: Path, tp: int = 1, block_size: int = 4) -> ModelGroup:
    return ModelGroup.start(
        GroupConfig(
            model=str(path),
            device="cpu",
            max_model_len=64,
            block_size=block_size,
            num_kv_blocks=64,
            parallel=ParallelConfig(tp),
            scheduler=SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=8),
            transfers_kv=True,
        )
    )


def run(group: ModelGroup, request_id: str) -> list[int]:
    tokens: list[int] = []
    while group.engine.has_unfinished:
        for output in group.engine.step():
            if output.request_id == request_id:
                tokens += output.token_ids
    return tokens


def test_a_sequence_continues_on_another_group_of_another_layout(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    prefill, decode = start_group(tmp_path), start_group(tmp_path, tp=2, block_size=8)
    assert decode.kv_receiver is not None
    server = KvServer(decode.kv_receiver, "127.0.0.1")
    try:
        params = SamplingParams(max_tokens=12, ignore_eos=True)
        prompt = tuple(range(3, 32))
        prefill.engine.add_request(Request("whole", prompt, params, seed=4))
        expected = run(prefill, "whole")

        model = decode.engine_config.model
        provenance = Provenance("r", 0, model.fingerprint, token_prefix_hash(prompt), len(prompt), model.dtype)
        reserved = decode.engine.reserve(Request("r", prompt, params, seed=4, phase=Phase.DECODE))
        endpoints = decode.kv_endpoints(server.address)
        assert [endpoint.rank for endpoint in endpoints] == [0, 1]
        assert len({endpoint.address for endpoint in endpoints}) == 2
        reservation = KvReservation("secret", provenance, reserved.num_cached_tokens, endpoints)
        decode.executor.open_reservation(reservation, reserved.block_ids).result(TIMEOUT_S)
        with pytest.raises(AlreadyExistsError):
            decode.executor.open_reservation(reservation, reserved.block_ids).result(TIMEOUT_S)
        with pytest.raises(ProvenanceError):  # nothing has arrived yet
            decode.executor.verify_reservation("secret", provenance).result(TIMEOUT_S)

        prefill.executor.start_handoff("r", reservation).result(TIMEOUT_S)
        with pytest.raises(NotFoundError, match="not been computed"):
            prefill.executor.finish_handoff("r").result(TIMEOUT_S)
        prefill.engine.add_request(Request("r", prompt, params, seed=4, phase=Phase.PREFILL))
        first = run(prefill, "r")
        summary = prefill.executor.finish_handoff("r").result(TIMEOUT_S)
        assert summary.num_bytes == len(prompt) * 3 * 2 * 2 * 16 * 4  # layers, K and V, heads, head_dim, float32
        assert summary.transport in ("shm", "grpc")
        prefill.executor.cancel_handoff("r").result(TIMEOUT_S)  # idempotent
        prefill.engine.release_handoff("r")

        decode.executor.verify_reservation("secret", provenance).result(TIMEOUT_S)
        decode.executor.close_reservation("secret").result(TIMEOUT_S)
        with pytest.raises(NotFoundError):
            decode.executor.verify_reservation("secret", provenance).result(TIMEOUT_S)
        decode.engine.commit("r", first[0])
        assert first + run(decode, "r") == expected
        prefill.engine.check_integrity()
        decode.engine.check_integrity()
    finally:
        server.close()
        prefill.close()
        decode.close()


# --- one rank's book-keeping, over a real sender and receiver -----------------------------------------------------


def new_cache(blocks: int, fill: float = 0.0) -> torch.Tensor:
    held = kv_range(SHAPE, ParallelConfig(), 0)
    return torch.full((held.num_layers, 2, blocks, held.num_heads, BLOCK_SIZE, SHAPE.head_dim), fill)


@pytest.fixture
def transfer() -> Iterator[Transfer]:
    """Handoffs from a cache of 8 blocks into one of 4, reserved for 7 tokens in blocks 3 and 1."""
    source, target = new_cache(8), new_cache(4)
    receiver = KvReceiver(target, kv_range(SHAPE, ParallelConfig(), 0))
    server = KvServer(receiver, "127.0.0.1")
    provenance = Provenance("r", 0, "f" * 64, b"h" * 32, 7, "float32")
    endpoint = RankEndpoint(0, server.address, receiver.host_id, receiver.kv_range)
    reservation = KvReservation("secret", provenance, 0, (endpoint,))
    receiver.open("secret", provenance, (3, 1), 0)
    sender = KvSender(source, SHAPE, ParallelConfig(), 0)
    yield source, target, sender, RankHandoffs(sender), reservation
    sender.close()
    server.close()


def make_plan(
    step_id: int,
    rows: Sequence[int] = (),
    positions: Sequence[int] = (),
    num_tokens: Sequence[int] = (),
    **changes: Any,
) -> StepPlan:
    def int32(values: Sequence[int]) -> Int32Array:
        return np.asarray(values, np.int32)

    return StepPlan(
        step_id, int32(rows), int32(num_tokens), int32(positions), int32([-1] * len(rows)),
        np.zeros(len(rows), np.bool_), **changes,
    )  # fmt: skip


def admit(block_ids: tuple[int, ...], row: int = 0, num_computed: int = 0, handoff_id: str = "r") -> AdmittedSequence:
    return AdmittedSequence(row, "r", tuple(range(7)), 7, block_ids, num_computed, SamplingParams(), 0, handoff_id)


def test_each_step_pushes_what_it_computes_and_first_what_was_cached(transfer: Transfer) -> None:
    _, _, _, handoffs, reservation = transfer
    handoffs.start("r", reservation)
    with pytest.raises(AlreadyExistsError):
        handoffs.start("r", reservation)
    admitted = (admit((4, 5), num_computed=4), admit((6, 7), row=1, handoff_id=""))
    pushes = handoffs.observe(make_plan(0, [1, 0], [0, 4], [7, 2], admitted=admitted))
    assert pushes == (KvPush("secret", 0, 6),)
    assert handoffs.observe(make_plan(1, [0], [6], [1])) == (KvPush("secret", 6, 7),)
    assert handoffs.observe(make_plan(2, released=(0, 1))) == ()


def test_a_preempted_prefill_is_sent_anew_from_its_new_blocks(transfer: Transfer) -> None:
    source, target, sender, handoffs, reservation = transfer
    handoffs.start("r", reservation)
    source[:, :, [4, 5]] = 1.0
    for push in handoffs.observe(make_plan(0, [0], [0], [5], admitted=(admit((4, 5)),))):
        sender.push(push.reservation_id, 0, push.start, push.end)
    handoffs.observe(make_plan(1, released=(0,)))
    source[:, :, [4, 5]] = -1.0  # another sequence's by now; the same prompt in new blocks computes to the same
    source[:, :, [2, 6]] = 1.0
    with pytest.raises(NotFoundError):
        handoffs.finish("r")
    for push in handoffs.observe(make_plan(2, [0], [0], [7], admitted=(admit((2, 6)),))):
        for layer in range(SHAPE.num_layers):
            sender.push(push.reservation_id, layer, push.start, push.end)
    handoffs.observe(make_plan(3, released=(0,)))
    handoffs.finish("r").result(TIMEOUT_S)
    assert (target[:, :, 3] == 1.0).all()
    assert (target[:, :, 1, :, :3] == 1.0).all()
    assert (target[:, :, [0, 2]] == 0.0).all()


def test_a_handoff_that_cannot_begin_fails_when_it_is_finished(transfer: Transfer) -> None:
    _, _, sender, handoffs, reservation = transfer
    sender.close()
    handoffs.start("r", reservation)
    handoffs.observe(make_plan(0, [0], [0], [7], admitted=(admit((4, 5)),)))
    with pytest.raises(UnavailableError, match="closed"):
        handoffs.finish("r")
    handoffs.cancel("r")
    handoffs.cancel("r")
    with pytest.raises(NotFoundError):
        handoffs.finish("r")


def test_a_cancelled_handoff_is_not_begun_again(transfer: Transfer) -> None:
    _, _, sender, handoffs, reservation = transfer
    handoffs.start("r", reservation)
    handoffs.observe(make_plan(0, [0], [0], [3], admitted=(admit((4, 5)),)))
    handoffs.cancel("r")
    handoffs.observe(make_plan(1, released=(0,)))
    assert handoffs.observe(make_plan(2, [0], [0], [7], admitted=(admit((4, 5)),))) == ()
    assert sender.stats().num_open == 0
