from __future__ import annotations

import pytest

from fuseline.runtime import scheduler
from fuseline.runtime.request import FinishReason, Phase
from fuseline.runtime.sampling_params import SamplingParams
from fuseline.runtime.sequence import PRIORITY_HEAD_START_S, SequenceState
from fuseline.tests.runtime.driver import Driver
from fuseline.tests.runtime.oracle import generate


def test_a_decode_gets_its_token_in_every_step_beside_a_long_prompt() -> None:
    driver = Driver(num_blocks=64, max_model_len=200, max_num_batched_tokens=8)
    driver.add("decode", 4, max_tokens=30)
    driver.step()
    driver.add("prompt", 100)
    for count in range(2, 16):
        driver.step()
        assert len(driver.tokens("decode")) == count
        assert driver.scheduled()["decode"] == 1
        if count < 16:
            assert driver.scheduled()["prompt"] == 7  # the rest of the budget


def test_a_short_prompt_behind_a_long_one_shares_what_the_last_chunk_leaves() -> None:
    driver = Driver(num_blocks=64, max_num_batched_tokens=8)
    driver.add("long", 12)
    driver.add("short", 3)
    driver.step()
    assert driver.scheduled() == {"long": 8}
    driver.step()
    assert driver.scheduled() == {"long": 4, "short": 3}


def test_lower_priority_values_run_first_and_ties_go_by_arrival() -> None:
    driver = Driver(max_num_seqs=1)
    for name, priority in (("c", 0), ("e", 2), ("d", 0), ("a", -3), ("b", -1)):
        driver.add(name, 3, max_tokens=1, priority=priority)
    driver.run()
    assert list(driver.outputs) == ["a", "b", "c", "d", "e"]


def test_one_plan_does_not_carry_the_tokens_of_all_who_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "MAX_ADMITTED_TOKENS", 10)
    driver = Driver(num_blocks=64, max_num_batched_tokens=64)
    for name in ("a", "b", "c"):
        driver.add(name, 6)
    driver.step()
    assert driver.scheduled() == {"a": 6, "b": 6}
    driver.step()
    assert driver.scheduled() == {"a": 1, "b": 1, "c": 6}


def test_prompt_logprobs_are_computed_a_bounded_number_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "MAX_PROMPT_LOGPROB_TOKENS", 8)
    driver = Driver(num_blocks=64, max_num_batched_tokens=64)
    driver.add("a", 11, prompt_logprobs=1)
    driver.add("b", 12, prompt_logprobs=1)
    driver.add("c", 13)
    driver.step()
    assert driver.scheduled() == {"a": 8, "c": 13}
    driver.step()
    assert driver.scheduled() == {"a": 3, "b": 5, "c": 1}
    driver.run()
    for name, num_tokens in (("a", 11), ("b", 12)):
        logprobs = [output.prompt_logprobs for output in driver.outputs[name] if output.prompt_logprobs is not None]
        assert [len(entries) for entries in logprobs] == [num_tokens - 1]


def test_a_priority_is_worth_a_head_start_not_eternity() -> None:
    driver = Driver(max_num_seqs=1)
    driver.add("old and unimportant", 3, max_tokens=1, priority=1)
    driver.now = PRIORITY_HEAD_START_S + 1
    driver.add("new and important", 3, max_tokens=1, priority=0)
    driver.run()
    assert list(driver.outputs) == ["old and unimportant", "new and important"]


def test_endless_important_requests_do_not_starve_an_unimportant_one() -> None:
    driver = Driver(max_num_seqs=2, num_blocks=6)
    driver.add("unimportant", 9, max_tokens=8, priority=3)
    for i in range(2000):
        driver.now += 0.5
        if driver.engine.stats().num_waiting < 5:
            driver.add(f"r{i}", 9, max_tokens=2)
        driver.step()
        if driver.reason("unimportant"):
            break
    assert driver.reason("unimportant") is FinishReason.LENGTH
    # It stood back for those that arrived within its handicap, then had its turn.
    assert 3 * PRIORITY_HEAD_START_S < driver.now < 3 * PRIORITY_HEAD_START_S + 20


def test_a_large_request_is_not_overtaken_for_ever_by_small_ones() -> None:
    driver = Driver(num_blocks=12, max_num_seqs=4)
    for i in range(3):
        driver.add(f"first{i}", 9, max_tokens=3)
    driver.step()
    driver.add("large", 40, max_tokens=2)
    for i in range(100):
        driver.add(f"small{i}", 3, max_tokens=3)
        driver.step()
        if driver.reason("large"):
            break
    assert i < 15
    assert not any(name.startswith("small") for name in driver.outputs)


def test_preemption_takes_the_latest_and_loses_no_token() -> None:
    driver = Driver(num_blocks=6, max_num_seqs=3, prefix_caching=False)
    requests = [driver.add(name, 3, max_tokens=12) for name in "ab"]
    while not driver.engine.stats().num_preemptions:
        driver.step()
    assert driver.seq("b").state is SequenceState.WAITING
    assert driver.seq("a").state is SequenceState.DECODING
    stats = driver.engine.stats()
    assert stats.num_queued_tokens == driver.seq("b").num_tokens
    driver.run()
    for request in requests:
        assert driver.tokens(request.request_id) == generate(request.prompt_token_ids, request.params, 48)
    assert driver.engine.stats().num_preemptions == 1


def test_preemption_takes_the_least_important_not_the_latest() -> None:
    driver = Driver(num_blocks=6, max_num_seqs=3)
    driver.add("unimportant", 3, max_tokens=12, priority=1)
    driver.add("important", 3, max_tokens=12)
    while not driver.engine.stats().num_preemptions:
        driver.step()
    assert driver.seq("unimportant").state is SequenceState.WAITING


def test_a_preempted_sequence_finds_its_blocks_in_the_prefix_cache() -> None:
    driver = Driver(num_blocks=12, max_num_seqs=2, max_num_batched_tokens=64)
    driver.add("b", 20, max_tokens=20, priority=1)
    for _ in range(3):
        driver.step()
    driver.add("a", 20, max_tokens=2)
    driver.step()
    assert driver.seq("b").state is SequenceState.WAITING
    known = driver.seq("b").num_tokens
    before = driver.executor.num_computed_tokens
    driver.run()
    # What its own decoding took, and "a", but not the whole of "b" again.
    recomputed = driver.executor.num_computed_tokens - before - (20 - (known - 20)) - 1
    assert recomputed < known / 2
    assert driver.outputs["b"][-1].num_cached_tokens == 0  # of its prompt, when it first ran


def test_nobody_takes_a_block_before_it_is_needed() -> None:
    driver = Driver()
    driver.add("a", 3, max_tokens=20)
    blocks = []
    for _ in range(8):
        driver.step()
        blocks.append(16 - driver.engine.stats().num_free_blocks)
    # The prompt of 3 and its first token fill block one; the fifth token's KV is computed in step 3.
    assert blocks == [1, 1, 2, 2, 2, 2, 3, 3]


def test_admission_leaves_a_block_for_each_running_sequence() -> None:
    driver = Driver(num_blocks=6, max_num_seqs=4)
    driver.add("a", 8, max_tokens=10)
    driver.step()
    assert driver.engine.stats().num_free_blocks == 3
    driver.add("fits only without room to grow", 11, max_tokens=1)
    driver.step()
    assert len(driver.scheduled()) == 1
    driver.run()
    assert driver.engine.stats().num_preemptions == 0


def test_an_important_request_preempts_for_a_row() -> None:
    driver = Driver(max_num_seqs=2)
    driver.add("a", 3, max_tokens=20, priority=1)
    driver.add("b", 3, max_tokens=20, priority=1)
    driver.step()
    driver.add("important", 3, max_tokens=2)
    driver.step()
    assert set(driver.scheduled()) == {"a", "important"}
    driver.run()
    assert len(driver.tokens("b")) == 20


def test_an_important_request_preempts_for_blocks_only_if_that_is_enough() -> None:
    driver = Driver(num_blocks=10, max_num_seqs=4)
    driver.add("equal", 15, max_tokens=20)
    driver.add("lower", 10, max_tokens=20, priority=1)
    driver.step()
    driver.add("too large", 26, max_tokens=2)
    driver.step()
    assert driver.engine.stats().num_preemptions == 0
    driver.engine.abort("too large")
    driver.add("fits", 12, max_tokens=2)
    driver.step()
    assert set(driver.scheduled()) == {"equal", "fits"}
    driver.run()


def test_room_to_grow_counts_when_preemption_is_weighed() -> None:
    driver = Driver(num_blocks=10, max_num_seqs=4)
    driver.add("equal", 15, max_tokens=20)
    driver.add("lower", 10, max_tokens=20, priority=1)
    driver.step()
    # Without "lower" 6 blocks would be free, one of them kept for "equal": 6 are not enough for 6.
    driver.add("one too large", 23, max_tokens=2)
    driver.step()
    assert driver.engine.stats().num_preemptions == 0


def test_a_waiting_request_does_not_preempt_an_equal_one_that_overtook_it() -> None:
    driver = Driver(num_blocks=9, max_num_seqs=2, prefix_caching=False)
    driver.add("a", 3, max_tokens=24)
    driver.add("b", 3, max_tokens=24)
    driver.step()
    late = driver.engine.reserve(driver.request("late", 11, max_tokens=3, phase=Phase.DECODE))
    driver.executor.write(late.block_ids, driver.seq("late").request.prompt_token_ids, 0)
    while not driver.engine.stats().num_preemptions:
        driver.step()
    assert driver.seq("b").state is SequenceState.WAITING
    driver.engine.commit("late", generate(driver.seq("late").request.prompt_token_ids, SamplingParams(), 48)[0])
    while not driver.reason("late"):
        driver.step()
        assert set(driver.scheduled()) == {"a", "late"}
    assert driver.engine.stats().num_preemptions == 1
    driver.run()
    assert len(driver.tokens("b")) == 24


def test_an_equal_request_preempts_nobody_to_get_in() -> None:
    driver = Driver(max_num_seqs=1)
    driver.add("a", 3, max_tokens=5)
    driver.step()
    driver.add("b", 3, max_tokens=5)
    driver.run()
    assert driver.engine.stats().num_preemptions == 0


def test_a_chunk_is_dropped_from_the_step_when_its_sequence_is_preempted_for_it() -> None:
    driver = Driver(num_blocks=12, max_num_seqs=3, max_num_batched_tokens=16)
    driver.add("a", 3, max_tokens=30, priority=-1)
    driver.add("chunked", 20, max_tokens=4, priority=1)
    driver.step()
    assert driver.scheduled() == {"a": 3, "chunked": 13}
    driver.add("important", 12, max_tokens=2)
    driver.step()
    assert driver.scheduled() == {"a": 1, "important": 12}
    assert driver.seq("chunked").state is SequenceState.WAITING
    driver.run()
    assert len(driver.tokens("chunked")) == 4


def test_a_block_for_a_row_that_is_then_preempted_is_not_announced() -> None:
    driver = Driver(max_num_seqs=1)
    driver.add("a", 3, max_tokens=9, priority=1)
    driver.step()
    driver.step()
    driver.add("important", 3, max_tokens=2)
    driver.step()  # "a" would have begun its second block
    assert driver.scheduled() == {"important": 3}
    assert driver.plan.new_block_ids.tolist() == []
    driver.run()
    assert len(driver.tokens("a")) == 9


def test_blocks_shared_with_those_that_stay_are_no_gain_of_a_preemption() -> None:
    driver = Driver(num_blocks=14, max_num_seqs=4, max_num_batched_tokens=64)
    driver.add("stays", (1,) * 25, max_tokens=12)
    driver.step()
    driver.add("lower", (1,) * 25, max_tokens=12, priority=1)
    driver.step()
    assert driver.engine.stats().num_free_blocks == 14 - 7 - 1
    driver.add("important", 24, max_tokens=2)  # 7 blocks and one to grow: "lower" would give only one
    driver.step()
    assert driver.engine.stats().num_preemptions == 0
    driver.run()


def test_a_prefix_that_only_the_preempted_hold_is_no_gain_either() -> None:
    driver = Driver(num_blocks=10, max_num_seqs=4, max_num_batched_tokens=64)
    driver.add("equal", 11, max_tokens=12)
    driver.add("lower", (1,) * 17, max_tokens=12, priority=1)
    driver.step()
    driver.add("important", (1,) * 17 + (2,) * 12, max_tokens=2)
    driver.step()
    assert driver.engine.stats().num_preemptions == 0
    driver.run()


def test_equal_prompts_that_arrive_together_are_computed_once() -> None:
    driver = Driver(num_blocks=64, max_num_seqs=8, max_num_batched_tokens=64)
    for i in range(8):
        driver.add(f"r{i}", (1,) * 17, max_tokens=3)
    driver.step()
    assert driver.scheduled() == {"r0": 17}
    driver.step()
    assert driver.scheduled() == {"r0": 1} | {f"r{i}": 1 for i in range(1, 8)}
    driver.run()
    assert {driver.outputs[f"r{i}"][0].num_cached_tokens for i in range(1, 8)} == {16}


def test_waiting_for_a_prefix_lets_others_pass() -> None:
    driver = Driver(num_blocks=64, max_num_batched_tokens=64)
    driver.add("a", (1,) * 9)
    driver.add("same", (1,) * 9)
    driver.add("other", (2,) * 9)
    driver.step()
    assert driver.scheduled() == {"a": 9, "other": 9}


def test_a_prefix_whose_computation_was_aborted_is_not_waited_for() -> None:
    driver = Driver(num_blocks=64, depth=2, max_num_batched_tokens=8)
    driver.add("a", (1,) * 30)
    driver.add("same", (1,) * 30)
    driver.step()
    driver.engine.abort("a")
    driver.run()
    assert len(driver.tokens("same")) == 6


def test_decodes_are_dealt_out_over_the_pipeline() -> None:
    driver = Driver(depth=4, num_blocks=64, max_num_seqs=8, max_num_batched_tokens=64)
    for i in range(8):
        driver.add(f"r{i}", 3, max_tokens=30)
    for _ in range(8):
        driver.step()
    assert len(driver.executor.results) == 3  # four in flight, one just collected
    last = list(driver.executor.plans)[-4:]
    assert [len(plan.rows) for plan in last] == [2, 2, 2, 2]
    assert len({row for plan in last for row in plan.rows.tolist()}) == 8


def test_chunks_of_one_prompt_follow_each_other_through_the_pipeline() -> None:
    driver = Driver(depth=3, num_blocks=64, max_model_len=100, max_num_batched_tokens=8)
    driver.add("a", 60)
    driver.step()
    assert [plan.positions.tolist() for plan in driver.executor.plans] == [[0], [8], [16]]


def test_a_victim_in_flight_is_waited_for() -> None:
    driver = Driver(depth=2, num_blocks=6, max_num_seqs=2, prefix_caching=False)
    requests = [driver.add(name, 3, max_tokens=14) for name in "ab"]
    table = driver.engine._store.table
    waited = 0
    while driver.engine.has_unfinished:
        driver.step()
        short = [seq for seq in driver.engine._store.running if seq.num_tokens > 4 * len(seq.block_ids)]
        waited += bool(short) and not driver.engine._store.pool.num_free and bool(table.in_flight.any())
    assert waited
    assert driver.engine.stats().num_preemptions > 0
    for request in requests:
        assert driver.tokens(request.request_id) == generate(request.prompt_token_ids, request.params, 24)


def test_an_engine_without_work_is_idle_and_with_work_is_not() -> None:
    driver = Driver(num_blocks=4)
    assert driver.step() == []
    assert driver.engine.is_idle
    driver.engine.reserve(driver.request("reserved", 11, phase=Phase.DECODE))
    driver.add("a", 8)
    assert not driver.engine.is_idle
    driver.step()
    assert driver.engine.is_idle  # the reservation holds the blocks
    assert driver.engine.has_unfinished
    driver.engine.abort("reserved")
    assert not driver.engine.is_idle
    driver.run()
    assert driver.reason("a") is FinishReason.LENGTH


@pytest.mark.parametrize("depth", [1, 2])
def test_many_sequences_in_little_room_all_end_in_bounded_steps(depth: int) -> None:
    driver = Driver(num_blocks=12, max_num_seqs=6, max_num_batched_tokens=8, depth=depth)
    names = [driver.add(f"r{i}", 1 + (i * 5) % 30, max_tokens=15, priority=i % 2).request_id for i in range(40)]
    driver.run(max_steps=40 * 15 * 4)
    assert all(driver.reason(name) is FinishReason.LENGTH for name in names)
