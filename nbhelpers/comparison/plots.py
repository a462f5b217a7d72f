"""Figures that answer one question each. Every function returns a matplotlib Figure; the caller shows it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from statistics import fmean
from typing import TYPE_CHECKING, Any

from nbhelpers.comparison.compare import ComparisonReport, words_per_s
from nbhelpers.records import Estimate, Result, Score
from nbhelpers.stats.estimate import estimate, grouped

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY, GREEN, RED = "#2b6cb0", "#c05621", "#718096", "#2f855a", "#c53030"
MODEL_COLOURS = [BLUE, ORANGE, GREEN, RED, "#6b46c1", "#975a16", "#2c7a7b", "#97266d"]
VERDICT_COLOURS = {"better": GREEN, "worse": RED, "tied": BLUE, "cannot tell": GREY}
MARKERS = "os^Dv"  # with the colours 40 different points
ForestRow = tuple[str, Estimate, str, str]  # label, mean with interval, colour, note


def scores_by_prompt(scores: Sequence[Score], name: str) -> Figure:
    """Which prompts does the model handle well? Repeats as dots, prompt means as ticks."""
    by_prompt = grouped(scores, name)
    means = [sum(values) / len(values) for values in by_prompt.values()]
    figure, axes = _axes("Which prompts does this model handle well?", 7, 3.2)
    for position, values in enumerate(by_prompt.values()):
        axes.plot([position] * len(values), values, "o", color=BLUE, alpha=0.45, ms=4)
    axes.plot(range(len(means)), means, "_", color=ORANGE, ms=14, mew=2)
    axes.axhspan(*_ends(estimate(means, name)), color=GREY, alpha=0.2, lw=0)
    axes.set_xticks(range(len(means)), [_plain(prompt) for prompt in by_prompt], rotation=60, fontsize=8)
    axes.set(ylim=(-0.2, 10.2), ylabel=f"{name} (1 to 10)")
    return figure


def dimensions(quality: Mapping[str, Estimate]) -> Figure:
    """Where are points won and lost? Every score's mean with its 95% interval."""
    rows = [(name, e, BLUE, "") for name, e in quality.items() if e.mean is not None]
    figure, axes = _forest("Where are points won and lost?", rows)
    axes.set(xlim=(0, 10), xlabel="score, each on its own scale, mean and 95% interval over prompts")
    return figure


def ranking(report: ComparisonReport) -> Figure:
    """Which model writes best, and how sure are we?"""
    short = _short_names(report.ranking)
    title = "Which model writes best?" + (" (orange: the pick)" if len(short) > 1 else "")
    colours = [ORANGE if name == report.pick else BLUE for name in short]
    rows = [
        (short[m], e, c, f"{e.mean:.2f}") for (m, e), c in zip(report.ranking.items(), colours, strict=True)
    ]
    figure, axes = _forest(title, rows, "black")
    axes.set(xlim=(0, 10), xlabel=f"{report.primary} (1 to 10), mean and 95% interval over prompts")
    return figure


def pair_differences(report: ComparisonReport) -> Figure:
    """Which differences are real? Paired differences against zero and the equivalence margin."""
    short, rows = _short_names(report.ranking), []
    for p in report.verdicts:
        if p.difference is not None:
            e = Estimate("", p.n, p.difference, None, p.low, p.high)
            rows.append((f"{short[p.a]} − {short[p.b]}", e, VERDICT_COLOURS[p.verdict], p.verdict))
    figure, axes = _forest(f"Which differences are real? ({report.basis})", rows)
    if rows:
        axes.axvspan(-report.pairs[0].margin, report.pairs[0].margin, color=GREY, alpha=0.18, lw=0)
    axes.axvline(0, color="black", lw=0.8)
    axes.set(xlabel="difference in points, 95% interval; grey band: too small to matter")
    return figure


def quality_speed_memory(results: Sequence[Result], report: ComparisonReport) -> Figure:
    """What does quality cost? Quality against speed, with intervals; the area of a point is memory."""
    figure, axes = _axes("What does quality cost? (area: memory of the weights)", 8, 4.4)
    shown = [result for result in results if result.model in report.ranking and words_per_s(result)]
    memory = {result.model: result.metrics["memory/parameters_mib"] for result in shown}
    short, points = _short_names(memory), dict[str, tuple[float, Estimate]]()
    for result, colour in zip(shown, cycle(MODEL_COLOURS), strict=False):
        speed, mib, quality = words_per_s(result), memory[result.model], report.ranking[result.model]
        low, high = (result.metrics.get(f"latency/words_per_s/{end}", speed) for end in ("low", "high"))
        axes.scatter(speed, quality.mean, 25 + 900 * mib / max(memory.values()), colour, alpha=0.35, lw=0)
        axes.hlines(quality.mean, low, high, color=colour, lw=1.5)
        size = f"{mib / 1024:,.1f} GiB" if mib >= 1024 else f"{mib:,.{0 if mib >= 10 else 1}f} MiB"
        points[f"{short[result.model]} ({size})"] = speed, quality
    speeds = [speed for speed, _ in points.values()]
    log = max(speeds, default=0) > 20 * min(speeds, default=0)
    _draw_models(axes, points, "words per second at batch 1", report.primary, log)
    return figure


def size_quality(results: Sequence[Result], report: ComparisonReport) -> Figure:
    """Do larger models write better? Quality against parameters with the mean slope per doubling."""
    figure, axes = _axes("Do larger models write better? (dashed: mean slope)", 8, 3.6)
    short = _short_names(report.ranking)
    shown = [result for result in results if result.model in short]
    points = {short[r.model]: (float(r.parameters), report.ranking[r.model]) for r in shown}
    if report.size_slope is not None and report.size_slope.mean is not None:
        sizes = [math.log2(size) for size, _ in points.values()]
        level = fmean(quality.mean or 0.0 for _, quality in points.values())
        ends = [min(sizes), max(sizes)]
        line = [level + report.size_slope.mean * (size - fmean(sizes)) for size in ends]
        axes.plot([2**size for size in ends], line, "--", color=GREY, lw=1, zorder=1)
    _draw_models(axes, points, "parameters (log scale)", report.primary, log=True)
    return figure


def counted(number: float) -> str:
    """A count in three digits: 495k, 4.98M, 1.1B."""
    for factor, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * factor:
            return f"{number / factor:.3g}{letter}"
    return f"{number:.3g}"


def _axes(title: str, width: float, height: float) -> tuple[Figure, Any]:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(width, height), layout="constrained", dpi=100)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.set_title(title)
    return figure, axes


def _forest(title: str, rows: Sequence[ForestRow], ink: str | None = None) -> tuple[Figure, Any]:
    """Means with intervals below each other, wide enough for long labels; notes on the right."""
    width = max(7.0, 4.5 + 0.085 * max((len(row[0]) for row in rows), default=0))
    figure, axes = _axes(title, width, 0.9 + 0.32 * max(1, len(rows)))
    margin = axes.get_yaxis_transform()
    for place, (_, e, colour, note) in enumerate(rows):
        axes.hlines(place, *_ends(e), color=colour, lw=2)
        axes.plot(e.mean, place, "o", color=colour, ms=6)
        axes.text(1.01, place, note, transform=margin, va="center", fontsize=9, color=ink or colour)
    axes.set_yticks(range(len(rows)), [row[0] for row in rows])
    axes.set_ylim(max(1, len(rows)) - 0.5, -0.5)
    return figure, axes


def _ends(e: Estimate) -> tuple[float, float]:
    """The interval; NaN, which is not drawn, where there is none."""
    return (math.nan, math.nan) if e.low is None or e.high is None else (e.low, e.high)


def _draw_models(
    axes: Any, points: Mapping[str, tuple[float, Estimate]], xlabel: str, score: str, log: bool
) -> None:
    """A point with its interval for each model, named beside the figure."""
    from matplotlib.ticker import LogLocator, NullFormatter

    styles = zip(points.items(), cycle(MODEL_COLOURS), cycle(MARKERS), strict=False)
    for (label, (x, e)), colour, marker in styles:
        axes.vlines(x, *_ends(e), color=colour, lw=1.5)
        axes.plot(x, e.mean, marker, color=colour, ms=6, label=label)
    if log:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=7))
        axes.xaxis.set_major_formatter(lambda value, position: counted(value))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(0.2)
    axes.set(xlabel=xlabel, ylabel=f"{score} (1 to 10)")
    if points:
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)


def _short_names(models: Iterable[str]) -> dict[str, str]:
    """Hub names without their organisation where that stays unambiguous."""
    last = {name: name.rsplit("/", 1)[-1] for name in models}
    twice = Counter(last.values())
    return {name: _plain(short if twice[short] == 1 else name) for name, short in last.items()}


def _plain(text: str) -> str:
    """Text that matplotlib must not read as a formula."""
    return text.replace("$", r"\$")
