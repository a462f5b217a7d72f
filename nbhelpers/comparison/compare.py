"""All models of a run on the same prompts: ranking, paired verdicts, what to pick, and whether size helps."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from nbhelpers import registry, store
from nbhelpers.comparison import ratings
from nbhelpers.comparison.speed import compare_speeds
from nbhelpers.records import LAB_SCALE, SCHEMA_VERSION, Estimate, LabError, Record, Result, Sample, Scale
from nbhelpers.stats import paired, sequential
from nbhelpers.stats.estimate import by_unit, estimate, mean_score
from nbhelpers.stats.paired import Comparison
from nbhelpers.tracking.result import read_info, read_results, spec_of

MARGIN = LAB_SCALE.margin  # points below which a difference does not matter to us (a choice)
FOREIGN = "samples/not_applicable"  # texts without a score, because a rubric reads English
CONDITIONS = ("task", "prompts", "max_new_tokens", "temperature", "top_k", "top_p")


@dataclass(frozen=True)
class ComparisonReport(Record):
    """comparison.json: all models of a run side by side."""

    __pydantic_config__ = Record.__pydantic_config__ | {"extra": "ignore"}  # older ones hold ranks
    primary: str
    prompts: tuple[str, ...]
    ranking: dict[str, Estimate]  # model -> primary score, best first
    pairs: tuple[Comparison, ...]  # in ranking order, so that the leader is the first of its pairs
    pick: str | None
    pick_reason: str
    size_slope: Estimate | None  # points per doubling of parameters, over prompts
    size_hypothesis: str  # the sentence on "larger models write better content"
    excluded: dict[str, str]  # model -> why it takes no part
    schema_version: int = SCHEMA_VERSION
    notes: tuple[str, ...] = ()  # what is not in the comparison besides whole models, and why
    basis: str = "by the rubric"  # or "by the judge MODEL", "corrected by N ratings": what verdicts rest on
    readers: dict[str, Estimate] = field(default_factory=dict)  # model -> mean in readers' points, best first
    corrected: tuple[Comparison, ...] = ()  # pairs in readers' points, in the order of ``readers``
    planned: int | None = None  # of a run --until-decided: its prompts; ``pairs`` hold at every look
    scale: Scale = LAB_SCALE  # of ``primary``
    speed: tuple[Comparison, ...] = ()  # log ratios of speeds, the faster model first; "better" is faster

    @property
    def verdicts(self) -> tuple[Comparison, ...]:
        """The pairs that decide: corrected ones where there are ratings."""
        return self.corrected or self.pairs


def compare_run(run_dir: Path) -> ComparisonReport:
    """Compare a run's models on its primary score; writes comparison.json. LabError as ``assemble``."""
    store.write_json(run_dir / "comparison.json", report := assemble(run_dir))
    return report


def assemble(run_dir: Path, margin: float | None = None) -> ComparisonReport:
    """The comparison of a run's folder, not written. margin None: the scale's. LabError as ``comparable``."""
    (results, excluded, notes), info = comparable(run_dir), read_info(run_dir)
    looks = sequential.looks_of(info) if info else ()
    speed = compare_speeds(run_dir, read_results(run_dir)[0])  # also of models without a score
    report = replace(compare(results, excluded, margin, notes, looks), speed=speed)
    try:
        known = ratings.read_ratings(run_dir, results)
        if known.judge and results:
            known, results, more = ratings.judged(known, results)
            report = compare(results, excluded, margin, [*notes, *more], looks, known.judge or "")
            report = replace(report, speed=speed)
        try:
            found = ratings.correct(known, results, margin or MARGIN)  # in readers' points
        except LabError as error:  # those that ship may do without the sheet's
            report = replace(report, notes=(*report.notes, f"Not corrected by the ratings: {error}"))
            found = ratings.correct(known._replace(people={}), results, margin or MARGIN)
    except LabError as error:
        return replace(report, notes=(*report.notes, f"Not corrected by the ratings: {error}"))
    if found is None:
        return report
    by_name, basis = {result.model: result for result in results}, f"corrected by {found.ratings} ratings"
    pick, reason = pick_model([by_name[model] for model in found.ranking], found.pairs)
    report = replace(report, readers=found.ranking, corrected=found.pairs)
    return replace(report, pick=pick, pick_reason=reason, basis=basis)


def comparable(run_dir: Path) -> tuple[list[Result], dict[str, str], list[str]]:
    """The results that can be compared, why other models cannot, and what a reader must know of the prompts.

    The results have the prompts that all of them share; those with one text are one unit: the mean of their
    scores, under the first id. LabError for a folder with neither a run.json nor a result.json.
    """
    (results, excluded), info, notes = read_results(run_dir), read_info(run_dir), list[str]()
    if info is None and not results and not excluded:
        raise LabError(f"The run {run_dir.name} has no result.json: run the notebooks 01 to 06 first.")
    done = {result.slug for result in results} | {result.settings.model for result in results}
    for model in info.models if info else ():
        spec = spec_of(model, info)
        if info and not done & {model, spec.slug}:
            failed = (s for s in info.notebooks if s.status == "failed" and s.model == model)
            error = next((f"{s.notebook}: {s.error}" for s in failed), "its notebooks have not run")
            excluded[spec.alias] = excluded.pop(spec.slug, error)
    made = [_conditions(r) for r in results if r.quality_applies and r.finished]
    usual, most = max(made, key=made.count, default={}), max((len(r.per_prompt) for r in results), default=0)
    asked = {r.slug: _asked(run_dir / r.slug, r) for r in results}
    texts = dict[str, str]()
    for prompt in sorted(set[str]().union(*asked.values())):
        said = [own[prompt] for own in asked.values() if prompt in own]
        texts[prompt] = max(said, key=said.count)
    own = any(result.settings.task for result in results)  # its texts may be the last turn of many
    for result in results:
        clash = [prompt for prompt, text in asked[result.slug].items() if text != texts[prompt]]
        if why := _why_not(result, usual, clash, most):
            excluded[result.model] = why
        for name in (name for name in result.metrics if name.startswith(FOREIGN)):
            which = name.replace(FOREIGN, "").replace("/", " ", 1)  # "": the primary one
            part = f"{result.metrics[name]:g} of {result.attempted} texts have no score{which}"
            why = "scores.jsonl says why" if own else "because the prompt or the answer is not English"
            notes.append(f"{result.model}: {part}, {why}.")
    first = dict[str, str]()
    unit = {p: first.setdefault(p if own else registry.one_text(text), p) for p, text in texts.items()}
    if len(first) < len(unit):
        notes.append(f"{len(unit)} prompts have {len(first)} different texts: each text counts once.")
    if clusters := {prompt: one for result in results for prompt, one in result.clusters.items()}:
        several = f"{len(clusters)} items stand in {len(set(clusters.values()))} clusters"
        notes.append(f"{several}: each cluster counts once, as one prompt.")
        unit |= clusters
    scores = {r.model: by_unit(r.per_prompt, unit) for r in results if r.model not in excluded}
    shared = sorted(set[str].intersection(*map(set, scores.values()))) if scores else []
    if not shared:
        excluded |= dict.fromkeys(scores, "it shares no prompt with the others")
    elif lost := sorted(set[str]().union(*scores.values()).difference(shared)):
        notes.append(f"Left out, because some model has no score there: {', '.join(lost)}.")
    kept = [result for result in results if result.model not in excluded]
    kept = [replace(r, per_prompt={prompt: scores[r.model][prompt] for prompt in shared}) for r in kept]
    return kept, excluded, notes


def _why_not(result: Result, usual: dict[str, Any], clash: Sequence[str], most: int) -> str | None:
    """Why a model cannot be compared on quality, or None."""
    other = [name for name, value in _conditions(result).items() if value != usual.get(name, value)]
    if FOREIGN in result.metrics and 2 * len(result.per_prompt) <= most:
        why = "the rubric reads English, and most of its prompts or answers are not"
        return "most of its answers have no score" if result.settings.task else why
    if not result.quality_applies:
        return "random weights: quality is not applicable, speed and memory are real"
    if not result.finished:
        return f"all {result.attempted} generations failed"
    if other:
        return f"made under other conditions than most of the models: {', '.join(other)}"
    return f"its prompts have other texts than those of most models: {', '.join(clash)}" if clash else None


def _asked(folder: Path, result: Result) -> dict[str, str]:
    """Prompt id -> text of a model's samples; empty where there are none to read."""
    with suppress(LabError):
        rows = store.read_rows(folder / "samples.jsonl", Sample)
        return {row.prompt_id: row.prompt for row in rows if row.prompt_id in result.per_prompt}
    return {}


def _conditions(result: Result) -> dict[str, Any]:
    """What must be equal for scores to be comparable; repeats and seed only change the precision."""
    return {"score": result.primary, **{name: vars(result.settings)[name] for name in CONDITIONS}}


def compare(
    results: Sequence[Result],
    excluded: dict[str, str],
    margin: float | None = None,
    notes: Sequence[str] = (),
    looks: Sequence[Sequence[str]] = (),
    by: str = "",
) -> ComparisonReport:
    """Compare results of one score on the same prompts. Pure. looks: ``sequential.looks_of``."""
    own, scale = any(r.settings.task for r in results), results[0].scale if results else LAB_SCALE
    margin, sign = scale.margin if margin is None else margin, -1 if scale.higher_is_better else 1
    means = {r.model: mean_score(r.per_prompt.values(), r.primary, scale) for r in results}
    ranked = sorted(results, key=lambda result: sign * (means[result.model].mean or 0.0))
    prompts, planned = tuple(sorted(ranked[0].per_prompt)) if ranked else (), sum(map(len, looks))
    per_model = {r.model: r.per_prompt for r in ranked}
    basis = f"by the {by or 'rubric'}" if by or not own else f"by {ranked[0].primary}"
    basis += f", by an always-valid test after {len(prompts)} of {planned} prompts" if planned else ""
    numbers = sequential.measured(per_model, margin, looks)
    numbers = [replace(n, unit=scale.unit, items="items" if own else "prompts") for n in numbers]
    pairs = paired.judged(numbers, [scale.higher_is_better] * len(numbers))
    ranking, primary = {r.model: means[r.model] for r in ranked}, ranked[0].primary if ranked else ""
    advice = *pick_model(ranked, pairs), *size_effect(ranked, scale, looks)
    report = ComparisonReport(primary, prompts, ranking, pairs, *advice, excluded, notes=tuple(notes))
    return replace(report, basis=basis, planned=planned or None, scale=scale)


def size_effect(
    results: Sequence[Result], scale: Scale = LAB_SCALE, looks: Sequence[Sequence[str]] = ()
) -> tuple[Estimate | None, str]:
    """The mean over prompts of one slope a prompt, per doubling of the parameters; and what that says."""
    results = [r for r in results if r.parameters]  # a server may not tell them
    sizes, do = np.log2([float(r.parameters or 0) for r in results]), _verbs(scale.unit)[1]
    if len(set(sizes)) < 2:
        return None, f"Whether larger models {do} better stays open: it needs two sizes on the same prompts."
    scores = np.array([[r.per_prompt[prompt] for prompt in results[0].per_prompt] for r in results])
    apart = sizes - sizes.mean()
    slopes = apart @ scores / (apart @ apart)
    slope = estimate(slopes, "points per doubling of parameters")
    if looks:
        slope = sequential.early(slope, dict(zip(results[0].per_prompt, slopes, strict=True)), looks)
    if slope.low is None or slope.high is None:
        return slope, f"Whether larger models {do} better stays open: {slope.reason}."
    found = f"These data do not show that larger models {do} better"
    up, down = ("better", "worse") if scale.higher_is_better else ("worse", "better")
    if slope.low > 0:
        found = f"On average the larger models here {do} {up}"
    elif slope.high < 0:
        found = f"Among these models the larger ones {do} {down}"
    figures = f"{slope.mean:+.2f} {scale.unit} per doubling of the parameters"
    figures += f" [{slope.low:+.2f}, {slope.high:+.2f}]"
    return slope, f"{found}: {figures} over {slope.n} prompts, for these {len(results)} models only."


def pick_model(ranked: Sequence[Result], pairs: Sequence[Comparison]) -> tuple[str | None, str]:
    """The leader by mean or, of those tied with it, the fastest; and why. ``ranked``: the best first."""
    if not ranked:
        return None, "No model could be compared on quality."
    leader, rivals = ranked[0].model, [pair for pair in pairs if pair.a == ranked[0].model]
    if not rivals:
        return leader, f"{leader} is the only model with comparable results."
    tied = [pair.b for pair in rivals if pair.verdict == "tied"]
    unclear = [pair for pair in rivals if pair.verdict == "cannot tell"]
    if not tied and not unclear:
        ahead = f"ahead of the next one, {rivals[0].b}, by {_points(rivals[0])}"
        return leader, f"{leader} {_verbs(rivals[0].unit)[0]} better than every other model here: {ahead}."
    pick = max((r for r in ranked if r.model in (leader, *tied)), key=words_per_s).model
    reason = f"No mean is higher than that of {leader}"
    if unclear:
        closest = min(unclear, key=lambda pair: abs(pair.difference or 0.0))
        names = " and ".join(pair.b for pair in unclear)
        reason += f", but its lead over {names} cannot be told from chance ({closest.b}: {_points(closest)})"
    if tied:
        reason += f". Within {rivals[0].margin:g} {rivals[0].unit} it is tied with {', '.join(tied)}"
        reason += f", and of these {pick} writes the most words per second"
    return pick, f"{reason}."


def verdict_sentence(pair: Comparison) -> str:
    """One comparison as a sentence with its figures."""
    words = f"{pair.a} {_verbs(pair.unit)[0]} {pair.verdict} than {pair.b}"
    if pair.verdict == "tied":
        words = f"{pair.a} and {pair.b} are tied within {pair.margin:g} {pair.unit}"
    if pair.verdict == "cannot tell":
        words = f"{pair.a} and {pair.b}: cannot tell"
    return f"{words}: {_points(pair)}."


def _verbs(unit: str) -> tuple[str, str]:
    """What a model and models do, by the unit of their score."""
    return ("writes", "write") if unit == LAB_SCALE.unit else ("does", "do")


def words_per_s(result: Result) -> float:
    """Speed at batch 1 in words per second, which tokenizers do not distort; 0 if it was not measured."""
    return result.metrics.get("latency/words_per_s/mean", 0.0)


def _points(pair: Comparison) -> str:
    """The difference with its interval and, where it is open, the prompts that would settle it."""
    if pair.difference is None or pair.n < 2:
        return pair.reason or ""
    interval = ", the same on each of" if pair.low is None else f" [{pair.low:+.2f}, {pair.high:+.2f}] over"
    found = f"{pair.difference:+.2f} {pair.unit}{interval} {pair.n} {pair.items}"
    found += "" if pair.rated is None else f", {pair.rated} of them rated"
    apart = pair.low is not None and pair.high is not None and (pair.low > 0 or pair.high < 0)
    if apart and pair.verdict == "cannot tell" and pair.p_holm is not None:
        found += f", but p is {pair.p_holm:.3f}"
        found += " after correction for all pairs" if pair.p_holm != pair.p else ""
    if pair.rated is not None or pair.verdict != "cannot tell":
        return found
    planned = pair.prompts_needed
    if planned and planned <= pair.n:
        return f"{found}: near a border, though {planned:,} would do for most differences"
    needed = f"about {planned:,}" if planned else f"more than {paired.MOST_PROMPTS:,}"
    high = f"{pair.prompts_high:,}" if pair.prompts_high else "more"
    between = f" ({pair.prompts_low:,} to {high})" if pair.prompts_low else ""
    return f"{found}; {needed} {pair.items} would be needed{between} for ±{pair.margin:g} {pair.unit}"
