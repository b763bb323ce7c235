"""Draws the pictures of docs/benchmarks.md from the figures in ``benchmarks/results``.

    python -m benchmarks.plot

Needs matplotlib (``pip install -e ".[plots]"``); writes ``docs/images/*.svg``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
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
PEER_COLORS = {
    "fuseline": "#d95f0e",
    "transformers": "#fecc5c",
    "llama.cpp": "#31a354",
    "ctranslate2": "#756bb1",
    "openvino": "#2c7fb8",
    "onnxruntime": "#7fcdbb",
    "vllm": "#7f8c8d",
}
PEER_METRICS = {"prefill": "prefill", "B1": "decode, 1 sequence", "B4": "decode, 4", "B16": "decode, 16"}


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


def draw_peers(axes: Any, result: dict[str, Any], model: str, metric: str) -> None:
    """The best mode of each runtime, by kind of weights; a line above is what memory allows, if it is in sight."""
    kinds = ("float", "8 bit", "4 bit")
    highest = 0.0
    for number, kind in enumerate(kinds):
        best: dict[str, float] = {}
        for row in result["rows"]:
            if (row["model"], row["kind"]) == (model, kind) and metric in row["rates"]:
                best[row["peer"]] = max(best.get(row["peer"], 0.0), row["rates"][metric]["median"])
        highest = max(highest, *best.values(), 0.0)
        width = 0.84 / max(1, len(best))
        for place, peer in enumerate(name for name in PEER_COLORS if name in best):
            axes.bar(number - 0.42 + (place + 0.5) * width, best[peer], width, color=PEER_COLORS[peer])
        for floor in result["floors"]:
            same = (floor["model"], floor["kind"], floor["metric"]) == (model, kind, metric)
            if same and floor["tokens_per_s"] is not None:
                axes.hlines(floor["tokens_per_s"], number - 0.42, number + 0.42, color="black", linewidth=1)
    axes.set_xticks(range(len(kinds)), kinds, fontsize=8)
    axes.set_ylim(0, 1.4 * highest if highest else None)
    axes.tick_params(labelsize=8)


def draw_disaggregation(pyplot: Any, result: dict[str, Any]) -> dict[str, Any]:
    timeline, axes = pyplot.subplots(figsize=(9, 2.8), layout="constrained")
    draw_timeline(axes, result["hops"])
    rates, both = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    draw_rates(both[0], result["rates"], "ttft", "Time to first token")
    draw_rates(both[1], result["rates"], "tpot", "Time per output token")
    return {"timeline": timeline, "disaggregation": rates}


def draw_all_peers(pyplot: Any, result: dict[str, Any]) -> dict[str, Any]:
    """One row a model, one column a metric, tokens per second."""
    models = list(dict.fromkeys(row["model"] for row in result["rows"]))
    size = (11, 2.4 * len(models) + 0.6)
    figure, axes = pyplot.subplots(len(models), len(PEER_METRICS), figsize=size, layout="constrained", squeeze=False)
    for row, model in enumerate(models):
        for column, (metric, title) in enumerate(PEER_METRICS.items()):
            draw_peers(axes[row][column], result, model, metric)
            if row == 0:
                axes[row][column].set_title(title, fontsize=10)
        axes[row][0].set_ylabel(f"{model}, tokens/s")
    present = {row["peer"] for row in result["rows"] if row["rates"]}
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=color) for peer, color in PEER_COLORS.items() if peer in present]
    names = [peer for peer in PEER_COLORS if peer in present]
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), fontsize=8)
    return {"peers": figure}


def draw_goodput(pyplot: Any, result: dict[str, Any]) -> dict[str, Any]:
    """Goodput over the rate of arrivals; what is not good lies below the diagonal."""
    picture, axes = pyplot.subplots(figsize=(5, 3.2), layout="constrained")
    for server in dict.fromkeys(figure["server"] for figure in result["figures"]):
        figures = [figure for figure in result["figures"] if figure["server"] == server]
        x = [figure["requests_per_s"] for figure in figures]
        axes.plot(x, [figure["goodput_per_s"] for figure in figures], "o-", color=PEER_COLORS[server], label=server)
    most = max(figure["requests_per_s"] for figure in result["figures"])
    axes.plot([0, most], [0, most], ":", color="black", linewidth=1, label="all good")
    axes.set_xlabel("requests/s")
    axes.set_ylabel("good requests/s")
    axes.set_title(f"TTFT <= {result['ttft_s']:g} s and TPOT <= {result['tpot_s'] * 1e3:g} ms")
    axes.legend(fontsize=8)
    return {"serving_peers": picture}


# By the name of the figures: what draws them, as pictures by name.
DRAWINGS: dict[str, Callable[[Any, dict[str, Any]], dict[str, Any]]] = {
    "disaggregation": draw_disaggregation,
    "peers": draw_all_peers,
    "serving_peers": draw_goodput,
}


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "fuseline"  # the same figures give the same file
    from matplotlib import pyplot

    IMAGES.mkdir(parents=True, exist_ok=True)
    for name, draw in DRAWINGS.items():
        if not (RESULTS / f"{name}.json").exists():
            print(f"no figures of {name} yet")
            continue
        for picture, figure in draw(pyplot, load(name)).items():
            figure.savefig(IMAGES / f"{picture}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
