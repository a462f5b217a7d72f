"""Do larger models write better? Points per doubling of the parameters, over the prompts of a comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nbhelpers.records import Estimate, Result
from nbhelpers.stats import paired, significance
from nbhelpers.stats.estimate import estimate


def slope(results: Sequence[Result]) -> Estimate | None:
    """Points gained per doubling of the parameters: one least-squares slope a prompt, then their mean.

    Prompts are the units, so the interval speaks about other prompts for these models, not about other
    models. All results have the same prompts. None for fewer than two sizes.
    """
    sizes = [math.log2(result.parameters) for result in results]
    if len(set(sizes)) < 2:
        return None
    centre = sum(sizes) / len(sizes)
    weights = [(size - centre) / sum((other - centre) ** 2 for other in sizes) for size in sizes]
    slopes = (
        sum(w * r.per_prompt[prompt] for w, r in zip(weights, results, strict=True))
        for prompt in sorted(results[0].per_prompt)
    )
    return estimate(slopes, "points per doubling of parameters")


def sentence(found: Estimate | None, ranked: Sequence[Result]) -> str:
    """What the data say about "larger models write better content"; ``ranked`` is the best first."""
    low, high, over = (found.low, found.high, "over") if found else (None, None, "")
    if found and found.sd == 0 and significance.sign_flip_p([found.mean or 0.0] * found.n) < paired.ALPHA:
        low, high, over = found.mean, found.mean, "the same on each of"  # no interval, but a test
    if found is None or low is None or high is None:
        why = found.reason if found else "it needs two sizes on the same prompts"
        return f"Whether larger models write better stays open: {why}."
    interval = f"[{low:+.2f}, {high:+.2f}] " if low < high else ""
    figures = f"{found.mean:+.2f} points per doubling of the parameters {interval}{over}"
    differ = ", which also differ in architecture" if len({r.family for r in ranked}) > 1 else ""
    figures += f" {found.n} prompts, for these {len(ranked)} models only{differ}."
    if low > 0:
        best, largest = ranked[0].model, max(ranked, key=lambda result: result.parameters).model
        but = "" if best == largest else f" The best is {best}, not the largest, {largest}."
        return f"On average the larger models here write better: {figures}{but}"
    if high < 0:
        return f"Among these models the larger ones write worse: {figures}"
    return f"These data do not show that larger models write better: {figures}"
