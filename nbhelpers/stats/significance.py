"""Tests of paired differences: sign flips, against skew, McNemar's for binary outcomes, Holm over many."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import special
from scipy import stats as sps

from nbhelpers.records import LabError
from nbhelpers.stats.estimate import TAILS, Array, mean_sd, sorted_array, unusable

EXACT_FLIPS = 20  # sign patterns are enumerated up to here: 2**19 sums, 4 MB
GRID = 2**16  # above it the differences are rounded to this part of the sum of their sizes


def paired_p(differences: Iterable[float]) -> float:
    """Two-sided p that a mean difference is 0: the larger of ``sign_flip_p`` and a t test that heeds skew."""
    x = sorted_array(differences)
    p, t = sign_flip_p(x), hall_t(x)
    return p if t is None else max(p, 2 * float(special.stdtr(len(x) - 1, -abs(t))))


def hall_t(differences: Iterable[float]) -> float | None:
    """Hall's transformation of t (1992), or None where skew does not oppose the mean.

    Sign flips take differences for symmetric. Where their longer tail lies on the other side of 0 than their
    mean, that raises false alarms (one model all or nothing, the other steady); this t heeds it, as a
    bootstrap-t does. The skewness of a few values is mostly noise: it is shrunk as by James and Stein.
    """
    x = sorted_array(differences)
    n, (mean, sd) = len(x), mean_sd(x)
    if n < 3 or not sd:
        return None
    spread, noise = sd * math.sqrt((n - 1) / n), 6 * n * (n - 1) / (n - 2) / (n + 1) / (n + 3)
    skew, u = math.fsum((x - mean) ** 3) / n / spread**3, mean / sd
    skew = 0.0 if skew**2 <= noise else skew - noise / skew
    if skew * u >= 0:
        return None
    return math.sqrt(n) * (u + skew * u**2 / 3 + skew**2 * u**3 / 27 + skew / (6 * n))


def sign_flip_p(differences: Iterable[float]) -> float:
    """Two-sided p of the sign-flip permutation test (Fisher 1935), over all 2^n sign patterns.

    Up to 20 differences that are not 0 each is added up (scipy's permutation_test samples from 14 on). Above,
    they are counted on a grid: where rounding leaves open whether a sum is as extreme as the observed one, it
    is (but for a chance of 2e-9, Hoeffding 1963), so p is too large by less than 0.002 at 100 normal
    differences. LabError without any or for one not finite.
    """
    x = sorted_array(differences)
    if refused := unusable(x):
        raise LabError(f"No sign-flip test: {refused}.")
    size = np.sort(np.abs(x[x != 0]))  # the null distribution depends on the magnitudes only
    if not len(size):
        return 1.0
    total = math.fsum(size)
    threshold = abs(math.fsum(x)) - 1e-9 * total  # a tie must not be lost to rounding
    if len(size) <= EXACT_FLIPS:
        sums = size[:1]  # one sign stays fixed: the other half of the patterns mirrors this half
        for step in size[1:]:
            sums = np.concatenate([sums + step, sums - step])
        return float(np.mean(np.abs(sums) >= threshold))
    unit = total / GRID
    steps = np.rint(size / unit).astype(int)
    rest = np.abs(size - steps * unit)
    threshold -= min(float(rest.sum()), math.sqrt(42 * float(rest @ rest)))
    chance, top = np.zeros(steps.sum() + 1), 1  # of each sum of the steps whose sign is plus
    chance[0] = 1
    for step in steps:
        half = chance[:top] / 2
        chance[:top] = half
        chance[step : step + top] += half
        top += step
    tail = chance[math.ceil((top - 1 + max(threshold, 0) / unit) / 2) :]
    return min(1.0, 2 * float(tail.sum()))


def mcnemar_p(wins: int, losses: int, n: int) -> float:
    """Two-sided exact unconditional p of McNemar's test: of n prompts one model alone passed so many.

    Outcomes are ordered by mid-p (Fagerland et al. 2013), and p is the chance of one as extreme, the largest
    over all shares of discordant prompts (Suissa & Shuster 1991). Ours, because scipy's Barnard and Boschloo
    tests are for unpaired groups.
    """
    if wins == losses:
        return 1.0
    m = np.arange(n + 1)  # discordant prompts
    mid = _mid_p(min(wins, losses), wins + losses) * (1 + 1e-9)
    most = sps.binom.ppf(mid, m, 0.5)  # losses of m that are as extreme, or one too many
    most -= _mid_p(most, m) > mid
    return min(1.0, float((_discordance(n) @ (2 * sps.binom.cdf(most, m, 0.5))).max()))


def _mid_p(k: Array | int, m: NDArray[np.int_] | int) -> Array:
    return np.asarray(sps.binom.cdf(k, m, 0.5) - sps.binom.pmf(k, m, 0.5) / 2)


@lru_cache(maxsize=4)
def _discordance(n: int) -> Array:
    """Chance of 0 .. n discordant prompts, a row for each of 101 shares from 0 to 1, denser at the ends."""
    shares = np.sin(np.linspace(0, math.pi / 2, 101)) ** 2
    return np.asarray(sps.binom.pmf(np.arange(n + 1), n, shares[:, None]))


def bonett_price(wins: int, losses: int, n: int) -> tuple[float, float]:
    """95% interval of a paired difference of two rates: Wald's with one win and one loss added (2012)."""
    one, other = (wins + 1) / (n + 2), (losses + 1) / (n + 2)
    half = float(special.ndtri(TAILS[1])) * math.sqrt((one + other - (one - other) ** 2) / (n + 2))
    return max(-1.0, one - other - half), min(1.0, one - other + half)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p values (1979), which scipy lacks."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    steps = np.minimum(1.0, (len(p) - np.arange(len(p))) * p[order])
    return [float(value) for value in np.maximum.accumulate(steps)[np.argsort(order)]]
