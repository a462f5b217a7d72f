"""Rubric scores of a generated text, every one on 0 to 10.

``business_v1`` and ``business_v2`` are two published rubrics as written, ``composite`` the published mean of
four dimensions, ``lab_v1`` this laboratory's rubric, with its components ``lab_v1/length`` … Beside them,
``diversity`` says how different the repeats of one prompt are. All of them count words. None of them
understands a sentence, checks a fact or replaces a reader.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence

from nbhelpers import store
from nbhelpers.generation import generate
from nbhelpers.records import LabError, ModelRun, Sample, Score
from nbhelpers.scoring import published, texts

PRIMARY = "lab_v1"
# Weights of lab_v1's geometric mean; they add up to 1.
LAB_V1_WEIGHTS = {
    "relevance": 0.25,  # the prompt's topic is written about, in sentences
    "length": 0.15,  # inside the band of the content type
    "originality": 0.15,  # says each thing once and does not repeat the prompt
    "prose": 0.15,  # words stand in sentences
    "structure": 0.10,  # sentences, paragraphs, opening
    "vocabulary": 0.05,  # the field's words, not the prompt's, and not stuffed
    "ending": 0.10,  # the last sentence is finished
    "engagement": 0.05,  # questions, insights, value, proof
}
LAB_V1_FLOOR = 0.5  # a component counts at least this much, so that one zero does not hide the others
RUBRICS = ("business_v1", "business_v2", "composite", "lab_v1")
DIMENSIONS = ("technical", "length", "structure", "engagement")
SCORE_NAMES = (PRIMARY, *RUBRICS[:3], *DIMENSIONS, *(f"lab_v1/{name}" for name in LAB_V1_WEIGHTS))


def lab_components(text: str, prompt: str, content_type: str) -> dict[str, float]:
    """The components of lab_v1, each 0 to 10. A repeated sentence counts once, an echo of the prompt never.

    * relevance: share of the prompt's topic words used in sentences of the text's own, squared, full at four
      fifths; half of it is lost when fewer than one sentence in six touches the topic.
    * length, structure, engagement: as in ``published``, on the text without repeats and echo.
    * originality: share of the words that the text adds, times the share of distinct three-word sequences.
    * prose: share of words that stand in sentences, squared, full at four fifths.
    * vocabulary: terms of the content type, each once, none of the prompt's; less if stuffed (over 1 in 5).

    Raises LabError for an unknown content type.
    """
    kind = published.content_type_named(content_type)
    own = texts.own_sentences(text, prompt)
    own_words = texts.words(" ".join(own))
    if not own_words:
        return dict.fromkeys(LAB_V1_WEIGHTS, 0.0)
    added = min(1.0, len(own_words) / len(texts.words(text)))
    prose = [sentence for sentence in own if texts.is_prose(sentence)]
    return {
        "relevance": _relevance(prose, prompt),
        "length": published.band(kind.size(text) * added, kind.low, kind.high),
        "originality": 10.0 * added * texts.distinct_trigrams(own_words),
        "prose": 10.0 * min(1.0, len(texts.words(" ".join(prose))) / len(own_words) / 0.8) ** 2,
        "structure": published.structure(_only(text, own), kind),
        "vocabulary": _vocabulary(prose, prompt, kind),
        "ending": 10.0 * texts.ending(text),
        "engagement": published.engagement("\n".join(own), kind),
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
    topic = texts.topic_stems(prompt)
    if not topic:
        return 10.0
    used = [topic.intersection(texts.stems(sentence)) for sentence in prose]
    covered = len(frozenset().union(*used)) / len(topic)
    touching = sum(map(bool, used)) / max(1, len(prose))
    return 10.0 * min(1.0, covered / 0.8) ** 2 * (0.5 + 0.5 * min(1.0, touching * 6))


def _vocabulary(prose: list[str], prompt: str, kind: published.ContentType) -> float:
    stems = texts.stems(" ".join(prose))
    wanted = kind.vocabulary.difference(texts.stems(prompt))
    used = [stem for stem in stems if stem in wanted]
    stuffing = len(used) / max(1, len(stems)) / 0.2
    return 10.0 * min(1.0, len(set(used)) / kind.terms_wanted) / max(1.0, stuffing)


def combine(components: dict[str, float]) -> float:
    """Weighted geometric mean of lab_v1's components: a strong part cannot pay for a missing one.

    10 · Π (max(component, floor) / 10) ** weight; 0 if all are 0. Of some components only, the weights are
    those of these, scaled to add up to 1.
    """
    if not any(components.values()):
        return 0.0
    weights = {name: LAB_V1_WEIGHTS[name] for name in components}
    logs = (weights[name] * math.log(max(value, LAB_V1_FLOOR) / 10) for name, value in components.items())
    return 10.0 * math.exp(sum(logs) / sum(weights.values()))


def parts_of(text: str, prompt: str, content_type: str) -> dict[str, dict[str, float]]:
    """What each of RUBRICS is made of, for one text. Raises LabError for an unknown content type."""
    kind = published.content_type_named(content_type)
    business_v1 = published.business_v1(text)
    composite = {
        "business_v1": total("business_v1", business_v1),
        "technical": published.technical(text),
        "length": published.band(kind.size(text), kind.low, kind.high),
        "structure": published.structure(text, kind),
    }
    return {
        "business_v1": business_v1,
        "business_v2": published.business_v2(text, content_type),
        "composite": composite,
        "lab_v1": lab_components(text, prompt, content_type),
    }


def total(rubric: str, parts: dict[str, float]) -> float:
    """A rubric's score from its parts, or from some of them: what the rubric would be without the others."""
    if rubric == "lab_v1":
        return combine(parts)
    return sum(parts.values()) / (len(parts) if rubric == "composite" else 1)


def score_text(text: str, prompt: str, content_type: str) -> dict[str, float]:
    """Every score of SCORE_NAMES for one text, each 0 to 10. Raises LabError for an unknown content type."""
    parts = parts_of(text, prompt, content_type)
    values = {
        **parts["composite"],  # technical, length and structure are scores of their own
        **{rubric: total(rubric, found) for rubric, found in parts.items()},
        "engagement": published.engagement(text, published.content_type_named(content_type)),
        **{f"lab_v1/{name}": value for name, value in parts["lab_v1"].items()},
    }
    return {name: values[name] for name in SCORE_NAMES}


def score_samples(samples: Sequence[Sample]) -> list[Score]:
    """One Score a sample, in order. A failed sample scores 0 everywhere and stays in the denominator.

    "diversity" is among its values if every prompt has at least two samples.
    """
    return list(_scored(samples))


def _scored(samples: Sequence[Sample]) -> Iterator[Score]:
    """Scores one at a time; the finished texts of one prompt are held at once."""
    positions: dict[str, array[int]] = {}  # by prompt
    for position, sample in enumerate(samples):
        positions.setdefault(sample.prompt_id, array("l")).append(position)
    repeated = all(len(found) > 1 for found in positions.values())
    shared, siblings, prompt_id = Counter[tuple[str, ...]](), 0, None
    for sample in samples:
        failed = sample.error is not None
        values = dict.fromkeys(SCORE_NAMES, 0.0)
        if not failed:
            values = score_text(sample.text, sample.prompt, sample.content_type)
        if repeated:
            if sample.prompt_id != prompt_id:
                prompt_id = sample.prompt_id
                finished = [s.text for i in positions[prompt_id] if (s := samples[i]).error is None]
                shared = Counter(run for text in finished for run in _distinct(text))
                siblings = len(finished) - 1
            values["diversity"] = 0.0 if failed else _diversity(_distinct(sample.text), shared, siblings)
        words = len(sample.text.split())
        yield Score(sample.key, sample.prompt_id, sample.repeat, sample.content_type, failed, words, values)


def _distinct(text: str) -> set[tuple[str, ...]]:
    return set(texts.trigrams(texts.words(text)))


def _diversity(own: set[tuple[str, ...]], shared: Counter[tuple[str, ...]], siblings: int) -> float:
    """How much of a text the other answers to its prompt do not say: high for good variety and noise alike.

    The share of its distinct three-word sequences that a sibling lacks, averaged over the siblings; 0 without
    either. ``shared``: in how many of the prompt's texts, this one included, each sequence stands.
    """
    if not own or not siblings:
        return 0.0
    return 10.0 * sum(siblings + 1 - shared[run] for run in own) / (len(own) * siblings)


def make_scores(run: ModelRun) -> None:
    """Score the run's samples and write scores.jsonl, always anew: an old one may be of another rubric."""
    store.write_rows(run.folder / "scores.jsonl", _scored(generate.read_samples(run)))


def read_scores(run: ModelRun) -> store.Rows[Score]:
    """The scores of a run, in the order of its samples. Raises LabError where they were not made."""
    path = run.folder / "scores.jsonl"
    if not path.exists():
        raise LabError(f"{path} does not exist: run the notebook that writes it first.")
    return store.all_rows(path, Score)
