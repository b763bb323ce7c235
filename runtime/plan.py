"""What the engine tells the ranks to compute, and what they answer: the only data that crosses that boundary.

A plan is a *diff*. Every rank keeps a mirror of the rows it was told about: token ids, block table and sampling
options per row. A row is a slot in ``[0, max_num_seqs)`` that a sequence holds from admission to release, so that a
rank's per-step metadata lives in preallocated arrays. Order inside a step: release rows, admit sequences, append
blocks, append the input tokens, compute, sample.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .request import TokenLogprobs
from .sampling_params import SamplingParams

Int32Array = NDArray[np.int32]

NO_TOKEN = -1
"""Stands in a result for the token of a row whose logits are not finite; that sequence ends, its batch does not."""


@dataclass(frozen=True, slots=True)
class AdmittedSequence:
    """A sequence that takes a row: new, resumed after preemption, or arriving with its KV from a prefill engine.

    Attributes:
        token_ids: everything known so far, prompt and outputs.
        num_prompt_tokens: how many of them are the prompt; penalties and min_tokens need to know.
        block_ids: its block table so far.
        num_computed_tokens: tokens whose KV is already in those blocks.
        handoff_id: set on a prefill engine when the KV goes to a decode engine; names the handoff to the ranks.
    """

    row: int
    request_id: str
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    block_ids: tuple[int, ...]
    num_computed_tokens: int
    params: SamplingParams
    seed: int
    handoff_id: str = ""


def _empty() -> Int32Array:
    return np.empty(0, np.int32)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward step. Arrays of the scheduled rows share one order, that of the batch.

    Attributes:
        step_id: counts from 0; results come back under it, in order.
        released: rows that no longer hold a sequence; may be admitted anew in the same plan.
        admitted: sequences that take a row from this step on.
        new_block_rows, new_block_ids: blocks appended to block tables, pairwise, in order.
        rows: int32[n], the scheduled rows.
        num_tokens: int32[n], tokens to compute for each, at least 1.
        positions: int32[n], position of the first of them (the row's num_computed_tokens).
        input_tokens: int32[n], the token to append before computing (the last sampled one), or -1 for none.
        samples: bool[n], whether a token is sampled after the row's last computed position.
    """

    step_id: int
    rows: Int32Array
    num_tokens: Int32Array
    positions: Int32Array
    input_tokens: Int32Array
    samples: NDArray[np.bool_]
    released: tuple[int, ...] = ()
    admitted: tuple[AdmittedSequence, ...] = ()
    new_block_rows: Int32Array = field(default_factory=_empty)
    new_block_ids: Int32Array = field(default_factory=_empty)


@dataclass(frozen=True, slots=True)
class StepResult:
    """Answer to a plan.

    Attributes:
        token_ids: int32[m], the sampled tokens (or ``NO_TOKEN``) of the rows with ``samples`` set, in batch order.
        logprobs: by row, for rows whose request asked for them.
        prompt_logprobs: by row, of the prompt positions that this step computed, for rows that asked.
    """

    step_id: int
    token_ids: Int32Array
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]] = field(default_factory=dict)


class Executor(Protocol):
    """Runs plans on the ranks of one group. With P pipeline stages up to P plans may be in flight."""

    def submit(self, plan: StepPlan) -> None:
        """Start a step. Returns at once; never more than the pipeline depth are outstanding.

        Raises:
            UnavailableError: a rank is gone.
        """

    def collect(self) -> StepResult:
        """Wait for the oldest outstanding step.

        Raises:
            UnavailableError: a rank is gone.
            FuselineError: the step failed on a rank; the group is unusable.
        """
