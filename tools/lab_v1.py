"""lab_v1, the first rubric of the laboratory: a baseline for notebook 04, which shows why it went.

Eight counts of a text, each 0 to 10, and their weighted geometric mean. It puts the planted answers in order,
and it cannot tell a model's word salad from sense: two fifths of its weight hardly vary over models' texts.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from nbhelpers import store
from nbhelpers.scoring import texts
from nbhelpers.scoring.texts import ContentType, band, content_types

# Of the geometric mean; they add up to 1.
WEIGHTS = {
    "relevance": 0.25,  # the prompt's topic is written about, in sentences
    "length": 0.15,  # inside the band of the content type
    "originality": 0.15,  # says each thing once and does not repeat the prompt
    "prose": 0.15,  # words stand in sentences
    "structure": 0.10,  # sentences, paragraphs, opening
    "vocabulary": 0.05,  # the field's words, not the prompt's, and not stuffed
    "ending": 0.10,  # the last sentence is finished
    "engagement": 0.05,  # questions, insights, value, proof
}
FLOOR = 0.5  # a component counts at least this much, so that one zero does not hide the others
_FIGURE = re.compile(
    r"[$€£]\s?\d|\d\s?(?:%|percent\b|points?\b|(?:milli)?seconds?\b|ms\b|s\b|minutes?\b|hours?\b|days?\b|weeks?\b"
    r"|months?\b|years?\b|times\b|x\b|[kmgt]i?b\b|watts?\b|tokens?\b|requests?\b|dollars?\b|euros?\b)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Factor:
    """How an engagement factor shows in a sentence: by any of these."""

    words: tuple[str, ...] = ()
    ends_with: str = ""
    numbers: bool = False

    def shows_in(self, sentence: str) -> bool:
        plain = f" {' '.join(texts.words(sentence))} "
        ends = bool(self.ends_with) and sentence.rstrip("\"'”’) ").endswith(self.ends_with)
        named = any(f" {word} " in plain for word in self.words)
        return ends or named or (self.numbers and figures(sentence) > 0)


@dataclass(frozen=True)
class Kind:
    """What a content type asks for, by data/content_types.toml."""

    type: ContentType
    vocabulary: frozenset[str]  # stems
    terms_wanted: int
    sentences: int
    paragraphs: int
    factors: tuple[Factor, ...]  # the file's engagement factors, then its authority indicators


@cache
def kinds() -> dict[str, Kind]:
    table = store.read_table("content_types.toml", dict)
    rules = {
        name: Factor(**{k: tuple(v) if k == "words" else v for k, v in row.items()})
        for name, row in table["factors"].items()
    }
    found = {}
    for name, length in content_types().items():
        row = table[name]
        vocabulary = frozenset(map(texts.stem, table["vocabulary"][row["vocabulary"]]))
        factors = tuple(rules[factor] for factor in row["engagement_factors"] + row["authority_indicators"])
        counts = (row[count] for count in ("terms_wanted", "sentences", "paragraphs"))
        found[name] = Kind(length, vocabulary, *counts, factors)
    return found


def score(text: str, prompt: str, content_type: str) -> float:
    return combine(components(text, prompt, content_type))


def components(text: str, prompt: str, content_type: str) -> dict[str, float]:
    """The components of lab_v1, each 0 to 10.

    A repeated sentence counts once, an echo of the prompt never. Relevance and prose are squared shares, full
    at four fifths; half of the relevance is lost when fewer than one sentence in six touches the topic.
    Vocabulary counts terms once, none of the prompt's, and less if over a fifth of the words are terms.
    """
    kind = kinds()[content_type]
    own = texts.own_sentences(text, prompt)
    own_words = texts.words(" ".join(own))
    if not own_words:
        return dict.fromkeys(WEIGHTS, 0.0)
    added = min(1.0, len(own_words) / len(texts.words(text)))
    prose = [sentence for sentence in own if is_prose(sentence)]
    return {
        "relevance": _relevance(prose, prompt),
        "length": band(kind.type.size(text) * added, kind.type.low, kind.type.high),
        "originality": 10.0 * added * distinct_trigrams(own_words),
        "prose": 10.0 * min(1.0, len(texts.words(" ".join(prose))) / len(own_words) / 0.8) ** 2,
        "structure": structure(_only(text, own), kind),
        "vocabulary": _vocabulary(prose, prompt, kind),
        "ending": 10.0 * texts.ending(text),
        "engagement": engagement("\n".join(own), kind),
    }


def _only(text: str, own: list[str]) -> str:
    """The text's paragraphs with nothing in them but its own sentences, each at its first place."""
    left = set(own)
    blocks: list[str] = []
    for block in text.split("\n\n"):
        kept = [sentence for sentence in texts.sentences(block) if sentence in left]
        left -= set(kept)
        blocks += ["\n".join(dict.fromkeys(kept))] if kept else []
    return "\n\n".join(blocks)


def _relevance(prose: list[str], prompt: str) -> float:
    if not (topic := texts.topic_stems(prompt)):
        return 10.0
    used = [topic.intersection(texts.stems(sentence)) for sentence in prose]
    covered = len(frozenset().union(*used)) / len(topic)
    touching = sum(map(bool, used)) / max(1, len(prose))
    return 10.0 * min(1.0, covered / 0.8) ** 2 * (0.5 + 0.5 * min(1.0, touching * 6))


def _vocabulary(prose: list[str], prompt: str, kind: Kind) -> float:
    stems = texts.stems(" ".join(prose))
    wanted = kind.vocabulary.difference(texts.stems(prompt))
    used = [stem for stem in stems if stem in wanted]
    stuffing = len(used) / max(1, len(stems)) / 0.2
    return 10.0 * min(1.0, len(set(used)) / kind.terms_wanted) / max(1.0, stuffing)


def combine(components: dict[str, float]) -> float:
    """10 · Π (max(part, floor) / 10) ** weight, 0 if all are 0: a strong part cannot pay for a missing one.

    Of some components only, the weights are those of these, scaled to add up to 1.
    """
    if not any(components.values()):
        return 0.0
    weights = {name: WEIGHTS[name] for name in components}
    logs = (weights[name] * math.log(max(value, FLOOR) / 10) for name, value in components.items())
    return 10.0 * math.exp(sum(logs) / sum(weights.values()))


def structure(text: str, kind: Kind) -> float:
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


def engagement(text: str, kind: Kind) -> float:
    """Share of the type's factors that some sentence shows; two are enough for 10."""
    found = texts.sentences(text)
    present = sum(any(map(factor.shows_in, found)) for factor in kind.factors)
    return 10.0 * min(1.0, present / min(2, len(kind.factors)))


def is_prose(sentence: str) -> bool:
    """Whether words stand in a sentence, by form: 4 to 60 words, a fifth to three quarters of them function
    words; no determiner last or before a word that cannot follow one; no word twice in a row.
    """
    found, small = texts.words(sentence), texts.word_list("function_words")
    share = sum(word in small for word in found) / max(1, len(found))
    if not (4 <= len(found) <= 60 and 0.2 <= share <= 0.75):
        return False
    before, never = texts.word_list("determiners"), texts.word_list("never_after_determiners")
    # Split at spaces: in "our on-call week" the word after "our" is "on-call".
    tokens = [token.strip(".,;:!?…()\"'“”‘’").lower() for token in sentence.split()]
    return not any(a == b or (a in before and b in never) for a, b in pairwise([*tokens, "the"]))


def distinct_trigrams(sequence: list[str]) -> float:
    """Share of different three-word sequences, 0 to 1 (Distinct-n, Li et al. 2016, n = 3); 1 if too short."""
    runs = texts.trigrams(sequence)
    return len(set(runs)) / len(runs) if runs else 1.0


def figures(text: str) -> int:
    """Numbers that measure something: percentages, money, durations, sizes."""
    return len(_FIGURE.findall(text))
