"""Estimates with 95% intervals: means, percentiles, and how far raters agree.

The unit is the prompt: its repeats are averaged first (``by_prompt``). Too little or unusable data is a
result with a ``reason``, never an interval of width zero. Sums are exactly rounded (``math.fsum``): the order
of the values changes nothing. How far each interval keeps its promise: ``data/calibration.csv``
(``tools/calibrate``).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats as sps

from nbhelpers.records import Estimate, LabError, Score

Array = NDArray[np.float64]

LEVEL = 0.95  # of every interval
TAILS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
BOOTSTRAP_MIN = 5  # below this a bootstrap interval is little more than the sample's extremes
RESAMPLES, ALPHA_RESAMPLES = 9999, 2000  # of the bootstrap
HUGE = 1e100  # beyond it squares overflow, below 1 / HUGE they vanish; no score or latency comes near


Method = Literal["t", "bootstrap-t", "wilson"]


def estimate(values: Iterable[float], name: str = "", method: Method = "t") -> Estimate:
    """The mean of ``values`` with a 95% interval.

    "t", for scores: mean +- t(n-1) * sd / sqrt(n). "bootstrap-t", for skewed values as latencies: resamples
    Student's t (Efron & Tibshirani 1993, chapter 12) with a fixed seed and needs ``BOOTSTRAP_MIN`` values.
    "wilson", for rates: outcomes of 0 and 1, or one share a prompt of its repeats; LabError outside [0, 1].
    """
    x = sorted_array(values)
    if refused := unusable(x):
        return Estimate(name, len(x), None, None, None, None, LEVEL, method, refused)
    mean, sd = mean_sd(x)
    if method == "wilson":
        if x[0] < 0 or x[-1] > 1:
            raise LabError(f"{name or 'A rate'} has values outside 0 to 1: give shares of what passed.")
        low, high = _wilson(x, mean, sd or 0.0)
        return Estimate(name, len(x), mean, sd, low, high, LEVEL, method)
    reason = no_interval(x)
    if method != "t" and len(x) < BOOTSTRAP_MIN:
        reason = reason or too_few(len(x), "values")
    found = Estimate(name, len(x), mean, sd, None, None, LEVEL, method, reason)
    if reason or not sd:
        return found
    low, high = t_interval(mean, sd, len(x)) if method == "t" else _bootstrap_t(x, mean, sd)
    if not (low < high and math.isfinite(high - low)):  # also when they are NaN
        return replace(found, reason="the bootstrap is degenerate on these values: no interval")
    return replace(found, low=low, high=high)


def _bootstrap_t(x: Array, mean: float, sd: float) -> tuple[float, float]:
    """The ends of the bootstrap-t interval; resamples without spread count as t = +-inf."""
    rows = np.random.default_rng(0).choice((x - mean) / sd, size=(RESAMPLES, len(x)))
    means, spread = np.round(rows.mean(axis=1), 12), rows.std(axis=1, ddof=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(spread > 1e-9, means / spread, np.copysign(np.inf, means))
        low, high = np.quantile(t, TAILS)
    return mean + sd * float(-high), mean + sd * float(-low)


def _wilson(x: Array, mean: float, sd: float) -> tuple[float, float]:
    """Wilson's score interval (1927) of the mean of shares, one a prompt.

    Shares of repeats are clustered: n becomes the number of independent outcomes with the same standard
    error, and the quantile is t with one degree of freedom a prompt but one (after Korn & Graubard 1998).
    Outcomes of 0 and 1 give Wilson's own interval.
    """
    n, chance = float(len(x)), mean * (1 - mean)
    single = bool(np.all((x == 0) | (x == 1)))
    if not single and sd > 0:
        n = chance * n**2 / (sd**2 * (n - 1))
    z = float(sps.norm.isf(TAILS[0]) if single or len(x) == 1 else sps.t.isf(TAILS[0], len(x) - 1))
    centre, half = mean + z**2 / (2 * n), z * math.sqrt(chance / n + z**2 / (4 * n**2))
    low, high = ((centre + side * half) / (1 + z**2 / n) for side in (-1, 1))
    return max(0.0, min(low, mean)), min(1.0, max(high, mean))  # rounding


def pass_at_k(passed: Mapping[str, Sequence[bool]], k: int) -> Estimate:
    """Chance that at least one of k texts of a prompt passes, with Wilson's clustered interval over prompts.

    passed: prompt -> whether each of its n texts passed. A prompt's share is 1 - C(n - c, k) / C(n, k) with c
    of n passed, which is unbiased (Chen et al. 2021). LabError for a prompt with fewer than k texts.
    """
    for prompt, found in passed.items():
        if not 1 <= k <= len(found):
            raise LabError(f"pass@{k} needs k from 1 to the texts of a prompt: {prompt} has {len(found)}.")
    failed = ((len(found), len(found) - sum(map(bool, found))) for found in passed.values())
    return estimate((1 - math.comb(bad, k) / math.comb(n, k) for n, bad in failed), f"pass@{k}", "wilson")


def t_interval(mean: float, sd: float, n: int) -> tuple[float, float]:
    """mean -+ t(n-1) * sd / sqrt(n), Student's interval for n >= 2."""
    half = float(sps.t.isf(TAILS[0], n - 1)) * sd / math.sqrt(n)
    return mean - half, mean + half


def percentile_estimate(values: Iterable[float], q: float, name: str = "") -> Estimate:
    """The q-th percentile (q in percent; carried in ``mean``) with a distribution-free 95% interval.

    The point needs 1 / (1 - q/100) values, so that one is expected beyond it: 20 for p95. The median's
    interval is the percentile bootstrap (Efron 1979). In the tails it runs between order statistics: 72
    values for p95.
    """
    x, tail, label = sorted_array(values), min(q, 100 - q) / 100, f"p{q:g}"
    n, least, method = (
        len(x),
        math.ceil(round(1 / tail, 9)),
        f"{label}, {'bootstrap' if q == 50 else 'order'}",
    )
    reason = unusable(x) or (f"n = {n}: {label} needs at least {least} values" if n < least else None)
    if reason:
        return Estimate(name, n, None, None, None, None, LEVEL, method, reason)
    reason = no_interval(x) or (too_few(n, "values") if q == 50 and n < BOOTSTRAP_MIN else None)
    found = Estimate(name, n, float(np.percentile(x, q)), mean_sd(x)[1], None, None, LEVEL, method, reason)
    if reason:
        return found
    if q == 50:
        draws = np.percentile(np.random.default_rng(0).choice(x, (RESAMPLES, n)), q, axis=1)
        low, high = np.quantile(draws, TAILS)
    else:
        low, high = sps.quantile_test(x, p=q / 100).confidence_interval(LEVEL)
    if not math.isfinite(high - low):
        more = math.ceil(math.log(TAILS[0]) / math.log(1 - tail))
        return replace(found, reason=f"n = {n}: an interval for {label} needs at least {more} values")
    return replace(found, low=float(low), high=float(high))


def krippendorff(ratings: Iterable[Sequence[float | None]], name: str = "") -> Estimate:
    """Krippendorff's alpha at interval level: 1 is full agreement of the raters, 0 what chance would give.

    ratings: one row a text, one entry a rater, None where there is no rating; texts with fewer than two are
    left out. alpha = 1 - D_o / D_e with squared differences: D_o over the pairs within each text, weighted by
    1 / (its ratings - 1), D_e over all pairs (Krippendorff 2011, Computing Krippendorff's Alpha-Reliability).
    Ours, because no library at hand gives it an interval: BCa bootstrap over texts.
    """
    rows = [np.array([value for value in row if value is not None]) for row in ratings]
    rows = [row for row in rows if len(row) > 1]
    found = Estimate(name, len(rows), None, None, None, None, 0.95, "alpha")
    every = np.concatenate(rows) if rows else np.array([])
    if refused := unusable(every, "ratings"):
        return replace(found, reason=refused)
    if np.ptp(every) < 1e-12:
        return replace(found, reason="all ratings are equal: alpha is not defined")
    sums = tuple(np.array([_sums(row - every.mean()) for row in rows]).T)
    found = replace(found, mean=float(_alpha(*sums)))
    if len(rows) < BOOTSTRAP_MIN:
        return replace(found, reason=f"n = {len(rows)}: too few texts to resample")
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # NaN ends are answered with a reason
        rng = np.random.default_rng(0)
        drawn = sps.bootstrap(sums, _alpha, paired=True, n_resamples=ALPHA_RESAMPLES, method="BCa", rng=rng)
    low, high = map(float, drawn.confidence_interval)
    if not low < high:
        return replace(found, reason="at its limit or degenerate: no interval")
    return replace(found, low=low, high=high)


def _sums(row: Array) -> tuple[float, float, float, float]:
    """Of one text's m ratings: m, its share of D_o (m times twice the variance), sum, sum of squares."""
    m = len(row)
    return m, 2 * m * float(np.sum((row - row.mean()) ** 2)) / (m - 1), float(row.sum()), float(row @ row)


def _alpha(m: Array, within: Array, total: Array, square: Array, axis: int = -1) -> Array:
    n = m.sum(axis)
    expected = 2 * (square.sum(axis) - total.sum(axis) ** 2 / n) / (n - 1)
    return 1 - within.sum(axis) / n / expected


def grouped(scores: Iterable[Score], name: str) -> dict[str, list[float]]:
    """Prompt id -> the scores ``name`` of its repeats, by first appearance. LabError for a row without it.

    Rows to which no rubric applies are in no group: a prompt without any other has none.
    """
    groups: dict[str, list[float]] = {}
    for score in (score for score in scores if score.reason is None):
        if name not in score.values:
            known = ", ".join(sorted(score.values)) or "none"
            raise LabError(f"Prompt {score.prompt_id} has no score {name!r}: it has {known}.")
        groups.setdefault(score.prompt_id, []).append(score.values[name])
    return groups


def by_prompt(scores: Iterable[Score], name: str) -> dict[str, float]:
    """Prompt id -> mean of score ``name`` over the repeats. LabError as ``grouped``."""
    return {prompt: float(np.mean(sorted(values))) for prompt, values in grouped(scores, name).items()}


def sorted_array(values: Iterable[float]) -> Array:
    """The values as floats in ascending order, NaN last."""
    return np.sort(np.fromiter(values, dtype=float))


def unusable(x: Array, what: str = "values") -> str | None:
    """Why nothing can be computed from x, or None."""
    if not len(x):
        return "no data"
    bad = int(np.sum(~(np.abs(x) < HUGE)))  # NaN too
    return f"{bad} of {len(x)} {what} are not finite (NaN or infinite): refused" if bad else None


def too_few(n: int, what: str) -> str:
    return f"n = {n}: too few {what} to resample (the bootstrap starts at {BOOTSTRAP_MIN})"


def no_interval(x: Array, what: str = "values") -> str | None:
    """Why sorted, usable x has a mean but no interval, or None."""
    if len(x) == 1:
        return "n = 1: no interval"
    rounding = max(8 * float(np.finfo(float).eps) * max(abs(x[0]), abs(x[-1])), 1 / HUGE)
    return f"all {len(x)} {what} are equal: no interval" if x[-1] - x[0] <= rounding else None


def mean_sd(x: Array) -> tuple[float, float | None]:
    """Mean and sample standard deviation; None for one value, exactly 0 for equal ones."""
    if no_interval(x):
        return float(x[0]), None if len(x) == 1 else 0.0
    mean = math.fsum(x) / len(x)
    return mean, math.sqrt(math.fsum((x - mean) ** 2) / (len(x) - 1))
