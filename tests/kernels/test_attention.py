"""Paged attention against attention written out in float64, over ragged steps in a poisoned cache."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fuseline.kernels import ops
from fuseline.kernels.kv_rows import dequantize_rows, quantize_rows, row_width
from fuseline.kernels.ops import AttentionPlan, KernelArgumentError, StepMetadata
from fuseline.kernels.reference import attention_plan

Work = list[tuple[int, int]]
HEAD_DIM = 16


@dataclasses.dataclass
class Case:
    """A step of sequences given as (context length, tokens of this step), and all that went into its cache."""

    work: Work
    kv_cache: torch.Tensor
    step: StepMetadata
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    history: list[tuple[torch.Tensor, torch.Tensor]]

    def plan(self, *windows: int | None) -> AttentionPlan:
        return ops.plan_attention(self.step, self.kv_cache, windows or (None,), self.query.dtype)

    def run(self, window: int | None = None) -> torch.Tensor:
        plan = self.plan(window)
        ops.kv_store(self.key, self.value, self.kv_cache[0], plan)
        return ops.paged_attention(self.query, self.kv_cache[0], plan, HEAD_DIM**-0.5, window)


def build(
    work: Work,
    heads: int = 4,
    kv_heads: int = 2,
    block_size: int = 4,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    poison: float = float("nan"),
    kv_dtype: torch.dtype | None = None,
) -> Case:
    cache_dtype = kv_dtype or dtype
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    counts = [-(-context // block_size) for context, _ in work]
    num_blocks, width = sum(counts) + 5, max(counts) + 2
    free = draw.sample(range(num_blocks), num_blocks)
    shape = (1, 2, num_blocks, kv_heads, block_size, row_width(HEAD_DIM, cache_dtype))
    kv_cache = torch.full(shape, poison, dtype=cache_dtype)
    given = []
    tables = np.full((len(work), width), 2**30, np.int32)
    positions: list[int] = []
    slots: list[int] = []
    history = []
    for row, (context, num_tokens) in enumerate(work):
        blocks = [free.pop() for _ in range(counts[row])]
        tables[row, : len(blocks)] = blocks
        kv = torch.randn(2, context, kv_heads, HEAD_DIM, generator=generator).to(dtype)
        given.append(kv)
        rows = kv
        if cache_dtype == torch.int8:
            rows = quantize_rows(kv)
            kv = dequantize_rows(rows)
        history.append((kv[0], kv[1]))
        for position in range(context):
            slot = blocks[position // block_size], position % block_size
            if position < context - num_tokens:
                kv_cache[0, :, slot[0], :, slot[1]] = rows[:, position]
            else:
                positions.append(position)
                slots.append(slot[0] * block_size + slot[1])
    starts = np.cumsum([0, *(num_tokens for _, num_tokens in work)], dtype=np.int32)
    contexts = np.array([context for context, _ in work], np.int32)
    step = StepMetadata(
        positions=torch.tensor(positions),
        slot_mapping=torch.tensor(slots),
        query_start=torch.from_numpy(starts),
        context_lens=torch.from_numpy(contexts),
        block_tables=torch.from_numpy(tables),
        query_start_host=starts,
        context_lens_host=contexts,
        max_query_len=max(num_tokens for _, num_tokens in work),
        max_context_len=int(contexts.max()),
    )
    query = torch.randn(len(positions), heads, HEAD_DIM, generator=generator).to(dtype)
    key, value = (torch.cat([kv[i][-n:] for kv, (_, n) in zip(given, work, strict=True)]) for i in range(2))
    return Case(work, kv_cache, step, query, key, value, history)


def written_out(case: Case, window: int | None) -> torch.Tensor:
    """Query by query, head by head, in float64."""
    out = torch.empty(case.query.shape, dtype=torch.float64)
    group = case.query.shape[1] // case.key.shape[1]
    row = 0
    for (context, num_tokens), (key, value) in zip(case.work, case.history, strict=True):
        for position in range(context - num_tokens, context):
            low = 0 if window is None else max(0, position - window + 1)
            for head in range(case.query.shape[1]):
                keys, values = (kv[low : position + 1, head // group].double() for kv in (key, value))
                scores = keys @ case.query[row, head].double() * HEAD_DIM**-0.5
                out[row, head] = scores.softmax(0) @ values
            row += 1
    return out


sequences = st.integers(1, 40).flatmap(lambda context: st.tuples(st.just(context), st.integers(1, context)))
decodes = st.integers(1, 300).map(lambda context: (context, 1))


@settings(max_examples=60, deadline=None)
@given(
    work=st.lists(st.one_of(sequences, decodes), min_size=1, max_size=6),
    groups=st.sampled_from([1, 2, 4]),
    kv_heads=st.sampled_from([1, 2, 3]),
    block_size=st.sampled_from([1, 4, 16]),
    window=st.one_of(st.none(), st.integers(1, 50)),
    seed=st.integers(0, 1000),
    in_int8=st.booleans(),
)
def test_any_mix_of_chunks_and_decodes(
    work: Work, groups: int, kv_heads: int, block_size: int, window: int | None, seed: int, in_int8: bool
) -> None:
    int8: dict[str, Any] = {"kv_dtype": torch.int8, "poison": -1}  # bytes of all ones make a scale of NaN
    case = build(work, groups * kv_heads, kv_heads, block_size, seed, **(int8 if in_int8 else {}))
    assert (case.run(window) - written_out(case, window)).abs().max() < 1e-5


@pytest.mark.parametrize("window", [None, 1, 31, 256, 257, 600])
@pytest.mark.parametrize("work", [[(700, 700)], [(900, 300), (513, 1), (600, 257)]])
def test_chunks_longer_than_a_piece(work: Work, window: int | None) -> None:
    case = build(work, 2, 1, 16)
    assert (case.run(window) - written_out(case, window)).abs().max() < 1e-5


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("work", [[(5, 1), (130, 1), (17, 1)], [(9, 4), (33, 33), (6, 1)]])
def test_nothing_leaks_from_slots_that_are_not_the_sequences(work: Work, poison: float) -> None:
    for window in (None, 3):
        clean, dirty = build(work, poison=0.0), build(work, poison=poison)
        assert torch.equal(clean.run(window), dirty.run(window))


def test_a_sequence_with_nan_spoils_no_other() -> None:
    work = [(20, 1), (37, 1), (12, 5), (30, 1)]
    clean, dirty = build(work), build(work)
    dirty.query[1] = float("nan")
    dirty.value[2:7] = float("nan")
    expected, got = clean.run(), dirty.run()
    assert torch.isnan(got[1:7]).all()
    assert torch.equal(got[[0, 7]], expected[[0, 7]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    case = build([(100, 1), (40, 40), (65, 9), (33, 1)], dtype=dtype)
    exact = written_out(case, None)
    error = (case.run().double() - exact).abs().max()
    assert error < 2 * (exact.to(dtype).double() - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()


def test_a_rows_result_does_not_depend_on_the_others_beyond_rounding() -> None:
    work = [(50, 1), (7, 1), (300, 1), (64, 20)]
    together = build(work)
    results = together.run()
    starts = together.step.query_start_host
    for i, (context, num_tokens) in enumerate(work):
        alone = build([(context, num_tokens)])
        rows = slice(int(starts[i]), int(starts[i + 1]))
        alone.query, alone.key, alone.value = together.query[rows], together.key[rows], together.value[rows]
        history = together.history[i]
        for position in range(context - num_tokens):
            block = int(alone.step.block_tables[0, position // 4])
            alone.kv_cache[0, :, block, :, position % 4] = torch.stack(history)[:, position]
        assert (alone.run() - results[rows]).abs().max() < 1e-5


def test_groups_of_decodes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_plan, "GROUP_TOKENS", 1024)
    work = [(draw, 1) for draw in random.Random(3).choices(range(1, 400), k=30)]
    case = build(work)
    groups = case.plan().work[None].groups
    assert sorted(int(token) for group in groups for token in group.tokens) == list(range(30))
    assert len(groups) < 20
    for group in groups:
        lengths = case.step.context_lens_host[group.tokens.numpy()]
        assert group.num_seqs == 1 or group.num_gathered * group.num_seqs <= 1024
        assert group.num_gathered <= max(2 * lengths.min() + 8, 32)
    assert (case.run() - written_out(case, None)).abs().max() < 1e-5


def test_storing_changes_its_slots_and_nothing_else() -> None:
    case = build([(10, 3), (4, 4), (17, 1)], poison=7.0)
    before = case.kv_cache.clone()
    ops.kv_store(case.key, case.value, case.kv_cache[0], case.plan())
    slots = case.step.slot_mapping
    flat = case.kv_cache[0].transpose(2, 3).flatten(1, 2)
    assert torch.equal(flat[0, slots], case.key)
    assert torch.equal(flat[1, slots], case.value)
    case.kv_cache[0].transpose(2, 3)[:, slots // 4, slots % 4] = before[0].transpose(2, 3)[:, slots // 4, slots % 4]
    assert torch.equal(case.kv_cache, before)


def change(**fields: object) -> Callable[[Case], None]:
    def apply(case: Case) -> None:
        case.step = dataclasses.replace(case.step, **fields)  # type: ignore[arg-type]

    return apply


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (change(positions=torch.zeros(6, dtype=torch.int32)), "positions"),
        (change(slot_mapping=torch.zeros(5, dtype=torch.int64)), "slot_mapping"),
        (change(query_start=torch.zeros(2, dtype=torch.int32)), "query_start"),
        (change(block_tables=torch.zeros(1, 9, dtype=torch.int32)), "block_tables"),
        (change(query_start_host=np.array([0, 5, 5], np.int32)), "query_start"),
        (change(query_start_host=np.array([0, 6, 6], np.int32)), "query_start"),
        (change(context_lens_host=np.array([4, 30], np.int32)), "context_lens"),
        (change(max_context_len=29), "max_context_len"),
        (change(max_query_len=1), "max_query_len"),
        (change(block_tables=torch.zeros(2, 7, dtype=torch.int32)), "block tables hold"),
    ],
)
def test_a_step_that_does_not_fit_itself_is_refused(broken: Callable[[Case], None], message: str) -> None:
    case = build([(20, 5), (30, 1)])
    broken(case)
    with pytest.raises(KernelArgumentError, match=message):
        case.plan()


def test_tensors_that_do_not_fit_the_plan_are_refused() -> None:
    case = build([(20, 5), (30, 1)])
    plan, layer = case.plan(8), case.kv_cache[0]
    calls: list[Callable[[], object]] = [
        lambda: ops.kv_store(case.key[:-1], case.value, layer, plan),
        lambda: ops.kv_store(case.key.double(), case.value, layer, plan),
        lambda: ops.kv_store(case.key, case.value, layer[:, :-1], plan),
        lambda: ops.kv_store(case.key, case.value, layer[:, :-1].contiguous(), plan),
        lambda: ops.paged_attention(case.query[:, :3], layer, plan, 1.0, 8),
        lambda: ops.paged_attention(case.query[:-1], layer, plan, 1.0, 8),
        lambda: ops.paged_attention(case.query.bfloat16(), layer, plan, 1.0, 8),
        lambda: ops.paged_attention(case.query[..., :8], layer, plan, 1.0, 8),
        lambda: ops.paged_attention(case.query, layer, plan, 1.0, None),
        lambda: ops.plan_attention(case.step, layer, (None,), torch.float32),
        lambda: ops.paged_attention(case.query, layer.bfloat16(), plan, 1.0, 8),
        lambda: ops.kv_store(case.key, case.value, layer.to(torch.int8), plan),
    ]
    before = case.kv_cache.clone()
    for call in calls:
        with pytest.raises(KernelArgumentError):
            call()
    assert torch.equal(before.nan_to_num(9.0), case.kv_cache.nan_to_num(9.0))
