"""Groups of real rank processes: they compute the same, and fail promptly, typed and without leftovers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from fuseline.cluster.processes import children, wait_ended
from fuseline.runtime.config import SchedulerConfig
from fuseline.runtime.errors import (
    InternalError,
    InvalidArgumentError,
    ModelFormatError,
    UnavailableError,
)
from fuseline.runtime.request import Request
from fuseline.runtime.sampling_params import SamplingParams
from fuseline.runtime.sharding import ParallelConfig
from fuseline.tests.timing import PROMPTLY_S
from fuseline.tests.workers.llm_cases import SMALL_LLM, logprobs_of, run_mixed, tokens_of, write_tiny
from fuseline.workers import rank
from fuseline.workers.group import GroupConfig, ModelGroup
from fuseline.workers.launcher import LocalLauncher, RankProcess
from fuseline.workers.llm import LLM, RequestOutput


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    write_tiny(path)
    return path


@pytest.fixture(scope="module")
def single(tiny: Path) -> list[RequestOutput]:
    return run_mixed(tiny)


def group_config(path: Path, tp: int = 1, pp: int = 1, **options: Any) -> GroupConfig:
    defaults: dict[str, Any] = {
        "device": "cpu",
        "max_model_len": 128,
        "block_size": 4,
        "num_kv_blocks": 64,
        "scheduler": SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64),
    }
    return GroupConfig(model=str(path), parallel=ParallelConfig(tp, pp), **{**defaults, **options})


def rank_processes() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if "fuseline.workers.rank" in " ".join(p.cmdline())]


@pytest.fixture(autouse=True)
def _no_process_stays() -> Iterator[None]:
    yield
    _, alive = psutil.wait_procs(rank_processes(), timeout=PROMPTLY_S)
    assert alive == []


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (4, 1), (1, 2), (2, 2)])
def test_ranks_choose_the_tokens_of_one(tiny: Path, single: list[RequestOutput], tp: int, pp: int) -> None:
    """With 4 tensor ranks the 2 KV heads are replicated; with 2 stages their 3 layers are split unevenly."""
    outputs = run_mixed(
        tiny, tensor_parallel_size=tp, pipeline_parallel_size=pp, num_kv_blocks=40, max_num_batched_tokens=24
    )
    assert tokens_of(outputs) == tokens_of(single)
    for mine, other in zip(logprobs_of(outputs), logprobs_of(single), strict=True):
        assert mine == pytest.approx(other, abs=1e-4)


def test_a_killed_rank_ends_everything_promptly(tiny: Path) -> None:
    with LLM(str(tiny), **SMALL_LLM, tensor_parallel_size=2) as llm:
        (process,) = rank_processes()
        assert process.pid in llm.group.executor.pids
        llm.generate([[5, 6, 7]], SamplingParams(max_tokens=2))
        killed_at: list[float] = []

        def kill() -> None:
            killed_at.append(time.monotonic())
            process.kill()

        timer = threading.Timer(0.3, kill)
        timer.start()
        with pytest.raises(UnavailableError, match=r"rank 1 \(exit code -9\) is gone"):
            llm.generate([[5, 6, 7]] * 400, SamplingParams(max_tokens=100, ignore_eos=True))
        assert time.monotonic() - killed_at[0] < PROMPTLY_S
        with pytest.raises(UnavailableError):
            llm.generate([[5, 6, 7]])
        llm.group.engine.check_integrity()
        assert llm.group.engine.stats().num_leaked_blocks == 0


def test_a_rank_that_hangs_is_given_up(tiny: Path) -> None:
    group = ModelGroup.start(group_config(tiny, tp=2))
    group.executor._timeout_s = 1.0  # a busy machine may need longer to start
    (process,) = rank_processes()
    try:
        process.suspend()
        group.engine.add_request(Request("a", (5, 6), SamplingParams(max_tokens=4)))
        (output,) = group.engine.step()
        assert output.error_code == "UNAVAILABLE"
    finally:
        process.resume()
        group.close()


def test_ranks_end_with_the_process_of_their_group(tiny: Path) -> None:
    code = (
        "import sys, fuseline\n"
        f"llm = fuseline.LLM({str(tiny)!r}, device='cpu', tensor_parallel_size=2)\n"
        "print(llm.group.executor.pids[0], flush=True)\n"
        "sys.stdin.read()\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-P", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    with owner:
        assert owner.stdout is not None
        rank = int(owner.stdout.readline())
        ranks = {process for process in children(owner.pid) if process.pid == rank}
        owner.kill()
    assert ranks
    assert wait_ended(ranks, PROMPTLY_S) == set()


def test_a_forgotten_llm_is_closed(tiny: Path) -> None:
    llm = LLM(str(tiny), **SMALL_LLM, tensor_parallel_size=2)
    (process,) = rank_processes()
    del llm
    process.wait(PROMPTLY_S)


def test_prefix_caching_can_be_off_where_it_must_be(tmp_path: Path) -> None:
    """Dynamic rotary embedding beyond its original length: the ranks have to agree with the engine."""
    write_tiny(tmp_path, rope_parameters={"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 2.0})
    options: dict[str, Any] = {"max_model_len": 512, "num_kv_blocks": 128}
    group = ModelGroup.start(group_config(tmp_path, enable_prefix_caching=False, **options))
    group.close()
    with pytest.raises(InvalidArgumentError, match="prefix caching must be off"):
        ModelGroup.start(group_config(tmp_path, **options), NoLauncher())


class NoLauncher(LocalLauncher):
    def launch(self, rank: int, address: str, token: bytes, device_type: str) -> RankProcess:
        pytest.fail("a rank is started for a configuration that cannot be served")


@pytest.mark.parametrize(("field", "value"), [("block_size", 0), ("block_size", 2000), ("num_kv_blocks", 0)])
def test_a_cache_that_cannot_be_is_refused_before_anything_starts(tiny: Path, field: str, value: int) -> None:
    with pytest.raises(InvalidArgumentError) as raised:
        ModelGroup.start(group_config(tiny, tp=2, **{field: value}), NoLauncher())
    assert (raised.value.details["field"], raised.value.details["value"]) == (field, str(value))


def test_loading_shows_progress(
    tiny: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, int]] = []
    ModelGroup.start(group_config(tiny), progress=lambda done, total: told.append((done, total))).close()
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1] > 100_000
    alone = told[-1]
    told.clear()
    ModelGroup.start(group_config(tiny, tp=2), progress=lambda done, total: told.append((done, total))).close()
    assert told[-1][0] == told[-1][1] > alone[1]  # both ranks' parts, of which some are the same
    monkeypatch.setattr(rank, "_LOADING_LOG_S", 0.0)
    with caplog.at_level("INFO"):
        ModelGroup.start(group_config(tiny)).close()
    assert "rank 0: 0 of 0 MiB of weights loaded" in caplog.text


def test_start_failures_are_typed_and_leave_nothing(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="cannot listen"):
        ModelGroup.start(group_config(tiny, tp=2), LocalLauncher("192.0.2.1"))
    broken = shutil.copytree(tiny, tmp_path / "broken")
    data = bytearray((broken / "model.safetensors").read_bytes())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert "model.norm.weight" in header
    index = data.index(b"model.norm.weight")
    data[index : index + 17] = b"model.morn.weight"
    (broken / "model.safetensors").write_bytes(data)
    with pytest.raises(ModelFormatError):
        ModelGroup.start(group_config(broken, tp=2))


class OtherModelLauncher(LocalLauncher):
    """Starts ranks that see another model than the first rank: as on a host whose copy is out of date."""

    def __init__(self, swap: Callable[[], object]) -> None:
        super().__init__()
        self._swap = swap

    def launch(self, rank: int, address: str, token: bytes, device_type: str) -> RankProcess:
        process = super().launch(rank, address, token, device_type)
        self._swap()
        return process


def test_a_rank_reports_what_is_wrong_on_its_side(tiny: Path, tmp_path: Path) -> None:
    path = shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    changed = json.dumps({**config, "rms_norm_eps": 0.5})
    with pytest.raises(ModelFormatError, match=r"rank 1.*not the model that the first rank has"):
        ModelGroup.start(
            group_config(path, tp=2), OtherModelLauncher(lambda: (path / "config.json").write_text(changed))
        )


class DyingLauncher(LocalLauncher):
    def launch(self, rank: int, address: str, token: bytes, device_type: str) -> RankProcess:
        process = super().launch(rank, address, token, device_type)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        return process


def test_a_rank_that_dies_before_it_calls_in(tiny: Path) -> None:
    start = time.monotonic()
    with pytest.raises(UnavailableError, match="rank 1 ended with exit code -9"):
        ModelGroup.start(group_config(tiny, tp=2), DyingLauncher())
    assert time.monotonic() - start < PROMPTLY_S


def test_a_rank_that_cannot_be_started_is_named(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(UnavailableError, match=r"rank 1 cannot be started: .*No such file"):
        ModelGroup.start(group_config(tiny, tp=2))


def test_a_bug_in_a_call_is_an_answer_too(tiny: Path) -> None:
    group = ModelGroup.start(group_config(tiny, transfers_kv=True))
    assert group.kv_receiver is not None
    try:
        group.kv_receiver.close = None  # type: ignore[assignment, method-assign]  # calling it is a TypeError
        with pytest.raises(InternalError, match="TypeError"):
            group.executor.close_reservation("x").result(PROMPTLY_S)
        group.executor.cancel_handoff("x").result(PROMPTLY_S)
    finally:
        group.close()


def test_calls_about_kv_are_refused_by_a_group_without_transfers(tiny: Path) -> None:
    group = ModelGroup.start(group_config(tiny))
    try:
        with pytest.raises(InternalError, match="not started to transfer"):
            group.executor.close_reservation("x").result(PROMPTLY_S)
    finally:
        group.close()
    with pytest.raises(UnavailableError, match="closed"):
        group.executor.close_reservation("x").result(PROMPTLY_S)
