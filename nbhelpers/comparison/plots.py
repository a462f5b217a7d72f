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
FOREST_PAIRS = 15  # six models
# Offsets of a label from its point in typographic points, in the order in which they are tried.
LABEL_SHIFTS = [(dx, dy) for dy in (7, -12, 19, -24, 31, -36, 43, -48) for dx in (8, -8)]


def scores_by_prompt(scores: Sequence[Score], name: str) -> Figure:
    """Which prompts does the model handle well? Repeats as dots, prompt means as ticks."""
    by_prompt = grouped(scores, name)
    means = [sum(values) / len(values) for values in by_prompt.values()]
    figure, axes = _axes("Which prompts does this model handle well?", 7, 3.2)
    for position, values in enumerate(by_prompt.values()):
        axes.plot([position] * len(values), values, "o", color=BLUE, alpha=0.45, ms=4)
    axes.plot(range(len(means)), means, "_", color=ORANGE, ms=14, mew=2)
    whole = estimate(means, name)
    if whole.mean is not None:
        axes.axhline(whole.mean, color=GREY, lw=1)
        axes.axhspan(*_ends(whole), color=GREY, alpha=0.2, lw=0)
    axes.set_xticks(range(len(means)), [_plain(prompt) for prompt in by_prompt], rotation=60, fontsize=8)
    axes.set(ylim=(-0.2, 10.2), ylabel=f"{name} (0 to 10)")
    return figure


def dimensions(quality: Mapping[str, Estimate]) -> Figure:
    """Where are points won and lost? Every score's mean with its 95% interval."""
    shown = {name: e for name, e in quality.items() if e.mean is not None}
    figure, axes = _forest("Where are points won and lost?", shown, [BLUE] * len(shown))
    axes.set(xlim=(0, 10), xlabel="score (0 to 10), mean and 95% interval over prompts")
    return figure


def ranking(report: ComparisonReport) -> Figure:
    """Which model writes best, and how sure are we?"""
    short = _short_names(report.ranking)
    title = "Which model writes best?" + (" (orange: the pick)" if len(short) > 1 else "")
    colours = [ORANGE if name == report.pick else BLUE for name in short]
    rows = {short[name]: e for name, e in report.ranking.items()}
    figure, axes = _forest(title, rows, colours, [(f"{e.mean:.2f}", "black") for e in rows.values()])
    axes.set(xlim=(0, 10), xlabel=f"{report.primary} (0 to 10), mean and 95% interval over prompts")
    return figure


def pair_differences(report: ComparisonReport) -> Figure:
    """Which differences are real? Paired differences against zero and the equivalence margin.

    Above FOREST_PAIRS pairs a list becomes too long to read: a matrix, one cell a pair, takes its place.
    """
    if len(report.pairs) > FOREST_PAIRS:
        return _pair_matrix(report)
    pairs = [pair for pair in report.pairs if pair.difference is not None]
    short = _short_names(report.ranking)
    rows = {
        f"{short[p.a]} − {short[p.b]}": Estimate("", p.n, p.difference, None, p.low, p.high) for p in pairs
    }
    colours = [VERDICT_COLOURS[pair.verdict] for pair in pairs]
    notes = [(pair.verdict, colour) for pair, colour in zip(pairs, colours, strict=True)]
    figure, axes = _forest("Which differences are real?", rows, colours, notes)
    if pairs:
        axes.axvspan(-pairs[0].margin, pairs[0].margin, color=GREY, alpha=0.18, lw=0)
    axes.axvline(0, color="black", lw=0.8)
    axes.set(xlabel="difference in points, 95% interval; grey band: too small to matter")
    return figure


def _pair_matrix(report: ComparisonReport) -> Figure:
    """Row minus column for every pair, coloured by the row's verdict."""
    from matplotlib.colors import to_rgba

    names, opposite = list(report.ranking), {"better": "worse", "worse": "better"}
    width, height = 2.2 + 0.62 * len(names), 1.6 + 0.42 * len(names)
    figure, axes = _axes("Which differences are real?", width, height)
    cells = [[to_rgba("white")] * len(names) for _ in names]
    for pair in report.pairs:
        for row, column, sign in ((pair.a, pair.b, 1), (pair.b, pair.a, -1)):
            verdict = pair.verdict if sign > 0 else opposite.get(pair.verdict, pair.verdict)
            x, y, colour = names.index(column), names.index(row), VERDICT_COLOURS[verdict]
            cells[y][x] = to_rgba(colour, 0.16)
            points = "" if pair.difference is None else f"{round(sign * pair.difference, 1) + 0.0:+.1f}"
            text = {"tied": f"≈ {points}", "cannot tell": f"{points} ?"}.get(verdict, points)
            axes.text(x, y, text, ha="center", va="center", fontsize=9, color=colour)
    axes.imshow(cells, aspect="auto")
    labels = list(_short_names(names).values())
    axes.set_xticks(range(len(names)), labels, rotation=45, ha="left", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), labels)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("row minus column, points; green: row is better, red: worse, ≈ tied, ? cannot tell")
    return figure


def quality_speed_memory(results: Sequence[Result], report: ComparisonReport) -> Figure:
    """What does quality cost? Quality against speed, with intervals; the area of a point is memory."""
    figure, axes = _axes("What does quality cost? (area: memory of the weights)", 7, 4.4)
    shown = [result for result in results if result.model in report.ranking and words_per_s(result)]
    memory = {result.model: result.metrics["memory/parameters_mib"] for result in shown}
    short, points = _short_names(memory), dict[str, tuple[float, Estimate]]()
    for result, colour in zip(shown, cycle(MODEL_COLOURS), strict=False):
        speed, mib, quality = words_per_s(result), memory[result.model], report.ranking[result.model]
        low, high = (result.metrics.get(f"latency/words_per_s/{end}", speed) for end in ("low", "high"))
        area = 25 + 900 * mib / max(memory.values())
        axes.scatter(speed, quality.mean, s=area, color=colour, alpha=0.35, lw=0)
        axes.hlines(quality.mean, low, high, color=colour, lw=1.5)
        size = f"{mib / 1024:,.1f} GiB" if mib >= 1024 else f"{mib:,.{0 if mib >= 10 else 1}f} MiB"
        points[f"{short[result.model]} ({size})"] = speed, quality
    axes.set(xlabel="words per second at batch 1", ylabel=f"{report.primary} (0 to 10)")
    speeds = [speed for speed, _ in points.values()]
    _draw_models(figure, axes, points, log=max(speeds, default=0) > 20 * min(speeds, default=0))
    return figure


def size_quality(results: Sequence[Result], report: ComparisonReport) -> Figure:
    """Do larger models write better? Quality against parameters with the mean slope per doubling."""
    figure, axes = _axes("Do larger models write better? (dashed: mean slope)", 7, 3.6)
    short = _short_names(report.ranking)
    shown = [result for result in results if result.model in short]
    points = {short[r.model]: (float(r.parameters), report.ranking[r.model]) for r in shown}
    if report.size_slope is not None and report.size_slope.mean is not None:
        sizes = [math.log2(size) for size, _ in points.values()]
        level = fmean(quality.mean or 0.0 for _, quality in points.values())
        ends = [min(sizes), max(sizes)]
        line = [level + report.size_slope.mean * (size - fmean(sizes)) for size in ends]
        axes.plot([2**size for size in ends], line, "--", color=GREY, lw=1, zorder=1)
    axes.set(xlabel="parameters (log scale)", ylabel=f"{report.primary} (0 to 10)")
    _draw_models(figure, axes, points, log=True)
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


def _forest(
    title: str, rows: Mapping[str, Estimate], colours: Sequence[str], notes: Sequence[tuple[str, str]] = ()
) -> tuple[Figure, Any]:
    """Means with intervals below each other, wide enough for long labels; notes with colours on the right."""
    width = max(7.0, 4.5 + 0.085 * max(map(len, rows), default=0))
    figure, axes = _axes(title, width, 0.9 + 0.32 * max(1, len(rows)))
    for place, (e, colour) in enumerate(zip(rows.values(), colours, strict=True)):
        axes.hlines(place, *_ends(e), color=colour, lw=2)
        axes.plot(e.mean, place, "o", color=colour, ms=6)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(max(1, len(rows)) - 0.5, -0.5)
    for place, (note, colour) in enumerate(notes):
        margin = axes.get_yaxis_transform()
        axes.text(1.01, place, note, transform=margin, va="center", fontsize=9, color=colour)
    return figure, axes


def _ends(e: Estimate) -> tuple[float, float]:
    """The interval; NaN, which is not drawn, where there is none."""
    return (math.nan, math.nan) if e.low is None or e.high is None else (e.low, e.high)


def _draw_models(figure: Figure, axes: Any, points: Mapping[str, tuple[float, Estimate]], log: bool) -> None:
    """A point with its interval for each label, which goes to the first place beside it that is free."""
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import LogLocator, NullFormatter

    for (x, e), colour in zip(points.values(), cycle(MODEL_COLOURS), strict=False):
        axes.vlines(x, *_ends(e), color=colour, lw=1.5)
        axes.plot(x, e.mean, "o", color=colour, ms=5)
    if log:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=7))
        axes.xaxis.set_major_formatter(lambda value, position: counted(value))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(0.2)
    figure.draw_without_rendering()
    frame, taken = axes.get_window_extent(), list[Any]()
    centres = [axes.transData.transform((x, e.mean)) for x, e in points.values()]
    for (text, (x, e)), colour in zip(points.items(), cycle(MODEL_COLOURS), strict=False):
        note = axes.annotate(
            text, (x, e.mean), (8, 7), textcoords="offset points", fontsize=8.5, color=colour
        )
        note.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
        for shift in (*LABEL_SHIFTS, LABEL_SHIFTS[0]):  # no free place: better crossed than missing
            note.set(position=shift, ha="left" if shift[0] > 0 else "right")
            box = note.get_window_extent().padded(1)
            inside = frame.fully_contains(*box.min) and frame.fully_contains(*box.max)
            if inside and not (box.count_overlaps(taken) or box.count_contains(centres)):
                break
        taken.append(note.get_window_extent())


def _short_names(models: Iterable[str]) -> dict[str, str]:
    """Hub names without their organisation where that stays unambiguous."""
    last = {name: name.rsplit("/", 1)[-1] for name in models}
    twice = Counter(last.values())
    return {name: _plain(short if twice[short] == 1 else name) for name, short in last.items()}


def _plain(text: str) -> str:
    """Text that matplotlib must not read as a formula."""
    return text.replace("$", r"\$")
