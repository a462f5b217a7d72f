"""How far raters agree, with a 95% interval."""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from scipy import stats as sps

from nbhelpers.records import Estimate
from nbhelpers.stats.estimate import BOOTSTRAP_MIN, Array, unusable


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
    sums = tuple(np.array([_sums(values - pooled.mean()) for values in texts]).T)
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


def _sums(values: Array) -> tuple[float, float, float, float]:
    """Of one text's m ratings: m, its share of D_o (m times twice the variance), sum, sum of squares."""
    m = len(values)
    within = 2 * m * float(np.sum((values - values.mean()) ** 2)) / (m - 1)
    return m, within, float(values.sum()), float(values @ values)


def _alpha(m: Array, within: Array, total: Array, squares: Array, axis: int = -1) -> Array:
    n = m.sum(axis)
    observed = within.sum(axis) / n
    expected = 2 * (squares.sum(axis) - total.sum(axis) ** 2 / n) / (n - 1)
    return 1 - observed / expected
