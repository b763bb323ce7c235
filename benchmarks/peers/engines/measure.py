"""The measurements, the same for every peer; ``python -c LAUNCH FOLDER JOB`` in the peer's environment.

Each figure is printed as soon as it is there, a JSON object on a line that begins with ``MARK``, so that a peer that
is stopped for taking too long leaves what it had got to.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .base import Engine, Generation

MARK = "@figure "
PREFILL_TOKENS, PREFILL_REPEATS = 512, 3
DECODE_PROMPT_TOKENS, DECODE_REPEATS = 32, 2
DECODE_STEPS = {1: 48, 4: 32, 16: 16}
# A repeat more is not started once a measurement has taken so long, and a slow peer decodes fewer steps.
ENOUGH_S = 8.0
LEAST_STEPS = 4
CHECK_PROMPTS, CHECK_PROMPT_TOKENS, CHECK_NEW_TOKENS = 8, 32, 8
CHECK_SEED = 1
FIRST_ID = 8  # below are special tokens


class Prompts:
    """Random prompts, never the same twice, so that no cache of prefixes helps."""

    def __init__(self, vocab_size: int, seed: int) -> None:
        self._draw = np.random.default_rng(seed)
        self._vocab_size = vocab_size

    def __call__(self, number: int, length: int) -> list[list[int]]:
        return [[int(t) for t in self._draw.integers(FIRST_ID, self._vocab_size, length)] for _ in range(number)]


def tell(**figures: object) -> None:
    print(MARK + json.dumps(figures), flush=True)


def measure(engine: Engine, vocab_size: int, seed: int, launched_at: float) -> None:
    """Tell all figures of an engine that has just been loaded."""
    prompts = Prompts(vocab_size, 1000 + seed)
    first = generate(engine, prompts(1, DECODE_PROMPT_TOKENS), 1)
    tell(start_s=first.times[0][0] - launched_at, version=engine.version)
    checked = Prompts(vocab_size, CHECK_SEED)(CHECK_PROMPTS, CHECK_PROMPT_TOKENS)
    done = generate(engine, checked, CHECK_NEW_TOKENS)
    tell(check_prompts=checked, check_token_ids=done.token_ids)
    step_s = CHECK_PROMPTS / decode_rate(done)
    begun = time.monotonic()
    for _ in range(PREFILL_REPEATS):
        started = time.monotonic()
        done = generate(engine, prompts(1, PREFILL_TOKENS), 1)
        tell(prefill=PREFILL_TOKENS / (done.times[0][0] - started))
        if time.monotonic() - begun > ENOUGH_S:
            break
    for batch, most_steps in DECODE_STEPS.items():
        steps = min(most_steps, max(LEAST_STEPS, int(ENOUGH_S / step_s)))
        begun = time.monotonic()
        for _ in range(DECODE_REPEATS):
            rate = decode_rate(generate(engine, prompts(batch, DECODE_PROMPT_TOKENS), 1 + steps))
            tell(batch=batch, decode=rate)
            if time.monotonic() - begun > ENOUGH_S:
                break
        step_s = batch / rate
    tell(peak_rss_mib=peak_rss_mib())


def generate(engine: Engine, prompts: Sequence[Sequence[int]], num_tokens: int) -> Generation:
    done = engine.generate(prompts, num_tokens)
    lengths = {len(tokens) for tokens in done.token_ids} | {len(times) for times in done.times}
    if len(done.token_ids) != len(prompts) or lengths != {num_tokens}:
        raise ValueError(f"{len(prompts)} prompts, {num_tokens} tokens each, became {sorted(lengths)}")
    return done


def decode_rate(done: Generation) -> float:
    """Tokens per second of all sequences together, from when every one had its first token."""
    begin = max(times[0] for times in done.times)
    end = max(times[-1] for times in done.times)
    return sum(time > begin for times in done.times for time in times) / (end - begin)


def peak_rss_mib() -> float:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))


def main() -> None:
    job = json.loads(sys.argv[1])
    adapter = importlib.import_module(f".{job['engine']}", __package__)
    checkpoint, converted = Path(job["checkpoint"]), Path(job["converted"])
    if job["action"] == "prepare":
        adapter.prepare(checkpoint, converted, job["mode"])
        return
    engine = adapter.load(checkpoint, converted, job["mode"], job["num_threads"])
    measure(engine, job["vocab_size"], job["seed"], job["launched_at"])


if __name__ == "__main__":
    main()
