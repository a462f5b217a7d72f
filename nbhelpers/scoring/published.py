"""Content types, the published rubrics as written, and the dimensions that were published by name only.

:mod:`nbhelpers.scoring.rubric` holds the laboratory's own rubric and scores samples with all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from nbhelpers import store
from nbhelpers.records import LabError, Record
from nbhelpers.scoring import texts

BUSINESS_V1_BAND = (80, 200)  # words
BUSINESS_V1_TERMS = ("optimization", "strategy", "professional", "implementation")
BUSINESS_V2_BAND = (100, 300)  # words, LinkedIn posts only
BUSINESS_V2_TERMS = ("optimization", "strategy", "implementation")


@dataclass(frozen=True)
class ContentType(Record):
    """What data/content_types.toml says of one kind of text."""

    name: str
    unit: Literal["words", "characters"]
    low: int
    high: int
    source: str  # "notes" or "ours"
    vocabulary: frozenset[str]  # stems
    terms_wanted: int
    sentences: int
    paragraphs: int
    engagement_factors: tuple[str, ...]
    authority_indicators: tuple[str, ...]

    @property
    def low_words(self) -> float:
        """The lower bound in words; a character bound at 6 characters a word (an English average)."""
        return self.low if self.unit == "words" else self.low / 6

    def size(self, text: str) -> int:
        return len(text.split()) if self.unit == "words" else len(text.strip())


@dataclass(frozen=True)
class Factor(Record):
    """How an engagement factor shows in a sentence."""

    words: tuple[str, ...] = ()
    ends_with: str = ""
    numbers: bool = False


@dataclass(frozen=True)
class _Tables:
    """data/content_types.toml."""

    types: dict[str, ContentType]
    stems: dict[str, frozenset[str]]
    factors: dict[str, Factor]


@cache
def _tables() -> _Tables:
    return store.read_table("content_types.toml", _checked)


def _checked(data: dict[str, Any]) -> _Tables:
    lists, rules = data.pop("vocabulary"), data.pop("factors")
    stems = {name: frozenset(texts.stem(word) for word in words) for name, words in lists.items()}
    factors = {name: store.from_plain(rule, Factor, f"[factors.{name}]") for name, rule in rules.items()}
    types = {name: _content_type(name, row, stems, factors) for name, row in data.items()}
    return _Tables(types, stems, factors)


def _content_type(
    name: str, row: dict[str, Any], stems: dict[str, frozenset[str]], factors: dict[str, Factor]
) -> ContentType:
    values = {**row, "name": name, "vocabulary": stems[row["vocabulary"]]}
    kind = store.from_plain(values, ContentType, f"[{name}]")
    wanted = {*kind.engagement_factors, *kind.authority_indicators}
    if not wanted or wanted - set(factors):
        raise ValueError(f"[{name}]: its factors are not those of [factors]")
    if not 0 < kind.low <= kind.high or min(kind.terms_wanted, kind.sentences, kind.paragraphs) < 1:
        raise ValueError(f"[{name}]: a bound or a count below 1, or low above high")
    return kind


def vocabulary_stems(vocabulary: str) -> frozenset[str]:
    """Stems of the list of that name, "professional" or "technical"."""
    return _tables().stems[vocabulary]


def load_content_types() -> dict[str, ContentType]:
    """The content types by name, from data/content_types.toml; LabError if the file does not hold them."""
    return dict(_tables().types)


def content_type_named(name: str) -> ContentType:
    """One content type. Raises LabError for a name that data/content_types.toml does not hold."""
    types = load_content_types()
    if name not in types:
        raise LabError(f"content type {name!r} is unknown: use one of {', '.join(types)}.")
    return types[name]


# ---- the two published rubrics, as written -------------------------------------------------------------


def business_v1(text: str) -> float:
    """The first published rubric: 5.0 for any text, 3.0 for 80 to 200 words, 0.5 a term, at most 10.

    Kept as written. Its faults: the free 5.0; a cliff at 79 words; terms found inside other words
    ("unprofessional") and not in other forms ("strategies"); nothing about sense, prompt or repetition.
    """
    return min(10.0, sum(business_v1_parts(text).values()))


def business_v1_parts(text: str) -> dict[str, float]:
    """The three summands of :func:`business_v1`: base, length, terms."""
    if not text:
        return dict.fromkeys(("base", "length", "terms"), 0.0)
    low, high = BUSINESS_V1_BAND
    terms = sum(term in text.lower() for term in BUSINESS_V1_TERMS)
    length = 3.0 if low <= len(text.split()) <= high else 0.0
    return {"base": 5.0, "length": length, "terms": min(2.0, terms * 0.5)}


def business_v2(text: str, content_type: str) -> float:
    """The second published rubric: 5.0 always, 3.0 for a LinkedIn post of 100 to 300 words, 0.4 a term.

    Kept as written. An empty text scores 5.0; the vocabulary cap of 2.0 is dead, because three terms give
    at most 1.2, so 9.2 is the best possible score, and 6.2 for every other content type.
    """
    return min(10.0, sum(business_v2_parts(text, content_type).values()))


def business_v2_parts(text: str, content_type: str) -> dict[str, float]:
    """The three summands of :func:`business_v2`: base, length, terms."""
    low, high = BUSINESS_V2_BAND
    fits = content_type == "linkedin_post" and low <= len(text.split()) <= high
    terms = sum(term in text.lower() for term in BUSINESS_V2_TERMS)
    return {"base": 5.0, "length": 3.0 if fits else 0.0, "terms": min(2.0, terms * 0.4)}


def attainable_business_v1() -> tuple[float, ...]:
    """Every score that business_v1 can give, found by running it on texts with each set of terms."""
    filler = ["word"] * BUSINESS_V1_BAND[0]
    texts_ = [""]
    for count in range(len(BUSINESS_V1_TERMS) + 1):
        terms = list(BUSINESS_V1_TERMS[:count])
        texts_ += [" ".join([*terms, "word"]), " ".join([*terms, *filler])]
    return tuple(sorted({business_v1(text) for text in texts_}))


def reachable(max_new_tokens: int, words_needed: float, words_per_token: float = 1.0) -> bool:
    """Whether a generation of ``max_new_tokens`` can hold ``words_needed`` words.

    A word between spaces takes at least one token, so 1.0 words per token is the upper limit; pass the
    measured figure of a tokenizer for what to expect.
    """
    return max_new_tokens * words_per_token >= words_needed


# ---- dimensions published by name, defined here --------------------------------------------------------


def band(size: float, low: float, high: float) -> float:
    """10 from low to high, falling in a straight line to 0 at nothing and at twice high: no cliff."""
    if size < low:
        return 10.0 * size / low
    return 10.0 * max(0.0, min(1.0, 2.0 - size / high))


def length(text: str, kind: ContentType) -> float:
    """:func:`band` of the text's size in the content type's unit."""
    return band(kind.size(text), kind.low, kind.high)


def technical(text: str) -> float:
    """6 points for six technical terms (whole words in any inflection), 4 for two figures with a unit.

    It measures technical wording; whether a statement is right, a count of words cannot tell.
    """
    terms = len(vocabulary_stems("technical") & {texts.stem(word) for word in texts.words(text)})
    return 6.0 * min(1.0, terms / 6) + 4.0 * min(1.0, texts.figures(text) / 2)


def structure(text: str, kind: ContentType) -> float:
    """Mean of four parts: enough sentences; enough paragraphs; 5 to 28 words a sentence; an opening
    sentence of at most 25 words. Each part falls in proportion to what is missing."""
    found = texts.sentences(text)
    if not found:
        return 0.0
    parts = (
        10.0 * min(1.0, len(found) / kind.sentences),
        10.0 * min(1.0, texts.paragraphs(text) / kind.paragraphs),
        band(len(text.split()) / len(found), 5, 28),
        10.0 * min(1.0, 25 / max(1, len(found[0].split()))),
    )
    return sum(parts) / len(parts)


def engagement(text: str, kind: ContentType) -> float:
    """Share of the type's engagement factors and authority indicators found; two are enough for 10."""
    wanted = (*kind.engagement_factors, *kind.authority_indicators)
    found = texts.sentences(text)
    present = sum(any(_shows(sentence, factor) for sentence in found) for factor in wanted)
    return 10.0 * min(1.0, present / min(2, len(wanted)))


def _shows(sentence: str, factor: str) -> bool:
    rule = _tables().factors[factor]
    plain = f" {' '.join(texts.words(sentence))} "
    return (
        any(f" {word} " in plain for word in rule.words)
        or (rule.ends_with != "" and sentence.rstrip("\"'”’) ").endswith(rule.ends_with))
        or (rule.numbers and texts.figures(sentence) > 0)
    )
