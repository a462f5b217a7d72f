"""Rubric scores of a generated text, by counting words: none replaces a reader, one agrees with readers.

``lab_v2`` is in the units of the readers whose ratings it is fitted on (data/readers): overall, 1 worthless
to 10 ready to publish, beside ``lab_v2/coherence`` and ``lab_v2/on_topic``, 1 to 5. ``diversity`` says how
different the repeats of one prompt are. Notebook 04 shows the fit and how well it holds.
"""

import csv
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, groupby

import numpy as np

from nbhelpers import store
from nbhelpers.loading.tokenization import split_reasoning
from nbhelpers.records import LabError, ModelRun, Sample, Score
from nbhelpers.scoring import coherence, texts
from nbhelpers.stats.estimate import Array

PRIMARY = "lab_v2"
# What readers give, and its scale.
READINGS = {"coherence": (1.0, 5.0), "on_topic": (1.0, 5.0), "overall": (1.0, 10.0)}
LOWEST = dict.fromkeys(("lab_v2/coherence", "lab_v2/on_topic", PRIMARY), 1.0)  # of a failed or empty sample
NOISE, SLOPE, FAR = 0.3, 0.3, 3.0  # of the fit, our choices: ridge, weight of the line, largest deviation
SENTENCE = 6  # words; a shorter sentence with a figure may be padding


@dataclass(frozen=True)
class RatedTexts:
    """data/rubric.csv: the measures of the rated texts, and their readers' ratings."""

    ids: tuple[str, ...]
    names: tuple[str, ...]  # of the measures
    measures: Array  # [texts, measures]
    readings: Array  # [texts, len(READINGS)]
    weights: Array  # [texts]: how much each counts


@dataclass(frozen=True)
class Fitted:
    """A regression on the rated texts: each votes on a new text by how alike the two are."""

    mean: Array  # [measures]
    spread: Array
    texts: Array  # [texts, measures], in deviations
    votes: Array  # [texts, len(READINGS)]

    def deviations(self, measures: Array) -> Array:
        return np.clip((measures - self.mean) / self.spread, -FAR, FAR)

    def readings(self, measures: Array) -> Array:
        """[texts, len(READINGS)], each on its scale, of the measures [texts, measures] of new texts."""
        predicted = alike(self.deviations(measures), self.texts) @ self.votes
        low, high = np.array(list(READINGS.values())).T
        return np.asarray(np.clip(predicted, low, high), dtype=np.float64)


def alike(a: Array, b: Array) -> Array:
    """How alike the rows of a and b are, [len(a), len(b)]: a Gaussian of their distance and a straight line.

    The Gaussian follows the rated texts where there are some, the line says what lies beyond them.
    """
    size, product = a.shape[1], a @ b.T
    squared = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * product
    return np.asarray(np.exp(-squared / size) + SLOPE * product / size + 1)


def fit(rated: RatedTexts) -> Fitted:
    """Kernel ridge regression (Saunders, Gammerman and Vovk 1998) of the readings on the measures."""
    mean, spread = rated.measures.mean(0), rated.measures.std(0) + 1e-9
    deviations = np.clip((rated.measures - mean) / spread, -FAR, FAR)
    kernel = alike(deviations, deviations) + NOISE * np.diag(1 / rated.weights)
    votes = np.linalg.solve(kernel, rated.readings)
    return Fitted(mean, spread, deviations, np.asarray(votes, dtype=np.float64))


@cache
def rated_texts() -> RatedTexts:
    """What data/rubric.csv holds. Raises LabError where it cannot be used."""
    try:
        with (store.data_dir() / "rubric.csv").open(encoding="utf-8", newline="") as file:
            header, *rows = csv.reader(file)
        table = np.array([row[1:] for row in rows], dtype=float)
        if not rows or header[-1] != "weight" or not np.isfinite(table).all():
            raise ValueError("no table of numbers")
    except (OSError, ValueError, csv.Error) as error:
        raise LabError(f"rubric.csv in the data folder is not usable ({error}): restore it.") from None
    cut = -1 - len(READINGS)  # the last columns are the readings and the weight
    ids, names = tuple(row[0] for row in rows), tuple(header[1:cut])
    return RatedTexts(ids, names, table[:, :cut], table[:, cut:-1], table[:, -1])


@cache
def fitted() -> Fitted:
    return fit(rated_texts())


def measures(text: str, prompt: str, content_type: str) -> dict[str, float]:
    """What lab_v2 rests on: counts of a text, none of which says who wrote it.

    A repeated sentence counts once, an echo of the prompt never. LabError for an unknown content type.
    """
    kind = texts.content_type_named(content_type)
    sentences = texts.own_sentences(text, prompt)
    sentence_words = list(map(texts.words, sentences))
    particulars = texts.word_list("particulars")
    long = [words for words in sentence_words if len(words) >= SENTENCE]
    exact = [any(word[0].isdigit() or word in particulars for word in words) for words in long]
    topic = texts.topic_stems(prompt)
    touched = [topic.intersection(texts.stems(sentence)) for sentence in sentences]
    total = sum(map(len, sentence_words))
    own = min(1.0, total / max(1, len(texts.words(text))))
    return coherence.features(texts.without_prompt(text, prompt).strip()) | {
        "covered": len(frozenset().union(*touched)) / max(1, len(topic)),  # of the words of the topic
        "touching": sum(map(bool, touched)) / max(1, len(sentences)),  # sentences that name one
        "particulars": min(1.0, sum(exact) / 3),  # sentences with a figure, a weekday or a month
        "own": own,  # share of the words that are no echo and no repetition
        "words": math.log(1 + total),
        "length": texts.band(kind.size(text) * own, kind.low, kind.high) / 10,
        "ending": texts.ending(text) if total else 0.0,
    }


def lab_v2(text: str, prompt: str, content_type: str) -> dict[str, float]:
    """The readings to expect of a text: LOWEST where it says nothing of its own."""
    counted = measures(text, prompt, content_type)
    if not counted["own"]:
        return dict(LOWEST)
    versions = counted, counted | {"own": 1.0}  # an echo or a repetition may cost, never gain
    rows = np.array([[version[name] for name in rated_texts().names] for version in versions])
    values = fitted().readings(rows).min(0).round(4).tolist()  # beyond it processors differ
    return dict(zip(LOWEST, values, strict=True))


def inapplicable(text: str, prompt: str) -> str | None:
    """Why the rubrics, which count English words, say nothing about this text; None where they apply."""
    foreign = "prompt" if not texts.is_english(prompt) else "answer" if not texts.is_english(text) else ""
    return f"not applicable: the {foreign} is not English" if foreign else None


def score_text(text: str, prompt: str, content_type: str) -> dict[str, float]:
    """Every score of ``LOWEST`` for one text; none where ``inapplicable``.

    Reasoning, which other tools leave in a text, does not count. LabError for an unknown content type.
    """
    text = split_reasoning(text)[1]
    return {} if inapplicable(text, prompt) else lab_v2(text, prompt, content_type)


def score_samples(samples: Sequence[Sample]) -> Iterator[Score]:
    """One Score a sample, in order; the samples of a prompt stand together. A failed one scores LOWEST.

    "diversity" is among the values if every prompt has two samples or more. No values where ``inapplicable``.
    """
    repeated = min(Counter(sample.prompt_id for sample in samples).values(), default=0) > 1
    for _, group in groupby(samples, lambda sample: sample.prompt_id):
        siblings = [replace(sample, text=split_reasoning(sample.text)[1]) for sample in group]
        runs = [set(texts.trigrams(texts.words(s.text))) for s in siblings if s.error is None]
        holders = Counter(chain.from_iterable(runs))  # how many of the prompt's texts hold each sequence
        for s in siblings:
            failed, reason = s.error is not None, inapplicable(s.text, s.prompt)
            values = {} if reason else {**LOWEST} if failed else score_text(s.text, s.prompt, s.content_type)
            if repeated and values:
                values["diversity"] = _diversity(s, holders, len(runs) - 1)
            words = len(s.text.split())
            yield Score(s.key, s.prompt_id, s.repeat, s.content_type, failed, words, values, reason=reason)


def _diversity(sample: Sample, holders: Counter[tuple[str, ...]], others: int) -> float:
    """How much of a text the other answers to its prompt do not say: high for good variety and noise alike.

    The share of its distinct three-word sequences that another lacks, averaged over the others; 0 without.
    """
    runs = set(texts.trigrams(texts.words(sample.text)))
    if sample.error is not None or not runs or not others:
        return 0.0
    return 10.0 * sum(others + 1 - holders[run] for run in runs) / (len(runs) * others)


def read_scores(run: ModelRun) -> list[Score]:
    """The scores of a run, in the order of its samples. Raises LabError where there are none."""
    path = run.folder / "scores.jsonl"
    if not path.exists():
        raise LabError(f"{path} does not exist: run the notebook that writes it first.")
    return list(store.read_rows(path, Score))
