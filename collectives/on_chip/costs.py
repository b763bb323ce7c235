"""What a schedule puts on the wire between SMs, and the formulas it must agree with."""

from __future__ import annotations

from .schedule import Schedule, Send, Wait


def sent_elements(schedule: Schedule) -> int:
    """Elements that all CTAs together send in one of the schedule's epochs."""
    sends = (op for program in schedule.programs for op in program if isinstance(op, Send))
    return sum(len(send.source) for send in sends) // schedule.num_epochs


def waits(schedule: Schedule) -> int:
    """How often a CTA waits for an mbarrier in one epoch."""
    return sum(isinstance(op, Wait) for op in schedule.programs[0]) // schedule.num_epochs


def reduce_log2_elements(size: int, num_ctas: int) -> int:
    """size * log2(N) * N, the paper's count for ClusterReduce."""
    return size * (num_ctas.bit_length() - 1) * num_ctas


def gather_elements(size: int, num_ctas: int) -> int:
    """size * (N - 1) * N: ClusterGather in either form, and the one-shot ClusterReduce."""
    return size * (num_ctas - 1) * num_ctas
