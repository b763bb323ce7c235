from __future__ import annotations

import numpy as np
import pytest

from fuseline.runtime.errors import (
    AlreadyExistsError,
    ErrorCode,
    FuselineError,
    InternalError,
    InvalidArgumentError,
    ResourceExhaustedError,
    UnavailableError,
)
from fuseline.runtime.plan import NO_TOKEN, StepResult
from fuseline.runtime.prefix_cache import prefix_hashes, prefix_salt, truncate_hash
from fuseline.runtime.request import FinishReason, Phase, TokenLogprobs
from fuseline.runtime.sampling_params import SamplingParams
from fuseline.tests.runtime.driver import Driver
from fuseline.tests.runtime.oracle import EOS, generate


def prompt_that_ends(num_tokens: int) -> tuple[int, ...]:
    """A prompt after which the model says EOS as its ``num_tokens``-th token."""
    params = SamplingParams(max_tokens=num_tokens + 1)
    for first in range(1, 50):
        for second in range(1, 50):
            outputs = generate((first, second), params, 1000)
            if len(outputs) == num_tokens and outputs[-1] == EOS:
                return first, second
    raise LookupError


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_every_schedule_gives_the_tokens_of_the_sequence_alone(depth: int, prefix_caching: bool) -> None:
    driver = Driver(depth=depth, num_blocks=14, prefix_caching=prefix_caching, max_num_batched_tokens=7)
    requests = [
        driver.add(f"r{i}", (1,) * (i % 7) + (1 + i % 3,) * (1 + i % 11), max_tokens=1 + (i * 7) % 19, priority=i % 3)
        for i in range(25)
    ]
    driver.run()
    assert driver.engine.stats().num_preemptions > 0
    for request in requests:
        assert driver.tokens(request.request_id) == generate(request.prompt_token_ids, request.params, 48)
        assert driver.reason(request.request_id) is FinishReason.LENGTH


def test_max_tokens_ends_with_length() -> None:
    driver = Driver()
    driver.add("a", max_tokens=1)
    driver.add("b", max_tokens=3)
    driver.run()
    assert [len(driver.tokens("a")), len(driver.tokens("b"))] == [1, 3]
    assert driver.reason("a") is driver.reason("b") is FinishReason.LENGTH


def test_the_context_ends_with_length_however_many_tokens_were_asked_for() -> None:
    driver = Driver(max_model_len=20, num_blocks=5)
    driver.add("a", 15, max_tokens=10**9)
    driver.run()
    assert len(driver.tokens("a")) == 5
    assert driver.reason("a") is FinishReason.LENGTH


def test_a_pool_smaller_than_the_context_ends_with_length_when_one_sequence_fills_it() -> None:
    driver = Driver(max_model_len=48, num_blocks=3)
    driver.add("a", 5, max_tokens=40)
    driver.run()
    assert len(driver.tokens("a")) == 12 - 5
    assert driver.reason("a") is FinishReason.LENGTH


def test_end_of_sequence_stops_and_is_delivered() -> None:
    driver = Driver()
    driver.add("a", prompt_that_ends(4), max_tokens=10, ignore_eos=False)
    driver.run()
    assert len(driver.tokens("a")) == 4
    assert driver.tokens("a")[-1] == EOS
    assert driver.reason("a") is FinishReason.STOP


def test_end_of_sequence_at_the_last_token_is_a_stop() -> None:
    driver = Driver()
    driver.add("a", prompt_that_ends(4), max_tokens=4, ignore_eos=False)
    driver.run()
    assert driver.reason("a") is FinishReason.STOP


def test_end_of_sequence_can_be_ignored() -> None:
    driver = Driver()
    driver.add("a", prompt_that_ends(4), max_tokens=9, ignore_eos=True)
    driver.run()
    assert len(driver.tokens("a")) == 9
    assert EOS in driver.tokens("a")
    assert driver.reason("a") is FinishReason.LENGTH


def test_stop_token_ids_stop_even_when_end_of_sequence_is_ignored() -> None:
    driver = Driver()
    request = driver.request("a", (3, 4, 5), max_tokens=12)
    expected = generate(request.prompt_token_ids, request.params, 48)
    stop = expected[5]
    driver.add("a", (3, 4, 5), max_tokens=12, stop_token_ids=(stop,))
    driver.run()
    assert driver.tokens("a") == expected[: expected.index(stop) + 1]
    assert driver.reason("a") is FinishReason.STOP


class ForcedExecutor:
    """Samples the token it is told, whatever the plan."""

    def __init__(self, token: int) -> None:
        self.token = token
        self.result = StepResult(0, np.empty(0, np.int32))

    def submit(self, plan: object) -> None:
        samples = plan.samples  # type: ignore[attr-defined]
        self.result = StepResult(plan.step_id, np.full(int(samples.sum()), self.token, np.int32))  # type: ignore[attr-defined]

    def collect(self) -> StepResult:
        return self.result


def test_no_end_counts_before_min_tokens() -> None:
    driver = Driver()
    driver.engine._executor = ForcedExecutor(EOS)
    driver.add("a", max_tokens=9, min_tokens=4, ignore_eos=False)
    driver.run()
    assert driver.tokens("a") == [EOS] * 4
    assert driver.reason("a") is FinishReason.STOP


@pytest.mark.parametrize("at_step", [0, 2])
def test_a_row_without_a_token_ends_alone(at_step: int) -> None:
    driver = Driver()
    driver.add("bad")
    driver.add("good")
    alone = Driver()
    alone.add("good")
    alone.run()
    collect = driver.executor.collect

    def undefined() -> StepResult:
        result = collect()
        if result.step_id == at_step:
            result.token_ids[0] = NO_TOKEN
        return result

    driver.executor.collect = undefined  # type: ignore[method-assign]
    driver.run()
    end = driver.outputs["bad"][-1]
    assert (end.finish_reason, end.error_code) == (FinishReason.ERROR, ErrorCode.INTERNAL)
    assert "not finite" in end.error
    assert len(driver.tokens("bad")) == at_step
    assert driver.tokens("good") == alone.tokens("good")
    assert driver.engine.stats().num_free_blocks == driver.engine.stats().num_total_blocks


def test_logprobs_and_prompt_logprobs_come_with_their_tokens_once() -> None:
    driver = Driver(max_num_batched_tokens=4)
    request = driver.add("a", 11, max_tokens=4, logprobs=0, prompt_logprobs=0)
    driver.add("b", 3, max_tokens=4)
    driver.run()
    outputs = driver.outputs["a"]
    assert [output.logprobs[0].token_id for output in outputs] == driver.tokens("a")
    assert [lp.token_id for lp in outputs[0].prompt_logprobs or ()] == list(request.prompt_token_ids[1:])
    assert all(output.prompt_logprobs is None for output in outputs[1:])
    assert all(not output.logprobs and output.prompt_logprobs is None for output in driver.outputs["b"])
    assert isinstance(outputs[0].logprobs[0], TokenLogprobs)


def test_a_prompt_of_one_token_has_no_prompt_logprobs_and_says_so() -> None:
    driver = Driver()
    driver.add("a", (3,), prompt_logprobs=0)
    driver.run()
    assert driver.outputs["a"][0].prompt_logprobs == ()


def test_prompt_logprobs_compute_what_the_prefix_cache_holds() -> None:
    driver = Driver()
    driver.add("a", (1,) * 12)
    driver.run()
    driver.add("b", (1,) * 12, prompt_logprobs=0)
    driver.run()
    assert driver.outputs["b"][0].num_cached_tokens == 0
    assert len(driver.outputs["b"][0].prompt_logprobs or ()) == 11


def test_prompt_logprobs_start_over_when_their_prompt_does() -> None:
    driver = Driver(max_num_seqs=1, max_num_batched_tokens=4)
    request = driver.add("a", 11, prompt_logprobs=0, priority=1)
    driver.step()
    driver.add("important", 3)
    driver.run()
    assert driver.engine.stats().num_preemptions == 1
    assert [lp.token_id for lp in driver.outputs["a"][0].prompt_logprobs or ()] == list(request.prompt_token_ids[1:])


def test_outputs_are_found_by_the_next_turn_of_a_conversation() -> None:
    driver = Driver()
    request = driver.add("first turn", 6, max_tokens=8)
    driver.run()
    driver.add("second turn", (*request.prompt_token_ids, *driver.tokens("first turn"), 7, 7, 7))
    driver.run()
    assert driver.outputs["second turn"][0].num_cached_tokens == 12  # the 14th token's KV was never computed


def test_cached_tokens_are_reported_and_not_computed() -> None:
    driver = Driver(max_num_batched_tokens=64)
    driver.add("a", (1,) * 12, max_tokens=1)
    driver.run()
    before = driver.executor.num_computed_tokens
    driver.add("b", (1,) * 12, max_tokens=1)
    driver.add("c", (1,) * 12, max_tokens=1, cache_salt="other tenant")
    driver.run()
    assert driver.outputs["b"][0].num_cached_tokens == 8  # whole blocks, one token left to compute
    assert driver.outputs["c"][0].num_cached_tokens == 0
    assert driver.executor.num_computed_tokens - before == 4 + 12
    stats = driver.engine.stats()
    assert (stats.num_prefix_cache_query_tokens, stats.num_prefix_cache_hit_tokens) == (36, 8)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"prompt": (3, 50)}, "prompt"),
        ({"prompt": (-1,)}, "prompt"),
        ({"prompt": 48}, "prompt"),
        ({"stop_token_ids": (50,)}, "stop_token_ids"),
        ({"logit_bias": {50: 1.0}}, "logit_bias"),
        ({"phase": Phase.DECODE}, "phase"),
    ],
)
def test_what_the_model_cannot_serve_is_refused_by_name(options: dict[str, object], field: str) -> None:
    driver = Driver(max_model_len=48)
    with pytest.raises(InvalidArgumentError) as caught:
        driver.add("a", **options)  # type: ignore[arg-type]
    assert caught.value.details["field"] == field
    assert not driver.engine.has_unfinished


def test_the_longest_prompt_that_leaves_room_is_served() -> None:
    driver = Driver(max_model_len=48)
    driver.add("a", 47)
    driver.run()
    assert len(driver.tokens("a")) == 1


def test_a_prompt_that_the_pool_can_never_hold_is_refused() -> None:
    driver = Driver(num_blocks=3)
    with pytest.raises(ResourceExhaustedError, match="3 KV blocks of 4 can never hold more than 11"):
        driver.add("a", 12)
    driver.add("b", 11)
    driver.run()
    assert len(driver.tokens("b")) == 1


def test_the_queue_is_bounded() -> None:
    driver = Driver(max_num_queued=2)
    driver.add("a")
    driver.add("b")
    with pytest.raises(ResourceExhaustedError, match="2 requests are waiting"):
        driver.add("c")
    driver.step()
    driver.add("c")


def test_a_live_request_id_is_taken_and_an_ended_one_is_not() -> None:
    driver = Driver()
    driver.add("a")
    with pytest.raises(AlreadyExistsError):
        driver.add("a")
    driver.run()
    driver.add("a")


@pytest.mark.parametrize("num_steps", range(9))
@pytest.mark.parametrize("depth", [1, 2])
def test_abort_ends_a_request_anywhere_and_only_once(num_steps: int, depth: int) -> None:
    driver = Driver(max_num_batched_tokens=4, depth=depth)
    driver.add("a", 9, max_tokens=20)
    other = driver.add("b", 9, max_tokens=5)
    for _ in range(num_steps):
        driver.step()
    output = driver.engine.abort("a", FinishReason.STOP)
    assert output is not None
    assert output.finish_reason is FinishReason.STOP
    assert driver.engine.abort("a") is None
    driver.engine.check_integrity()
    tokens = driver.tokens("a")
    driver.run()
    assert driver.tokens("a") == tokens, "an output after the last one"
    assert driver.tokens("b") == generate(other.prompt_token_ids, other.params, 48)
    assert driver.engine.stats().num_free_blocks == 16


def test_rows_and_blocks_of_a_step_in_flight_come_home_with_it() -> None:
    driver = Driver(depth=2, num_blocks=4, max_num_seqs=1, max_num_batched_tokens=4)
    driver.add("a", 11)
    driver.step()  # two chunks submitted, one collected
    driver.engine.abort("a")
    assert driver.engine.stats().num_free_blocks < 4
    assert driver.engine._store.num_free_rows == 0
    driver.engine.check_integrity()
    driver.add("b", 11)
    driver.run()
    assert len(driver.tokens("b")) > 0


def test_a_deadline_ends_a_request_where_it_is() -> None:
    driver = Driver(max_num_seqs=1)
    driver.add("running", 5, max_tokens=40, deadline=2.0)
    driver.add("waiting", 5, deadline=1.0)
    driver.add("patient", 5)
    driver.step()
    assert driver.engine.next_deadline == 1.0
    driver.now = 1.0
    driver.step()
    assert driver.reason("waiting") is FinishReason.DEADLINE
    assert driver.reason("running") is None
    assert driver.engine.next_deadline == 2.0
    driver.now = 5.0
    driver.run()
    assert driver.reason("running") is FinishReason.DEADLINE
    assert driver.reason("patient") is FinishReason.LENGTH
    assert driver.engine.next_deadline is None


def test_deadlines_of_ended_requests_do_not_pile_up() -> None:
    driver = Driver()
    driver.add("live", 1, max_tokens=40, deadline=1e8)
    for i in range(300):
        driver.add(f"r{i}", 1, max_tokens=1, deadline=1e9 + i)
        driver.engine.abort(f"r{i}")
    assert len(driver.engine._expirations._heap) < 100
    assert driver.engine.next_deadline == 1e8


@pytest.mark.parametrize("depth", [1, 2])
def test_when_the_group_fails_every_request_ends_with_the_error(depth: int) -> None:
    driver = Driver(fails_at_step=4, depth=depth)
    for name in "abcdefgh":
        driver.add(name, 9, max_tokens=20)
    reserved = driver.request("reserved", 4, phase=Phase.DECODE)
    driver.engine.abort("h")
    driver.engine.add_request(driver.request("held", 4, phase=Phase.PREFILL, priority=-1))
    while driver.engine.failure is None:
        driver.step()
    for name in "abcdefg":
        last = driver.outputs[name][-1]
        assert (last.finish_reason, last.error_code) == (FinishReason.ERROR, ErrorCode.UNAVAILABLE)
        assert last.error == "rank 1 is gone"
    assert driver.reason("held") is FinishReason.ERROR
    assert driver.engine.stats().num_free_blocks == 16
    assert not driver.engine.has_unfinished
    for refused in (lambda: driver.add("late"), lambda: driver.engine.reserve(reserved)):
        with pytest.raises(UnavailableError, match="the group has failed: rank 1 is gone"):
            refused()
    assert driver.step() == []


def test_whoever_drives_the_engine_can_fail_it() -> None:
    driver = Driver()
    driver.add("a")
    outputs = driver.engine.fail(FuselineError("the thread died"))
    assert [(output.request_id, output.error) for output in outputs] == [("a", "the thread died")]
    assert outputs[0].error_code is ErrorCode.INTERNAL


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (StepResult(1, np.array([3], np.int32)), "step 0 with 1 samples was answered by step 1"),
        (StepResult(0, np.array([3, 4], np.int32)), "with 2"),
        (StepResult(0, np.array([50], np.int32)), "not in the vocabulary"),
        (StepResult(0, np.array([-2], np.int32)), "not in the vocabulary"),
    ],
)
def test_an_answer_that_does_not_fit_fails_the_group(result: StepResult, message: str) -> None:
    driver = Driver()
    forced = ForcedExecutor(3)
    forced.submit = lambda plan: setattr(forced, "result", result)  # type: ignore[method-assign]
    driver.engine._executor = forced
    driver.add("a")
    driver.run()
    assert isinstance(driver.engine.failure, InternalError)
    assert message in driver.outputs["a"][-1].error


def test_stats_tell_what_is_where() -> None:
    driver = Driver(max_num_seqs=2, max_num_batched_tokens=8)
    driver.add("a", 6, max_tokens=3)
    driver.add("b", 10)
    driver.add("c", 7)
    driver.engine.reserve(driver.request("d", 4, phase=Phase.DECODE))
    driver.step()
    stats = driver.engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_reserved, stats.num_held) == (2, 1, 1, 0)
    assert stats.num_queued_tokens == (10 - 2) + 7
    assert (stats.num_total_blocks, stats.num_free_blocks) == (16, 16 - 2 - 3 - 2)
    assert (stats.num_steps, stats.num_generated_tokens, stats.num_finished) == (1, 1, 0)
    driver.engine.abort("d")
    driver.run()
    stats = driver.engine.stats()
    assert (stats.num_finished, stats.num_generated_tokens) == (4, 3 + 6 + 6)
    assert stats.num_leaked_blocks == 0


def test_stats_advertise_the_prefixes_that_a_router_looks_for() -> None:
    driver = Driver()
    request = driver.add("a", 9, max_tokens=1, cache_salt="tenant")
    driver.run()
    hashes = prefix_hashes(request.prompt_token_ids, 4, prefix_salt(driver.config.model.fingerprint, "tenant"))
    assert driver.engine.stats().recent_prefix_hashes == tuple(truncate_hash(h) for h in reversed(hashes))


def test_leaks_are_counted() -> None:
    driver = Driver()
    driver.add("a", 9)
    driver.step()
    driver.seq("a").block_ids.pop()
    assert driver.engine.stats().num_leaked_blocks == 1
    with pytest.raises(InternalError, match="references, sequences hold"):
        driver.engine.check_integrity()
