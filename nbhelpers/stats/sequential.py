"""Looking early: a test of paired differences that holds at every look, and stops when all is decided.

An ordinary test at each of ten looks raises 20% of false alarms instead of 5%. Here the evidence against "the
mean difference is 0" is an e-value: with a bet b_i on the sign of each difference x_i, in proportion to x_i,

    E = cosh(b_1 + ... + b_n) / (cosh(b_1) * ... * cosh(b_n))

is the two-sided bet's capital, 1 to begin with. Where differences are symmetric around 0, as sign flips take
them, E is a fair game, so the chance that it ever reaches 20 is below 5%: at any look, planned or not
(Ville 1939; Ramdas et al. 2023). 1 / E is a p value, and the shifts that E does not refute are an interval.

Chosen by simulation among six tests (``data/calibration.csv``): 44 of 100 prompts at an effect of 0.5 sd.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize

from nbhelpers.records import Estimate, RunInfo, Scale
from nbhelpers.stats.estimate import Array
from nbhelpers.stats.paired import ALPHA, Comparison, Scores, hall_t, judged, measured

Looks = Sequence[Sequence[str]]  # the prompts that each look added
LOOKS = 10
AIM = 4.0  # bets win most where the mean difference is AIM standard errors after all planned prompts


def plan_looks(prompts: int) -> tuple[int, ...]:
    """After how many of the prompts to look: ten times, evenly; every time with fewer than ten."""
    return tuple(sorted({math.ceil(prompts * look / LOOKS) for look in range(1, LOOKS + 1)}))


def looks_of(info: RunInfo) -> list[list[str]]:
    """The prompts that each look of a run --until-decided adds; none of another run."""
    order = list(info.prompts)
    return [order[start:end] for start, end in pairwise((0, *info.looks))]


def log_e(differences: ArrayLike, looks: Sequence[int], planned: int) -> Array:
    """The log of E after each look, along the last axis: differences in the order in which they were made.

    looks: the number of differences that each look added. planned: of all looks, whatever is added later.
    """
    bets = _bets(differences, looks, planned)
    won, risked = (np.cumsum(x, axis=-1)[..., np.cumsum(looks) - 1] for x in (bets, _log_cosh(bets)))
    return np.asarray(_log_cosh(won) - risked)


def _bets(differences: ArrayLike, looks: Sequence[int], planned: int) -> Array:
    """Differences in root mean squares up to their look: its sizes, not its signs, may decide a bet."""
    x = np.asarray(differences, dtype=float)
    counts = np.cumsum(looks)
    rms = np.sqrt(np.cumsum(x**2, axis=-1)[..., counts - 1] / counts)
    stakes = AIM / math.sqrt(planned) / np.where(rms > 0, rms, 1)
    return np.asarray(x * np.repeat(stakes, looks, axis=-1))


def _log_cosh(x: ArrayLike) -> Array:
    return np.asarray(np.logaddexp(x, np.negative(x)) - math.log(2))


def p_value(differences: Array, looks: Sequence[int], planned: int) -> float:
    """1 / E after the last look; larger where the differences' skew opposes their mean.

    Then E is at most that of normal ones with Hall's t: cosh(a t) / exp(a^2 / 2), a^2 = AIM^2 n / planned.
    """
    evidence = float(log_e(differences, looks, planned)[-1])
    if (t := hall_t(differences)) is not None:
        aim = AIM * math.sqrt(len(differences) / planned)
        evidence = min(evidence, float(_log_cosh(aim * t)) - aim**2 / 2)
    return math.exp(-max(0.0, evidence))


def early_interval(differences: Array, looks: Sequence[int], planned: int) -> tuple[float, float] | None:
    """The shifts that E does not refute at 5%; None where so few differences refute none."""
    mean, spread = float(np.mean(differences)), float(np.ptp(differences))

    def refuted(shift: float) -> float:  # where above 0
        return float(log_e(differences - shift, looks, planned)[-1]) + math.log(ALPHA)

    if not spread:
        return (mean, mean) if refuted(mean + 1) > 0 else None
    lowest, highest = mean - 1e3 * spread, mean + 1e3 * spread
    if min(refuted(lowest), refuted(highest)) <= 0:
        return None
    cancel = optimize.brentq(lambda shift: _bets(differences - shift, looks, planned).sum(), lowest, highest)
    return optimize.brentq(refuted, lowest, cancel), optimize.brentq(refuted, cancel, highest)


def in_order(values: Scores, looks: Looks) -> tuple[Array, list[int]]:
    """The values in the order in which their prompts were asked, and how many each look added."""
    by_look = [[values[prompt] for prompt in look if prompt in values] for look in looks]
    return np.array([value for look in by_look for value in look]), [len(look) for look in by_look if look]


def early_mean(estimate: Estimate, values: Scores, looks: Looks) -> Estimate:
    """The estimate of a mean over prompts with the interval that holds at every look."""
    if estimate.low is None:
        return estimate
    low, high = early_interval(*in_order(values, looks), sum(map(len, looks))) or (None, None)
    reason = f"n = {estimate.n}: too few for an early verdict" if low is None else None
    return replace(estimate, low=low, high=high, method="always-valid", reason=reason)


def always_valid_pairs(
    per_model: dict[str, Scores], margin: float, looks: Looks, planned: int = 0, tests: int = 0
) -> list[Comparison]:
    """``paired.measured`` for models that are compared after every look, with figures that hold at each.

    looks: the prompts that each added, in the order in which they were asked, up to ``planned`` (0: up to
    these). Without any, and where a pair has no p, as there.
    """
    planned = planned or sum(map(len, looks))

    def look(pair: Comparison) -> Comparison:
        a, b = per_model[pair.a], per_model[pair.b]
        x, sizes = in_order({prompt: round(a[prompt] - b[prompt], 12) for prompt in a}, looks)
        ends = early_interval(x, sizes, planned)
        if ends is None:
            reason = f"n = {pair.n}: too few for an early verdict"
            return replace(pair, p=None, low=None, high=None, reason=reason)
        low, high = (None, None) if pair.low is None else ends  # all differences are equal
        return replace(pair, p=p_value(x, sizes, planned), low=low, high=high)

    return measured(per_model, margin, tests, look=look if looks else None)


def decided(per_model: dict[str, Scores], scale: Scale, looks: Looks, planned: int) -> bool:
    """Whether every pair that is compared has a verdict."""
    totals = {model: sum(scores.values()) for model, scores in per_model.items()}  # of the same prompts
    best_first = sorted(totals, key=lambda model: totals[model], reverse=scale.higher_is_better)
    pairs = always_valid_pairs({m: per_model[m] for m in best_first}, scale.margin, looks, planned)
    return all(c.verdict != "cannot tell" for c in judged(pairs, math.comb(len(totals), 2)))
