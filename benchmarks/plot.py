"""Draws the pictures of docs/benchmarks.md from the figures in ``benchmarks/results``.

    python -m benchmarks.plot

Needs matplotlib (``pip install -e ".[plots]"``); writes ``docs/images/*.svg``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"

HOPS = {
    "reserve_ms": ("reserve KV blocks on decode", "#7f8c8d"),
    "prefill_ms": ("compute the prompt, pushing KV", "#2c7fb8"),
    "transfer_ms": ("rest of the transfer, verify, commit", "#d95f0e"),
    "resume_ms": ("first decode step", "#31a354"),
}
ARRANGEMENTS = {"apart": "#2c7fb8", "together": "#d95f0e"}


def load(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return result


def draw_timeline(axes: Any, hops: list[dict[str, Any]]) -> None:
    """One bar a prompt length, from arrival to the second token; the first token leaves where orange begins."""
    for row, hop in enumerate(hops):
        start = 0.0
        for key, (label, color) in HOPS.items():
            axes.barh(row, hop[key], left=start, color=color, label=label if row == 0 else None)
            start += hop[key]
        axes.text(start, row, f"  {hop['overlap']:.0%} of the transfer hidden", va="center", fontsize=8)
    axes.set_yticks(range(len(hops)), [f"{hop['num_prompt_tokens']} tokens" for hop in hops])
    axes.set_xlabel("ms since arrival")
    axes.set_xlim(right=1.35 * max(sum(hop[key] for key in HOPS) for hop in hops))
    axes.invert_yaxis()
    axes.legend(fontsize=8, loc="upper right")
    axes.set_title("A request's way over a prefill and a decode worker")


def draw_rates(axes: Any, rates: list[dict[str, Any]], metric: str, title: str) -> None:
    """Median as a full line and p99 as a broken one, over the request rate."""
    for arrangement, color in ARRANGEMENTS.items():
        figures = [figure for figure in rates if figure["arrangement"] == arrangement]
        x = [figure["requests_per_s"] for figure in figures]
        for quantile, style in (("p50", "o-"), ("p99", "o--")):
            y = [figure[f"{metric}_{quantile}_ms"] for figure in figures]
            axes.plot(x, y, style, color=color, label=f"{arrangement}, {quantile}")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("requests/s")
    axes.set_ylabel("ms")
    axes.set_title(title)
    axes.legend(fontsize=8)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "fuseline"  # the same figures give the same file
    from matplotlib import pyplot

    result = load("disaggregation")
    IMAGES.mkdir(parents=True, exist_ok=True)
    figure, axes = pyplot.subplots(figsize=(9, 2.8), layout="constrained")
    draw_timeline(axes, result["hops"])
    figure.savefig(IMAGES / "timeline.svg", metadata={"Date": None})
    figure, both = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    draw_rates(both[0], result["rates"], "ttft", "Time to first token")
    draw_rates(both[1], result["rates"], "tpot", "Time per output token")
    figure.savefig(IMAGES / "disaggregation.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
