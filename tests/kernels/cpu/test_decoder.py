"""The native decoder against the same written out in float64, and the same bits whatever is computed together."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fuseline.kernels.cpu.decoder import AllReduceError, CpuDecoder
from fuseline.kernels.errors import KernelArgumentError
from fuseline.kernels.exchange import NativeAllReduce
from fuseline.tests.kernels.cpu.decoder_cases import (
    VOCAB,
    Runner,
    Sequence,
    Shape,
    draw_tokens,
    make_plan,
    random_schedule,
    shapes,
    written_out,
)

# By the cache's dtype: the KV's rounding may tip over.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.02, torch.float16: 0.004, torch.int8: 0.05}
DTYPES = list(TOLERANCE)


def relative_error(logits: torch.Tensor, exact: torch.Tensor) -> float:
    return float(((logits.double() - exact).abs().max() / exact.square().mean().sqrt()).item())


@settings(max_examples=25, deadline=None)
@given(
    shape=shapes,
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    block_size=st.sampled_from([1, 3, 16, 64]),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_any_mix_of_chunks_agrees_with_float64(
    library: ctypes.CDLL, shape: Shape, lengths: list[int], block_size: int, threads: int, seed: int
) -> None:
    library.fl_cpu_team_resize(threads, None)
    plan = make_plan(shape, seed)
    prompts = [draw_tokens(seed + i, length) for i, length in enumerate(lengths)]
    runner = Runner(library, plan, block_size, seed=seed, kv_dtype=shape.kv_dtype)
    results = random_schedule(runner, prompts, seed, max_chunk=20)
    assert plan.embedding is not None
    # In a tiny model a norm may make much of a rounding, and each op rounds. Ten times as much as the exact logits
    # move when the embedding is rounded is allowed on top.
    noise = torch.randn(plan.embedding.shape, generator=torch.Generator().manual_seed(seed))
    nudged = replace(plan, embedding=plan.embedding.double() * (1 + 2**-24 * noise.double()))
    for prompt, logits in zip(prompts, results, strict=True):
        exact = written_out(plan, prompt, shape.cache_dtype)
        moved = relative_error(written_out(nudged, prompt, shape.cache_dtype), exact)
        assert relative_error(logits, exact) < TOLERANCE[shape.cache_dtype] + 10 * moved


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_contexts_agree_with_float64(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    """More tokens than a split of attention, and than a piece of a step."""
    library.fl_cpu_team_resize(2, None)
    weights = torch.bfloat16 if dtype == torch.int8 else dtype
    plan = make_plan(Shape(weights, windows=(None, 300, 256, None)), 1)
    prompts = [draw_tokens(1, 900), draw_tokens(2, 513), draw_tokens(3, 40)]
    runner = Runner(library, plan, 16, kv_dtype=dtype)
    for prompt, logits in zip(prompts, random_schedule(runner, prompts, 5, 600), strict=True):
        assert relative_error(logits, written_out(plan, prompt, dtype)) < TOLERANCE[dtype]


@settings(max_examples=8, deadline=None)
@given(
    shape=st.sampled_from(
        [
            Shape(torch.bfloat16),
            Shape(torch.float32, heads=3, kv_heads=1, head_dim=32, windows=(None, 260)),
            Shape(torch.float16, heads=2, kv_heads=2, head_dim=10),
            Shape(torch.bfloat16, heads=7, kv_heads=1, head_dim=64, windows=(300, None)),
            Shape(torch.bfloat16, heads=7, kv_heads=1, head_dim=64, windows=(300, None), kv_dtype=torch.int8),
            Shape(torch.float32, heads=2, kv_heads=2, head_dim=10, kv_dtype=torch.int8),
        ]
    ),
    lengths=st.lists(st.one_of(st.integers(1, 20), st.integers(200, 600)), min_size=1, max_size=4),
    block_sizes=st.lists(st.sampled_from([1, 16, 24]), min_size=2, max_size=2),
    seed=st.integers(0, 2**31),
)
def test_bits_depend_on_the_sequence_alone(
    library: ctypes.CDLL, shape: Shape, lengths: list[int], block_sizes: list[int], seed: int
) -> None:
    """Other company, chunks, blocks, recomputation, number of threads: the same logits to the bit."""
    plan = make_plan(shape, seed)
    prompts = [draw_tokens(seed + i, length) for i, length in enumerate(lengths)]
    library.fl_cpu_team_resize(1, None)
    runner = Runner(library, plan, block_sizes[0], num_blocks=3000, kv_dtype=shape.kv_dtype)
    alone = [runner.run([(Sequence(prompt), len(prompt))])[0] for prompt in prompts]
    for threads in (1, 2, 5):
        library.fl_cpu_team_resize(threads, None)
        runner = Runner(library, plan, block_sizes[1], num_blocks=3000, seed=seed, kv_dtype=shape.kv_dtype)
        together = random_schedule(runner, prompts, seed + threads, preempts=True)
        for one, other in zip(alone, together, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.int8], ids=str)
def test_one_long_decode_is_shared_by_many_workers_without_a_trace(
    library: ctypes.CDLL, kv_dtype: torch.dtype
) -> None:
    plan = make_plan(Shape(torch.bfloat16, heads=2, kv_heads=1, windows=(None,)), 3)
    prompt = draw_tokens(4, 1500)
    results = []
    for threads in (1, 4):
        library.fl_cpu_team_resize(threads, None)
        runner, sequence = Runner(library, plan, 16, kv_dtype=kv_dtype), Sequence(prompt)
        runner.run([(sequence, 1498)])
        results.append([runner.run([(sequence, 1)])[0] for _ in range(2)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.int8], ids=str)
def test_a_prefix_that_is_cached_gives_the_same_bits(library: ctypes.CDLL, kv_dtype: torch.dtype) -> None:
    library.fl_cpu_team_resize(2, None)
    plan = make_plan(Shape(torch.bfloat16), 5)
    shared, tail = draw_tokens(1, 320), draw_tokens(2, 30)
    runner = Runner(library, plan, 16, kv_dtype=kv_dtype)
    first = Sequence(shared + draw_tokens(3, 9))
    runner.run([(first, 329)])
    whole = runner.run([(Sequence(shared + tail), 350)])[0]
    hit = Sequence(shared + tail, first.blocks[:20], 320)
    assert torch.equal(runner.run([(hit, 30)])[0], whole[320:])


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.int8], ids=str)
def test_what_comes_later_does_not_reach_what_came_before(library: ctypes.CDLL, kv_dtype: torch.dtype) -> None:
    """A token that overflows spoils its own row and those behind it only, even in one chunk and one batch."""
    library.fl_cpu_team_resize(2, None)
    plan = make_plan(Shape(torch.float32, windows=(None, None)), 6)
    assert plan.embedding is not None
    broken = plan.embedding.clone()
    broken[VOCAB - 1] = float("nan")
    tokens = [token % (VOCAB - 1) for token in draw_tokens(1, 300)]
    runner = Runner(library, plan, 16, kv_dtype=kv_dtype)
    expected = runner.run([(Sequence(tokens), 300), (Sequence(tokens[:5]), 5)])
    tokens[123] = VOCAB - 1
    runner = Runner(library, replace(plan, embedding=broken), 16, kv_dtype=kv_dtype)
    got = runner.run([(Sequence(tokens), 300), (Sequence(tokens[:5]), 5)])
    assert torch.equal(got[0][:123], expected[0][:123])
    assert got[0][123:].isnan().all()
    assert torch.equal(got[1], expected[1])


def test_ops_one_by_one_are_the_step(library: ctypes.CDLL) -> None:
    library.fl_cpu_team_resize(2, None)
    plan = make_plan(Shape(torch.bfloat16), 7)
    prompts = [draw_tokens(1, 300), draw_tokens(2, 3)]
    whole = Runner(library, plan, 16).run([(Sequence(prompt), len(prompt)) for prompt in prompts])
    runner = Runner(library, plan, 16)
    step = runner.begin([(Sequence(prompt), len(prompt)) for prompt in prompts])
    for op in range(runner.decoder.num_ops):
        result = runner.decoder.run(step, op, op + 1)
        assert result is (step.layout.residual if op == 0 else step.layout.delta) or op == runner.decoder.num_ops - 1
    assert torch.equal(result, torch.cat(whole))
    runner.begin([(Sequence(prompts[0]), 1)])
    with pytest.raises(KernelArgumentError, match="another step has begun"):
        runner.decoder.run(step, 0, 1)


def test_stages_hand_on_hidden_states_and_leave_them_alone(library: ctypes.CDLL) -> None:
    plan = make_plan(Shape(windows=(None, 7, None)), 8)
    prompt = draw_tokens(1, 30)
    whole = Runner(library, plan, 16).run([(Sequence(prompt), 30)])[0]
    front = Runner(library, replace(plan, layers=plan.layers[:2], norm=None, head=None), 16)
    hidden = front.decoder.run(front.begin([(Sequence(prompt), 30)]), 0, 6)
    back = Runner(library, replace(plan, layers=plan.layers[2:], embedding=None), 16)
    before = hidden.clone()
    step, _ = back.metadata([(Sequence(prompt), 30)])
    native = back.decoder.begin(step, back.cache, None, hidden, torch.arange(30), back.inv_freq)
    assert torch.equal(back.decoder.run(native, 0, 4), whole)
    assert torch.equal(hidden, before)


def test_sums_over_ranks_are_made_between_the_ops(library: ctypes.CDLL) -> None:
    """Two ranks that hold the same: every sum is twice the part."""
    library.fl_cpu_team_resize(2, None)
    calls: list[int] = []
    prototype = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.POINTER(ctypes.c_float), ctypes.c_int64)

    def double(handle: int | None, data: ctypes._Pointer[ctypes.c_float], n: int) -> int:
        calls.append(n)
        torch.frombuffer(
            (ctypes.c_float * n).from_address(ctypes.addressof(data.contents)), dtype=torch.float32
        ).mul_(2)
        return 7 if len(calls) > 5 else 0

    function = prototype(double)
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    plan = make_plan(Shape(), 9)
    runner = Runner(library, plan, 16)
    sequence = Sequence(draw_tokens(1, 11))
    step = runner.begin([(sequence, 11)])
    for op in range(runner.decoder.num_ops):
        expected = runner.decoder.run(step, op, op + 1)
        if op < runner.decoder.num_ops - 1:
            expected *= 2
    summing = Runner(library, plan, 16)
    summing.decoder = CpuDecoder(library, plan, NativeAllReduce(address, 0, function))
    assert torch.equal(summing.run([(Sequence(sequence.token_ids), 11)])[0], expected)
    assert calls == [11 * 24] * 5
    with pytest.raises(AllReduceError) as raised:
        summing.run([(Sequence(sequence.token_ids), 11)])
    assert raised.value.status == 7
    assert len(calls) == 6


Breakage = Callable[[Runner, list[Any]], None]


def put(index: int, value: object) -> Breakage:
    def apply(runner: Runner, arguments: list[Any]) -> None:
        arguments[index] = value

    return apply


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (put(1, torch.zeros(2, 2, 9, 2, 16, 16, dtype=torch.float64)), "cache"),
        (put(1, torch.zeros(2, 2, 9, 2, 16, 8)), "cache"),
        (put(1, torch.zeros(2, 2, 9, 2, 16, 16, dtype=torch.int8)), "cache"),
        (put(1, torch.zeros(2, 2, 9, 2, 16, 20, dtype=torch.uint8)), "cache"),
        (put(1, torch.zeros(1, 2, 9, 2, 16, 16)), "cache"),
        (put(1, torch.zeros(2, 2, 9, 2, 16, 32)[..., ::2]), "contiguous"),
        (put(2, None), "token_ids"),
        (put(2, torch.zeros(5, dtype=torch.int32)), "token_ids"),
        (put(2, torch.zeros(4, dtype=torch.int64)), "token_ids"),
        (put(2, torch.zeros(10, dtype=torch.int64)[::2]), "contiguous"),
        (put(4, torch.zeros(5)), "logits_indices"),
        (put(5, torch.zeros(7)), "inv_freq"),
        (put(5, torch.zeros(4, 8)), "inv_freq"),
        (put(2, torch.full((5,), VOCAB)), "token id"),
        (put(2, torch.full((5,), -1)), "token id"),
        (put(4, torch.tensor([5])), "logits_indices"),
        (lambda runner, arguments: arguments[0].slot_mapping.fill_(400 * 16), "slot"),
        (lambda runner, arguments: arguments[0].block_tables.fill_(400), "block"),
        (lambda runner, arguments: arguments[0].block_tables.fill_(-1), "block"),
    ],
)
def test_steps_that_do_not_fit_are_refused_before_anything_is_computed(
    library: ctypes.CDLL, broken: Breakage, message: str
) -> None:
    runner = Runner(library, make_plan(Shape(), 0), 16)
    step, tokens = runner.metadata([(Sequence(draw_tokens(0, 5)), 5)])
    arguments: list[Any] = [step, runner.cache, tokens, None, torch.arange(5), runner.inv_freq]
    broken(runner, arguments)
    with pytest.raises(KernelArgumentError, match=message):
        runner.decoder.run(runner.decoder.begin(*arguments), 0, 1)
    assert runner.cache.isnan().all()


def test_plans_that_do_not_fit_are_refused(library: ctypes.CDLL) -> None:
    plan = make_plan(Shape(), 0)
    first, second = plan.layers
    other = make_plan(Shape(hidden=20), 0)
    for broken in (
        replace(plan, layers=()),
        replace(plan, layers=(first, other.layers[0])),
        replace(plan, layers=(first, make_plan(Shape(kv_heads=1), 0).layers[0])),
        replace(plan, layers=(first, replace(second, mlp=other.layers[0].mlp))),  # type: ignore[type-var]
        replace(plan, head=other.head),
        replace(plan, embedding=other.embedding),
        replace(plan, norm=None),
        replace(plan, norm=other.norm),
    ):
        with pytest.raises(KernelArgumentError):
            CpuDecoder(library, broken)
    decoder = CpuDecoder(library, plan)
    runner = Runner(library, plan, 16)
    step = runner.begin([(Sequence(draw_tokens(0, 5)), 5)])
    for begin, end in ((0, 0), (-1, 2), (0, 7), (3, 2)):
        with pytest.raises(KernelArgumentError, match="ops"):
            decoder.run(step, begin, end)


def test_random_steps_leave_other_sequences_kv_alone(library: ctypes.CDLL) -> None:
    plan = make_plan(Shape(torch.float16), 2)
    runner = Runner(library, plan, 4)
    bystander = Sequence(draw_tokens(9, 50))
    runner.run([(bystander, 50)])
    before = runner.cache[:, :, bystander.blocks].clone()
    random_schedule(runner, [draw_tokens(i, random.Random(i).randint(1, 80)) for i in range(4)], 3, 30)
    assert torch.equal(runner.cache[:, :, bystander.blocks].nan_to_num(9.0), before.nan_to_num(9.0))
