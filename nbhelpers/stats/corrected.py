"""A comparison by a score, corrected by readers' ratings of some prompts: prediction-powered, paired.

The score, a rubric's or a judge's, is known for every prompt; ratings for a random part of them. With y the
readers' difference of two models on a rated prompt, g the score's on the same texts and f the score's on all
texts of a prompt,

    difference = mean over rated prompts of (y - tuning * g)  +  tuning * mean over all prompts of f

is right on average for any tuning, however wrong the score; the tuning is the one of least variance (PPI++,
Angelopoulos, Duchi & Zrnic 2023). The rated prompts are some of all prompts, and all of them a sample of what
could be asked: with everything rated, the interval is Student's of the ratings. Ours, because ppi-python's
normal interval covers 92% at 20 rated prompts (``data/calibration.csv``).
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import NamedTuple

import numpy as np
from scipy import special

from nbhelpers.records import Estimate
from nbhelpers.stats import estimate as estimates
from nbhelpers.stats import paired
from nbhelpers.stats.estimate import Array
from nbhelpers.stats.paired import Comparison, Scores

LEAST = 6  # rated prompts; below it ratings alone cannot tell anything either
NOTHING = 1e-12  # a variance in squared points below it is rounding


class Tuned(NamedTuple):
    mean: float
    error: float  # standard error
    df: float
    tuning: float  # readers' points that a point of the score is worth; 0: none


def tuned(y: Array, g: Array, f: Array, rest: Array, weight: Array | None = None) -> Tuned:
    """The formula above for n > 2 rated prompts (y, g, f, each of length n) and the others' scores, ``rest``.

    weight: 1 / each rated prompt's chance to be drawn, up to a factor. The variance is the delete-one
    jackknife over rated prompts, the tuning made anew each time, plus tuning^2 times that of the others'
    scores; degrees of freedom by Satterthwaite.
    """
    n, m, total = len(y), len(rest), len(y) + len(rest)
    centre = [float(np.mean(x)) for x in (y, g, np.concatenate([f, rest]))]
    y, g, f, rest = y - centre[0], g - centre[1], f - centre[2], rest - centre[2]
    kept = np.vstack([np.ones(n), 1 - np.eye(n)])  # all rated prompts, then without each
    share = kept * (1 if weight is None else weight)
    share, kept = (x / x.sum(axis=1, keepdims=True) for x in (share, kept))

    def moment(a: Array, b: Array) -> Array:
        return share @ (a * b) - (share @ a) * (share @ b)

    h = n / total * f - g  # what the tuning multiplies on a rated prompt
    spread = moment(h, h) + n * m / total**2 * moment(f, f)
    told = spread > NOTHING
    tuning = np.where(told, -moment(y, h) / np.where(told, spread, 1), 0.0)
    means = share @ y + tuning * (
        centre[2] - centre[1] - share @ g + n / total * (kept @ f) + rest.sum() / total
    )
    rated = (n - 1) / n * float(np.sum((means[1:] - means[1:].mean()) ** 2))
    other = float(tuning[0] ** 2 * m / total**2 * np.var(np.concatenate([f, rest]), ddof=1))
    variance = rated + other
    free = n - 2 if tuning.any() else n - 1
    df = variance**2 / (rated**2 / free + other**2 / (total - 1)) if variance > NOTHING else free
    return Tuned(centre[0] + float(means[0]), math.sqrt(variance), df, float(tuning[0]))


def interval(found: Tuned) -> tuple[float, float, float]:
    """Ends of the 95% interval of the mean, and the two-sided p that it is 0."""
    half = float(special.stdtrit(found.df, 1 - estimates.TAILS[0])) * found.error
    p = 2 * float(special.stdtr(found.df, -abs(found.mean) / found.error))
    return found.mean - half, found.mean + half, p


@dataclass(frozen=True)
class Rated:
    """What is known of one model, by prompt."""

    ratings: Scores  # readers' mean rating of the rated texts
    same: Scores  # the score's mean of the same texts
    scores: Scores  # the score's mean of all texts, for every prompt


def corrected_mean(model: Rated, weights: Scores, name: str = "") -> Estimate:
    """One model's mean in readers' points, corrected as the differences are."""
    found = _tuned(model.ratings, model.same, model.scores, weights)
    if isinstance(found, str):
        return Estimate(name, len(model.scores), None, None, None, None, method="corrected", reason=found)
    low, high, _ = interval(found)
    return Estimate(name, len(model.scores), found.mean, None, low, high, method="corrected")


def correct_all(models: dict[str, Rated], weights: Scores, margin: float = 0.5) -> tuple[Comparison, ...]:
    """``paired.compare_all`` by readers; all models have the same prompts, rated ones and others.

    weights: rated prompt -> 1 / its chance to be rated. Fewer than ``LEAST`` have a reason instead.
    """
    found = [_measured(a, b, models[a], models[b], weights, margin) for a, b in combinations(models, 2)]
    adjusted = iter(paired.holm([c.p for c in found if c.p is not None]))
    return tuple(paired.judged(c if c.p is None else replace(c, p_holm=next(adjusted))) for c in found)


def _measured(one: str, other: str, a: Rated, b: Rated, weights: Scores, margin: float) -> Comparison:
    def minus(x: Scores, y: Scores) -> Scores:
        return {prompt: x[prompt] - y[prompt] for prompt in x}

    nothing = None, None, None, None, None, None
    known = Comparison(one, other, len(a.scores), *nothing, "cannot tell", margin, None, rated=len(a.ratings))
    found = _tuned(minus(a.ratings, b.ratings), minus(a.same, b.same), minus(a.scores, b.scores), weights)
    if isinstance(found, str):
        return replace(known, reason=found)
    low, high, p = interval(found)
    return replace(known, difference=found.mean, low=low, high=high, p=p)


def _tuned(ratings: Scores, same: Scores, scores: Scores, weights: Scores) -> Tuned | str:
    """``tuned`` of values by prompt, or why there is nothing to say."""
    rated = sorted(ratings)
    if len(rated) < LEAST:
        return f"{len(rated)} rated prompts: a correction needs at least {LEAST}"
    y, g, f, weight = (np.array([of[p] for p in rated]) for of in (ratings, same, scores, weights))
    rest = np.array([scores[prompt] for prompt in sorted(scores.keys() - ratings.keys())])
    if refused := estimates.unusable(np.concatenate([y, g, f, rest])):
        return refused
    found = tuned(y, g, f, rest, weight)
    return found if found.error > math.sqrt(NOTHING) else "all differences are equal: no interval"


def random_order(strata: dict[str, str], seed: int) -> list[str]:
    """The prompts (prompt -> its stratum) in a random order of which any beginning is a stratified sample.

    One of each stratum comes first, the rest evenly mixed; within a stratum every order is as likely.
    """
    rng, place = random.Random(seed), dict[str, float]()
    for stratum in sorted(set(strata.values())):
        members = sorted(prompt for prompt in strata if strata[prompt] == stratum)
        rng.shuffle(members)
        start = rng.random()
        place |= {p: (i + start) / len(members) - (i == 0) for i, p in enumerate(members)}
    return sorted(strata, key=lambda prompt: place[prompt])


def chances(strata: dict[str, str], drawn: Sequence[str]) -> dict[str, float]:
    """Stratum -> the chance of each of its prompts to be drawn: the share of them that was."""
    every, some = Counter(strata.values()), Counter(strata[prompt] for prompt in drawn)
    return {stratum: some[stratum] / count for stratum, count in every.items()}


def half_width(sd: float, rated: int, prompts: int, correlation: float) -> float:
    """Half of the interval to expect where readers' differences have deviation ``sd``; ``rated`` > 2.

    correlation: of score and readers, over prompts, one text each.
    """
    variance = (1 - correlation**2) / rated + correlation**2 / prompts
    return float(special.stdtrit(rated - 2, 1 - estimates.TAILS[0])) * sd * math.sqrt(variance)
