"""Two and more models on the same prompts: effect sizes, verdicts, ranks, and the prompts to plan for.

Differences are first model minus second, one a prompt. How far each test keeps its promise: as ``estimate``.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from scipy import special
from scipy import stats as sps

from nbhelpers.records import Record, Verdict
from nbhelpers.stats import estimate as estimates
from nbhelpers.stats.significance import bonett_price, holm, mcnemar_p, paired_p, sign_flip_p

MOST_PROMPTS = 100_000  # more prompts than this is the same as "never"
ALPHA, POWER = 0.05, 0.8  # of tests, and what a needed number of prompts is planned for
Scores = dict[str, float]  # prompt id -> mean score


@dataclass(frozen=True)
class Comparison(Record):
    """Two models on the same prompts; difference is mean(a) - mean(b)."""

    a: str
    b: str
    n: int
    difference: float | None
    low: float | None
    high: float | None
    p: float | None  # of sign flips, asked against skew too; of a binary outcome, the exact McNemar's
    p_holm: float | None  # over all pairs of the run
    effect_size: float | None  # Hedges g of the paired differences
    verdict: Verdict
    margin: float  # equivalence margin, points
    prompts_needed: int | None  # planned from the margin, whatever the difference seen (``planned``)
    reason: str | None = None
    prompts_low: int | None = None  # 95% interval of prompts_needed, from that of the spread
    prompts_high: int | None = None
    rated: int | None = None  # prompts with readers' ratings; None: by the score alone


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


def compare_two(a: Scores, b: Scores, one: str = "a", other: str = "b", margin: float = 0.5) -> Comparison:
    """``compare_all`` for two models."""
    return compare_all({one: a, other: b}, margin)[0]


def compare_all(per_model: dict[str, Scores], margin: float = 0.5) -> tuple[Comparison, ...]:
    """Compare every pair of models on the same prompts.

    Interval: Student t on the differences; p: ``paired_p``. Where the scores of both models take two values
    in all, a binary outcome: ``bonett_price`` and ``mcnemar_p``. ``p_holm``: Holm's over all pairs that have
    a p. The verdict, in this order, with alpha = 5%:
    1. "tied": the whole interval lies inside +-margin, significant or not (two one-sided tests at 2.5% each).
    2. "better" / "worse" (a than b): the interval excludes 0 and p_holm < alpha.
    3. "cannot tell", with the prompts to plan for the margin (``planned``, at the strictest step of Holm's);
       or with a ``reason``.

    Differences that are all equal have no interval. The difference stands in for it, and exact tests decide,
    against 0 and against the margins: their p is 2^(1-n), so below six prompts nothing can be told.
    """
    pairs = list(combinations(per_model, 2))
    found = [measured(per_model[a], per_model[b], (a, b), margin, len(pairs)) for a, b in pairs]
    adjusted = iter(holm([c.p for c in found if c.p is not None]))
    return tuple(judged(c if c.p is None else replace(c, p_holm=next(adjusted))) for c in found)


def measured(a: Scores, b: Scores, names: tuple[str, str], margin: float, tests: int) -> Comparison:
    """The numbers of a comparison before the verdict; ``tests`` is the number of pairs."""
    common = sorted(a.keys() & b.keys())
    found = Comparison(*names, len(common), None, None, None, None, None, None, "cannot tell", margin, None)
    if a.keys() != b.keys():
        only = f"{len(a) - len(common)} only in {names[0]}, {len(b) - len(common)} only in {names[1]}"
        return replace(found, reason=f"prompt sets differ: {only}")
    scores = np.array([[a[prompt], b[prompt]] for prompt in common], dtype=float).reshape(-1, 2)
    if refused := estimates.unusable(scores.ravel(), "scores"):
        return replace(found, reason=refused)
    # The rounding error of a subtraction is no difference.
    x = np.sort(np.round(scores[:, 0] - scores[:, 1], 12))
    n, (mean, sd) = len(x), estimates.mean_sd(x)
    found = replace(found, difference=mean, reason=estimates.no_interval(x, "differences"))
    if sd is None:
        return found
    if sd == 0:
        enough = _fewest(ALPHA if abs(mean) < margin else ALPHA / tests)
        return replace(found, p=sign_flip_p(x), prompts_needed=enough)
    levels = np.unique(np.round(scores, 12))
    if len(levels) == 2:
        discordant = (int(np.sum(x > 0)), int(np.sum(x < 0)))
        low, high = (float(np.ptp(levels)) * end for end in bonett_price(*discordant, n))
        found = replace(found, p=mcnemar_p(*discordant, n), low=low, high=high)
        share = sps.binomtest(sum(discordant), n).proportion_ci(method="wilson")
        spreads = np.ptp(levels) * np.sqrt([sum(discordant) / n, share.low, share.high])
    else:
        low, high = estimates.t_interval(mean, sd, n)
        found = replace(found, p=paired_p(x), low=low, high=high)
        spreads = sd * np.sqrt([1.0, *((n - 1) / special.chdtri(n - 1, np.array(estimates.TAILS)))])
    needed, fewest, most = (planned(float(spread), margin, tests) for spread in spreads)
    found = replace(found, prompts_needed=needed, prompts_low=fewest, prompts_high=most)
    return replace(found, effect_size=hedges_g(mean, sd, n))


def judged(c: Comparison) -> Comparison:
    """Add the verdict (rules in ``compare_all``) to a measured comparison."""
    if c.difference is None or c.p_holm is None:
        return c
    low, high = (c.difference if end is None else end for end in (c.low, c.high))
    settled = replace(c, prompts_needed=None, prompts_low=None, prompts_high=None)
    apart, inside = low > 0 or high < 0, -c.margin < low and high < c.margin
    significant = apart and c.p_holm < ALPHA
    if inside and (c.low is not None or c.n >= _fewest(ALPHA)):
        small = f"the difference is significant, but inside ±{c.margin:g}: too small to matter"
        return replace(settled, verdict="tied", reason=small if significant else c.reason)
    if significant:
        return replace(settled, verdict="better" if low > 0 else "worse")
    reason = f"the interval holds 0 and reaches outside ±{c.margin:g}"
    if apart:
        reason = f"the interval excludes 0, but the adjusted p of {c.p_holm:.3f} is not below {ALPHA:g}"
    return replace(c, reason=c.reason or reason)


def _fewest(alpha: float) -> int:
    """The fewest prompts at which sign flips can reach p < alpha: p is never below 2^(1-n)."""
    return math.floor(1 - math.log2(alpha)) + 1


def hedges_g(mean: float, sd: float, n: int) -> float | None:
    """Hedges' g of n paired differences: J(n-1) * mean / sd; None below n = 3 and for sd = 0.

    J(m) = Gamma(m/2) / (sqrt(m/2) Gamma((m-1)/2)) removes the small-sample bias exactly (Hedges 1981).
    """
    if n < 3 or sd == 0:
        return None
    log_j = special.gammaln((n - 1) / 2) - special.gammaln((n - 2) / 2) - math.log((n - 1) / 2) / 2
    return float(math.exp(log_j) * mean / sd)


def power(difference: float, sd: float, n: int, alpha: float = ALPHA) -> float:
    """Power of the two-sided paired t test with n > 1 pairs, exact (noncentral t, ``scipy.special``)."""
    shift, df = abs(difference) / sd * math.sqrt(n), n - 1
    critical = special.stdtrit(df, 1 - alpha / 2)
    # 200 times faster than sps.nct; NaN where the probability is too small to matter.
    below, far = np.nan_to_num(special.nctdtr(df, shift, np.array([critical, -critical])))
    return float(1 - below + far)


def prompts_needed(difference: float, sd: float, alpha: float = ALPHA) -> int | None:
    """Smallest n >= 2 at which a paired t test has 80% power; None: no number up to ``MOST_PROMPTS``."""
    if difference == 0 or sd <= 0:
        return None
    return _smallest(lambda n: power(difference, sd, n, alpha) >= POWER)


def prompts_to_tie(sd: float, margin: float) -> int | None:
    """Smallest n >= 2 at which a 95% t interval of equal models lies inside +-margin with 80% power, or None.

    Power is bounded from below: 1 minus the chances (noncentral t) that the interval crosses either border.
    """
    if margin <= 0 or sd <= 0:
        return None

    def crossing(n: int) -> float:
        critical, shift = special.stdtrit(n - 1, 1 - ALPHA / 2), margin / sd * math.sqrt(n)
        return 2 * float(np.nan_to_num(special.nctdtr(n - 1, shift, critical)))  # NaN for huge shifts: never

    return _smallest(lambda n: 1 - crossing(n) >= POWER)


def planned(sd: float, margin: float, tests: int = 1) -> int | None:
    """Prompts at which equal models are called tied and models that differ by the margin are told apart.

    Both with 80% power, the second as the first step of Holm's over so many tests. The difference that was
    seen takes no part: planned from it, the number is a guess (its interval runs over two orders of
    magnitude), and it plans for luck. None: more than ``MOST_PROMPTS``, or nothing to plan with.
    """
    tie, apart = prompts_to_tie(sd, margin), prompts_needed(margin, sd, ALPHA / tests)
    return None if tie is None or apart is None else max(tie, apart, _fewest(ALPHA / tests))


def _smallest(enough: Callable[[int], bool]) -> int | None:
    """The smallest n from 2 to MOST_PROMPTS that is enough, for a condition that stays true once it is."""
    counts = range(2, MOST_PROMPTS + 1)
    place = bisect_left(counts, True, key=enough)
    return counts[place] if place < len(counts) else None


def rank_intervals(
    per_model: dict[str, Scores], seed: int = 0, resamples: int = estimates.RESAMPLES
) -> tuple[RankInterval, ...]:
    """Every model's rank by mean score with a 95% percentile bootstrap interval over prompts, best first.

    Rank is 1 + the number of models with a higher mean, a whole number: so the interval covers more than 95%.
    All models have the same prompts; too few or unusable scores have a ``reason``.
    """
    models, prompts = list(per_model), sorted(set().union(*per_model.values()))
    n = len(prompts)
    table = np.array([[per_model[m][p] for p in prompts] for m in models], dtype=float)
    if refused := estimates.unusable(table.ravel(), "scores"):
        return tuple(RankInterval(model, n, None, None, None, reason=refused) for model in models)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    means = np.vstack([table.mean(axis=1), counts @ table.T / n])  # of the prompts, and of each resample
    ranks = sps.rankdata(-np.round(means, 12), "min", axis=1).astype(int)  # ties but for rounding are ties
    low, high = np.quantile(ranks[1:], estimates.TAILS, axis=0, method="inverted_cdf").astype(int).tolist()
    columns = zip(models, ranks[0].tolist(), low, high, strict=True)
    found = sorted((RankInterval(model, n, *row) for model, *row in columns), key=lambda r: r.rank or 0)
    if n < estimates.BOOTSTRAP_MIN:
        found = [replace(r, low=None, high=None, reason=estimates.too_few(n, "prompts")) for r in found]
    return tuple(found)
