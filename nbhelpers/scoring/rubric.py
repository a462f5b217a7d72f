"""Rubric scores of a generated text, by counting words: none replaces a reader, one agrees with readers.

``lab_v2`` is in the units of the readers whose ratings it is fitted on (data/readers): overall, 1 worthless
to 10 ready to publish, with its parts ``lab_v2/coherence`` and ``lab_v2/on_topic``, 1 to 5, and four shares.
``lab_v1`` is the rubric before it, 0 to 10, kept as a baseline. ``diversity`` says how different the repeats
of one prompt are. Notebook 04 shows the fit and how well it holds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, groupby
from typing import Any

import numpy as np

from nbhelpers import store
from nbhelpers.generation import generate
from nbhelpers.loading.tokenizer import split_reasoning
from nbhelpers.records import LabError, ModelRun, Record, Sample, Score
from nbhelpers.scoring import coherence, content_types, texts

PRIMARY = "lab_v2"
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
# The scores of a text and the least that each can be: what a failed or an empty sample gets.
LOWEST = {
    **{PRIMARY: 1.0, "lab_v2/coherence": 1.0, "lab_v2/on_topic": 1.0},
    **{"lab_v2/own": 0.0, "lab_v2/particulars": 0.0, "lab_v2/length": 0.0},
    **{"lab_v2/ending": 0.0, "lab_v1": 0.0},
}
SCORE_NAMES = tuple(LOWEST)


@dataclass(frozen=True)
class Fitted(Record):
    """data/rubric.toml, written by tools/fit_rubric.py: what rated texts say of the measures of a text."""

    coherence: dict[str, float]  # measure -> weight, with "constant"; in log odds between 1 and 5
    on_topic: dict[str, float]
    overall: dict[str, float]  # the numbers of ``overall``


@cache
def fitted() -> Fitted:
    """What data/rubric.toml holds. Raises LabError where it cannot be used."""
    return store.read_table("rubric.toml", lambda data: store.from_plain(data, Fitted, "rubric.toml"))


def topic_measures(text: str, prompt: str) -> dict[str, float]:
    """What tells whether the text is about the prompt's topic, of its sentences without echo and repeats."""
    topic, own = texts.topic_stems(prompt), texts.own_sentences(text, prompt)
    found = (topic.intersection(texts.stems(sentence)) for sentence in own)
    shares = [len(stems) / max(1, len(topic)) for stems in found] or [0.0]
    return {
        "best": max(shares),
        "opening": max(shares[:2]),
        "touching": sum(share > 0 for share in shares) / len(shares),
    }


def on_scale(measures: dict[str, float], weights: Mapping[str, float]) -> float:
    """1 to 5: the logistic of the weighted measures."""
    total = sum(weight * (measures | {"constant": 1.0})[name] for name, weight in weights.items())
    return 1.0 + 4.0 / (1.0 + math.exp(-max(-30.0, min(30.0, total))))


def overall(parts: Mapping[str, Any], numbers: Mapping[str, float]) -> Any:
    """1 to 10: coherence, raised to a power, times what being on topic adds, less what is missing.

    A text on another topic keeps a share of its worth; one that names nothing particular loses a share of
    what being on topic adds; one that is too short, too long or cut off, that repeats itself or the
    prompt, loses a share of all. Parts may be arrays.
    """
    topic = (parts["on_topic"] - 1) / 4 * (1 - numbers["vague"] * (1 - parts["particulars"]))
    worth = numbers["off_topic"] + (1 - numbers["off_topic"]) * topic
    worth = worth * ((parts["coherence"] - 1) / 4) ** numbers["power"]
    fit = (1 - numbers["misfit"] * (1 - parts["length"])) * (1 - numbers["cut"] * (1 - parts["ending"]))
    fit = fit * (1 - numbers["repeated"] * (1 - parts["own"]))
    return 1.0 + np.minimum(9.0, numbers["scale"] * worth * fit)


def given_parts(text: str, prompt: str, content_type: str) -> dict[str, float]:
    """The parts of lab_v2 that need no fit, 0 to 1; LabError for an unknown content type."""
    kind, own = content_types.content_type_named(content_type), texts.own_sentences(text, prompt)
    found, particular = texts.words(" ".join(own)), texts.word_list("particulars")
    added = min(1.0, len(found) / max(1, len(texts.words(text))))
    named = sum(word[0].isdigit() or word in particular for word in found)
    return {
        "own": added,
        "particulars": min(1.0, named / 4),
        "length": content_types.band(kind.size(text) * added, kind.low, kind.high) / 10,
        "ending": texts.ending(text) if found else 0.0,
    }


def lab_v2(text: str, prompt: str, content_type: str) -> dict[str, float]:
    """The parts of lab_v2; LabError for an unknown content type."""
    weights = fitted()
    found = {
        "coherence": on_scale(coherence.measures(text), weights.coherence),
        "on_topic": on_scale(topic_measures(text, prompt), weights.on_topic),
    }
    if not texts.own_sentences(text, prompt):
        found = dict.fromkeys(found, 1.0)
    return found | given_parts(text, prompt, content_type)


def lab_components(text: str, prompt: str, content_type: str) -> dict[str, float]:
    """The components of lab_v1, each 0 to 10; LabError for an unknown content type.

    A repeated sentence counts once, an echo of the prompt never. Relevance and prose are squared shares, full
    at four fifths; half of the relevance is lost when fewer than one sentence in six touches the topic.
    Vocabulary counts terms once, none of the prompt's, and less if over a fifth of the words are terms.
    """
    kind = content_types.content_type_named(content_type)
    own = texts.own_sentences(text, prompt)
    own_words = texts.words(" ".join(own))
    if not own_words:
        return dict.fromkeys(LAB_V1_WEIGHTS, 0.0)
    added = min(1.0, len(own_words) / len(texts.words(text)))
    prose = [sentence for sentence in own if texts.is_prose(sentence)]
    return {
        "relevance": _relevance(prose, prompt),
        "length": content_types.band(kind.size(text) * added, kind.low, kind.high),
        "originality": 10.0 * added * texts.distinct_trigrams(own_words),
        "prose": 10.0 * min(1.0, len(texts.words(" ".join(prose))) / len(own_words) / 0.8) ** 2,
        "structure": content_types.structure(_only(text, own), kind),
        "vocabulary": _vocabulary(prose, prompt, kind),
        "ending": 10.0 * texts.ending(text),
        "engagement": content_types.engagement("\n".join(own), kind),
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


def _vocabulary(prose: list[str], prompt: str, kind: content_types.ContentType) -> float:
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
    weights = {name: LAB_V1_WEIGHTS[name] for name in components}
    logs = (weights[name] * math.log(max(value, LAB_V1_FLOOR) / 10) for name, value in components.items())
    return 10.0 * math.exp(sum(logs) / sum(weights.values()))


def inapplicable(text: str, prompt: str) -> str | None:
    """Why the rubrics, which count English words, say nothing about this text; None where they apply."""
    foreign = [what for what, said in (("prompt", prompt), ("answer", text)) if not texts.is_english(said)]
    return f"not applicable: the {foreign[0]} is not English" if foreign else None


def score_text(text: str, prompt: str, content_type: str) -> dict[str, float]:
    """Every score of SCORE_NAMES for one text; none where ``inapplicable``.

    Reasoning between the usual marks is no part of it: other tools leave it in. LabError for an unknown
    content type.
    """
    text = split_reasoning(text)[1]
    if inapplicable(text, prompt):
        return {}
    parts = lab_v2(text, prompt, content_type)
    return {
        PRIMARY: float(overall(parts, fitted().overall)),
        **{f"lab_v2/{name}": value for name, value in parts.items()},
        "lab_v1": combine(lab_components(text, prompt, content_type)),
    }


def score_samples(samples: Sequence[Sample]) -> list[Score]:
    """One Score a sample, in order; the samples of a prompt stand together. A failed one scores LOWEST.

    "diversity" is among the values if every prompt has two samples or more. No values where ``inapplicable``.
    """
    return list(_scored(samples))


def _scored(samples: Sequence[Sample]) -> Iterator[Score]:
    """Scores one at a time; the samples of one prompt are held at once."""
    repeated = min(Counter(sample.prompt_id for sample in samples).values(), default=0) > 1
    for _, group in groupby(samples, lambda sample: sample.prompt_id):
        siblings = [replace(sample, text=split_reasoning(sample.text)[1]) for sample in group]
        runs = [set(texts.trigrams(texts.words(s.text))) for s in siblings if s.error is None]
        shared = Counter(chain.from_iterable(runs))  # in how many of the prompt's texts each sequence stands
        for s in siblings:
            failed, reason = s.error is not None, inapplicable(s.text, s.prompt)
            values = {} if reason or failed else score_text(s.text, s.prompt, s.content_type)
            if failed and not reason:
                values = dict(LOWEST)
            if repeated and values:
                values["diversity"] = _diversity(s, shared, len(runs) - 1)
            words = len(s.text.split())
            yield Score(s.key, s.prompt_id, s.repeat, s.content_type, failed, words, values, reason=reason)


def _diversity(sample: Sample, shared: Counter[tuple[str, ...]], others: int) -> float:
    """How much of a text the other answers to its prompt do not say: high for good variety and noise alike.

    The share of its distinct three-word sequences that another lacks, averaged over the others; 0 without.
    """
    own = set(texts.trigrams(texts.words(sample.text)))
    if sample.error is not None or not own or not others:
        return 0.0
    return 10.0 * sum(others + 1 - shared[run] for run in own) / (len(own) * others)


def make_scores(run: ModelRun) -> None:
    """Score the run's samples and write scores.jsonl, always anew: an old one may be of another rubric."""
    store.write_rows(run.folder / "scores.jsonl", _scored(generate.read_samples(run)))


def read_scores(run: ModelRun) -> list[Score]:
    """The scores of a run, in the order of its samples. Raises LabError where they were not made."""
    path = run.folder / "scores.jsonl"
    if not path.exists():
        raise LabError(f"{path} does not exist: run the notebook that writes it first.")
    return list(store.read_rows(path, Score))
