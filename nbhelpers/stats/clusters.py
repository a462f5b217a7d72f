"""Repeats of one prompt are a cluster: split of the variance, error bars over texts, what to buy next."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats as sps

from nbhelpers.records import Estimate, LabError, Score
from nbhelpers.stats import estimate as estimates

MOST_REPEATS = 1000  # the search for a design stops here; no variance split rewards more


@dataclass(frozen=True)
class VarianceSplit:
    """How much of the spread lies between prompts and how much between repeats of one prompt."""

    prompts: int
    samples: int
    between: float | None  # variance of the prompts' true means
    within: float | None  # variance of repeats of one prompt
    icc: float | None  # between / (between + within), the intraclass correlation
    reason: str | None = None

    def standard_error(self, prompts: int, repeats: int) -> float | None:
        """Standard error of the mean that a design of ``prompts`` x ``repeats`` would have."""
        if self.between is None or self.within is None:
            return None
        return math.sqrt(self.between / prompts + self.within / (prompts * repeats))

    def half_width(self, prompts: int, repeats: int, level: float = 0.95) -> float | None:
        """Half the t interval that the design would give: with few prompts its quantile is large."""
        error = self.standard_error(prompts, repeats)
        return None if error is None else float(sps.t.isf((1 - level) / 2, prompts - 1)) * error


@dataclass(frozen=True)
class Design:
    """An evaluation that fits a budget: ``prompts`` x ``repeats`` texts and the precision to expect."""

    prompts: int
    repeats: int
    half_width: float  # of the 95% interval of the mean
    cost: float  # in the unit of the budget


def variance_split(scores: Iterable[Score], name: str) -> VarianceSplit:
    """Variance between prompts and within prompts: one-way random effects, method of moments (ANOVA).

    Unequal numbers of repeats are allowed. A negative estimate between prompts is reported as 0.
    One prompt, no repeats, unusable or all equal values: None with a ``reason``.
    """
    groups = [np.asarray(values, dtype=float) for values in estimates.grouped(scores, name).values()]
    k, total = len(groups), sum(map(len, groups))
    x = np.concatenate(groups) if groups else np.empty(0)
    reason = estimates.unusable(x)
    if reason is None and (k < 2 or total == k):
        reason = f"prompts: {k}, samples: {total}; a split needs two prompts and a repeated one"
    if reason := reason or estimates.no_interval(np.sort(x)):
        return VarianceSplit(k, total, None, None, None, reason)
    within = sum(float(np.sum((g - g.mean()) ** 2)) for g in groups) / (total - k)
    between_square = sum(len(g) * float(g.mean() - x.mean()) ** 2 for g in groups) / (k - 1)
    repeats = (total - sum(len(g) ** 2 for g in groups) / total) / (k - 1)
    between = max(0.0, (between_square - within) / repeats)
    return VarianceSplit(k, total, between, within, between / (between + within))


def best_design(
    split: VarianceSplit,
    budget: float,
    prompt_cost: float = 0.0,
    repeat_cost: float = 1.0,
    most_prompts: int | None = None,
) -> Design | None:
    """The prompts x repeats with the narrowest 95% interval that ``budget`` buys.

    Cost of a design: prompts * (prompt_cost + repeats * repeat_cost). The defaults make ``budget`` a number
    of generations; ``prompt_cost`` is the making of one prompt, in the same unit, ``most_prompts``
    the prompts that exist. Every number of repeats is tried with the most prompts it leaves money for, which
    is near repeats = sqrt(within / between * prompt_cost / repeat_cost) (Cochran 1977, section 10.6); with
    few prompts the t quantile asks for more of them, also where the split says that prompts do not differ.
    None for a split without variances. Raises LabError when not even 2 prompts x 1 fit, or a cost is
    impossible.
    """
    if not (repeat_cost > 0 and prompt_cost >= 0 and math.isfinite(budget + prompt_cost + repeat_cost)):
        raise LabError(
            "A design needs a finite budget, a cost per repeat above 0 and a cost per prompt of 0 or more."
        )
    if most_prompts is not None and most_prompts < 2:
        raise LabError(f"With {most_prompts} prompts there is no error bar: give at least 2.")
    if split.between is None:
        return None
    found = []
    for repeats in range(1, MOST_REPEATS + 1):
        each = prompt_cost + repeats * repeat_cost
        prompts = math.floor(budget / each * (1 + 1e-12))  # 0.3 buys three of 0.1
        prompts = min(prompts, most_prompts or prompts)
        if prompts < 2:
            break
        if half := split.half_width(prompts, repeats):
            found.append(Design(prompts, repeats, half, prompts * each))
    if not found:
        raise LabError(
            f"A budget of {budget:g} buys no two prompts: give at least {2 * (prompt_cost + repeat_cost):g}."
        )
    return min(found, key=lambda design: (design.half_width, design.cost))


def clustered_se(values: Sequence[float], clusters: Sequence[Hashable]) -> float | None:
    """Standard error of the mean of ``values`` whose ``clusters`` are independent, in the values' unit.

    Miller 2024 ("Adding error bars to evals", arXiv 2411.00640): the variance s^2/n of independent values,
    plus 1/n^2 times the sum of r_i * r_j over all pairs i != j of one cluster, r being the distance to the
    mean. None for fewer than two clusters or values that are not finite. LabError for different lengths.
    """
    if len(values) != len(clusters):
        raise LabError(
            f"{len(values)} values cannot belong to {len(clusters)} clusters' labels: give one label a value."
        )
    x, n = np.asarray(values, dtype=float), len(values)
    if estimates.unusable(x) or len(set(clusters)) < 2:
        return None
    rest = x - math.fsum(x) / n
    labels = {label: i for i, label in enumerate(dict.fromkeys(clusters))}
    sums = np.bincount([labels[label] for label in clusters], rest)
    squares = math.fsum(rest**2)
    variance = squares / (n - 1) / n + (math.fsum(sums**2) - squares) / n**2
    return math.sqrt(max(0.0, variance))


def clustered_estimate(scores: Iterable[Score], name: str, level: float = 0.95) -> Estimate:
    """The mean over all texts with a prompt-clustered interval; ``n`` counts prompts.

    Interval: t(G-1) * sqrt(G/(G-1)) * ``clustered_se``, G prompts: the t quantile and the factor for few
    clusters (Cameron & Miller 2015) are not in Miller's 1.96, which covers too little below 30 prompts.
    A prompt with more repeats weighs more here; with equal numbers of repeats this is close to
    ``estimate`` over ``by_prompt``. ``sd`` is left out: there are two (``variance_split``).
    """
    estimates.check_level(level)
    groups = estimates.grouped(scores, name)
    labels = [prompt for prompt, values in groups.items() for _ in values]
    values = [value for prompt in groups for value in groups[prompt]]
    x, prompts = estimates.sorted_array(values), len(groups)
    empty = Estimate(name, prompts, None, None, None, None, level, "clustered")
    if refused := estimates.unusable(x):
        return replace(empty, reason=refused)
    point = replace(empty, mean=math.fsum(x) / len(x), reason=estimates.no_interval(x))
    if prompts == 1:
        point = replace(point, reason="1 prompt: no interval")
    error = clustered_se(values, labels)
    if point.reason or error is None or point.mean is None:
        return point
    if not error > estimates.noise(x):
        return replace(point, reason="the repeats cancel: no interval")
    half = float(sps.t.isf((1 - level) / 2, prompts - 1)) * math.sqrt(prompts / (prompts - 1)) * error
    return replace(point, low=point.mean - half, high=point.mean + half)
