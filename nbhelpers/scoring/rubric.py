"""Rubric scores of a generated text, every one on 0 to 10.

Four groups, and their differences are the point:

* ``business_v1`` and ``business_v2``: two published rubrics exactly as written, faults included.
* ``technical``, ``length``, ``structure``, ``engagement``: dimensions that were published by name only and
  are defined here; ``composite`` is the published plain mean of business_v1, technical, length and structure.
* ``lab_v1``: this laboratory's rubric and its components ``lab_v1/length`` … (see :func:`lab_v1`). Two of
  them are what surface counts miss: ``lab_v1/relevance`` (to the prompt, beyond echo) and
  ``lab_v1/originality`` (repetition within a text).
* ``diversity``: how different the repeats of one prompt are; beside the rubrics, in none of them.

All of them count words. None of them understands a sentence, checks a fact or replaces a reader.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from nbhelpers import registry, store
from nbhelpers.generation import generate as generation
from nbhelpers.records import Sample, Score, Settings
from nbhelpers.scoring import texts
from nbhelpers.scoring.published import (  # noqa: F401  # some only offered here as well
    ContentType,
    attainable_business_v1,
    band,
    business_v1,
    business_v1_parts,
    business_v2,
    business_v2_parts,
    content_type_named,
    engagement,
    length,
    load_content_types,
    reachable,
    structure,
    technical,
)

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
SCORE_NAMES = (
    "lab_v1",
    "business_v1",
    "business_v2",
    "composite",
    "technical",
    "length",
    "structure",
    "engagement",
    *(f"lab_v1/{name}" for name in LAB_V1_WEIGHTS),
)


# ---- the laboratory's rubric ---------------------------------------------------------------------------


def lab_components(text: str, prompt: str, content_type: str) -> dict[str, float]:
    """The components of lab_v1, each 0 to 10. A repeated sentence counts once, an echo of the prompt never.

    * relevance: share of the prompt's topic words used in sentences of the text's own, squared, full at four
      fifths; half of it is lost when fewer than one sentence in six touches the topic.
    * length, structure, engagement: as the functions of that name, on the text without repeats and echo.
    * originality: share of the words that the text adds, times the share of distinct three-word sequences.
    * prose: share of words that stand in sentences (:func:`nbhelpers.scoring.texts.is_prose`), squared, full at four
      fifths.
    * vocabulary: terms of the content type, each once, none of the prompt's; less if stuffed (over 1 in 5).
    * ending: whether the text is finished (:func:`nbhelpers.scoring.texts.ending`).

    Raises LabError for an unknown content type.
    """
    kind = content_type_named(content_type)
    own = texts.own_sentences(text, prompt)
    own_words = texts.words(" ".join(own))
    if not own_words:
        return dict.fromkeys(LAB_V1_WEIGHTS, 0.0)
    added = min(1.0, len(own_words) / len(texts.words(text)))
    prose = [sentence for sentence in own if texts.is_prose(sentence)]
    return {
        "relevance": _relevance(prose, prompt),
        "length": band(kind.size(text) * added, kind.low, kind.high),
        "originality": 10.0 * added * texts.distinct_trigrams(own_words),
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
    topic = texts.topic_stems(prompt)
    if not topic:
        return 10.0
    used = [topic & {texts.stem(word) for word in texts.words(sentence)} for sentence in prose]
    covered = len(frozenset().union(*used)) / len(topic)
    touching = sum(map(bool, used)) / max(1, len(prose))
    return 10.0 * min(1.0, covered / 0.8) ** 2 * (0.5 + 0.5 * min(1.0, touching * 6))


def _vocabulary(prose: list[str], prompt: str, kind: ContentType) -> float:
    stems = [texts.stem(word) for word in texts.words(" ".join(prose))]
    given = {texts.stem(word) for word in texts.words(prompt)}
    used = [stem for stem in stems if stem in kind.vocabulary and stem not in given]
    stuffing = len(used) / max(1, len(stems)) / 0.2
    return 10.0 * min(1.0, len(set(used)) / kind.terms_wanted) / max(1.0, stuffing)


def combine(components: dict[str, float]) -> float:
    """Weighted geometric mean of lab_v1's components: a strong part cannot pay for a missing one.

    10 · Π (max(component, floor) / 10) ** weight, with LAB_V1_WEIGHTS and LAB_V1_FLOOR; 0 if all are 0. Of
    some components only, the weights are those of these, scaled to add up to 1.
    """
    if not any(components.values()):
        return 0.0
    weights = {name: LAB_V1_WEIGHTS[name] for name in components}
    logs = (weights[name] * math.log(max(value, LAB_V1_FLOOR) / 10) for name, value in components.items())
    return 10.0 * math.exp(sum(logs) / sum(weights.values()))


def lab_v1(text: str, prompt: str, content_type: str) -> float:
    """This laboratory's rubric, version 1: :func:`combine` of :func:`lab_components`."""
    return combine(lab_components(text, prompt, content_type))


# ---- all of them ---------------------------------------------------------------------------------------


def parts_of(rubric: str, text: str, prompt: str, content_type: str) -> dict[str, float]:
    """What a rubric of RUBRICS is made of, for one text. Raises LabError for an unknown content type."""
    kind = content_type_named(content_type)
    if rubric == "business_v1":
        return business_v1_parts(text)
    if rubric == "business_v2":
        return business_v2_parts(text, content_type)
    if rubric == "lab_v1":
        return lab_components(text, prompt, content_type)
    return {
        "business_v1": business_v1(text),
        "technical": technical(text),
        "length": length(text, kind),
        "structure": structure(text, kind),
    }


def total(rubric: str, parts: dict[str, float]) -> float:
    """A rubric's score from its parts, or from some of them: what the rubric would be without the others."""
    if rubric == "lab_v1":
        return combine(parts)
    summed = sum(parts.values())
    return summed / len(parts) if rubric == "composite" else min(10.0, summed)


def score_text(text: str, prompt: str, content_type: str) -> dict[str, float]:
    """Every score of SCORE_NAMES for one text, each 0 to 10. Raises LabError for an unknown content type."""
    parts = {rubric: parts_of(rubric, text, prompt, content_type) for rubric in RUBRICS}
    values = {
        **parts["composite"],  # technical, length and structure are scores of their own
        **{rubric: total(rubric, found) for rubric, found in parts.items()},
        "engagement": engagement(text, content_type_named(content_type)),
        **{f"lab_v1/{name}": value for name, value in parts["lab_v1"].items()},
    }
    return {name: values[name] for name in SCORE_NAMES}


def score_samples(samples: Iterable[Sample]) -> list[Score]:
    """One Score a sample, in order. A failed sample scores 0 everywhere and stays in the denominator.

    The values are SCORE_NAMES and, if every prompt has at least two samples, "diversity" among the finished
    samples of the prompt.
    """
    return list(_scored(list(samples)))


def _scored(samples: Sequence[Sample]) -> Iterator[Score]:
    """Scores one at a time; of the samples, only those of a prompt's trigrams are held at once."""
    finished: dict[str, array[int]] = {}
    counts: Counter[str] = Counter()
    for position, sample in enumerate(samples):
        counts[sample.prompt_id] += 1
        where = finished.setdefault(sample.prompt_id, array("l"))
        where.extend([] if sample.error is not None else [position])
    repeated = all(count > 1 for count in counts.values())
    said, prompt_id = Counter[tuple[str, ...]](), None
    for sample in samples:
        failed = sample.error is not None
        values = (
            dict.fromkeys(SCORE_NAMES, 0.0)
            if failed
            else score_text(sample.text, sample.prompt, sample.content_type)
        )
        if repeated:
            if sample.prompt_id != prompt_id:
                prompt_id = sample.prompt_id
                said = Counter(t for i in finished[prompt_id] for t in _distinct(samples[i].text))
            own, siblings = _distinct(sample.text), len(finished[prompt_id]) - 1
            values["diversity"] = 0.0 if failed else _diversity(own, said, siblings)
        words = len(sample.text.split())
        yield Score(sample.key, sample.prompt_id, sample.repeat, sample.content_type, failed, words, values)


def _distinct(text: str) -> set[tuple[str, ...]]:
    return set(texts.trigrams(texts.words(text)))


def _diversity(own: set[tuple[str, ...]], said: Counter[tuple[str, ...]], siblings: int) -> float:
    """How much of a text its siblings, other answers to the same prompt, do not say: 0 to 10.

    The share of its distinct three-word sequences that a sibling lacks, averaged over the siblings, so that
    more repeats do not change the scale. 0 for a text without such a sequence and where there is no sibling.
    High for good variety and for noise alike: read it beside the rubric, not in it.
    ``said``: in how many of the prompt's texts, this one too, each sequence stands; so it takes linear time.
    """
    if not own or not siblings:
        return 0.0
    return 10.0 * sum(siblings + 1 - said[trigram] for trigram in own) / (len(own) * siblings)


def scores_for(settings: Settings) -> Sequence[Score]:
    """Scores of this model's samples, written to scores.jsonl in its folder and read from there as needed.

    Always computed anew: it takes milliseconds, and an old file would outlive a change of the rubric.
    """
    path = registry.model_dir(settings) / "scores.jsonl"
    return store.all_rows(store.write_rows(path, _scored(generation.samples_for(settings))), Score)
