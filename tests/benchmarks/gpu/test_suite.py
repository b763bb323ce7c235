"""All of the GPU suite that needs no GPU: what it checks with, what it computes, what it prints, how it ends."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fuseline
from fuseline.benchmarks.gpu import baselines, cases, correctness, oracle, part, parts, report, shapes, suite, watch
from fuseline.benchmarks.gpu.blocks import Bench
from fuseline.benchmarks.gpu.device import CpuDevice
from fuseline.benchmarks.gpu.inputs import context_rows, decode_step
from fuseline.kernels import ops
from fuseline.kernels.cuda.arguments import MAX_BATCH
from fuseline.kernels.errors import LaunchError

CPU = torch.device("cpu")
LLAMA_2, LLAMA_3, _, QWEN_3 = shapes.SHAPES
TINY_DENSE = cases.DenseCase("tiny", cases.TINY, 3)
TINY_ATTENTION = cases.AttentionCase("tiny", cases.TINY, (1, 17, 40))


def figure(**changes: Any) -> dict[str, Any]:
    base = {"shape": "Llama-3-8B", "block": "mlp", "batch": 1, "context": None, "us": 90.0, "spread_us": 1.0}
    return {**base, "floor_us": 82.0, "over_floor": 1.1, "others_us": {"torch": 99.0}, "speedup": 1.1, **changes}


@pytest.mark.parametrize(
    ("shape", "batch", "context", "microseconds"),
    [(LLAMA_2, 1, 4096, 47), (LLAMA_2, 16, 16384, 1030), (LLAMA_3, 8, 4096, 51), (QWEN_3, 1, 1024, 20)],
)
def test_attention_s_floor_is_that_of_the_roofline(
    shape: shapes.Shape, batch: int, context: int, microseconds: int
) -> None:
    num_bytes = shapes.attention_bytes(shape, batch, context)
    assert round(shapes.floor_us(num_bytes, 4.3e12)) == microseconds


def test_weights_are_those_of_the_models() -> None:
    assert [shape.mlp_weight_bytes // 10**5 for shape in (LLAMA_2, LLAMA_3, QWEN_3)] == [2705, 3523, 3019]
    assert [shape.attention_weight_bytes // 10**5 for shape in (LLAMA_2, LLAMA_3, QWEN_3)] == [1342, 838, 838]
    assert shapes.head_bytes(QWEN_3, 0, logits=True) == 1_244_659_712


def test_buffers_rotate_until_l2_has_forgotten() -> None:
    assert shapes.buffer_sets(12_582_912, 60 << 20) == 60
    assert shapes.buffer_sets(1 << 40, 60 << 20) == 1


def test_the_oracle_and_the_reference_agree_on_every_edge() -> None:
    for case in cases.attention_cases(tiny=True):
        checks = correctness.Checks()
        correctness.check_attention(case, CPU, checks)
        assert checks.num_checked >= 7
        assert checks.wrong == []


def test_the_large_cases_cover_what_the_brief_lists() -> None:
    listed = cases.attention_cases(tiny=False)
    contexts = {context for case in listed for context in case.contexts}
    assert {1, 31, 32, 33, 63, 64, 65, 127, 131072} <= contexts
    assert {len(case.contexts) for case in listed} >= {1, 2, 3, 7, 8, 9, 16, 64, 65, MAX_BATCH}
    assert {case.batch for case in cases.dense_cases(tiny=False)} >= {1, 64, 65, MAX_BATCH}
    assert {(case.block_size, case.shape.head_dim) for case in listed} >= {(16, 64), (16, 128), (64, 64), (64, 128)}
    far = next(case for case in listed if case.first_block)
    assert far.first_block * far.shape.kv_heads * far.block_size * far.shape.head_dim > 2**31
    names = [case.name for case in listed]
    assert len(names) == len(set(names))


def test_scores_that_must_be_negative_are() -> None:
    case = next(case for case in cases.attention_cases(tiny=True) if case.scores)
    inputs = correctness.attention_inputs(case, CPU)
    spec = inputs.layer.spec
    query, key, _ = oracle.new_qkv(inputs.residual, inputs.delta, inputs.layer.attention, spec, inputs.rotary)
    for row in range(inputs.step.num_seqs):
        blocks, offsets = context_rows(inputs.step, row, case.block_size)
        keys = torch.cat((inputs.kv[0, blocks[:-1], :, offsets[:-1]].double(), key[row][None])).transpose(0, 1)
        scores = query[row].view(spec.num_kv_heads, -1, spec.head_dim) @ keys.transpose(1, 2) * spec.scale
        assert scores.max() < -100


def test_inputs_hold_nan_wherever_nothing_may_be_read() -> None:
    inputs = correctness.attention_inputs(TINY_ATTENTION, CPU)
    history = sum(TINY_ATTENTION.contexts) - len(TINY_ATTENTION.contexts)
    per_token = cases.TINY.kv_heads * (cases.TINY.head_dim - 1)  # one element is infinite instead
    slots = inputs.kv.shape[1] * inputs.kv.shape[3]
    assert int(inputs.kv.isnan().sum()) == 2 * (slots - history) * per_token
    assert int((inputs.step.block_tables == 2**31 - 1).sum()) > 0


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda residual, delta: (residual, delta * 1.05), "of what is allowed"),
        (lambda residual, delta: (residual + 1e-4, delta), "residual"),
        (lambda residual, delta: (residual, delta + 0.01 * torch.rand_like(delta)), "bits differ"),
        (lambda residual, delta: (residual, torch.full_like(delta, float("nan"))), "nan of what is allowed"),
    ],
)
def test_a_wrong_mlp_is_found(
    spoil: Callable[..., tuple[torch.Tensor, torch.Tensor]], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = ops.mlp_block
    monkeypatch.setattr(ops, "mlp_block", lambda *arguments: spoil(*right(*arguments)))
    checks = correctness.Checks()
    correctness.check_mlp(TINY_DENSE, CPU, checks)
    assert any(message in wrong for wrong in checks.wrong)


def write_elsewhere(arguments: list[Any]) -> None:
    kv = arguments[5]
    kv[0, :, 0, 3, 5] = 0.5


def forget_the_oldest_token(arguments: list[Any]) -> None:
    step = arguments[6].step
    kv, size = arguments[5], arguments[5].shape[3]
    blocks, offsets = context_rows(step, step.num_seqs - 1, size)
    kv[:, blocks[0], :, offsets[0]] = kv[:, blocks[1], :, offsets[1]]


@pytest.mark.parametrize(
    ("spoil", "message"), [(write_elsewhere, "slots of other tokens"), (forget_the_oldest_token, "delta: the error")]
)
def test_a_wrong_attention_is_found(
    spoil: Callable[[list[Any]], None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = ops.attention_block

    def wrong(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        spoil(list(arguments))
        return right(*arguments)

    monkeypatch.setattr(ops, "attention_block", wrong)
    checks = correctness.Checks()
    correctness.check_attention(cases.AttentionCase("tiny", cases.TINY, (1, 4)), CPU, checks)
    assert any(message in wrong for wrong in checks.wrong), checks.wrong


def test_targets_are_judged_where_they_are_set() -> None:
    blocks = [
        figure(),
        figure(block="attention", context=4096, over_floor=1.2),
        figure(block="attention", context=1024, over_floor=9.0),
        figure(batch=64, block="attention", context=16384, speedup=0.9),
        figure(
            shape="Llama-2-7B", block="attention", context=4096, us=50.0, others_us={"public clusterfusion": 70.0}
        ),
    ]
    collectives = [{"kind": "reduce", "of_target": True, "speedup": 2.5}, {"kind": "gather", "of_target": False}]
    judged = report.targets({"blocks": blocks, "collectives": collectives})
    assert report.targets({"blocks": blocks, "collectives": None}) == judged[:-1]
    assert [(met, wanted) for _, _, wanted, met in judged] == [
        (True, 1.15),
        (False, 1.15),
        (False, 1.0),
        (True, 1.3),
        (True, 2.44),
    ]


def test_tables_line_up() -> None:
    text = report.table(("name", "us"), [("mlp", 3.14159), ("attention", 1234.5)])
    assert text.splitlines() == ["     name   us", "      mlp 3.14", "attention 1234"]


def test_parts_are_selectable_and_run_in_order() -> None:
    assert suite.parse(["--parts", "time-head,environment"]).parts == ("environment", "time-head")
    times = ("time-mlp", "time-attention", "time-head")
    assert suite.parse(["--parts", "time"]).parts == ("environment", *times), "it builds the kernels"
    for wrong in ("everything", "time,mlp", ""):
        with pytest.raises(SystemExit):
            suite.parse(["--parts", wrong])


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert suite.main([]) == 2
    assert "no GPU" in capsys.readouterr().out


def test_a_run_writes_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a process of its own, as on a GPU."""
    assert suite.main(["--device", "cpu", "--parts", "time-mlp", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert {"date", "commit", "blocks", "seconds", "wrong", "failed", "skipped"} <= results.keys()
    assert [(row["block"], row["batch"]) for row in results["blocks"]] == [("mlp", 1), ("mlp", 2)]
    assert results["blocks"][0]["over_floor"] == pytest.approx(
        results["blocks"][0]["us"] / results["blocks"][0]["floor_us"]
    )
    assert capsys.readouterr().out.endswith("no wrong result\n")


def test_blocks_and_layers_are_timed(tmp_path: Path) -> None:
    part.run("time-attention", tmp_path / "found.json", "cpu")
    found = json.loads((tmp_path / "found.json").read_text())
    assert {(row["block"], row["batch"], row["context"]) for row in found["result"]} == {
        (block, batch, 32) for block in ("attention", "layer") for batch in (1, 2)
    }


def test_a_baseline_that_does_not_run_leaves_our_own_figure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("no Triton here")

    monkeypatch.setattr(baselines.Pipeline, "mlp_block", refuse)
    bench = Bench(cases.TINY, CpuDevice(), 1e9, baselines.elementwise(CPU))
    (mlp,) = bench.mlp(1)
    attention, layer = bench.attention(1, 32)
    assert mlp.us > 0
    assert layer.us > 0
    assert (mlp.others_us, layer.others_us, mlp.speedup) == ({}, {}, None)
    assert attention.others_us
    assert "torch does not run: no Triton here" in capsys.readouterr().out


def as_ended(endings: Mapping[str, tuple[dict[str, Any] | None, str]]) -> Callable[..., watch.Outcome]:
    """Stands in for processes: what each part leaves in its file, and how it ends."""
    parts = {"environment": (found(None), ""), **endings}

    def run_watched(command: list[str], *_: Any) -> watch.Outcome:
        left, problem = parts[command[command.index("benchmarks.gpu.part") + 1]]
        if left is not None:
            Path(command[command.index("--file") + 1]).write_text(json.dumps(left))
        return watch.Outcome(None if problem else 0, problem, "the last case")

    return run_watched


def found(result: Any, wrong: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"result": result, "wrong": list(wrong), "failed": []}


def test_a_part_that_hangs_keeps_its_results_and_stops_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    endings = {
        "check-mlp": (None, "ended by SIGSEGV"),
        "time-mlp": (found([figure()]), "no output for 45 s"),
        "time-head": (found([figure(block="head")]), ""),
    }
    monkeypatch.setattr(suite, "run_watched", as_ended(endings))
    options = ["--device", "cpu", "--parts", ",".join(endings), "--out", str(tmp_path)]
    assert suite.main(options) == suite.INCOMPLETE
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["block"] for row in results["blocks"]] == ["mlp", "head"]
    assert results["check-mlp"] is None
    printed = capsys.readouterr().out
    assert "FAILED time-mlp: no output for 45 s; its last words: the last case" in printed
    assert "FAILED check-mlp: ended by SIGSEGV" in printed


def test_a_wrong_result_is_the_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    endings = {"check-mlp": (found({}, ("rotary is off",)), ""), "check-head": (found({}), "exit code 1")}
    monkeypatch.setattr(suite, "run_watched", as_ended(endings))
    assert suite.main(["--device", "cpu", "--parts", ",".join(endings), "--out", str(tmp_path)]) == suite.WRONG
    assert "WRONG rotary is off" in capsys.readouterr().out


@pytest.mark.parametrize("problem", ["", "exit code 1"])
def test_the_public_kernels_are_built_before_they_are_timed_or_not_timed(
    problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = as_ended({"clusterfusion": (None, problem), "time-attention": (found([]), "")})
    commands: list[list[str]] = []

    def run_watched(command: list[str], *rest: Any) -> watch.Outcome:
        commands.append(command)
        return ended(command, *rest)

    monkeypatch.setattr(suite, "run_watched", run_watched)
    options = ["--device", "cpu", "--parts", "time-attention", "--out", str(tmp_path)]
    suite.main([*options, "--clusterfusion", str(tmp_path)])
    parts_of = [(command[4], "--clusterfusion" in command) for command in commands]
    assert parts_of == [("environment", True), ("clusterfusion", True), ("time-attention", not problem)]
    commands.clear()
    suite.main(options)
    assert [command[4] for command in commands] == ["environment", "time-attention"]


@pytest.mark.parametrize("table", [[], [{"block": "mlp"}]])
def test_launches_are_written_if_any_were_found(
    table: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "run_watched", as_ended({"tune": (found({"trials": [], "table": table}), "")}))
    assert suite.main(["--device", "cpu", "--parts", "tune", "--out", str(tmp_path)]) == 0
    path = tmp_path / "launches.json"
    assert (json.loads(path.read_text()) if path.exists() else []) == table
    assert path.exists() == bool(table)


def test_without_the_kernels_nothing_else_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "run_watched", as_ended({"environment": (None, "exit code 1")}))
    options = ["--device", "cpu", "--parts", "environment,dsmem", "--out", str(tmp_path)]
    assert suite.main(options) == suite.INCOMPLETE
    assert json.loads((tmp_path / "gpu.json").read_text())["skipped"] == ["dsmem"]


def test_parts_that_would_begin_too_late_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", "cpu", "--parts", "environment", "--limit-s", "-1", "--out", str(tmp_path)]
    assert suite.main(options) == suite.INCOMPLETE
    assert "not run: environment" in capsys.readouterr().out


def test_an_error_in_one_case_is_noted_and_the_next_one_runs(tmp_path: Path) -> None:
    run = parts.Run(CpuDevice(), tiny=True, path=tmp_path / "found.json")

    def refuse() -> None:
        raise LaunchError("too many resources requested")

    assert run.attempt("first", refuse) is None
    assert run.attempt("second", lambda: 3) == 3
    run.keep([3])
    assert json.loads(run.path.read_text()) == {
        "result": [3],
        "wrong": [],
        "failed": ["first: LaunchError: too many resources requested"],
    }


def test_a_fault_of_the_device_leaves_what_was_found(tmp_path: Path) -> None:
    class Broken(CpuDevice):
        def check(self) -> None:
            raise RuntimeError("an illegal memory access was encountered")

    run = parts.Run(Broken(), tiny=True, path=tmp_path / "found.json")
    run.keep([3])

    def fault() -> None:
        raise RuntimeError("unspecified launch failure")

    with pytest.raises(RuntimeError, match="illegal"):
        run.attempt("second", fault)
    assert json.loads(run.path.read_text()) == {
        "result": [3],
        "wrong": [],
        "failed": ["second: RuntimeError: unspecified launch failure"],
    }


@pytest.mark.parametrize(("code", "wrong", "failed"), [(0, 0, 0), (7, len(parts.TOOLS), 0), (1, 0, len(parts.TOOLS))])
def test_a_sanitizer_that_did_not_run_is_no_success(
    code: int, wrong: int, failed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\nexit {code}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(parts, "load_library", lambda: SimpleNamespace(path=tmp_path / "kernels.so"))
    run = parts.Run(CpuDevice(), tiny=False, path=tmp_path / "found.json")
    parts.sanitize(run)
    assert (len(run.wrong), len(run.failed)) == (wrong, failed)


def test_it_starts_where_fuseline_is_not_installed() -> None:
    code = (
        "import sys, runpy; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()];"
        "sys.argv = ['x', '--help']; runpy.run_module('benchmarks.gpu', run_name='__main__')"
    )
    root = Path(fuseline.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert "--clusterfusion" in done.stdout, done.stderr


def test_a_step_that_does_not_fit_its_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="blocks are needed"):
        decode_step((100,), 16, 3, CPU)
