"""How far raters agree, with a 95% interval."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from scipy import stats as sps

from nbhelpers.records import Estimate
from nbhelpers.stats.estimate import BOOTSTRAP_MIN, Array, unusable

RESAMPLES = 2000  # of the bootstrap


def krippendorff(ratings: Iterable[Sequence[float | None]], name: str = "") -> Estimate:
    """Krippendorff's alpha at interval level: 1 is full agreement of the raters, 0 what chance would give.

    ratings: one row a text, one entry a rater, None where there is no rating; texts with fewer than two are
    left out. alpha = 1 - D_o / D_e with squared differences: D_o over the pairs within each text, weighted by
    1 / (its ratings - 1), D_e over all pairs (Krippendorff 2011). Ours, because no library at hand gives it
    an interval: BCa bootstrap over texts.
    """
    rows = [np.array([value for value in row if value is not None]) for row in ratings]
    rows = [row for row in rows if len(row) > 1]
    found = Estimate(name, len(rows), method="alpha")
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
        drawn = sps.bootstrap(sums, _alpha, paired=True, n_resamples=RESAMPLES, method="BCa", rng=rng)
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
