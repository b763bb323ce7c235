"""What quantisation costs in quality and gains in speed: perplexity of a model, and time of a linear layer.

    python -m benchmarks.quantization [--model demo] [--windows N] [--rows 4096] [--cols 2048] [--json PATH]

Perplexity is over held-out text of the bundled model: those modules of Python's standard library that it was not
trained on (workers/models/demo/training.json), in windows of 512 tokens, each predicted by what is before it in its
window. Every --quantization and --kv-cache-dtype runs through the engine as a user's prompt would. ``error`` is what
rounding adds to the loss of bfloat16, with its standard error over windows.

The linear layer is one matrix in memory that no cache holds, repeated as often as it takes to fill 512 MiB, by 1, 4,
16 and 256 rows of input, on as many threads as there are cores: the bytes of weights read per second, and products.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import statistics
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from fuseline import SamplingParams
from fuseline.kernels.cpu.library import native_library
from fuseline.kernels.cpu.linear import linear
from fuseline.kernels.cpu.threads import set_num_threads, usable_cores
from fuseline.kernels.quantized import QuantizedWeight, tensor_layout
from fuseline.runtime.sharding import ParallelConfig
from fuseline.workers.llm import LLM
from fuseline.workers.loader import DEMO_PATH, parse_dtype, resolve_model
from fuseline.workers.models.registry import load_model_config
from fuseline.workers.quantization.config import ROUNDINGS, resolve_quantization
from fuseline.workers.tokenizer import Tokenizer
from fuseline.workers.weights import WeightLayout

WINDOW = 512
RUNS = (
    ("bfloat16", "none", "auto"),  # what the others are compared with
    ("float32", "none", "auto"),
    ("bfloat16", "none", "int8"),
    ("bfloat16", "int8", "auto"),
    ("bfloat16", "int8", "int8"),
    ("bfloat16", "int4", "auto"),
    ("bfloat16", "int4_g64", "auto"),
    ("bfloat16", "int4_g128", "auto"),
)
INPUT_ROWS = (1, 4, 16, 256)
Matrix = torch.Tensor | QuantizedWeight
STREAM_BYTES = 512 * 2**20


@dataclass(frozen=True, slots=True)
class Quality:
    """Perplexity of one way to run a model; ``error`` and its standard error in nats per token."""

    dtype: str
    quantization: str
    kv_cache_dtype: str
    perplexity: float
    error: float
    standard_error: float
    weight_mib: float


@dataclass(frozen=True, slots=True)
class Speed:
    """One linear layer, by rows of input."""

    weight: str
    rows: int
    microseconds: float
    weight_gb_per_s: float
    gmac_per_s: float


def held_out_windows(model: Path, limit: int | None = None) -> list[list[int]]:
    """Windows of token ids, from the start of the held-out text on; files that this Python lacks are left out."""
    tokenizer = Tokenizer.load(model)
    record = json.loads((DEMO_PATH / "training.json").read_text())
    library = Path(sysconfig.get_paths()["stdlib"])
    end = json.loads((model / "config.json").read_text())["eos_token_id"]
    stream = [end]
    for name in record["held_out_files"]:
        if (library / name).exists():
            stream += [*tokenizer.encode((library / name).read_text(encoding="utf-8")), end]
    starts = range(0, len(stream) - WINDOW, WINDOW)
    return [stream[start : start + WINDOW + 1] for start in starts][:limit]


def window_losses(
    model: str, dtype: str, quantization: str, windows: list[list[int]], kv_cache_dtype: str = "auto"
) -> list[float]:
    """Mean loss of each window, in nats per token."""
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    with LLM(
        model,
        device="cpu",
        dtype=dtype,
        quantization=quantization,
        kv_cache_dtype=kv_cache_dtype,
        max_model_len=WINDOW + 2,
        max_num_seqs=4,
        enable_prefix_caching=False,
    ) as llm:
        outputs = llm.generate(windows, params)
    losses = []
    for output in outputs:
        if output.prompt_logprobs is None:
            raise RuntimeError("no prompt logprobs came back")
        losses.append(-statistics.fmean(entry.logprob for entry in output.prompt_logprobs))
    return losses


def weight_mib(path: Path, dtype: str, quantization: str) -> float:
    """Embedding, linear layers, norms and head, as they are held."""
    config = load_model_config(path)
    held = resolve_quantization(quantization, config.quantization)
    layout = WeightLayout(config, ParallelConfig(), 0, parse_dtype(dtype), torch.device("meta"), held)
    floats = sum(piece.out.nbytes for piece in layout.pieces)
    return (floats + sum(piece.out.num_bytes for piece in layout.quantized)) / 2**20


def measure_quality(model: str, limit: int | None) -> Iterator[Quality]:
    """Every run over the same windows."""
    path = resolve_model(model)
    windows = held_out_windows(path, limit)
    baseline: list[float] = []
    for dtype, quantization, kv_cache_dtype in RUNS:
        losses = window_losses(model, dtype, quantization, windows, kv_cache_dtype)
        baseline = baseline or losses
        errors = [loss - exact for loss, exact in zip(losses, baseline, strict=True)]
        spread = statistics.stdev(errors) / math.sqrt(len(errors)) if len(errors) > 1 else 0.0
        yield Quality(
            dtype,
            quantization,
            kv_cache_dtype,
            math.exp(statistics.fmean(losses)),
            statistics.fmean(errors),
            spread,
            weight_mib(path, dtype, quantization),
        )


def random_weights(rows: int, cols: int) -> Iterator[tuple[str, Matrix]]:
    """A matrix of each kind that a model may hold."""
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        yield name, (torch.randn(rows, cols) / cols**0.5).to(dtype)
    for name, form in ROUNDINGS.items():
        group = max(form.group, 0)
        layout = tensor_layout(form.bits, rows, cols, group, zeros=form.zeros)
        tensors = {field: torch.ones(shape, dtype=dtype) for field, (shape, dtype) in layout.items()}
        tensors["data"].random_(-127 if form.bits == 8 else 0, 128 if form.bits == 8 else 256)
        yield name, QuantizedWeight(form.bits, rows, cols, group, **tensors)


def measure_speed(rows: int, cols: int) -> Iterator[Speed]:
    """Each kind of weight by each number of rows of input."""
    library = native_library()
    if library is None:
        raise RuntimeError("there is no compiler to build the kernels with")
    set_num_threads(usable_cores())
    for name, weight in random_weights(rows, cols):
        size = weight.num_bytes if isinstance(weight, QuantizedWeight) else weight.nbytes
        copies = [_copy(weight) for _ in range(max(1, STREAM_BYTES // size))]
        for count in INPUT_ROWS:
            x = torch.randn(count, cols)
            best = min(_time_per_copy(library, x, copies if count <= 16 else copies[:8]) for _ in range(3))
            yield Speed(name, count, best * 1e6, size / best / 1e9, count * rows * cols / best / 1e9)


def _copy(weight: Matrix) -> Matrix:
    if isinstance(weight, QuantizedWeight):
        zeros = None if weight.zeros is None else weight.zeros.clone()
        return replace(weight, data=weight.data.clone(), scales=weight.scales.clone(), zeros=zeros)
    return weight.clone()


def _time_per_copy(library: ctypes.CDLL, x: torch.Tensor, copies: list[Matrix]) -> float:
    started = time.perf_counter()
    for weight in copies:
        linear(library, x, [weight])
    return (time.perf_counter() - started) / len(copies)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="with the bundled model's tokenizer or another")
    parser.add_argument("--windows", type=int, default=None, help="how many windows of text; all by default")
    parser.add_argument("--rows", type=int, default=4096, help="of the linear layer's matrix")
    parser.add_argument("--cols", type=int, default=2048, help="of the linear layer's matrix")
    parser.add_argument("--json", type=Path, default=None, help="file to write the figures to")
    arguments = parser.parse_args()

    print("dtype     quantization  KV    perplexity   error (nats/token)   weights")
    qualities = []
    for quality in measure_quality(arguments.model, arguments.windows):
        qualities.append(quality)
        error = f"{quality.error:+.5f} +- {quality.standard_error:.5f}"
        formats = f"{quality.dtype:9} {quality.quantization:12}  {quality.kv_cache_dtype:4}"
        line = f"{formats} {quality.perplexity:11.4f}   {error}"
        print(f"{line}   {quality.weight_mib:.1f} MiB", flush=True)
    print(f"\nlinear {arguments.rows} x {arguments.cols}   rows of input: us, GB/s of weights, GMAC/s")
    speeds = []
    for speed in measure_speed(arguments.rows, arguments.cols):
        speeds.append(speed)
        figures = f"{speed.microseconds:9.0f} us {speed.weight_gb_per_s:7.1f} GB/s {speed.gmac_per_s:7.1f} GMAC/s"
        print(f"{speed.weight:10} {speed.rows:4} {figures}", flush=True)
    if arguments.json is not None:
        figures_by_name = {"quality": list(map(asdict, qualities)), "linear": list(map(asdict, speeds))}
        arguments.json.write_text(json.dumps(figures_by_name, indent=2) + "\n")


if __name__ == "__main__":
    main()
