"""Which model should write what: for each content type the best one measured, or the cheapest of the tied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from nbhelpers import store
from nbhelpers.comparison import compare as comparison
from nbhelpers.records import (
    CONTENT_TYPES,
    SCHEMA_VERSION,
    Comparison,
    Estimate,
    LabError,
    Record,
    Result,
    Score,
)

COST = "cost/usd_per_request"


@dataclass(frozen=True)
class Route(Record):
    """Which model should write one content type, and why."""

    content_type: str
    model: str | None  # None: too few prompts to choose by
    basis: Literal["better", "tied", "cannot tell", "only model", "no data"]
    prompts: int
    quality: dict[str, Estimate]  # model -> primary score on these prompts, best first
    candidates: tuple[str, ...]  # the leader and the models not shown to be worse
    prompts_needed: int | None  # to settle every open comparison with the leader
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


def route_run(run_dir: Path, margin: float = comparison.MARGIN) -> RoutingReport:
    """Choose a model for each content type of a run; writes routing.json. LabError as `assemble`."""
    report = assemble(run_dir, margin)
    store.write_json(run_dir / "routing.json", report)
    return report


def assemble(run_dir: Path, margin: float = comparison.MARGIN) -> RoutingReport:
    """The routing of a run's folder, without writing it.

    Models that the comparison of the run leaves out take no part. LabError for a folder without results,
    and for scores.jsonl files that do not say what type a prompt is.
    """
    overall = comparison.assemble(run_dir, margin)
    results = [r for r in comparison.load_results(run_dir) if r.model in overall.ranking]
    types = _content_types(run_dir, results)
    if unknown := [prompt for prompt in overall.prompts if prompt not in types]:
        raise LabError(
            f"No scores.jsonl in {run_dir.name} holds the prompt {unknown[0]}: run notebook 04 of its models."
        )
    return RoutingReport(
        primary=overall.primary,
        routes=tuple(
            route(kind, [prompt for prompt in overall.prompts if types[prompt] == kind], results, margin)
            for kind in CONTENT_TYPES
        ),
        default=overall.pick,
        default_reason=overall.pick_reason,
        excluded=overall.excluded,
    )


def route(
    content_type: str, prompts: Sequence[str], results: Sequence[Result], margin: float = comparison.MARGIN
) -> Route:
    """Choose a model by its scores on the prompts of one type, which all results have. Pure: no files.

    The highest mean leads. If it is better than every other model (paired, Holm over the pairs of this type)
    it is taken. Otherwise the cheapest is, of the leader and the models not shown to be worse: US dollars
    per request of the whole run, or words per second where a cost is missing. Below two prompts: no model.
    """
    blank = Route(content_type, None, "no data", len(prompts), {}, (), None, "")
    if len(prompts) < 2 or not results:
        return replace(blank, reason=f"{content_type}: {_too_little(len(prompts), results)}.")
    part = [replace(r, per_prompt={prompt: r.per_prompt[prompt] for prompt in prompts}) for r in results]
    found = comparison.compare(part, {}, margin)
    leader = next(iter(found.ranking))
    rivals = [pair for pair in found.pairs if pair.a == leader]  # pairs are in ranking order
    open_pairs = [pair for pair in rivals if pair.verdict != "better"]
    candidates = (leader, *(pair.b for pair in open_pairs))
    model, cheap = _cheapest(candidates, {result.model: result for result in results})
    chosen = replace(blank, model=model, quality=found.ranking, candidates=candidates)
    if not rivals:
        return replace(chosen, basis="only model", reason=f"{content_type}: {found.pick_reason}")
    if not open_pairs:
        behind = "" if len(rivals) == 1 else ", and is ahead of the others too"
        return replace(chosen, basis="better", reason=f"{content_type}: {_words(rivals[0])}{behind}.")
    unclear = [pair for pair in open_pairs if pair.verdict == "cannot tell"]
    shown = next((pair for pair in open_pairs if pair.b == model), (unclear or open_pairs)[0])
    return replace(
        chosen,
        basis="cannot tell" if unclear else "tied",
        prompts_needed=_most_needed(unclear),
        reason=f"{content_type}: {_words(shown)}; of {', '.join(candidates)} the {cheap}.",
    )


def _content_types(run_dir: Path, results: Sequence[Result]) -> dict[str, str]:
    """Prompt id -> content type, as the scores of these models say."""
    paths = [run_dir / result.slug / "scores.jsonl" for result in results]
    return {row.prompt_id: row.content_type for path in paths for row in store.read_rows(path, Score)}


def _cheapest(candidates: Sequence[str], results: dict[str, Result]) -> tuple[str, str]:
    """The cheapest candidate, the better mean first where costs are equal, and the words for it."""
    if all(COST in results[model].metrics for model in candidates):
        model = min(candidates, key=lambda model: results[model].metrics[COST])
        return model, f"cheapest is {model}, {results[model].metrics[COST]:.2g} USD a request"
    model = max(candidates, key=lambda model: comparison.words_per_s(results[model]))
    speed = comparison.words_per_s(results[model])
    return model, f"fastest is {model}, {speed:,.0f} words a second (a cost is missing)"


def _most_needed(unclear: Sequence[Comparison]) -> int | None:
    """Prompts that would settle every open pair; None if there is none, or if one would never be settled."""
    needed = [pair.prompts_needed for pair in unclear]
    return None if None in needed else max((count for count in needed if count is not None), default=None)


def _words(pair: Comparison) -> str:
    return comparison.verdict_sentence(pair).removesuffix(".")


def _too_little(prompts: int, results: Sequence[Result]) -> str:
    if not results:
        return "no model could be compared on quality"
    if not prompts:
        return "the run has no prompt of this type"
    return "the run has 1 prompt of this type, and a difference needs at least 2 to have an interval"
