"""Figures that answer one question each. Every function returns a matplotlib Figure; the caller shows it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from textwrap import fill
from typing import TYPE_CHECKING, Any

from nbhelpers.comparison.compare import ComparisonReport, words_per_s
from nbhelpers.records import LAB_SCALE, Estimate, Result, Scale
from nbhelpers.stats.paired import EVERY_PAIR

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY, GREEN, RED = "#2b6cb0", "#c05621", "#718096", "#2f855a", "#c53030"
MODEL_COLOURS = [BLUE, ORANGE, GREEN, RED, "#6b46c1", "#975a16", "#2c7a7b", "#97266d"]
VERDICT_COLOURS = {"better": GREEN, "worse": RED, "tied": BLUE, "cannot tell": GREY}
MARKERS = "os^Dv"
STYLES = [*zip(MODEL_COLOURS * 5, MARKERS * 8, strict=True)]  # 40 different points
MOST_DRAWN = 30  # rows of a picture about more than ``EVERY_PAIR`` models
WIDTH = 4.3  # inches: letters of 10 points are 11 pixels high on a telephone, which is 390 wide
ForestRow = tuple[str, Estimate, str, str]  # label, mean with interval, colour, note


def dimensions(quality: Mapping[str, Estimate], scale: Scale = LAB_SCALE) -> Figure:
    """Where are points won and lost? Every score's mean with its 95% interval."""
    rows = [(name, e, BLUE, "") for name, e in quality.items() if e.mean is not None]
    figure, axes = _forest("Where are points won and lost?", rows)
    axes.set(xlim=_limits(scale), xlabel="score, each on its own scale,\nmean and 95% interval over prompts")
    return figure


def ranking(report: ComparisonReport) -> Figure:
    """Which model writes best, and how sure are we?"""
    short = _short_names(report.ranking)
    title = question(report) + ("\n(orange: the pick)" if len(short) > 1 else "") + _cut_note(len(short))
    best = drawn(report.ranking.items(), len(short))
    rows = [(short[m], e, ORANGE if m == report.pick else BLUE, f"{e.mean:.2f}") for m, e in best]
    figure, axes = _forest(title, rows, "black")
    axes.set(xlim=_limits(report.scale), xlabel=f"{_label(report)},\nmean and 95% interval over prompts")
    return figure


def pair_differences(report: ComparisonReport) -> Figure:
    """Which differences are real? Paired differences against zero and the equivalence margin."""
    name, rows = _short_names(report.ranking), []
    for pair in drawn(report.verdicts, len(name)):
        if pair.difference is not None:
            e = Estimate("", pair.n, pair.difference, None, pair.low, pair.high)
            rows.append((f"{name[pair.a]} − {name[pair.b]}", e, VERDICT_COLOURS[pair.verdict], pair.verdict))
    figure, axes = _forest(f"Which differences are real?\n({report.basis})", rows)
    if rows:
        axes.axvspan(-report.pairs[0].margin, report.pairs[0].margin, color=GREY, alpha=0.18, lw=0)
    axes.axvline(0, color=GREY, lw=0.8)
    unit = report.pairs[0].unit if report.pairs else "points"
    axes.set(xlabel=f"difference in {unit}, 95% interval;\ngrey band: too small to matter")
    return figure


def quality_speed_memory(results: Sequence[Result], report: ComparisonReport) -> Figure:
    """What does quality cost? Quality with its interval against speed; the area of a point is memory."""
    best = drawn(report.ranking, len(report.ranking))
    shown = [result for result in results if result.model in best and words_per_s(result)]
    title = f"What does quality cost?\n(area: memory of the weights){_cut_note(len(report.ranking))}"
    figure, axes = _axes(title, 3.2 + 0.2 * len(shown))
    memory = {r.model: r.metrics.get("memory/parameters_mib", 0.0) for r in shown}  # 0: unknown
    short, speeds = _short_names(memory), [words_per_s(result) for result in shown]
    for result, speed, (colour, marker) in zip(shown, speeds, cycle(STYLES), strict=False):
        mib, quality = memory[result.model], report.ranking[result.model]
        area = 900 * mib / (max(memory.values()) or 1)
        axes.scatter(speed, quality.mean, area, colour, alpha=0.35, lw=0)
        axes.vlines(speed, *_ends(quality), color=colour, lw=1.5)
        label = f"{short[result.model]} ({f'{mib:,.1f} MiB' if mib else 'a server'})"
        axes.plot(speed, quality.mean, marker, color=colour, ms=6, label=label)
    if speeds:
        figure.legend(loc="outside lower left", frameon=False)
        axes.set_xscale("log" if max(speeds) > 20 * min(speeds) else "linear")
        axes.xaxis.set_major_formatter("{x:g}")  # a power of ten would be too small to read
    axes.margins(0.2)
    axes.set(xlabel="words per second at batch 1", ylabel=_label(report))
    return figure


def history(primary: str, runs: Sequence[str], means: Mapping[str, Mapping[str, Estimate]]) -> Figure:
    """Has a model become better or worse? runs: oldest first; means: model -> run -> mean of this score."""
    title = f"How did {_plain(primary)} change from run to run?{_cut_note(len(means))}"
    means = dict(drawn(means.items(), len(means)))
    figure, axes = _axes(title, 4 + 0.2 * len(means))
    runs = [run for run in runs if any(run in by_run for by_run in means.values())]
    short = _short_names(means)
    for (model, by_run), (colour, marker) in zip(means.items(), cycle(STYLES), strict=False):
        x, y = [runs.index(run) for run in by_run], [e.mean for e in by_run.values()]
        axes.plot(x, y, f"{marker}-", color=colour, ms=5, label=short[model])
        for position, e in zip(x, by_run.values(), strict=True):
            axes.vlines(position, *_ends(e), color=colour, lw=1, alpha=0.6)
    axes.set_xticks(range(len(runs)), [_plain(run) for run in runs], rotation=60, ha="right")
    figure.legend(loc="outside lower left", frameon=False)
    axes.set_ylabel(f"{_plain(primary)}, mean and 95% interval")
    return figure


def drawn(rows: Iterable[Any], models: int) -> list[Any]:
    """The rows that a picture of so many models shows: all, or of very many the first."""
    return [*rows][: MOST_DRAWN if models > EVERY_PAIR else None]


def _cut_note(models: int) -> str:
    return f"\n(the first {MOST_DRAWN} of {models:,})" if models > EVERY_PAIR else ""


def _axes(title: str, height: float) -> tuple[Figure, Any]:
    from matplotlib import pyplot

    title = "\n".join(fill(line, 42) for line in title.splitlines())
    figure, axes = pyplot.subplots(figsize=(WIDTH, height + 0.2 * title.count("\n")), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.set_title(title)
    return figure, axes


def _forest(title: str, rows: Sequence[ForestRow], ink: str | None = None) -> tuple[Figure, Any]:
    """Means with intervals below each other, each under its label with a note on the right."""
    from matplotlib.patheffects import withStroke

    labels = [fill(row[0], 38) for row in rows]
    lines = 1 + max((label.count("\n") for label in labels), default=0)
    figure, axes = _axes(title, 0.9 + (0.22 + 0.17 * lines) * max(1, len(rows)))
    halo = [withStroke(linewidth=3, foreground="white")]  # a line may cross a label
    how = {"transform": axes.get_yaxis_transform(), "va": "bottom", "path_effects": halo}
    for y, (label, (_, e, colour, note)) in enumerate(zip(labels, rows, strict=True)):
        axes.hlines(y, *_ends(e), color=colour, lw=2)
        axes.plot(e.mean, y, "o", color=colour, ms=6)
        axes.text(0.01, y - 0.2, label, **how)
        axes.text(1, y - 0.2, note, ha="right", color=ink or colour, **how)
    axes.locator_params("x", nbins=6)
    axes.set(yticks=[], ylim=(max(1, len(rows)) - 0.6, -0.8))
    return figure, axes


def _ends(e: Estimate) -> tuple[float, float]:
    """The interval; NaN, which is not drawn, where there is none."""
    return (math.nan, math.nan) if e.low is None or e.high is None else (e.low, e.high)


def _limits(scale: Scale) -> tuple[float, float]:
    return min(0.0, scale.low), scale.high


def _label(report: ComparisonReport) -> str:
    best = "" if report.scale.higher_is_better else ", lower is better"
    return f"{_plain(report.primary)} ({report.scale.low:g} to {report.scale.high:g}{best})"


def question(report: ComparisonReport) -> str:
    """What a comparison answers, as a heading."""
    posts = report.scale.unit == LAB_SCALE.unit
    return "Which model writes best?" if posts else "Which model does the task best?"


def _short_names(models: Iterable[str]) -> dict[str, str]:
    """Hub names without their organisation where that stays unambiguous."""
    short = {name: name.rsplit("/", 1)[-1] for name in models}
    counts = Counter(short.values())
    return {name: _plain(last if counts[last] == 1 else name) for name, last in short.items()}


def _plain(text: str) -> str:
    """Text that matplotlib must not read as a formula."""
    return text.replace("$", r"\$")
