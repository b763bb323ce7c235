"""Every message survives the trip; nothing malformed does."""

from dataclasses import dataclass
from typing import Any, TypeVar

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from typing_extensions import TypeAliasType

from fuseline.collectives.messages import MessageCodec
from fuseline.runtime.errors import InvalidArgumentError
from fuseline.runtime.plan import AdmittedSequence, StepPlan, StepResult
from fuseline.runtime.request import TokenLogprobs
from fuseline.runtime.sampling_params import SamplingParams

CODEC = MessageCodec([StepPlan, StepResult, AdmittedSequence])
INT32 = st.integers(-(2**31), 2**31 - 1)
ids = st.lists(st.integers(0, 2**31 - 1), max_size=20).map(tuple)
text = st.text(max_size=10)
params = st.builds(
    SamplingParams,
    max_tokens=st.integers(5, 2**31 - 1),
    min_tokens=st.integers(0, 5),
    temperature=st.floats(0, 100) | st.integers(0, 3),
    top_k=st.integers(-1, 2**31 - 1),
    top_p=st.floats(0.01, 1),
    logit_bias=st.dictionaries(st.integers(0, 10**6), st.floats(-100, 100), max_size=3),
    stop=st.lists(st.text(min_size=1, max_size=5), max_size=3).map(tuple),
    stop_token_ids=ids,
    seed=st.none() | st.integers(0, 2**63 - 1),
    logprobs=st.none() | st.integers(0, 20),
)
sequences = st.builds(
    AdmittedSequence,
    row=st.integers(0, 2**31),
    request_id=text,
    token_ids=ids,
    num_prompt_tokens=st.integers(0, 2**31),
    block_ids=ids,
    num_computed_tokens=st.integers(0, 2**31),
    params=params,
    seed=st.integers(0, 2**63 - 1),
    handoff_id=text,
)
int32s = hnp.arrays(np.int32, st.integers(0, 9), elements=INT32)
plans = st.builds(
    StepPlan,
    step_id=st.integers(0, 2**63 - 1),
    rows=int32s,
    num_tokens=int32s,
    positions=int32s,
    input_tokens=int32s,
    samples=hnp.arrays(np.bool_, st.integers(0, 9)),
    released=ids,
    admitted=st.lists(sequences, max_size=3).map(tuple),
    new_block_rows=int32s,
    new_block_ids=int32s,
)
logprobs = st.builds(
    TokenLogprobs,
    token_id=st.integers(0, 2**31),
    logprob=st.floats(allow_nan=False),
    rank=st.integers(1, 2**31),
    top=st.lists(st.tuples(st.integers(0, 9), st.floats(allow_nan=False)), max_size=3).map(tuple),
)
results = st.builds(
    StepResult,
    step_id=st.integers(0, 2**63 - 1),
    token_ids=int32s,
    logprobs=st.dictionaries(st.integers(0, 99), logprobs, max_size=3),
    prompt_logprobs=st.dictionaries(st.integers(0, 99), st.lists(logprobs, max_size=3).map(tuple), max_size=2),
)


def same(a: object, b: object) -> bool:
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, StepPlan | StepResult):
        return type(a) is type(b) and all(same(getattr(a, f), getattr(b, f)) for f in a.__slots__)
    return a == b


@settings(max_examples=150, deadline=None)
@given(plans | results | sequences)
def test_round_trip(message: object) -> None:
    assert same(CODEC.decode(CODEC.encode(message)), message)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_messages_are_refused_or_still_well_typed(data: st.DataObject) -> None:
    damaged = bytearray(CODEC.encode(data.draw(plans)))
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    packed = bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    try:
        message = CODEC.decode(packed)
    except InvalidArgumentError:
        return
    # What is accepted is a value of the schema: it encodes again.
    assert same(CODEC.decode(CODEC.encode(message)), message)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidArgumentError):
        CODEC.decode(b"\x92\x01" + data[:1] + data)


EMPTY = b""


@pytest.mark.parametrize(
    "body",
    [
        [3, []],
        [-1, []],
        [True, [1, EMPTY, {}, {}]],
        [1, [1, EMPTY, {}]],
        [1, [1, EMPTY, {}, {}, {}]],
        [1, [1.0, EMPTY, {}, {}]],
        [1, [1, "", {}, {}]],
        [1, [1, b"123", {}, {}]],
        [1, [1, EMPTY, {"1": [1, 0.0, 1, []]}, {}]],
        [1, [1, EMPTY, {1: [1, 0, 1, []]}, {}]],
        [1, [1, EMPTY, {1: [1, 0.0, 1, [[1]]]}, {}]],
        [1, [1, EMPTY, [], {}]],
        {"1": 2},
        [0, [1, EMPTY, EMPTY, EMPTY, EMPTY, b"\x02", EMPTY, [], EMPTY, EMPTY]],
    ],
)
def test_wrong_shapes_are_refused(body: object) -> None:
    with pytest.raises(InvalidArgumentError, match="malformed"):
        CODEC.decode(msgpack.packb(body, use_bin_type=True))


def test_values_that_the_dataclass_refuses_are_refused() -> None:
    sequence = AdmittedSequence(0, "a", (1,), 1, (0,), 0, SamplingParams(temperature=0.5), 1)
    packed = CODEC.encode(sequence)
    assert CODEC.decode(packed) == sequence
    hot = packed.replace(msgpack.packb(0.5), msgpack.packb(5000.5))
    with pytest.raises(InvalidArgumentError, match="temperature"):
        CODEC.decode(hot)


def test_unknown_and_mistyped_messages_are_not_sent() -> None:
    with pytest.raises(InvalidArgumentError, match="not a message"):
        CODEC.encode(SamplingParams())
    with pytest.raises(InvalidArgumentError, match="cannot be encoded"):
        CODEC.encode(StepResult(0, np.zeros(1, np.int64)))


Scalar = TypeVar("Scalar", bound=np.generic)
AliasedArray = TypeAliasType("AliasedArray", np.ndarray[tuple[Any, ...], np.dtype[Scalar]], type_params=(Scalar,))


def test_an_alias_travels_as_what_it_stands_for() -> None:
    """From 2.5 on, which Python 3.12 can have, numpy's NDArray is one."""

    @dataclass(frozen=True)
    class Aliased:
        values: AliasedArray[np.int32]

    codec = MessageCodec([Aliased])
    decoded = codec.decode(codec.encode(Aliased(np.array([3, 4], np.int32))))
    assert (decoded.values.tolist(), decoded.values.dtype) == ([3, 4], np.int32)


def test_a_field_that_cannot_travel_is_refused() -> None:
    @dataclass(frozen=True)
    class Odd:
        callback: object

    with pytest.raises(InvalidArgumentError, match="cannot carry"):
        MessageCodec([Odd]).encode(Odd(print))
