"""Does a text hang together? Every joint between two words is judged by the runs of words that cross it.

How often a run of two to four words, or of two to five word classes, stands in English prose is counted in
data/coherence.npz; a small convolutional network turns the counts of seven joints to each side, and the word
classes there, into the probability that the one in the middle is broken.
``tools/fit_coherence.py`` makes the file from sources that it names; it trains on new runs as on known ones.
"""

import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from nbhelpers import store
from nbhelpers.records import LabError
from nbhelpers.scoring import texts

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]
_TOKEN = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*|\d[\d.,:]*\d|\d|\n\s*\n|[.,;:?!()\"“”%$€#…]|--|[–—]")
_SIGNS = {"“": '"', "”": '"', "–": "--", "—": "--", "…": ".", "€": "$", "#": "."}
_SUFFIXES = "ing", "ed", "ly", "ness", "tion", "ment", "ity", "able", "ous", "ive", "al", "er", "s", "e", "y"
BREAK, NUMBER, NAME, UNKNOWN = "<p>", "<num>", "<name>", "<bad>"
SPECIAL = (BREAK, NUMBER, NAME, UNKNOWN, *(f"<rare:{suffix}>" for suffix in ("", *_SUFFIXES)))
RUNS = (("words", (1, 2, 3, 4)), ("classes", (2, 3, 4, 5)))  # the orders that are counted
OWN = 16  # added to the level of a run that stands in the authored passages
DILATIONS = (1, 2, 4)  # how far each layer of the network looks to both sides
_MULTIPLIER, _SHIFTS = np.uint64(0x9E3779B97F4A7C15), (np.uint64(31), np.uint64(29))  # of the hash


@dataclass(frozen=True)
class English:
    """What is known of English prose. The arrays are those of data/coherence.npz."""

    words: dict[str, int]  # frequent words and signs -> token; the first are SPECIAL
    known: frozenset[str]  # rarer words
    classes: Ids  # [tokens]
    runs: NDArray[np.uint32]  # [runs], sorted: hashes of the runs of words and of classes
    levels: NDArray[np.uint8]  # [runs]: 1 + floor(log2 of the count), at most 15; plus OWN for passages' runs
    layers: tuple[Floats, ...]  # of the network, as ``broken`` unpacks them

    def tokens(self, text: str) -> Ids:
        """The text as tokens between paragraph breaks, so many at its end that no run is longer than it."""
        tokens = [BREAK, *(token for _, token in self._tokens(text))]
        tokens += [BREAK] * max(1, RUNS[-1][1][-1] - len(tokens))
        return np.array([self.words[token] for token in tokens], dtype=np.int64)

    def unknown(self, text: str) -> list[tuple[int, int]]:
        """Where the text has words that are not English, as spans of characters."""
        return [span for span, token in self._tokens(text) if token == UNKNOWN]

    def _tokens(self, text: str) -> Iterator[tuple[tuple[int, int], str]]:
        token = BREAK
        for match in _TOKEN.finditer(text):
            token = self._token(match[0], token)
            yield match.span(), token

    def _token(self, raw: str, previous: str) -> str:
        word = _SIGNS.get(raw) or raw.lower().replace("’", "'")
        if raw[0] == "\n" or word in self.words:
            return BREAK if raw[0] == "\n" else word
        if not word[0].isalpha():
            return NUMBER
        base = word.removesuffix("'s")
        if base in self.words or base in self.known or base.removesuffix("s") in self.known:
            suffixes = (suffix for suffix in _SUFFIXES if word[3:].endswith(suffix))
            return f"<rare:{next(suffixes, '')}>"
        inside = previous not in (".", "?", "!", ":", '"', BREAK)
        return NAME if raw[0].isupper() and (inside or not raw[1:].islower()) else UNKNOWN

    def joints(self, tokens: Ids) -> Floats:
        """[tokens - 1, features]: how well the runs across each joint are known, and what its tokens are."""
        columns: list[Floats] = []
        for (kind, orders), row in zip(RUNS, (tokens, self.classes[tokens]), strict=True):
            for order in orders:
                levels = (self.find(hashes(row, order, kind)) % OWN).astype(np.float32)
                if order == 1:
                    columns += [levels[:-1], levels[1:]]
                    continue
                levels = np.pad(levels, order - 2)
                across = np.lib.stride_tricks.sliding_window_view(levels, order - 1)
                columns += [across.max(1), (across > 0).mean(1)] if order > 2 else [levels]
        for mask in (tokens == self.words[UNKNOWN], tokens < len(SPECIAL), self.ends(tokens)):
            columns += [mask[:-1].astype(np.float32), mask[1:].astype(np.float32)]
        repeated = tokens[1:] == tokens[:-1]
        repeated[1:] |= tokens[2:] == tokens[:-2]
        return np.stack([*columns, repeated], 1).astype(np.float32)

    def find(self, run: NDArray[np.uint32]) -> NDArray[np.uint8]:
        """What ``levels`` holds of each hashed run, 0 for one that is not known."""
        index = np.searchsorted(self.runs, run).clip(max=len(self.runs) - 1)
        return np.where(self.runs[index] == run, self.levels[index], np.uint8(0))

    def ends(self, tokens: Ids) -> NDArray[np.bool_]:
        """[tokens]: whether a sentence ends with it."""
        return np.isin(tokens, [self.words[sign] for sign in (".", "?", "!", ":", BREAK)])

    def broken(self, tokens: Ids, joints: Floats) -> Floats:
        """[tokens - 1]: log odds that a joint is broken, by dilated convolutions (Yu and Koltun 2016)."""
        mean, scale, embeddings, first, first_bias, dilated, biases, last, last_bias = self.layers
        classes = embeddings[self.classes[tokens]]
        hidden = np.hstack([(joints - mean) / scale, classes[:-1], classes[1:]])
        hidden = np.maximum(hidden @ first + first_bias, 0)
        for step, weights, bias in zip(DILATIONS, dilated, biases, strict=True):
            padded = np.pad(hidden, ((step, step), (0, 0)))
            window = np.hstack([padded[: len(hidden)], hidden, padded[2 * step :]])
            hidden = hidden + np.maximum(window @ weights + bias, 0)
        return np.asarray(hidden @ last + last_bias, dtype=np.float32)


def hashes(row: Ids, order: int, kind: str) -> NDArray[np.uint32]:
    """A hash of every run of ``order`` numbers in the row; [0] for a row that is shorter."""
    mixed = np.full(max(0, len(row) - order + 1), 16 * order + len(kind), np.uint64)
    for start in range(order):
        mixed = mixed * np.uint64(1000003) + row[start : start + len(mixed)].astype(np.uint64)
        for shift in _SHIFTS:
            mixed = (mixed ^ (mixed >> shift)) * _MULTIPLIER
    return (mixed >> np.uint64(32)).astype(np.uint32)


@cache
def english() -> English:
    """What data/coherence.npz holds. Raises LabError for a file that is missing or broken."""
    try:
        with np.load(store.data_dir() / "coherence.npz", allow_pickle=False) as file:
            words, known = (file[name].tobytes().decode().split("\n") for name in ("words", "known"))
            tokens = {word: token for token, word in enumerate(words)}
            classes = file["classes"].astype(np.int64)
            runs = np.cumsum(file["gaps"], dtype=np.uint64).astype(np.uint32)
            layers = tuple(file[f"layer{number}"].astype(np.float32) for number in range(9))
            return English(tokens, frozenset(known), classes, runs, file["levels"], layers)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise LabError(f"coherence.npz in the data folder is not usable ({error}): restore it.") from None


def features(text: str) -> dict[str, float]:
    """What tells whether a text hangs together: of its joints, its words and its sentences."""
    model = english()
    tokens = model.tokens(text)
    joints = model.joints(tokens)
    odds = np.clip(model.broken(tokens, joints), -6, 4)  # in logarithms, that a joint is broken
    by_sentence = np.split(odds, np.flatnonzero(model.ends(tokens[1:-1])) + 1)
    by_sentence = [part for part in by_sentence if len(part) > 3] or [odds]  # without numbers of lists
    runs = list(zip(tokens, tokens[1:], tokens[2:], strict=False))
    sentences = texts.sentences(text)
    return {
        "worst_joints": float(np.quantile(odds, 0.95)),
        "loose_joints": float((odds > -2.5).mean()),
        "mean_joint": float(odds.mean()),
        "sound": float(np.mean([part.max() < 0 for part in by_sentence])),  # sentences that hold
        "new_runs": float((joints[:, 3] == 0).mean()),  # joints that no run of three words in the counts has
        "known_runs": float(joints[:, 6].mean()),  # share of the runs of four words across a joint
        "familiar": float((model.find(hashes(tokens, 2, "words")) >= OWN).mean()),  # pairs of the passages
        "unknown": float((tokens == model.words[UNKNOWN]).mean()),  # words that are not English
        "rare": float((tokens < len(SPECIAL)).mean()),
        "distinct": len(set(runs)) / max(1, len(runs)),  # runs of three, each counted once
        "lower": sum(s[0].islower() for s in sentences) / max(1, len(sentences)),  # without a capital
    }
