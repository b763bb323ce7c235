"""Every op against float64, on the edges: values, what must not change or leak, and bits that must repeat.

A block's result must lie within bf16's rounding of the float64 result, and its mean error must not be more than 1.5
times that of the plain torch pipeline in bf16 on the same inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from fuseline.kernels import ops
from fuseline.kernels.cuda import fused
from fuseline.kernels.cuda.choices import CLUSTER_SIZES, Choice, LaunchTable, default_table
from fuseline.kernels.cuda.launch import plan_launch
from fuseline.kernels.cuda.library import load_library
from fuseline.kernels.reference import blocks
from fuseline.kernels.types import AttentionWeights, StepMetadata

from . import oracle
from .cases import SMALL, TINY, AttentionCase, DenseCase, attention_cases, dense_cases
from .inputs import Layer, Source, decode_step, poison_unused, prepared_attention, prepared_mlp, rotary
from .planning import launched_by, problems
from .shapes import EPS, Shape

Tensor = torch.Tensor
Block = Callable[..., tuple[Tensor, Tensor]]
ATOL_OF_RMS = 2e-2
RTOL = 1.6e-2
MEAN_ERROR_RATIO = 1.5


@dataclass(slots=True)
class Checks:
    """What was checked and what of it was wrong."""

    num_checked: int = 0
    wrong: list[str] = field(default_factory=list)

    def expect(self, holds: bool, message: str) -> None:
        self.num_checked += 1
        if not holds:
            self.wrong.append(message)

    def close(self, name: str, result: Tensor, exact: Tensor, plain: Tensor | None = None) -> None:
        """Within tolerance of ``exact``, and no worse in the mean than ``plain``, the unfused pipeline's result."""
        error = (result.double() - exact).abs()
        # Each row by itself: attention over a short context is larger than over a long one, and so are its errors.
        bound = ATOL_OF_RMS * exact.square().mean(-1, keepdim=True).sqrt() + RTOL * exact.abs()
        worst = (error / bound).max().item()  # NaN if the result holds one
        self.expect(worst <= 1, f"{name}: the error is {worst:.3g} of what is allowed")
        if plain is not None:
            mean, usual = error.mean().item(), (plain.double() - exact).abs().mean().item()
            self.expect(
                mean <= MEAN_ERROR_RATIO * usual + 1e-9,
                f"{name}: the mean error is {mean:.3g}, that of unfused bf16 {usual:.3g}",
            )

    def fused(self, name: str, device: torch.device, is_fused: bool) -> None:
        """That it was a kernel which was checked; on a CPU it is torch."""
        self.expect(is_fused or device.type != "cuda", f"{name}: computed by torch, not by the kernel")

    def same_bits(self, name: str, result: Tensor, expected: Tensor) -> None:
        """Equal bit by bit, NaN included."""
        kind = torch.int16 if result.element_size() == 2 else torch.int32
        self.expect(torch.equal(result.view(kind), expected.view(kind)), f"{name}: the bits differ")


@dataclass(frozen=True, eq=False)
class AttentionInputs:
    """One call of an attention block; ``kv`` is what a run must copy, ``weights`` those of the layer for the op."""

    layer: Layer
    weights: AttentionWeights
    kv: Tensor
    step: StepMetadata
    residual: Tensor
    delta: Tensor | None
    rotary: tuple[Tensor, Tensor]

    @property
    def plan(self) -> ops.AttentionPlan:
        """Of the step."""
        return ops.plan_attention(self.step, self.kv[None], [None], self.kv.dtype)

    @property
    def is_fused(self) -> bool:
        """Whether the op hands this to the kernel."""
        return fused.takes_attention_block(self.residual, self.weights, self.layer.spec, self.kv, self.plan)

    def run(self, kv: Tensor, block: Block | None = None) -> tuple[Tensor, Tensor]:
        """``residual + delta`` and the delta of ``block``, by default the op; appends to ``kv``."""
        plan = self.plan
        block, weights = block or ops.attention_block, self.layer.attention if block else self.weights
        return block(self.residual, self.delta, weights, self.layer.spec, self.rotary, kv, plan)

    def row(self, row: int) -> AttentionInputs:
        """One of the sequences by itself."""
        step, one = self.step, slice(row, row + 1)
        context = int(step.context_lens_host[row])
        alone = replace(
            step,
            positions=step.positions[one],
            slot_mapping=step.slot_mapping[one],
            query_start=step.query_start[:2],
            context_lens=step.context_lens[one].clone(),  # which begin where a kernel takes them from
            block_tables=step.block_tables[one].clone(),
            query_start_host=step.query_start_host[:2],
            context_lens_host=step.context_lens_host[one],
            max_context_len=context,
        )
        delta = None if self.delta is None else self.delta[one]
        rotated = (self.rotary[0][one], self.rotary[1][one])
        return replace(self, step=alone, residual=self.residual[one], delta=delta, rotary=rotated)


def attention_inputs(case: AttentionCase, device: torch.device, seed: int = 0) -> AttentionInputs:
    """Random inputs of a case, NaN wherever nothing may be read."""
    shape, source = case.shape, Source(device, seed)
    layer = source.layer(shape, bias=case.bias)
    if case.scores:
        # All queries lean against all keys, so that a maximum that starts at zero would leave nothing of a softmax.
        bias = torch.zeros(shape.qkv_rows, dtype=source.dtype, device=device)
        num_queries, num_keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        bias[:num_queries], bias[num_queries : num_queries + num_keys] = case.scores, 1.0
        layer = replace(layer, attention=replace(layer.attention, qkv_bias=bias))
    used = sum(-(-context // case.block_size) for context in case.contexts) + 5
    num_blocks = case.first_block + used
    kv = torch.empty(
        2, num_blocks, shape.kv_heads, case.block_size, shape.head_dim, dtype=source.dtype, device=device
    )
    kv.normal_(1.0 if case.scores else 0.0, 1.0, generator=source.generator)
    step = decode_step(case.contexts, case.block_size, num_blocks, device, seed, case.first_block)
    poison_unused(kv, step)
    batch = len(case.contexts)
    return AttentionInputs(
        layer=layer,
        weights=prepared_attention(layer.attention, layer.spec),
        kv=kv,
        step=step,
        residual=source.stream(batch, shape.hidden),
        delta=source.stream(batch, shape.hidden) if case.delta else None,
        rotary=rotary(step.positions, shape.head_dim),
    )


def check_attention(case: AttentionCase, device: torch.device, checks: Checks) -> None:
    """One case: values, KV appended, nothing else written, the same bits again and for each sequence alone."""
    name = f"attention, {case.name}"
    inputs = attention_inputs(case, device)
    layer, step, kv = inputs.layer, inputs.step, inputs.kv.clone()
    exact, *exact_new = oracle.attention_block(
        inputs.residual, inputs.delta, layer.attention, layer.spec, inputs.rotary, kv, step
    )
    _, plain = inputs.run(kv.clone(), blocks.attention_block)
    residual, delta = inputs.run(kv)
    checks.close(f"{name}: delta", delta, exact, plain)
    total = inputs.residual if inputs.delta is None else inputs.residual + inputs.delta
    checks.same_bits(f"{name}: residual + delta", residual, total)
    where, offsets = step.slot_mapping // case.block_size, step.slot_mapping % case.block_size
    for half, exact_half in enumerate(exact_new):
        checks.close(f"{name}: {('keys', 'values')[half]}", kv[half, where, :, offsets], exact_half)
    again = inputs.kv.clone()
    checks.same_bits(f"{name}: run again", inputs.run(again)[1], delta)
    again[:, where, :, offsets] = inputs.kv[:, where, :, offsets]
    checks.same_bits(f"{name}: slots of other tokens", again, inputs.kv)
    checks.fused(name, device, inputs.is_fused)
    if not inputs.is_fused:
        return  # plain torch promises nothing of what follows
    for row in range(step.num_seqs) if step.num_seqs <= 8 else (0, step.num_seqs - 1):
        alone = inputs.row(row).run(inputs.kv.clone())[1]
        checks.same_bits(f"{name}: sequence {row} alone and among others", alone, delta[row : row + 1])


def check_mlp(case: DenseCase, device: torch.device, checks: Checks) -> None:
    """One case: values, the residual, the same bits again and for the last row alone."""
    name = f"mlp, {case.name}"
    source = Source(device, 1)
    weights = source.mlp(case.shape, bias=case.bias)
    residual = source.stream(case.batch, case.shape.hidden)
    delta = source.stream(case.batch, case.shape.hidden) if case.delta else None
    ready = prepared_mlp(weights)
    checks.fused(name, device, fused.takes_mlp_block(residual, ready))
    total, result = ops.mlp_block(residual, delta, ready, EPS)
    _, plain = blocks.mlp_block(residual, delta, weights, EPS)
    checks.close(name, result, oracle.mlp_block(residual, delta, weights, EPS), plain)
    checks.same_bits(f"{name}: residual + delta", total, residual if delta is None else residual + delta)
    checks.same_bits(f"{name}: run again", ops.mlp_block(residual, delta, ready, EPS)[1], result)
    alone = ops.mlp_block(residual[-1:], None if delta is None else delta[-1:], ready, EPS)[1]
    checks.same_bits(f"{name}: the last row alone and among others", alone, result[-1:])


def check_head(case: DenseCase, device: torch.device, checks: Checks) -> None:
    """One case: logits of the rows in another order, and of those the best, each of which is there twice."""
    name = f"head, {case.name}"
    source, shape = Source(device, 2), case.shape
    norm = source.normal(shape.hidden, std=0.1, mean=1.0)
    weight = source.normal(shape.vocab, shape.hidden, std=shape.hidden**-0.5)
    half = shape.vocab // 2
    weight[half : 2 * half] = weight[:half]
    residual = source.stream(case.batch, shape.hidden)
    delta = source.stream(case.batch, shape.hidden) if case.delta else None
    rows = torch.arange(case.batch, device=device).flip(0)
    ready = ops.prepare_head(weight, keep=True)
    checks.fused(name, device, fused.takes_head(ready, rows))
    logits = ops.head(residual, delta, norm, ready, rows, EPS)
    plain = blocks.head(residual, delta, norm, weight, rows, EPS)
    checks.close(name, logits, oracle.head(residual, delta, norm, weight, EPS)[rows], plain)
    checks.same_bits(f"{name}: run again", ops.head(residual, delta, norm, ready, rows, EPS), logits)
    expected, expected_rows = logits.sort(dim=1, descending=True, stable=True)
    for count in (1, 20):
        best, found = ops.head_candidates(residual, delta, norm, ready, rows, count, EPS)
        checks.same_bits(f"{name}: best {count}", best, expected[:, :count].contiguous())
        same = torch.equal(found.long(), expected_rows[:, :count])
        checks.expect(same, f"{name}: rows of the best {count}")


def check_clusters(cluster: int, shape: Shape, device: torch.device, checks: Checks) -> None:
    """Every block with clusters of this size, which its shape may never be given."""
    blocks_of_shape = problems(load_library(), shape)
    table = LaunchTable.of(Choice(problem.name, problem.phases, cluster, ()) for problem in blocks_of_shape)
    with launched_by(table):
        for problem in blocks_of_shape:
            taken = plan_launch(load_library(), problem, 9, default_table()).cluster
            checks.expect(taken == cluster, f"{problem.name}, clusters of {cluster}: clusters of {taken} are taken")
        dense = DenseCase(f"clusters of {cluster}", shape, 9)
        check_mlp(dense, device, checks)
        check_head(dense, device, checks)
        check_attention(AttentionCase(dense.name, shape, (300, 1, 70)), device, checks)


def check_repeats(case: AttentionCase, device: torch.device, repeats: int, checks: Checks) -> None:
    """The same call over and over: one set of bits."""
    inputs = attention_inputs(case, device)
    kv = inputs.kv.clone()
    _, first = inputs.run(kv)
    different = sum(not torch.equal(inputs.run(kv)[1], first) for _ in range(repeats))
    checks.expect(different == 0, f"attention, repeats: {different} of {repeats} have other bits")


def check_replays(device: torch.device, checks: Checks) -> None:
    """A captured block follows changed lengths and tables; two streams at once do not disturb each other."""
    cases = [AttentionCase("replays", SMALL, contexts) for contexts in ((900, 33, 64, 5), (40, 1000, 1, 17))]
    first, second = (attention_inputs(case, device, seed) for seed, case in enumerate(cases))
    width = max(inputs.step.block_tables.shape[1] for inputs in (first, second))
    blocks_needed = max(first.kv.shape[1], second.kv.shape[1])
    first, second = (_widened(inputs, width, blocks_needed) for inputs in (first, second))
    second = replace(second, layer=first.layer, weights=first.weights)
    wanted = [inputs.run(inputs.kv.clone())[1] for inputs in (first, second)]
    live, kv = _cloned(first), first.kv.clone()
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    torch.cuda.synchronize(device)
    with torch.cuda.stream(stream):
        live.run(kv)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        _, result = live.run(kv)
    for name, inputs, expected in zip(("captured", "changed"), (first, second), wanted, strict=True):
        for target, source in zip(_tensors(live), _tensors(inputs), strict=True):
            target.copy_(source)
        kv.copy_(inputs.kv)
        graph.replay()
        checks.same_bits(f"attention, replayed as {name}", result, expected)
    streams = [torch.cuda.Stream(device) for _ in range(2)]  # type: ignore[no-untyped-call]
    caches = [[inputs.kv.clone() for _ in range(20)] for inputs in (first, second)]
    torch.cuda.synchronize(device)
    results: list[list[Tensor]] = [[], []]
    for turn in range(20):
        for side, inputs in enumerate((first, second)):
            with torch.cuda.stream(streams[side]):
                results[side].append(inputs.run(caches[side][turn])[1])
    torch.cuda.synchronize(device)
    for side in range(2):
        same = all(torch.equal(result, wanted[side]) for result in results[side])
        checks.expect(same, f"attention, stream {side} of two: some results differ")


def _tensors(inputs: AttentionInputs) -> list[Tensor]:
    step = inputs.step
    delta = [] if inputs.delta is None else [inputs.delta]
    return [inputs.residual, *delta, *inputs.rotary, step.slot_mapping, step.context_lens, step.block_tables]


def _cloned(inputs: AttentionInputs) -> AttentionInputs:
    residual, delta, cos, sin, slots, lens, tables = (tensor.clone() for tensor in _tensors(inputs))
    step = replace(inputs.step, slot_mapping=slots, context_lens=lens, block_tables=tables)
    return replace(inputs, residual=residual, delta=delta, rotary=(cos, sin), step=step)


def _widened(inputs: AttentionInputs, width: int, num_blocks: int) -> AttentionInputs:
    """With block tables and a cache of this size, the additions never to be read."""
    tables, kv = inputs.step.block_tables, inputs.kv
    wide = tables.new_full((tables.shape[0], width), 2**31 - 1)
    wide[:, : tables.shape[1]] = tables
    large = kv.new_full((2, num_blocks, *kv.shape[2:]), float("nan"))
    large[:, : kv.shape[1]] = kv
    return replace(inputs, kv=large, step=replace(inputs.step, block_tables=wide))


def checks_of(op: str, device: torch.device, *, tiny: bool) -> Iterator[tuple[str, Callable[[Checks], None]]]:
    """All checks of "mlp", "attention", "head", "clusters" or "replays", by name; or those that a CPU can afford."""
    if op == "attention":
        for attention_case in attention_cases(tiny=tiny):
            yield attention_case.name, partial(check_attention, attention_case, device)
    elif op == "clusters":
        for cluster in CLUSTER_SIZES if device.type == "cuda" else ():
            yield f"clusters of {cluster}", partial(check_clusters, cluster, SMALL, device)
    elif op == "replays":
        repeated = AttentionCase("repeats", TINY if tiny else SMALL, (700, 33, 1))
        yield "repeats", partial(check_repeats, repeated, device, 3 if tiny else 1000)
        if device.type == "cuda":
            yield "replays", partial(check_replays, device)
    else:
        check = {"mlp": check_mlp, "head": check_head}[op]
        for dense_case in dense_cases(tiny=tiny):
            yield dense_case.name, partial(check, dense_case, device)
