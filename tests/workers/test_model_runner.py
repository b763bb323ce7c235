"""The runner's mirror of the engine's rows, and what it makes of plans that contradict it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from fuseline.collectives.communicator import GroupCommunicators, SoloCommunicator
from fuseline.runtime.config import CacheConfig, EngineConfig, SchedulerConfig
from fuseline.runtime.errors import InternalError
from fuseline.runtime.plan import NO_TOKEN, AdmittedSequence, Int32Array, StepPlan, StepResult
from fuseline.runtime.sampling_params import SamplingParams
from fuseline.runtime.sharding import ParallelConfig
from fuseline.tests.checkpoints import reference_greedy, reference_logits
from fuseline.tests.workers.llm_cases import write_tiny
from fuseline.workers.loader import load_model, model_info
from fuseline.workers.model_runner import ModelRunner
from fuseline.workers.models.registry import load_model_config

Tiny = tuple[Path, PreTrainedModel]
PROMPT = tuple(range(10, 21))
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    path = tmp_path_factory.mktemp("tiny")
    return path, write_tiny(path)


@pytest.fixture
def runner(tiny: Tiny) -> ModelRunner:
    path = tiny[0]
    info = model_info(path, "float32", 64)
    config = EngineConfig(info, CacheConfig(32, 4), SchedulerConfig(max_num_seqs=3, max_num_batched_tokens=16))
    solo = SoloCommunicator()
    communicators = GroupCommunicators(solo, solo)
    model = load_model(
        path, load_model_config(path), "float32", "float32", torch.device("cpu"), ParallelConfig(), 0, communicators
    )
    return ModelRunner(model, model.new_kv_cache(32, 4), config, solo, is_first_of_stage=True)


def execute(runner: ModelRunner, step: StepPlan) -> StepResult:
    result = runner.execute(step)
    assert result is not None
    return result


def int32(*values: int) -> Int32Array:
    return np.array(values, np.int32)


def admit(
    row: int,
    tokens: Sequence[int] = PROMPT,
    blocks: tuple[int, ...] = (7, 3, 9),
    params: SamplingParams = GREEDY,
    num_prompt: int | None = None,
) -> AdmittedSequence:
    return AdmittedSequence(row, f"r{row}", tuple(tokens), num_prompt or len(tokens), blocks, 0, params, 0)


def plan(step_id: int, work: Sequence[tuple[int, int, int, int, bool]], **changes: Any) -> StepPlan:
    """``work``: (row, position, number of tokens, input token, whether to sample)."""
    rows, positions, lengths, inputs, samples = zip(*work, strict=True)
    return StepPlan(
        step_id, int32(*rows), int32(*lengths), int32(*positions), int32(*inputs), np.array(samples), **changes
    )


def test_chunks_decodes_and_growing_tables_give_what_transformers_gives(runner: ModelRunner, tiny: Tiny) -> None:
    expected = reference_greedy(tiny[1], list(PROMPT), 3)
    assert len(execute(runner, plan(0, [(1, 0, 5, -1, False)], admitted=(admit(1),))).token_ids) == 0
    other = admit(0, PROMPT[:3], (20,))
    result = execute(runner, plan(1, [(1, 5, 6, -1, True), (0, 0, 3, -1, True)], admitted=(other,)))
    assert result.token_ids.tolist() == [expected[0], reference_greedy(tiny[1], list(PROMPT[:3]), 1)[0]]
    assert execute(runner, plan(2, [(1, 11, 1, expected[0], True)])).token_ids.tolist() == [expected[1]]
    grown = {"new_block_rows": int32(1), "new_block_ids": int32(30)}
    assert execute(runner, plan(3, [(1, 12, 1, expected[1], True)], **grown)).token_ids.tolist() == [expected[2]]


def test_a_row_may_be_released_and_admitted_in_one_plan(runner: ModelRunner, tiny: Tiny) -> None:
    execute(runner, plan(0, [(0, 0, 11, -1, True)], admitted=(admit(0),)))
    tokens = (*PROMPT[::-1], 5)
    again = admit(0, tokens, (1, 2, 4), num_prompt=11)
    result = execute(runner, plan(1, [(0, 0, 12, -1, True)], released=(0,), admitted=(again,)))
    assert result.token_ids.tolist() == reference_greedy(tiny[1], list(tokens), 1)


def test_prompt_logprobs_come_with_their_chunks(runner: ModelRunner, tiny: Tiny) -> None:
    params = SamplingParams(temperature=0.0, prompt_logprobs=1, logprobs=0)
    first = execute(runner, plan(0, [(2, 0, 4, -1, False)], admitted=(admit(2, params=params),)))
    second = execute(runner, plan(1, [(2, 4, 7, -1, True)]))
    entries = [*first.prompt_logprobs[2], *second.prompt_logprobs[2]]
    expected = torch.log_softmax(reference_logits(tiny[1], list(PROMPT)), -1)
    assert [entry.token_id for entry in entries] == list(PROMPT[1:])
    for position, entry in enumerate(entries):
        assert entry.logprob == pytest.approx(expected[position, entry.token_id].item(), abs=1e-4)
    assert second.logprobs[2].token_id == second.token_ids[0]
    assert first.logprobs == {}


@pytest.mark.parametrize(
    ("contradiction", "message"),
    [
        (plan(1, [(1, 0, 1, -1, True)]), "row 1 is used"),
        (plan(1, [(0, 11, 1, 5, True)], released=(2,)), "row 2 is used"),
        (plan(1, [(0, 11, 1, 5, True)], admitted=(admit(0),)), "row 0 is admitted"),
        (plan(1, [(0, 11, 2, 5, True)]), "beyond"),
    ],
)
def test_a_plan_that_contradicts_the_mirror_is_a_bug(
    runner: ModelRunner, contradiction: StepPlan, message: str
) -> None:
    execute(runner, plan(0, [(0, 0, 11, -1, True)], admitted=(admit(0),)))
    with pytest.raises(InternalError, match=message):
        execute(runner, contradiction)


def test_a_model_that_computes_nonsense_yields_no_token(runner: ModelRunner) -> None:
    runner._kv_cache[:, 1, 7] = torch.nan  # what a broken handoff or overflow leaves behind
    execute(runner, plan(0, [(0, 0, 3, -1, False)], admitted=(admit(0, PROMPT[:3], (8,)),)))
    runner._kv_cache[:, 1, 8, :, 0] = torch.nan
    assert execute(runner, plan(1, [(0, 3, 1, 5, True)])).token_ids.tolist() == [NO_TOKEN]


def test_torch_gets_its_threads_back_after_a_step(runner: ModelRunner) -> None:
    torch.set_num_threads(2)
    try:
        execute(runner, plan(0, [(0, 0, 11, -1, True)], admitted=(admit(0),)))
        with pytest.raises(InternalError):
            execute(runner, plan(1, [(1, 0, 1, -1, True)]))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
