"""What the models wrote, one item a prompt: the evidence of a report, and which words its scores rest on."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean

from nbhelpers.errors import NoScore
from nbhelpers.logs.compare import named
from nbhelpers.logs.formats import Log
from nbhelpers.records import Result, Sample
from nbhelpers.scoring import coherence, texts
from nbhelpers.tasks import Scorer
from nbhelpers.tracking.result import Scored, read_scored, results_in

Spans = Iterator[tuple[int, int, str]]  # from, to, a name of MEANING
MEANING = {
    "topic": "a word of the topic",
    "unknown": "a word that the score does not know",
    "again": "repeated, or from the prompt: it does not count",
    "match": "what the score looked for",
}


@dataclass(frozen=True)
class ScoredText:
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
    answers: dict[str, list[ScoredText]]  # by model, in the report's order

    @cached_property
    def means(self) -> dict[str, float]:
        """Model -> mean score of its texts for this prompt, of those that have one."""
        scores = {m: [a.score for a in answers if a.score is not None] for m, answers in self.answers.items()}
        return {model: fmean(values) for model, values in scores.items() if values}

    @property
    def gap(self) -> float:
        """How far the models' means lie apart."""
        return max(self.means.values(), default=0.0) - min(self.means.values(), default=0.0)

    @property
    def same(self) -> bool:
        """Whether all models wrote the same texts."""
        return len({tuple(a.sample.text for a in answers) for answers in self.answers.values()}) == 1

    @property
    def off(self) -> float:
        """The largest difference of a score and a rating of the same text."""
        both = [(a.score, a.rating) for answers in self.answers.values() for a in answers]
        return max((abs(s - r) for s, r in both if s is not None and r is not None), default=0.0)


def items_by_gap(
    rows: Sequence[tuple[Result, Scored]], ratings: Mapping[str, float], asked: Sequence[str] = ()
) -> list[Item]:
    """Every prompt of these models with its texts, largest gap first.

    ratings: sample key -> what readers gave. asked: ids in the order in which they were asked.
    """
    by_id = dict[str, Item]()
    for result, samples in rows:
        for sample, score in sorted(samples, key=lambda row: row[0].repeat):
            values = dict(score.values) if score else {}
            value = values.pop(result.primary, None)
            parts = {name.removeprefix(f"{result.primary}/"): part for name, part in values.items()}
            groups = (*filter(None, [sample.content_type]), *((score and score.tags) or ()))
            target = (score and score.target) or ()
            new = Item(sample.prompt_id, 0, sample.prompt, sample.content_type, groups, target, {})
            item = by_id.setdefault(sample.prompt_id, new)
            answer = ScoredText(sample, value, parts, ratings.get(sample.key))
            item.answers.setdefault(result.model, []).append(answer)
    order = {id: place for place, id in enumerate(dict.fromkeys((*asked, *by_id)))}
    return sorted((replace(item, place=order[item.id]) for item in by_id.values()), key=lambda i: -i.gap)


def side_by_side(logs: Sequence[Log], models: Collection[str]) -> list[Item]:
    """The prompts of the runs among the logs, a column for each model of these names in the comparison."""
    renamed = zip(logs, named(logs), strict=True)
    names = {(log.source, log.model): new.model for log, new in renamed if new.model in models}
    rows = list[tuple[Result, Scored]]()
    for source in dict.fromkeys(log.source for log in logs):
        for folder, (result, _) in results_in(Path(source)).items():
            if name := names.get((source, result.model)):
                rows.append((replace(result, model=name), read_scored(folder)))
    shared = [item for item in items_by_gap(rows, {}) if len(item.answers) > 1]
    return sorted(shared, key=lambda item: (item.same, -item.gap, item.place))


def _mark_rubric(text: str, item: Item, scorer: Scorer, score: float) -> Spans:
    """What lab_v2 counts of a text word by word; joints and length, which it counts too, have no words."""
    topic = texts.topic_stems(item.prompt)
    seen, at = set[tuple[str, ...]](), 0
    for sentence in texts.sentences(text):
        at = text.find(sentence, at)
        words = tuple(texts.words(sentence))
        if words in seen or not texts.own_sentences(sentence, item.prompt):
            yield at, at + len(sentence), "again"
        seen.add(words)
        at += len(sentence)
    for word in texts.WORD.finditer(text):
        if topic.intersection(texts.stems(word[0])):
            yield *word.span(), "topic"
    for start, end in coherence.english().unknown(text):
        yield start, end, "unknown"


def _mark_all(text: str, item: Item, scorer: Scorer, score: float) -> Spans:
    if score:
        yield 0, len(text), "match"


def _mark_targets(text: str, item: Item, scorer: Scorer, score: float) -> Spans:
    strict = scorer.options["strict"]
    for target in item.target if score else ():
        words = r"\W+(?:(?:a|an|the)\W+)?".join(map(re.escape, texts.normalised(target).split()))
        phrase = re.escape(target.strip()) if strict or not words else rf"(?<!\w){words}(?!\w)"
        for match in re.finditer(phrase, text, 0 if strict else re.IGNORECASE):
            yield *match.span(), "match"


def _mark_pattern(text: str, item: Item, scorer: Scorer, score: float) -> Spans:
    with suppress(NoScore):  # it took too long
        if match := texts.search(scorer.options["pattern"], text):
            yield *match.span(), "match"


# Kind of scorer -> what marks the words that its score rests on, and which marks there are.
MARKS: dict[str, tuple[Callable[[str, Item, Scorer, float], Spans], tuple[str, ...]]] = {
    "rubric": (_mark_rubric, ("topic", "unknown", "again")),
    "exact": (_mark_all, ("match",)),
    "contains": (_mark_targets, ("match",)),
    "regex": (_mark_pattern, ("match",)),
}


def marked(text: str, item: Item, scorer: Scorer, score: float | None) -> list[tuple[str, str]]:
    """The text in pieces with what each is, "" for the rest. Of marks that overlap the first is kept."""
    pieces, at = list[tuple[str, str]](), 0
    marks = MARKS.get(scorer.kind)
    spans = marks[0](text, item, scorer, score) if marks and score is not None else ()
    for start, end, mark in sorted(spans, key=lambda span: (span[0], -span[1])):
        if at <= start < end:
            pieces += [(text[at:start], ""), (text[start:end], mark)]
            at = end
    return [(piece, mark) for piece, mark in [*pieces, (text[at:], "")] if piece]
