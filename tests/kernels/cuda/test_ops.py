"""The operators in front of the kernels: CPU twins agree with the reference, wrong arguments are refused."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fuseline.benchmarks.gpu import cases, correctness
from fuseline.benchmarks.gpu.inputs import Source, prepared_mlp
from fuseline.kernels import ops
from fuseline.kernels.cuda import fused
from fuseline.kernels.cuda.arguments import MAX_BATCH, check_block_tables
from fuseline.kernels.cuda.attention import AttentionTensors, check_attention
from fuseline.kernels.cuda.mlp import check_mlp
from fuseline.kernels.cuda.ops import OPERATORS, SCHEMAS
from fuseline.kernels.errors import KernelArgumentError
from fuseline.kernels.kv_rows import quantize_rows
from fuseline.kernels.packed import PackedWeight, pack
from fuseline.kernels.reference import blocks
from fuseline.kernels.types import float_weight

CPU = torch.device("cpu")
SHAPE = cases.TINY
EPS = 1e-6


def mlp_arguments(batch: int = 3, bias: bool = True) -> list[Any]:
    source = Source(CPU, 0)
    weights = source.mlp(SHAPE, bias=bias)
    gate_up, down = pack(float_weight(weights.gate_up), 2 * SHAPE.inner), pack(float_weight(weights.down))
    stream = [source.stream(batch, SHAPE.hidden) for _ in range(2)]
    return [*stream, weights.norm, gate_up, weights.gate_up_bias, down, weights.down_bias, EPS]


def attention_inputs(**changes: Any) -> correctness.AttentionInputs:
    case = cases.AttentionCase("tiny", SHAPE, (1, 17, 40), **changes)
    return correctness.attention_inputs(case, CPU)


def attention_arguments(inputs: correctness.AttentionInputs) -> list[Any]:
    weights, spec, step = inputs.layer.attention, inputs.layer.spec, inputs.step
    return [
        inputs.residual,
        inputs.delta,
        weights.norm,
        pack(float_weight(weights.qkv), spec.head_dim),
        weights.qkv_bias,
        weights.q_norm,
        weights.k_norm,
        pack(float_weight(weights.out)),
        weights.out_bias,
        *inputs.rotary,
        inputs.kv.clone(),
        step.block_tables,
        step.context_lens,
        spec.scale,
        spec.eps,
        0,
    ]


def head_arguments() -> list[Any]:
    source = Source(CPU, 1)
    weight = source.normal(37, SHAPE.hidden)
    stream = [source.stream(5, SHAPE.hidden) for _ in range(2)]
    return [*stream, source.normal(SHAPE.hidden), pack(weight), 37, torch.tensor([4, 0]), EPS]


def test_the_mlp_s_twin_is_the_reference() -> None:
    source = Source(CPU, 0)
    weights = source.mlp(SHAPE, bias=True)
    residual, delta = source.stream(3, SHAPE.hidden), source.stream(3, SHAPE.hidden)
    total, result = OPERATORS.mlp_block(*mlp_arguments())
    expected_total, expected = blocks.mlp_block(residual, delta, weights, EPS)
    assert torch.equal(total, expected_total)
    assert torch.equal(result, expected.float())
    assert result.dtype == torch.float32


@pytest.mark.parametrize("changes", [{}, {"bias": True}, {"block_size": 64}, {"delta": False}])
def test_the_attention_s_twin_is_the_reference(changes: dict[str, Any]) -> None:
    inputs = attention_inputs(**changes)
    arguments = attention_arguments(inputs)
    total, result = OPERATORS.attention_block(*arguments)
    kv = inputs.kv.clone()
    expected_total, expected = inputs.run(kv, blocks.attention_block)
    assert torch.equal(total, expected_total)
    assert torch.equal(result, expected.float())
    assert torch.equal(arguments[11].view(torch.int16), kv.view(torch.int16))


def test_the_head_s_twins_are_the_reference() -> None:
    arguments = head_arguments()
    residual, delta, norm, packed, vocab, rows, eps = arguments
    logits = OPERATORS.head_logits(*arguments)
    assert logits.shape == (2, 37)
    best, found = OPERATORS.head_candidates(residual, delta, norm, packed, vocab, rows, 4, eps)
    assert torch.equal(best, logits.topk(4).values)
    assert torch.equal(logits.gather(1, found.long()), best)
    assert found.dtype == torch.int32


@pytest.mark.parametrize("name", ["mlp_block", "attention_block", "head_logits", "head_candidates"])
def test_operators_declare_what_they_do(name: str) -> None:
    arguments = {
        "mlp_block": mlp_arguments(),
        "attention_block": attention_arguments(attention_inputs()),
        "head_logits": head_arguments(),
        "head_candidates": [*head_arguments()[:-1], 4, EPS],
    }[name]
    checked = torch.library.opcheck(getattr(OPERATORS, name).default, tuple(arguments))
    assert set(checked.values()) == {"SUCCESS"}
    assert len(SCHEMAS) == 4


def test_handing_over_gives_what_the_op_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of the way from the op to the operator, whose CPU twin stands in for the kernel."""
    monkeypatch.setattr(fused, "_usable", lambda device: True)
    inputs = attention_inputs(bias=True)
    assert fused.takes_attention_block(inputs.residual, inputs.weights, inputs.layer.spec, inputs.kv, plan(inputs))
    _, delta = inputs.run(inputs.kv.clone())
    assert torch.equal(delta, inputs.run(inputs.kv.clone(), blocks.attention_block)[1].float())
    mlp = inputs.layer.mlp
    ready = prepared_mlp(mlp)
    assert fused.takes_mlp_block(inputs.residual, ready)
    coarse = delta.bfloat16()
    _, result = ops.mlp_block(inputs.residual, coarse, ready, EPS)
    assert torch.equal(result, blocks.mlp_block(inputs.residual, coarse.float(), mlp, EPS)[1].float())


def test_what_a_fused_block_does_not_take_is_computed_from_packed_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of more tokens than a block takes, and logits of all of them: torch unpacks, to the same bits."""
    monkeypatch.setattr(fused, "_usable", lambda device: True)
    source = Source(CPU, 5)
    mlp, residual = source.mlp(SHAPE), source.stream(MAX_BATCH + 1, SHAPE.hidden)
    ready = prepared_mlp(mlp)
    assert not fused.takes_mlp_block(residual, ready)
    total, delta = ops.mlp_block(residual, None, ready, EPS)
    assert torch.equal(delta, blocks.mlp_block(residual, None, mlp, EPS)[1])
    norm, table, rows = source.normal(SHAPE.hidden), source.normal(37, SHAPE.hidden), torch.arange(MAX_BATCH + 1)
    logits = ops.head(total, None, norm, ops.prepare_head(table, keep=False), rows, EPS)
    assert torch.equal(logits, blocks.head(total, None, norm, table, rows, EPS))
    with pytest.raises(KernelArgumentError, match="packed weight"):
        ops.head(total[:, :-16].contiguous(), None, norm[:-16], ops.prepare_head(table, keep=False), rows, EPS)


def test_candidates_are_the_best_logits() -> None:
    source = Source(CPU, 4)
    residual, norm, weight = (
        source.stream(4, SHAPE.hidden),
        source.normal(SHAPE.hidden),
        source.normal(99, SHAPE.hidden),
    )
    rows = torch.tensor([3, 1])
    best, found = ops.head_candidates(residual, None, norm, weight, rows, 5, EPS)
    logits = ops.head(residual, None, norm, weight, rows, EPS)
    assert torch.equal(best, logits.topk(5).values)
    assert torch.equal(logits.gather(1, found.long()), best)
    for count in (0, 100):
        with pytest.raises(KernelArgumentError, match="candidates"):
            ops.head_candidates(residual, None, norm, weight, rows, count, EPS)


def test_preparing_packs_what_will_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, head_dim = Source(CPU, 0).layer(SHAPE), SHAPE.head_dim
    table = torch.zeros(20, SHAPE.hidden, dtype=torch.bfloat16)
    assert ops.prepare_attention(layer.attention, layer.spec, torch.bfloat16) is layer.attention, "there is no GPU"
    assert ops.prepare_mlp(layer.mlp) is layer.mlp
    assert ops.prepare_head(table, keep=False) is table
    monkeypatch.setattr(fused, "_usable", lambda device: True)
    qkv, gate_up = float_weight(layer.attention.qkv).clone(), float_weight(layer.mlp.gate_up).clone()
    whole = ops.prepare_attention(layer.attention, layer.spec, torch.int8)
    assert whole is layer.attention, "torch attends over int8, and would unpack weights in every step"
    attention = ops.prepare_attention(layer.attention, layer.spec, torch.bfloat16)
    mlp = ops.prepare_mlp(layer.mlp)
    attention.check(layer.spec)
    mlp.check()
    for packed, rows, group_rows in ((attention.qkv, qkv, head_dim), (mlp.gate_up, gate_up, 2 * SHAPE.inner)):
        assert isinstance(packed, PackedWeight)
        assert packed.group_rows == group_rows
        assert torch.equal(packed.unpack(), rows)
    exact = replace(layer.mlp, down=layer.mlp.down.float())  # type: ignore[union-attr]
    assert ops.prepare_mlp(exact) is exact
    odd = replace(layer.spec, head_dim=96)
    assert ops.prepare_attention(layer.attention, odd, torch.bfloat16) is layer.attention


def plan(inputs: correctness.AttentionInputs) -> ops.AttentionPlan:
    return ops.plan_attention(inputs.step, inputs.kv[None], [None], inputs.kv.dtype)


def test_what_no_fused_block_takes_stays_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not fused.takes_mlp_block(torch.zeros(1, SHAPE.hidden), Source(CPU, 0).mlp(SHAPE)), "there is no GPU"
    monkeypatch.setattr(fused, "_usable", lambda device: True)
    inputs = attention_inputs()
    layer, step, mlp = inputs.layer, inputs.step, prepared_mlp(inputs.layer.mlp)
    assert fused.takes_mlp_block(inputs.residual, mlp)
    assert not fused.takes_mlp_block(inputs.residual.new_zeros(MAX_BATCH + 1, SHAPE.hidden), mlp)

    def takes(**changes: Any) -> bool:
        chosen: dict[str, Any] = {"spec": layer.spec, "kv": inputs.kv, "plan": plan(inputs), **changes}
        return fused.takes_attention_block(
            inputs.residual, inputs.weights, chosen["spec"], chosen["kv"], chosen["plan"]
        )

    assert takes()
    assert not takes(spec=replace(layer.spec, head_dim=96))
    assert not takes(kv=inputs.kv.float())
    assert not takes(kv=quantize_rows(inputs.kv))
    assert not takes(plan=replace(plan(inputs), step=replace(step, max_query_len=2)))
    assert not takes(plan=replace(plan(inputs), geometry=replace(plan(inputs).geometry, block_size=24)))
    table = torch.zeros(40, SHAPE.hidden, dtype=torch.bfloat16)
    assert fused.takes_head(ops.prepare_head(table, keep=True), torch.zeros(3))
    assert not fused.takes_head(table, torch.zeros(3))


def unaligned(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape).copy_(tensor)


def strided(tensor: torch.Tensor) -> torch.Tensor:
    return torch.stack((tensor, tensor), -1)[..., 0]


def elsewhere(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("meta")


SPOILED: list[tuple[int, Callable[[torch.Tensor], Any], str]] = [
    (0, lambda residual: residual.bfloat16(), "residual must be"),
    (0, lambda residual: residual.new_zeros(MAX_BATCH + 1, SHAPE.hidden), "1 to 192"),
    (0, lambda residual: residual[0], "1 to 192"),
    (0, strided, "contiguous"),
    (0, unaligned, "multiple of 16 bytes"),
    (1, lambda delta: delta[:1], "delta must be"),
    (1, elsewhere, "delta must be"),
    (2, lambda norm: norm[:-1], "norm must be"),
    (2, lambda norm: norm.float(), "norm must be"),
]


@pytest.mark.parametrize(("place", "spoil", "message"), SPOILED)
@pytest.mark.parametrize("name", ["mlp", "attention"])
def test_a_stream_that_does_not_fit_is_refused(
    name: str, place: int, spoil: Callable[[torch.Tensor], Any], message: str
) -> None:
    arguments = mlp_arguments() if name == "mlp" else attention_arguments(attention_inputs())
    refuse(name, arguments, place, spoil, message)


@pytest.mark.parametrize(
    ("place", "spoil", "message"),
    [
        (3, lambda gate_up: gate_up[:-1], "gate_up must be"),
        (3, lambda gate_up: gate_up.view(-1, 16), "gate_up must be"),
        (3, unaligned, "gate_up must start"),
        (4, lambda bias: bias[:4], "gate_up_bias must be"),
        (5, lambda down: down.flatten(), "down"),
        (6, lambda bias: bias.float(), "down_bias must be"),
    ],
)
def test_mlp_weights_that_do_not_fit_are_refused(
    place: int, spoil: Callable[[torch.Tensor], Any], message: str
) -> None:
    refuse("mlp", mlp_arguments(), place, spoil, message)


@pytest.mark.parametrize(
    ("place", "spoil", "message"),
    [
        (3, lambda qkv: qkv[:-1], "qkv must be"),
        (4, lambda _: torch.zeros(3, dtype=torch.bfloat16), "qkv_bias must be"),
        (5, lambda _: torch.ones(SHAPE.head_dim, dtype=torch.bfloat16), "together"),
        (7, lambda out: out[:, :-1], "heads"),
        (7, lambda out: out.float(), "out must be"),
        (9, lambda cos: cos[:2], "cos must be"),
        (10, lambda sin: sin.double(), "sin must be"),
        (11, lambda kv: kv[:1], "kv must be"),
        (11, lambda kv: kv.float(), "kv must be"),
        (11, quantize_rows, "kv must be .*bfloat16 on cpu, got .*int8"),
        (11, lambda kv: kv[..., :32], "kv must be"),
        (11, lambda kv: kv[:, :, :, ::2], "kv must be contiguous"),
        (11, lambda kv: kv[:, :, :, :12].contiguous(), "power of two"),
        (12, lambda tables: tables.long(), "block_tables must be"),
        (12, lambda tables: tables[:2], "block_tables must be"),
        (12, lambda tables: tables[:, :0], "not possible"),
        (13, lambda lens: lens[:2], "context_lens must be"),
        (16, lambda window: -1, "window"),
    ],
)
def test_attention_arguments_that_do_not_fit_are_refused(
    place: int, spoil: Callable[[torch.Tensor], Any], message: str
) -> None:
    refuse("attention", attention_arguments(attention_inputs()), place, spoil, message)


@pytest.mark.parametrize(
    ("place", "spoil", "message"),
    [
        (0, lambda residual: residual[0], "residual must be"),
        (3, lambda weight: weight[:-1], "weight must be"),
        (4, lambda vocab: 0, "not possible"),
        (5, lambda rows: rows.int(), "rows must be"),
        (5, lambda rows: rows.repeat(MAX_BATCH), "1 to 192"),
    ],
)
def test_head_arguments_that_do_not_fit_are_refused(
    place: int, spoil: Callable[[torch.Tensor], Any], message: str
) -> None:
    arguments = head_arguments()
    arguments[place] = spoil(arguments[place])
    with pytest.raises(KernelArgumentError, match=message):
        OPERATORS.head_logits(*arguments)


def refuse(name: str, arguments: list[Any], place: int, spoil: Callable[[torch.Tensor], Any], message: str) -> None:
    """By the checks of the launcher itself, which are those of the twin too."""
    arguments[place] = spoil(arguments[place])
    with pytest.raises(KernelArgumentError, match=message):
        if name == "mlp":
            check_mlp(*arguments[:-1])
        else:
            check_attention(arguments[0], arguments[1], AttentionTensors(*arguments[2:14]), arguments[16])


@pytest.mark.parametrize(
    ("tables", "lens", "message"),
    [
        ([[0, 5]], [17], "row 0 uses blocks"),
        ([[0, -1]], [17], "row 0 uses blocks"),
        ([[0, 1]], [33], "must be 0 to 32"),
        ([[0, 1], [2, 9]], [32, -1], "must be 0 to 32"),
    ],
)
def test_block_tables_are_looked_at_on_request(
    tables: list[list[int]], lens: list[int], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def given(values: Any) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    check_block_tables(given([[4, 99]]), given([16]), 16, 5)
    with pytest.raises(KernelArgumentError, match=message):
        check_block_tables(given(tables), given(lens), 16, 5)
    arguments = attention_arguments(attention_inputs())
    arguments[13] = arguments[13] + 100000
    monkeypatch.setenv("FUSELINE_CHECK_KV", "1")
    refuse("attention", arguments, 16, lambda window: window, "context_lens")
