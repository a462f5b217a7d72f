"""All models of a run on the same prompts: ranking, paired verdicts, what to pick, and whether size helps."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from nbhelpers import store
from nbhelpers.records import (
    SCHEMA_VERSION,
    Comparison,
    Estimate,
    Failure,
    LabError,
    ModelSpec,
    Record,
    Result,
    RunInfo,
    Sample,
)
from nbhelpers.stats import paired
from nbhelpers.stats.estimate import estimate
from nbhelpers.stats.paired import RankInterval

MARGIN = 0.5  # points on the 0..10 scale below which a difference does not matter to us (a choice)
# What must be equal for two models' scores to be comparable; repeats and seed only change the precision.
CONDITIONS = ("prompts", "max_new_tokens", "temperature", "top_k", "top_p")


@dataclass(frozen=True)
class ComparisonReport(Record):
    """comparison.json: all models of a run side by side."""

    primary: str
    prompts: tuple[str, ...]
    ranking: dict[str, Estimate]  # model -> primary score, best first
    pairs: tuple[Comparison, ...]  # in ranking order, so that the leader is the first of its pairs
    pick: str | None
    pick_reason: str
    size_slope: Estimate | None  # points per doubling of parameters, over prompts
    size_hypothesis: str  # the sentence on "larger models write better content"
    excluded: dict[str, str]  # model -> why it takes no part
    ranks: tuple[RankInterval, ...] = ()  # best first
    schema_version: int = SCHEMA_VERSION


def compare_run(run_dir: Path, margin: float = MARGIN) -> ComparisonReport:
    """Compare a run's models on its primary score; writes comparison.json. LabError as ``assemble``."""
    report = assemble(run_dir, margin)
    store.write_json(run_dir / "comparison.json", report)
    return report


def assemble(run_dir: Path, margin: float = MARGIN) -> ComparisonReport:
    """The comparison of a run's folder, without writing it.

    A run whose models all failed has a comparison that says so. LabError for a folder with neither a
    run.json nor a result.json.
    """
    results, broken = read_results(run_dir)
    excluded: dict[str, str] = {}
    if (run_dir / "run.json").exists():
        info = store.read_json(run_dir / "run.json", RunInfo)
        done = {result.slug for result in results} | {result.settings.model for result in results}
        for model in info.models:
            spec = spec_of(model, info)
            if model in done or spec.slug in done:
                continue
            failures = [s for s in info.notebooks if s.model == model and s.status == "failed"]
            reason = (
                f"{failures[0].notebook}: {failures[0].error}" if failures else "its notebooks have not run"
            )
            excluded[spec.alias] = broken.pop(spec.slug, reason)
    elif not results and not broken:
        raise LabError(f"The run {run_dir.name} has no result.json: run the notebooks 01 to 06 first.")
    excluded |= broken
    usable = []
    for result in results:
        if not result.quality_applies:
            excluded[result.model] = "random weights: quality is not applicable, speed and memory are real"
        elif not result.finished:
            excluded[result.model] = f"all {result.attempted} generations failed"
        else:
            usable.append(result)
    other = _other_conditions(usable)
    return compare([result for result in usable if result.model not in other], excluded | other, margin)


def read_results(run_dir: Path) -> tuple[list[Result], dict[str, str]]:
    """Every result.json of a run, and the model folders whose file cannot be used, with the reason."""
    results, broken = [], {}
    for path in sorted(run_dir.glob("*/result.json")):
        try:
            result = store.read_json(path, Result)
            if result.slug != path.parent.name:  # paths are made from it
                raise LabError(f"result.json is of the folder {result.slug!r}: run the model again.")
            results.append(replace(result, model=spec_of(result.model).alias))
        except LabError as error:
            broken[path.parent.name] = str(error).replace(f"{path}", path.name)
    return results, broken


def count_failures(run_dir: Path, info: RunInfo | None) -> dict[str, int]:
    """How often each kind of failure happened to a run's notebooks and samples, the most frequent first."""
    kinds = [status.failure for status in (info.notebooks if info else ()) if status.status == "failed"]
    for path in run_dir.glob("*/samples.jsonl"):
        with suppress(LabError):  # a file that cannot be read is reported by itself
            last = {row.key: row for row in store.read_rows(path, Sample)}
            kinds += [row.failure for row in last.values() if row.error]
    return dict(Counter((kind or Failure.OTHER).value for kind in kinds).most_common())


def spec_of(model: str, info: RunInfo | None = None) -> ModelSpec:
    """What a name of a run means: people read its alias, its files lie in its slug.

    As run.json says. Where that says nothing, a path goes by its last part, so that no report shows where
    models lie on this machine.
    """
    known = dict(zip(info.models, info.specs, strict=False)) if info else {}
    is_path = Path(model).is_absolute() or model.startswith((".", "~"))
    return known.get(model) or ModelSpec((Path(model).name if is_path else model) or model, "", "local")


def _other_conditions(results: Sequence[Result]) -> dict[str, str]:
    """Results made under other conditions than most: their scores cannot be compared with the rest."""

    def short(value: object) -> str:
        return Path(value).name or "the benchmark" if isinstance(value, str) else str(value)

    made = {r.model: {"score": r.primary, **{c: getattr(r.settings, c) for c in CONDITIONS}} for r in results}
    usual = (
        dict(Counter(tuple(values.items()) for values in made.values()).most_common(1)[0][0]) if made else {}
    )
    return {
        model: "made under other conditions: "
        + "; ".join(f"{n} {short(v)}, not {short(usual[n])}" for n, v in values.items() if v != usual[n])
        for model, values in made.items()
        if values != usual
    }


def compare(results: Sequence[Result], excluded: dict[str, str], margin: float = MARGIN) -> ComparisonReport:
    """Compare results of the same score, on the prompts that all of them have. Pure: no files."""
    shared = sorted(set.intersection(*(set(result.per_prompt) for result in results))) if results else []
    if not shared:
        excluded = excluded | {result.model: "it shares no prompt with the others" for result in results}
        results = []
    results = [replace(r, per_prompt={prompt: r.per_prompt[prompt] for prompt in shared}) for r in results]
    means = {r.model: estimate(r.per_prompt.values(), r.primary) for r in results}
    ranking = dict(sorted(means.items(), key=lambda item: -(item[1].mean or 0.0)))
    by_model = {result.model: result for result in results}
    per_model = {model: by_model[model].per_prompt for model in ranking}
    pairs = paired.compare_all(per_model, margin=margin)
    pick, reason = pick_model(ranking, pairs, by_model)
    slope = size_slope(results)
    return ComparisonReport(
        primary=results[0].primary if results else "",
        prompts=tuple(shared),
        ranking=ranking,
        pairs=pairs,
        pick=pick,
        pick_reason=reason,
        size_slope=slope,
        size_hypothesis=size_sentence(slope, results),
        excluded=excluded,
        ranks=paired.rank_intervals(per_model),
    )


def pick_model(
    ranking: dict[str, Estimate], pairs: Sequence[Comparison], results: dict[str, Result]
) -> tuple[str | None, str]:
    """Which model to take, and why, in plain words.

    The model with the highest mean leads. Among the models tied with it the fastest is taken. A lead that
    cannot be told from chance is called one: the leader is then the best guess, not the winner.
    """
    if not ranking:
        return None, "No model could be compared on quality."
    leader = next(iter(ranking))
    rivals = [pair for pair in pairs if pair.a == leader]
    if not rivals:
        return (
            leader,
            f"{leader} is the only model with comparable results: there is nothing to prefer it to.",
        )
    tied = [pair.b for pair in rivals if pair.verdict == "tied"]
    unclear = [pair for pair in rivals if pair.verdict == "cannot tell"]
    pick = max([leader, *tied], key=lambda model: words_per_s(results[model]))
    if unclear:
        closest = min(unclear, key=lambda pair: abs(pair.difference or 0.0))
        lead = f"{leader} and {closest.b} have the same mean"
        if closest.difference != 0:
            others = _list([pair.b for pair in unclear])
            lead = f"{leader} has the highest mean, but its lead over {others} cannot be told from chance"
        against = f"against {closest.b}: " if len(unclear) > 1 else ""
        also = f" {pick} is tied with it and writes more words per second." if pick != leader else ""
        return pick, f"{lead} ({against}{_points(closest)}).{also}"
    if tied:
        return pick, (
            f"{leader} has the highest mean, but {_list(tied)} {'is' if len(tied) == 1 else 'are'} tied with "
            f"it within {pairs[0].margin:g} points; of these {pick} writes the most words per second."
        )
    ahead = f"ahead of the next one, {rivals[0].b}, by {_points(rivals[0])}"
    return leader, f"{leader} writes better than every other model here: {ahead}."


def size_slope(results: Sequence[Result]) -> Estimate | None:
    """Points gained per doubling of the parameters: one least-squares slope a prompt, then their mean.

    Prompts are the units, so the interval speaks about other prompts for these models, not about other
    models. All results have the same prompts. None for fewer than two sizes.
    """
    sizes = [math.log2(result.parameters) for result in results if result.parameters > 0]
    if len(sizes) < len(results) or len(set(sizes)) < 2:
        return None
    centre = sum(sizes) / len(sizes)
    weights = [(size - centre) / sum((other - centre) ** 2 for other in sizes) for size in sizes]
    weighted = list(zip(weights, results, strict=True))
    prompts = sorted(results[0].per_prompt)
    slopes = [sum(weight * result.per_prompt[p] for weight, result in weighted) for p in prompts]
    return estimate(slopes, "points per doubling of parameters")


def size_sentence(slope: Estimate | None, results: Sequence[Result]) -> str:
    """What the data say about "larger models write better content"."""
    if slope is None or slope.mean is None:
        return "Whether larger models write better cannot be tested: it needs two sizes on the same prompts."
    if slope.low is None or slope.high is None:
        return f"Whether larger models write better stays open ({slope.reason})."
    figures = f"{slope.mean:+.2f} points per doubling of the parameters [{slope.low:+.2f}, {slope.high:+.2f}]"
    differ = ", which also differ in architecture" if len({r.family for r in results}) > 1 else ""
    figures += f" over {slope.n} prompts, for these {len(results)} models only{differ}."
    if slope.low > 0:
        means = {r.model: sum(r.per_prompt.values()) / len(r.per_prompt) for r in results}
        best, largest = max(means, key=lambda m: means[m]), max(results, key=lambda r: r.parameters).model
        but = "" if best == largest else f" Size alone does not decide: the best is {best}, not {largest}."
        return f"On average the larger models here write better: {figures}{but}"
    if slope.high < 0:
        return f"Among these models the larger ones write worse: {figures}"
    return f"These data do not show that larger models write better: {figures}"


def verdict_sentence(pair: Comparison) -> str:
    """One comparison as a sentence with its figures."""
    if pair.difference is None or pair.low is None:
        return f"{pair.a} and {pair.b}: cannot tell ({pair.reason})."
    words = f"{pair.a} writes {pair.verdict} than {pair.b}"
    if pair.verdict == "tied":
        words = f"{pair.a} and {pair.b} are tied within {pair.margin:g} points"
    elif pair.verdict == "cannot tell":
        words = f"{pair.a} and {pair.b}: cannot tell"
    return f"{words}: {_points(pair)}."


def words_per_s(result: Result) -> float:
    """Speed at batch 1 in words per second, which tokenizers do not distort; 0 if it was not measured."""
    return result.metrics.get("latency/words_per_s/mean", 0.0)


def _points(pair: Comparison) -> str:
    """The difference with its interval and, where it is open, the prompts that would settle it."""
    if pair.difference is None:
        return pair.reason or ""
    if pair.low is None or pair.high is None:
        return f"{pair.difference:+.2f} points, {pair.reason}"
    found = f"{pair.difference:+.2f} points [{pair.low:+.2f}, {pair.high:+.2f}] over {pair.n} prompts"
    if pair.verdict != "cannot tell":
        return found
    if pair.prompts_needed is None:
        never = f"not even {paired.MOST_PROMPTS:,} prompts would tell a difference this small from chance"
        return f"{found}; {never}"
    return f"{found}; about {pair.prompts_needed:,} prompts would be needed"


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
