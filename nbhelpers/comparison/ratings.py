"""Readers' ratings of a run's texts, and what they make of its comparison.

They come from the run's sheet (``labels``) or, for texts that ship with ratings, from data/readers. Only
a random sample can correct a score: the first prompts of a recorded random order, each with a text of every
model. A chosen part is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from nbhelpers import registry, store
from nbhelpers.records import SCHEMA_VERSION, Estimate, LabError, Record, Result, Sample, Score
from nbhelpers.stats import corrected
from nbhelpers.stats.paired import Comparison

KEY, LABELS, SHIPPED = "labels_key.json", "labels.json", "readers/default_run.jsonl"
PERSON = "person "
LOWEST = 1.0  # the rating of a text that was never written
By = dict[str, float]  # sample key -> rating
Drawn = dict[str, dict[str, str]]  # prompt, in random order -> model -> key of its text


@dataclass(frozen=True)
class Design(Record):
    """How the texts of a sheet were drawn: its prompts are the first ``drawn`` of a random order."""

    seed: int
    order: tuple[str, ...]  # every prompt of the comparison, by ``corrected.random_order``
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
    """labels.json: "person NAME" or "judge MODEL" -> item number, as text -> rating 1 to 10, if given."""

    ratings: dict[str, dict[str, float]] = field(default_factory=dict)
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
    score: float


class Correction(NamedTuple):
    """A comparison in readers' points, the best model first."""

    ranking: dict[str, Estimate]
    pairs: tuple[Comparison, ...]
    ratings: int  # given by readers


def read_texts(run_dir: Path, results: Sequence[Result]) -> dict[str, Text]:
    """Key -> text of these models with a score, in the files' order. LabError for a file it cannot read."""
    found = {}
    for result in results:
        rows = {row.key: row for row in store.read_rows(run_dir / result.slug / "samples.jsonl", Sample)}
        scores = {s.key: s.values for s in store.read_rows(run_dir / result.slug / "scores.jsonl", Score)}
        known = (row for row in rows.values() if row.prompt_id in result.per_prompt)
        units = {registry.one_text(row.prompt): row.prompt_id for row in known}
        for key, sample in rows.items():
            unit, score = units.get(registry.one_text(sample.prompt)), scores.get(key, {}).get(result.primary)
            if unit is not None and score is not None:
                found[key] = Text(result.model, unit, sample, score)
    return found


def strata_of(texts: Iterable[Text]) -> dict[str, str]:
    """Prompt -> its content type."""
    return {text.prompt: text.sample.content_type for text in texts}


def read_key(run_dir: Path) -> LabelKey:
    """The key of the run's sheet. LabError where there is none."""
    if not (run_dir / KEY).exists():
        raise LabError(f"The run {run_dir.name} has no {KEY}: write the sheet first with `nbhelpers label`.")
    return store.read_json(run_dir / KEY, LabelKey)


def read_ratings(run_dir: Path) -> dict[str, By]:
    """Rater -> sample key -> rating, from the run's sheets; {} without labels."""
    if not (run_dir / LABELS).exists():
        return {}
    items, ratings = read_key(run_dir).items, store.read_json(run_dir / LABELS, Labels).ratings
    return {who: {items[n]: r for n, r in given.items() if n in items} for who, given in ratings.items()}


def shipped(texts: Mapping[str, Text]) -> tuple[By, list[str]]:
    """Key -> rating of the texts that ship with one; and the prompts in the order in which they were read."""
    path = store.data_dir() / SHIPPED
    readings = sorted(store.read_rows(path, Reading), key=lambda r: r.place) if path.exists() else []
    known = {(reading.prompt, reading.text): reading.rating for reading in readings}
    own = {key: (text.sample.prompt, text.sample.text) for key, text in texts.items()}
    rated = {key: known[said] for key, said in own.items() if said in known}
    return rated, list(dict.fromkeys(reading.prompt_id for reading in readings))


def correct(run_dir: Path, results: Sequence[Result], margin: float) -> Correction | None:
    """The comparison of these models, on the prompts that all have, corrected by the ratings of some.

    The run's own sheet goes before ratings that ship, which are taken as far as they go. None without ratings
    by people; LabError for a sheet's ratings that are no random sample, or too few.
    """
    if len(results) < 2 or not ((run_dir / LABELS).exists() or (store.data_dir() / SHIPPED).exists()):
        return None
    texts = read_texts(run_dir, results)
    people = [by for who, by in read_ratings(run_dir).items() if who.startswith(PERSON)]
    if people:
        drawn = _drawn(read_key(run_dir), texts)
        rated, given = _first_whole(drawn, people, texts, results)
        after = [key for prompt in list(drawn)[len(rated) + 1 :] for key in drawn[prompt].values()]
        if any(key in by for by in people for key in after):
            raise LabError(
                f"no rater has rated every text of the prompt {list(drawn)[len(rated)]}, and later ones are "
                "rated. Only ratings from the first item on, in their order, are a random sample."
            )
        if len(rated) < corrected.LEAST:
            raise LabError(f"{len(rated)} prompts are rated with every model's text, of {corrected.LEAST}.")
    else:
        readers, order = shipped(texts)
        drawn = {prompt: {} for prompt in order}
        for key in readers:
            drawn[texts[key].prompt][texts[key].model] = key
        rated, given = _first_whole(drawn, [readers], texts, results)
        if len(rated) < corrected.LEAST:
            return None
    strata = strata_of(texts.values())
    chance = corrected.chances(strata, list(rated))
    weights = {prompt: 1 / chance[strata[prompt]] for prompt in rated}
    known = {}
    for model, scores in ((result.model, result.per_prompt) for result in results):
        same = {prompt: texts[drawn[prompt][model]].score for prompt in rated}
        known[model] = corrected.Rated({p: rated[p][model] for p in rated}, same, scores)
    means = {model: corrected.corrected_mean(of, weights, model) for model, of in known.items()}
    ranking = dict(sorted(means.items(), key=lambda pair: -(pair[1].mean or 0.0)))
    pairs = corrected.correct_all({model: known[model] for model in ranking}, weights, margin)
    return Correction(ranking, pairs, given)


def _drawn(key: LabelKey, texts: Mapping[str, Text]) -> Drawn:
    """The texts of a sheet. LabError for one that was not drawn at random from these prompts."""
    if key.design is None:
        raise LabError(f"{KEY} records no random draw of the texts. Draw a new sheet with `nbhelpers label`.")
    if list(key.design.order) != corrected.random_order(strata_of(texts.values()), key.design.seed):
        raise LabError("the sheet was not drawn at random from the prompts compared here. Draw a new one.")
    drawn: Drawn = {prompt: {} for prompt in key.design.order[: key.design.drawn]}
    for sample in (*key.items.values(), *key.design.failed):
        if (text := texts.get(sample)) and text.prompt in drawn:
            drawn[text.prompt][text.model] = sample
    return drawn


def _first_whole(
    drawn: Drawn, people: Sequence[By], texts: Mapping[str, Text], results: Sequence[Result]
) -> tuple[dict[str, By], int]:
    """The first prompts with every model's text rated: prompt -> model -> mean rating; and their number.

    A rater counts on a prompt where they rated all of them: so nobody's severity falls on one model.
    """
    rated, given = dict[str, By](), 0
    for prompt, keys in drawn.items():
        read = [key for key in keys.values() if texts[key].sample.error is None]
        whole = [by for by in people if len(keys) == len(results) and all(key in by for key in read)]
        if not whole:
            break
        rated[prompt] = {model: fmean(by.get(key, LOWEST) for by in whole) for model, key in keys.items()}
        given += len(whole) * len(read)
    return rated, given
