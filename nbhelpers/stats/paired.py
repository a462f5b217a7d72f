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

from nbhelpers.records import LabError, Lenient, Verdict
from nbhelpers.stats import estimate
from nbhelpers.stats.estimate import TAILS, Array, mean_sd, no_interval, sorted_array, t_interval, unusable

MOST_PROMPTS = 100_000  # more prompts than this is the same as "never"
EXACT_FLIPS = 20  # sign patterns are enumerated up to here: 2**19 sums, 4 MB
GRID = 2**16  # above it the differences are rounded to this part of the sum of their sizes
ALPHA, POWER = 0.05, 0.8  # of tests, and what a needed number of prompts is planned for
EVERY_PAIR = 50  # models: of more, not every pair is compared (``pairs_of``), nor all drawn
GROUPS = 10  # the best model of each is compared with those below, so many times
Scores = dict[str, float]  # prompt id -> mean score
P = Callable[[Array], float]
Look = Callable[["Comparison"], "Comparison"]


@dataclass(frozen=True)
class Comparison(Lenient):
    """Two models on the same prompts; difference is mean(a) - mean(b)."""

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

    Interval: Student t on the differences; p: ``paired_p``. Of scores that are two whole numbers (0 and 1), a
    binary outcome: ``bonett_price`` and ``mcnemar_p``. The verdict, in this order, with alpha = 5%:
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

    p_of: the p of differences that vary, of a pair that is not binary; default ``paired_p``. look: replaces
    p and interval by those that hold at every look.
    """
    tests = tests or math.comb(len(models), 2)
    method = margin, tests, p_of or paired_p, look or (lambda pair: pair)
    return pairs_of([*models], lambda a, b: _pair_statistics(models, a, b, *method), tests)


def pairs_of(models: Sequence[str], pair: Callable[[str, str], Comparison], tests: int) -> list[Comparison]:
    """Every pair; of more than ``EVERY_PAIR`` models the first, which is the best, with each other one.

    Then the first of those told apart from it with the others of these, and so on. p is corrected for every
    pair (``tests``): it does not matter that the same data say who is first.
    """
    if len(models) <= EVERY_PAIR:
        return [pair(a, b) for a, b in combinations(models, 2)]
    pairs, left = list[Comparison](), models
    for _ in range(GROUPS):
        with_best = [pair(left[0], other) for other in left[1:]]
        left = [c.b for c in judged(with_best, tests) if c.verdict in ("better", "worse")] or left[:1]
        pairs += with_best
    return pairs


def _pair_statistics(
    models: dict[str, Scores], a: str, b: str, margin: float, tests: int, p_of: P, look: Look
) -> Comparison:
    of_a, of_b = models[a], models[b]
    common = sorted(of_a.keys() & of_b.keys())
    pair = Comparison(a, b, len(common), margin=margin)
    if of_a.keys() != of_b.keys():
        only = f"{len(of_a) - len(common)} only in {a}, {len(of_b) - len(common)} only in {b}"
        return replace(pair, reason=f"prompt sets differ: {only}")
    scores = np.array([[of_a[prompt], of_b[prompt]] for prompt in common], dtype=float).reshape(-1, 2)
    if reason := unusable(scores.ravel(), "scores"):
        return replace(pair, reason=reason)
    x = np.sort(np.round(scores[:, 0] - scores[:, 1], 12))  # a rounding error is no difference
    n, (mean, sd) = len(x), mean_sd(x)
    pair = replace(pair, difference=mean, reason=no_interval(x, "differences"))
    if sd is None:
        return pair
    if sd == 0:
        enough = _fewest(ALPHA if abs(mean) < margin else ALPHA / tests)
        return look(replace(pair, p=sign_flip_p(x), prompts_needed=enough))
    if span := estimate.binary_span(scores):
        discordant = (int(np.sum(x > 0)), int(np.sum(x < 0)))
        p = mcnemar_p(*discordant, n)
        low, high = (span * end for end in estimate.bonett_price(*discordant, n))
        share = sps.binomtest(sum(discordant), n).proportion_ci(method="wilson")
        sds = span * np.sqrt([sum(discordant) / n, share.low, share.high])
    else:
        p, (low, high) = p_of(x), t_interval(mean, sd, n)
        sds = sd * np.sqrt([1.0, *((n - 1) / special.chdtri(n - 1, np.array(TAILS)))])
    pair = look(replace(pair, p=p, low=low, high=high))
    if judged([pair], tests)[0].verdict != "cannot tell":  # nor will it be, by a smaller p
        return pair
    needed, fewest, most = (planned(float(value), margin, tests) for value in sds)
    return replace(pair, prompts_needed=needed, prompts_low=fewest, prompts_high=most)


def judged(pairs: Sequence[Comparison], tests: int = 0) -> tuple[Comparison, ...]:
    """Add verdicts, and p by Holm or, of a part of so many tests (``pairs_of``), by Bonferroni over all."""
    p_values = [pair.p for pair in pairs if pair.p is not None]
    adjusted = iter(holm(p_values) if tests <= len(pairs) else [min(1.0, tests * p) for p in p_values])
    return tuple(pair if pair.p is None else _with_verdict(pair, next(adjusted)) for pair in pairs)


def _with_verdict(pair: Comparison, p_holm: float) -> Comparison:
    pair = replace(pair, p_holm=p_holm)
    low, high = ((pair.difference or 0.0) if end is None else end for end in (pair.low, pair.high))
    settled = replace(pair, prompts_needed=None, prompts_low=None, prompts_high=None)
    excludes_zero = low > 0 or high < 0
    significant = excludes_zero and p_holm < ALPHA
    if -pair.margin < low and high < pair.margin and (pair.low is not None or pair.n >= _fewest(ALPHA)):
        small = f"the difference is significant, but inside ±{pair.margin:g}: too small to matter"
        return replace(settled, verdict="tied", reason=small if significant else pair.reason)
    if significant:
        return replace(settled, verdict="better" if (low > 0) == pair.higher else "worse")
    reason = f"the interval holds 0 and reaches outside ±{pair.margin:g}"
    if excludes_zero:
        reason = f"the interval excludes 0, but the adjusted p of {p_holm:.3f} is not below {ALPHA:g}"
    return replace(pair, reason=pair.reason or reason)


def _fewest(alpha: float) -> int:
    """The fewest prompts at which sign flips can reach p < alpha: p is never below 2^(1-n)."""
    return math.floor(1 - math.log2(alpha)) + 1


def power(difference: float, sd: float, n: int, alpha: float = ALPHA) -> float:
    """Power of the two-sided paired t test with n > 1 pairs, exact (noncentral t, ``scipy.special``)."""
    noncentrality = abs(difference) / sd * math.sqrt(n)
    critical = special.stdtrit(n - 1, 1 - alpha / 2)
    # 200 times faster than sps.nct; NaN where the probability is too small to matter.
    upper, lower = np.nan_to_num(special.nctdtr(n - 1, noncentrality, np.array([critical, -critical])))
    return float(1 - upper + lower)


def prompts_needed(difference: float, sd: float, alpha: float = ALPHA, wanted: float = POWER) -> int | None:
    """Smallest n >= 2 with the wanted power of a paired t test; None: no number up to ``MOST_PROMPTS``."""
    if difference == 0 or sd <= 0:
        return None
    counts = range(2, MOST_PROMPTS + 1)
    first = bisect_left(counts, True, key=lambda n: power(difference, sd, n, alpha) >= wanted)
    return counts[first] if first < len(counts) else None


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

    Sign flips assume symmetry: a longer tail on the other side of 0 than the mean raises false alarms (one
    model all or nothing, the other steady). This t heeds it, as a bootstrap-t does. The skewness of a few
    values is mostly noise: it is shrunk as by James and Stein.
    """
    x = sorted_array(differences)
    n, (mean, sd) = len(x), mean_sd(x)
    if n < 3 or not sd:
        return None
    centred = x - mean  # multiplied: numpy rounds a power by its place in the array
    skew = math.fsum(centred * centred * centred) / n / (sd * math.sqrt((n - 1) / n)) ** 3
    noise = 6 * n * (n - 1) / (n - 2) / (n + 1) / (n + 3)  # variance of a normal sample's skewness
    skew = 0.0 if skew**2 <= noise else skew - noise / skew
    d = mean / sd
    if skew * d >= 0:
        return None
    return math.sqrt(n) * (d + skew * d**2 / 3 + skew**2 * d**3 / 27 + skew / (6 * n))


def sign_flip_p(differences: Iterable[float]) -> float:
    """Two-sided p of the sign-flip permutation test (Fisher 1935), over all 2^n sign patterns.

    Of up to 20 non-zero differences every pattern is summed (scipy's permutation_test samples from 14 on). Of
    more, sums are counted on a grid: one that rounding leaves open counts as extreme (but for a chance of
    2e-9, Hoeffding 1963), so p is too large by less than 0.002 at 100 normal differences. LabError without
    differences, or for one that is not finite.
    """
    x = sorted_array(differences)
    if reason := unusable(x):
        raise LabError(f"No sign-flip test: {reason}.")
    sizes = np.sort(np.abs(x[x != 0]))  # the null distribution depends on the magnitudes only
    if not len(sizes):
        return 1.0
    total = math.fsum(sizes)
    threshold = abs(math.fsum(x)) - 1e-9 * total  # a tie must not be lost to rounding
    if len(sizes) <= EXACT_FLIPS:
        sums = sizes[:1]  # one sign stays fixed: the other half of the patterns mirrors this half
        for size in sizes[1:]:
            sums = np.concatenate([sums + size, sums - size])
        return float(np.mean(np.abs(sums) >= threshold))
    unit = total / GRID
    steps = np.rint(sizes / unit).astype(int)
    rounding = np.abs(sizes - steps * unit)
    threshold -= min(float(rounding.sum()), math.sqrt(42 * float(rounding @ rounding)))
    pending = int(steps.sum())
    extreme = math.ceil((pending + max(threshold, 0) / unit) / 2)
    chance, low, top = np.zeros(pending + 1), 0, 1  # of each sum of the steps whose sign is plus
    chance[0] = 1
    for step in steps:
        chance[low:top] /= 2
        chance[low + step : top + step] += chance[low:top]
        top, pending = top + step, pending - step
        low = max(0, extreme - pending)  # what lies below cannot come to ``extreme`` any more
    return min(1.0, 2 * float(chance[extreme:].sum()))


def mcnemar_p(wins: int, losses: int, n: int) -> float:
    """Two-sided exact unconditional p of McNemar's test: wins and losses are what one model alone passed.

    Outcomes are ordered by mid-p (Fagerland et al. 2013), and p is the chance of one as extreme, the largest
    over all shares of discordant prompts (Suissa & Shuster 1991). Ours, because scipy's Barnard and Boschloo
    tests are for unpaired groups.
    """
    if wins == losses:
        return 1.0
    m = np.arange(n + 1)  # discordant prompts
    mid_p = _mid_p(min(wins, losses), wins + losses) * (1 + 1e-9)
    most = sps.binom.ppf(mid_p, m, 0.5)  # losses of m that are as extreme, or one too many
    most -= _mid_p(most, m) > mid_p
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
