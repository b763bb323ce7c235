"""Prompts and options by type: what is taken, and how what is wrong is named."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from fuseline.runtime.errors import InvalidArgumentError
from fuseline.runtime.sampling_params import SamplingParams
from fuseline.workers.prompts import check_prompt, check_prompts, per_prompt


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("text", ["text"]),
        ([1, 2], [[1, 2]]),
        (np.array([1, 2]), [[1, 2]]),
        (["a", [3]], ["a", [3]]),
        ([(1, np.int32(2)), range(2)], [[1, 2], [0, 1]]),
        ([], []),
        ([[]], [[]]),
        ((prompt for prompt in ("a", "b")), ["a", "b"]),
    ],
)
def test_one_prompt_or_several(given: Any, taken: list[Any]) -> None:
    checked = check_prompts(given)
    assert checked == taken
    assert all(type(token) is int for prompt in checked if isinstance(prompt, list) for token in prompt)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "prompts must be a text, token ids, or a list of these, got NoneType"),
        (b"text", "prompts must be a text, token ids, or a list of these, got bytes"),
        ({"a": 1}, "prompts must be a text, token ids, or a list of these, got dict"),
        ([None], "prompts[0] must be a text or a sequence of token ids, got NoneType"),
        (["a", 3], "prompts[1] must be a text or a sequence of token ids, got int"),
        ([1, "a"], "prompts[1] must be a token id, got str"),
        ([[1], [2, 3.5]], "prompts[1][1] must be a token id, got float"),
        ([[1, True]], "prompts[0][1] must be a token id, got bool"),
        ([[1, -2]], "prompts[0][1] is -2, but token ids go from 0 to the end of the vocabulary, 2147483647 at most"),
        ([2**31], "prompts[0] is 2147483648, but token ids go from 0"),
    ],
)
def test_what_is_wrong_is_named_by_its_place(given: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match="^" + re.escape(message)) as info:
        check_prompts(given)
    assert info.value.details["field"] == "prompts"


def test_a_single_prompt_has_no_place_of_its_own() -> None:
    assert check_prompt((1, 2)) == [1, 2]
    with pytest.raises(InvalidArgumentError, match=r"^prompt\[1\] must be a token id, got list"):
        check_prompt([1, [2]])


def test_options_are_one_for_all_or_one_for_each() -> None:
    default, other = SamplingParams(), SamplingParams(n=2)
    assert per_prompt("p", None, default, 2) == [default, default]
    assert per_prompt("p", other, default, 2) == [other, other]
    assert per_prompt("p", (other, default), default, 2) == [other, default]
    for given, message in (
        ([other], "p must be one SamplingParams, or one for each of the 2 prompts, got 1"),
        ([other, 7], "p[1] must be SamplingParams, got int"),
        (7, "p must be SamplingParams, or one for each prompt, got int"),
        ("hot", "p must be SamplingParams, or one for each prompt, got str"),
    ):
        with pytest.raises(InvalidArgumentError, match="^" + re.escape(message)):
            per_prompt("p", given, default, 2)
