"""An engine over the oracle, with a clock to turn and a record of what came out."""

from __future__ import annotations

from fuseline.runtime.engine import Engine
from fuseline.runtime.plan import StepPlan
from fuseline.runtime.request import FinishReason, Phase, Request, SequenceOutput
from fuseline.runtime.sampling_params import SamplingParams
from fuseline.runtime.sequence import Sequence
from fuseline.tests.runtime.oracle import OracleExecutor, engine_config


class Driver:
    """Everything is checked after every step. ``options`` are those of ``engine_config``."""

    def __init__(self, *, fails_at_step: int = -1, **options: int | float | bool) -> None:
        self.now = 0.0
        self.config = engine_config(**options)  # type: ignore[arg-type]
        self.executor = OracleExecutor(self.config, fails_at_step)
        self.engine = Engine(self.config, self.executor, lambda: self.now)
        self.outputs: dict[str, list[SequenceOutput]] = {}

    def request(
        self,
        name: str,
        prompt: int | tuple[int, ...] = 5,
        *,
        priority: int = 0,
        deadline: float | None = None,
        phase: Phase = Phase.FULL,
        cache_salt: str = "",
        **params: object,
    ) -> Request:
        """A prompt given as a number has that many tokens, unlike any other's. EOS is ignored unless asked for."""
        if isinstance(prompt, int):
            prompt = tuple(1 + (hash_of(name) + i * i) % 40 for i in range(prompt))
        options = {"max_tokens": 6, "ignore_eos": True} | params
        sampling = SamplingParams(**options)  # type: ignore[arg-type]
        return Request(
            name, prompt, sampling, priority=priority, deadline=deadline, phase=phase, cache_salt=cache_salt
        )

    def add(self, name: str, prompt: int | tuple[int, ...] = 5, **options: object) -> Request:
        request = self.request(name, prompt, **options)  # type: ignore[arg-type]
        self.engine.add_request(request)
        return request

    def step(self) -> list[SequenceOutput]:
        outputs = self.engine.step()
        for output in outputs:
            self.outputs.setdefault(output.request_id, []).append(output)
        self.engine.check_integrity()
        assert self.engine.stats().num_leaked_blocks == 0
        return outputs

    def run(self, max_steps: int = 500) -> None:
        """Until nothing can run any more."""
        while self.engine.has_unfinished and max_steps:
            self.step()
            max_steps -= 1
            if self.engine.is_idle:
                return
        assert max_steps, "it does not end"

    def tokens(self, name: str) -> list[int]:
        return [token for output in self.outputs.get(name, []) for token in output.token_ids]

    def reason(self, name: str) -> FinishReason | None:
        """The one finish reason; None while there is none."""
        reasons = [output.finish_reason for output in self.outputs.get(name, [])]
        assert not any(reasons[:-1]), "an output after the last one"
        return reasons[-1] if reasons else None

    def seq(self, name: str) -> Sequence:
        return self.engine._store.sequences[name]

    @property
    def plan(self) -> StepPlan:
        return self.executor.plans[-1]

    def scheduled(self, plan: StepPlan | None = None) -> dict[str, int]:
        """Tokens by request of a plan, the last one by default, as rows stand after it."""
        plan = plan or self.plan
        names = {number: row.admitted.request_id for number, row in self.executor.rows.items()}
        return {names[row]: count for row, count in zip(plan.rows.tolist(), plan.num_tokens.tolist(), strict=True)}


def hash_of(name: str) -> int:
    return sum(ord(letter) * 31**i for i, letter in enumerate(name))
