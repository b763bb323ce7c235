"""Turns step plans into forward passes on one rank, and logits into tokens on the rank that has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..collectives.communicator import Communicator
from ..runtime.config import EngineConfig
from ..runtime.errors import InternalError
from ..runtime.plan import StepPlan, StepResult
from ..runtime.request import TokenLogprobs
from .forward_batch import ForwardBatch, ForwardBuffers
from .models.decoder import DecoderModel
from .sampler import Sampler, SamplingRow, token_logprobs

OnLayer = Callable[[int], None]


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Keep torch to the calling thread, and give it back its threads afterwards.

    OpenMP's threads spin for milliseconds after each operation, on the cores that the native team computes on.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


class ModelRunner:
    """Mirrors the engine's rows and runs its plans. Used by one thread.

    Args:
        model: this rank's share.
        kv_cache: of ``model.new_kv_cache``.
        pp: communicator of the ranks with this tp_rank on all stages.
        is_first_of_stage: whether this rank's tp_rank is 0, so that it has the logits on the last stage.
    """

    def __init__(
        self,
        model: DecoderModel,
        kv_cache: Tensor,
        config: EngineConfig,
        pp: Communicator,
        *,
        is_first_of_stage: bool,
    ) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._config = config
        self._pp = pp
        self._samples = is_first_of_stage and pp.rank == pp.world_size - 1
        self._device = kv_cache.device
        self._block_size = config.cache.block_size
        self._sampler = Sampler(config.model.eos_token_ids)
        # The mirror, by row.
        num_rows = config.scheduler.max_num_seqs
        self._tokens = np.zeros((num_rows, config.model.max_model_len + 1), np.int32)
        self._block_tables = np.zeros((num_rows, config.max_blocks_per_seq), np.int32)
        self._num_blocks = np.zeros(num_rows, np.int32)
        self._prompt_lens = np.zeros(num_rows, np.int32)
        self._wants_prompt_logprobs = np.zeros(num_rows, np.bool_)
        self._rows: list[SamplingRow | None] = [None] * num_rows
        # A set for each step in flight; on a GPU a set is overwritten only when its copies to the device are done.
        self._buffers = [
            ForwardBuffers(num_rows, config.scheduler.max_num_batched_tokens, config.max_blocks_per_seq, self._device)
            for _ in range(pp.world_size)
        ]
        self._copied: list[torch.cuda.Event] = []
        if self._device.type == "cuda":
            self._copied = [torch.cuda.Event() for _ in self._buffers]  # type: ignore[no-untyped-call]

    def execute(self, plan: StepPlan, on_layer: OnLayer | None = None) -> StepResult | None:
        """Run one step; collective over the group's ranks. ``on_layer``: see ``DecoderModel.forward``.

        Returns:
            The result on the rank that samples, None on the others.

        Raises:
            InternalError: the plan contradicts the mirror.
            UnavailableError: a peer is gone.
        """
        if self._model.is_native:  # nothing is left for autograd to look at, and its inference mode takes a while
            with one_torch_thread():
                return self._execute(plan, on_layer)
        with torch.inference_mode():
            return self._execute(plan, on_layer)

    def _execute(self, plan: StepPlan, on_layer: OnLayer | None) -> StepResult | None:
        self._update_rows(plan)
        logprob_targets = self._prompt_logprob_targets(plan)
        batch = self._make_batch(plan, logprob_targets)
        hidden: Tensor | None = None
        if self._pp.rank > 0:
            shape = (batch.num_tokens, self._config.model.shape.hidden_size)
            hidden = self._pp.recv(torch.empty(shape, dtype=torch.float32, device=self._device), self._pp.rank - 1)
        output = self._model.forward(batch, self._kv_cache, hidden, on_layer)
        if self._pp.rank < self._pp.world_size - 1:
            self._pp.send(output, self._pp.rank + 1)
        return self._result(plan, output, logprob_targets) if self._samples else None

    # --- the mirror -----------------------------------------------------------------------------------------------

    def _update_rows(self, plan: StepPlan) -> None:
        for row in plan.released:
            self._row(row)
            self._rows[row] = None
            self._num_blocks[row] = 0
        for seq in plan.admitted:
            if self._rows[seq.row] is not None:
                raise InternalError(f"row {seq.row} is admitted while it holds a sequence")
            self._tokens[seq.row, : len(seq.token_ids)] = seq.token_ids
            self._block_tables[seq.row, : len(seq.block_ids)] = seq.block_ids
            self._num_blocks[seq.row] = len(seq.block_ids)
            self._prompt_lens[seq.row] = seq.num_prompt_tokens
            self._wants_prompt_logprobs[seq.row] = seq.params.prompt_logprobs is not None
            self._rows[seq.row] = SamplingRow(
                seq.params, seq.seed, self._tokens[seq.row], len(seq.token_ids), seq.num_prompt_tokens
            )
        for row, block_id in zip(plan.new_block_rows.tolist(), plan.new_block_ids.tolist(), strict=True):
            self._block_tables[row, self._num_blocks[row]] = block_id
            self._num_blocks[row] += 1
        for row, token_id in zip(plan.rows.tolist(), plan.input_tokens.tolist(), strict=True):
            if token_id >= 0:
                state = self._row(row)
                self._tokens[row, state.num_tokens] = token_id
                state.num_tokens += 1

    def _row(self, row: int) -> SamplingRow:
        state = self._rows[row]
        if state is None:
            raise InternalError(f"row {row} is used while it holds no sequence")
        return state

    # --- the batch ------------------------------------------------------------------------------------------------

    def _make_batch(self, plan: StepPlan, logprob_targets: dict[int, NDArray[np.int64]]) -> ForwardBatch:
        turn = plan.step_id % len(self._buffers)
        buffers = self._buffers[turn]
        if self._copied:
            self._copied[turn].synchronize()
        rows, lengths = plan.rows, plan.num_tokens
        num_seqs, num_tokens = len(rows), int(lengths.sum())
        starts = buffers.query_start[: num_seqs + 1]
        starts[0] = 0
        np.cumsum(lengths, out=starts[1:])
        positions = buffers.positions[:num_tokens]
        row_of_token = rows
        if num_tokens == num_seqs:
            positions[:] = plan.positions
        else:
            row_of_token = np.repeat(rows, lengths)
            np.subtract(np.arange(num_tokens), np.repeat(starts[:-1] - plan.positions, lengths), out=positions)
        buffers.token_ids[:num_tokens] = self._tokens[row_of_token, positions]
        blocks, offsets = np.divmod(positions, self._block_size)
        np.multiply(self._block_tables[row_of_token, blocks], self._block_size, out=buffers.slot_mapping[:num_tokens])
        buffers.slot_mapping[:num_tokens] += offsets
        context_lens = buffers.context_lens[:num_seqs]
        np.add(plan.positions, lengths, out=context_lens)
        buffers.prompt_lens[:num_seqs] = self._prompt_lens[rows]
        width = -(-int(context_lens.max()) // self._block_size)
        if (self._num_blocks[rows] * self._block_size < context_lens).any():
            for row in rows.tolist():
                self._row(row)  # one without a sequence has no blocks
            raise InternalError(f"step {plan.step_id} computes tokens beyond a row's blocks")
        buffers.block_tables[:num_seqs, :width] = self._block_tables[rows, :width]
        logits_indices = starts[1:][plan.samples] - 1
        for index, targets in logprob_targets.items():
            logits_indices = np.append(logits_indices, np.arange(starts[index], starts[index] + len(targets)))
        buffers.logits_indices[: len(logits_indices)] = logits_indices
        batch = buffers.batch(num_seqs, num_tokens, len(logits_indices))
        if self._copied:
            self._copied[turn].record()
        return batch

    def _prompt_logprob_targets(self, plan: StepPlan) -> dict[int, NDArray[np.int64]]:
        """By index in the batch: the prompt tokens that the computed positions of a row predict, if it asked."""
        targets: dict[int, NDArray[np.int64]] = {}
        for index in np.flatnonzero(self._wants_prompt_logprobs[plan.rows]).tolist():
            state = self._row(int(plan.rows[index]))
            first = int(plan.positions[index]) + 1
            if first >= state.num_prompt_tokens:
                continue
            last = min(first + int(plan.num_tokens[index]), state.num_prompt_tokens)
            targets[index] = state.tokens[first:last].astype(np.int64)
        return targets

    # --- the result -----------------------------------------------------------------------------------------------

    def _result(self, plan: StepPlan, logits: Tensor, logprob_targets: dict[int, NDArray[np.int64]]) -> StepResult:
        sampled_rows = plan.rows[plan.samples].tolist()
        num_samples = len(sampled_rows)
        if num_samples == 0:
            return StepResult(
                plan.step_id, np.empty(0, np.int32), {}, self._prompt_logprobs(plan, logits, logprob_targets)
            )
        sampled = self._sampler.sample(logits[:num_samples], [self._row(row) for row in sampled_rows])
        return StepResult(
            plan.step_id,
            sampled.token_ids.to("cpu", torch.int32).numpy(),
            {sampled_rows[i]: entry for i, entry in sampled.logprobs.items()},
            self._prompt_logprobs(plan, logits[num_samples:], logprob_targets),
        )

    def _prompt_logprobs(
        self, plan: StepPlan, logits: Tensor, logprob_targets: dict[int, NDArray[np.int64]]
    ) -> dict[int, tuple[TokenLogprobs, ...]]:
        result: dict[int, tuple[TokenLogprobs, ...]] = {}
        start = 0
        for index, targets in logprob_targets.items():
            row = int(plan.rows[index])
            num_top = self._row(row).params.prompt_logprobs or 0
            part = logits[start : start + len(targets)]
            token_ids = torch.from_numpy(targets).to(self._device)
            result[row] = tuple(token_logprobs(part, token_ids, [num_top] * len(targets)))
            start += len(targets)
        return result
