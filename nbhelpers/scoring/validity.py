"""How far a score can be trusted: rank agreement with answers of known standing, repeatability, raters.

Every figure is an Estimate whose units are prompts (or rated texts), so that it carries an interval or the
reason why there is none.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy import stats as sps

from nbhelpers.records import Estimate, Score
from nbhelpers.scoring import planted
from nbhelpers.scoring import rubric as scoring
from nbhelpers.stats import estimate as estimates
from nbhelpers.stats.estimate import Array

Rating = Callable[[str, str, str], float | None]  # (text, prompt, content type) -> rating, None if refused
RETEST_MIN = 4  # prompts; Fisher's interval divides by n - 3
RESAMPLES = 2000


# ---- the planted order ---------------------------------------------------------------------------------


def tau(ratings: Sequence[float | None], expected: Sequence[int]) -> float | None:
    """Kendall's tau-b between ratings and expected levels, -1 to 1 (``scipy.stats.kendalltau``).

    Refused ratings (None) are left out; None when fewer than two are left. Ratings that are all equal order
    nothing: 0, where the formula is 0 / 0.
    """
    pairs = [(rating, level) for rating, level in zip(ratings, expected, strict=True) if rating is not None]
    if len(pairs) < 2:
        return None
    found = float(sps.kendalltau(*zip(*pairs, strict=True), variant="b").statistic)
    return 0.0 if math.isnan(found) else found


def ceiling() -> float:
    """The tau-b of a perfect order without ties: below 1, because the expected order has ties."""
    levels = sorted(planted.levels().values())
    return tau(range(len(levels)), levels) or 0.0


def agreement(rate: Rating, name: str = "", seed: int = 0) -> Estimate:
    """Rank agreement of a rating with the expected order of the planted answers.

    tau-b within each planted prompt, averaged over prompts, with a BCa bootstrap interval over prompts.
    Prompts with fewer than two ratings are left out: ``n`` says how many were counted.
    """
    found = [value for value in _taus(rate) if value is not None]
    return estimates.estimate(found, name, method="bca", seed=seed)


def contributions(rubric: str) -> dict[str, Estimate]:
    """Part of a rubric of ``scoring.RUBRICS`` -> what it adds to the agreement: tau with it minus without.

    Without a part, the others make the score (:func:`nbhelpers.scoring.rubric.total`). Over prompts, as agreement.
    """
    parts = {
        (text, strong.prompt): scoring.parts_of(rubric, text, strong.prompt, strong.content_type)
        for strong in planted.strong_answers()
        for text in planted.answers(strong).values()
    }

    def taus_without(left_out: str | None) -> Array:
        def rate(text: str, prompt: str, kind: str) -> float:
            found = parts[text, prompt]
            return scoring.total(rubric, {name: found[name] for name in found if name != left_out})

        return np.array(_taus(rate), dtype=float)

    whole = taus_without(None)
    return {
        name: estimates.estimate(np.round(whole - taus_without(name), 12), name, method="bca")
        for name in next(iter(parts.values()))
    }


def overlap(rubric: str) -> tuple[float, float]:
    """The lowest score of a strong planted answer and the highest of any other, over all prompts together."""
    strong: list[float] = []
    other: list[float] = []
    for answer in planted.strong_answers():
        for kind, text in planted.answers(answer).items():
            parts = scoring.parts_of(rubric, text, answer.prompt, answer.content_type)
            (strong if kind == "strong" else other).append(scoring.total(rubric, parts))
    return min(strong), max(other)


def _taus(rate: Rating) -> list[float | None]:
    """tau of each planted prompt."""
    levels, found = planted.levels(), []
    for strong in planted.strong_answers():
        answers = planted.answers(strong)
        ratings = [rate(text, strong.prompt, strong.content_type) for text in answers.values()]
        found.append(tau(ratings, [levels[kind] for kind in answers]))
    return found


# ---- repeats and raters --------------------------------------------------------------------------------


def retest(scores: Iterable[Score], name: str, level: float = 0.95) -> Estimate:
    """Test-retest reliability: Pearson's r between the prompt means of two disjoint sets of repeats.

    The repeats of a prompt go to the two sets in turn. Interval: Fisher's z (``scipy.stats.pearsonr``).
    It is the reliability of a mean over half of the repeats; prompts with one repeat are left out.
    """
    estimates.check_level(level)
    groups: dict[str, list[tuple[int, float]]] = {}
    for score in scores:
        groups.setdefault(score.prompt_id, []).append((score.repeat, score.values[name]))
    runs = [[value for _, value in sorted(rows)] for rows in groups.values() if len(rows) > 1]
    blank = Estimate(name, len(runs), None, None, None, None, level, "pearson")
    if len(runs) < RETEST_MIN:
        reason = f"{len(runs)} prompts with two or more repeats: needs {RETEST_MIN}"
        return replace(blank, reason=reason)
    first, second = (np.array([np.mean(run[start::2]) for run in runs]) for start in (0, 1))
    if np.ptp(first) < 1e-12 or np.ptp(second) < 1e-12:
        return replace(blank, reason="all prompts have the same mean: no correlation")
    found = sps.pearsonr(first, second)
    return _with_interval(replace(blank, mean=float(found.statistic)), found.confidence_interval(level))


def krippendorff(ratings: Iterable[Sequence[float | None]], name: str = "", seed: int = 0) -> Estimate:
    """Krippendorff's alpha at interval level: 1 is full agreement of the raters, 0 what chance would give.

    ratings: one row a text, one entry a rater, None where there is no rating; texts with fewer than two are
    left out. alpha = 1 - D_o / D_e with squared differences: D_o over the pairs within each text, weighted by
    1 / (its ratings - 1), D_e over all pairs of ratings (Krippendorff 2011, Computing Krippendorff's
    Alpha-Reliability). Interval: BCa bootstrap over texts.
    """
    rows = [[value for value in row if value is not None] for row in ratings]
    rows = [row for row in rows if len(row) > 1]
    blank = Estimate(name, len(rows), None, None, None, None, 0.95, "alpha")
    every = np.array([value for row in rows for value in row])
    if refused := estimates.unusable(every, "ratings"):
        return replace(blank, reason=refused)
    if np.ptp(every) < 1e-12:
        return replace(blank, reason="all ratings are equal: alpha is not defined")
    sums = tuple(np.array([_sums(np.array(row) - every.mean()) for row in rows]).T)
    point = replace(blank, mean=float(_alpha(*sums)))
    if len(rows) < estimates.BOOTSTRAP_MIN:
        return replace(point, reason=f"n = {len(rows)}: too few texts to resample")
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # NaN ends are answered with a reason
        rng = np.random.default_rng(seed)
        found = sps.bootstrap(sums, _alpha, paired=True, n_resamples=RESAMPLES, method="BCa", rng=rng)
    return _with_interval(point, found.confidence_interval)


def _sums(row: Array) -> tuple[float, float, float, float]:
    """Of one text's m ratings: m, its share of D_o, sum, sum of squares.

    The sum of (a - b)^2 over ordered pairs of m ratings is 2 m times their sum of squares about the mean.
    """
    m = len(row)
    return m, 2 * m * float(np.sum((row - row.mean()) ** 2)) / (m - 1), float(row.sum()), float(row @ row)


def _alpha(m: Array, within: Array, total: Array, square: Array, axis: int = -1) -> Array:
    n = m.sum(axis)
    expected = 2 * (square.sum(axis) - total.sum(axis) ** 2 / n) / (n - 1)
    return 1 - within.sum(axis) / n / expected


def _with_interval(point: Estimate, ends: Any) -> Estimate:
    if point.mean is None or not ends.low < ends.high:
        return replace(point, reason="at its limit or degenerate: no interval")
    return replace(point, low=float(ends.low), high=float(ends.high))
