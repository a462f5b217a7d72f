"""Estimates of one model: means, proportions and percentiles with error bars.

The unit of analysis is the prompt: its repeats are averaged first (``by_prompt``). Deviations have ddof = 1.
Too little or unusable data is a result with a ``reason``, never an interval of width zero. Sums are exactly
rounded (``math.fsum``), so the order of the values never changes a result. How far each interval keeps its
promise: ``data/calibration.csv``, made by ``tools/calibrate.py``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy import stats as sps

from nbhelpers.records import Estimate, LabError, Score

Array = NDArray[np.float64]

BOOTSTRAP_MIN = 5  # below this the ends of a bootstrap interval are little more than the sample's extremes
RESAMPLES = 9999  # of the bootstrap
HUGE = 1e100  # beyond it squares overflow, below 1 / HUGE they vanish; no score or latency comes near


def estimate(
    values: Iterable[float], name: str = "", level: float = 0.95, method: str = "t", seed: int = 0
) -> Estimate:
    """The mean of ``values`` with a confidence interval.

    "t" is Student's: mean +- t(n-1) * sd / sqrt(n). "bca" is the bias-corrected and accelerated bootstrap
    (Efron 1987), "bootstrap-t" resamples Student's t (Efron & Tibshirani 1993, chapter 12); both are seeded
    and need ``BOOTSTRAP_MIN`` values. Simulated coverage at n = 15: normal scores t 95%, bca 92,
    bootstrap-t 95; ceilinged 94, 93, 97; skewed like latencies 92, 90, 94. Use t for scores, bootstrap-t for
    skewed values. Raises LabError for a level outside (0, 1) or an unknown method.
    """
    check_level(level)
    if method not in ("t", "bca", "bootstrap-t"):
        raise LabError(f'Interval method {method!r} is unknown: use "t" or "bca" or "bootstrap-t".')
    x = sorted_array(values)
    found = Estimate(name, len(x), None, None, None, None, level, method, unusable(x))
    if found.reason:
        return found
    mean, sd = mean_sd(x)
    found = replace(found, mean=mean, sd=sd, reason=no_interval(x))
    if found.reason or sd is None:
        return found
    if method == "t":
        low, high = t_interval(mean, sd, len(x), level)
    elif len(x) < BOOTSTRAP_MIN:
        few = f"n = {len(x)}: too few values to resample (the bootstrap starts at {BOOTSTRAP_MIN})"
        return replace(found, reason=few)
    else:
        ends = (_bca if method == "bca" else _bootstrap_t)((x - mean) / sd, level, seed)
        low, high = (mean + sd * float(end) for end in ends)
    if not (low < high and math.isfinite(high - low)):  # also when they are NaN
        return replace(found, reason="the bootstrap is degenerate on these values: no interval")
    return replace(found, low=low, high=high)


def _bca(z: Array, level: float, seed: int) -> tuple[float, float]:
    """BCa ends for standardised values; rounded means keep ties ties, which the bias correction counts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sps.DegenerateDataWarning)  # NaN ends are answered with a reason
        ends = sps.bootstrap(
            (z,),
            lambda rows, axis: np.round(np.mean(rows, axis=axis), 12),
            confidence_level=level,
            n_resamples=RESAMPLES,
            method="BCa",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    return ends.low, ends.high


def _bootstrap_t(z: Array, level: float, seed: int) -> tuple[float, float]:
    """Bootstrap-t ends for standardised values; resamples without spread count as t = +-inf."""
    rows = np.random.default_rng(seed).choice(z, size=(RESAMPLES, len(z)))
    means, spread = np.round(rows.mean(axis=1), 12), rows.std(axis=1, ddof=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(spread > 1e-9, means / spread, np.copysign(np.inf, means))
        low, high = np.quantile(t, [(1 - level) / 2, (1 + level) / 2])
    return -high, -low


def t_interval(mean: float, sd: float, n: int, level: float) -> tuple[float, float]:
    """mean -+ t(n-1) * sd / sqrt(n), Student's interval for n >= 2."""
    half = float(sps.t.isf((1 - level) / 2, n - 1)) * sd / math.sqrt(n)
    return mean - half, mean + half


def grouped(scores: Iterable[Score], name: str) -> dict[str, list[float]]:
    """Prompt id -> the scores ``name`` of its repeats, by first appearance; failed samples have 0.

    Raises LabError when a row has no such score.
    """
    groups: dict[str, list[float]] = {}
    for score in scores:
        if name not in score.values:
            known = ", ".join(sorted(score.values)) or "none"
            raise LabError(f"Prompt {score.prompt_id} has no score {name!r}: it has {known}.")
        groups.setdefault(score.prompt_id, []).append(score.values[name])
    return groups


def by_prompt(scores: Iterable[Score], name: str) -> dict[str, float]:
    """Prompt id -> mean of score ``name`` over the repeats. LabError as ``grouped``."""
    return {prompt: float(np.mean(sorted(values))) for prompt, values in grouped(scores, name).items()}


def wilson(successes: int, n: int, level: float = 0.95, name: str = "") -> Estimate:
    """A proportion (``mean``, 0..1) with Wilson's score interval (1927), which has a width at 0 and n of n.

    It covers 93.7 to 98.3% for true rates of 0.5, 0.8 and 0.95 at n = 15 to 60. Raises LabError for
    impossible counts.
    """
    check_level(level)
    if not 0 <= successes <= n:
        raise LabError(f"{successes} successes of {n} is impossible: give 0 <= successes <= n.")
    if n == 0:
        return Estimate(name, 0, None, None, None, None, level, "wilson", "no data")
    ends = sps.binomtest(successes, n).proportion_ci(level, method="wilson")
    return Estimate(name, n, successes / n, None, float(ends.low), float(ends.high), level, "wilson")


def percentile_estimate(
    values: Iterable[float],
    q: float,
    level: float = 0.95,
    name: str = "",
    method: str = "order",
    seed: int = 0,
) -> Estimate:
    """The q-th percentile (q in percent; carried in ``mean``) with a distribution-free interval.

    The point needs 1 / (1 - q/100) values, so that one is expected beyond it: 20 for p95, 100 for p99.
    "order" runs between order statistics (``scipy.stats.quantile_test``), keeps its level and needs 6 values
    for p50, 72 for p95. "bootstrap" is the seeded percentile bootstrap (Efron 1979): it covers 91 to 94% for
    p50 at n = 5 to 60, but for p95 64% at n = 20, 82 at 60 and 94 at 200 (simulated, skewed values): what was
    never drawn cannot be drawn again. Raises LabError unless 1 <= q <= 99.9.
    """
    check_level(level)
    if not 1 <= q <= 99.9:
        raise LabError(f"Percentile {q} is outside 1..99.9: write 95, not 0.95.")
    if method not in ("order", "bootstrap"):
        raise LabError(f'Interval method {method!r} is unknown: use "order" or "bootstrap".')
    x = sorted_array(values)
    n, label, tail = len(x), f"p{q:g}", min(q, 100 - q) / 100
    found = Estimate(name, n, None, None, None, None, level, f"{label}, {method}", unusable(x))
    if found.reason:
        return found
    if n < (least := math.ceil(round(1 / tail, 9))):
        return replace(found, reason=f"n = {n}: {label} needs at least {least} values")
    few = f"n = {n}: the bootstrap starts at {BOOTSTRAP_MIN} values"
    reason = no_interval(x) or (few if method == "bootstrap" and n < BOOTSTRAP_MIN else None)
    found = replace(found, mean=float(np.percentile(x, q)), sd=mean_sd(x)[1], reason=reason)
    if reason:
        return found
    if method == "bootstrap":
        draws = np.percentile(np.random.default_rng(seed).choice(x, (RESAMPLES, n)), q, axis=1)
        low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    else:
        low, high = sps.quantile_test(x, p=q / 100).confidence_interval(level)
    if not (math.isfinite(low) and math.isfinite(high)):
        more = math.ceil(math.log((1 - level) / 2) / math.log(1 - tail))
        return replace(found, reason=f"n = {n}: an interval for {label} needs at least {more} values")
    return replace(found, low=float(low), high=float(high))


def sorted_array(values: Iterable[float]) -> Array:
    """The values as floats in ascending order, NaN last."""
    return np.sort(np.fromiter(values, dtype=float))


def unusable(x: Array, what: str = "values") -> str | None:
    """Why nothing can be computed from x, or None."""
    if not len(x):
        return "no data"
    bad = int(np.sum(~(np.abs(x) < HUGE)))  # NaN fails the comparison too
    return f"{bad} of {len(x)} {what} are not finite (NaN or infinite): refused" if bad else None


def no_interval(x: Array, what: str = "values") -> str | None:
    """Why sorted, usable x has a mean but no interval, or None."""
    if len(x) == 1:
        return "n = 1: no interval"
    rounding = max(8 * float(np.finfo(float).eps) * max(abs(x[0]), abs(x[-1])), 1 / HUGE)
    return f"all {len(x)} {what} are equal: no interval" if x[-1] - x[0] <= rounding else None


def mean_sd(x: Array) -> tuple[float, float | None]:
    """Mean and sample standard deviation; None for one value, exactly 0 for equal ones."""
    mean = math.fsum(x) / len(x)
    if len(x) == 1:
        return mean, None
    if no_interval(x):
        return float(x[0]), 0.0
    return mean, math.sqrt(math.fsum((x - mean) ** 2) / (len(x) - 1))


def check_level(level: float) -> None:
    """Raises LabError for a confidence level that is not between 0 and 1."""
    if not 0 < level < 1:
        raise LabError(f"The confidence level is {level}: give a number between 0 and 1, such as 0.95.")
