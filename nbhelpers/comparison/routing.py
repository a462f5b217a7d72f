"""Which model should write what: for each content type the one expected to be best, or a cheaper one tied.

Few prompts of a type say little: their means are shrunk towards what all types say (``shrunk_means``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from nbhelpers import store
from nbhelpers.comparison import compare as comparison
from nbhelpers.records import CONTENT_TYPES, SCHEMA_VERSION, Estimate, LabError, Record, Result, Score
from nbhelpers.stats import paired
from nbhelpers.stats.estimate import Array, estimate

COST = "cost/usd_per_request"
Basis = Literal["better", "tied", "cannot tell", "only model", "no data"]


@dataclass(frozen=True)
class Route(Record):
    """Which model should write one content type, and why."""

    content_type: str
    model: str | None  # None: too few prompts to choose by
    basis: Basis
    prompts: int
    quality: dict[str, Estimate]  # model -> primary score on these prompts, best first
    reason: str


@dataclass(frozen=True)
class RoutingReport(Record):
    """routing.json: a model for each content type of a run."""

    primary: str
    routes: tuple[Route, ...]
    default: str | None  # the pick over all prompts, for what has no route
    default_reason: str
    excluded: dict[str, str]  # model -> why it takes no part
    schema_version: int = SCHEMA_VERSION


def route_run(run_dir: Path) -> RoutingReport:
    """Choose a model for each content type of a run; writes routing.json. LabError as ``assemble``."""
    report = assemble(run_dir)
    store.write_json(run_dir / "routing.json", report)
    return report


def assemble(run_dir: Path, margin: float = comparison.MARGIN) -> RoutingReport:
    """The routing of a run's folder, without writing it; models that its comparison leaves out take no part.

    LabError for a folder without results, and where scores.jsonl does not say what type a prompt is.
    """
    results, excluded, notes = comparison.comparable(run_dir)
    overall = comparison.compare(results, excluded, margin, notes)
    rows = (row for r in results for row in store.read_rows(run_dir / r.slug / "scores.jsonl", Score))
    types = {row.prompt_id: row.content_type for row in rows}
    if unknown := [prompt for prompt in overall.prompts if prompt not in types]:
        raise LabError(f"The prompt {unknown[0]} is in no scores.jsonl of {run_dir.name}: run notebook 04.")
    by_type = {kind: [p for p in overall.prompts if types[p] == kind] for kind in CONTENT_TYPES}
    table = np.array([[r.per_prompt[p] for p in overall.prompts] for r in results], dtype=float)
    means = shrunk_means(table, [types[p] for p in overall.prompts]) if results else {}
    expected = {k: dict(zip([r.model for r in results], row, strict=True)) for k, row in means.items()}
    tied = [{pair.a, pair.b} for pair in overall.verdicts if pair.verdict == "tied"]
    routes = tuple(route(k, own, results, margin, expected.get(k), tied) for k, own in by_type.items())
    return RoutingReport(overall.primary, routes, overall.pick, overall.pick_reason, overall.excluded)


def shrunk_means(scores: Array, types: Sequence[str]) -> dict[str, list[float]]:
    """Type -> each model's mean on its prompts, shrunk towards its mean over all; scores: [models, prompts].

    What a model does better or worse at a type than everywhere, beside the others, is weighted by
    n t² / (n t² + s²): empirical Bayes (Efron & Morris 1975). s² is the variance of the scores within a type,
    t² that of the true deviations of types (analysis of variance; 0 where they are no larger than noise).
    """
    x, kinds = scores - scores.mean(axis=0), list(dict.fromkeys(types))  # without each prompt's difficulty
    masks = [np.array([kind == name for kind in types]) for name in kinds]
    counts, free = np.array([mask.sum() for mask in masks]), max(1, len(x) - 1)
    means = np.array([x[:, mask].mean(axis=1) for mask in masks])  # [types, models]
    own = means - x.mean(axis=1)
    left = sum(float(((x[:, mask] - m[:, None]) ** 2).sum()) for mask, m in zip(masks, means, strict=True))
    within = left / (free * max(1, len(types) - len(kinds)))
    between = float(counts @ (own**2).sum(axis=1)) / (free * max(1, len(kinds) - 1))
    usual = (len(types) - counts @ counts / len(types)) / max(1, len(kinds) - 1)  # prompts of a type
    true = max(0.0, between - within) / usual if len(kinds) > 1 else 0.0
    weights = counts * true / (counts * true + within) if true else np.zeros(len(kinds))
    levels = [scores[:, mask].mean() + x.mean(axis=1) for mask in masks]
    return {k: (levels[i] + weights[i] * own[i]).tolist() for i, k in enumerate(kinds)}


def route(
    content_type: str,
    prompts: Sequence[str],
    results: Sequence[Result],
    margin: float = comparison.MARGIN,
    expected: dict[str, float] | None = None,
    tied: Sequence[set[str]] = (),
) -> Route:
    """Choose a model by its scores on the prompts of one type, which all results have. Pure: no files.

    The model with the highest expected score leads (``expected``; without it the highest mean), unless the
    type's own prompts show another to be better (paired, Holm over the pairs of this type). Cost decides only
    between the leader and those tied with it: on this type or, where it cannot tell, overall (``tied``).
    """
    if len(prompts) < 2 or not results:
        lack = "a difference needs at least 2 prompts" if results else "no model could be compared on quality"
        reason = f"{content_type}: {lack}, the run has {len(prompts)} of this type."
        return Route(content_type, None, "no data", len(prompts), {}, reason)
    scores = {r.model: {prompt: r.per_prompt[prompt] for prompt in prompts} for r in results}
    means = {model: estimate(own.values(), results[0].primary) for model, own in scores.items()}
    quality = dict(sorted(means.items(), key=lambda pair: -(pair[1].mean or 0.0)))
    pairs = paired.compare_all({model: scores[model] for model in quality}, margin)
    first = next(iter(quality))
    leader = max(quality, key=expected.__getitem__) if expected else first
    if any((p.b, p.verdict) == (leader, "better") for p in pairs):
        leader = first
    rivals = {p.b if p.a == leader else p.a: p for p in pairs if leader in (p.a, p.b)}
    still_open = {m: p for m, p in rivals.items() if p.verdict in ("tied", "cannot tell")}
    equal = [m for m, p in still_open.items() if p.verdict == "tied" or {m, leader} in tied]
    unclear = {m: p for m, p in still_open.items() if m not in equal}
    best = min((r for r in results if r.model in (leader, *equal)), key=_price).model
    basis: Basis = "cannot tell" if unclear else "tied" if equal else "better" if rivals else "only model"
    reason = f"{content_type}: {leader} is {'expected to write best' if rivals else 'the only model'}"
    if rivals:
        shown = next(iter(unclear.values() or still_open.values() or rivals.values()))
        reason += f"; {comparison.verdict_sentence(shown).removesuffix('.')}"
    if equal:
        reason += f"; of {', '.join([leader, *equal])}, tied here or overall, the cheapest is {best}"
    return Route(content_type, best, basis, len(prompts), quality, f"{reason}.")


def _price(result: Result) -> tuple[float, float]:
    """Lowest for the cheapest; the fastest of those with one cost or without."""
    return result.metrics.get(COST, math.inf), -comparison.words_per_s(result)
