"""Conversions lose nothing, absent stays absent, and what does not fit is refused by name."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuseline.cluster.generation import GenerateSummary
from fuseline.cluster.status import ReplicaLoad
from fuseline.proto.fuseline.v1 import common_pb2, inference_pb2, worker_pb2
from fuseline.runtime.errors import ErrorCode, InvalidArgumentError
from fuseline.runtime.handoff import KvReservation, Provenance, RankEndpoint
from fuseline.runtime.request import FinishReason, Phase, Request, SequenceOutput, TokenLogprobs
from fuseline.runtime.sampling_params import MAX_SEED, SamplingParams
from fuseline.runtime.sharding import KvRange
from fuseline.workers import wire

token_ids = st.integers(0, 2**31 - 1)
texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
uint32 = st.integers(0, 2**32 - 1)


@st.composite
def sampling_params(draw: st.DrawFn) -> SamplingParams:
    max_tokens = draw(st.integers(1, 2**31 - 1))
    return SamplingParams(
        n=draw(st.integers(1, 128)),
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, max_tokens)),
        temperature=draw(st.floats(0, 100)),
        top_k=draw(st.integers(-1, 2**31 - 1)),
        top_p=draw(st.floats(0, 1, exclude_min=True)),
        min_p=draw(st.floats(0, 1)),
        repetition_penalty=draw(st.floats(0, 100, exclude_min=True)),
        presence_penalty=draw(st.floats(-2, 2)),
        frequency_penalty=draw(st.floats(-2, 2)),
        logit_bias=draw(st.dictionaries(token_ids, st.floats(-100, 100), max_size=4)),
        stop=tuple(draw(st.lists(texts, max_size=4))),
        stop_token_ids=tuple(draw(st.lists(token_ids, max_size=4))),
        include_stop_str_in_output=draw(st.booleans()),
        ignore_eos=draw(st.booleans()),
        seed=draw(st.none() | st.integers(0, MAX_SEED)),
        logprobs=draw(st.none() | st.integers(0, 20)),
        prompt_logprobs=draw(st.none() | st.integers(0, 20)),
    )


requests = st.builds(
    Request,
    request_id=texts,
    prompt_token_ids=st.lists(token_ids, min_size=1, max_size=8).map(tuple),
    params=sampling_params(),
    seed=st.integers(0, MAX_SEED),
    priority=st.integers(-(2**31), 2**31 - 1),
    deadline=st.just(12.5),
    cache_salt=st.just("") | texts,
    phase=st.sampled_from(Phase),
    epoch=uint32,
)
logprobs = st.builds(
    TokenLogprobs,
    token_id=token_ids,
    logprob=st.floats(max_value=0),
    rank=st.integers(1, 2**31),
    top=st.lists(st.tuples(token_ids, st.floats(max_value=0)), max_size=3).map(tuple),
)
outputs = st.builds(
    SequenceOutput,
    request_id=texts,
    token_ids=st.lists(token_ids, max_size=4).map(tuple),
    logprobs=st.lists(logprobs, max_size=3).map(tuple),
    prompt_logprobs=st.none() | st.lists(logprobs, min_size=1, max_size=3).map(tuple),
    num_cached_tokens=uint32,
    finish_reason=st.none() | st.sampled_from(FinishReason),
    error_code=st.none() | st.sampled_from(ErrorCode),
    error=st.text(st.characters(codec="utf-8"), max_size=20),
)
provenances = st.builds(
    Provenance,
    request_id=texts,
    epoch=uint32,
    model_fingerprint=texts,
    prefix_hash=st.binary(min_size=32, max_size=32),
    num_tokens=st.integers(1, 2**24),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)


@st.composite
def reservations(draw: st.DrawFn) -> KvReservation:
    provenance = draw(provenances)
    endpoints = tuple(
        RankEndpoint(rank, draw(texts), draw(texts), KvRange(rank, rank + 1 + draw(st.integers(0, 9)), 0, 2))
        for rank in range(draw(st.integers(1, 4)))
    )
    num_cached_tokens = draw(st.integers(0, provenance.num_tokens - 1))
    return KvReservation(draw(texts), provenance, num_cached_tokens, endpoints)


@given(sampling_params())
@settings(max_examples=60, deadline=None)
def test_sampling_params_survive(params: SamplingParams) -> None:
    sent = wire.sampling_params_to_wire(params).SerializeToString()
    assert wire.sampling_params_from_wire(common_pb2.SamplingParams.FromString(sent)) == params


@given(requests)
@settings(max_examples=60, deadline=None)
def test_requests_survive(request: Request) -> None:
    sent = wire.request_to_wire(request).SerializeToString()
    received = wire.request_from_wire(common_pb2.SequenceRequest.FromString(sent), request.phase, request.deadline)
    assert received == request


@given(outputs)
@settings(max_examples=60, deadline=None)
def test_outputs_survive(output: SequenceOutput) -> None:
    sent = wire.output_to_wire(output).SerializeToString()
    assert wire.output_from_wire(common_pb2.SequenceOutput.FromString(sent), output.request_id) == output


@given(reservations())
@settings(max_examples=40, deadline=None)
def test_reservations_survive(reservation: KvReservation) -> None:
    sent = wire.reservation_to_wire(reservation).SerializeToString()
    assert wire.reservation_from_wire(worker_pb2.KvReservation.FromString(sent)) == reservation


def test_an_absent_field_means_the_default_and_a_zero_means_zero() -> None:
    assert wire.sampling_params_from_wire(common_pb2.SamplingParams()) == SamplingParams()
    assert wire.sampling_params_from_wire(common_pb2.SamplingParams(temperature=0, seed=0, logprobs=0)) == (
        SamplingParams(temperature=0.0, seed=0, logprobs=0)
    )


def test_every_sampling_field_is_converted() -> None:
    on_wire = {field.name for field in common_pb2.SamplingParams.DESCRIPTOR.fields}
    assert on_wire == {field.name for field in dataclasses.fields(SamplingParams)}
    every = SamplingParams(
        logit_bias={3: 1.5}, stop=("x",), stop_token_ids=(7,), seed=5, logprobs=2, prompt_logprobs=3
    )
    message = wire.sampling_params_to_wire(every)
    assert {field.name for field, _ in message.ListFields()} == on_wire


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0),
        ("n", 129),
        ("max_tokens", 0),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", -1.0),
        ("top_p", 0.0),
        ("top_p", math.nan),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("presence_penalty", math.nan),
        ("frequency_penalty", 3.0),
        ("seed", 2**63),
        ("logprobs", 21),
        ("top_k", -2),
    ],
)
def test_bad_values_off_the_wire_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        wire.sampling_params_from_wire(common_pb2.SamplingParams(**{name: value}))
    assert caught.value.details["field"] == name


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"params": SamplingParams(stop=("\ud800",))}, "stop"),
        ({"request_id": "\ud800"}, "request_id"),
        ({"priority": 2**31}, "priority"),
        ({"epoch": -1}, "epoch"),
        ({"prompt_token_ids": (-1,)}, "prompt_token_ids"),
    ],
)
def test_what_the_wire_cannot_carry_is_refused_by_the_sender(fields: dict[str, Any], field: str) -> None:
    request = Request(**{"request_id": "a", "prompt_token_ids": (1,), "params": SamplingParams(), **fields})
    with pytest.raises(InvalidArgumentError) as caught:
        wire.request_to_wire(request)
    assert caught.value.details["field"] == field


def test_bad_requests_off_the_wire_are_refused() -> None:
    good = common_pb2.SequenceRequest(request_id="a", prompt_token_ids=[1, 2])
    assert wire.request_from_wire(good, Phase.FULL).prompt_token_ids == (1, 2)
    bad_values: tuple[tuple[str, Any], ...] = (
        ("request_id", ""),
        ("request_id", "x" * 129),
        ("seed", 2**63),
        ("prompt_token_ids", []),
        ("prompt_token_ids", [2**31]),
        ("cache_salt", "s" * 257),
    )
    for field, value in bad_values:
        bad = common_pb2.SequenceRequest()
        bad.CopyFrom(good)
        bad.ClearField(field)
        bad.MergeFrom(common_pb2.SequenceRequest(**{field: value}))
        with pytest.raises(InvalidArgumentError):
            wire.request_from_wire(bad, Phase.FULL)


def test_bad_reservations_off_the_wire_are_refused() -> None:
    provenance = Provenance("r", 0, "f", b"h" * 32, 4, "float32")
    endpoint = RankEndpoint(0, "host:1", "h", KvRange(0, 1, 0, 1))
    good = wire.reservation_to_wire(KvReservation("id", provenance, 0, (endpoint,)))
    assert wire.reservation_from_wire(good).endpoints == (endpoint,)

    def broken(change: str) -> worker_pb2.KvReservation:
        bad = worker_pb2.KvReservation.FromString(good.SerializeToString())
        match change:
            case "no id":
                bad.reservation_id = ""
            case "long id":
                bad.reservation_id = "x" * 65
            case "no endpoints":
                del bad.endpoints[:]
            case "rank order":
                bad.endpoints[0].rank = 1
            case "empty range":
                bad.endpoints[0].kv_range.layer_end = 0
            case "no address":
                bad.endpoints[0].address = ""
            case "short hash":
                bad.provenance.prefix_hash = b"short"
            case "all cached":
                bad.num_cached_tokens = 4
        return bad

    for change in (
        "no id",
        "long id",
        "no endpoints",
        "rank order",
        "empty range",
        "no address",
        "short hash",
        "all cached",
    ):
        with pytest.raises(InvalidArgumentError):
            wire.reservation_from_wire(broken(change))


def test_finish_reasons_map_one_to_one() -> None:
    values = [wire.finish_reason_to_wire(reason) for reason in (None, *FinishReason)]
    assert sorted(values) == sorted(common_pb2.FinishReason.values())
    assert [wire.finish_reason_from_wire(value) for value in values] == [None, *FinishReason]
    with pytest.raises(InvalidArgumentError):
        wire.finish_reason_from_wire(99)


def test_an_unknown_error_code_is_internal() -> None:
    assert wire.error_code_from_wire("TEAPOT") is ErrorCode.INTERNAL
    assert wire.error_code_from_wire("DATA_LOSS") is ErrorCode.DATA_LOSS


@pytest.mark.parametrize(
    ("kind", "message"),
    [(GenerateSummary, inference_pb2.GenerateSummary()), (ReplicaLoad, worker_pb2.WorkerSnapshot())],
)
def test_what_is_copied_field_by_field_has_the_same_names_and_types(kind: type, message: Any) -> None:
    for index, field in enumerate(message.DESCRIPTOR.fields, start=1):
        if not field.is_repeated and field.enum_type is None:
            setattr(message, field.name, type(getattr(message, field.name))(index))
    copied: Any = wire.copied(kind, message)
    for field in dataclasses.fields(kind):
        value = getattr(copied, field.name)
        assert value == getattr(message, field.name)
        assert type(value).__name__ == field.type
