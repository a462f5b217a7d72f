"""What the models wrote, one item a prompt: the evidence of a report, those that differ most first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean

from nbhelpers import store
from nbhelpers.logs.read import Log, named
from nbhelpers.records import LabError, Result, Sample, Score
from nbhelpers.tracking.result import read_info, spec_of


@dataclass(frozen=True)
class Answer:
    """One text with what was found out about it; None: no score, nobody rated it."""

    sample: Sample
    score: float | None
    parts: dict[str, float]  # the other scores of the text
    rating: float | None


@dataclass(frozen=True)
class Item:
    """A prompt and every model's texts for it, repeats in order."""

    id: str
    place: int  # of the prompt among those asked, from 0
    prompt: str
    kind: str  # content type, "" of a task without
    groups: tuple[str, ...]  # that and its tags
    target: tuple[str, ...]
    answers: dict[str, tuple[Answer, ...]]  # by model, in the report's order

    @cached_property
    def means(self) -> dict[str, float]:
        """Model -> mean score of its texts for this prompt, of those that have one."""
        scored = {model: [a.score for a in own if a.score is not None] for model, own in self.answers.items()}
        return {model: fmean(scores) for model, scores in scored.items() if scores}

    @property
    def gap(self) -> float:
        """How far the models' means lie apart."""
        return max(self.means.values(), default=0.0) - min(self.means.values(), default=0.0)

    @property
    def same(self) -> bool:
        """Whether all models wrote the same texts."""
        return len({tuple(a.sample.text for a in own) for own in self.answers.values()}) == 1

    @property
    def off(self) -> float:
        """The largest difference of a score and a rating of the same text."""
        both = [(a.score, a.rating) for own in self.answers.values() for a in own]
        return max((abs(s - r) for s, r in both if s is not None and r is not None), default=0.0)


def items(
    run_dir: Path, results: Sequence[Result], ratings: Mapping[str, float], asked: Sequence[str] = ()
) -> list[Item]:
    """Every prompt of these models with its texts, largest gap first; a model without readable files lacks.

    ratings: sample key -> what readers gave. asked: ids in the order in which they were asked.
    """
    answers, first = dict[str, dict[str, list[Answer]]](), dict[str, tuple[Sample, Score | None]]()
    for result in results:
        try:
            samples = list(store.read_rows(run_dir / result.slug / "samples.jsonl", Sample))
            scores = {s.key: s for s in store.read_rows(run_dir / result.slug / "scores.jsonl", Score)}
        except LabError:  # the report names it elsewhere
            continue
        for sample in sorted(samples, key=lambda s: s.repeat):
            score, parts = scores.get(sample.key), dict[str, float]()
            if score:
                own_name = f"{result.primary}/"
                parts = {n.removeprefix(own_name): v for n, v in score.values.items() if n != result.primary}
            value = score.values.get(result.primary) if score else None
            own = answers.setdefault(sample.prompt_id, {}).setdefault(result.model, [])
            own.append(Answer(sample, value, parts, ratings.get(sample.key)))
            first.setdefault(sample.prompt_id, (sample, score))
    found, order = [], {id: place for place, id in enumerate(dict.fromkeys((*asked, *first)))}
    for id, (sample, score) in first.items():
        groups = (*filter(None, [sample.content_type]), *((score.tags if score else None) or ()))
        target = (score.target if score else None) or ()
        by_model = {model: tuple(own) for model, own in answers[id].items()}
        found.append(Item(id, order[id], sample.prompt, sample.content_type, groups, target, by_model))
    return sorted(found, key=lambda item: -item.gap)


def side_by_side(logs: Sequence[Log]) -> list[Item]:
    """The prompts of the runs among the logs, a column a run's model, by the names of the comparison."""
    names = {(log.source, log.model): new.model for log, new in zip(logs, named(logs), strict=True)}
    own = dict[str, Item]()
    for source in dict.fromkeys(log.source for log in logs):
        for path in sorted((*Path(source).glob("result.json"), *Path(source).glob("*/result.json"))):
            result, run_dir = store.read_json(path, Result), path.parent.parent
            model = spec_of(result.model, read_info(run_dir)).alias
            if name := names.get((source, model)):
                for item in items(run_dir, [replace(result, slug=path.parent.name)], {}):
                    [answers] = item.answers.values()
                    known = own.setdefault(item.id, replace(item, answers={}))
                    own[item.id] = replace(known, answers=known.answers | {name: answers})
    both = [item for item in own.values() if len(item.answers) > 1]
    return sorted(both, key=lambda item: (item.same, -item.gap, item.place))
