"""An executor in pure Python that is a model, and checks as it goes that every key and value is what it should be.

Its "KV" at a position is a digest of all tokens up to there, stored per block and offset as ranks store theirs. A
step writes all its positions first, as each layer of a real model does, then reads every earlier position of every
row through the block table: a wrong block, a reused one, a position computed by the wrong token, too early or not at
all is found on the spot. The next token is a function of the digest alone, so it is the same under any schedule.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fuseline.runtime.config import CacheConfig, EngineConfig, ModelInfo, SchedulerConfig
from fuseline.runtime.errors import UnavailableError
from fuseline.runtime.plan import AdmittedSequence, StepPlan, StepResult
from fuseline.runtime.request import TokenLogprobs
from fuseline.runtime.sampling_params import SamplingParams
from fuseline.runtime.sharding import ModelShape, ParallelConfig

VOCAB_SIZE = 50
EOS = 0
MASK = 2**61 - 1


def engine_config(
    *,
    num_blocks: int = 16,
    block_size: int = 4,
    max_num_seqs: int = 4,
    max_num_batched_tokens: int = 16,
    max_model_len: int = 48,
    depth: int = 1,
    prefix_caching: bool = True,
    max_num_queued: int = 100,
    handoff_timeout_s: float = 120.0,
    vocab_size: int = VOCAB_SIZE,
) -> EngineConfig:
    shape = ModelShape(
        num_layers=4,
        num_heads=4,
        num_kv_heads=4,
        head_dim=8,
        hidden_size=32,
        intermediate_size=64,
        vocab_size=vocab_size,
    )
    return EngineConfig(
        model=ModelInfo("oracle", "f00d", shape, "float32", max_model_len, (EOS,)),
        cache=CacheConfig(num_blocks, block_size, prefix_caching),
        scheduler=SchedulerConfig(max_num_seqs, max_num_batched_tokens, max_num_queued, handoff_timeout_s),
        parallel=ParallelConfig(pipeline_parallel_size=depth),
    )


def extend(digest: int, token: int) -> int:
    return (digest * 1_000_003 + token + 1) & MASK


def digest_of(tokens: tuple[int, ...] | list[int]) -> int:
    digest = 7
    for token in tokens:
        digest = extend(digest, token)
    return digest


def choose(digest: int, banned: frozenset[int], vocab_size: int = VOCAB_SIZE) -> int:
    """The model and its sampler: the digest names a token, the next one that is not banned is taken."""
    token = (digest >> 7) % vocab_size
    while token in banned:
        token = (token + 1) % vocab_size
    return token


def end_ids(params: SamplingParams) -> frozenset[int]:
    """Tokens that end a sequence, and that the sampler bans before min_tokens."""
    return frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else {EOS})


def generate(prompt: tuple[int, ...], params: SamplingParams, max_len: int) -> list[int]:
    """What the model says after this prompt, one sequence alone."""
    ends = end_ids(params)
    outputs: list[int] = []
    digest = digest_of(prompt)
    while len(outputs) < params.max_tokens and len(prompt) + len(outputs) < max_len:
        token = choose(digest, ends if len(outputs) < params.min_tokens else frozenset())
        outputs.append(token)
        digest = extend(digest, token)
        if token in ends and len(outputs) >= params.min_tokens:
            break
    return outputs


@dataclass
class Row:
    admitted: AdmittedSequence
    tokens: list[int]
    block_ids: list[int]
    num_computed: int


@dataclass
class OracleExecutor:
    """Mirrors rows as a rank does. ``plans`` keeps what was submitted, newest last."""

    config: EngineConfig
    fails_at_step: int = -1
    rows: dict[int, Row] = field(default_factory=dict)
    kv: dict[tuple[int, int], int] = field(default_factory=dict)
    results: deque[StepResult] = field(default_factory=deque)
    plans: deque[StepPlan] = field(default_factory=lambda: deque(maxlen=1000))
    num_computed_tokens: int = 0

    def submit(self, plan: StepPlan) -> None:
        if plan.step_id == self.fails_at_step:
            raise UnavailableError("rank 1 is gone")
        assert len(self.results) < self.config.parallel.pipeline_parallel_size
        assert not self.plans or plan.step_id == self.plans[-1].step_id + 1
        assert 0 < len(plan.rows) == len(set(plan.rows.tolist()))
        assert 0 < plan.num_tokens.sum() <= self.config.scheduler.max_num_batched_tokens
        assert {admitted.row for admitted in plan.admitted} <= set(plan.rows.tolist()), "admitted, but not to run"
        for array in (plan.rows, plan.num_tokens, plan.positions, plan.input_tokens, plan.new_block_ids):
            assert array.dtype == np.int32
        self.plans.append(plan)
        self._mirror(plan)
        self.results.append(self._run(plan))

    def collect(self) -> StepResult:
        return self.results.popleft()

    def write(self, block_ids: Sequence[int], tokens: tuple[int, ...], num_cached_tokens: int) -> None:
        """What a KV transfer does: fill a reservation's blocks, except for the cached part."""
        size = self.config.cache.block_size
        for position in range(num_cached_tokens, len(tokens)):
            self.kv[block_ids[position // size], position % size] = digest_of(tokens[: position + 1])

    def check_holds(self, block_ids: Sequence[int], tokens: tuple[int, ...]) -> None:
        """What a KV transfer reads on a prefill engine must be the prompt's."""
        size = self.config.cache.block_size
        for position in range(len(tokens)):
            assert self.kv[block_ids[position // size], position % size] == digest_of(tokens[: position + 1])

    def _mirror(self, plan: StepPlan) -> None:
        for row in plan.released:
            del self.rows[row]
        for admitted in plan.admitted:
            assert admitted.row not in self.rows
            assert 0 <= admitted.row < self.config.scheduler.max_num_seqs
            self.rows[admitted.row] = Row(
                admitted, list(admitted.token_ids), list(admitted.block_ids), admitted.num_computed_tokens
            )
        for row, block in zip(plan.new_block_rows.tolist(), plan.new_block_ids.tolist(), strict=True):
            self.rows[row].block_ids.append(block)

    def _run(self, plan: StepPlan) -> StepResult:
        batch = list(
            zip(
                plan.rows.tolist(),
                plan.num_tokens.tolist(),
                plan.positions.tolist(),
                plan.input_tokens.tolist(),
                plan.samples.tolist(),
                strict=True,
            )
        )
        size = self.config.cache.block_size
        written = set()
        for number, num_tokens, position, input_token, samples in batch:
            row = self.rows[number]
            if input_token >= 0:
                row.tokens.append(input_token)
            assert position == row.num_computed
            assert samples == (position + num_tokens == len(row.tokens))
            digest = digest_of(row.tokens[:position])
            for index in range(position, position + num_tokens):
                digest = extend(digest, row.tokens[index])
                slot = row.block_ids[index // size], index % size
                assert slot not in written, "two rows write one slot"
                written.add(slot)
                self.kv[slot] = digest
            row.num_computed = position + num_tokens
            self.num_computed_tokens += num_tokens
        token_ids, logprobs, prompt_logprobs = [], {}, {}
        for number, num_tokens, position, _, samples in batch:
            row = self.rows[number]
            digest = 7
            for index in range(position + num_tokens):
                digest = extend(digest, row.tokens[index])
                slot = row.block_ids[index // size], index % size
                assert self.kv[slot] == digest, f"position {index} of {row.admitted.request_id} is not its own"
            params, num_prompt = row.admitted.params, row.admitted.num_prompt_tokens
            if samples:
                banned = end_ids(params) if len(row.tokens) - num_prompt < params.min_tokens else frozenset[int]()
                token_ids.append(choose(digest, banned, self.config.model.shape.vocab_size))
                if params.logprobs is not None:
                    logprobs[number] = TokenLogprobs(token_ids[-1], -0.5, 1)
            if params.prompt_logprobs is not None and position < num_prompt - 1:
                ends = min(position + num_tokens, num_prompt - 1)
                prompt_logprobs[number] = tuple(
                    TokenLogprobs(row.tokens[index + 1], -float(index), 1) for index in range(position, ends)
                )
        return StepResult(plan.step_id, np.array(token_ids, np.int32), logprobs, prompt_logprobs)
