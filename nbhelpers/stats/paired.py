"""Two and more models on the same prompts: tests, verdicts, power, and the prompts to plan for."""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy import special
from scipy import stats as sps

from nbhelpers.records import LabError, Record, Verdict
from nbhelpers.stats import estimate
from nbhelpers.stats.estimate import TAILS, Array, mean_sd, no_interval, sorted_array, t_interval, unusable

MOST_PROMPTS = 100_000  # more prompts than this is the same as "never"
EXACT_FLIPS = 20  # sign patterns are enumerated up to here: 2**19 sums, 4 MB
GRID = 2**16  # above it the differences are rounded to this part of the sum of their sizes
ALPHA, POWER = 0.05, 0.8  # of tests, and what a needed number of prompts is planned for
EVERY_PAIR = 50  # models: of more, not every pair is compared (``pairs_of``), nor all drawn
GROUPS = 10  # of so many models, whose best are compared with those below
Scores = dict[str, float]  # prompt id -> mean score
P = Callable[[Array], float]
Look = Callable[["Comparison"], "Comparison"]


@dataclass(frozen=True)
class Comparison(Record):
    """Two models on the same prompts; difference is mean(a) - mean(b)."""

    __pydantic_config__ = Record.__pydantic_config__ | {"extra": "ignore"}  # older ones hold Hedges' g
    a: str
    b: str
    n: int
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None  # ``paired_p``; of a binary outcome ``mcnemar_p``
    p_holm: float | None = None  # over all pairs of the run
    verdict: Verdict = "cannot tell"
    margin: float = 0.5  # equivalence margin
    prompts_needed: int | None = None  # planned from the margin, whatever the difference seen (``planned``)
    reason: str | None = None
    prompts_low: int | None = None  # 95% interval of prompts_needed, from that of the spread
    prompts_high: int | None = None
    rated: int | None = None  # prompts with readers' ratings; None: by the score alone
    unit: str = "points"  # of the difference and the margin
    items: str = "prompts"  # what n counts
    higher: bool = True  # is better


def compare_two(a: Scores, b: Scores, one: str = "a", other: str = "b", margin: float = 0.5) -> Comparison:
    """``compare_all`` for two models."""
    return compare_all({one: a, other: b}, margin)[0]


def compare_all(per_model: dict[str, Scores], margin: float = 0.5) -> tuple[Comparison, ...]:
    """Compare models on the same prompts, in the pairs that ``pairs_of`` names.

    Interval: Student t on the differences; p: ``paired_p``. Where the scores of both models are two whole
    numbers (0 and 1), a binary outcome: ``bonett_price`` and ``mcnemar_p``. The verdict, in this order, with
    alpha = 5%:
    1. "tied": the whole interval lies inside +-margin, significant or not (two one-sided tests at 2.5% each).
    2. "better" / "worse" (a than b): the interval excludes 0 and p_holm < alpha.
    3. "cannot tell", with the prompts to plan for the margin or with a ``reason``.

    Differences that are all equal have no interval. The difference stands in for it, and exact tests decide,
    against 0 and against the margins: their p is 2^(1-n), so below six prompts nothing can be told.
    """
    return judged(measured(per_model, margin), math.comb(len(per_model), 2))


def measured(
    models: dict[str, Scores], margin: float, tests: int = 0, p_of: P | None = None, look: Look | None = None
) -> list[Comparison]:
    """The numbers of ``pairs_of`` the models, before the verdict; planned for so many tests (default: all).

    p_of: of differences that are not all equal, where no pair is binary; default ``paired_p``. look: puts
    what holds at every look in the place of p and interval.
    """
    every = tests or math.comb(len(models), 2)
    given = margin, every, p_of or paired_p, look or (lambda c: c)
    return pairs_of([*models], lambda a, b: _measured(a, b, models[a], models[b], *given), every)


def pairs_of(models: Sequence[str], pair: Callable[[str, str], Comparison], tests: int) -> list[Comparison]:
    """Every pair; of more than ``EVERY_PAIR`` models the first, which is the best, with each other one.

    Then the first of those told apart from it with the others of these, and so on. p is corrected for every
    pair (``tests``): it does not matter that the same data say who is first.
    """
    if len(models) <= EVERY_PAIR:
        return [pair(a, b) for a, b in combinations(models, 2)]
    found, left = list[Comparison](), list(models)
    for _ in range(GROUPS):
        own = [pair(left[0], other) for other in left[1:]]
        left = [c.b for c in judged(own, tests) if c.verdict in ("better", "worse")] or left[:1]
        found += own
    return found


def _measured(
    one: str, other: str, a: Scores, b: Scores, margin: float, tests: int, p_of: P, look: Look
) -> Comparison:
    common = sorted(a.keys() & b.keys())
    found = Comparison(one, other, len(common), margin=margin)
    if a.keys() != b.keys():
        only = f"{len(a) - len(common)} only in {one}, {len(b) - len(common)} only in {other}"
        return replace(found, reason=f"prompt sets differ: {only}")
    scores = np.array([[a[prompt], b[prompt]] for prompt in common], dtype=float).reshape(-1, 2)
    if refused := unusable(scores.ravel(), "scores"):
        return replace(found, reason=refused)
    x = np.sort(np.round(scores[:, 0] - scores[:, 1], 12))  # a rounding error is no difference
    n, (mean, sd) = len(x), mean_sd(x)
    found = replace(found, difference=mean, reason=no_interval(x, "differences"))
    if sd is None:
        return found
    if sd == 0:
        enough = _fewest(ALPHA if abs(mean) < margin else ALPHA / tests)
        return look(replace(found, p=sign_flip_p(x), prompts_needed=enough))
    if span := estimate.binary_span(scores):
        discordant = (int(np.sum(x > 0)), int(np.sum(x < 0)))
        p, ends = mcnemar_p(*discordant, n), estimate.bonett_price(*discordant, n)
        low, high = (span * end for end in ends)
        share = sps.binomtest(sum(discordant), n).proportion_ci(method="wilson")
        spreads = span * np.sqrt([sum(discordant) / n, share.low, share.high])
    else:
        p, (low, high) = p_of(x), t_interval(mean, sd, n)
        spreads = sd * np.sqrt([1.0, *((n - 1) / special.chdtri(n - 1, np.array(TAILS)))])
    found = look(replace(found, p=p, low=low, high=high))
    if judged([found], tests)[0].verdict != "cannot tell":  # nor will it be, by a smaller p
        return found
    needed, fewest, most = (planned(float(spread), margin, tests) for spread in spreads)
    return replace(found, prompts_needed=needed, prompts_low=fewest, prompts_high=most)


def judged(found: Sequence[Comparison], tests: int = 0) -> tuple[Comparison, ...]:
    """Add verdicts, and p by Holm or, of a part of so many tests (``pairs_of``), by Bonferroni over all."""
    p = [c.p for c in found if c.p is not None]
    adjusted = iter(holm(p) if tests <= len(found) else [min(1.0, tests * own) for own in p])
    return tuple(c if c.p is None else _judged(c, next(adjusted)) for c in found)


def _judged(c: Comparison, p_holm: float) -> Comparison:
    c = replace(c, p_holm=p_holm)
    low, high = ((c.difference or 0.0) if end is None else end for end in (c.low, c.high))
    settled = replace(c, prompts_needed=None, prompts_low=None, prompts_high=None)
    apart, inside = low > 0 or high < 0, -c.margin < low and high < c.margin
    significant = apart and p_holm < ALPHA
    if inside and (c.low is not None or c.n >= _fewest(ALPHA)):
        small = f"the difference is significant, but inside ±{c.margin:g}: too small to matter"
        return replace(settled, verdict="tied", reason=small if significant else c.reason)
    if significant:
        return replace(settled, verdict="better" if (low > 0) == c.higher else "worse")
    reason = f"the interval holds 0 and reaches outside ±{c.margin:g}"
    if apart:
        reason = f"the interval excludes 0, but the adjusted p of {p_holm:.3f} is not below {ALPHA:g}"
    return replace(c, reason=c.reason or reason)


def _fewest(alpha: float) -> int:
    """The fewest prompts at which sign flips can reach p < alpha: p is never below 2^(1-n)."""
    return math.floor(1 - math.log2(alpha)) + 1


def power(difference: float, sd: float, n: int, alpha: float = ALPHA) -> float:
    """Power of the two-sided paired t test with n > 1 pairs, exact (noncentral t, ``scipy.special``)."""
    shift, df = abs(difference) / sd * math.sqrt(n), n - 1
    critical = special.stdtrit(df, 1 - alpha / 2)
    # 200 times faster than sps.nct; NaN where the probability is too small to matter.
    below, far = np.nan_to_num(special.nctdtr(df, shift, np.array([critical, -critical])))
    return float(1 - below + far)


def prompts_needed(difference: float, sd: float, alpha: float = ALPHA, wanted: float = POWER) -> int | None:
    """Smallest n >= 2 with the wanted power of a paired t test; None: no number up to ``MOST_PROMPTS``."""
    if difference == 0 or sd <= 0:
        return None
    counts = range(2, MOST_PROMPTS + 1)
    place = bisect_left(counts, True, key=lambda n: power(difference, sd, n, alpha) >= wanted)
    return counts[place] if place < len(counts) else None


def planned(sd: float, margin: float, tests: int = 1) -> int | None:
    """Prompts at which equal models are called tied and models that differ by the margin are told apart.

    Both with 80% power. The interval of equal models crosses a border of the margin as often as a test misses
    a difference of the margin, and there are two; models are told apart at the first step of Holm's over so
    many tests. None: more than ``MOST_PROMPTS``, or nothing to plan with.
    """
    tied = prompts_needed(margin, sd, wanted=1 - (1 - POWER) / 2)
    apart = prompts_needed(margin, sd, ALPHA / tests)
    return None if tied is None or apart is None else max(tied, apart, _fewest(ALPHA / tests))


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
    apart = x - mean  # multiplied: numpy rounds a power by its place in the array
    skew, u = math.fsum(apart * apart * apart) / n / spread**3, mean / sd
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
    left = int(steps.sum())
    chance, low, top = np.zeros(left + 1), 0, 1  # of each sum of the steps whose sign is plus
    first = math.ceil((left + max(threshold, 0) / unit) / 2)
    chance[0] = 1
    for step in steps:
        chance[low:top] /= 2
        chance[low + step : top + step] += chance[low:top]
        top, left = top + step, left - step
        low = max(0, first - left)  # what lies below cannot come to ``first`` any more
    return min(1.0, 2 * float(chance[first:].sum()))


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


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p values (1979), which scipy lacks."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    steps = np.minimum(1.0, (len(p) - np.arange(len(p))) * p[order])
    return [float(value) for value in np.maximum.accumulate(steps)[np.argsort(order)]]
