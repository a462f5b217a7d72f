"""How far a rating can be trusted: rank agreement with answers of known standing, and agreement of raters.

The answers are strong and weak ones written by hand, and bad ones made from the strong. Every figure is an
Estimate whose units are prompts (or rated texts): it carries an interval or the reason why there is none.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import cycle, islice
from typing import Any

import numpy as np
from scipy import stats as sps

from nbhelpers import store
from nbhelpers.records import CONTENT_TYPES, Estimate
from nbhelpers.scoring import texts
from nbhelpers.scoring.published import content_type_named
from nbhelpers.stats import estimate as estimates
from nbhelpers.stats.estimate import Array

Rating = Callable[[str, str, str], float | None]  # (text, prompt, content type) -> rating, None if refused
RESAMPLES = 2000


@dataclass(frozen=True)
class ReferenceAnswer:
    """A hand-written answer that deserves a high score."""

    content_type: str
    prompt: str
    text: str
    weak: str = ""  # a fluent answer to the same prompt that says nothing


@cache
def levels() -> dict[str, int]:
    """The expected order: kind of answer -> level, higher is better, equal where nothing is expected."""
    return store.read_table("planted.toml", lambda data: {k: int(v) for k, v in data["levels"].items()})


@cache
def reference_answers() -> tuple[ReferenceAnswer, ...]:
    """Two of each content type, from data/planted.toml."""

    def build(data: dict[str, Any]) -> tuple[ReferenceAnswer, ...]:
        return tuple(
            ReferenceAnswer(kind, row["prompt"], row["text"].strip(), row["weak"].strip())
            for kind in CONTENT_TYPES
            for row in data[kind]
        )

    return store.read_table("planted.toml", build)


def known_answers(reference: ReferenceAnswer) -> dict[str, str]:
    """Answers to one prompt, by the kinds of ``levels``: every reader would rank the strong one first.

    All but four (empty, weak, wrong length, cut in half) are as long as the strong one: length gives nothing
    away. "wrong length" is the first quarter of its sentences, so that nothing else is wrong; "cut in half"
    is what a token limit leaves, so it never ends a sentence.
    """
    strong = reference.text
    found = texts.sentences(strong)
    half = strong.split(" ")[: len(strong.split(" ")) // 2]
    half = half[:-1] if texts.ending(" ".join(half)) == 1.0 else half

    def repeated(words: Iterable[str]) -> str:
        return " ".join(islice(cycle(words), len(strong.split()))) + "."

    return {
        "strong": strong,
        **({"weak": reference.weak} if reference.weak else {}),
        "wrong length": " ".join(found[: max(1, len(found) // 4)]),
        "empty": "",
        "one word": repeated(["optimization"]),
        "keyword salad": repeated(sorted(content_type_named(reference.content_type).vocabulary)),
        "prompt echo": repeated(reference.prompt.split()),
        "loop": repeated(" ".join(found[:2]).split()),
        "shuffled words": _shuffled(strong),
        "off topic": next(
            other.text
            for other in reference_answers()
            if other.content_type == reference.content_type and other.prompt != reference.prompt
        ),
        "cut in half": " ".join(half),
    }


def _shuffled(text: str) -> str:
    """The words inside each sentence in random order; end marks and paragraphs stay."""
    generator = random.Random(0)

    def shuffle(sentence: str) -> str:
        bare = sentence.rstrip(".!?")
        words = bare.split()
        generator.shuffle(words)
        return " ".join(words) + sentence[len(bare) :]

    return "\n\n".join("\n".join(map(shuffle, texts.sentences(block))) for block in text.split("\n\n"))


# ---- agreement -----------------------------------------------------------------------------------------


def tau(ratings: Sequence[float | None], expected: Sequence[int]) -> float | None:
    """Kendall's tau-b of ratings and expected levels, -1 to 1; 0 for equal ratings, which order nothing.

    Refused ratings (None) are left out; None when fewer than two are left.
    """
    pairs = [(rating, level) for rating, level in zip(ratings, expected, strict=True) if rating is not None]
    if len(pairs) < 2:
        return None
    found = float(sps.kendalltau(*zip(*pairs, strict=True), variant="b").statistic)
    return 0.0 if math.isnan(found) else found  # 0 / 0


def taus(rate: Rating) -> list[float | None]:
    """tau of a rating on the known answers to each prompt, in the order of ``reference_answers``."""
    expected, found = levels(), []
    for reference in reference_answers():
        answers = known_answers(reference)
        ratings = [rate(text, reference.prompt, reference.content_type) for text in answers.values()]
        found.append(tau(ratings, [expected[kind] for kind in answers]))
    return found


def agreement(rate: Rating, name: str = "", seed: int = 0) -> Estimate:
    """Rank agreement of a rating with the expected order: tau-b, averaged over prompts, with a BCa interval.

    Prompts with fewer than two ratings are left out: ``n`` says how many were counted.
    """
    found = [value for value in taus(rate) if value is not None]
    return estimates.estimate(found, name, method="bca")


def krippendorff(ratings: Iterable[Sequence[float | None]], name: str = "", seed: int = 0) -> Estimate:
    """Krippendorff's alpha at interval level: 1 is full agreement of the raters, 0 what chance would give.

    ratings: one row a text, one entry a rater, None where there is no rating; texts with fewer than two are
    left out. alpha = 1 - D_o / D_e with squared differences: D_o over the pairs within each text, weighted by
    1 / (its ratings - 1), D_e over all pairs (Krippendorff 2011, Computing Krippendorff's Alpha-Reliability).
    Ours, because no library at hand gives it an interval: BCa bootstrap over texts.
    """
    rows = [np.array([value for value in row if value is not None]) for row in ratings]
    rows = [row for row in rows if len(row) > 1]
    blank = Estimate(name, len(rows), None, None, None, None, 0.95, "alpha")
    every = np.concatenate(rows) if rows else np.array([])
    if refused := estimates.unusable(every, "ratings"):
        return replace(blank, reason=refused)
    if np.ptp(every) < 1e-12:
        return replace(blank, reason="all ratings are equal: alpha is not defined")
    sums = tuple(np.array([_sums(row - every.mean()) for row in rows]).T)
    point = replace(blank, mean=float(_alpha(*sums)))
    if len(rows) < estimates.BOOTSTRAP_MIN:
        return replace(point, reason=f"n = {len(rows)}: too few texts to resample")
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # NaN ends are answered with a reason
        rng = np.random.default_rng(seed)
        found = sps.bootstrap(sums, _alpha, paired=True, n_resamples=RESAMPLES, method="BCa", rng=rng)
    return _with_interval(point, found.confidence_interval)


def _sums(row: Array) -> tuple[float, float, float, float]:
    """Of one text's m ratings: m, its share of D_o (m times twice the variance), sum, sum of squares."""
    m = len(row)
    return m, 2 * m * float(np.sum((row - row.mean()) ** 2)) / (m - 1), float(row.sum()), float(row @ row)


def _alpha(m: Array, within: Array, total: Array, square: Array, axis: int = -1) -> Array:
    n = m.sum(axis)
    expected = 2 * (square.sum(axis) - total.sum(axis) ** 2 / n) / (n - 1)
    return 1 - within.sum(axis) / n / expected


def _with_interval(point: Estimate, ends: Any) -> Estimate:
    if point.mean is None or not ends.low < ends.high:
        return replace(point, reason="at its limit or degenerate: no interval")
    return replace(point, low=float(ends.low), high=float(ends.high))
