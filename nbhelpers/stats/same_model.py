"""A/A: a model against itself. What differs then is noise; "better" or "worse" is a false alarm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nbhelpers.records import Estimate, LabError
from nbhelpers.stats import paired
from nbhelpers.stats.estimate import Array, wilson


@dataclass(frozen=True)
class SameModel:
    """What comparisons of a model with itself gave."""

    differences: tuple[float, ...]  # mean of one half minus the other, in the unit of the table
    typical: float | None  # median of their absolute values: the noise floor
    largest: float | None  # 95% are smaller than this
    alarms: Estimate  # share with the verdict better or worse, with Wilson's interval
    gate: Estimate  # share with the verdict worse alone: what a regression gate would stop
    reason: str | None = None


def split_halves(table: Array, margin: float, splits: int = 500, seed: int = 0) -> SameModel:
    """Compare the halves of a table [prompts, repeats], split at random within each prompt, many times.

    The splits use the same numbers again and again, so the intervals tell how exact the rate is for this
    table, not for another run of the model; ``planted`` repeats the runs too. With an odd number of repeats
    one is left out. Fewer than two repeats or prompts: a ``reason``. LabError for a table of another shape.
    """
    table = np.asarray(table, dtype=float)
    if table.ndim != 2:
        raise LabError(f"A table of prompts x repeats is needed, not of shape {table.shape}.")
    half = table.shape[1] // 2
    if half < 1 or len(table) < 2:
        return _judged([], margin, f"{table.shape[0]} prompts x {table.shape[1]} repeats cannot be halved")
    rng = np.random.default_rng(seed)
    mixed = (rng.permuted(table, axis=1) for _ in range(splits))
    return _judged([(m[:, :half].mean(1), m[:, half : 2 * half].mean(1)) for m in mixed], margin)


def planted(
    prompts: int,
    repeats: int,
    between: float,
    within: float,
    margin: float,
    runs: int = 500,
    seed: int = 0,
) -> SameModel:
    """The same for runs drawn anew: equal models whose scores vary by these variances (normal, planted)."""
    rng = np.random.default_rng(seed)
    hard = rng.normal(0, between**0.5, (runs, 1, prompts))
    means = hard + rng.normal(0, (within / repeats) ** 0.5, (runs, 2, prompts))
    return _judged([(a, b) for a, b in means], margin)


def _judged(pairs: Sequence[tuple[Array, Array]], margin: float, reason: str | None = None) -> SameModel:
    differences, verdicts = [], []
    for a, b in pairs:
        found = paired.compare_two(_named(a), _named(b), margin=margin)
        differences.append(float(np.mean(a - b)))
        verdicts.append(found.verdict)
    sizes = np.abs(differences)
    typical, largest = (float(np.percentile(sizes, q)) for q in (50, 95)) if pairs else (None, None)
    worse = verdicts.count("worse")
    alarms = wilson(worse + verdicts.count("better"), len(pairs), name="false alarms")
    gate = wilson(worse, len(pairs), name="false alarms of the gate")
    return SameModel(tuple(differences), typical, largest, alarms, gate, reason)


def _named(scores: Array) -> dict[str, float]:
    return {f"{number:06}": float(score) for number, score in enumerate(scores)}
