"""The embedded way to run a model: no Ray, no gRPC, one object.

with LLM("demo") as llm:
    print(llm.generate("def add(a, b):")[0].outputs[0].text)
"""

from __future__ import annotations

import itertools
import secrets
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self

from ..runtime.config import SchedulerConfig
from ..runtime.errors import FuselineError, InternalError, InvalidArgumentError, UnavailableError
from ..runtime.request import FinishReason, Request, SequenceOutput, TokenLogprobs
from ..runtime.request_check import check_request
from ..runtime.sampling_params import MAX_SEED, SamplingParams, child_seed
from ..runtime.sharding import ParallelConfig
from .generation_bar import GenerationBar, loading_bar
from .group import GroupConfig, ModelGroup
from .prompts import Prompt, check_prompts, per_prompt
from .rank_protocol import RankFailure, error_of
from .tokenizer import OutputText, Tokenizer


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One generated sequence.

    Attributes:
        index: which of the request's ``n``.
        logprobs: one entry per token, when asked for.
        stop_reason: the stop string or stop token id that ended the sequence; None for anything else.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None
    finish_reason: FinishReason
    stop_reason: str | int | None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What became of one prompt.

    Attributes:
        prompt: as text, None when it was given as token ids.
        prompt_logprobs: one entry per prompt token after the first, when asked for.
        num_cached_tokens: prompt tokens that the first sequence found in the prefix cache.
    """

    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    num_cached_tokens: int = 0


@dataclass(slots=True)
class _Generation:
    """A sequence under way."""

    index: int
    request: Request
    text: OutputText
    pieces: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    def take(self, output: SequenceOutput) -> None:
        """Take up what the engine says; raises the sequence's error if that is how it ended."""
        if output.finish_reason is FinishReason.ERROR:
            if output.error_code is None:
                raise InternalError(output.error)
            raise error_of(RankFailure(output.error_code, output.error, {}), self.request.request_id)
        piece = self.text.add(output.token_ids, output.finish_reason)
        self.pieces.append(piece.text)
        self.token_ids += output.token_ids[: piece.num_tokens]
        self.logprobs += output.logprobs[: piece.num_tokens]
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        self.finish_reason, self.stop_reason = piece.finish_reason, piece.stop_reason

    def result(self) -> CompletionOutput:
        if self.finish_reason is None:
            raise InternalError(f"{self.request.request_id} has not ended")
        return CompletionOutput(
            index=self.index,
            text="".join(self.pieces),
            token_ids=tuple(self.token_ids),
            logprobs=tuple(self.logprobs) if self.request.params.logprobs is not None else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )


class LLM:
    """A model in this process, plus one process for each further rank.

    Args:
        model: "demo" for the bundled one, a directory, or the id of a Hugging Face repository.
        device: "cpu", "cuda", or "auto" for cuda where there is one.
        dtype: "float32", "bfloat16", "float16", or "auto" for the checkpoint's, or float32 on a CPU with
            neither native kernels nor instructions for that.
        quantization: of the linear layers: "int8" (with 8-bit activations), "int4" (groups of 32), "int4_g64",
            "int4_g128" round the weights while loading, "none" leaves them; "auto" follows the checkpoint, which may
            be of GPTQ, AWQ or compressed-tensors.
        kv_cache_dtype: "int8", with a scale for each head of each token, halves the KV cache; "auto" keeps ``dtype``.
        max_model_len: most tokens of a sequence, prompt and output; None takes what the model was made for.
        max_num_seqs: most sequences that run at once.
        max_num_batched_tokens: most tokens that one step computes.
        num_kv_blocks, kv_cache_memory_bytes, gpu_memory_utilization, num_threads: see ``GroupConfig``.

    Raises:
        NotFoundError: there is no such model.
        ModelFormatError: it is malformed, not supported, or cannot be sharded so.
        InvalidArgumentError: an option is out of range.
        ResourceExhaustedError: too little memory, or too few devices.
        UnavailableError: a rank did not start.
    """

    def __init__(
        self,
        model: str,
        *,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        device: str = "auto",
        dtype: str = "auto",
        quantization: str = "auto",
        kv_cache_dtype: str = "auto",
        max_model_len: int | None = None,
        block_size: int = 16,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 2048,
        num_kv_blocks: int | None = None,
        kv_cache_memory_bytes: int | None = None,
        gpu_memory_utilization: float = 0.9,
        enable_prefix_caching: bool = True,
        num_threads: int | None = None,
    ) -> None:
        config = GroupConfig(
            model=str(model),
            device=device,
            dtype=dtype,
            quantization=quantization,
            kv_cache_dtype=kv_cache_dtype,
            max_model_len=max_model_len,
            parallel=ParallelConfig(tensor_parallel_size, pipeline_parallel_size),
            scheduler=SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens),
            block_size=block_size,
            num_kv_blocks=num_kv_blocks,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            gpu_memory_utilization=gpu_memory_utilization,
            enable_prefix_caching=enable_prefix_caching,
            num_threads=num_threads,
        )
        self._lock = threading.Lock()
        self._request_ids = itertools.count()
        with loading_bar(model) as progress:
            self._group = ModelGroup.start(config, progress=progress)
        # Whoever forgets to close must not be left with processes and gigabytes.
        self._close = weakref.finalize(self, self._group.close)
        try:
            self.tokenizer = Tokenizer.load(self._group.model_path)
        except FuselineError:
            self.close()
            raise

    @property
    def group(self) -> ModelGroup:
        """The ranks and the engine, for looking at; it is driven by ``generate``."""
        return self._group

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: Sequence[int] | None = None,
        progress: bool | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts; blocks until all are done. One call at a time.

        Args:
            prompts: one or several, each a text or its token ids.
            sampling_params: one for all, or one per prompt; None for the defaults. A seed of None draws one.
            priority: per prompt, lower runs first.
            progress: show a bar that moves with every token, and their rate; None does so on a terminal.

        Returns:
            One output per prompt, in order.

        Raises:
            InvalidArgumentError: a prompt or option that the model cannot serve; nothing is generated then.
            ResourceExhaustedError: a prompt can never fit into the KV cache.
            UnavailableError: the LLM is closed, or one of its ranks is lost.
        """
        if not self._close.alive:
            raise UnavailableError("the LLM is closed")
        if not self._lock.acquire(blocking=False):
            raise InvalidArgumentError("generate is running already; an LLM serves one call at a time")
        try:
            texts, token_ids = self._tokenize(prompts)
            params = per_prompt("sampling_params", sampling_params, SamplingParams(), len(texts))
            priorities = per_prompt("priority", priority, 0, len(texts))
            groups = [
                self._expand(ids, one, rank) for ids, one, rank in zip(token_ids, params, priorities, strict=True)
            ]
            generations = [generation for group in groups for generation in group]
            for generation in generations:
                check_request(self._group.engine_config, generation.request)
            self._run(generations, progress)
            return [_output(text, group) for text, group in zip(texts, groups, strict=True)]
        finally:
            self._lock.release()

    def close(self) -> None:
        """End the ranks and free the memory; idempotent."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _tokenize(self, prompts: object) -> tuple[list[str | None], list[tuple[int, ...]]]:
        checked = check_prompts(prompts)
        texts = [prompt if isinstance(prompt, str) else None for prompt in checked]
        ids = [tuple(self.tokenizer.encode(p) if isinstance(p, str) else p) for p in checked]
        return texts, ids

    def _expand(self, token_ids: tuple[int, ...], params: SamplingParams, priority: int) -> list[_Generation]:
        """The ``n`` sequences of a prompt; prompt logprobs are computed once, by the first."""
        seed = secrets.randbelow(MAX_SEED + 1) if params.seed is None else params.seed
        generations = []
        for index in range(params.n):
            child = params if index == 0 else replace(params, prompt_logprobs=None)
            request = Request(
                request_id=f"llm-{next(self._request_ids)}",
                prompt_token_ids=token_ids,
                params=child,
                seed=child_seed(seed, index),
                priority=priority,
            )
            generations.append(_Generation(index, request, OutputText(self.tokenizer, params)))
        return generations

    def _run(self, generations: list[_Generation], progress: bool | None) -> None:
        engine = self._group.engine
        queued = iter(generations)
        live: dict[str, _Generation] = {}
        limit = engine.config.scheduler.max_num_queued
        try:
            with GenerationBar([g.request.params.max_tokens for g in generations], progress) as bar:
                for generation in itertools.islice(queued, limit):
                    live[generation.request.request_id] = generation
                    engine.add_request(generation.request)
                while live:
                    num_tokens, ended = self._take_up(engine.step(), live)
                    for generation in itertools.islice(queued, len(ended)):
                        live[generation.request.request_id] = generation
                        engine.add_request(generation.request)
                    num_unused = sum(g.request.params.max_tokens - len(g.token_ids) for g in ended)
                    bar.advance(num_tokens, len(ended), num_unused)
        finally:  # an error, or the user's interrupt: nothing may stay behind
            for request_id in live:
                engine.abort(request_id)
            while live and engine.failure is None and engine.has_unfinished:
                engine.step()

    def _take_up(self, outputs: list[SequenceOutput], live: dict[str, _Generation]) -> tuple[int, list[_Generation]]:
        """Give outputs to their generations; returns how many tokens came, and those that have ended."""
        num_tokens = 0
        ended: list[_Generation] = []
        for output in outputs:
            generation = live.get(output.request_id)
            if generation is None:
                continue
            before = len(generation.token_ids)
            generation.take(output)
            num_tokens += len(generation.token_ids) - before
            if generation.finish_reason is not None:
                if output.finish_reason is None:  # a stop string, of which the engine knows nothing
                    self._group.engine.abort(output.request_id, FinishReason.STOP)
                del live[output.request_id]
                ended.append(generation)
        return num_tokens, ended


def _output(text: str | None, generations: Sequence[_Generation]) -> RequestOutput:
    first = generations[0]
    return RequestOutput(
        prompt=text,
        prompt_token_ids=first.request.prompt_token_ids,
        outputs=tuple(generation.result() for generation in generations),
        prompt_logprobs=first.prompt_logprobs,
        num_cached_tokens=first.num_cached_tokens,
    )
