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
from nbhelpers.records import LAB_SCALE, SCHEMA_VERSION, Estimate, LabError, Record, Result, Sample
from nbhelpers.stats import ppi
from nbhelpers.stats.paired import Comparison
from nbhelpers.tracking.result import read_rows

KEY, LABELS, JUDGED = "labels_key.json", "labels.json", "judged.json"
SHIPPED = "readers/default_run.jsonl"
PERSON = "person "
LOWEST = 1.0  # the rating of a text that was never written
By = dict[str, float]  # sample key -> rating
Drawn = dict[str, dict[str, str]]  # prompt, in random order -> model -> key of its text


@dataclass(frozen=True)
class Design(Record):
    """How the texts of a sheet were drawn: its prompts are the first ``drawn`` of a random order."""

    seed: int
    order: tuple[str, ...]  # every prompt of the comparison, by ``ppi.random_order``
    drawn: int
    chances: dict[str, float]  # content type -> the chance of each of its prompts to be on the sheet
    failed: tuple[str, ...] = ()  # keys of drawn samples without a text: rated ``LOWEST``, not shown


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
        return [by for who, by in self.given.items() if who.startswith(PERSON)]

    @property
    def readers(self) -> By:
        return self.given.get("readers", {})


class Correction(NamedTuple):
    """A comparison in readers' points, the best model first."""

    ranking: dict[str, Estimate]
    pairs: tuple[Comparison, ...]
    ratings: int  # given by readers


def read_texts(run_dir: Path, results: Sequence[Result]) -> dict[str, Text]:
    """Key -> text of these models with a score, in the files' order. LabError for a file it cannot read."""
    found = {}
    for result in results:
        rows = read_rows(run_dir / result.slug)
        known = (row for row, _ in rows if row.prompt_id in result.per_prompt)
        units = {registry.one_text(row.prompt): row.prompt_id for row in known}
        for sample, score in rows:
            unit = units.get(registry.one_text(sample.prompt))
            if unit is not None and score and (value := score.values.get(result.primary)) is not None:
                found[sample.key] = Text(result.model, unit, sample, value)
    return found


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


def read_ratings(run_dir: Path, results: Sequence[Result]) -> Ratings:
    """All that was given to these models' texts. LabError for a file it cannot read."""
    given, judge = dict[str, By](), ""
    key = read_key(run_dir) if (run_dir / LABELS).exists() else None
    if key:
        for who, sheet in store.read_json(run_dir / LABELS, Labels).ratings.items():
            given[who] = {key.items[item]: r for item, r in sheet.items() if item in key.items}
    for model, rated in read_judged(run_dir).items():
        given[judge := f"judge {model}"] = {sample: r for sample, r in rated.items() if r is not None}
    path = store.data_dir() / SHIPPED
    readings = sorted(store.read_rows(path, Reading), key=lambda r: r.place) if path.exists() else []
    known = {(reading.prompt, reading.text): reading.rating for reading in readings}
    order = list(dict.fromkeys(reading.prompt_id for reading in readings))
    paths = (run_dir / result.slug / "samples.jsonl" for result in results)
    if not given and not any((s.prompt, s.text) in known for p in paths for s in store.read_rows(p, Sample)):
        return Ratings({}, {}, given, key, judge, order)  # no text needs to be held
    texts = read_texts(run_dir, results)
    said = {sample: (text.sample.prompt, text.sample.text) for sample, text in texts.items()}
    if readers := {sample: known[words] for sample, words in said.items() if words in known}:
        given["readers"] = readers
    return Ratings(texts, {sample: text.score for sample, text in texts.items()}, given, key, judge, order)


def scored_by_judge(known: Ratings, results: Sequence[Result]) -> tuple[Ratings, list[Result], list[str]]:
    """The ratings and results with the judge's ratings as the scores, and what a reader must know of that.

    A text that the judge did not rate is missing; one that was never written has ``LOWEST``. A prompt is left
    out where some model has no text left. Where fewer than ``ppi.LEAST`` stay, all is as it was.
    """
    given = known.given[known.judge] | {k: LOWEST for k, t in known.texts.items() if t.sample.error}
    scores = {key: given[key] for key in known.texts if key in given}
    groups: dict[str, dict[str, list[float]]] = {result.model: {} for result in results}
    for text, rating in ((known.texts[key], rating) for key, rating in scores.items()):
        groups[text.model].setdefault(text.prompt, []).append(rating)
    shared = sorted(set[str].intersection(*map(set, groups.values())))
    if len(shared) < ppi.LEAST:
        why = f"it rated texts of every model on {len(shared)} prompts, of {ppi.LEAST}"
        return known._replace(judge=""), list(results), [f"Not by the {known.judge}: {why}."]
    every = len(results[0].per_prompt)
    note = f"{len(shared)} of {every} prompts count: the {known.judge} rated no text of some model on others."
    means = {model: {prompt: fmean(own[prompt]) for prompt in shared} for model, own in groups.items()}
    found = [replace(r, primary=known.judge, scale=LAB_SCALE, per_prompt=means[r.model]) for r in results]
    return known._replace(scores=scores), found, [note] if len(shared) < every else []


def correct(known: Ratings, results: Sequence[Result], margin: float) -> Correction | None:
    """The comparison of these models, on the prompts that all have, corrected by the ratings of some.

    The run's own sheet goes before ratings that ship, which are taken as far as they go. None without ratings
    by people; LabError for a sheet's ratings that are no random sample, or too few.
    """
    if len(results) < 2 or not (known.people or known.readers):
        return None
    strata, drawn = strata_of(known.texts.values()), _drawn(known)
    # A prompt is as one that was not drawn where a judge did not rate the drawn texts.
    left_out = strata.keys() - results[0].per_prompt.keys()
    left_out |= {prompt for prompt, keys in drawn.items() if set(keys.values()) - known.scores.keys()}
    drawn = {prompt: keys for prompt, keys in drawn.items() if prompt not in left_out}
    rated, given = _first_whole(drawn, known, len(results))
    if known.people:
        after = [key for prompt in list(drawn)[len(rated) + 1 :] for key in drawn[prompt].values()]
        if any(key in by for by in known.people for key in after):
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
    chance = ppi.chances(strata, list(rated))
    weights = {prompt: 1 / chance[strata[prompt]] for prompt in rated}
    of_model = {}
    for model, scores in ((result.model, result.per_prompt) for result in results):
        same = {prompt: known.scores[drawn[prompt][model]] for prompt in rated}
        of_model[model] = ppi.Rated({p: rated[p][model] for p in rated}, same, scores)
    means = {model: ppi.corrected_mean(of, weights, model)[0] for model, of in of_model.items()}
    ranking = dict(sorted(means.items(), key=lambda pair: -(pair[1].mean or 0.0)))
    pairs = ppi.correct_all({model: of_model[model] for model in ranking}, weights, margin)
    return Correction(ranking, pairs, given)


def _drawn(known: Ratings) -> Drawn:
    """The texts that were drawn to be read. LabError for a sheet not drawn at random from these prompts."""
    if not known.people or not known.key:
        drawn, keys = {prompt: dict[str, str]() for prompt in known.order}, list(known.readers)
    elif not (design := known.key.design):
        raise LabError(f"{KEY} records no random draw of the texts. Draw a new sheet with `nbhelpers label`.")
    elif list(design.order) != ppi.random_order(strata_of(known.texts.values()), design.seed):
        raise LabError("the sheet was not drawn at random from the prompts compared here. Draw a new one.")
    else:
        drawn = {prompt: {} for prompt in design.order[: design.drawn]}
        keys = [*known.key.items.values(), *design.failed]
    for key in keys:
        if (text := known.texts.get(key)) and text.prompt in drawn:
            drawn[text.prompt][text.model] = key
    return drawn


def _first_whole(drawn: Drawn, known: Ratings, models: int) -> tuple[dict[str, By], int]:
    """The first prompts with every model's text rated: prompt -> model -> mean rating; and their number.

    A rater counts on a prompt where they rated all of them: so nobody's severity falls on one model.
    """
    rated, given = dict[str, By](), 0
    for prompt, keys in drawn.items():
        read = [key for key in keys.values() if known.texts[key].sample.error is None]
        raters = known.people or [known.readers]
        whole = [by for by in raters if len(keys) == models and all(key in by for key in read)]
        if not whole:
            break
        rated[prompt] = {model: fmean(by.get(key, LOWEST) for by in whole) for model, key in keys.items()}
        given += len(whole) * len(read)
    return rated, given
