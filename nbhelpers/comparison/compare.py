"""All models of a run on the same prompts: ranking, paired verdicts, what to pick, and whether size helps."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from nbhelpers import records, store, tasks
from nbhelpers.comparison import ratings
from nbhelpers.comparison.comparable import comparable
from nbhelpers.comparison.speed import compare_speeds
from nbhelpers.loading import load
from nbhelpers.records import LAB_SCALE, SCHEMA_VERSION, Estimate, LabError, Lenient, Result, Scale
from nbhelpers.scoring import rubric
from nbhelpers.stats import paired, sequential
from nbhelpers.stats.estimate import by_prompt, estimate, mean_score
from nbhelpers.stats.paired import Comparison, Scores
from nbhelpers.tracking.result import read_info, read_results


@dataclass(frozen=True)
class ComparisonReport(Lenient):
    """comparison.json: all models of a run side by side."""

    primary: str
    prompts: tuple[str, ...]
    ranking: dict[str, Estimate]  # model -> primary score, best first
    pairs: tuple[Comparison, ...]  # in ranking order, so that the leader is the first of its pairs
    pick: str | None
    pick_reason: str
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
    task: str = ""  # of logs
    lacking: dict[str, dict[str, str]] = field(default_factory=dict)  # model -> items of others -> why

    @property
    def verdicts(self) -> tuple[Comparison, ...]:
        """The pairs that decide: corrected ones where there are ratings."""
        return self.corrected or self.pairs

    @property
    def groups(self) -> dict[str, int]:
        """Model -> its group, from 1, the best model first: those not told apart from the first of it.

        The first of the group after ``paired.GROUPS`` is compared with no later one: it holds what is left.
        """
        order = ungrouped = [*(self.readers or self.ranking)]
        apart = {(pair.a, pair.b) for pair in self.verdicts if pair.verdict in ("better", "worse")}
        groups = dict[str, int]()
        while ungrouped:
            alike = [model for model in ungrouped if (ungrouped[0], model) not in apart]
            groups |= dict.fromkeys(alike, 1 + max(groups.values(), default=0))
            ungrouped = [model for model in ungrouped if model not in groups]
        return {model: groups[model] for model in order}


def compare_run(run_dir: Path) -> ComparisonReport:
    """Compare a run's models on its primary score; writes comparison.json. LabError as ``assemble``."""
    store.write_json(run_dir / "comparison.json", report := assemble(run_dir))
    return report


def assemble(run_dir: Path, margin: float | None = None) -> ComparisonReport:
    """The comparison of a run's folder, not written. margin None: the scale's. LabError as ``comparable``."""
    results, excluded, notes = comparable(run_dir)
    info = read_info(run_dir)
    looks = sequential.looks_of(info) if info else ()
    not_corrected = "Not corrected by the ratings:"
    rated: ratings.Ratings | None = None
    try:
        rated = ratings.gather_ratings(run_dir, results)
    except LabError as error:
        notes.append(f"{not_corrected} {error}")
    if rated and rated.judge and results:
        rated, results, judge_notes = ratings.scored_by_judge(rated, results)
        notes += judge_notes
    report = compare_results(results, excluded, margin, notes, looks, rated.judge if rated else "")
    # Of every model, also of one without a score.
    report = replace(report, speed=compare_speeds(run_dir, read_results(run_dir)[0]))
    # Ratings that ship may do without the sheet's.
    for source in (rated, rated._replace(given={"readers": rated.readers})) if rated else ():
        try:
            correction = ratings.correct(source, results, margin or LAB_SCALE.margin)  # in readers' points
        except LabError as error:
            report = replace(report, notes=(*report.notes, f"{not_corrected} {error}"))
            continue
        if correction:
            ranking, pairs, count = correction
            pick, reason = pick_model([*ranking], pairs, {r.model: words_per_s(r) for r in results})
            report = replace(report, readers=ranking, corrected=pairs, basis=f"corrected by {count} ratings")
            report = replace(report, pick=pick, pick_reason=reason)
        break
    return report


def settled(info: records.RunInfo, runs: Sequence[records.ModelRun]) -> bool:
    """Whether every pair of these models has a verdict, on the prompts that are scored so far."""
    task = tasks.load_task(info.settings.task)
    real = [run for run in runs if load.read_report(run).quality_applies]
    scores = {run.folder.name: by_prompt(rubric.read_scores(run), task.primary) for run in real}
    shared = set[str].intersection(*map(set, scores.values())) if scores else set[str]()
    compared = {name: {prompt: means[prompt] for prompt in shared} for name, means in scores.items()}
    return sequential.decided(compared, task.scale, sequential.looks_of(info), info.looks[-1])


def compare_results(
    results: Sequence[Result],
    excluded: dict[str, str],
    margin: float | None = None,
    notes: Sequence[str] = (),
    looks: Sequence[Sequence[str]] = (),
    by: str = "",
) -> ComparisonReport:
    """Compare results of one score on the same prompts. Pure. looks: ``sequential.looks_of``."""
    own_task = any(r.settings.task for r in results)
    by_model = {r.model: r for r in results}
    primary, scale = (results[0].primary, results[0].scale) if results else ("", LAB_SCALE)
    scale = scale if margin is None else replace(scale, margin=margin)
    scores = {model: dict(sorted(r.per_prompt.items())) for model, r in by_model.items()}
    items = "items" if own_task else "prompts"
    table = Table(primary=primary, scores=scores, scale=scale, items=items, looks=looks)
    ranking, pairs = table.means_and_pairs()
    by = f"the {by or 'rubric'}" if by or not own_task else primary
    speeds = {model: words_per_s(r) for model, r in by_model.items()}
    report = table.report(ranking, paired.judged(pairs, math.comb(len(ranking), 2)), by, speeds)
    claim = size_effect([by_model[model] for model in ranking], scale, looks)
    return replace(report, size_hypothesis=claim, excluded=excluded, notes=tuple(notes))


@dataclass(frozen=True, kw_only=True)
class Table:
    """Models' scores on the same prompts, of a run or of logs: what a comparison rests on."""

    primary: str  # the score's name
    scores: dict[str, Scores]  # model -> what is counted -> mean
    scale: Scale
    items: str  # what is counted
    looks: Sequence[Sequence[str]] = ()  # ``sequential.looks_of``

    def means_and_pairs(self, tests: int = 0) -> tuple[dict[str, Estimate], list[Comparison]]:
        """Each model's mean, the best first, and the pairs without verdicts. tests: ``paired.measured``."""
        scale, higher = self.scale, self.scale.higher_is_better
        means = {m: mean_score(scores.values(), self.primary, scale) for m, scores in self.scores.items()}
        means = dict(sorted(means.items(), key=lambda item: item[1].mean or 0.0, reverse=higher))
        best_first = {model: self.scores[model] for model in means}
        pairs = sequential.always_valid_pairs(best_first, scale.margin, self.looks, tests=tests)
        return means, [replace(pair, unit=scale.unit, items=self.items, higher=higher) for pair in pairs]

    def report(
        self, ranking: dict[str, Estimate], pairs: tuple[Comparison, ...], by: str, speeds: dict[str, float]
    ) -> ComparisonReport:
        """What the verdicts come to. by: what they rest on; speeds: ``pick_model``."""
        units = tuple(next(iter(self.scores.values()), ()))
        planned = sum(map(len, self.looks))
        by += f", by an always-valid test after {len(units)} of {planned} {self.items}" if planned else ""
        pick = pick_model([*ranking], pairs, speeds)
        report = ComparisonReport(self.primary, units, ranking, pairs, *pick, "", {})
        return replace(report, basis=f"by {by}", planned=planned or None, scale=self.scale)


def size_slope(results: Sequence[Result], looks: Sequence[Sequence[str]] = ()) -> Estimate:
    """The mean over prompts of one slope a prompt, per doubling of the parameters."""
    sizes = np.log2([float(r.parameters or 0) for r in results])
    scores = np.array([[r.per_prompt[prompt] for prompt in results[0].per_prompt] for r in results])
    centred = sizes - sizes.mean()
    slopes = centred @ scores / (centred @ centred)
    slope = estimate(slopes, "points per doubling of parameters")
    by_prompt = dict(zip(results[0].per_prompt, slopes, strict=True))
    return sequential.early_mean(slope, by_prompt, looks) if looks else slope


def size_effect(results: Sequence[Result], scale: Scale, looks: Sequence[Sequence[str]] = ()) -> str:
    """The sentence on "larger models write better content"."""
    results = [r for r in results if r.parameters]  # a server may not tell them
    do = _verbs(scale.unit)[1]
    if len({r.parameters for r in results}) < 2:
        return f"Whether larger models {do} better stays open: it needs two sizes on the same prompts."
    slope = size_slope(results, looks)
    if slope.low is None or slope.high is None:
        return f"Whether larger models {do} better stays open: {slope.reason}."
    up, down = ("better", "worse") if scale.higher_is_better else ("worse", "better")
    claim = f"These data do not show that larger models {do} better"
    if slope.low > 0:
        claim = f"On average the larger models here {do} {up}"
    elif slope.high < 0:
        claim = f"Among these models the larger ones {do} {down}"
    figures = f"{slope.mean:+.2f} {scale.unit} per doubling of the parameters"
    figures += f" [{slope.low:+.2f}, {slope.high:+.2f}]"
    return f"{claim}: {figures} over {slope.n} prompts, for these {len(results)} models only."


def pick_model(
    models: Sequence[str], pairs: Sequence[Comparison], speeds: Mapping[str, float]
) -> tuple[str | None, str]:
    """The leader by mean or, of those tied with it, the fastest; and why. ``models``: the best first."""
    if not models:
        return None, "No model could be compared on quality."
    leader = models[0]
    rivals = [pair for pair in pairs if pair.a == leader]
    if not rivals:
        return leader, f"{leader} is the only model with comparable results."
    tied = [pair.b for pair in rivals if pair.verdict == "tied"]
    unclear = [pair for pair in rivals if pair.verdict == "cannot tell"]
    if not tied and not unclear:
        ahead = f"ahead of the next one, {rivals[0].b}, by {_figures(rivals[0])}"
        return leader, f"{leader} {_verbs(rivals[0].unit)[0]} better than every other model here: {ahead}."
    pick = max((leader, *tied), key=lambda model: speeds.get(model, 0.0))
    reason = f"No mean is {'higher' if rivals[0].higher else 'lower'} than that of {leader}"
    if unclear:
        closest = min(unclear, key=lambda pair: abs(pair.difference or 0.0))
        names = _named([pair.b for pair in unclear], " and ")
        reason += f", but its lead over {names} cannot be told from chance ({closest.b}: {_figures(closest)})"
    if tied:
        reason += f". Within {rivals[0].margin:g} {rivals[0].unit} it is tied with {_named(tied, ', ')}"
        reason += f", and of these {pick} writes the most words per second" if speeds else ""
    return pick, f"{reason}."


def _named(models: Sequence[str], glue: str) -> str:
    return glue.join(models) if len(models) < paired.EVERY_PAIR else f"{len(models):,} models"


def verdict_sentence(pair: Comparison) -> str:
    """One comparison as a sentence with its figures."""
    claim = f"{pair.a} {_verbs(pair.unit)[0]} {pair.verdict} than {pair.b}"
    if pair.verdict == "tied":
        claim = f"{pair.a} and {pair.b} are tied within {pair.margin:g} {pair.unit}"
    if pair.verdict == "cannot tell":
        claim = f"{pair.a} and {pair.b}: cannot tell"
    return f"{claim}: {_figures(pair)}."


def _verbs(unit: str) -> tuple[str, str]:
    """What a model and models do, by the unit of their score."""
    return ("writes", "write") if unit == LAB_SCALE.unit else ("does", "do")


def words_per_s(result: Result) -> float:
    """Speed at batch 1 in words per second, which tokenizers do not distort; 0 if it was not measured."""
    return result.metrics.get("latency/words_per_s/mean", 0.0)


def _figures(pair: Comparison) -> str:
    """The difference with its interval and, where it is open, the prompts that would settle it."""
    if pair.difference is None or pair.n < 2:
        return pair.reason or ""
    interval = ", the same on each of" if pair.low is None else f" [{pair.low:+.2f}, {pair.high:+.2f}] over"
    figures = f"{pair.difference:+.2f} {pair.unit}{interval} {pair.n} {pair.items}"
    figures += "" if pair.rated is None else f", {pair.rated} of them rated"
    excludes_zero = pair.low is not None and pair.high is not None and (pair.low > 0 or pair.high < 0)
    if excludes_zero and pair.verdict == "cannot tell" and pair.p_holm is not None:
        figures += f", but p is {pair.p_holm:.3f}"
        figures += " after correction for all pairs" if pair.p_holm != pair.p else ""
    if pair.rated is not None or pair.verdict != "cannot tell":
        return figures
    planned = pair.prompts_needed
    if planned and planned <= pair.n:
        return f"{figures}: near a border, though {planned:,} would do for most differences"
    needed = f"about {planned:,}" if planned else f"more than {paired.MOST_PROMPTS:,}"
    high = f"{pair.prompts_high:,}" if pair.prompts_high else "more"
    between = f" ({pair.prompts_low:,} to {high})" if pair.prompts_low else ""
    return f"{figures}; {needed} {pair.items} would be needed{between} for ±{pair.margin:g} {pair.unit}"
