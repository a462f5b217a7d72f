"""Which model should write what: for each content type the best one measured, or the cheapest of the tied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from nbhelpers import store
from nbhelpers.comparison import compare as comparison
from nbhelpers.records import CONTENT_TYPES, SCHEMA_VERSION, Estimate, LabError, Record, Result, Score

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
    candidates: tuple[str, ...]  # the leader and the models not shown to be worse
    prompts_needed: int | None  # to settle every open comparison with the leader; None: none open, or never
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
    results = [r for r in results if r.model in overall.ranking]
    rows = (row for r in results for row in store.read_rows(run_dir / r.slug / "scores.jsonl", Score))
    types = {row.prompt_id: row.content_type for row in rows}
    if unknown := [prompt for prompt in overall.prompts if prompt not in types]:
        raise LabError(f"The prompt {unknown[0]} is in no scores.jsonl of {run_dir.name}: run notebook 04.")
    by_type = {kind: [p for p in overall.prompts if types[p] == kind] for kind in CONTENT_TYPES}
    routes = tuple(route(kind, prompts, results, margin) for kind, prompts in by_type.items())
    return RoutingReport(overall.primary, routes, overall.pick, overall.pick_reason, overall.excluded)


def route(
    content_type: str, prompts: Sequence[str], results: Sequence[Result], margin: float = comparison.MARGIN
) -> Route:
    """Choose a model by its scores on the prompts of one type, which all results have. Pure: no files.

    The highest mean is taken if it is better than every other model (paired, Holm over the pairs of this
    type), otherwise the cheapest of it and the models not shown to be worse (the fastest where a cost is
    missing).
    """
    if len(prompts) < 2 or not results:
        lack = "a difference needs at least 2 prompts" if results else "no model could be compared on quality"
        reason = f"{content_type}: {lack}, the run has {len(prompts)} of this type."
        return Route(content_type, None, "no data", len(prompts), {}, (), None, reason)
    part = [replace(r, per_prompt={prompt: r.per_prompt[prompt] for prompt in prompts}) for r in results]
    found = comparison.compare(part, {}, margin)
    leader = next(iter(found.ranking))
    rivals = [pair for pair in found.pairs if pair.a == leader]
    still_open = [pair for pair in rivals if pair.verdict != "better"]
    unclear = [pair for pair in rivals if pair.verdict == "cannot tell"]
    candidates = (leader, *(pair.b for pair in still_open))
    kept = [result for name in candidates for result in results if result.model == name]
    if all(COST in result.metrics for result in kept):
        best = min(kept, key=lambda result: result.metrics[COST])
        why = f"cheapest is {best.model}, {best.metrics[COST]:.2g} USD a request"
    else:
        best, speed = max(kept, key=comparison.words_per_s), max(map(comparison.words_per_s, kept))
        why = f"fastest is {best.model}, {speed:,.0f} words a second, a cost is missing"
    basis: Basis = "better" if rivals else "only model"
    reason = f"{content_type}: {found.pick_reason}"
    if still_open:
        shown = next((pair for pair in still_open if pair.b == best.model), (unclear or still_open)[0])
        words = comparison.verdict_sentence(shown).removesuffix(".")
        reason = f"{content_type}: {words}; of {', '.join(candidates)} the {why}."
        basis = "cannot tell" if unclear else "tied"
    needed = [pair.prompts_needed or 0 for pair in unclear]  # 0: no number of prompts would settle it
    most = max(needed) if needed and all(needed) else None
    return Route(content_type, best.model, basis, len(prompts), found.ranking, candidates, most, reason)
