"""Which models of a run can be compared, on which prompts, and why the others cannot."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import mode
from typing import Any

from nbhelpers import registry, store
from nbhelpers.errors import some
from nbhelpers.records import LabError, Result, RunInfo, Sample
from nbhelpers.stats.estimate import by_unit
from nbhelpers.tracking.metrics import FOREIGN
from nbhelpers.tracking.result import read_info, read_results, spec_of

CONDITIONS = ("task", "prompts", "max_new_tokens", "temperature", "top_k", "top_p")


def comparable(run_dir: Path) -> tuple[list[Result], dict[str, str], list[str]]:
    """The results that can be compared, why other models cannot, and what a reader must know of the prompts.

    The results have the prompts that all of them share; those with one text are one unit: the mean of their
    scores, under the first id. LabError for a folder with neither a run.json nor a result.json.
    """
    results, excluded = read_results(run_dir)
    info = read_info(run_dir)
    if info is None and not results and not excluded:
        raise LabError(f"The run {run_dir.name} has no result.json: run the notebooks 01 to 06 first.")
    if info:
        _explain_missing(info, results, excluded)
    own_task = any(result.settings.task for result in results)  # its texts may be the last turn of many
    texts = _exclude_unlike(run_dir, results, excluded)
    notes = [note for result in results for note in _lacking_scores(result, own_task)]
    counted = {prompt: prompt if own_task else registry.one_text(text) for prompt, text in texts.items()}
    clusters = {prompt: cluster for result in results for prompt, cluster in result.clusters.items()}
    unit, unit_notes = units_of(counted, clusters, "items" if own_task else "prompts")
    scores = {r.model: by_unit(r.per_prompt, unit) for r in results if r.model not in excluded}
    shared = sorted(set[str].intersection(*map(set, scores.values()))) if scores else []
    if not shared:
        excluded |= dict.fromkeys(scores, "it shares no prompt with the others")
    elif lost := sorted(set[str]().union(*scores.values()).difference(shared)):
        unit_notes.append(f"Left out, because some model has no score there: {', '.join(lost)}.")
    results = [result for result in results if result.model not in excluded]
    results = [replace(r, per_prompt={prompt: scores[r.model][prompt] for prompt in shared}) for r in results]
    return results, excluded, notes + unit_notes


def _explain_missing(info: RunInfo, results: Sequence[Result], excluded: dict[str, str]) -> None:
    """Add to ``excluded`` the run's models that have no result."""
    finished = {name for result in results for name in (result.slug, result.settings.model)}
    for model in info.models:
        spec = spec_of(model, info)
        if not finished & {model, spec.slug}:
            failed = (s for s in info.notebooks if s.status == "failed" and s.model == model)
            error = next((f"{s.notebook}: {s.error}" for s in failed), "its notebooks have not run")
            excluded[spec.alias] = excluded.pop(spec.slug, error)


def _exclude_unlike(run_dir: Path, results: Sequence[Result], excluded: dict[str, str]) -> dict[str, str]:
    """Add to ``excluded`` what cannot be compared on quality; returns the text of each prompt."""
    conditions = [tuple(_conditions(r).items()) for r in results if r.quality_applies and r.finished]
    usual = dict[str, Any](mode(conditions) if conditions else {})
    most = max((len(r.per_prompt) for r in results), default=0)
    prompts_of = {r.slug: _prompt_texts(run_dir / r.slug, r) for r in results}
    texts = dict[str, str]()
    for prompt in sorted(set[str]().union(*prompts_of.values())):
        texts[prompt] = mode(of_model[prompt] for of_model in prompts_of.values() if prompt in of_model)
    for result in results:
        clash = [prompt for prompt, text in prompts_of[result.slug].items() if text != texts[prompt]]
        if reason := _why_not(result, usual, clash, most):
            excluded[result.model] = reason
    return texts


def _lacking_scores(result: Result, own_task: bool) -> Iterator[str]:
    """What a reader must know of a model's texts without a score."""
    cause = "scores.jsonl says why" if own_task else "because the prompt or the answer is not English"
    for name in (name for name in result.metrics if name.startswith(FOREIGN)):
        score = name.replace(FOREIGN, "").replace("/", " ", 1)  # "": the primary one
        count = f"{result.metrics[name]:g} of {result.attempted} texts"
        yield f"{result.model}: {count} have no score{score}, {cause}."


def units_of(
    texts: Mapping[str, str], clusters: Mapping[str, str], items: str
) -> tuple[dict[str, str], list[str]]:
    """Item -> what counts once: its cluster, or the first item of its text; and what a reader must know."""
    first, notes = dict[str, str](), list[str]()
    unit = {item: first.setdefault(text, item) for item, text in texts.items()}
    if len(first) < len(unit):
        notes.append(f"{len(unit)} {items} have {len(first)} different texts: each text counts once.")
    clustered = {item: clusters[item] for item in unit if item in clusters}
    unit |= clustered
    if len(set(unit.values())) < len(first):
        count = some(len(set(clustered.values())), "clusters")
        notes.append(f"{some(len(clustered), items)} in {count}: each cluster counts once.")
    return unit, notes


def _why_not(result: Result, usual: dict[str, Any], clash: Sequence[str], most: int) -> str | None:
    """Why a model cannot be compared on quality, or None."""
    if FOREIGN in result.metrics and 2 * len(result.per_prompt) <= most:
        foreign = "the rubric reads English, and most of its prompts or answers are not"
        return "most of its answers have no score" if result.settings.task else foreign
    if not result.quality_applies:
        return "random weights: quality is not applicable, speed and memory are real"
    if not result.finished:
        return f"all {result.attempted} generations failed"
    if other := [name for name, value in _conditions(result).items() if value != usual.get(name, value)]:
        return f"made under other conditions than most of the models: {', '.join(other)}"
    return f"its prompts have other texts than those of most models: {', '.join(clash)}" if clash else None


def _prompt_texts(folder: Path, result: Result) -> dict[str, str]:
    """Prompt id -> text of a model's samples; empty where there are none to read."""
    with suppress(LabError):
        rows = store.read_rows(folder / "samples.jsonl", Sample)
        return {row.prompt_id: row.prompt for row in rows if row.prompt_id in result.per_prompt}
    return {}


def _conditions(result: Result) -> dict[str, Any]:
    """What must be equal for scores to be comparable; repeats and seed only change the precision."""
    return {"score": result.primary, **{name: vars(result.settings)[name] for name in CONDITIONS}}
