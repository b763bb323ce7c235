"""What rounding may cost the demo model, on part of the text that its perplexity is measured on."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

from fuseline.benchmarks.quantization import held_out_windows, weight_mib, window_losses

# Nats per token above the floats' loss; measured over all the text: 0.0007, 0.0087 and 0.0108.
BOUNDS = {"int8": 0.003, "int4": 0.018, "int4_g128": 0.025}
KV_BOUND = 0.0015  # of int8 KV, either way; over all the text 0.0000 +- 0.0001
NUM_WINDOWS = 6


def test_perplexity_stays_within_bounds(demo_path: Path) -> None:
    windows = held_out_windows(demo_path)
    windows = windows[:: len(windows) // NUM_WINDOWS]

    def loss(quantization: str, kv_cache_dtype: str = "auto") -> float:
        return statistics.fmean(window_losses("demo", "bfloat16", quantization, windows, kv_cache_dtype))

    exact = loss("none")
    assert 0 < abs(loss("none", "int8") - exact) < KV_BOUND
    assert 20 < math.exp(exact) < 40
    errors = {quantization: loss(quantization) - exact for quantization in BOUNDS}
    for quantization, error in errors.items():
        assert -0.005 < error < BOUNDS[quantization]
    assert errors["int8"] < errors["int4"]


def test_weights_take_the_memory_that_their_bits_do(demo_path: Path) -> None:
    sizes = {name: weight_mib(demo_path, "bfloat16", name) for name in ("none", *BOUNDS)}
    embedding = 4096 * 256 * 2 / 2**20  # stays as it is; the head, tied to it in floats, is then held beside it
    linear = sizes["none"] - embedding
    assert sizes["int8"] - 1.5 * embedding < linear * 0.51
    assert sizes["int4"] - 1.5 * embedding < linear * 0.31
    assert sizes["int4_g128"] - 1.5 * embedding < linear * 0.27
