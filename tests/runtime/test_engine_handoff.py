"""A request's two legs: prefill holds, decode reserves, commits and goes on as if it had been one engine."""

from __future__ import annotations

import pytest

from fuseline.runtime.errors import (
    AlreadyExistsError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
)
from fuseline.runtime.request import FinishReason, Phase, Request
from fuseline.runtime.sequence import SequenceState
from fuseline.tests.runtime.driver import Driver
from fuseline.tests.runtime.oracle import EOS, generate


def handed_over(driver: Driver, request: Request) -> list[int]:
    """Reserve, let a transfer write the prompt's KV, commit; returns what the sequence alone would say."""
    reserved = driver.engine.reserve(request)
    driver.executor.write(reserved.block_ids, request.prompt_token_ids, reserved.num_cached_tokens)
    expected = generate(request.prompt_token_ids, request.params, 48)
    driver.engine.commit(request.request_id, expected[0])
    return expected


def decode_request(driver: Driver, name: str, prompt: int | tuple[int, ...] = 9, **options: object) -> Request:
    return driver.request(name, prompt, phase=Phase.DECODE, **options)  # type: ignore[arg-type]


def test_prefill_delivers_one_token_and_holds_the_blocks_until_they_are_released() -> None:
    driver = Driver(max_num_batched_tokens=4)
    request = driver.add("a", 9, phase=Phase.PREFILL)
    driver.run()
    assert driver.tokens("a") == generate(request.prompt_token_ids, request.params, 48)[:1]
    assert driver.reason("a") is None
    assert driver.executor.rows[0].admitted.handoff_id == "a"
    assert not driver.engine.has_unfinished
    stats = driver.engine.stats()
    assert (stats.num_held, stats.num_running, stats.num_free_blocks) == (1, 0, 13)
    driver.executor.check_holds(driver.seq("a").block_ids, request.prompt_token_ids)
    driver.engine.release_handoff("a")
    driver.engine.release_handoff("a")
    assert driver.engine.stats().num_free_blocks == 16
    assert driver.engine.stats().num_finished == 1
    driver.engine.check_integrity()


def test_a_held_prefill_gives_its_row_to_the_next() -> None:
    driver = Driver(max_num_seqs=1)
    for name in "abc":
        driver.add(name, 5, phase=Phase.PREFILL)
    driver.run()
    assert driver.engine.stats().num_held == 3


def test_a_prefill_whose_first_token_ends_it_holds_nothing() -> None:
    driver = Driver()
    driver.add("a", 9, phase=Phase.PREFILL, max_tokens=1)
    driver.run()
    assert driver.reason("a") is FinishReason.LENGTH
    assert driver.engine.stats().num_free_blocks == 16
    driver.engine.release_handoff("a")


def test_full_requests_name_no_handoff() -> None:
    driver = Driver()
    driver.add("a")
    driver.run()
    assert driver.executor.rows[0].admitted.handoff_id == ""


def test_decode_goes_on_after_the_first_token_without_repeating_it() -> None:
    driver = Driver()
    expected = handed_over(driver, decode_request(driver, "a", max_tokens=10))
    driver.run()
    assert driver.tokens("a") == expected[1:]
    assert driver.reason("a") is FinishReason.LENGTH
    assert driver.executor.num_computed_tokens == 9  # one per output, none of the prompt
    assert driver.engine.stats().num_free_blocks == 16


def test_a_committed_sequence_decodes_at_once_beside_a_long_prompt() -> None:
    driver = Driver(num_blocks=64, max_model_len=200, max_num_batched_tokens=8)
    driver.add("prompt", 100)
    driver.step()
    handed_over(driver, decode_request(driver, "a"))
    driver.step()
    assert driver.scheduled() == {"prompt": 7, "a": 1}


def test_a_committed_sequence_survives_preemption() -> None:
    driver = Driver(num_blocks=8, max_num_seqs=2)
    first = handed_over(driver, decode_request(driver, "a", 9, max_tokens=14))
    second = handed_over(driver, decode_request(driver, "b", 9, max_tokens=14))
    driver.run()
    assert driver.engine.stats().num_preemptions > 0
    assert driver.tokens("a") == first[1:]
    assert driver.tokens("b") == second[1:]


def test_committed_sequences_wait_for_rows_and_give_up_their_blocks_to_those_that_run() -> None:
    driver = Driver(num_blocks=8, max_num_seqs=1, prefix_caching=False)
    first = handed_over(driver, decode_request(driver, "a", 9, max_tokens=20))
    driver.step()
    second = handed_over(driver, decode_request(driver, "b", 9, max_tokens=5))
    assert driver.engine.stats().num_waiting == 1
    while driver.seq("b").state is SequenceState.COMMITTED:
        driver.step()
    assert driver.seq("b").state is SequenceState.WAITING
    assert driver.seq("a").state is SequenceState.DECODING
    driver.run()
    assert driver.tokens("a") == first[1:]
    assert driver.tokens("b") == second[1:]


def test_the_last_running_sequence_gives_its_row_to_a_committed_one_that_holds_the_blocks() -> None:
    driver = Driver(num_blocks=8, max_num_seqs=1, prefix_caching=False)
    first = handed_over(driver, decode_request(driver, "late", 9, max_tokens=20, priority=1))
    driver.step()
    second = handed_over(driver, decode_request(driver, "early", 9, max_tokens=5, priority=0))
    driver.run()
    assert driver.tokens("late") == first[1:]
    assert driver.tokens("early") == second[1:]
    assert driver.engine.stats().num_preemptions == 1


def test_reserving_finds_the_prefix_cache_and_commit_feeds_it() -> None:
    driver = Driver()
    handed_over(driver, decode_request(driver, "a", (1,) * 9))
    reserved = driver.engine.reserve(decode_request(driver, "b", (1,) * 9))
    assert reserved.num_cached_tokens == 8
    assert reserved.block_ids[:2] == tuple(driver.seq("a").block_ids[:2])
    assert reserved.block_ids[2] != driver.seq("a").block_ids[2]


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(1, 1), (3, 1), (4, 2), (7, 2), (8, 3)])
def test_a_reservation_has_room_for_the_prompt_and_one_token(num_tokens: int, num_blocks: int) -> None:
    driver = Driver()
    assert len(driver.engine.reserve(decode_request(driver, "a", num_tokens)).block_ids) == num_blocks


def test_an_uncommitted_reservation_lends_nothing_to_the_prefix_cache() -> None:
    driver = Driver()
    driver.engine.reserve(decode_request(driver, "a", (1,) * 9))
    assert driver.engine.reserve(decode_request(driver, "b", (1,) * 9)).num_cached_tokens == 0
    driver.engine.abort("a")
    assert driver.engine.reserve(decode_request(driver, "c", (1,) * 9)).num_cached_tokens == 0


def test_reserving_leaves_room_for_those_that_run_and_wait() -> None:
    driver = Driver(num_blocks=8, max_num_seqs=1)
    driver.add("running", 3, max_tokens=20)
    driver.step()
    driver.add("waiting", 11)
    # 7 are free; one is for "running" to grow, three for "waiting".
    with pytest.raises(ResourceExhaustedError, match="needs 4 KV blocks, 3 can be reserved"):
        driver.engine.reserve(decode_request(driver, "a", 12))
    assert driver.engine.stats().num_free_blocks == 7
    driver.engine.reserve(decode_request(driver, "b", 11))
    driver.engine.check_integrity()


def test_nothing_is_reserved_between_the_preemption_of_a_handoff_and_the_plan_that_tells_the_ranks() -> None:
    driver = Driver()
    driver.add("a", 20, phase=Phase.PREFILL, max_tokens=4)
    driver.step()
    driver.engine._store.preempt(driver.seq("a"))
    with pytest.raises(ResourceExhaustedError, match="taken back from a handoff"):
        driver.engine.reserve(decode_request(driver, "b"))
    driver.step()
    driver.engine.reserve(decode_request(driver, "b"))
    driver.engine._store.preempt(driver.seq("a"))
    driver.engine.abort("a")
    driver.engine.reserve(decode_request(driver, "c"))


def test_endless_reservations_do_not_starve_a_waiting_request() -> None:
    driver = Driver(num_blocks=8, max_num_seqs=2)
    for i in range(2):
        handed_over(driver, decode_request(driver, f"first{i}", 7, max_tokens=6))
    driver.add("waiting", 20, max_tokens=2)
    for i in range(100):
        driver.step()
        try:
            handed_over(driver, decode_request(driver, f"r{i}", 3, max_tokens=6))
        except ResourceExhaustedError:
            continue
        if driver.reason("waiting"):
            break
    assert driver.reason("waiting") is FinishReason.LENGTH
    assert i < 30


def test_a_first_token_that_ends_the_sequence_ends_it_at_commit() -> None:
    driver = Driver()
    driver.engine.reserve(decode_request(driver, "a", ignore_eos=False))
    output = driver.engine.commit("a", EOS)
    assert output is not None
    assert (output.finish_reason, output.token_ids) == (FinishReason.STOP, ())
    driver.engine.reserve(decode_request(driver, "b", max_tokens=1))
    output = driver.engine.commit("b", 3)
    assert output is not None
    assert output.finish_reason is FinishReason.LENGTH
    assert driver.engine.stats().num_free_blocks == 16


def test_commit_needs_a_reservation_that_is_not_committed_yet() -> None:
    driver = Driver()
    driver.add("queued")
    with pytest.raises(NotFoundError):
        driver.engine.commit("nobody", 1)
    with pytest.raises(NotFoundError):
        driver.engine.commit("queued", 1)
    handed_over(driver, decode_request(driver, "a"))
    with pytest.raises(NotFoundError):
        driver.engine.commit("a", 1)


def test_commit_and_reserve_check_what_they_are_given() -> None:
    driver = Driver()
    driver.engine.reserve(decode_request(driver, "a"))
    with pytest.raises(InvalidArgumentError, match="token id 50"):
        driver.engine.commit("a", 50)
    with pytest.raises(AlreadyExistsError):
        driver.engine.reserve(decode_request(driver, "a"))
    with pytest.raises(InvalidArgumentError, match="takes no reservation"):
        driver.engine.reserve(driver.request("b"))
    assert driver.engine.commit("a", 3) is None


def test_an_aborted_reservation_frees_its_blocks_at_once() -> None:
    driver = Driver()
    driver.engine.reserve(decode_request(driver, "a"))
    output = driver.engine.abort("a")
    assert output is not None
    assert output.finish_reason is FinishReason.ABORT
    assert driver.engine.stats().num_free_blocks == 16


@pytest.mark.parametrize("deadline", [None, 3.0])
def test_a_reservation_that_is_never_committed_ends_but_its_blocks_wait_for_the_transfer(
    deadline: float | None,
) -> None:
    driver = Driver(handoff_timeout_s=8.0)
    driver.engine.reserve(decode_request(driver, "a", deadline=deadline))
    limit = 8.0 if deadline is None else deadline
    assert driver.engine.next_deadline == limit
    driver.now = limit - 0.1
    assert driver.step() == []
    driver.now = limit
    driver.step()
    assert driver.reason("a") is FinishReason.DEADLINE
    assert driver.engine.stats().num_free_blocks == 13
    assert driver.engine.stats().num_held == 1
    with pytest.raises(NotFoundError):
        driver.engine.commit("a", 3)
    driver.engine.release_handoff("a")
    assert driver.engine.stats().num_free_blocks == 16
    assert driver.engine.stats().num_finished == 1


def test_a_prefill_that_is_never_released_ends_but_its_blocks_wait_for_the_transfer() -> None:
    driver = Driver(handoff_timeout_s=8.0)
    driver.add("a", 9, phase=Phase.PREFILL)
    driver.now = 5.0
    driver.run()
    driver.now = 12.9
    driver.step()
    assert driver.reason("a") is None
    driver.now = 13.0
    driver.step()
    assert driver.reason("a") is FinishReason.DEADLINE
    assert driver.engine.stats().num_free_blocks == 13
    assert driver.engine.abort("a") is None  # it has ended already
    assert driver.engine.stats().num_free_blocks == 16


def test_after_commit_only_the_request_s_own_deadline_counts() -> None:
    driver = Driver(handoff_timeout_s=8.0)
    handed_over(driver, decode_request(driver, "a"))
    handed_over(driver, decode_request(driver, "b", deadline=20.0))
    assert driver.engine.next_deadline == 20.0
    driver.now = 9.0
    driver.run()
    assert driver.reason("a") is driver.reason("b") is FinishReason.LENGTH


def test_a_whole_handoff_between_two_engines_equals_one_engine() -> None:
    prefill, decode = Driver(max_num_batched_tokens=4), Driver(block_size=2, num_blocks=32)
    request = prefill.add("a", 13, phase=Phase.PREFILL, max_tokens=9)
    reserved = decode.engine.reserve(decode_request(decode, "a", request.prompt_token_ids, max_tokens=9))
    prefill.run()
    prefill.executor.check_holds(prefill.seq("a").block_ids, request.prompt_token_ids)
    decode.executor.write(reserved.block_ids, request.prompt_token_ids, reserved.num_cached_tokens)
    assert decode.engine.commit("a", prefill.tokens("a")[0]) is None
    prefill.engine.release_handoff("a")
    decode.run()
    assert prefill.tokens("a") + decode.tokens("a") == generate(request.prompt_token_ids, request.params, 48)
