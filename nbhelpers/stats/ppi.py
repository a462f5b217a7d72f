"""A comparison by a score, corrected by readers' ratings of some prompts: prediction-powered, paired.

The score, a rubric's or a judge's, is known for every prompt; ratings for a random part of them. With y the
readers' difference of two models on a rated prompt, g the score's on the same texts and f the score's on all
texts of a prompt,

    difference = mean over rated prompts of (y - tuning * g)  +  tuning * mean over all prompts of f

is right on average for any tuning, however wrong the score; the tuning is the one of least variance (PPI++,
Angelopoulos, Duchi & Zrnic 2023). With everything rated, the interval is Student's of the ratings. Ours,
because ppi-python's normal interval covers 92% at 20 rated prompts (``data/calibration.csv``).
"""

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from scipy import special

from nbhelpers.records import Estimate
from nbhelpers.stats.estimate import TAILS, Array, unusable
from nbhelpers.stats.paired import Comparison, Scores, compare_all, judged, pairs_of

LEAST = 6  # rated prompts; below it ratings alone cannot tell anything either
NOTHING = 1e-12  # a variance in squared points below it is rounding


class Tuned(NamedTuple):
    mean: float
    error: float  # standard error
    df: float
    tuning: float  # readers' points that a point of the score is worth; 0: none

    def interval(self) -> tuple[float, float, float]:
        """Ends of the 95% interval of the mean, and the two-sided p that it is 0."""
        half = float(special.stdtrit(self.df, 1 - TAILS[0])) * self.error
        p = 2 * float(special.stdtr(self.df, -abs(self.mean) / self.error))
        return self.mean - half, self.mean + half, p


class Rated(NamedTuple):
    """What is known of one model, or of the difference of two, by prompt."""

    ratings: Scores  # readers' mean rating of the rated texts
    same: Scores  # the score's mean of the same texts
    scores: Scores  # the score's mean of all texts, for every prompt


def tuned(y: Array, g: Array, f: Array, rest: Array, weight: Array | float = 1.0) -> Tuned:
    """The formula above for n > 2 rated prompts (y, g, f, each of length n) and the others' scores, ``rest``.

    weight: 1 / each rated prompt's chance to be drawn, up to a factor. The variance is the delete-one
    jackknife over rated prompts, the tuning made anew each time, plus tuning^2 times that of the others'
    scores; degrees of freedom by Satterthwaite.
    """
    n, m, total = len(y), len(rest), len(y) + len(rest)
    y_mean, g_mean, f_mean = (float(np.mean(x)) for x in (y, g, np.concatenate([f, rest])))
    y, g, f, rest = y - y_mean, g - g_mean, f - f_mean, rest - f_mean
    subsets = np.vstack([np.ones(n), 1 - np.eye(n)])  # of the rated prompts: all, then without each
    weighted, even = (x / x.sum(axis=1, keepdims=True) for x in (subsets * weight, subsets))

    def covariance(a: Array, b: Array) -> Array:
        return weighted @ (a * b) - (weighted @ a) * (weighted @ b)

    h = n / total * f - g  # what the tuning multiplies on a rated prompt
    spread = covariance(h, h) + n * m / total**2 * covariance(f, f)
    varies = spread > NOTHING
    tuning = np.where(varies, -covariance(y, h) / np.where(varies, spread, 1), 0.0)
    means = weighted @ y + tuning * (
        f_mean - g_mean - weighted @ g + n / total * (even @ f) + rest.sum() / total
    )
    of_rated = (n - 1) / n * float(np.sum((means[1:] - means[1:].mean()) ** 2))
    of_others = float(tuning[0] ** 2 * m / total**2 * np.var(np.concatenate([f, rest]), ddof=1))
    variance = of_rated + of_others
    df: float = n - 2 if tuning.any() else n - 1
    if variance > NOTHING:
        df = variance**2 / (of_rated**2 / df + of_others**2 / (total - 1))
    return Tuned(y_mean + float(means[0]), math.sqrt(variance), df, float(tuning[0]))


def correct_all(models: dict[str, Rated], weights: Scores, margin: float = 0.5) -> tuple[Comparison, ...]:
    """``paired.compare_all`` by readers; all models have the same prompts, rated ones and others.

    weights: rated prompt -> 1 / its chance to be rated. Fewer than ``LEAST`` have a reason instead. Where all
    are rated there is nothing to predict: the ratings are compared as any scores are.
    """
    if all(model.ratings.keys() == model.scores.keys() for model in models.values()):
        ratings = {name: model.ratings for name, model in models.items()}
        return tuple(replace(pair, rated=pair.n) for pair in compare_all(ratings, margin))

    def compared(a: str, b: str) -> Comparison:
        pairs = zip(models[a], models[b], strict=True)
        gaps = Rated(*({prompt: one[prompt] - other[prompt] for prompt in one} for one, other in pairs))
        mean, p = corrected_mean(gaps, weights)
        pair = Comparison(a, b, mean.n, mean.mean, mean.low, mean.high, p, margin=margin, reason=mean.reason)
        return replace(pair, rated=len(gaps.ratings))

    tests = math.comb(len(models), 2)
    return judged(pairs_of([*models], compared, tests), tests)


def corrected_mean(rated: Rated, weights: Scores, name: str = "") -> tuple[Estimate, float | None]:
    """The mean in readers' points and the p that it is 0, or why there is nothing to say."""
    estimate = Estimate(name, len(rated.scores), method="corrected")
    prompts = sorted(rated.ratings)
    if len(prompts) < LEAST:
        reason = f"{len(prompts)} rated prompts: a correction needs at least {LEAST}"
        return replace(estimate, reason=reason), None
    y, g, f, weight = (np.array([by_prompt[p] for p in prompts]) for by_prompt in (*rated, weights))
    rest = np.array([rated.scores[p] for p in sorted(rated.scores.keys() - rated.ratings.keys())])
    if refusal := unusable(np.concatenate([y, g, f, rest])):
        return replace(estimate, reason=refusal), None
    corrected = tuned(y, g, f, rest, weight)
    if corrected.error <= math.sqrt(NOTHING):
        return replace(estimate, reason="all differences are equal: no interval"), None
    low, high, p = corrected.interval()
    return replace(estimate, mean=corrected.mean, low=low, high=high), p


def random_order(strata: dict[str, str], seed: int) -> list[str]:
    """The prompts (prompt -> its stratum) in a random order of which any beginning is a stratified sample.

    One of each stratum comes first, the rest evenly mixed; within a stratum every order is as likely.
    """
    rng = random.Random(seed)
    rank = dict[str, float]()
    for stratum in sorted(set(strata.values())):
        members = sorted(prompt for prompt in strata if strata[prompt] == stratum)
        rng.shuffle(members)
        start = rng.random()
        rank |= {p: (i + start) / len(members) - (i == 0) for i, p in enumerate(members)}
    return sorted(strata, key=lambda prompt: rank[prompt])


def chances(strata: dict[str, str], drawn: Sequence[str]) -> dict[str, float]:
    """Stratum -> the chance of each of its prompts to be drawn: the share of them that was."""
    drawn_of = Counter(strata[prompt] for prompt in drawn)
    return {stratum: drawn_of[stratum] / size for stratum, size in Counter(strata.values()).items()}


def half_width(sd: float, rated: int, prompts: int, correlation: float) -> float:
    """Half of the interval to expect where readers' differences have deviation ``sd``; ``rated`` > 2."""
    variance = (1 - correlation**2) / rated + correlation**2 / prompts
    return float(special.stdtrit(rated - 2, 1 - TAILS[0])) * sd * math.sqrt(variance)
