"""What enters the engine and what leaves it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from .errors import ErrorCode, InvalidArgumentError
from .sampling_params import SamplingParams

MAX_REQUEST_ID_CHARS = 128
MAX_CACHE_SALT_CHARS = 256
MAX_TOKEN_ID = 2**31 - 1  # token ids are int32 everywhere behind the wire


class FinishReason(StrEnum):
    """Why a request ended. Every request ends in exactly one of these, refusals included."""

    STOP = "stop"  # end-of-sequence token, stop token id or stop string
    LENGTH = "length"  # max_tokens or the model's context is reached
    ABORT = "abort"  # the caller cancelled or went away
    DEADLINE = "deadline"  # the caller's deadline passed
    ERROR = "error"  # refused, or failed on our side; the error says which


class Phase(StrEnum):
    """Which part of a request an engine is asked to do."""

    FULL = "full"  # prefill and decode here
    PREFILL = "prefill"  # compute the prompt and one token, then hand the KV off
    DECODE = "decode"  # wait for KV from a prefill engine, then decode


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to generate, as an engine sees it: validated, tokenised, with its randomness fixed.

    A user's request with ``n > 1`` becomes ``n`` of these, with distinct ids and seeds.

    Attributes:
        request_id: unique among the live requests of a cluster.
        prompt_token_ids: at least one token.
        params: sampling options. Stop *strings* are the front end's business: it aborts when one appears.
        seed: key of the counter-based sampler, in ``[0, 2**63)``; the counter is the token's position.
        priority: lower runs first; ties go by arrival.
        deadline: on the engine's clock, in seconds; None for no deadline.
        cache_salt: separates prefix caches of tenants; part of every block hash.
        phase: what this engine does of the request.
        epoch: how often the request has been tried; a piece of KV of another epoch is never accepted.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    seed: int = 0
    priority: int = 0
    deadline: float | None = None
    cache_salt: str = ""
    phase: Phase = Phase.FULL
    epoch: int = 0

    def __post_init__(self) -> None:
        if not 0 < len(self.request_id) <= MAX_REQUEST_ID_CHARS:
            raise InvalidArgumentError(
                f"request_id must have 1 to {MAX_REQUEST_ID_CHARS} characters, got {len(self.request_id)}",
                field="request_id",
                limit=MAX_REQUEST_ID_CHARS,
            )
        if len(self.cache_salt) > MAX_CACHE_SALT_CHARS:
            raise InvalidArgumentError(
                f"cache_salt must have at most {MAX_CACHE_SALT_CHARS} characters, got {len(self.cache_salt)}",
                field="cache_salt",
                limit=MAX_CACHE_SALT_CHARS,
            )
        if not self.prompt_token_ids:
            raise InvalidArgumentError("the prompt has no tokens", field="prompt")


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Logprobs at one position: of the token that stands there, and of the most likely ones, best first."""

    token_id: int
    logprob: float
    rank: int  # 1 for the most likely token
    top: tuple[tuple[int, float], ...] = ()


# Not frozen, though nobody changes one: it is made for every token, and freezing costs 2.4 us each (0.2 us without).
@dataclass(slots=True)
class SequenceOutput:
    """What one engine step produced for one request. The last output of a request has ``finish_reason`` set.

    Attributes:
        token_ids: newly sampled tokens, in order; empty on a pure end.
        logprobs: one entry per token in ``token_ids`` when the request asked for them.
        prompt_logprobs: once, with the first token, when asked; entry ``i`` belongs to prompt position ``i + 1``.
        num_cached_tokens: prompt tokens served from the prefix cache.
        error_code, error: set when ``finish_reason`` is ERROR.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    error_code: ErrorCode | None = None
    error: str = ""
