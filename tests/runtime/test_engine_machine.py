"""Any order of adds, reservations, commits, releases, aborts, deadlines and steps: every token is the one that the
sequence alone would have got, every request ends once, every block comes home."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fuseline.runtime.engine import Engine
from fuseline.runtime.errors import ResourceExhaustedError
from fuseline.runtime.request import FinishReason, Phase, Request, SequenceOutput
from fuseline.runtime.sampling_params import SamplingParams
from fuseline.runtime.sequence import SequenceState
from fuseline.tests.runtime.oracle import OracleExecutor, engine_config, generate

MAX_MODEL_LEN = 28
# Few tokens, so that prompts share prefixes.
prompts = st.lists(st.sampled_from((1, 1, 1, 2)), min_size=1, max_size=18).map(tuple)
params = st.builds(
    lambda max_tokens, min_tokens, ignore_eos, stop_ids, logprobs, prompt_logprobs: SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min(min_tokens, max_tokens),
        ignore_eos=ignore_eos,
        stop_token_ids=stop_ids,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    ),
    st.integers(1, 14),
    st.sampled_from((0, 0, 0, 5)),
    st.booleans(),
    st.sampled_from(((), (), tuple(range(5, 15)))),
    st.sampled_from((None, None, 1)),
    st.sampled_from((None, None, None, 0)),
)
priorities = st.sampled_from((0, 0, 0, 1, -1))
timeouts = st.sampled_from((None, None, None, None, 0.5, 3.0))


@dataclass
class Expected:
    """What is known of a request: its one true continuation, and what came of it so far."""

    request: Request
    tokens: list[int]
    got: list[int] = field(default_factory=list)
    reason: FinishReason | None = None
    num_cached: int = 0


class EngineMachine(RuleBasedStateMachine):
    @initialize(
        depth=st.sampled_from((1, 1, 2, 4)),
        block_size=st.sampled_from((1, 4, 4)),
        num_tokens=st.integers(20, 64),
        max_num_seqs=st.integers(1, 5),
        spare_budget=st.integers(0, 12),
        prefix_caching=st.sampled_from((True, True, True, False)),
    )
    def start(
        self,
        depth: int,
        block_size: int,
        num_tokens: int,
        max_num_seqs: int,
        spare_budget: int,
        prefix_caching: bool,
    ) -> None:
        self.now = 0.0
        self.known: dict[str, Expected] = {}
        config = engine_config(
            depth=depth,
            block_size=block_size,
            num_blocks=num_tokens // block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + spare_budget,
            max_model_len=MAX_MODEL_LEN,
            prefix_caching=prefix_caching,
            handoff_timeout_s=8.0,
        )
        self.max_len = min(MAX_MODEL_LEN, config.cache.num_blocks * block_size)
        self.executor = OracleExecutor(config)
        self.engine = Engine(config, self.executor, lambda: self.now)

    # -- helpers

    def state(self, expected: Expected) -> SequenceState | None:
        seq = self.engine._store.sequences.get(expected.request.request_id)
        return None if seq is None else seq.state

    def pick(self, number: int, *states: SequenceState) -> Expected | None:
        found = [expected for expected in self.known.values() if self.state(expected) in states]
        return found[number % len(found)] if found else None

    def blocks(self, expected: Expected) -> list[int]:
        return self.engine._store.sequences[expected.request.request_id].block_ids

    def make(
        self, prompt: tuple[int, ...], params: SamplingParams, priority: int, timeout: float | None, phase: Phase
    ) -> Expected:
        request = Request(
            f"r{len(self.known)}",
            prompt,
            params,
            priority=priority,
            deadline=None if timeout is None else self.now + timeout,
            phase=phase,
        )
        return Expected(request, generate(prompt, params, self.max_len))

    def take(self, outputs: list[SequenceOutput]) -> None:
        for output in outputs:
            expected = self.known[output.request_id]
            params = expected.request.params
            assert expected.reason is None, "an output after the last one"
            expected.got += output.token_ids
            assert expected.got == expected.tokens[: len(expected.got)]
            assert len(output.logprobs) == (0 if params.logprobs is None else len(output.token_ids))
            asked = params.prompt_logprobs is not None and expected.request.phase is not Phase.DECODE
            is_first = bool(output.token_ids) and len(expected.got) == len(output.token_ids)
            assert (output.prompt_logprobs is not None) == (asked and is_first)
            if output.prompt_logprobs is not None:
                found = tuple(logprobs.token_id for logprobs in output.prompt_logprobs)
                assert found == expected.request.prompt_token_ids[1:]
                assert [logprobs.logprob for logprobs in output.prompt_logprobs] == [-i for i in range(len(found))]
            if output.finish_reason is not None:
                self.ends(expected, output.finish_reason)

    def ends(self, expected: Expected, reason: FinishReason) -> None:
        expected.reason = reason
        ended_by_itself = reason in (FinishReason.STOP, FinishReason.LENGTH)
        if ended_by_itself:
            assert expected.got == expected.tokens
            params = expected.request.params
            at_limit = len(expected.got) == min(
                params.max_tokens, self.max_len - len(expected.request.prompt_token_ids)
            )
            assert reason is FinishReason.STOP or at_limit
        elif reason is FinishReason.DEADLINE:
            assert expected.request.deadline is None or self.now >= min(expected.request.deadline, 8.0)

    # -- rules

    @rule(
        prompt=prompts,
        params=params,
        priority=priorities,
        timeout=timeouts,
        phase=st.sampled_from((Phase.FULL, Phase.FULL, Phase.PREFILL)),
    )
    def add(
        self, prompt: tuple[int, ...], params: SamplingParams, priority: int, timeout: float | None, phase: Phase
    ) -> None:
        expected = self.make(prompt, params, priority, timeout, phase)
        self.engine.add_request(expected.request)
        self.known[expected.request.request_id] = expected

    @rule(prompt=prompts, params=params, priority=priorities, timeout=timeouts)
    def reserve(self, prompt: tuple[int, ...], params: SamplingParams, priority: int, timeout: float | None) -> None:
        expected = self.make(prompt, params, priority, timeout, Phase.DECODE)
        try:
            reserved = self.engine.reserve(expected.request)
        except ResourceExhaustedError:
            return
        self.known[expected.request.request_id] = expected
        expected.num_cached = reserved.num_cached_tokens
        assert expected.num_cached < len(prompt)
        assert len(reserved.block_ids) == len(prompt) // self.executor.config.cache.block_size + 1

    @rule(number=st.integers(0, 9))
    def transfer(self, number: int) -> None:
        """A KV transfer writes whenever it likes, until it is stopped."""
        expected = self.pick(number, SequenceState.RESERVED, SequenceState.EXPIRED)
        if expected is not None and expected.request.phase is Phase.DECODE:
            self.executor.write(self.blocks(expected), expected.request.prompt_token_ids, expected.num_cached)

    @rule(number=st.integers(0, 9))
    def commit(self, number: int) -> None:
        expected = self.pick(number, SequenceState.RESERVED)
        if expected is None:
            return
        self.executor.write(self.blocks(expected), expected.request.prompt_token_ids, expected.num_cached)
        expected.got = expected.tokens[:1]
        output = self.engine.commit(expected.request.request_id, expected.tokens[0])
        if output is not None:
            assert output.token_ids == ()
            self.take([output])

    @rule(number=st.integers(0, 9))
    def release(self, number: int) -> None:
        expected = self.pick(number, SequenceState.HELD, SequenceState.EXPIRED)
        if expected is None:
            return
        if expected.request.phase is Phase.PREFILL:
            self.executor.check_holds(self.blocks(expected), expected.request.prompt_token_ids)
            assert len(expected.got) == 1
        if self.state(expected) is SequenceState.HELD:
            expected.reason = FinishReason.STOP  # the other engine's to give
        self.engine.release_handoff(expected.request.request_id)
        assert self.state(expected) is None

    @rule(number=st.integers(0, 9))
    def abort(self, number: int) -> None:
        expected = self.pick(number, *SequenceState)
        if expected is None:
            return
        was_expired = self.state(expected) is SequenceState.EXPIRED
        output = self.engine.abort(expected.request.request_id)
        assert (output is None) == was_expired
        if output is not None:
            assert output.finish_reason is FinishReason.ABORT
            self.take([output])
        assert self.engine.abort(expected.request.request_id) is None

    @rule(seconds=st.sampled_from((0.1, 1.0, 4.0)))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def step(self) -> None:
        self.take(self.engine.step())

    @precondition(lambda self: self.engine.has_unfinished)
    @rule(count=st.integers(2, 12))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    @invariant()
    def books_agree(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check_integrity()
            assert self.engine.stats().num_leaked_blocks == 0

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        num_steps = 0
        while any(expected.reason is None for expected in self.known.values()) or self.engine.has_unfinished:
            self.step()
            num_steps += 1
            assert num_steps < 3000, "somebody starves"
            if self.engine.is_idle:
                assert self.engine.step() == []
                pending = self.pick(0, SequenceState.HELD, SequenceState.EXPIRED)
                if pending is not None:
                    self.release(0)
                elif self.pick(0, SequenceState.RESERVED) is not None:
                    self.commit(0)
                else:
                    assert not self.engine.has_unfinished, "idle with nothing to wait for"
        while self.pick(0, SequenceState.EXPIRED) is not None:
            self.release(0)
        assert all(expected.reason is not None for expected in self.known.values())
        stats = self.engine.stats()
        assert stats.num_free_blocks == stats.num_total_blocks
        assert stats.num_running == stats.num_waiting == stats.num_held == stats.num_reserved == 0
        assert stats.num_finished == len(self.known)
        assert self.engine.next_deadline is None
        assert not self.engine.has_unfinished
        self.engine.check_integrity()


EngineMachine.TestCase.settings = settings(
    max_examples=120, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestEngineMachine = EngineMachine.TestCase
