"""From cells to figures: medians, spread, shares of the floor and ratios to the best peer."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .cells import BYTES_PER_WEIGHT, OURS, PEERS, Cell
from .checkpoints import SHAPES, step_bytes
from .engines.measure import DECODE_PROMPT_TOKENS, DECODE_STEPS

METRICS = ("prefill", *(f"B{batch}" for batch in DECODE_STEPS))
# What is aimed at: the ratio to the best peer of the same kind.
TARGETS = {
    "float": {
        "a110m": {"prefill": 1.15, "B1": 1.1, "B4": 1.1, "B16": 1.2},
        "b05b": {"prefill": 1.1, "B1": 1.05, "B4": 1.1, "B16": 1.2},
        "c1b": {"prefill": 1.05, "B1": 1.0, "B4": 1.0, "B16": 1.1},
    },
    "8 bit": {
        "a110m": {"prefill": 1.25, "B1": 1.0, "B4": 1.7, "B16": 1.8},
        "b05b": {"prefill": 1.2, "B1": 1.0, "B4": 1.4, "B16": 1.4},
        "c1b": {"prefill": 1.2, "B1": 1.05, "B4": 1.4, "B16": 1.25},
    },
    "4 bit": {model: {"B1": 1.0} for model in SHAPES},
}


@dataclass(frozen=True, slots=True)
class Spread:
    """Median of the rounds' medians, least and most of all repeats."""

    median: float
    least: float
    most: float


@dataclass(frozen=True, slots=True)
class Row:
    """A peer's mode on a model, over the rounds.

    Attributes:
        kind: "float", "8 bit" or "4 bit".
        rounds: that were run; a slow cell is not repeated.
        rates: tokens per second, by metric.
        start_s: from launching the process to the first token.
        first_choices, near_choices: shares of the checked tokens that are the float32 reference's first choice, and
            among its first ten; None unless checked.
        error: of the last round that failed.
    """

    model: str
    peer: str
    mode: str
    kind: str
    rounds: int
    version: str
    rates: dict[str, Spread]
    start_s: Spread | None
    peak_rss_mib: float | None
    first_choices: float | None
    near_choices: float | None
    error: str


def make_row(cells: Sequence[Cell], ranks: Sequence[int] | None) -> Row:
    """Of all rounds of one peer's mode on one model."""
    first = cells[0]

    def spread(of: Callable[[Cell], Sequence[float]]) -> Spread | None:
        rounds = [of(cell) for cell in cells if of(cell)]
        if not rounds:
            return None
        values = [value for each in rounds for value in each]
        return Spread(statistics.median(statistics.median(each) for each in rounds), min(values), max(values))

    rates = {"prefill": spread(lambda cell: cell.prefill)}
    for batch in DECODE_STEPS:
        rates[f"B{batch}"] = spread(lambda cell, batch=batch: cell.decode.get(str(batch), []))  # type: ignore[misc]
    peaks = [cell.peak_rss_mib for cell in cells if cell.peak_rss_mib is not None]
    return Row(
        model=first.model,
        peer=first.peer,
        mode=first.mode,
        kind=PEERS[first.peer].modes[first.mode],
        rounds=len(cells),
        version=next((cell.version for cell in cells if cell.version), ""),
        rates={metric: rate for metric, rate in rates.items() if rate is not None},
        start_s=spread(lambda cell: [] if cell.start_s is None else [cell.start_s]),
        peak_rss_mib=max(peaks, default=None),
        first_choices=None if not ranks else sum(rank == 0 for rank in ranks) / len(ranks),
        near_choices=None if not ranks else sum(rank < 10 for rank in ranks) / len(ranks),
        error=next((cell.error for cell in reversed(cells) if cell.error), ""),
    )


def floor(model: str, kind: str, metric: str, bytes_per_s: float) -> float | None:
    """Decode tokens per second if a step did nothing but read; None for prefill, which computes."""
    if metric == "prefill":
        return None
    batch = int(metric.removeprefix("B"))
    context = DECODE_PROMPT_TOKENS + DECODE_STEPS[batch] / 2
    return batch * bytes_per_s / step_bytes(SHAPES[model], BYTES_PER_WEIGHT[kind], batch, context)


@dataclass(frozen=True, slots=True)
class Ratio:
    """Our best mode of a kind over the best peer's."""

    model: str
    kind: str
    metric: str
    ratio: float
    ours: str
    best_peer: str
    target: float | None


def ratios(rows: Sequence[Row]) -> list[Ratio]:
    """Where there is both ours and a peer."""
    found = []
    for model in SHAPES:
        for kind in BYTES_PER_WEIGHT:
            for metric in METRICS:
                rated = [row for row in rows if (row.model, row.kind) == (model, kind) and metric in row.rates]
                ours = max((r for r in rated if r.peer == OURS), key=lambda r: r.rates[metric].median, default=None)
                best = max((r for r in rated if r.peer != OURS), key=lambda r: r.rates[metric].median, default=None)
                if ours is not None and best is not None:
                    ratio = ours.rates[metric].median / best.rates[metric].median
                    target = TARGETS[kind][model].get(metric)
                    name = f"{best.peer} {best.mode}"
                    found.append(Ratio(model, kind, metric, ratio, ours.mode, name, target))
    return found


def print_rows(rows: Sequence[Row], bytes_per_s: float) -> None:
    for model in dict.fromkeys(row.model for row in rows):
        print(f"\n{model}: tokens per second, median of the rounds (least to most of all repeats)")
        heads = "".join(f"{metric:>22}" for metric in METRICS)
        print(f"{'':25}{heads}{'rounds':>8}{'start s':>9}{'MiB':>7}{'same':>6}{'near':>6}")
        for kind in BYTES_PER_WEIGHT:
            of_kind = [row for row in rows if (row.model, row.kind) == (model, kind)]
            for row in of_kind:
                _print_row(row)
            if of_kind:
                floors = [floor(model, kind, metric, bytes_per_s) for metric in METRICS]
                print(f"{'floor, ' + kind:25}" + "".join(f"{'' if f is None else f'{f:.0f}':>22}" for f in floors))


def _print_row(row: Row) -> None:
    shown = [_shown(row.rates.get(metric)) for metric in METRICS]
    start = "" if row.start_s is None else f"{row.start_s.median:.2f}"
    peak = "" if row.peak_rss_mib is None else f"{row.peak_rss_mib:.0f}"
    shares = [("" if share is None else f"{share:.0%}") for share in (row.first_choices, row.near_choices)]
    line = f"{row.peer + ' ' + row.mode:25}" + "".join(f"{text:>22}" for text in shown)
    print(f"{line}{row.rounds:>8}{start:>9}{peak:>7}{shares[0]:>6}{shares[1]:>6}")
    if row.error:
        print(f"    FAILED: {row.error}")


def _shown(rate: Spread | None) -> str:
    if rate is None:
        return "-"
    digits = 1 if rate.median < 100 else 0
    return f"{rate.median:.{digits}f} ({rate.least:.{digits}f}-{rate.most:.{digits}f})"


def print_ratios(found: Sequence[Ratio]) -> None:
    print("\nours over the best peer")
    for each in found:
        names = f"{each.ours} / {each.best_peer}"
        line = f"  {each.model:6} {each.kind:6} {each.metric:8} {each.ratio:5.2f}  {names:32}"
        if each.target is not None:
            line += f" target {each.target:.2f}, {'met' if each.ratio >= each.target else 'missed'}"
        print(line)
