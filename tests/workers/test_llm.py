"""The embedded LLM against transformers, under any schedule, and at its edges."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from fuseline.runtime.errors import (
    InvalidArgumentError,
    ModelFormatError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
)
from fuseline.runtime.request import FinishReason
from fuseline.runtime.sampling_params import SamplingParams, child_seed
from fuseline.tests.checkpoints import reference_greedy, reference_logits
from fuseline.tests.workers.llm_cases import (
    DEMO,
    SMALL_LLM,
    logprobs_of,
    mixed_requests,
    run_mixed,
    tokens_of,
    write_tiny,
)
from fuseline.workers.llm import LLM, RequestOutput

Tiny = tuple[Path, PreTrainedModel]
GREEDY = SamplingParams(temperature=0.0, max_tokens=16)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    path = tmp_path_factory.mktemp("tiny")
    return path, write_tiny(path)


@pytest.fixture(scope="module")
def baseline(tiny: Tiny) -> list[RequestOutput]:
    """Outputs of the mixed requests when everything fits and runs together."""
    return run_mixed(tiny[0])


@pytest.fixture(scope="module")
def demo() -> Iterator[LLM]:
    with LLM("demo", device="cpu", dtype="float32", max_model_len=512, max_num_seqs=8) as llm:
        yield llm


def test_greedy_generation_is_that_of_transformers(tiny: Tiny) -> None:
    path, model = tiny
    prompts = mixed_requests()[0]
    with LLM(str(path), **SMALL_LLM) as llm:
        outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True))
    for prompt, output in zip(prompts, outputs, strict=True):
        assert list(output.outputs[0].token_ids) == reference_greedy(model, prompt, 40)
        assert output.prompt_token_ids == tuple(prompt)
        assert output.prompt is None
        assert output.outputs[0].finish_reason is FinishReason.LENGTH


SCHEDULES: dict[str, dict[str, Any]] = {
    "one at a time": {"max_num_seqs": 1},
    "tiny chunks": {"max_num_seqs": 3, "max_num_batched_tokens": 5},
    "no prefix cache": {"enable_prefix_caching": False, "max_num_batched_tokens": 32},
    "preemption": {"num_kv_blocks": 34, "block_size": 4},
    "other blocks": {"block_size": 16, "max_num_seqs": 16},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_schedule_changes_a_token(tiny: Tiny, baseline: list[RequestOutput], name: str) -> None:
    options = {**SMALL_LLM, **SCHEDULES[name]}
    prompts, params = mixed_requests()
    with LLM(str(tiny[0]), **options) as llm:
        outputs = llm.generate(prompts, params, priority=[i % 3 for i in range(len(prompts))])
        assert tokens_of(outputs) == tokens_of(baseline)
        for mine, other in zip(logprobs_of(outputs), logprobs_of(baseline), strict=True):
            assert mine == pytest.approx(other, abs=1e-4)  # float32 sums differ in their last bits
        # Once more, in another order, with what the cache holds by now.
        again = llm.generate(prompts[::-1], params[::-1])[::-1]
        assert tokens_of(again) == tokens_of(baseline)
        stats = llm.group.engine.stats()
        llm.group.engine.check_integrity()
    assert stats.num_leaked_blocks == 0
    assert (stats.num_preemptions > 0) == (name == "preemption")
    assert (stats.num_prefix_cache_hit_tokens > 0) == (name != "no prefix cache")


def test_a_sequence_does_not_know_its_neighbours(tiny: Tiny, baseline: list[RequestOutput]) -> None:
    prompts, params = mixed_requests()
    with LLM(str(tiny[0]), **SMALL_LLM) as llm:
        alone = [llm.generate([prompt], one)[0] for prompt, one in zip(prompts, params, strict=True)]
    assert tokens_of(alone) == tokens_of(baseline)


def test_logprobs_are_those_of_transformers(tiny: Tiny, baseline: list[RequestOutput]) -> None:
    _, model = tiny
    output = baseline[6]  # greedy, logprobs=1, prompt_logprobs=2
    completion = output.outputs[0]
    sequence = [*output.prompt_token_ids, *completion.token_ids]
    expected = torch.log_softmax(reference_logits(model, sequence).double(), -1)
    assert output.prompt_logprobs is not None
    assert completion.logprobs is not None
    entries = [*output.prompt_logprobs, *completion.logprobs]
    assert len(entries) == len(sequence) - 1
    for position, entry in enumerate(entries):
        row = expected[position]
        assert entry.token_id == sequence[position + 1]
        assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=1e-4)
        assert entry.rank == 1 + int((row > row[entry.token_id]).sum())
        count = 2 if position < len(output.prompt_token_ids) - 1 else 1
        assert [token for token, _ in entry.top] == row.topk(count).indices.tolist()


def test_samples_differ_by_seed_and_repeat_with_it(demo: LLM) -> None:
    params = SamplingParams(n=4, seed=11, max_tokens=12, ignore_eos=True)
    first, second = demo.generate(["import"] * 2, params)
    assert tokens_of([first]) == tokens_of([second])
    assert len(set(tokens_of([first])[0])) == 4
    assert [completion.index for completion in first.outputs] == [0, 1, 2, 3]
    other = demo.generate("import", SamplingParams(seed=12, max_tokens=12, ignore_eos=True))[0]
    assert other.outputs[0].token_ids not in tokens_of([first])[0]
    drawn = demo.generate(["import"] * 2, SamplingParams(max_tokens=12, ignore_eos=True))
    assert drawn[0].outputs[0].token_ids != drawn[1].outputs[0].token_ids
    assert len({child_seed(11, index) for index in range(128)}) == 128


def test_text_is_the_decoded_tokens(demo: LLM) -> None:
    prompt = "def add(a, b):\n    return"
    output = demo.generate(prompt, SamplingParams(max_tokens=40, seed=1, ignore_eos=True))[0]
    assert output.prompt == prompt
    assert output.outputs[0].text == demo.tokenizer.decode(output.outputs[0].token_ids)
    by_ids = demo.generate(list(output.prompt_token_ids), SamplingParams(max_tokens=40, seed=1, ignore_eos=True))[0]
    assert by_ids.outputs == output.outputs
    assert by_ids.prompt is None


def test_stop_strings_end_a_sequence_and_free_it(demo: LLM) -> None:
    text = demo.generate("import os\n", replace(GREEDY, max_tokens=40))[0].outputs[0].text
    stop = text[9:14]
    for include in (False, True):
        params = SamplingParams(temperature=0, max_tokens=40, stop=(stop,), include_stop_str_in_output=include)
        completion = demo.generate("import os\n", params)[0].outputs[0]
        end = text.index(stop)
        assert completion.text == text[: end + len(stop) * include]
        assert completion.finish_reason is FinishReason.STOP
        assert completion.stop_reason == stop
        assert demo.tokenizer.decode(completion.token_ids).startswith(text[:end] + stop[:1])
    stats = demo.group.engine.stats()
    assert stats.num_running == stats.num_waiting == stats.num_leaked_blocks == 0


def test_stop_tokens_and_min_tokens(demo: LLM) -> None:
    token_ids = demo.generate("import os\n", replace(GREEDY, max_tokens=12))[0].outputs[0].token_ids
    stop = token_ids[3]
    params = replace(GREEDY, max_tokens=12, stop_token_ids=(stop,))
    completion = demo.generate("import os\n", params)[0].outputs[0]
    assert completion.token_ids == token_ids[: token_ids.index(stop) + 1]
    assert completion.stop_reason == stop
    assert completion.finish_reason is FinishReason.STOP
    longer = demo.generate("import os\n", replace(params, min_tokens=12))[0].outputs[0]
    assert len(longer.token_ids) == 12
    assert stop not in longer.token_ids


def test_max_tokens_is_cut_to_the_context(tiny: Tiny) -> None:
    with LLM(str(tiny[0]), **{**SMALL_LLM, "max_model_len": 20}) as llm:
        output = llm.generate([[5] * 15], SamplingParams(max_tokens=100, ignore_eos=True))[0]
        assert len(output.outputs[0].token_ids) == 5
        assert output.outputs[0].finish_reason is FinishReason.LENGTH
        with pytest.raises(InvalidArgumentError, match="20"):
            llm.generate([[5] * 20])


def test_many_prompts_go_through_a_short_queue(tiny: Tiny) -> None:
    options = {**SMALL_LLM, "max_num_seqs": 2}
    with LLM(str(tiny[0]), **options) as llm:
        engine = llm.group.engine
        engine.config = replace(engine.config, scheduler=replace(engine.config.scheduler, max_num_queued=3))
        outputs = llm.generate([[7, i] for i in range(20)], GREEDY)
    assert len(outputs) == 20


@pytest.mark.parametrize(
    "arguments",
    [
        (["a", "b"], [SamplingParams()]),
        (["a"], "hot"),
        ([["a"]],),
        ([[4096]],),
        ([[-1]],),
        ([[]],),
        ("",),
        ([[1.5]],),
        (["a"], SamplingParams(logit_bias={4096: 1.0})),
        (["\ud800"],),
    ],
    ids=repr,
)
def test_bad_requests_are_refused_and_leave_nothing(demo: LLM, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(InvalidArgumentError):
        demo.generate(*arguments)
    assert not demo.group.engine.has_unfinished
    demo.group.engine.check_integrity()


def test_what_is_of_the_wrong_type_is_named_by_its_place(demo: LLM) -> None:
    with pytest.raises(InvalidArgumentError, match=r"prompts\[0\] must be a text or a sequence .* got NoneType"):
        demo.generate([None])  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match=r"sampling_params\[1\] must be SamplingParams, got dict"):
        demo.generate(["a", "b"], [SamplingParams(), {}])  # type: ignore[list-item]


def test_a_bad_prompt_among_good_ones_ends_all(demo: LLM) -> None:
    with pytest.raises(InvalidArgumentError):
        demo.generate([[5], [4096]], GREEDY)
    assert not demo.group.engine.has_unfinished
    assert demo.generate("good", GREEDY)[0].outputs[0].token_ids


def test_a_bad_prompt_is_found_before_anything_is_computed(tiny: Tiny) -> None:
    with LLM(str(tiny[0]), **SMALL_LLM) as llm:
        engine = llm.group.engine
        engine.config = replace(engine.config, scheduler=replace(engine.config.scheduler, max_num_queued=3))
        with pytest.raises(InvalidArgumentError):
            llm.generate([[7]] * 8 + [[101]], GREEDY)
        assert engine.stats().num_steps == 0


def test_no_prompts_no_outputs(demo: LLM) -> None:
    assert demo.generate([]) == []


def test_one_call_at_a_time(demo: LLM) -> None:
    with demo._lock, pytest.raises(InvalidArgumentError, match="one call at a time"):
        demo.generate("x")
    assert demo.generate("x", GREEDY)


def test_two_models_in_one_process_and_use_after_close(tiny: Tiny, demo: LLM) -> None:
    with LLM(str(tiny[0]), **SMALL_LLM) as llm:
        both = llm.generate([[5, 6]], GREEDY), demo.generate("a", GREEDY)
        assert all(output[0].outputs[0].token_ids for output in both)
    llm.close()
    with pytest.raises(UnavailableError, match="closed"):
        llm.generate([[5, 6]])


def test_models_that_cannot_be_run(tmp_path: Path, tiny: Tiny) -> None:
    with pytest.raises(NotFoundError):
        LLM(str(tmp_path / "nowhere"), device="cpu")
    with pytest.raises(ModelFormatError, match="tensor_parallel_size"):
        LLM("demo", device="cpu", tensor_parallel_size=3)
    with pytest.raises(InvalidArgumentError, match="device"):
        LLM("demo", device="tpu")
    with pytest.raises(InvalidArgumentError, match="kv_cache_dtype must be one of auto, int8; got 'fp8'"):
        LLM("demo", device="cpu", kv_cache_dtype="fp8")
    with pytest.raises(ResourceExhaustedError, match="max_model_len=128"):
        LLM(str(tiny[0]), **SMALL_LLM, kv_cache_memory_bytes=10_000)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny[0] / name).read_bytes())
    with pytest.raises(ModelFormatError, match=r"tokenizer\.json"):
        LLM(str(tmp_path), device="cpu")


def test_the_progress_bar_counts_sequences_and_tokens(demo: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    params = SamplingParams(n=2, seed=1, temperature=1.0, max_tokens=5, ignore_eos=True)
    demo.generate(["a", "b"], [params, replace(params, n=1, max_tokens=40, stop=("e",), seed=3)], progress=True)
    told = capsys.readouterr().err
    assert "3/3 sequences" in told
    assert "100%" in told  # though the last one stopped before its time
    assert re.search(r"[1-9]\d* tokens, [1-9][\d.]* tokens/s", told)
    demo.generate("a", GREEDY)
    assert capsys.readouterr().err == ""


def test_loading_shows_a_bar_on_a_terminal(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    LLM(str(tiny[0]), **SMALL_LLM).close()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    LLM(str(tiny[0]), **SMALL_LLM).close()
    assert "loading" in capsys.readouterr().err


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, fuseline; fuseline.SamplingParams; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], cwd=DEMO).returncode == 0


def test_a_model_alone_imports_neither_grpc_nor_what_draws_bars() -> None:
    code = (
        "import sys, fuseline; fuseline.LLM; sys.exit(bool({'grpc', 'google.protobuf', 'rich'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-P", "-c", code], cwd=DEMO).returncode == 0
