"""What users give as prompts and options, checked by type: what is wrong is named by its place. Needs no torch."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias, TypeVar

from ..runtime.errors import InvalidArgumentError
from ..runtime.request import MAX_TOKEN_ID

Prompt: TypeAlias = str | Sequence[int]
T = TypeVar("T")


def check_prompt(prompt: object, name: str = "prompt") -> str | list[int]:
    """A text as it is, or token ids as plain integers.

    Raises:
        InvalidArgumentError: it is neither; or an id is one that no vocabulary has.
    """
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, bytes | bytearray | dict) or not isinstance(prompt, Iterable):
        raise _wrong(name, "a text or a sequence of token ids", prompt)
    return [_token_id(token, f"{name}[{index}]") for index, token in enumerate(prompt)]


def check_prompts(prompts: object) -> list[str | list[int]]:
    """One prompt, or several: a sequence whose first item is a number is the token ids of one.

    Raises:
        InvalidArgumentError: see ``check_prompt``.
    """
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, bytes | bytearray | dict) or not isinstance(prompts, Iterable):
        raise _wrong("prompts", "a text, token ids, or a list of these", prompts)
    many = list(prompts)
    if many and hasattr(many[0], "__index__"):
        return [check_prompt(many, "prompts")]
    return [check_prompt(prompt, f"prompts[{index}]") for index, prompt in enumerate(many)]


def per_prompt(name: str, given: object, default: T, num_prompts: int) -> list[T]:
    """One value for each prompt, of one for all or an iterable of as many; None stands for the default.

    Raises:
        InvalidArgumentError: of another type, or another number.
    """
    kind = type(default)
    if given is None or isinstance(given, kind):
        return [default if given is None else given] * num_prompts
    if isinstance(given, str | bytes | dict) or not isinstance(given, Iterable):
        raise _wrong(name, f"{kind.__name__}, or one for each prompt", given)
    values: list[Any] = list(given)
    for index, value in enumerate(values):
        if not isinstance(value, kind):
            raise _wrong(f"{name}[{index}]", kind.__name__, value)
    if len(values) != num_prompts:
        raise InvalidArgumentError(
            f"{name} must be one {kind.__name__}, or one for each of the {num_prompts} prompts, got {len(values)}",
            field=name,
            value=len(values),
            limit=num_prompts,
        )
    return values


def _token_id(token: object, name: str) -> int:
    if isinstance(token, bool) or not hasattr(token, "__index__"):
        raise _wrong(name, "a token id", token)
    value = operator.index(token)
    if not 0 <= value <= MAX_TOKEN_ID:
        raise InvalidArgumentError(
            f"{name} is {value}, but token ids go from 0 to the end of the vocabulary, {MAX_TOKEN_ID} at most",
            field=name.partition("[")[0],
            value=value,
            limit=MAX_TOKEN_ID,
        )
    return value


def _wrong(name: str, wanted: str, found: object) -> InvalidArgumentError:
    kind = type(found).__name__
    return InvalidArgumentError(f"{name} must be {wanted}, got {kind}", field=name.partition("[")[0], value=kind)
