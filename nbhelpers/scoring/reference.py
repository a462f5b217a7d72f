"""Scores of an answer by its task: against a right answer, by a pattern, or by the laboratory's rubric.

Each is 1 for right and 0 for wrong, unless it says otherwise; several right answers: the best counts.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from nbhelpers import store, tasks
from nbhelpers.errors import LabError
from nbhelpers.generation import generate
from nbhelpers.loading.tokenizer import split_reasoning
from nbhelpers.records import ModelRun, Prompt, Sample, Score, Settings
from nbhelpers.scoring import rubric
from nbhelpers.tasks import LETTERS, Scorer, Task

PATTERN_S = 1.0  # longest that a user's pattern may search one answer
_NUMBER = re.compile(r"(?<![\w.])[-−]?[$€£]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?%?", re.IGNORECASE)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
Options = Mapping[str, Any]


class NoScore(Exception):
    """Why an answer has no score: it is counted, and stands in for none."""


def normalised(text: str) -> str:
    """Without case, punctuation, articles and extra blanks (SQuAD's rules, Rajpurkar et al. 2016)."""
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def exact(text: str, item: Prompt, options: Options) -> float:
    """The answer is the target: after the usual normalisation or, ``strict``, but for blanks around it."""
    form = str.strip if options["strict"] else normalised
    return float(any(form(text) == form(target) for target in item.target))


def contains(text: str, item: Prompt, options: Options) -> float:
    """The target stands in the answer, as whole words or, ``strict``, letter by letter."""
    if options["strict"]:
        return float(any(target in text for target in item.target))
    return float(any(f" {normalised(target)} " in f" {normalised(text)} " for target in item.target))


def pattern(text: str, item: Prompt, options: Options) -> float:
    """The pattern is found; what its group takes out is the target, where the item has one."""
    import regex

    try:
        found = regex.search(options["pattern"], text, timeout=PATTERN_S)
    except TimeoutError:
        raise NoScore(f"the pattern took longer than {PATTERN_S:g} s") from None
    if found and item.target and found.groups():
        return exact(next((part for part in found.groups() if part), ""), item, {"strict": False})
    return float(found is not None)


def number(text: str, item: Prompt, options: Options) -> float:
    """The last number of the answer lies within tolerance, or relative times the target, of the target."""
    found = _NUMBER.findall(text)
    if not found:
        return 0.0
    said, targets = tasks.number(found[-1]), [tasks.number(target) for target in item.target]
    near = (max(options["tolerance"], options["relative"] * abs(target), 1e-9) for target in targets)
    return float(any(abs(said - target) <= most for target, most in zip(targets, near, strict=True)))


def letter(text: str, item: Prompt, options: Options) -> float:
    """The letter that the answer chooses is the right one."""
    known = LETTERS[: len(item.choices)]
    said = re.search(rf"(?i:answer|choice|option)\W*(?i:is\b|:)?\W*([{known}])\b", text)
    said = said or re.search(rf"(?<![\w'])([{known}])(?![\w'’]| [a-z])", text)
    return float(said is not None and said[1] == LETTERS[tasks.right_choice(item)])


SCORERS: dict[str, Callable[[str, Prompt, Options], float]] = {
    "exact": exact,
    "contains": contains,
    "regex": pattern,
    "number": number,
    "letter": letter,
}


def score_text(task: Task, item: Prompt, text: str) -> dict[str, float]:
    """Every score of an answer, without its reasoning, by name. Raises NoScore."""
    text, found = split_reasoning(text)[1], dict[str, float]()
    for scorer in task.scorers:
        if scorer.kind in SCORERS:
            found[scorer.name] = SCORERS[scorer.kind](text, item, scorer.options)
        else:
            values = rubric.score_text(text, item.text, item.content_type)
            if not values:
                raise NoScore(rubric.inapplicable(text, item.text))
            found |= _renamed(values, scorer)
    return found


def _renamed(values: Mapping[str, float], scorer: Scorer) -> dict[str, float]:
    return {name.replace(rubric.PRIMARY, scorer.name, 1): value for name, value in values.items()}


def worst(task: Task) -> dict[str, float]:
    """What a failed generation gets."""
    found = dict[str, float]()
    for scorer in task.scorers:
        scale = tasks.KINDS[scorer.kind].scale
        found[scorer.name] = scale.low if scale.higher_is_better else scale.high
        found |= _renamed(rubric.LOWEST, scorer) if scorer.kind == "rubric" else {}
    return found


def scored(settings: Settings, samples: Iterable[Sample]) -> Iterator[Score]:
    """One Score a sample, in order, by the task of a run. LabError for a sample of no item."""
    task = tasks.load_task(settings.task)
    if task is tasks.POSTS:
        yield from rubric.scored([*samples])
        return
    items = {item.id: item for item in tasks.items(settings)}
    for sample in samples:
        if (item := items.get(sample.prompt_id)) is None:
            raise LabError(
                f"The task {task.name} has no item {sample.prompt_id!r}: score it by its own task."
            )
        values, reason = worst(task), None
        if not (failed := sample.error is not None):
            try:
                values = score_text(task, item, sample.text)
            except NoScore as why:
                values, reason = {}, str(why)
        words, about = len(sample.text.split()), (item.target or None, item.tags or None)
        key = sample.key, sample.prompt_id, sample.repeat, sample.content_type
        yield Score(*key, failed, words, values, reason=reason, target=about[0], tags=about[1])


def make_scores(run: ModelRun) -> None:
    """Score the run's samples by its task into scores.jsonl, always anew: an old one may be by another."""
    store.write_rows(run.folder / "scores.jsonl", scored(run.settings, generate.read_samples(run)))
