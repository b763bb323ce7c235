"""What it costs that a row's result never depends on the batch around it: our linear layers beside torch's.

    python -m benchmarks.batch_invariance [--models a110m b05b] [--rounds 7] [--json PATH]

The linear layers of a model, a few of its layers and the head, one after the other with random float32 weights that
no cache holds, for 1 to 512 rows of input on one thread: by the native kernels, whose bits are the same for every
number of rows, and by torch (MKL or oneDNN), which is free to choose another algorithm for each. The two take turns;
a figure is the median of the rounds. ``cost`` is how much longer a pass takes than the faster of the two, which is
the best that one could do who gave up invariance. ``differ`` is the share of the first row's results whose bits
change when it is computed alone: it has to be none of ours.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn import functional

from fuseline.kernels.cpu.library import native_library
from fuseline.kernels.cpu.linear import linear
from fuseline.kernels.cpu.threads import set_num_threads

from .peers.checkpoints import SHAPES
from .peers.engines.base import Shape

INPUT_ROWS = (1, 4, 16, 64, 512)
LAYERS = 4
# Prefill needs the logits of its last row only.
HEAD_ROWS = 64

Linear = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Figure:
    """One pass over a model's linear layers; times in milliseconds, shares of one."""

    model: str
    rows: int
    ours_ms: float
    torch_ms: float
    cost: float
    ours_differ: float
    torch_differ: float


def weights_of(shape: Shape) -> list[torch.Tensor]:
    """The matrices [out, in] of some layers, those that share an input as one, and the head as the last."""
    queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    sizes = [
        (queries + 2 * keys, shape.hidden_size),
        (shape.hidden_size, queries),
        (2 * shape.intermediate_size, shape.hidden_size),
        (shape.hidden_size, shape.intermediate_size),
    ]
    return [torch.randn(size) / size[1] ** 0.5 for size in [*sizes * LAYERS, (shape.vocab_size, shape.hidden_size)]]


def seconds(multiply: Linear, weights: Sequence[torch.Tensor], inputs: dict[int, torch.Tensor]) -> float:
    started = time.perf_counter()
    for weight in weights:
        multiply(inputs[weight.shape[1]], weight)
    return time.perf_counter() - started


def share_that_differs(multiply: Linear, weights: Sequence[torch.Tensor], inputs: dict[int, torch.Tensor]) -> float:
    """Of the first row's results, in the batch and alone."""
    differing = total = 0
    for weight in weights:
        x = inputs[weight.shape[1]]
        changed = multiply(x, weight)[0] != multiply(x[:1], weight)[0]
        differing += int(changed.sum())
        total += changed.numel()
    return differing / total


def measure(model: str, rounds: int, ours: Linear) -> list[Figure]:
    weights = weights_of(SHAPES[model])
    figures = []
    for rows in INPUT_ROWS:
        used = weights if rows <= HEAD_ROWS else weights[:-1]
        inputs = {cols: torch.randn(rows, cols) for cols in {weight.shape[1] for weight in used}}
        times: dict[Linear, list[float]] = {ours: [], functional.linear: []}
        for _ in range(rounds + 1):
            for multiply, taken in times.items():
                taken.append(seconds(multiply, used, inputs))
        ours_ms, torch_ms = (1e3 * statistics.median(taken[1:]) for taken in times.values())
        one_layer = used[:4]
        figures.append(
            Figure(
                model=model,
                rows=rows,
                ours_ms=ours_ms,
                torch_ms=torch_ms,
                cost=ours_ms / min(ours_ms, torch_ms) - 1,
                ours_differ=share_that_differs(ours, one_layer, inputs),
                torch_differ=share_that_differs(functional.linear, one_layer, inputs),
            )
        )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["a110m", "b05b"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    arguments = parser.parse_args()
    library = native_library()
    if library is None:
        sys.exit("there are no native kernels here")
    # Of more threads, those of the one would spin on the other's cores.
    set_num_threads(1)
    torch.set_num_threads(1)
    torch.manual_seed(0)

    def ours(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return linear(library, x, [weight])

    print(f"{'model':8}{'rows':>6}{'ours ms':>10}{'torch ms':>10}{'cost':>8}{'ours differ':>13}{'torch differ':>14}")
    figures = []
    for model in arguments.models:
        for figure in measure(model, arguments.rounds, ours):
            figures.append(figure)
            print(
                f"{figure.model:8}{figure.rows:6}{figure.ours_ms:10.1f}{figure.torch_ms:10.1f}{figure.cost:8.1%}"
                f"{figure.ours_differ:13.1%}{figure.torch_differ:14.1%}",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(figure) for figure in figures], indent=1) + "\n")


if __name__ == "__main__":
    main()
