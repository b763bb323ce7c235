"""Checks a request against the model and the pool that are to serve it."""

from __future__ import annotations

from .config import EngineConfig
from .errors import InvalidArgumentError, ResourceExhaustedError
from .request import Request


def max_total_tokens(config: EngineConfig) -> int:
    """Tokens, prompt and outputs, at which a sequence ends: the model's context, or all blocks of the pool."""
    return min(config.model.max_model_len, config.cache.num_blocks * config.cache.block_size)


def check_request(config: EngineConfig, request: Request) -> None:
    """Refuse what this engine can never serve.

    Raises:
        InvalidArgumentError: a token id is not in the vocabulary, or the prompt leaves no room for an output.
        ResourceExhaustedError: the pool is too small for the prompt, even empty.
    """
    vocab_size, params = config.model.shape.vocab_size, request.params
    for field, token_ids in (
        ("prompt", request.prompt_token_ids),
        ("logit_bias", params.logit_bias),
        ("stop_token_ids", params.stop_token_ids),
    ):
        if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
            bad = next(token for token in token_ids if not 0 <= token < vocab_size)
            raise InvalidArgumentError(
                f"{field} has token id {bad}, but token ids go from 0 to {vocab_size - 1}",
                field=field,
                value=bad,
                limit=vocab_size - 1,
            )
    num_tokens, max_model_len = len(request.prompt_token_ids), config.model.max_model_len
    if num_tokens >= max_model_len:
        raise InvalidArgumentError(
            f"the prompt has {num_tokens} tokens; the model's context of {max_model_len} leaves room for"
            f" {max_model_len - 1}",
            field="prompt",
            value=num_tokens,
            limit=max_model_len - 1,
        )
    limit = max_total_tokens(config) - 1
    if num_tokens > limit:
        raise ResourceExhaustedError(
            f"the prompt has {num_tokens} tokens; {config.cache.num_blocks} KV blocks of {config.cache.block_size}"
            f" can never hold more than {limit} and an output",
            field="prompt",
            value=num_tokens,
            limit=limit,
        )
