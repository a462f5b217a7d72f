"""The statistics of the laboratory in one place: all of them work on plain numbers.

Estimates of one model are in ``estimates``, repeats of prompts in ``clusters``, tests and effect sizes of two
and more models in ``paired_tests``; here they become comparisons with a verdict.
How far each interval and test keeps its promise: ``data/calibration.csv``, made by ``tools/calibrate.py``.

Models are compared on the same prompts. Differences are signed: first model minus second.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
from scipy import special
from scipy import stats as sps

from nbhelpers.records import Comparison, LabError, Verdict
from nbhelpers.stats import estimate as estimates
from nbhelpers.stats.clusters import (  # noqa: F401  # offered here as well
    Design,
    VarianceSplit,
    best_design,
    clustered_estimate,
    clustered_se,
    variance_split,
)
from nbhelpers.stats.estimate import (  # noqa: F401
    ClaimTest,
    by_prompt,
    estimate,
    percentile_estimate,
    test_claim,
    wilson,
)
from nbhelpers.stats.paired import (  # noqa: F401
    TestResult,
    equivalence,
    hedges_g,
    rank_intervals,
    resample_counts,
    sign_flip_p,
    superiority,
    wilcoxon,
)

MOST_PROMPTS = 100_000  # more prompts than this is the same as "never"
POWER = 0.8  # that a needed number of prompts is figured for


def paired(
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
    """``paired`` for every pair of models, with Holm's adjustment over all pairs that have a p.

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
    """Add the verdict (rules in ``paired``) to a measured comparison."""
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
