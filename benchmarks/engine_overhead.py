"""What the engine itself costs per decode step: scheduling, plan building, taking up results, making outputs.

    python -m benchmarks.engine_overhead [--json] [--steps N] [--profile]

The executor answers at once with tokens made beforehand, so everything measured is the engine's. All sequences
decode (no admissions, no ends), as in the steady state of a busy decode worker; every 16th token of a sequence needs
a new KV block and completes one for the prefix cache, spread evenly over the steps.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import json
import pstats
import time
from dataclasses import asdict, dataclass

import numpy as np

from fuseline.runtime.config import CacheConfig, EngineConfig, ModelInfo, SchedulerConfig
from fuseline.runtime.engine import Engine
from fuseline.runtime.plan import StepPlan, StepResult
from fuseline.runtime.request import Request
from fuseline.runtime.sampling_params import SamplingParams
from fuseline.runtime.sharding import ModelShape

VOCAB_SIZE = 128_256
PROMPT_TOKENS = 512
WARMUP_STEPS = 32
TARGETS_MS = {64: 0.3, 256: 1.0}


class InstantExecutor:
    """Answers every plan at once with the same tokens."""

    def __init__(self, max_num_seqs: int) -> None:
        self._tokens = np.arange(1000, 1000 + max_num_seqs, dtype=np.int32)
        self._result = StepResult(0, self._tokens)

    def submit(self, plan: StepPlan) -> None:
        num_samples = int(np.count_nonzero(plan.samples))
        self._result = StepResult(plan.step_id, self._tokens[:num_samples])

    def collect(self) -> StepResult:
        return self._result


@dataclass(frozen=True)
class Figure:
    """Milliseconds per step over ``num_steps`` decode steps of ``num_seqs`` running sequences."""

    num_seqs: int
    num_steps: int
    median_ms: float
    p99_ms: float
    min_ms: float
    us_per_seq: float
    target_ms: float
    meets_target: bool


def decoding_engine(num_seqs: int, num_steps: int) -> Engine:
    """An engine in which ``num_seqs`` sequences have just begun to decode, out of step with each other's blocks."""
    shape = ModelShape(
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        hidden_size=4096,
        intermediate_size=14336,
        vocab_size=VOCAB_SIZE,
    )
    max_tokens = num_steps + WARMUP_STEPS + num_seqs + 10
    max_len = PROMPT_TOKENS + 16 + max_tokens
    config = EngineConfig(
        model=ModelInfo("overhead", "f00d", shape, "bfloat16", max_len, (VOCAB_SIZE - 1,)),
        cache=CacheConfig(num_blocks=num_seqs * (max_len // 16 + 2)),
        scheduler=SchedulerConfig(max_num_seqs=num_seqs, max_num_batched_tokens=8192),
    )
    engine = Engine(config, InstantExecutor(num_seqs), time.monotonic)
    params = SamplingParams(max_tokens=max_tokens)
    deadline = time.monotonic() + 3600
    for i in range(num_seqs):
        prompt = tuple(range(i, i + PROMPT_TOKENS + i % 16))
        engine.add_request(Request(f"request-{i}", prompt, params, deadline=deadline))
    while engine.stats().num_queued_tokens:
        engine.step()
    return engine


def measure(num_seqs: int, num_steps: int) -> Figure:
    """Time single steps, garbage collection included, as it is in production."""
    engine = decoding_engine(num_seqs, num_steps)
    for _ in range(WARMUP_STEPS):
        engine.step()
    gc.collect()
    samples = np.empty(num_steps)
    for i in range(num_steps):
        start = time.perf_counter()
        outputs = engine.step()
        samples[i] = time.perf_counter() - start
        if len(outputs) != num_seqs:
            raise RuntimeError(f"step {i} served {len(outputs)} of {num_seqs} sequences")
    engine.check_integrity()
    median_ms = float(np.median(samples)) * 1e3
    target_ms = TARGETS_MS[num_seqs]
    return Figure(
        num_seqs=num_seqs,
        num_steps=num_steps,
        median_ms=median_ms,
        p99_ms=float(np.percentile(samples, 99)) * 1e3,
        min_ms=float(samples.min()) * 1e3,
        us_per_seq=median_ms * 1e3 / num_seqs,
        target_ms=target_ms,
        meets_target=median_ms <= target_ms,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Engine overhead per decode step, without a model.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--steps", type=int, default=1000, help="decode steps to time for each size")
    parser.add_argument("--profile", action="store_true", help="print where the time goes at the largest size")
    options = parser.parse_args()
    if options.profile:
        engine = decoding_engine(max(TARGETS_MS), options.steps)
        profile = cProfile.Profile()
        profile.enable()
        for _ in range(options.steps):
            engine.step()
        profile.disable()
        pstats.Stats(profile).sort_stats("tottime").print_stats(20)
        return
    figures = [measure(num_seqs, options.steps) for num_seqs in TARGETS_MS]
    if options.json:
        print(json.dumps({"benchmark": "engine_overhead", "figures": [asdict(figure) for figure in figures]}))
        return
    print(f"{'running':>8} {'median ms':>10} {'p99 ms':>8} {'min ms':>8} {'us/seq':>8} {'target ms':>10}")
    for f in figures:
        verdict = "met" if f.meets_target else "MISSED"
        print(
            f"{f.num_seqs:>8} {f.median_ms:>10.3f} {f.p99_ms:>8.3f} {f.min_ms:>8.3f} {f.us_per_seq:>8.2f}"
            f" {f.target_ms:>10.1f}  {verdict}"
        )


if __name__ == "__main__":
    main()
