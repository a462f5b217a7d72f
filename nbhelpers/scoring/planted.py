"""Answers of known standing: strong and weak ones written by hand, and bad ones made from the strong.

A rubric is an instrument; these are the weights that it is put on a scale with. :mod:`nbhelpers.scoring.validity`
does the weighing.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import cycle, islice
from typing import Any

from nbhelpers import store
from nbhelpers.scoring import texts
from nbhelpers.scoring.published import content_type_named


@dataclass(frozen=True)
class Strong:
    """A hand-written answer that deserves a high score."""

    content_type: str
    prompt: str
    text: str
    weak: str = ""  # a fluent answer to the same prompt that says nothing


@dataclass(frozen=True)
class _Planted:
    """data/planted.toml."""

    levels: dict[str, int]
    strong: tuple[Strong, ...]


@cache
def _planted() -> _Planted:
    return store.read_table("planted.toml", _checked)


def _checked(data: dict[str, Any]) -> _Planted:
    levels = {kind: int(level) for kind, level in data.pop("levels").items()}
    strong = (
        Strong(kind, row["prompt"], row["text"].strip(), row["weak"].strip())
        for kind, rows in data.items()
        for row in rows
    )
    return _Planted(levels, tuple(strong))


def levels() -> dict[str, int]:
    """The expected order: kind of answer -> level, higher is better, equal where nothing is expected."""
    return dict(_planted().levels)


def strong_answers() -> list[Strong]:
    """Two of each content type, from data/planted.toml."""
    return list(_planted().strong)


def answers(strong: Strong) -> dict[str, str]:
    """The strong answer and all of its bad relatives, by the kinds that ``levels`` names."""
    return {"strong": strong.text, **bad_answers(strong)}


def bad_answers(strong: Strong) -> dict[str, str]:
    """Answers to the same prompt that every reader would rank below the strong one, by what ails them.

    All but four (empty, weak, wrong length, cut in half) are as long as the strong answer: length gives
    nothing away. "wrong length" is the first quarter of its sentences, so that nothing else is wrong.
    """
    words = len(strong.text.split())
    vocabulary = sorted(content_type_named(strong.content_type).vocabulary)
    found = texts.sentences(strong.text)
    opening = found[:2]
    return {
        **({"weak": strong.weak} if strong.weak else {}),
        "wrong length": " ".join(found[: max(1, len(found) // 4)]),
        "empty": "",
        "one word": _fill(["optimization"], words),
        "keyword salad": _fill(vocabulary, words),
        "prompt echo": _fill(strong.prompt.split(), words),
        "loop": _fill(" ".join(opening).split(), words),
        "shuffled words": shuffled(strong.text),
        "off topic": next(
            other.text
            for other in strong_answers()
            if other.content_type == strong.content_type and other.prompt != strong.prompt
        ),
        "cut in half": _cut(strong.text),
    }


def _cut(text: str) -> str:
    """The first half of the words, as a token limit leaves it: a half that ends a sentence loses a word."""
    words = text.split(" ")
    words = words[: len(words) // 2]
    return " ".join(words[:-1] if texts.ending(" ".join(words)) == 1.0 else words)


def shuffled(text: str, seed: int = 0) -> str:
    """The text with the words inside each sentence in random order: every word kept, all sense lost."""
    generator = random.Random(seed)

    def shuffle(sentence: str) -> str:
        words = _bare(sentence)
        generator.shuffle(words)
        return " ".join(words)

    return _rewritten(text, shuffle)


def nonsense(text: str, seed: int = 0) -> str:
    """The text with its content words dealt out anew: small words and punctuation in place, no sense left.

    No bad answer for a rubric that counts words, which cannot see the difference: it shows the limit.
    """
    content = [word for part in texts.sentences(text) for word in _bare(part) if _is_content(word)]
    random.Random(seed).shuffle(content)
    deal = iter(content)

    def swap(sentence: str) -> str:
        return " ".join(next(deal) if _is_content(word) else word for word in _bare(sentence))

    return _rewritten(text, swap)


def _bare(sentence: str) -> list[str]:
    return sentence.rstrip(".!?").split()


def _is_content(word: str) -> bool:
    return word.isalpha() and word.islower() and word not in texts.FUNCTION_WORDS


def _rewritten(text: str, change: Callable[[str], str]) -> str:
    """Every sentence changed, its end mark and the paragraphs kept."""
    blocks = [
        [change(sentence) + sentence[len(sentence.rstrip(".!?")) :] for sentence in texts.sentences(block)]
        for block in text.split("\n\n")
    ]
    return "\n\n".join("\n".join(block) for block in blocks)


def _fill(words: list[str], count: int) -> str:
    return " ".join(islice(cycle(words), count)) + "."
