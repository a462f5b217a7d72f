"""Readers' ratings of a run's texts, and what they make of its comparison.

They come from the run's own sheets (``labels``) or, for texts that ship with ratings, from data/readers. Only
a random sample can correct a score: the first prompts of a recorded random order, each with a text of every
model. A chosen part of the prompts is refused, whoever chose it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
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
By = dict[str, float]  # sample key -> rating or score


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
    """A row of data/readers/default_run.jsonl: a reader's rating of a text of the default run."""

    sha256: str  # of prompt + text, UTF-8
    prompt_id: str
    place: int  # of the prompt in the random order in which prompts were read, from 1
    rating: float
    schema_version: int = SCHEMA_VERSION


class Text(NamedTuple):
    """A text of a compared model; ``prompt`` is the unit: prompts with one text go by the first id."""

    model: str
    prompt: str
    sample: Sample
    score: float


class Correction(NamedTuple):
    """A comparison in readers' points, the best model first."""

    ranking: dict[str, Estimate]
    pairs: tuple[Comparison, ...]
    ratings: int  # given by readers
    prompts: int  # rated


Drawn = dict[str, dict[str, str]]  # prompt, in random order -> model -> key of its text


def read_texts(run_dir: Path, results: Sequence[Result]) -> dict[str, Text]:
    """Key -> text of these models with a score, in the files' order. LabError for a file it cannot read."""
    found = {}
    for result in results:
        rows = {row.key: row for row in store.read_rows(run_dir / result.slug / "samples.jsonl", Sample)}
        scores = store.read_rows(run_dir / result.slug / "scores.jsonl", Score)
        values = {s.key: s.values[result.primary] for s in scores if result.primary in s.values}
        units = {
            registry.one_text(s.prompt): s.prompt_id
            for s in rows.values()
            if s.prompt_id in result.per_prompt
        }
        for key, sample in rows.items():
            unit = units.get(registry.one_text(sample.prompt))
            if unit is not None and key in values:
                found[key] = Text(result.model, unit, sample, values[key])
    return found


def read_ratings(run_dir: Path) -> dict[str, By]:
    """Rater -> sample key -> rating, from the run's sheets; {} without labels."""
    if not (run_dir / LABELS).exists():
        return {}
    items = read_key(run_dir).items
    ratings = store.read_json(run_dir / LABELS, Labels).ratings
    return {
        who: {items[n]: value for n, value in rated.items() if n in items} for who, rated in ratings.items()
    }


def read_key(run_dir: Path) -> LabelKey:
    """The key of the run's sheet. LabError where there is none."""
    if not (run_dir / KEY).exists():
        raise LabError(f"The run {run_dir.name} has no {KEY}: write the sheet first with `nbhelpers label`.")
    return store.read_json(run_dir / KEY, LabelKey)


def digest(prompt: str, text: str) -> str:
    """What a shipped rating is found by."""
    return hashlib.sha256((prompt + text).encode(errors="surrogatepass")).hexdigest()


def shipped(texts: Mapping[str, Text]) -> tuple[By, list[str]]:
    """Key -> rating of the texts that ship with one; and the prompts in the order in which they were read."""
    path = store.data_dir() / SHIPPED
    readings = list(store.read_rows(path, Reading)) if path.exists() else []
    known, places = {r.sha256: r.rating for r in readings}, {r.prompt_id: r.place for r in readings}
    digests = {key: digest(text.sample.prompt, text.sample.text) for key, text in texts.items()}
    rated = {key: known[found] for key, found in digests.items() if found in known}
    return rated, sorted(places, key=lambda prompt: places[prompt])


def correct(
    run_dir: Path, results: Sequence[Result], prompts: Sequence[str], margin: float
) -> Correction | list[str]:
    """The comparison of these models on these prompts, corrected by the run's ratings.

    [] where there are none by people, and a sentence where a sheet's are refused. Ratings that ship are taken
    as far as they go.
    """
    results = [replace(r, per_prompt={prompt: r.per_prompt[prompt] for prompt in prompts}) for r in results]
    if (
        not prompts
        or len(results) < 2
        or not ((run_dir / LABELS).exists() or (store.data_dir() / SHIPPED).exists())
    ):
        return []
    try:
        texts = read_texts(run_dir, results)
        if people := [by for who, by in read_ratings(run_dir).items() if who.startswith(PERSON)]:
            return _by_sheet(results, texts, read_key(run_dir), people, margin)
    except LabError as error:
        return [f"Not corrected by the ratings: {error}"]
    rated, order = shipped(texts)
    order = [prompt for prompt in order if prompt in strata_of(texts.values())]
    drawn = {p: {t.model: key for key, t in texts.items() if t.prompt == p and key in rated} for p in order}
    with suppress(LabError):  # too few
        whole = _first_whole(drawn, [rated], {result.model for result in results})
        return _correct(results, texts, drawn, *whole, margin)
    return []


def _by_sheet(
    results: Sequence[Result], texts: Mapping[str, Text], key: LabelKey, people: Sequence[By], margin: float
) -> Correction:
    """Correct by a sheet's ratings. LabError for ratings that are no random sample."""
    strata, design = strata_of(texts.values()), key.design
    if design is None:
        raise LabError(f"{KEY} records no random draw of the texts. Draw a new sheet with `nbhelpers label`.")
    if list(design.order) != corrected.random_order(strata, design.seed):
        raise LabError("the sheet was not drawn at random from the prompts compared here. Draw a new one.")
    drawn: Drawn = {prompt: {} for prompt in design.order[: design.drawn]}
    for sample in (*key.items.values(), *design.failed):
        if (text := texts.get(sample)) and text.prompt in drawn:
            drawn[text.prompt][text.model] = sample
    whole, given = _first_whole(drawn, people, {result.model for result in results}, design.failed)
    after, next_one = list(drawn)[len(whole) + 1 :], list(drawn)[len(whole) : len(whole) + 1]
    if any(sample in by for by in people for prompt in after for sample in drawn[prompt].values()):
        stop = ", ".join(n for n, sample in key.items.items() if sample in drawn[next_one[0]].values())
        raise LabError(
            f"nobody has rated all of the items {stop}, and later ones are rated. Only ratings from the "
            "first item on, in their order, are a random sample: fill the gap, or take the later ones out."
        )
    return _correct(results, texts, drawn, whole, given, margin)


def strata_of(texts: Iterable[Text]) -> dict[str, str]:
    """Prompt -> its content type."""
    return {text.prompt: text.sample.content_type for text in texts}


def _first_whole(
    drawn: Drawn, raters: Sequence[By], models: set[str], failed: Container[str] = ()
) -> tuple[dict[str, By], int]:
    """The first prompts with every model's text rated: prompt -> model -> mean rating; and their number.

    A rater counts on a prompt where they rated all of them: so nobody's severity falls on one model.
    """
    rated, count = dict[str, By](), 0
    for prompt, keys in drawn.items():
        read = [key for key in keys.values() if key not in failed]
        whole = [by for by in raters if keys.keys() == models and all(key in by for key in read)]
        if not whole:
            break
        rated[prompt] = {m: fmean(by.get(key, LOWEST) for by in whole) for m, key in keys.items()}
        count += len(whole) * len(read)
    return rated, count


def _correct(
    results: Sequence[Result],
    texts: Mapping[str, Text],
    drawn: Drawn,
    rated: dict[str, By],
    given: int,
    margin: float,
) -> Correction:
    """Correct by the mean ratings of some prompts. LabError if they are too few."""
    if len(rated) < corrected.LEAST:
        raise LabError(f"{len(rated)} prompts are rated with every model's text; it takes {corrected.LEAST}.")
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
    return Correction(ranking, pairs, given, len(rated))
