"""The gateway's door: checks a request at the earliest moment, tokenises it, fixes its randomness, and counts it in.

Nothing is allocated for a request that is refused here, on the gateway or on any worker.
"""

from __future__ import annotations

import asyncio
import secrets
import uuid
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace

from ..proto.fuseline.v1 import inference_pb2
from ..runtime.config import ModelInfo
from ..runtime.errors import (
    AlreadyExistsError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
)
from ..runtime.prefix_cache import prefix_hashes, prefix_salt, truncate_hash
from ..runtime.request import MAX_REQUEST_ID_CHARS, Request
from ..runtime.sampling_params import MAX_N, MAX_SEED, SamplingParams, child_seed
from ..workers import wire
from ..workers.tokenizer import Tokenizer

# Each of a request's n sequences is a request to the workers, named "<request_id>/<index>".
MAX_USER_REQUEST_ID_CHARS = MAX_REQUEST_ID_CHARS - len(f"/{MAX_N - 1}")
# About a millisecond of tokenising; longer texts go to a thread, so that no stream stalls behind them.
MAX_INLINE_CHARS = 4096


@dataclass(frozen=True, slots=True)
class AdmittedRequest:
    """A user's request, ready to be run.

    Attributes:
        params: as the user gave them.
        sequences: one for each of ``params.n``; their own params have ``n=1``.
        prefix_keys: truncated hashes of the prompt's full blocks; empty when no cached prefix may be used.
        arrived_at: on the gateway's clock.
    """

    request_id: str
    params: SamplingParams
    sequences: tuple[Request, ...]
    prefix_keys: tuple[int, ...]
    arrived_at: float

    @property
    def num_prompt_tokens(self) -> int:
        """Of each sequence."""
        return len(self.sequences[0].prompt_token_ids)


class Admission:
    """Decides what may enter.

    Args:
        block_size: of the workers' KV blocks; None when they keep no prefix cache.
        max_num_sequences: most sequences under way at once; a request with ``n`` counts ``n``.
    """

    def __init__(
        self, model: ModelInfo, tokenizer: Tokenizer, *, block_size: int | None, max_num_sequences: int
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._block_size = block_size
        self._max_num_sequences = max_num_sequences
        self._live: dict[str, int] = {}
        self._closed = False
        self._none_left = asyncio.Event()
        self._none_left.set()

    @property
    def num_sequences(self) -> int:
        """Sequences under way."""
        return sum(self._live.values())

    def close(self) -> None:
        """Refuse everything from now on; what is under way goes on."""
        self._closed = True

    async def drained(self, timeout_s: float) -> None:
        """Wait until nothing is under way, at most so long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._none_left.wait()

    @asynccontextmanager
    async def admit(
        self, message: inference_pb2.GenerateRequest, arrived_at: float, deadline: float | None
    ) -> AsyncIterator[AdmittedRequest]:
        """Check the request and count it in for as long as the context is open.

        Raises:
            InvalidArgumentError: a value is malformed or out of range; names it.
            NotFoundError: another model is asked for.
            AlreadyExistsError: its id is in use.
            ResourceExhaustedError: too much is under way; a retry may pass.
            UnavailableError: the gateway is shutting down.
        """
        if self._closed:
            raise UnavailableError("the gateway is shutting down", retry_after_s=1)
        if message.model not in ("", self._model.name):
            raise NotFoundError(
                f"model {message.model!r} is not served here, {self._model.name!r} is",
                field="model",
                value=message.model,
                limit=self._model.name,
            )
        request_id = _checked_id(message.request_id)
        params = wire.sampling_params_from_wire(message.sampling_params)
        self._check_vocabulary("stop_token_ids", params.stop_token_ids)
        self._check_vocabulary("logit_bias", params.logit_bias)
        self._enter(request_id, params.n)
        try:
            token_ids = await self._token_ids(message)
            yield self._admitted(request_id, token_ids, params, message, arrived_at, deadline)
        finally:
            del self._live[request_id]
            if not self._live:
                self._none_left.set()

    def _enter(self, request_id: str, num_sequences: int) -> None:
        if request_id in self._live:
            raise AlreadyExistsError(f"request {request_id!r} is under way", field="request_id", value=request_id)
        if self.num_sequences + num_sequences > self._max_num_sequences:
            raise ResourceExhaustedError(
                f"{self.num_sequences} sequences are under way, at most {self._max_num_sequences} are admitted",
                value=self.num_sequences,
                limit=self._max_num_sequences,
                retry_after_s=1,
            )
        self._live[request_id] = num_sequences
        self._none_left.clear()

    async def _token_ids(self, message: inference_pb2.GenerateRequest) -> tuple[int, ...]:
        """The prompt's tokens, of which there are enough and not too many, all in the vocabulary."""
        match message.WhichOneof("prompt"):
            case "text" if len(message.text) > MAX_INLINE_CHARS:
                token_ids = tuple(await asyncio.to_thread(self._tokenizer.encode, message.text))
            case "text":
                token_ids = tuple(self._tokenizer.encode(message.text))
            case "token_ids":
                token_ids = tuple(message.token_ids.ids)
            case _:
                raise InvalidArgumentError("the request has no prompt", field="prompt")
        if not token_ids:
            raise InvalidArgumentError("the prompt has no tokens", field="prompt")
        limit = self._model.max_model_len - 1
        if len(token_ids) > limit:
            raise InvalidArgumentError(
                f"the prompt has {len(token_ids)} tokens; the model's context of {self._model.max_model_len} leaves"
                f" room for {limit}",
                field="prompt",
                value=len(token_ids),
                limit=limit,
            )
        self._check_vocabulary("prompt", token_ids)
        return token_ids

    def _check_vocabulary(self, field: str, token_ids: Iterable[int]) -> None:
        vocab_size = self._model.shape.vocab_size
        largest = max(token_ids, default=0)
        if largest >= vocab_size:
            raise InvalidArgumentError(
                f"{field} has token id {largest}, the vocabulary has {vocab_size}",
                field=field,
                value=largest,
                limit=vocab_size - 1,
            )

    def _admitted(
        self,
        request_id: str,
        token_ids: tuple[int, ...],
        params: SamplingParams,
        message: inference_pb2.GenerateRequest,
        arrived_at: float,
        deadline: float | None,
    ) -> AdmittedRequest:
        seed = secrets.randbelow(MAX_SEED + 1) if params.seed is None else params.seed
        first = Request(
            request_id=f"{request_id}/0",
            prompt_token_ids=token_ids,
            params=replace(params, n=1, stop=(), seed=seed),
            seed=seed,
            priority=message.priority,
            deadline=deadline,
            cache_salt=message.cache_salt,
        )
        others = replace(first.params, prompt_logprobs=None)  # they are the same for all, so the first tells them
        sequences = [first]
        for index in range(1, params.n):
            child = child_seed(seed, index)
            sequences.append(
                replace(first, request_id=f"{request_id}/{index}", seed=child, params=replace(others, seed=child))
            )
        return AdmittedRequest(
            request_id=request_id,
            params=params,
            sequences=tuple(sequences),
            prefix_keys=self._prefix_keys(token_ids, params, message.cache_salt),
            arrived_at=arrived_at,
        )

    def _prefix_keys(self, token_ids: tuple[int, ...], params: SamplingParams, cache_salt: str) -> tuple[int, ...]:
        """Empty for prompt logprobs, too: computing them takes the whole prompt."""
        if self._block_size is None or params.prompt_logprobs is not None:
            return ()
        salt = prefix_salt(self._model.fingerprint, cache_salt)
        return tuple(truncate_hash(block) for block in prefix_hashes(token_ids, self._block_size, salt))


def _checked_id(request_id: str) -> str:
    if len(request_id) > MAX_USER_REQUEST_ID_CHARS:
        raise InvalidArgumentError(
            f"request_id must have at most {MAX_USER_REQUEST_ID_CHARS} characters, got {len(request_id)}",
            field="request_id",
            value=len(request_id),
            limit=MAX_USER_REQUEST_ID_CHARS,
        )
    return request_id or uuid.uuid4().hex
