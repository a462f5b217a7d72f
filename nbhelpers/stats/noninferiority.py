"""Is a candidate not worse than a baseline by a margin? One-sided tests at 5% on the same prompts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy import stats as sps

from nbhelpers.records import LabError
from nbhelpers.stats import paired, sequential
from nbhelpers.stats.estimate import Array, binary_span, bonett_price, mean_sd, t_interval, unusable
from nbhelpers.stats.paired import ALPHA

Outcome = Literal["passes", "worse", "cannot tell"]
FEWEST = math.floor(1 - math.log2(2 * ALPHA)) + 1  # at which sign flips can reach a one-sided 5%


@dataclass(frozen=True)
class NonInferiority:
    """A test of a candidate's mean against a baseline's."""

    n: int
    value: float | None = None  # the difference, above 0 where the candidate is better; or the ratio
    low: float | None = None  # one-sided 95% bounds
    high: float | None = None
    p_worse: float | None = None  # one-sided
    outcome: Outcome = "cannot tell"
    needed: int | None = None  # prompts at which an equal candidate passes with 80% power


def difference(baseline: Sequence[float], candidate: Sequence[float], margin: float) -> NonInferiority:
    """Non-inferiority of paired scores, higher is better: it passes where a difference is above -margin, and
    is worse where one is below 0 but not above -margin.

    Both by Student's one-sided bound and by ``paired_p``; of binary scores the bound is Bonett and Price's
    and the test against 0 ``mcnemar_p``. Differences that are all equal have no bound: sign flips decide
    alone. LabError for scores that are not finite.
    """
    scores = np.array([baseline, candidate], dtype=float)
    if refusal := unusable(scores.ravel(), "scores"):
        raise LabError(f"No test of a margin: {refusal}.")
    x = np.sort(np.round(scores[1] - scores[0], 12))
    n, (mean, sd) = len(x), mean_sd(x)
    if sd is None:
        return NonInferiority(n, mean)
    if sd and (size := binary_span(scores)):
        wins, losses = int(np.sum(x > 0)), int(np.sum(x < 0))
        low, high = (size * end for end in bonett_price(wins, losses, n, 1 - ALPHA))
        p, spread = paired.mcnemar_p(wins, losses, n), size * math.sqrt((wins + losses) / n)
        above_margin = True  # the bound decides alone
    else:
        low, high = t_interval(mean, sd, n, ALPHA)
        p, spread = paired.paired_p(x), sd
        above_margin = mean > -margin and paired.paired_p(x + margin) / 2 < ALPHA
    p_worse = p / 2 if mean < 0 else 1 - p / 2
    test = NonInferiority(n, mean, low, high, p_worse)
    if above_margin and low > -margin:
        return replace(test, outcome="passes")
    if high < 0 and p_worse < ALPHA:
        return replace(test, outcome="worse")
    needed = paired.prompts_needed(margin, spread, 2 * ALPHA) if sd else FEWEST
    return replace(test, needed=needed and max(needed, FEWEST))


def early_difference(differences: Array, looks: Sequence[int], planned: int, margin: float) -> NonInferiority:
    """``difference`` at a look of a run that may stop early: by ``sequential``'s two-sided figures."""
    n, mean = len(differences), float(np.mean(differences))
    if (interval := sequential.early_interval(differences, looks, planned)) is None:
        return NonInferiority(n, mean)
    low, high = interval
    p_worse = sequential.p_value(differences, looks, planned) if mean < 0 else 1.0
    outcome: Outcome = "worse" if high < 0 and p_worse < ALPHA else "cannot tell"
    return NonInferiority(n, mean, low, high, p_worse, "passes" if low > -margin else outcome)


def ratio(baseline: Sequence[float], candidate: Sequence[float], limit: float) -> NonInferiority:
    """Is the ratio of two means of positive, paired values below a limit? It passes where the ratio is below,
    and is worse where it is above. Bounds: Student's t on the logarithm, linearised (the delta method).
    """
    a, b = (np.asarray(values, dtype=float) for values in (baseline, candidate))
    n = len(a)
    if n < 2 or min(a.mean(), b.mean()) <= 0:
        return NonInferiority(n)
    value = float(b.mean() / a.mean())
    sd = float(np.std(b / b.mean() - a / a.mean(), ddof=1))  # of a pair, linearised, in logarithms
    low, high = (value * math.exp(end) for end in t_interval(0.0, sd, n, ALPHA))
    above = math.log(value / limit) * math.sqrt(n)
    p_worse = float(sps.t.sf(above / sd, n - 1)) if sd else float(above <= 0)
    test = NonInferiority(n, value, low, high, p_worse)
    if high < limit:
        return replace(test, outcome="passes")
    if low > limit:
        return replace(test, outcome="worse")
    return replace(test, needed=paired.prompts_needed(math.log(limit), sd, 2 * ALPHA) if limit > 1 else None)
