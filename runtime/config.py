"""One frozen, typed configuration tree; ``auto`` values are resolved before it is built."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from .errors import InvalidArgumentError
from .sharding import ModelShape, ParallelConfig, check_shardable

QUANTIZATIONS = ("auto", "none", "int8", "int4", "int4_g64", "int4_g128", "gptq", "awq", "compressed-tensors")
"""What ``--quantization`` may say; see ``workers.quantization.config`` for what it means."""

GPU_MEMORY_UTILIZATION = 0.05, 1.0
"""What ``--gpu-memory-utilization`` may lie between."""

TIMEOUT_S = 0.1, 86400.0
"""What the time for a start, a step or a drain may lie between."""

DEVICES = ("auto", "cpu", "cuda")
"""What ``--device`` may say; "auto" is "cuda" where there is one."""

KV_CACHE_DTYPES = ("auto", "int8")
"""What ``--kv-cache-dtype`` may say; "auto" is the model's dtype."""


def check_choice(field: str, value: str, choices: Collection[str]) -> None:
    """Refuse a value that ``field`` does not know.

    Raises:
        InvalidArgumentError: naming field, value and choices.
    """
    if value not in choices:
        known = ", ".join(choices)
        raise InvalidArgumentError(
            f"{field} must be one of {known}; got {value!r}", field=field, value=value, limit=known
        )


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Refuse a value outside ``[low, high]``.

    Raises:
        InvalidArgumentError: naming field, value and limit.
    """
    if not low <= value <= high:
        raise InvalidArgumentError(
            f"{name} must be between {low} and {high}, got {value}", field=name, value=value, limit=f"{low}..{high}"
        )


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What engine, router and wire need to know of a model; no tensors, no paths.

    Attributes:
        name: the name it is served under.
        fingerprint: hex SHA-256 over configuration and weight files; equal only for equal models.
        dtype: of weights that are not quantised, by torch's name without ``torch.``: "bfloat16", "float16" or
            "float32".
        max_model_len: most tokens, prompt and output together, that a sequence may have.
        eos_token_ids: each ends a sequence unless ``ignore_eos``.
        kv_depends_on_prompt_len: prompts that begin alike need not have the same KV (dynamic rotary embedding beyond
            its original length), so prefixes must not be shared.
        quantization: how linear layers are held, as ``--quantization`` names it; never "auto".
        kv_cache_dtype: one of ``KV_CACHE_DTYPES``.
    """

    name: str
    fingerprint: str
    shape: ModelShape
    dtype: str
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    kv_depends_on_prompt_len: bool = False
    quantization: str = "none"
    kv_cache_dtype: str = "auto"

    @property
    def kv_dtype(self) -> str:
        """Of the KV cache, named as ``dtype`` is."""
        return self.dtype if self.kv_cache_dtype == "auto" else self.kv_cache_dtype


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """The paged KV pool of one group; every rank holds the same block ids for its own layers and heads."""

    num_blocks: int
    block_size: int = 16
    enable_prefix_caching: bool = True

    def __post_init__(self) -> None:
        check_range("num_blocks", self.num_blocks, 1, 2**31 - 1)
        check_range("block_size", self.block_size, 1, 1024)


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of one engine step.

    Attributes:
        max_num_seqs: most sequences that run at once; also the number of rows in every per-step buffer.
        max_num_batched_tokens: token budget of a step; decodes are served first, prefill chunks fill the rest.
        max_num_queued: most requests that wait; one more is refused with ResourceExhaustedError.
        handoff_timeout_s: most seconds that blocks are held for a handoff: a reservation that is not committed, or
            a prefill that is not released, ends in FinishReason.DEADLINE.
    """

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    max_num_queued: int = 4096
    handoff_timeout_s: float = 120.0

    def __post_init__(self) -> None:
        check_range("max_num_seqs", self.max_num_seqs, 1, 65536)
        check_range("max_num_batched_tokens", self.max_num_batched_tokens, 1, 2**20)
        check_range("max_num_queued", self.max_num_queued, 1, 2**20)
        check_range("handoff_timeout_s", self.handoff_timeout_s, 0.001, 86400)
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise InvalidArgumentError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is less than max_num_seqs={self.max_num_seqs}:"
                " a step could not serve every running decode",
                field="max_num_batched_tokens",
                value=self.max_num_batched_tokens,
                limit=self.max_num_seqs,
            )


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything an engine decides by.

    Raises:
        ModelFormatError: the model's shape cannot be cut as ``parallel`` asks.
        InvalidArgumentError: prefix caching is on for a model whose prefixes cannot be shared.
    """

    model: ModelInfo
    cache: CacheConfig
    scheduler: SchedulerConfig = SchedulerConfig()
    parallel: ParallelConfig = ParallelConfig()

    def __post_init__(self) -> None:
        check_shardable(self.model.shape, self.parallel)
        check_range("max_model_len", self.model.max_model_len, 1, 2**24)
        if self.model.kv_depends_on_prompt_len and self.cache.enable_prefix_caching:
            raise InvalidArgumentError(
                f"beyond max_position_embeddings, as max_model_len={self.model.max_model_len} allows, the KV of"
                f" {self.model.name} depends on the prompt's length: prefix caching must be off",
                field="enable_prefix_caching",
                value=True,
            )

    @property
    def max_blocks_per_seq(self) -> int:
        """Width of a block table."""
        return -(-self.model.max_model_len // self.cache.block_size)
