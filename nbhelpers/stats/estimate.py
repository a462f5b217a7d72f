"""Estimates with 95% intervals: means, medians, a difference of two rates, the agreement of raters.

The unit is the prompt: its repeats are averaged first (``by_prompt``). Too little or unusable data is a
result with a ``reason``, never an interval of width zero. The order of the values changes nothing. How far
each interval keeps its promise: ``data/calibration.csv``.
"""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special
from scipy import stats as sps

from nbhelpers.records import Estimate, LabError, Scale, Score

Array = NDArray[np.float64]

LEVEL = 0.95  # of every interval
TAILS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
BOOTSTRAP_MIN = 5  # below this a bootstrap interval is little more than the sample's extremes
RESAMPLES = 9999  # of the bootstrap
_t_isf = lru_cache(sps.t.isf)  # which takes as long as a pair's other figures together
HUGE = 1e100  # beyond it squares overflow, below 1 / HUGE they vanish


def mean_score(values: Iterable[float], name: str, scale: Scale) -> Estimate:
    """The mean of scores with a 95% interval: Wilson's (1927) where each is 0 or 1, right or wrong."""
    x = list(values)
    share = (scale.low, scale.high) == (0, 1) and set(x) <= {0.0, 1.0}
    return estimate(x, name, "wilson" if share else "t")


def estimate(
    values: Iterable[float], name: str = "", method: Literal["t", "bootstrap-t", "wilson"] = "t"
) -> Estimate:
    """The mean of ``values`` with a 95% interval.

    method: "t", Student's, for scores; "bootstrap-t", which resamples t with a fixed seed (Efron & Tibshirani
    1993, chapter 12), for skewed values as latencies; "wilson" for values that are 0 or 1.
    """
    x = sorted_array(values)
    result = Estimate(name, len(x), method=method, reason=unusable(x))
    if result.reason:
        return result
    mean, sd = mean_sd(x)
    reason = no_interval(x, least=BOOTSTRAP_MIN if method == "bootstrap-t" else 2)
    result = replace(result, mean=mean, sd=sd, reason=reason)
    if method == "wilson" and len(x) > 1:
        wilson = sps.binomtest(int(x.sum()), len(x)).proportion_ci(method="wilson")
        return replace(result, low=float(wilson.low), high=float(wilson.high), reason=None)
    if reason or not sd:
        return result
    low, high = t_interval(mean, sd, len(x)) if method == "t" else _bootstrap_t(x, mean, sd)
    if not (low < high and math.isfinite(high - low)):  # also when they are NaN
        return replace(result, reason="the bootstrap is degenerate on these values: no interval")
    return replace(result, low=low, high=high)


def _bootstrap_t(x: Array, mean: float, sd: float) -> tuple[float, float]:
    """The ends of the bootstrap-t interval; resamples without spread count as t = +-inf."""
    resamples = np.random.default_rng(0).choice((x - mean) / sd, size=(RESAMPLES, len(x)))
    means, sds = np.round(resamples.mean(axis=1), 12), resamples.std(axis=1, ddof=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(sds > 1e-9, means / sds, np.copysign(np.inf, means))
        low, high = np.quantile(t, TAILS)
    return mean + sd * float(-high), mean + sd * float(-low)


def t_interval(mean: float, sd: float, n: int, tail: float = TAILS[0]) -> tuple[float, float]:
    """mean -+ t(n-1) * sd / sqrt(n), Student's interval for n >= 2. tail: the chance beyond either end."""
    half = float(_t_isf(tail, n - 1)) * sd / math.sqrt(n)
    return mean - half, mean + half


def bonett_price(wins: int, losses: int, n: int, upper: float = TAILS[1]) -> tuple[float, float]:
    """95% interval of a paired difference of two rates: Wald's with one win and one loss added (2012).

    upper: the chance that the upper end is not too low; 0.95 for one-sided bounds.
    """
    one, other = (wins + 1) / (n + 2), (losses + 1) / (n + 2)
    half = float(special.ndtri(upper)) * math.sqrt((one + other - (one - other) ** 2) / (n + 2))
    return max(-1.0, one - other - half), min(1.0, one - other + half)


def median_estimate(values: Iterable[float], name: str = "") -> Estimate:
    """The median, carried in ``mean``, with its interval by the percentile bootstrap (Efron 1979)."""
    x = sorted_array(values)
    n = len(x)
    too_few = "n = 1: p50 needs at least 2 values" if n == 1 else None
    result = Estimate(name, n, method="p50, bootstrap", reason=unusable(x) or too_few)
    if result.reason:
        return result
    reason = no_interval(x, least=BOOTSTRAP_MIN)
    result = replace(result, mean=float(np.percentile(x, 50)), sd=mean_sd(x)[1], reason=reason)
    if reason:
        return result
    resamples = np.random.default_rng(0).choice(x, (RESAMPLES, n))
    low, high = np.quantile(np.percentile(resamples, 50, axis=1), TAILS)
    return replace(result, low=float(low), high=float(high))


def grouped(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, list[Any]]:
    """Key -> the values that stand with it, in their order."""
    groups: dict[Any, list[Any]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups


def repeats_of(scores: Iterable[Score], name: str) -> dict[str, list[float]]:
    """Prompt id -> the scores ``name`` of its repeats. A row without it must say why, else LabError."""
    groups: dict[str, list[float]] = {}
    for score in scores:
        if name in score.values:
            groups.setdefault(score.prompt_id, []).append(score.values[name])
        elif score.reason is None:
            scored = ", ".join(sorted(score.values)) or "none"
            raise LabError(f"Prompt {score.prompt_id} has no score {name!r}: it has {scored}.")
    return groups


def by_prompt(scores: Iterable[Score], name: str) -> dict[str, float]:
    """Prompt id -> mean of score ``name`` over the repeats. LabError as ``repeats_of``."""
    return {prompt: float(np.mean(sorted(values))) for prompt, values in repeats_of(scores, name).items()}


def by_unit(scores: Mapping[str, float], units: Mapping[str, str]) -> dict[str, float]:
    """Unit -> mean score of its prompts; a prompt without a unit is one of its own."""
    groups = grouped((units.get(prompt, prompt), score) for prompt, score in scores.items())
    return {unit: float(np.mean(sorted(values))) for unit, values in groups.items()}


def pass_at(right: Sequence[float], k: int) -> float | None:
    """pass@k of a prompt: the chance that k of its n answers hold a right one (1.0), as c of them are.

    1 - C(n - c, k) / C(n, k) is unbiased (Chen et al. 2021). None for fewer than k answers.
    """
    n, wrong = len(right), sum(value != 1 for value in right)
    return 1 - math.comb(wrong, k) / math.comb(n, k) if n >= k else None


def binary_span(scores: Array) -> float:
    """How far apart the two whole numbers are that all of these are; 0.0 for others, as points by chance."""
    levels = np.unique(np.round(scores, 12))
    return float(np.ptp(levels)) if len(levels) == 2 and np.array_equal(levels, levels.round()) else 0.0


def krippendorff(ratings: Iterable[Sequence[float | None]], name: str = "") -> Estimate:
    """Krippendorff's alpha at interval level: 1 is full agreement of the raters, 0 what chance would give.

    ratings: one row a text, one entry a rater, None where there is no rating; texts with fewer than two are
    left out. alpha = 1 - D_o / D_e with squared differences: D_o over the pairs within each text, weighted by
    1 / (its ratings - 1), D_e over all pairs (Krippendorff 2011). The interval is the BCa bootstrap over
    texts; no library at hand has one.
    """
    rated = (np.array([value for value in row if value is not None]) for row in ratings)
    texts = [values for values in rated if len(values) > 1]
    estimate = Estimate(name, len(texts), method="alpha")
    pooled = np.concatenate(texts) if texts else np.array([])
    if refusal := unusable(pooled, "ratings"):
        return replace(estimate, reason=refusal)
    if np.ptp(pooled) < 1e-12:
        return replace(estimate, reason="all ratings are equal: alpha is not defined")
    sums = tuple(np.array([_alpha_sums(values - pooled.mean()) for values in texts]).T)
    estimate = replace(estimate, mean=float(_alpha(*sums)))
    if len(texts) < BOOTSTRAP_MIN:
        return replace(estimate, reason=f"n = {len(texts)}: too few texts to resample")
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # NaN ends are answered with a reason
        rng = np.random.default_rng(0)
        bootstrap = sps.bootstrap(sums, _alpha, paired=True, n_resamples=2000, method="BCa", rng=rng)
    low, high = map(float, bootstrap.confidence_interval)
    if not low < high:
        return replace(estimate, reason="at its limit or degenerate: no interval")
    return replace(estimate, low=low, high=high)


def _alpha_sums(values: Array) -> tuple[float, float, float, float]:
    """Of one text's m ratings: m, its share of D_o (m times twice the variance), sum, sum of squares."""
    m = len(values)
    within = 2 * m * float(np.sum((values - values.mean()) ** 2)) / (m - 1)
    return m, within, float(values.sum()), float(values @ values)


def _alpha(m: Array, within: Array, total: Array, squares: Array, axis: int = -1) -> Array:
    n = m.sum(axis)
    observed = within.sum(axis) / n
    expected = 2 * (squares.sum(axis) - total.sum(axis) ** 2 / n) / (n - 1)
    return 1 - observed / expected


def sorted_array(values: Iterable[float]) -> Array:
    """The values as floats in ascending order, NaN last."""
    return np.sort(np.fromiter(values, dtype=float))


def unusable(x: Array, what: str = "values") -> str | None:
    """Why nothing can be computed from x, or None."""
    if not len(x):
        return "no data"
    bad = int(np.sum(~(np.abs(x) < HUGE)))  # NaN too
    return f"{bad} of {len(x)} {what} are not finite (NaN or infinite): refused" if bad else None


def no_interval(x: Array, what: str = "values", least: int = 2) -> str | None:
    """Why sorted, usable x has a mean but no interval, which takes at least so many values; or None."""
    n = len(x)
    if n == 1:
        return "n = 1: no interval"
    rounding = max(8 * float(np.finfo(float).eps) * max(abs(x[0]), abs(x[-1])), 1 / HUGE)
    if x[-1] - x[0] <= rounding:
        return f"all {n} {what} are equal: no interval"
    return f"n = {n}: too few {what} to resample (the bootstrap starts at {least})" if n < least else None


def mean_sd(x: Array) -> tuple[float, float | None]:
    """Mean and sample standard deviation; None for one value, exactly 0 for equal ones."""
    if no_interval(x):
        return float(x[0]), None if len(x) == 1 else 0.0
    mean = math.fsum(x) / len(x)
    return mean, math.sqrt(math.fsum((x - mean) ** 2) / (len(x) - 1))
