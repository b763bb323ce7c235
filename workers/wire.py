"""Conversions between protobuf messages and the dataclasses of ``runtime``: the only place where the two meet.

``..._to_wire`` writes every value that is set, so that the meaning of a message does not hang on the default of
whoever reads it; ``..._from_wire`` takes only fields that are present and leaves the rest to the dataclass, which
also validates. Both raise ``InvalidArgumentError`` naming the field when a value does not fit; nothing else escapes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, TypeVar

from google.protobuf.message import Message

from ..proto.fuseline.v1 import common_pb2, worker_pb2
from ..runtime.errors import ErrorCode, InvalidArgumentError
from ..runtime.handoff import KvReservation, Provenance, RankEndpoint
from ..runtime.request import MAX_TOKEN_ID, FinishReason, Phase, Request, SequenceOutput, TokenLogprobs
from ..runtime.role import WorkerRole
from ..runtime.sampling_params import MAX_SEED, SamplingParams
from ..runtime.sharding import KvRange

T = TypeVar("T")
MAX_RESERVATION_ID_CHARS = 64
MAX_ENDPOINTS = 4096  # ranks of one group: 64 tensor x 64 pipeline
HASH_BYTES = 32  # SHA-256

_SCALAR_SAMPLING_FIELDS = (
    "n",
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "include_stop_str_in_output",
    "ignore_eos",
    "seed",
    "logprobs",
    "prompt_logprobs",
)
ROLE_TO_WIRE = {
    WorkerRole.PREFILL: worker_pb2.WORKER_ROLE_PREFILL,
    WorkerRole.DECODE: worker_pb2.WORKER_ROLE_DECODE,
    WorkerRole.MIXED: worker_pb2.WORKER_ROLE_MIXED,
}
_FINISH_TO_WIRE = {
    None: common_pb2.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: common_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: common_pb2.FINISH_REASON_LENGTH,
    FinishReason.ABORT: common_pb2.FINISH_REASON_ABORT,
    FinishReason.DEADLINE: common_pb2.FINISH_REASON_DEADLINE,
    FinishReason.ERROR: common_pb2.FINISH_REASON_ERROR,
}
_FINISH_FROM_WIRE: dict[int, FinishReason | None] = {value: reason for reason, value in _FINISH_TO_WIRE.items()}


def copied(kind: type[T], message: Message) -> T:
    """A dataclass made of a message's fields of the same names and types; the message must have all of them."""
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]  # there is no name for what all dataclasses have
    return kind(**{field.name: getattr(message, field.name) for field in fields})


def sampling_params_to_wire(params: SamplingParams) -> common_pb2.SamplingParams:
    """Every field that is not None, explicitly."""
    message = common_pb2.SamplingParams()
    for name in _SCALAR_SAMPLING_FIELDS:
        value = getattr(params, name)
        if value is not None:
            _assign(message, name, value)
    try:
        message.logit_bias.update(params.logit_bias)
    except (ValueError, TypeError) as error:
        raise _does_not_fit("logit_bias", error) from error
    _extend(message.stop, "stop", params.stop)
    _extend(message.stop_token_ids, "stop_token_ids", params.stop_token_ids)
    return message


def sampling_params_from_wire(message: common_pb2.SamplingParams) -> SamplingParams:
    """Present fields as given, absent ones at the defaults of ``SamplingParams``."""
    given: dict[str, Any] = {
        name: getattr(message, name) for name in _SCALAR_SAMPLING_FIELDS if message.HasField(name)
    }
    return SamplingParams(
        **given,
        logit_bias=dict(message.logit_bias),
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
    )


def request_to_wire(request: Request) -> common_pb2.SequenceRequest:
    """Everything but phase and deadline: the RPC that carries the message implies the one, its timeout the other."""
    message = common_pb2.SequenceRequest(sampling_params=sampling_params_to_wire(request.params))
    for name in ("request_id", "seed", "priority", "cache_salt", "epoch"):
        _assign(message, name, getattr(request, name))
    _extend(message.prompt_token_ids, "prompt_token_ids", request.prompt_token_ids)
    return message


def request_from_wire(message: common_pb2.SequenceRequest, phase: Phase, deadline: float | None = None) -> Request:
    """The request as an engine takes it; ``deadline`` is on that engine's clock.

    Vocabulary and context length are the engine's to check: they depend on the model.
    """
    if message.seed > MAX_SEED:
        raise InvalidArgumentError(
            f"seed must be between 0 and {MAX_SEED}, got {message.seed}",
            field="seed",
            value=message.seed,
            limit=MAX_SEED,
        )
    return Request(
        request_id=message.request_id,
        prompt_token_ids=_token_ids(message.prompt_token_ids, "prompt_token_ids"),
        params=sampling_params_from_wire(message.sampling_params),
        seed=message.seed,
        priority=message.priority,
        deadline=deadline,
        cache_salt=message.cache_salt,
        phase=phase,
        epoch=message.epoch,
    )


def output_to_wire(output: SequenceOutput) -> common_pb2.SequenceOutput:
    """Everything but the request id, which the stream implies."""
    return common_pb2.SequenceOutput(
        token_ids=output.token_ids,
        logprobs=_logprobs_to_wire(output.logprobs),
        prompt_logprobs=_logprobs_to_wire(output.prompt_logprobs or ()),
        num_cached_tokens=output.num_cached_tokens,
        finish_reason=_FINISH_TO_WIRE[output.finish_reason],
        error_code=output.error_code or "",
        error=output.error,
    )


def output_from_wire(message: common_pb2.SequenceOutput, request_id: str) -> SequenceOutput:
    """The inverse of ``output_to_wire``; an empty list of prompt logprobs reads as none."""
    return SequenceOutput(
        request_id=request_id,
        token_ids=_token_ids(message.token_ids, "token_ids"),
        logprobs=_logprobs_from_wire(message.logprobs),
        prompt_logprobs=_logprobs_from_wire(message.prompt_logprobs) or None,
        num_cached_tokens=message.num_cached_tokens,
        finish_reason=finish_reason_from_wire(message.finish_reason),
        error_code=error_code_from_wire(message.error_code) if message.error_code else None,
        error=message.error,
    )


def finish_reason_to_wire(reason: FinishReason | None) -> common_pb2.FinishReason:
    """None is UNSPECIFIED: the sequence goes on."""
    return _FINISH_TO_WIRE[reason]


def finish_reason_from_wire(value: int) -> FinishReason | None:
    """Refuses a number that this version does not know, since it might mean the end."""
    try:
        return _FINISH_FROM_WIRE[value]
    except KeyError:
        raise InvalidArgumentError(f"unknown finish reason {value}", field="finish_reason", value=value) from None


def error_code_from_wire(name: str) -> ErrorCode:
    """The code of that name; INTERNAL for one that this version does not know."""
    return ErrorCode(name) if name in ErrorCode.__members__ else ErrorCode.INTERNAL


def provenance_to_wire(provenance: Provenance) -> worker_pb2.Provenance:
    """Field by field."""
    return worker_pb2.Provenance(
        request_id=provenance.request_id,
        epoch=provenance.epoch,
        model_fingerprint=provenance.model_fingerprint,
        prefix_hash=provenance.prefix_hash,
        num_tokens=provenance.num_tokens,
        dtype=provenance.dtype,
    )


def provenance_from_wire(message: worker_pb2.Provenance) -> Provenance:
    """Field by field; says nothing about whether it is the right one."""
    if len(message.prefix_hash) != HASH_BYTES:
        raise InvalidArgumentError(
            f"prefix_hash must have {HASH_BYTES} bytes, got {len(message.prefix_hash)}",
            field="provenance.prefix_hash",
            value=len(message.prefix_hash),
            limit=HASH_BYTES,
        )
    return Provenance(
        request_id=message.request_id,
        epoch=message.epoch,
        model_fingerprint=message.model_fingerprint,
        prefix_hash=message.prefix_hash,
        num_tokens=message.num_tokens,
        dtype=message.dtype,
    )


def reservation_to_wire(reservation: KvReservation) -> worker_pb2.KvReservation:
    """Field by field."""
    return worker_pb2.KvReservation(
        reservation_id=reservation.reservation_id,
        provenance=provenance_to_wire(reservation.provenance),
        num_cached_tokens=reservation.num_cached_tokens,
        endpoints=[_endpoint_to_wire(endpoint) for endpoint in reservation.endpoints],
    )


def reservation_from_wire(message: worker_pb2.KvReservation) -> KvReservation:
    """Checks what an engine would otherwise trip over: the id, the number of ranks, their order and their ranges."""
    if not 0 < len(message.reservation_id) <= MAX_RESERVATION_ID_CHARS:
        raise InvalidArgumentError(
            f"reservation_id must have 1 to {MAX_RESERVATION_ID_CHARS} characters, got {len(message.reservation_id)}",
            field="reservation.reservation_id",
            limit=MAX_RESERVATION_ID_CHARS,
        )
    if not 0 < len(message.endpoints) <= MAX_ENDPOINTS:
        raise InvalidArgumentError(
            f"a reservation names 1 to {MAX_ENDPOINTS} endpoints, got {len(message.endpoints)}",
            field="reservation.endpoints",
            value=len(message.endpoints),
            limit=MAX_ENDPOINTS,
        )
    if [endpoint.rank for endpoint in message.endpoints] != list(range(len(message.endpoints))):
        raise InvalidArgumentError(
            "endpoints must be those of ranks 0, 1, 2, ... in order", field="reservation.endpoints"
        )
    provenance = provenance_from_wire(message.provenance)
    if not message.num_cached_tokens < max(provenance.num_tokens, 1):
        raise InvalidArgumentError(
            f"num_cached_tokens={message.num_cached_tokens} must be less than the prompt's {provenance.num_tokens}",
            field="reservation.num_cached_tokens",
            value=message.num_cached_tokens,
            limit=provenance.num_tokens,
        )
    return KvReservation(
        reservation_id=message.reservation_id,
        provenance=provenance,
        num_cached_tokens=message.num_cached_tokens,
        endpoints=tuple(_endpoint_from_wire(endpoint) for endpoint in message.endpoints),
    )


def _endpoint_to_wire(endpoint: RankEndpoint) -> worker_pb2.RankEndpoint:
    kv = endpoint.kv_range
    return worker_pb2.RankEndpoint(
        rank=endpoint.rank,
        address=endpoint.address,
        host_id=endpoint.host_id,
        kv_range=worker_pb2.KvRange(
            layer_start=kv.layer_start, layer_end=kv.layer_end, head_start=kv.head_start, head_end=kv.head_end
        ),
    )


def _endpoint_from_wire(message: worker_pb2.RankEndpoint) -> RankEndpoint:
    kv = message.kv_range
    if kv.layer_start >= kv.layer_end or kv.head_start >= kv.head_end or not message.address:
        raise InvalidArgumentError(
            f"endpoint of rank {message.rank} must have an address, layers and heads",
            field="reservation.endpoints",
            value=message.rank,
        )
    return RankEndpoint(
        rank=message.rank,
        address=message.address,
        host_id=message.host_id,
        kv_range=KvRange(kv.layer_start, kv.layer_end, kv.head_start, kv.head_end),
    )


def _logprobs_to_wire(entries: Iterable[TokenLogprobs]) -> list[common_pb2.TokenLogprobs]:
    return [
        common_pb2.TokenLogprobs(
            token_id=entry.token_id,
            logprob=entry.logprob,
            rank=entry.rank,
            top=[common_pb2.TokenLogprob(token_id=token, logprob=value) for token, value in entry.top],
        )
        for entry in entries
    ]


def _logprobs_from_wire(messages: Iterable[common_pb2.TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
    return tuple(
        TokenLogprobs(
            token_id=message.token_id,
            logprob=message.logprob,
            rank=message.rank,
            top=tuple((top.token_id, top.logprob) for top in message.top),
        )
        for message in messages
    )


def _token_ids(values: Iterable[int], field: str) -> tuple[int, ...]:
    token_ids = tuple(values)
    if token_ids and max(token_ids) > MAX_TOKEN_ID:
        raise InvalidArgumentError(
            f"{field} must be at most {MAX_TOKEN_ID}, got {max(token_ids)}",
            field=field,
            value=max(token_ids),
            limit=MAX_TOKEN_ID,
        )
    return token_ids


def _assign(message: Any, field: str, value: object) -> None:
    """Set one field; protobuf refuses numbers out of its type's range and strings that UTF-8 cannot carry."""
    try:
        setattr(message, field, value)
    except (ValueError, TypeError) as error:
        raise _does_not_fit(field, error) from error


def _extend(container: Any, field: str, values: Iterable[object]) -> None:
    try:
        container.extend(values)
    except (ValueError, TypeError) as error:
        raise _does_not_fit(field, error) from error


def _does_not_fit(field: str, error: Exception) -> InvalidArgumentError:
    return InvalidArgumentError(f"{field} cannot be sent: {error}", field=field)
