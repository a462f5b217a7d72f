"""Which words of a text its score rests on, so that a reader can see them in the text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress

from nbhelpers.errors import NoScore
from nbhelpers.scoring import coherence, texts
from nbhelpers.scoring.texts import normalised
from nbhelpers.tasks import Scorer

Span = tuple[int, int, str]  # from, to, a name of MEANING
MEANING = {
    "topic": "a word of the topic",
    "unknown": "a word that the score does not know",
    "again": "repeated, or from the prompt: it does not count",
    "match": "what the score looked for",
}
_WORD = re.compile(r"\w+(?:['’]\w+)*")


def rubric(text: str, prompt: str) -> Iterator[Span]:
    """What lab_v2 counts of a text word by word; the rest of it, joints and length, has no place in it."""
    topic, seen, at = texts.topic_stems(prompt), set[tuple[str, ...]](), 0
    for sentence in texts.sentences(text):
        at = text.find(sentence, at)
        said = tuple(texts.words(sentence))
        if said in seen or not texts.own_sentences(sentence, prompt):
            yield at, at + len(sentence), "again"
        seen.add(said)
        at += len(sentence)
    for word in _WORD.finditer(text):
        if topic.intersection(texts.stems(word[0])):
            yield *word.span(), "topic"
    for start, end in coherence.english().unknown(text):
        yield start, end, "unknown"


def target(text: str, targets: Sequence[str], scorer: Scorer, score: float | None) -> Iterator[Span]:
    """What an answer of a task was found right by: all of it, the target in it, or what a pattern takes."""
    if scorer.kind == "regex":
        with suppress(NoScore):  # it took too long
            if found := texts.search(scorer.options["pattern"], text):
                yield *found.span(), "match"
    elif score and scorer.kind == "exact":
        yield 0, len(text), "match"
    elif score and scorer.kind == "contains":
        for one in targets:
            words = r"\W+(?:(?:a|an|the)\W+)?".join(map(re.escape, normalised(one).split()))
            bare = (
                re.escape(one.strip()) if scorer.options["strict"] or not words else rf"(?<!\w){words}(?!\w)"
            )
            for match in re.finditer(bare, text, 0 if scorer.options["strict"] else re.IGNORECASE):
                yield *match.span(), "match"


def pieces(text: str, spans: Iterator[Span]) -> list[tuple[str, str]]:
    """The text in pieces with what each is, "" for the rest. Of spans that overlap the first is kept."""
    found, at = list[tuple[str, str]](), 0
    for start, end, what in sorted(spans, key=lambda span: (span[0], -span[1])):
        if at <= start < end:
            found += [(text[at:start], ""), (text[start:end], what)]
            at = end
    return [(piece, what) for piece, what in [*found, (text[at:], "")] if piece]
