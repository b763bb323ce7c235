"""What a user may ask of sampling. Field names and meanings follow vLLM's ``SamplingParams``."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from .errors import InvalidArgumentError

MAX_N = 128
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 1024
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 1024
MAX_LOGPROBS = 20
MAX_SEED = 2**63 - 1
MAX_INT = 2**31 - 1  # of counts and token ids: what wire and arrays carry


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Validated sampling options of one request.

    ``temperature == 0`` is greedy. ``top_k == -1`` (or 0) keeps every token. ``logprobs=k`` returns the sampled
    token's logprob and the ``k`` most likely ones (of the distribution before temperature and filtering);
    ``prompt_logprobs`` likewise for every prompt token after the first. ``seed=None`` lets the gateway draw one.

    Raises:
        InvalidArgumentError: a value is not finite, out of range, or too many were given; names field and limit.
    """

    n: int = 1
    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        # A bare string is one stop string, and None is none at all, as vLLM's users write it.
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        object.__setattr__(self, "logit_bias", self.logit_bias or {})
        _check_int("n", self.n, 1, MAX_N)
        _check_int("max_tokens", self.max_tokens, 1, MAX_INT)
        _check_int("min_tokens", self.min_tokens, 0, self.max_tokens)
        _check_float("temperature", self.temperature, 0.0, 100.0)
        _check_int("top_k", self.top_k, -1, MAX_INT)
        _check_float("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_float("repetition_penalty", self.repetition_penalty, 0.0, 100.0, low_open=True)
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_count("logit_bias", len(self.logit_bias), MAX_LOGIT_BIAS)
        for token_id, bias in self.logit_bias.items():
            _check_int("logit_bias key", token_id, 0, MAX_INT)
            _check_float("logit_bias", bias, -100.0, 100.0)
        _check_count("stop", len(self.stop), MAX_STOP_STRINGS)
        for text in self.stop:
            if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_STRING_CHARS:
                raise InvalidArgumentError(
                    f"each stop string must have 1 to {MAX_STOP_STRING_CHARS} characters",
                    field="stop",
                    limit=MAX_STOP_STRING_CHARS,
                )
        _check_count("stop_token_ids", len(self.stop_token_ids), MAX_STOP_TOKEN_IDS)
        for token_id in self.stop_token_ids:
            _check_int("stop_token_ids", token_id, 0, MAX_INT)
        if self.seed is not None:
            _check_int("seed", self.seed, 0, MAX_SEED)
        if self.logprobs is not None:
            _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.prompt_logprobs is not None:
            _check_int("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, without randomness."""
        return self.temperature == 0.0


def child_seed(seed: int, index: int) -> int:
    """Seed of the ``index``-th of a request's ``n`` sequences.

    The first one keeps ``seed``, so that it equals a request with ``n=1``. The others are hashed, not counted up:
    else the second sequence of seed 7 would be the first one of seed 8.
    """
    if index == 0:
        return seed
    digest = hashlib.sha256(f"{seed}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "little") & MAX_SEED


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidArgumentError(f"{name} must be an integer, got {value!r}", field=name, value=value)
    if value < low or value > high:
        limit = f"between {low} and {high}"
        raise InvalidArgumentError(f"{name} must be {limit}, got {value}", field=name, value=value, limit=limit)


def _check_float(name: str, value: object, low: float, high: float, *, low_open: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidArgumentError(f"{name} must be a finite number, got {value!r}", field=name, value=value)
    if value < low or value > high or (low_open and value == low):
        limit = f"in {'(' if low_open else '['}{low}, {high}]"
        raise InvalidArgumentError(f"{name} must be {limit}, got {value}", field=name, value=value, limit=limit)


def _check_count(name: str, count: int, limit: int) -> None:
    if count > limit:
        raise InvalidArgumentError(
            f"{name} has {count} entries, at most {limit} are allowed", field=name, value=count, limit=limit
        )
