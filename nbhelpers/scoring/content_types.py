"""The content types: what each asks for, and how much of it a text has."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from nbhelpers import store
from nbhelpers.records import LabError, Record
from nbhelpers.scoring import texts


@dataclass(frozen=True)
class Factor(Record):
    """How an engagement factor shows in a sentence: by any of these."""

    words: tuple[str, ...] = ()
    ends_with: str = ""
    numbers: bool = False

    def shows_in(self, sentence: str) -> bool:
        plain = f" {' '.join(texts.words(sentence))} "
        ends = bool(self.ends_with) and sentence.rstrip("\"'”’) ").endswith(self.ends_with)
        named = any(f" {word} " in plain for word in self.words)
        return ends or named or (self.numbers and texts.figures(sentence) > 0)


@dataclass(frozen=True)
class ContentType(Record):
    """What data/content_types.toml says of one kind of text, its lists filled in."""

    unit: Literal["words", "characters"]
    low: int
    high: int
    source: str  # "notes" or "ours"
    vocabulary: frozenset[str]  # stems
    terms_wanted: int
    sentences: int
    paragraphs: int
    factors: tuple[Factor, ...]  # the file's engagement factors, then its authority indicators

    def __post_init__(self) -> None:
        counts = (self.low, self.terms_wanted, self.sentences, self.paragraphs, len(self.factors))
        if min(counts) < 1 or self.low > self.high:
            raise LabError("A content type has a bound or a count below 1, or low above high.")

    def size(self, text: str) -> int:
        return len(text.split()) if self.unit == "words" else len(text.strip())


@cache
def content_types() -> dict[str, ContentType]:
    """The content types by name. Raises LabError if data/content_types.toml does not hold them."""

    def build(data: dict[str, Any]) -> dict[str, ContentType]:
        words, rules = data.pop("vocabulary"), data.pop("factors")
        for row in data.values():
            row["vocabulary"] = set(map(texts.stem, words[row["vocabulary"]]))
            wanted = row.pop("engagement_factors") + row.pop("authority_indicators")
            row["factors"] = [rules[factor] for factor in wanted]
        return {name: store.from_plain(row, ContentType, f"[{name}]") for name, row in data.items()}

    return store.read_table("content_types.toml", build)


def content_type_named(name: str) -> ContentType:
    """One content type. Raises LabError for a name that data/content_types.toml does not hold."""
    if name not in content_types():
        raise LabError(f"The content type {name!r} is unknown: use one of {', '.join(content_types())}.")
    return content_types()[name]


def band(size: float, low: float, high: float) -> float:
    """10 from low to high, falling in a straight line to 0 at nothing and at twice high: no cliff."""
    if size < low:
        return 10.0 * size / low
    return 10.0 * max(0.0, min(1.0, 2.0 - size / high))


def structure(text: str, kind: ContentType) -> float:
    """Mean of four parts: enough sentences; enough paragraphs; 5 to 28 words a sentence; an opening
    sentence of at most 25 words. Each part falls in proportion to what is missing."""
    if not (found := texts.sentences(text)):
        return 0.0
    paragraphs = sum(bool(block.strip()) for block in re.split(r"\n\s*\n", text))
    parts = (
        10.0 * min(1.0, len(found) / kind.sentences),
        10.0 * min(1.0, paragraphs / kind.paragraphs),
        band(len(text.split()) / len(found), 5, 28),
        10.0 * min(1.0, 25 / max(1, len(found[0].split()))),
    )
    return sum(parts) / 4


def engagement(text: str, kind: ContentType) -> float:
    """Share of the type's factors that some sentence shows; two are enough for 10."""
    found = texts.sentences(text)
    present = sum(any(map(factor.shows_in, found)) for factor in kind.factors)
    return 10.0 * min(1.0, present / min(2, len(kind.factors)))
