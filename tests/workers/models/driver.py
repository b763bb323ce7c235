"""Runs a loaded model, on one rank or on several ranks as threads, over sequences in a paged cache.

Blocks are handed out in random order, and the cache starts full of NaN, so that reading anything but a sequence's own
KV shows.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch

from fuseline.collectives.communicator import (
    CommunicatorStore,
    GroupCommunicators,
    SoloCommunicator,
    make_communicators,
)
from fuseline.kernels.cpu.threads import set_num_threads
from fuseline.runtime.sharding import ParallelConfig
from fuseline.workers.forward_batch import ForwardBatch, ForwardBuffers
from fuseline.workers.loader import load_model
from fuseline.workers.models.decoder import DecoderModel
from fuseline.workers.models.registry import load_model_config

CPU = torch.device("cpu")
MAX_TOKENS = 1024
TIMEOUT_S = 60.0
T = TypeVar("T")


@dataclass
class Sequence:
    """Token ids, the first ``num_prompt`` of them the prompt, and the blocks they live in."""

    token_ids: list[int]
    num_prompt: int
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0


class Driver:
    """Builds batches for one group and runs them on all its ranks."""

    def __init__(
        self,
        models: list[DecoderModel],
        communicators: list[GroupCommunicators],
        parallel: ParallelConfig,
        block_size: int,
        num_blocks: int,
        seed: int,
    ) -> None:
        self.models = models
        self._communicators = communicators
        self._parallel = parallel
        self._block_size = block_size
        self._free = list(range(num_blocks))
        random.Random(seed).shuffle(self._free)
        self.caches = [model.new_kv_cache(num_blocks, block_size) for model in models]
        for cache in self.caches:
            cache.fill_(-1 if cache.dtype == torch.int8 else float("nan"))
        self._buffers = ForwardBuffers(16, MAX_TOKENS, num_blocks, CPU)
        self._pool = ThreadPoolExecutor(parallel.world_size)

    def close(self) -> None:
        self._pool.shutdown()

    def step(self, work: list[tuple[Sequence, int]]) -> list[torch.Tensor]:
        """Compute so many tokens of each sequence; all their logits, [tokens, vocab_size] per sequence."""
        batch = self.batch(work)
        results = list(self._pool.map(lambda rank: self._forward(rank, batch), range(self._parallel.world_size)))
        last_stage = results[-self._parallel.tensor_parallel_size :]
        for empty in last_stage[1:]:
            assert empty.shape == (0, last_stage[0].shape[1])
        assert last_stage[0].dtype == torch.float32
        return list(torch.split(last_stage[0], [num_tokens for _, num_tokens in work]))

    def greedy(self, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        """Prefill each prompt alone, then decode all together."""
        sequences = [Sequence(list(prompt), len(prompt)) for prompt in prompts]
        for sequence in sequences:
            (logits,) = self.step([(sequence, len(sequence.token_ids))])
            sequence.token_ids.append(int(logits[-1].argmax()))
        for _ in range(num_tokens - 1):
            for sequence, logits in zip(sequences, self.step([(s, 1) for s in sequences]), strict=True):
                sequence.token_ids.append(int(logits[-1].argmax()))
        return [sequence.token_ids[sequence.num_prompt :] for sequence in sequences]

    def _forward(self, rank: int, batch: ForwardBatch) -> torch.Tensor:
        try:
            return self._forward_rank(rank, batch)
        except BaseException:
            self._communicators[rank].close()  # or its peers would wait for it until they time out
            raise

    def _forward_rank(self, rank: int, batch: ForwardBatch) -> torch.Tensor:
        torch.set_num_threads(1)
        pp = self._communicators[rank].pp
        hidden = None
        model = self.models[rank]
        if pp.rank > 0:
            shape = (batch.num_tokens, model.config.hidden_size)
            hidden = pp.recv(torch.empty(shape, dtype=torch.float32), pp.rank - 1)
        result = model.forward(batch, self.caches[rank], hidden)
        if pp.rank < pp.world_size - 1:
            pp.send(result, pp.rank + 1)
        return result

    def batch_of(self, token_ids: list[int], num_logits: int) -> ForwardBatch:
        """The batch that computes one new sequence at once and wants the logits of its last tokens."""
        batch = self.batch([(Sequence(token_ids, len(token_ids)), len(token_ids))])
        return replace(batch, logits_indices=batch.logits_indices[len(token_ids) - num_logits :])

    def batch(self, work: list[tuple[Sequence, int]]) -> ForwardBatch:
        """The next so many tokens of each sequence, all of whose logits are wanted."""
        buffers, size, token = self._buffers, self._block_size, 0
        buffers.block_tables.fill(2**30)  # no id of a block: whoever reads it finds out
        buffers.query_start[0] = 0
        for row, (sequence, num_tokens) in enumerate(work):
            start, end = sequence.num_computed, sequence.num_computed + num_tokens
            while len(sequence.blocks) * size < end:
                sequence.blocks.append(self._free.pop())
            span = slice(token, token + num_tokens)
            buffers.token_ids[span] = sequence.token_ids[start:end]
            buffers.positions[span] = range(start, end)
            buffers.slot_mapping[span] = [sequence.blocks[p // size] * size + p % size for p in range(start, end)]
            buffers.logits_indices[span] = range(token, token + num_tokens)
            buffers.block_tables[row, : len(sequence.blocks)] = sequence.blocks
            buffers.context_lens[row] = end
            buffers.prompt_lens[row] = sequence.num_prompt
            token += num_tokens
            buffers.query_start[row + 1] = token
            sequence.num_computed = end
        return buffers.batch(len(work), token, token)


def on_every_rank(world_size: int, do: Callable[[int], T]) -> list[T]:
    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(do, range(world_size)))


@contextmanager
def run_group(
    path: Path,
    *,
    tp: int = 1,
    pp: int = 1,
    dtype: str = "float32",
    block_size: int = 4,
    num_blocks: int = 256,
    seed: int = 0,
    quantization: str = "auto",
    kv_dtype: str | None = None,
) -> Iterator[Driver]:
    """Load the checkpoint on ``tp * pp`` ranks of this process, joined by real communicators.

    ``kv_dtype`` is that of the weights when it is None.
    """
    set_num_threads(1)  # ranks that wait for one another cannot take turns with a larger team
    parallel = ParallelConfig(tp, pp)
    config = load_model_config(path)
    store = CommunicatorStore() if parallel.world_size > 1 else None
    address = store.address if store is not None else ""
    if store is None:
        communicators = [GroupCommunicators(SoloCommunicator(), SoloCommunicator())]
    else:
        communicators = on_every_rank(
            parallel.world_size, lambda rank: make_communicators(address, parallel, rank, CPU, TIMEOUT_S)
        )
    driver = None
    try:
        models = [
            load_model(
                path,
                config,
                dtype,
                kv_dtype or dtype,
                CPU,
                parallel,
                rank,
                communicators[rank],
                quantization=quantization,
            )
            for rank in range(parallel.world_size)
        ]
        driver = Driver(models, communicators, parallel, block_size, num_blocks, seed)
        yield driver
    finally:
        if driver is not None:
            driver.close()
        for communicator in communicators:
            communicator.close()
        if store is not None:
            store.close()


def random_schedule(driver: Driver, prompts: list[list[int]], seed: int, max_chunk: int = 40) -> list[torch.Tensor]:
    """Compute all tokens of all sequences in random mixes of chunks and single tokens; logits per sequence."""
    draw = random.Random(seed)
    sequences = [Sequence(list(prompt), len(prompt)) for prompt in prompts]
    parts: list[list[torch.Tensor]] = [[] for _ in sequences]
    while waiting := [i for i, s in enumerate(sequences) if s.num_computed < len(s.token_ids)]:
        chosen = draw.sample(waiting, draw.randint(1, len(waiting)))
        work = []
        for i in chosen:
            left = len(sequences[i].token_ids) - sequences[i].num_computed
            work.append((sequences[i], min(left, draw.choice([1, 1, draw.randint(2, max_chunk)]))))
        for i, logits in zip(chosen, driver.step(work), strict=True):
            parts[i].append(logits)
    return [torch.cat(part) for part in parts]
