"""Ratings of a run's texts, by readers or by a judge, and what they make of its comparison.

Readers' come from the run's sheet (``rating_sheet``) or, for texts that ship with ratings, from data/readers.
Only a random sample can correct a score: the first prompts of a recorded random order, each with a text of
every model. A chosen part is refused. A judge, a model, rates every text: its ratings replace the rubric's.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from nbhelpers import registry, store
from nbhelpers.records import LAB_SCALE, SCHEMA_VERSION, Estimate, LabError, Lenient, Record, Result, Sample
from nbhelpers.stats import ppi
from nbhelpers.stats.paired import Comparison
from nbhelpers.tracking.result import read_scored

KEY, LABELS, JUDGED = "labels_key.json", "labels.json", "judged.json"
SHIPPED = "readers/default_run.jsonl"
PERSON = "person "
UNWRITTEN = 1.0  # the rating of a text that was never written
By = dict[str, float]  # sample key -> rating
Correction = tuple[dict[str, Estimate], tuple[Comparison, ...], int]
Drawn = dict[str, dict[str, str]]  # prompt, in random order -> model -> key of its text


@dataclass(frozen=True)
class Design(Lenient):
    """How the texts of a sheet were drawn: its prompts are the first ``drawn`` of a random order."""

    seed: int
    order: tuple[str, ...]  # every prompt of the comparison, by ``ppi.random_order``
    drawn: int
    failed: tuple[str, ...] = ()  # keys of drawn samples without a text: rated ``UNWRITTEN``, not shown


@dataclass(frozen=True)
class LabelKey(Record):
    """labels_key.json: item number, as text -> key of the sample, which names the model; and the draw."""

    items: dict[str, str]
    design: Design | None = None  # older sheets have none
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class Labels(Record):
    """labels.json: "person NAME" -> item number, as text -> rating 1 to 10; once "judge MODEL" too."""

    ratings: dict[str, dict[str, float]] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class Judged(Record):
    """judged.json: model -> sample key -> its rating 1 to 10, None if it gave none; the latest last."""

    ratings: dict[str, dict[str, float | None]] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class Reading(Record):
    """A row of data/readers/default_run.jsonl: what a reader gave to a text of the default run."""

    place: int  # of the prompt in the random order in which prompts were read, from 1
    prompt_id: str
    model: str
    content_type: str
    prompt: str
    text: str
    coherence: float
    on_topic: float
    rating: float  # overall
    schema_version: int = SCHEMA_VERSION


class Text(NamedTuple):
    model: str
    prompt: str  # the unit: prompts with one text go by the first id
    sample: Sample
    score: float  # by the rubric


class Ratings(NamedTuple):
    """The texts of a run's comparison, and what was given to them: sample key -> rating."""

    texts: dict[str, Text]
    scores: By  # by the rubric, or by the judge that takes its place
    given: dict[str, By]  # by "person NAME", "judge MODEL" and "readers", whose ratings ship with the texts
    key: LabelKey | None  # of the run's sheet
    judge: str  # the latest, which takes the rubric's place; "" for none
    order: list[str]  # the prompts as the readers came to them

    @property
    def people(self) -> list[By]:
        return [by for rater, by in self.given.items() if rater.startswith(PERSON)]

    @property
    def readers(self) -> By:
        return self.given.get("readers", {})


def read_texts(run_dir: Path, results: Sequence[Result]) -> dict[str, Text]:
    """Key -> text of these models with a score, in the files' order. LabError for a file it cannot read."""
    texts = {}
    for result in results:
        rows = read_scored(run_dir / result.slug)
        compared = (row for row, _ in rows if row.prompt_id in result.per_prompt)
        units = {registry.one_text(row.prompt): row.prompt_id for row in compared}
        for sample, score in rows:
            unit = units.get(registry.one_text(sample.prompt))
            if unit is not None and score and (value := score.values.get(result.primary)) is not None:
                texts[sample.key] = Text(result.model, unit, sample, value)
    return texts


def strata_of(texts: Iterable[Text]) -> dict[str, str]:
    """Prompt -> its content type."""
    return {text.prompt: text.sample.content_type for text in texts}


def read_key(run_dir: Path) -> LabelKey:
    """The key of the run's sheet. LabError where there is none."""
    if not (run_dir / KEY).exists():
        raise LabError(f"The run {run_dir.name} has no {KEY}: write the sheet first with `nbhelpers label`.")
    return store.read_json(run_dir / KEY, LabelKey)


def read_judged(run_dir: Path) -> dict[str, dict[str, float | None]]:
    return store.read_json(run_dir / JUDGED, Judged).ratings if (run_dir / JUDGED).exists() else {}


def gather_ratings(run_dir: Path, results: Sequence[Result]) -> Ratings:
    """All that was given to these models' texts. LabError for a file it cannot read."""
    given, judge = dict[str, By](), ""
    key = read_key(run_dir) if (run_dir / LABELS).exists() else None
    if key:
        for rater, sheet in store.read_json(run_dir / LABELS, Labels).ratings.items():
            given[rater] = {key.items[item]: r for item, r in sheet.items() if item in key.items}
    for model, by in read_judged(run_dir).items():
        given[judge := f"judge {model}"] = {sample: r for sample, r in by.items() if r is not None}
    path = store.data_dir() / SHIPPED
    readings = sorted(store.read_rows(path, Reading), key=lambda r: r.place) if path.exists() else []
    rated = {(reading.prompt, reading.text): reading.rating for reading in readings}
    order = list(dict.fromkeys(reading.prompt_id for reading in readings))
    paths = (run_dir / result.slug / "samples.jsonl" for result in results)
    if not given and not any((s.prompt, s.text) in rated for p in paths for s in store.read_rows(p, Sample)):
        return Ratings({}, {}, given, key, judge, order)  # no text needs to be held
    texts = read_texts(run_dir, results)
    pairs = {sample: (text.sample.prompt, text.sample.text) for sample, text in texts.items()}
    if readers := {sample: rated[pair] for sample, pair in pairs.items() if pair in rated}:
        given["readers"] = readers
    return Ratings(texts, {sample: text.score for sample, text in texts.items()}, given, key, judge, order)


def scored_by_judge(ratings: Ratings, results: Sequence[Result]) -> tuple[Ratings, list[Result], list[str]]:
    """The ratings and results with the judge's ratings as the scores, and what a reader must know of that.

    A text that the judge did not rate is missing; one that was never written has ``UNWRITTEN``. A prompt is
    left out where some model has no text left. Where fewer than ``ppi.LEAST`` stay, all is as it was.
    """
    texts, judge = ratings.texts, ratings.judge
    by_judge = ratings.given[judge] | {key: UNWRITTEN for key, text in texts.items() if text.sample.error}
    scores = {key: by_judge[key] for key in texts if key in by_judge}
    groups: dict[str, dict[str, list[float]]] = {result.model: {} for result in results}
    for key, rating in scores.items():
        groups[texts[key].model].setdefault(texts[key].prompt, []).append(rating)
    shared = sorted(set[str].intersection(*map(set, groups.values())))
    if len(shared) < ppi.LEAST:
        reason = f"it rated texts of every model on {len(shared)} prompts, of {ppi.LEAST}"
        return ratings._replace(judge=""), list(results), [f"Not by the {judge}: {reason}."]
    prompts = len(results[0].per_prompt)
    note = f"{len(shared)} of {prompts} prompts count: the {judge} rated no text of some model on others."
    means = {model: {p: fmean(by_prompt[p]) for p in shared} for model, by_prompt in groups.items()}
    results = [replace(r, primary=judge, scale=LAB_SCALE, per_prompt=means[r.model]) for r in results]
    return ratings._replace(scores=scores), results, [note] if len(shared) < prompts else []


def correct(ratings: Ratings, results: Sequence[Result], margin: float) -> Correction | None:
    """Means in readers' points, the best first, the pairs, and how many ratings they are corrected by.

    The run's own sheet comes before ratings that ship, which are used as far as they reach. None without
    ratings by people; LabError for a sheet's ratings that are no random sample, or too few.
    """
    if len(results) < 2 or not (ratings.people or ratings.readers):
        return None
    strata = strata_of(ratings.texts.values())
    drawn = _drawn(ratings)
    # Where a judge did not rate the drawn texts, a prompt counts as not drawn.
    left_out = strata.keys() - results[0].per_prompt.keys()
    left_out |= {prompt for prompt, keys in drawn.items() if set(keys.values()) - ratings.scores.keys()}
    drawn = {prompt: keys for prompt, keys in drawn.items() if prompt not in left_out}
    rated, count = _rated_in_order(drawn, ratings, len(results))
    if ratings.people:
        later = [key for prompt in list(drawn)[len(rated) + 1 :] for key in drawn[prompt].values()]
        if any(key in by for by in ratings.people for key in later):
            raise LabError(
                f"no rater has rated every text of the prompt {list(drawn)[len(rated)]}, and later ones are "
                "rated. Only ratings from the first item on, in their order, are a random sample."
            )
        if len(rated) < ppi.LEAST:
            lack = f"on {len(rated)} prompts every model's text is rated"
            raise LabError(f"{lack}, and at least {ppi.LEAST} are needed.")
    elif len(rated) < ppi.LEAST:
        return None
    strata = {prompt: strata[prompt] for prompt in results[0].per_prompt}
    chances = ppi.chances(strata, list(rated))
    weights = {prompt: 1 / chances[strata[prompt]] for prompt in rated}
    models = {}
    for result in results:
        by_people = {prompt: means[result.model] for prompt, means in rated.items()}
        by_score = {prompt: ratings.scores[drawn[prompt][result.model]] for prompt in rated}
        models[result.model] = ppi.Rated(by_people, by_score, result.per_prompt)
    means = {model: ppi.corrected_mean(of, weights, model)[0] for model, of in models.items()}
    ranking = dict(sorted(means.items(), key=lambda item: -(item[1].mean or 0.0)))
    return ranking, ppi.correct_all({model: models[model] for model in ranking}, weights, margin), count


def _drawn(ratings: Ratings) -> Drawn:
    """The texts that were drawn to be read. LabError for a sheet not drawn at random from these prompts."""
    if not ratings.people or not ratings.key:
        prompts, keys = ratings.order, list(ratings.readers)
    elif not (design := ratings.key.design):
        raise LabError(f"{KEY} records no random draw of the texts. Draw a new sheet with `nbhelpers label`.")
    elif list(design.order) != ppi.random_order(strata_of(ratings.texts.values()), design.seed):
        raise LabError("the sheet was not drawn at random from the prompts compared here. Draw a new one.")
    else:
        prompts = list(design.order[: design.drawn])
        keys = [*ratings.key.items.values(), *design.failed]
    drawn: Drawn = {prompt: {} for prompt in prompts}
    for key in keys:
        if (text := ratings.texts.get(key)) and text.prompt in drawn:
            drawn[text.prompt][text.model] = key
    return drawn


def _rated_in_order(drawn: Drawn, ratings: Ratings, models: int) -> tuple[dict[str, By], int]:
    """The first prompts with every model's text rated: prompt -> model -> mean rating; and how many ratings.

    A rater counts on a prompt only if they rated all its texts, so that no severity falls on one model.
    """
    rated, count = dict[str, By](), 0
    for prompt, keys in drawn.items():
        shown = [key for key in keys.values() if ratings.texts[key].sample.error is None]
        raters = [by for by in ratings.people or [ratings.readers] if all(key in by for key in shown)]
        if len(keys) != models or not raters:
            break
        rated[prompt] = {model: fmean(by.get(key, UNWRITTEN) for by in raters) for model, key in keys.items()}
        count += len(raters) * len(shown)
    return rated, count
