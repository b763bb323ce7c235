"""Each value a user may get wrong is refused by name, with its limit; everything allowed is allowed."""

import math

import pytest

from fuseline.runtime.errors import InvalidArgumentError
from fuseline.runtime.sampling_params import MAX_N, MAX_STOP_STRING_CHARS, MAX_STOP_STRINGS, SamplingParams


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", MAX_N + 1),
        ("n", True),
        ("n", 1.0),
        ("max_tokens", 0),
        ("max_tokens", 2**31),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", -0.1),
        ("temperature", "1"),
        ("top_k", -2),
        ("top_k", 2**31),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -math.inf),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("logit_bias", {-1: 0.0}),
        ("logit_bias", {2**31: 0.0}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {1: 101.0}),
        ("logit_bias", dict.fromkeys(range(1025), 0.0)),
        ("stop", ("",)),
        ("stop", ("x" * (MAX_STOP_STRING_CHARS + 1),)),
        ("stop", tuple("x" for _ in range(MAX_STOP_STRINGS + 1))),
        ("stop_token_ids", (-1,)),
        ("stop_token_ids", (2**31,)),
        ("stop_token_ids", tuple(range(129))),
        ("seed", -1),
        ("seed", 2**63),
        ("logprobs", 21),
        ("logprobs", -1),
        ("prompt_logprobs", 21),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert field in caught.value.details["field"]
    assert field.split("_")[0] in str(caught.value)


def test_the_limits_themselves_are_allowed() -> None:
    params = SamplingParams(
        n=MAX_N,
        max_tokens=1,
        min_tokens=1,
        temperature=0,
        top_k=0,
        top_p=1,
        logit_bias={0: -100, 7: 100},
        stop=tuple("x" * MAX_STOP_STRING_CHARS for _ in range(MAX_STOP_STRINGS)),
        seed=2**63 - 1,
        logprobs=20,
        prompt_logprobs=0,
    )
    assert params.greedy


def test_one_stop_string_may_be_given_bare() -> None:
    assert SamplingParams(stop="end").stop == ("end",)  # type: ignore[arg-type]


def test_none_is_nothing() -> None:
    assert SamplingParams(stop=None, stop_token_ids=None, logit_bias=None) == SamplingParams()  # type: ignore[arg-type]
