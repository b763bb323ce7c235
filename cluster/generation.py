"""What a client asks for and what it gets: frozen dataclasses and their wire form. Light: imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ..proto.fuseline.v1 import common_pb2, inference_pb2
from ..runtime.errors import InternalError, InvalidArgumentError
from ..runtime.request import FinishReason, TokenLogprobs
from ..runtime.sampling_params import SamplingParams
from ..workers import wire
from ..workers.prompts import Prompt, check_prompt


@dataclass(frozen=True, slots=True)
class GenerateSummary:
    """What one sequence took, as the gateway saw it. Times are in seconds since the request's arrival there.

    Attributes:
        queue_s: until workers were chosen.
        ttft_s: until the first token left the gateway.
        tpot_s: per output token after the first; 0 with fewer than two tokens.
        prefill_worker: empty when the decode worker computed the prompt itself.
        stop_reason: the stop string or token id that ended the sequence, if one did.
    """

    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    queue_s: float
    ttft_s: float
    tpot_s: float
    e2e_s: float
    prefill_worker: str
    decode_worker: str
    num_retries: int
    stop_reason: str


@dataclass(frozen=True, slots=True)
class GenerateChunk:
    """A piece of one of the request's ``n`` sequences. The last of a sequence has finish_reason and summary."""

    request_id: str
    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: FinishReason | None = None
    summary: GenerateSummary | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """One whole sequence."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    prompt_logprobs: tuple[TokenLogprobs, ...] | None
    finish_reason: FinishReason
    summary: GenerateSummary


@dataclass(frozen=True, slots=True)
class GenerateResult:
    """All sequences of a request, by index."""

    request_id: str
    completions: tuple[Completion, ...]

    @property
    def text(self) -> str:
        """Text of the first sequence: the only one unless ``n`` asked for more."""
        return self.completions[0].text


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What a gateway tells of its model; see ``runtime.config.ModelInfo``."""

    name: str
    fingerprint: str
    dtype: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    version: str


def generate_request(
    prompt: Prompt,
    sampling_params: SamplingParams | None,
    *,
    request_id: str = "",
    model: str = "",
    priority: int = 0,
    cache_salt: str = "",
) -> inference_pb2.GenerateRequest:
    """The message for a generation.

    Raises:
        InvalidArgumentError: a value does not fit its field's type; everything else is for the gateway to judge.
    """
    message = inference_pb2.GenerateRequest()
    fields = {"request_id": request_id, "model": model, "priority": priority, "cache_salt": cache_salt}
    for name, value in fields.items():
        try:
            setattr(message, name, value)
        except (ValueError, TypeError) as error:
            raise InvalidArgumentError(f"{name} cannot be sent: {error}", field=name, value=value) from error
    checked = check_prompt(prompt)
    try:
        if isinstance(checked, str):
            message.text = checked
        else:
            message.token_ids.ids.extend(checked)
            message.token_ids.SetInParent()
    except ValueError as error:
        raise InvalidArgumentError(f"the prompt cannot be sent: {error}", field="prompt") from error
    if sampling_params is not None:
        if not isinstance(sampling_params, SamplingParams):
            kind = type(sampling_params).__name__
            raise InvalidArgumentError(
                f"sampling_params must be SamplingParams, got {kind}", field="sampling_params", value=kind
            )
        message.sampling_params.CopyFrom(wire.sampling_params_to_wire(sampling_params))
    return message


def chunk_from_wire(message: inference_pb2.GenerateResponse) -> GenerateChunk:
    """One streamed piece."""
    piece = wire.output_from_wire(
        common_pb2.SequenceOutput(
            token_ids=message.token_ids,
            logprobs=message.logprobs,
            prompt_logprobs=message.prompt_logprobs,
            finish_reason=message.finish_reason,
        ),
        message.request_id,
    )
    return GenerateChunk(
        request_id=message.request_id,
        index=message.index,
        text=message.text,
        token_ids=piece.token_ids,
        logprobs=piece.logprobs,
        prompt_logprobs=piece.prompt_logprobs,
        finish_reason=piece.finish_reason,
        summary=wire.copied(GenerateSummary, message.summary) if message.HasField("summary") else None,
    )


def model_from_wire(message: inference_pb2.GetModelInfoResponse) -> ServedModel:
    """Field by field."""
    return ServedModel(
        name=message.model,
        fingerprint=message.fingerprint,
        dtype=message.dtype,
        max_model_len=message.max_model_len,
        vocab_size=message.vocab_size,
        eos_token_ids=tuple(message.eos_token_ids),
        num_layers=message.num_layers,
        num_heads=message.num_heads,
        num_kv_heads=message.num_kv_heads,
        head_dim=message.head_dim,
        hidden_size=message.hidden_size,
        version=message.version,
    )


def collect(chunks: Iterable[GenerateChunk]) -> GenerateResult:
    """Put a request's chunks together.

    Raises:
        InternalError: the stream ended without an end for every sequence that it began.
    """
    sequences: dict[int, _Collected] = {}
    request_id = ""
    for chunk in chunks:
        request_id = chunk.request_id
        sequences.setdefault(chunk.index, _Collected()).add(chunk)
    if not sequences:
        raise InternalError("the gateway ended the stream without a sequence")
    return GenerateResult(request_id, tuple(sequences[index].whole(index) for index in sorted(sequences)))


@dataclass(slots=True)
class _Collected:
    """What has arrived of one sequence."""

    chunks: list[GenerateChunk] = field(default_factory=list)

    def add(self, chunk: GenerateChunk) -> None:
        self.chunks.append(chunk)

    def whole(self, index: int) -> Completion:
        last = self.chunks[-1]
        if last.finish_reason is None or last.summary is None:
            raise InternalError(f"the gateway ended the stream before sequence {index} was done")
        return Completion(
            index=index,
            text="".join(chunk.text for chunk in self.chunks),
            token_ids=tuple(token for chunk in self.chunks for token in chunk.token_ids),
            logprobs=tuple(entry for chunk in self.chunks for entry in chunk.logprobs),
            prompt_logprobs=next((c.prompt_logprobs for c in self.chunks if c.prompt_logprobs is not None), None),
            finish_reason=last.finish_reason,
            summary=last.summary,
        )
