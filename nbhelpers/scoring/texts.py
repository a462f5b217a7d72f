"""What can be counted in an English text: sentences, word stems, echo, repetition, figures."""

from __future__ import annotations

import re
from functools import lru_cache

# Endings for ``stem``, the longest match first.
_SUFFIXES = """
ization isation izing ising ized ised izes ises izer iser ize ise ational ation ations ated ating ates ate
ative ator ators ional ionals ion ions tion tions ition itive ive ives ment ments ement ements ity ities
ness ship ships ful fully ence ences ent ents ance ances ant ical ically ic ics al als ally able ing ings
ed er ers or ors es en ist ists y ies ly e
"""
_ENDING = re.compile(rf"^(.{{4,}}?)(?:{'|'.join(sorted(_SUFFIXES.split(), key=len, reverse=True))})$")

# The small words that hold English sentences together: about half of running prose.
_SMALL_WORDS = """
a about above across after again against all already also although always am an and any anyone are around
as at away back be because been before behind being below between both but by came can cannot come could
did do does doing done down during each either else enough even ever every everyone few first for from get
gets go goes got had has have he her here him his how i if in into is it its itself just last less like
made make many may me might more most much must my never next no nobody none nor not nothing now of off
often on once one only onto or other others our out over own per put rather same say see she should since
so some something soon still such take than that the their them then there these they thing things this
those three through to today together too two under until up upon us very was we went were what when where
which while who whom whose why will with within without would yet you your yours
"""
FUNCTION_WORDS = frozenset(_SMALL_WORDS.split())
_DETERMINERS = frozenset(("a", "an", "the", "our", "your", "my", "their", "every"))
# Prepositions, conjunctions, pronouns and auxiliary verbs cannot follow a determiner.
_CLOSED_WORDS = """
a an the our your my their every of and or but to in on at by for from with into is are was were be been am do
does did has have had it he she we they i you us them him if when which who that this these those because than
then so as not can will would could should may might must
"""
_NOT_AFTER_DETERMINER = frozenset(_CLOSED_WORDS.split())
# Words of an instruction that name the form of the answer and not its subject.
_FORM_WORDS = """
write create draft compose prepare produce give short long brief linkedin post posts article articles note
notes content thread tweet text piece thought
"""
_INSTRUCTION_WORDS = frozenset(_FORM_WORDS.split())
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_LIST_MARK = re.compile(r"^\s*(?:[-*•–]|\(?\d{1,2}[.)]|#{1,6})\s+")
_SENTENCE_GAP = re.compile(r"(?<=[.!?…])\s+|(?<=[.!?…][\"'”’)\]])\s+")
_FINISHED = re.compile(r"[.!?…][\"'”’)\]*_]*$|(?:^|\s)#\w+$")
_WORD = re.compile(r"\w+(?:['’]\w+)*")
_FIGURE = re.compile(
    r"[$€£]\s?\d|\d\s?(?:%|percent\b|points?\b|(?:milli)?seconds?\b|ms\b|s\b|minutes?\b|hours?\b|days?\b|weeks?\b"
    r"|months?\b|years?\b|times\b|x\b|[kmgt]i?b\b|watts?\b|tokens?\b|requests?\b|dollars?\b|euros?\b)",
    re.IGNORECASE,
)


def printable(text: str) -> str:
    """U+FFFD for what drives a terminal or breaks a page: controls (but line feed and tab), direction marks,
    halves of surrogate pairs."""
    return _UNPRINTABLE.sub("\ufffd", text)


def words(text: str) -> list[str]:
    """Words and numbers in lower case, without punctuation; AI and ML stand for their long forms."""
    lowered = text.lower().replace("artificial intelligence", "ai").replace("machine learning", "ml")
    return _WORD.findall(lowered.replace("’", "'"))


@lru_cache(maxsize=65536)
def stem(word: str) -> str:
    """A crude stem, so that inflections of one word meet: strategy, strategies, strategic -> strateg.

    Removes the longest known ending while at least four letters remain, until none fits (after J. B. Lovins,
    Development of a stemming algorithm, 1968), and a plural s.
    """
    word = word.lower()
    while True:
        shorter = word[:-1] if len(word) > 3 and word.endswith("s") and word[-2] not in "su" else word
        match = _ENDING.match(word) or _ENDING.match(shorter)
        shorter = match.group(1) if match else shorter
        if shorter == word:
            return word
        word = shorter


def stems(text: str) -> list[str]:
    return [stem(word) for word in words(text)]


def sentences(text: str) -> list[str]:
    """Sentences, headings and list items, without list marks. A line break ends a sentence."""
    lines = (_LIST_MARK.sub("", line).strip() for line in text.splitlines())
    return [part for line in lines for part in _SENTENCE_GAP.split(line) if part]


def is_prose(sentence: str) -> bool:
    """Whether words stand in a sentence, by four signs of form, none of meaning.

    It has 4 to 60 words; between a fifth and three quarters of them are function words; no determiner stands
    before a word that cannot follow one ("the of", "our is") or at the end; no word stands twice in a row.
    """
    found = words(sentence)
    share = sum(word in FUNCTION_WORDS for word in found) / max(1, len(found))
    # Split at spaces: in "our on-call week" the word after "our" is "on-call".
    tokens = [token.strip(".,;:!?…()\"'“”‘’").lower() for token in sentence.split()]
    broken = any(
        (first in _DETERMINERS and second in _NOT_AFTER_DETERMINER) or first == second
        for first, second in zip(tokens, [*tokens[1:], "the"], strict=True)
    )
    return 4 <= len(found) <= 60 and 0.2 <= share <= 0.75 and not broken


def topic_stems(prompt: str) -> frozenset[str]:
    """Stems of what the prompt is about: the content words after "about", or of the whole prompt."""
    _, _, subject = prompt.partition(" about ")
    return frozenset(map(stem, set(words(subject or prompt)) - FUNCTION_WORDS - _INSTRUCTION_WORDS))


def trigrams(sequence: list[str]) -> list[tuple[str, ...]]:
    return list(zip(sequence, sequence[1:], sequence[2:], strict=False))


def distinct_trigrams(sequence: list[str]) -> float:
    """Share of different three-word sequences, 0 to 1 (Distinct-n, Li et al. 2016, n = 3); 1 if too short."""
    runs = trigrams(sequence)
    return len(set(runs)) / len(runs) if runs else 1.0


def own_sentences(text: str, prompt: str) -> list[str]:
    """The sentences that the text adds: each once, and none that repeats the prompt.

    The whole prompt is cut out wherever it stands; a sentence counts as an echo when at least half of its
    three-word sequences (of its words, if it has fewer than three) are the prompt's.
    """
    asked = words(prompt)
    asked_runs, asked_words = set(trigrams(asked)), set(asked)
    if whole := prompt.strip(" :\n"):
        pattern = r"\s+".join(map(re.escape, whole.split()))
        text = re.sub(pattern + ":?", "\n", text, flags=re.IGNORECASE)
    kept: dict[tuple[str, ...], str] = {}
    for sentence in sentences(text):
        found = words(sentence)
        runs = trigrams(found)
        echoed = sum(r in asked_runs for r in runs) if runs else sum(w in asked_words for w in found)
        if found and echoed < max(1, len(runs) or len(found)) / 2:
            kept.setdefault(tuple(found), sentence)
    return list(kept.values())


def figures(text: str) -> int:
    """Numbers that measure something: percentages, money, durations, sizes."""
    return len(_FIGURE.findall(text))


def ending(text: str) -> float:
    """1.0 where the last line is finished, 0.0 where the text breaks off.

    0.5 where it cannot be told: an open list item, or a last block of at most two short lines, which may be
    a signature.
    """
    blocks = re.split(r"\n\s*\n", text.strip())
    lines = blocks[-1].splitlines()
    if not lines:
        return 0.0
    if _FINISHED.search(lines[-1].strip()):
        return 1.0
    signed = len(blocks) > 1 and len(lines) <= 2 and all(len(line.split()) <= 4 for line in lines)
    return 0.5 if signed or _LIST_MARK.match(lines[-1]) else 0.0
