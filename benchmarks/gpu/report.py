"""The suite's results: a JSON file, a plot, and the short table that is printed last."""

from __future__ import annotations

import datetime
import json
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent

# What the blocks are to reach: times the floor, for these shapes, batches, and context where there is one.
TARGET_OVER_FLOOR = 1.15
TARGET_SHAPES = ("Llama-3-8B", "Qwen3-8B")
TARGET_BATCHES = (1, 4, 16)
TARGET_CONTEXT = 4096
# Over the versions through global memory, at 256 KB in all.
TARGET_COLLECTIVES = {"reduce": 2.44, "gather": 1.59}
TARGET_OVER_PUBLIC = 1.3


def commit() -> str:
    """The checkout's commit, with a plus when files differ from it; "unknown" outside of one."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns as wide as they need, numbers to the right."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(line[i]) for line in (header, *cells)) for i in range(len(header))]
    lines = [
        " ".join(word.rjust(width) for word, width in zip(line, widths, strict=True)) for line in (header, *cells)
    ]
    return "\n".join(lines)


def block_rows(figures: Iterable[dict[str, Any]]) -> list[list[object]]:
    """For ``table``: shape, block, batch, context, microseconds, times the floor, the fastest other and its ratio."""
    rows: list[list[object]] = []
    for figure in figures:
        others = figure["others_us"]
        fastest = min(others, key=others.__getitem__) if others else "-"
        rows.append(
            [
                figure["shape"],
                figure["block"],
                figure["batch"],
                figure["context"] or "-",
                figure["us"],
                figure["over_floor"],
                fastest,
                figure["speedup"] if others else "-",
            ]
        )
    return rows


BLOCK_HEADER = ("shape", "block", "batch", "context", "us", "x floor", "fastest other", "x faster")


def targets(results: dict[str, Any]) -> list[tuple[str, float, float, bool]]:
    """Name, measured, wanted, and whether it was met, of each target that the results say something about."""
    judged: list[tuple[str, float, float, bool]] = []
    for figure in results.get("blocks", ()):
        where = f"{figure['shape']} {figure['block']} B={figure['batch']}"
        at_target = figure["shape"] in TARGET_SHAPES and figure["batch"] in TARGET_BATCHES
        if at_target and figure["context"] in (None, TARGET_CONTEXT):
            ratio = figure["over_floor"]
            judged.append((f"{where}: times the floor", ratio, TARGET_OVER_FLOOR, ratio <= TARGET_OVER_FLOOR))
        if (figure["batch"], figure["context"]) == (64, 16384) and figure["speedup"] is not None:
            judged.append((f"{where} 16K: over the others", figure["speedup"], 1.0, figure["speedup"] >= 1.0))
        public = figure["others_us"].get("public clusterfusion")
        if public is not None and figure["context"] == TARGET_CONTEXT:
            ratio = public / figure["us"]
            judged.append(
                (f"{where}: over public ClusterFusion", ratio, TARGET_OVER_PUBLIC, ratio >= TARGET_OVER_PUBLIC)
            )
    for kind, wanted in TARGET_COLLECTIVES.items():
        ratios = [
            row["speedup"]
            for row in results.get("collectives") or ()  # None if the part found nothing
            if row["kind"] == kind and row["of_target"]
        ]
        if ratios:
            judged.append((f"{kind} of 256 KB: over off-chip", max(ratios), wanted, max(ratios) >= wanted))
    return judged


def write_json(path: Path, results: Any) -> None:
    """Whole or not at all: the writer may be killed at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    beside.replace(path)


def draw(path: Path, results: dict[str, Any]) -> bool:
    """Times the floor of each block over the batch, a panel a shape; False where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "fuseline"  # the same figures give the same file
    from matplotlib import pyplot

    shapes = list(dict.fromkeys(figure["shape"] for figure in results["blocks"]))
    chart, panels = pyplot.subplots(
        1, len(shapes), figsize=(3.2 * len(shapes), 3.2), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, shape in zip(panels[0], shapes, strict=True):
        _draw_shape(axes, [figure for figure in results["blocks"] if figure["shape"] == shape])
        axes.set_title(shape)
    panels[0][0].set_ylabel("time over memory floor")
    panels[0][-1].legend(fontsize=7)
    device = results["environment"]["device"]["name"]
    chart.suptitle(f"{device}, {results['date']}, commit {results['commit']}", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    chart.savefig(path, metadata={"Date": None})
    pyplot.close(chart)
    return True


def _draw_shape(axes: Any, figures: list[dict[str, Any]]) -> None:
    lines = sorted({(figure["block"], figure["context"] or 0) for figure in figures})
    for block, context in lines:
        points = [figure for figure in figures if (figure["block"], figure["context"] or 0) == (block, context)]
        label = f"{block} {context // 1024}K" if context else block
        x = [figure["batch"] for figure in points]
        (line,) = axes.plot(x, [figure["over_floor"] for figure in points], "o-", label=label, markersize=3)
        fastest = [min(figure["others_us"].values(), default=float("nan")) / figure["floor_us"] for figure in points]
        axes.plot(x, fastest, "--", color=line.get_color(), linewidth=0.8)
    axes.axhline(1.0, color="#7f8c8d", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0, top=4)
    axes.set_xlabel("batch")


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.2f}" if value < 100 else f"{value:.0f}"
    return str(value)
