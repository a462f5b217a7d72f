"""Two and more models on the same prompts: tests, effect sizes and rank intervals on paired scores.

Differences are first model minus second, one a prompt. Sums are exactly rounded. How far each test
keeps its promise: ``data/calibration.csv``, made by ``tools/calibrate.py``.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy import special
from scipy import stats as sps

from nbhelpers.records import Comparison, LabError, Record, Verdict
from nbhelpers.stats import estimate as estimates
from nbhelpers.stats.estimate import Array

EXACT_FLIPS = 20  # sign patterns are enumerated up to here: 2**19 sums, 4 MB
FLIPS = 99_999  # random sign patterns above EXACT_FLIPS
EXACT_RANKS = 200  # the signed-rank distribution is counted up to here, in about 10 ms
RANK_RESAMPLES = 9999
MOST_PROMPTS = 100_000  # more prompts than this is the same as "never"
POWER = 0.8  # that a needed number of prompts is figured for


@dataclass(frozen=True)
class RankInterval(Record):
    """A model's rank by mean score (1 is best) and the ranks that other prompts could have given it."""

    model: str
    n: int  # prompts
    rank: int | None
    low: int | None
    high: int | None
    level: float = 0.95
    reason: str | None = None


@dataclass(frozen=True)
class TestResult:
    """A test of paired differences; without a ``p`` there is a ``reason``."""

    name: str
    n: int  # differences that count (for signed ranks: those that are not 0)
    statistic: float | None
    p: float | None
    reason: str | None = None

    __test__ = False  # the name is not a test for pytest to collect


def sign_flip_p(differences: Iterable[float], seed: int = 0) -> float:
    """Two-sided p of the sign-flip permutation test (Fisher 1935): is |mean| large if signs are coin tosses?

    Exact over all 2^n sign patterns up to 20 differences that are not 0 (a 0 has no sign to flip);
    above, (hits + 1) / (B + 1) over B = 99,999 random patterns (Phipson & Smyth 2010).
    Raises LabError when there is no difference or one is not finite.
    """
    x = estimates.sorted_array(differences)
    if refused := estimates.unusable(x):
        raise LabError(f"No sign-flip test: {refused}.")
    size = np.sort(np.abs(x[x != 0]))  # the null distribution depends on the magnitudes only
    if not len(size):
        return 1.0
    threshold = abs(math.fsum(x)) - 1e-9 * math.fsum(size)  # a tie must not be lost to rounding
    if len(size) <= EXACT_FLIPS:
        sums = size[:1]  # one sign stays fixed: the other half of the patterns mirrors this half
        for step in size[1:]:
            sums = np.concatenate([sums + step, sums - step])
        return float(np.mean(np.abs(sums) >= threshold))
    rng, hits, left = np.random.default_rng(seed), 0, FLIPS
    block = max(1, 2**20 // len(size))
    while left:
        rows = min(block, left)
        signs = rng.integers(0, 2, size=(rows, len(size)), dtype=np.int8) * 2 - 1
        hits += int(np.sum(np.abs(signs @ size) >= threshold))
        left -= rows
    return (hits + 1) / (FLIPS + 1)


def wilcoxon(differences: Iterable[float]) -> TestResult:
    """Wilcoxon's signed-rank test (1945), two-sided; ``statistic`` is the positive rank sum.

    Differences of 0 are dropped, equal sizes share their mean rank, and the null distribution is counted
    exactly with those ties up to 200 differences; above, ``scipy.stats.wilcoxon`` approximates it.
    It asks whether the differences are symmetric about 0, which is not quite a question about means.
    """
    x = estimates.sorted_array(differences)
    if refused := estimates.unusable(x, "differences"):
        return TestResult("wilcoxon", len(x), None, None, refused)
    x = x[np.abs(x) > estimates.noise(x)]
    if not len(x):
        return TestResult("wilcoxon", 0, None, None, "all differences are 0: nothing to rank")
    ranks = sps.rankdata(np.round(np.abs(x), 12))
    positive = float(ranks[x > 0].sum())
    if len(x) > EXACT_RANKS:
        p = float(sps.wilcoxon(np.sign(x) * ranks, method="approx").pvalue)
    else:
        p = _signed_rank_p(np.rint(2 * ranks).astype(int), round(2 * positive))
    return TestResult("wilcoxon", len(x), positive, p)


def _signed_rank_p(doubled: NDArray[np.int_], positive: int) -> float:
    """P of a rank sum at least this far from its centre; ranks are doubled, so that ties stay integers."""
    share = np.zeros(doubled.sum() + 1)  # share[s]: probability that the positive ranks add up to s
    share[0] = 1.0
    for rank in doubled:
        share /= 2
        share[rank:] += share[:-rank].copy()
    lower = min(positive, len(share) - 1 - positive)
    return float(min(1.0, 2 * share[: lower + 1].sum()))


def hedges_g(mean: float, sd: float, n: int) -> float | None:
    """Hedges' g of n paired differences: J(n-1) * mean / sd, the standardised mean difference d_z.

    J(m) = Gamma(m/2) / (sqrt(m/2) Gamma((m-1)/2)) removes the small-sample bias exactly (Hedges 1981;
    about 1 - 3/(4m - 1)). None below n = 3, where d_z has no expectation, and for sd = 0.
    """
    if n < 3 or sd == 0:
        return None
    m = n - 1
    log_j = special.gammaln(m / 2) - special.gammaln((m - 1) / 2) - math.log(m / 2) / 2
    return float(math.exp(log_j) * mean / sd)


def resample_counts(n: int, resamples: int = RANK_RESAMPLES, seed: int = 0) -> NDArray[np.int_]:
    """How often each of n prompts is drawn in each bootstrap resample, (resamples, n); rows add up to n.

    Made once and given to every metric, it makes the same prompts meet in all of them. Raises LabError for
    n < 1 or resamples < 1.
    """
    if n < 1 or resamples < 1:
        raise LabError(f"Cannot draw {resamples} resamples of {n} prompts: both must be at least 1.")
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)


def rank_intervals(
    per_model: dict[str, dict[str, float]],
    level: float = 0.95,
    seed: int = 0,
    counts: NDArray[np.int_] | None = None,
) -> tuple[RankInterval, ...]:
    """Every model's rank by mean score with a percentile bootstrap interval over prompts, best first.

    ``per_model``: model -> prompt id -> score. Rank is 1 + the number of models with a higher mean, so equal
    models share the better rank. A rank is a whole number, so the interval covers more than its level: the
    true rank of a best model with a lead of a quarter deviation in 97.8% at n = 5, 99.8% at 15
    (``data/calibration.csv``). ``counts`` (prompts in sorted order) from ``resample_counts`` shares the
    resamples between metrics; without it they are drawn from ``seed``. Different prompts, unusable scores or
    fewer than ``estimates.BOOTSTRAP_MIN`` prompts: no interval and a ``reason``.
    Raises LabError for counts of another number of prompts.
    """
    estimates.check_level(level)
    models = list(per_model)
    prompts = sorted(set().union(*per_model.values()))
    n = len(prompts)
    if any(len(scores) != n for scores in per_model.values()):
        return tuple(
            RankInterval(m, len(per_model[m]), None, None, None, level, "prompt sets differ") for m in models
        )
    table = np.array([[per_model[m][p] for p in prompts] for m in models], dtype=float).reshape(
        len(models), n
    )
    if refused := estimates.unusable(table.ravel(), "scores"):
        return tuple(RankInterval(m, n, None, None, None, level, refused) for m in models)
    ranks = _ranks(table.mean(axis=1)[None])[0]
    order = np.argsort(ranks, kind="stable")
    if n < estimates.BOOTSTRAP_MIN:
        reason = f"n = {n}: too few prompts to resample (the bootstrap starts at {estimates.BOOTSTRAP_MIN})"
        return tuple(RankInterval(models[i], n, int(ranks[i]), None, None, level, reason) for i in order)
    drawn = resample_counts(n, seed=seed) if counts is None else counts
    if drawn.shape[1:] != (n,):
        raise LabError(
            f"The resamples have shape {drawn.shape}, but there are {n} prompts: give (resamples, {n})."
        )
    tails = [(1 - level) / 2, (1 + level) / 2]
    low, high = np.quantile(_ranks(drawn @ table.T / n), tails, axis=0, method="inverted_cdf").astype(int)
    return tuple(RankInterval(models[i], n, int(ranks[i]), int(low[i]), int(high[i]), level) for i in order)


def _ranks(means: Array) -> NDArray[np.int_]:
    """Ranks along the last axis, 1 for the highest; sums that differ by rounding only are equal."""
    means = np.round(means, 12)
    return 1 + np.sum(means[..., None, :] > means[..., :, None], axis=-1)


def compare_two(
    a: dict[str, float],
    b: dict[str, float],
    name_a: str = "a",
    name_b: str = "b",
    margin: float = 0.5,
    level: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Compare two models on the same prompts (prompt id -> score); ``difference`` is mean(a - b).

    Interval: Student t on the differences. p: sign-flip permutation (``sign_flip_p``); ``p_holm`` equals it
    until ``compare_all`` adjusts it. Effect size: Hedges' g of paired differences (``hedges_g``).

    Verdict, in this order, with alpha = 1 - level:
    1. "tied": the whole interval lies inside +-margin. The printed 95% interval decides, which is two
       one-sided tests at 2.5% each, stricter than the customary 5% (a 90% interval). A difference that is
       significant but wholly inside the margin is tied too: the margin says what is too small to matter.
    2. "better" / "worse" (a than b): the interval excludes 0 and p_holm < alpha.
    3. "cannot tell", with the prompts that would settle it: the fewer of ``prompts_needed`` and
       ``prompts_to_tie``, both for 80% power at the observed difference.

    Different prompt sets, fewer than two prompts, NaN or infinite scores, or differences that are all equal:
    "cannot tell" with a ``reason``. Raises LabError for a margin that is not above 0 or a bad level.
    """
    return _judged(_measured(a, b, name_a, name_b, margin, level, seed, tests=1), level)


def compare_all(
    per_model: dict[str, dict[str, float]], margin: float = 0.5, seed: int = 0, level: float = 0.95
) -> tuple[Comparison, ...]:
    """``compare_two`` for every pair of models, with Holm's adjustment over all pairs that have a p.

    ``prompts_needed`` is figured at alpha / (number of pairs), the strictest step of Holm's procedure.
    """
    pairs = list(combinations(per_model, 2))
    found = [
        _measured(per_model[a], per_model[b], a, b, margin, level, seed, tests=len(pairs)) for a, b in pairs
    ]
    adjusted = iter(holm([c.p for c in found if c.p is not None]))
    return tuple(_judged(c if c.p is None else replace(c, p_holm=next(adjusted)), level) for c in found)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p values (Holm 1979), in the order given. Raises LabError outside [0, 1]."""
    p = np.asarray(p_values, dtype=float)
    if not np.all((p >= 0) & (p <= 1)):
        raise LabError("Holm's adjustment needs p values between 0 and 1.")
    order = np.argsort(p, kind="stable")
    steps = np.minimum(1.0, (len(p) - np.arange(len(p))) * p[order])
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(steps)
    return [float(value) for value in adjusted]


def power(difference: float, sd: float, n: int, alpha: float = 0.05) -> float:
    """Power of the two-sided paired t test with n pairs, exact (noncentral t, ``scipy.special.nctdtr``).

    Raises LabError for n < 2 or sd <= 0.
    """
    if n < 2 or not sd > 0:
        raise LabError(f"Power needs at least 2 pairs and a deviation above 0, not n = {n}, sd = {sd}.")
    shift, df = abs(difference) / sd * math.sqrt(n), n - 1
    critical = special.stdtrit(df, 1 - alpha / 2)
    near = 1 - special.nctdtr(df, shift, critical)  # 200 times faster than sps.nct, but NaN for huge shifts
    if math.isnan(near):
        near = sps.nct.sf(critical, df, shift)
    far = special.nctdtr(df, shift, -critical)
    return float(near + np.nan_to_num(far))  # NaN where it is too small to matter


def prompts_needed(difference: float, sd: float, alpha: float = 0.05) -> int | None:
    """Smallest n >= 2 at which a paired t test of this difference and sd has 80% power.

    None when the difference or the sd is 0 or when more than ``MOST_PROMPTS`` would be needed.
    """
    if difference == 0 or sd <= 0:
        return None
    return _smallest(lambda n: power(difference, sd, n, alpha) >= POWER)


def prompts_to_tie(difference: float, sd: float, margin: float, alpha: float = 0.05) -> int | None:
    """Smallest n >= 2 at which a 1 - alpha t interval lies inside +-margin with 80% power.

    Power is bounded from below: 1 minus the chances (noncentral t) that the interval crosses either border.
    None when the difference is not inside the margin, when sd is 0, or beyond ``MOST_PROMPTS``.
    """
    rooms = (margin - abs(difference), margin + abs(difference))

    def crossing(n: int) -> float:
        critical = special.stdtrit(n - 1, 1 - alpha / 2)
        shifts = np.array(rooms) / sd * math.sqrt(n)
        return float(np.nansum(special.nctdtr(n - 1, shifts, critical)))  # NaN for huge shifts: never

    if rooms[0] <= 0 or sd <= 0:
        return None
    return _smallest(lambda n: 1 - crossing(n) >= POWER)


def _smallest(enough: Callable[[int], bool]) -> int | None:
    """The smallest n from 2 to MOST_PROMPTS that is enough, for a condition that stays true once it is."""
    counts = range(2, MOST_PROMPTS + 1)
    place = bisect_left(counts, True, key=enough)
    return counts[place] if place < len(counts) else None


def _measured(
    a: dict[str, float],
    b: dict[str, float],
    name_a: str,
    name_b: str,
    margin: float,
    level: float,
    seed: int,
    tests: int,
) -> Comparison:
    """The numbers of a comparison before the verdict; ``tests`` is the size of the family of pairs."""
    estimates.check_level(level)
    if not margin > 0:
        raise LabError(f"The equivalence margin is {margin}: give a number of points above 0.")
    common = sorted(a.keys() & b.keys())
    blank = Comparison(
        name_a, name_b, len(common), None, None, None, None, None, None, "cannot tell", margin, None
    )
    if a.keys() != b.keys():
        only_a, only_b = len(a.keys() - b.keys()), len(b.keys() - a.keys())
        reason = f"prompt sets differ: {only_a} only in {name_a}, {only_b} only in {name_b}"
        return replace(blank, reason=reason)
    scores = np.array([[a[prompt], b[prompt]] for prompt in common], dtype=float).reshape(-1, 2)
    if refused := estimates.unusable(scores.ravel(), "scores"):
        return replace(blank, reason=refused)
    # The rounding error of a subtraction is no difference.
    x = np.sort(np.round(scores[:, 0] - scores[:, 1], 12))
    n, (mean, sd) = len(x), estimates.mean_sd(x)
    found = replace(blank, difference=mean, reason=estimates.no_interval(x, "differences"))
    if sd is None:
        return found
    p = sign_flip_p(x, seed)
    found = replace(found, p=p, p_holm=p)
    if sd == 0:
        return found
    low, high = estimates.t_interval(mean, sd, n, level)
    alpha = _alpha(level) / tests
    apart, tie = prompts_needed(mean, sd, alpha), prompts_to_tie(mean, sd, margin, _alpha(level))
    if apart is not None:  # sign flipping cannot reach p < alpha before 2^(1-n) does
        apart = max(apart, math.floor(1 - math.log2(alpha)) + 1)
    # An open case needs more than n.
    needed = min((max(count, n + 1) for count in (apart, tie) if count is not None), default=None)
    effect = hedges_g(mean, sd, n)
    return replace(found, low=low, high=high, effect_size=effect, prompts_needed=needed)


def _judged(c: Comparison, level: float) -> Comparison:
    """Add the verdict (rules in ``compare_two``) to a measured comparison."""
    if c.low is None or c.high is None or c.p_holm is None:
        return c
    alpha, apart = _alpha(level), c.low > 0 or c.high < 0
    significant = apart and c.p_holm < alpha
    if -c.margin < c.low and c.high < c.margin:
        reason = f"the difference is significant, but inside ±{c.margin:g}: too small to matter"
        return replace(c, verdict="tied", prompts_needed=None, reason=reason if significant else None)
    if significant:
        verdict: Verdict = "better" if c.low > 0 else "worse"
        return replace(c, verdict=verdict, prompts_needed=None)
    if apart:
        reason = f"the interval excludes 0, but the adjusted p of {c.p_holm:.3f} is not below {alpha:g}"
    else:
        reason = f"the interval holds 0 and reaches outside ±{c.margin:g}"
    return replace(c, reason=reason)


def _alpha(level: float) -> float:
    return round(1 - level, 12)
