"""What the engine itself costs per decode step: scheduling, plan building, taking up results, making outputs.

    python -m benchmarks.engine_overhead [--json] [--steps N] [--profile]

The executor answers at once with tokens made beforehand, so everything measured is the engine's.

steady:   all sequences decode, none comes or goes, as between two changes on a decode worker. Every 16th token of a
          sequence needs a new KV block and completes one for the prefix cache, spread evenly over the steps. This is
          what the targets are for.
turnover: sequences end after 64 to 192 tokens and others of 512 prompt tokens take their places, prefilled here; the
          price of admissions, hashing, evictions and ends.
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
from numpy.typing import NDArray

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
FloatArray = NDArray[np.float64]


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
    """Milliseconds per step over ``num_steps`` steps of ``num_seqs`` running sequences; no target with turnover."""

    load: str
    num_seqs: int
    num_steps: int
    median_ms: float
    p99_ms: float
    min_ms: float
    us_per_seq: float
    target_ms: float | None


def make_engine(num_seqs: int, max_len: int) -> Engine:
    """An engine with room for ``num_seqs`` sequences of ``max_len`` tokens."""
    shape = ModelShape(
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        hidden_size=4096,
        intermediate_size=14336,
        vocab_size=VOCAB_SIZE,
    )
    config = EngineConfig(
        model=ModelInfo("overhead", "f00d", shape, "bfloat16", max_len, (VOCAB_SIZE - 1,)),
        cache=CacheConfig(num_blocks=num_seqs * (max_len // 16 + 2)),
        scheduler=SchedulerConfig(max_num_seqs=num_seqs, max_num_batched_tokens=8192),
    )
    return Engine(config, InstantExecutor(num_seqs), time.monotonic)


def decoding_engine(num_seqs: int, num_steps: int) -> Engine:
    """An engine in which ``num_seqs`` sequences have just begun to decode, out of step with each other's blocks."""
    max_tokens = num_steps + WARMUP_STEPS + num_seqs + 10
    engine = make_engine(num_seqs, PROMPT_TOKENS + 16 + max_tokens)
    params = SamplingParams(max_tokens=max_tokens)
    deadline = time.monotonic() + 3600
    for i in range(num_seqs):
        prompt = tuple(range(i, i + PROMPT_TOKENS + i % 16))
        engine.add_request(Request(f"request-{i}", prompt, params, deadline=deadline))
    while engine.stats().num_queued_tokens:
        engine.step()
    return engine


def steady_samples(num_seqs: int, num_steps: int) -> FloatArray:
    """Seconds of single steps, garbage collection included, as it is in production."""
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
    return samples


def turnover_samples(num_seqs: int, num_steps: int) -> FloatArray:
    """Seconds of single steps while sequences come and go; adding a request is not part of the step."""
    engine = make_engine(num_seqs, PROMPT_TOKENS + 192)
    rng = np.random.default_rng(0)
    num_added = num_ended = 0
    samples = np.empty(num_steps)
    warmup = 200  # until the first have ended at different times
    for i in range(-warmup, num_steps):
        while num_added < num_ended + num_seqs + 16:
            prompt = tuple(rng.integers(0, VOCAB_SIZE - 1, PROMPT_TOKENS).tolist())
            params = SamplingParams(max_tokens=int(rng.integers(64, 193)))
            engine.add_request(Request(f"request-{num_added}", prompt, params, deadline=time.monotonic() + 3600))
            num_added += 1
        start = time.perf_counter()
        outputs = engine.step()
        elapsed = time.perf_counter() - start
        num_ended += sum(output.finish_reason is not None for output in outputs)
        if i >= 0:
            samples[i] = elapsed
    engine.check_integrity()
    return samples


def figure(load: str, num_seqs: int, samples: FloatArray, target_ms: float | None) -> Figure:
    median_ms = float(np.median(samples)) * 1e3
    return Figure(
        load=load,
        num_seqs=num_seqs,
        num_steps=len(samples),
        median_ms=median_ms,
        p99_ms=float(np.percentile(samples, 99)) * 1e3,
        min_ms=float(samples.min()) * 1e3,
        us_per_seq=median_ms * 1e3 / num_seqs,
        target_ms=target_ms,
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
    figures = [
        figure("steady", num_seqs, steady_samples(num_seqs, options.steps), target_ms)
        for num_seqs, target_ms in TARGETS_MS.items()
    ]
    figures += [
        figure("turnover", num_seqs, turnover_samples(num_seqs, options.steps), None) for num_seqs in TARGETS_MS
    ]
    if options.json:
        print(json.dumps({"benchmark": "engine_overhead", "figures": [asdict(figure) for figure in figures]}))
        return
    print(f"{'load':<9}{'running':>8}{'median ms':>11}{'p99 ms':>9}{'min ms':>9}{'us/seq':>9}  target ms")
    for f in figures:
        verdict = ""
        if f.target_ms is not None:
            verdict = f"{f.target_ms:>9.1f} {'met' if f.median_ms <= f.target_ms else 'MISSED'}"
        print(
            f"{f.load:<9}{f.num_seqs:>8}{f.median_ms:>11.3f}{f.p99_ms:>9.3f}{f.min_ms:>9.3f}{f.us_per_seq:>9.2f}"
            f"  {verdict}"
        )


if __name__ == "__main__":
    main()
