"""Figures that answer one question each. Every function returns a matplotlib Figure; the caller shows it."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nbhelpers.comparison.compare import ComparisonReport
from nbhelpers.records import Estimate, Result, Score

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY, GREEN, RED = "#2b6cb0", "#c05621", "#718096", "#2f855a", "#c53030"
VERDICT_COLOURS = {"better": GREEN, "worse": RED, "tied": BLUE, "cannot tell": GREY}
OPPOSITE = {"better": "worse", "worse": "better"}
SPEED = "latency/words_per_s"  # words, because tokenizers differ
FOREST_PAIRS = 15  # six models
Label = tuple[str, float, float, str]  # text, x, y, colour
# Offsets of a label from its point in typographic points, in the order in which they are tried.
LABEL_SHIFTS = [(dx, dy) for dy in (7, -12, 19, -24, 31, -36, 43, -48) for dx in (8, -8)]


def scores_by_prompt(scores: Sequence[Score], name: str) -> Figure:
    """Which prompts does the model handle well? Repeats as dots, prompt means as ticks."""
    from nbhelpers.stats.estimate import estimate

    grouped: dict[str, list[float]] = defaultdict(list)
    for score in scores:
        grouped[score.prompt_id].append(score.values[name])
    figure, axes = _axes(7, 3.2)
    for position, values in enumerate(grouped.values()):
        axes.plot([position] * len(values), values, "o", color=BLUE, alpha=0.45, ms=4)
        axes.plot(position, sum(values) / len(values), "_", color=ORANGE, ms=14, mew=2)
    whole = estimate([sum(v) / len(v) for v in grouped.values()], name)
    if whole.mean is not None:
        axes.axhline(whole.mean, color=GREY, lw=1)
    if whole.low is not None and whole.high is not None:
        axes.axhspan(whole.low, whole.high, color=GREY, alpha=0.2, lw=0)
    axes.set_xticks(range(len(grouped)), [_plain(prompt) for prompt in grouped], rotation=60, fontsize=8)
    axes.set(
        ylim=(-0.2, 10.2), ylabel=f"{name} (0 to 10)", title="Which prompts does this model handle well?"
    )
    return figure


def dimensions(quality: Mapping[str, Estimate]) -> Figure:
    """Where are points won and lost? Every score's mean with its 95% interval."""
    shown = {name: e for name, e in quality.items() if e.mean is not None}
    figure, axes = _axes(7, 0.6 + 0.26 * max(1, len(shown)))
    _forest(axes, list(shown), list(shown.values()), [BLUE] * len(shown))
    axes.set(xlim=(0, 10), xlabel="score (0 to 10), mean and 95% interval over prompts")
    axes.set_title("Where are points won and lost?")
    return figure


def ranking(report: ComparisonReport) -> Figure:
    """Which model writes best, and how sure are we?"""
    names = list(report.ranking)
    labels = list(_short_names(names).values())
    figure, axes = _axes(_width(labels), 1.1 + 0.36 * max(1, len(names)))
    colours = [ORANGE if name == report.pick else BLUE for name in names]
    _forest(axes, labels, list(report.ranking.values()), colours)
    for position, estimate in enumerate(report.ranking.values()):
        _note(axes, position, f"{estimate.mean:.2f}")
    axes.set(xlim=(0, 10), xlabel=f"{report.primary} (0 to 10), mean and 95% interval over prompts")
    axes.set_title("Which model writes best?" + (" (orange: the pick)" if len(names) > 1 else ""))
    return figure


def pair_differences(report: ComparisonReport) -> Figure:
    """Which differences are real? Paired differences against zero and the equivalence margin.

    Above FOREST_PAIRS pairs a list becomes too long to read: a matrix, one cell a pair, takes its place.
    """
    if len(report.pairs) > FOREST_PAIRS:
        return _pair_matrix(report)
    pairs = [pair for pair in report.pairs if pair.difference is not None]
    short = _short_names(report.ranking)
    labels = [f"{short[p.a]} − {short[p.b]}" for p in pairs]
    figure, axes = _axes(_width(labels), 1.1 + 0.34 * max(1, len(pairs)))
    estimates = [Estimate("", p.n, p.difference, None, p.low, p.high) for p in pairs]
    _forest(axes, labels, estimates, [VERDICT_COLOURS[p.verdict] for p in pairs])
    for position, pair in enumerate(pairs):
        _note(axes, position, pair.verdict, VERDICT_COLOURS[pair.verdict])
    if pairs:
        axes.axvspan(-pairs[0].margin, pairs[0].margin, color=GREY, alpha=0.18, lw=0)
    axes.axvline(0, color="black", lw=0.8)
    axes.set(xlabel="difference in points, 95% interval; grey band: too small to matter")
    axes.set_title("Which differences are real?")
    return figure


def quality_speed_memory(results: Sequence[Result], report: ComparisonReport) -> Figure:
    """What does quality cost? Quality against speed, with intervals; the area of a point is memory."""
    figure, axes = _axes(7, 4.4)
    shown = [r for r in results if r.model in report.ranking and r.metrics.get(f"{SPEED}/mean")]
    most = max((result.metrics["memory/parameters_mib"] for result in shown), default=1.0)
    short = _short_names([result.model for result in shown])
    labels: list[Label] = []
    for result, colour in zip(shown, _cycle(len(shown)), strict=True):
        speed, memory = result.metrics[f"{SPEED}/mean"], result.metrics["memory/parameters_mib"]
        quality = report.ranking[result.model]
        axes.scatter(speed, quality.mean, s=25 + 900 * memory / most, color=colour, alpha=0.35, lw=0)
        axes.plot(speed, quality.mean, "o", color=colour, ms=3)
        _interval(axes, speed, quality, colour)
        ends = [result.metrics.get(f"{SPEED}/{end}", speed) for end in ("low", "high")]
        axes.plot(ends, [quality.mean] * 2, color=colour, lw=1.5)
        labels.append((f"{short[result.model]} ({_mib(memory)})", speed, quality.mean or 0.0, colour))
    speeds = [speed for _, speed, _, _ in labels]
    if speeds and max(speeds) > 20 * min(speeds):
        axes.set_xscale("log")
        _count_ticks(axes.xaxis)
    axes.margins(0.2)
    axes.set(xlabel="words per second at batch 1", ylabel=f"{report.primary} (0 to 10)")
    axes.set_title("What does quality cost? (area: memory of the weights)")
    _place_labels(figure, axes, labels)
    return figure


def size_quality(results: Sequence[Result], report: ComparisonReport) -> Figure:
    """Do larger models write better? Quality against parameters with the mean slope per doubling."""
    figure, axes = _axes(7, 3.6)
    shown = [result for result in results if result.model in report.ranking]
    short = _short_names([result.model for result in shown])
    labels: list[Label] = []
    for result, colour in zip(shown, _cycle(len(shown)), strict=True):
        quality = report.ranking[result.model]
        axes.plot(result.parameters, quality.mean, "o", color=colour, ms=6)
        _interval(axes, result.parameters, quality, colour)
        labels.append((short[result.model], result.parameters, quality.mean or 0.0, colour))
    if report.size_slope is not None and report.size_slope.mean is not None:
        sizes = [math.log2(result.parameters) for result in shown]
        means = [report.ranking[result.model].mean or 0.0 for result in shown]
        centre, level, slope = sum(sizes) / len(sizes), sum(means) / len(means), report.size_slope.mean
        ends = [min(sizes), max(sizes)]
        line = [level + slope * (size - centre) for size in ends]
        axes.plot([2**size for size in ends], line, "--", color=GREY, lw=1, zorder=1)
    axes.set_xscale("log")
    axes.margins(0.15)
    _count_ticks(axes.xaxis)
    axes.set(xlabel="parameters (log scale)", ylabel=f"{report.primary} (0 to 10)")
    axes.set_title("Do larger models write better? (dashed: mean slope)")
    _place_labels(figure, axes, labels)
    return figure


def _pair_matrix(report: ComparisonReport) -> Figure:
    """Row minus column for every pair, coloured by the row's verdict."""
    names = list(report.ranking)
    labels = list(_short_names(names).values())
    figure, axes = _axes(2.2 + 0.62 * len(names), 1.6 + 0.42 * len(names))
    for pair in report.pairs:
        for row, column, sign in ((pair.a, pair.b, 1), (pair.b, pair.a, -1)):
            verdict = pair.verdict if sign > 0 else OPPOSITE.get(pair.verdict, pair.verdict)
            x, y = names.index(column), names.index(row)
            colour = VERDICT_COLOURS[verdict]
            axes.bar(x, 0.94, 0.94, y - 0.47, color=colour, alpha=0.16, lw=0)
            points = "" if pair.difference is None else f"{round(sign * pair.difference, 1) + 0.0:+.1f}"
            text = {"tied": f"≈ {points}", "cannot tell": f"{points} ?"}.get(verdict, points)
            axes.text(x, y, text, ha="center", va="center", fontsize=9, color=colour)
    axes.set_xticks(range(len(names)), labels, rotation=45, ha="left", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), labels)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set(xlim=(-0.5, len(names) - 0.5), ylim=(len(names) - 0.5, -0.5))
    axes.set_xlabel("row minus column, points; green: row is better, red: worse, ≈ tied, ? cannot tell")
    axes.set_title("Which differences are real?")
    return figure


def counted(number: float) -> str:
    """A count in three digits: 495k, 4.98M, 1.1B."""
    for factor, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * factor:
            return f"{number / factor:.3g}{letter}"
    return f"{number:.3g}"


def _axes(width: float, height: float):  # type: ignore[no-untyped-def]  # matplotlib has no stubs here
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(width, height), layout="constrained", dpi=100)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    return figure, axes


def _forest(axes, labels: list[str], estimates: Sequence[Estimate], colours: list[str]) -> None:  # type: ignore[no-untyped-def]
    for position, (estimate, colour) in enumerate(zip(estimates, colours, strict=True)):
        if estimate.low is not None and estimate.high is not None:
            axes.plot([estimate.low, estimate.high], [position] * 2, color=colour, lw=2)
        axes.plot(estimate.mean, position, "o", color=colour, ms=6)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(max(1, len(labels)) - 0.5, -0.5)


def _note(axes, position: int, text: str, colour: str = "black") -> None:  # type: ignore[no-untyped-def]
    """Text in the right margin, level with a row of a forest plot."""
    place = {"xy": (1.0, position), "xycoords": ("axes fraction", "data")}
    axes.annotate(
        text, **place, xytext=(6, 0), textcoords="offset points", va="center", fontsize=9, color=colour
    )


def _count_ticks(axis) -> None:  # type: ignore[no-untyped-def]
    """Ticks of a log axis as 500k, 1M, 2B instead of powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=7))
    axis.set_major_formatter(lambda value, position: counted(value))
    axis.set_minor_formatter(NullFormatter())


def _interval(axes, x: float, estimate: Estimate, colour: str) -> None:  # type: ignore[no-untyped-def]
    if estimate.low is not None and estimate.high is not None:
        axes.plot([x, x], [estimate.low, estimate.high], color=colour, lw=1.5)


def _place_labels(figure, axes, labels: list[Label]) -> None:  # type: ignore[no-untyped-def]
    """Write each label beside its point, at the first place where it covers no earlier label or point."""
    from matplotlib.patheffects import withStroke

    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    points = [axes.transData.transform((x, y)) for _, x, y, _ in labels]
    taken: list[Any] = []
    frame = axes.get_window_extent(renderer)
    for text, x, y, colour in labels:
        place = {"xytext": LABEL_SHIFTS[0], "textcoords": "offset points"}
        note = axes.annotate(text, (x, y), **place, fontsize=8.5, color=colour)
        note.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
        for shift in LABEL_SHIFTS:
            note.set(position=shift, ha="left" if shift[0] > 0 else "right")
            box = note.get_window_extent(renderer).padded(1)
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if (
                inside
                and not any(box.overlaps(b) for b in taken)
                and not any(box.contains(*p) for p in points)
            ):
                break
        else:  # no free place: better crossed than missing
            note.set(position=LABEL_SHIFTS[0], ha="left")
        taken.append(note.get_window_extent(renderer))


def _short_names(models: Iterable[str]) -> dict[str, str]:
    """Hub names without their organisation where that stays unambiguous."""
    names = list(models)
    last = {name: name.rsplit("/", 1)[-1] for name in names}
    twice = Counter(last.values())
    return {name: _plain(last[name] if twice[last[name]] == 1 else name) for name in names}


def _plain(text: str) -> str:
    """Text that matplotlib must not read as a formula."""
    return text.replace("$", r"\$")


def _width(labels: Sequence[str]) -> float:
    """Inches that leave the data of a forest plot its room beside long labels."""
    return max(7.0, 4.5 + 0.085 * max(map(len, labels), default=0))


def _mib(mib: float) -> str:
    return f"{mib / 1024:,.1f} GiB" if mib >= 1024 else f"{mib:,.0f} MiB" if mib >= 10 else f"{mib:.1f} MiB"


def _cycle(count: int) -> list[str]:
    colours = [BLUE, ORANGE, GREEN, RED, "#6b46c1", "#975a16", "#2c7a7b", "#97266d"]
    return [colours[i % len(colours)] for i in range(count)]
