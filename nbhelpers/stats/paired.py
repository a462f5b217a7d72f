"""Two and more models on the same prompts: differences, verdicts, power, and the prompts to plan for."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
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
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None  # ``paired_p``; of a binary outcome ``mcnemar_p``
    p_holm: float | None = None  # over all pairs of the run
    effect_size: float | None = None  # Hedges g of the paired differences
    verdict: Verdict = "cannot tell"
    margin: float = 0.5  # equivalence margin, points
    prompts_needed: int | None = None  # planned from the margin, whatever the difference seen (``planned``)
    reason: str | None = None
    prompts_low: int | None = None  # 95% interval of prompts_needed, from that of the spread
    prompts_high: int | None = None
    rated: int | None = None  # prompts with readers' ratings; None: by the score alone


def compare_two(a: Scores, b: Scores, one: str = "a", other: str = "b", margin: float = 0.5) -> Comparison:
    """``compare_all`` for two models."""
    return compare_all({one: a, other: b}, margin)[0]


def compare_all(per_model: dict[str, Scores], margin: float = 0.5) -> tuple[Comparison, ...]:
    """Compare every pair of models on the same prompts.

    Interval: Student t on the differences; p: ``paired_p``. Where the scores of both models take two values
    in all, a binary outcome: ``bonett_price`` and ``mcnemar_p``. The verdict, in this order, with alpha = 5%:
    1. "tied": the whole interval lies inside +-margin, significant or not (two one-sided tests at 2.5% each).
    2. "better" / "worse" (a than b): the interval excludes 0 and p_holm < alpha.
    3. "cannot tell", with the prompts to plan for the margin or with a ``reason``.

    Differences that are all equal have no interval. The difference stands in for it, and exact tests decide,
    against 0 and against the margins: their p is 2^(1-n), so below six prompts nothing can be told.
    """
    return judged(measured(per_model, margin))


def measured(per_model: dict[str, Scores], margin: float) -> list[Comparison]:
    """The numbers of every pair, before the verdict."""
    pairs = list(combinations(per_model, 2))
    return [_measured(a, b, per_model[a], per_model[b], margin, len(pairs)) for a, b in pairs]


def _measured(one: str, other: str, a: Scores, b: Scores, margin: float, tests: int) -> Comparison:
    common = sorted(a.keys() & b.keys())
    found = Comparison(one, other, len(common), margin=margin)
    if a.keys() != b.keys():
        only = f"{len(a) - len(common)} only in {one}, {len(b) - len(common)} only in {other}"
        return replace(found, reason=f"prompt sets differ: {only}")
    scores = np.array([[a[prompt], b[prompt]] for prompt in common], dtype=float).reshape(-1, 2)
    if refused := estimates.unusable(scores.ravel(), "scores"):
        return replace(found, reason=refused)
    x = np.sort(np.round(scores[:, 0] - scores[:, 1], 12))  # a rounding error is no difference
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
        p, ends = mcnemar_p(*discordant, n), bonett_price(*discordant, n)
        low, high = (float(np.ptp(levels)) * end for end in ends)
        share = sps.binomtest(sum(discordant), n).proportion_ci(method="wilson")
        spreads = np.ptp(levels) * np.sqrt([sum(discordant) / n, share.low, share.high])
    else:
        p, (low, high) = paired_p(x), estimates.t_interval(mean, sd, n)
        spreads = sd * np.sqrt([1.0, *((n - 1) / special.chdtri(n - 1, np.array(estimates.TAILS)))])
    needed, fewest, most = (planned(float(spread), margin, tests) for spread in spreads)
    found = replace(found, p=p, low=low, high=high, effect_size=hedges_g(mean, sd, n))
    return replace(found, prompts_needed=needed, prompts_low=fewest, prompts_high=most)


def judged(found: Sequence[Comparison]) -> tuple[Comparison, ...]:
    """Add Holm's p over all pairs that have a p, and the verdicts (rules in ``compare_all``)."""
    adjusted = iter(holm([c.p for c in found if c.p is not None]))
    return tuple(c if c.p is None else _judged(replace(c, p_holm=next(adjusted))) for c in found)


def _judged(c: Comparison) -> Comparison:
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
    """Hedges' g of n paired differences with sd > 0: J(n-1) * mean / sd; None below n = 3.

    J(m) = Gamma(m/2) / (sqrt(m/2) Gamma((m-1)/2)) removes the small-sample bias exactly (Hedges 1981).
    """
    if n < 3:
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
