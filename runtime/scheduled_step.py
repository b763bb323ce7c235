"""A step on its way: the plan that the ranks got, and the sequences that are in it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .plan import StepPlan
from .sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens ``[start, end)`` of one prefilling sequence; ``block_hashes`` are of the prefix blocks they complete."""

    seq: Sequence
    start: int
    end: int
    samples: bool
    block_hashes: list[bytes]


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    """A plan and who is in it. The batch is ``decode_rows``, then ``chunks``.

    Attributes:
        rows: intp[n], all of the plan's rows.
        decode_rows: intp[m], the first m of them.
        decode_seqs: their sequences.
    """

    plan: StepPlan
    rows: NDArray[np.intp]
    decode_rows: NDArray[np.intp]
    decode_seqs: list[Sequence]
    chunks: list[Chunk]
