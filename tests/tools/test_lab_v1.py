"""The first rubric against hand-worked cases, brute force and known answers."""

from __future__ import annotations

import math
from typing import Any

import pytest
from definitions import definitions
from hypothesis import given
from hypothesis import strategies as st

from nbhelpers.scoring import texts
from tools import lab_v1

BOOK = definitions("04_scoring", "definitions")
STRONG = BOOK.ANSWERS


@given(st.lists(st.sampled_from("abc"), max_size=12))
def test_distinct_trigrams_against_brute_force(sequence: list[str]) -> None:
    every = {tuple(sequence[i : i + 3]) for i in range(len(sequence) - 2)}
    expected = len(every) / (len(sequence) - 2) if len(sequence) > 2 else 1.0
    assert lab_v1.distinct_trigrams(sequence) == pytest.approx(expected)


def test_prose_is_told_from_keywords_and_broken_grammar() -> None:
    assert lab_v1.is_prose("The third step is the one people ask about.")
    assert lab_v1.is_prose("Our on-call rotation woke people at night.")
    for bad in (
        "Optimization strategy professional implementation cost value.",
        "The the the the the the.",
        "Stop it.",
        "The of the plan is in our.",
        "We saw the is late for a good reason.",
        "the plan " * 40,
    ):
        assert not lab_v1.is_prose(bad), bad


def test_every_sentence_of_the_strong_answers_is_prose() -> None:
    found = [sentence for answer in STRONG for sentence in texts.sentences(answer.text)]
    assert sum(map(lab_v1.is_prose, found)) / len(found) > 0.95


def test_figures_need_a_unit() -> None:
    assert lab_v1.figures("It fell by 12% in 3 weeks and saved $4,000.") == 3
    assert lab_v1.figures("We tried 3 models in 2024.") == 0


@pytest.mark.parametrize("answer", STRONG, ids=lambda answer: answer.prompt[8:40])
def test_bad_answers_score_below_the_strong_one(answer: Any) -> None:
    def score(text: str) -> float:
        return lab_v1.score(text, answer.prompt, answer.content_type)

    bad = {name: score(text) for name, text in BOOK.known_answers(answer).items()}
    strong = bad.pop("strong")
    assert strong > 9.0
    assert set(BOOK.LEVELS) == {"strong", *bad}
    assert bad["empty"] == bad["prompt echo"] == 0.0
    assert max(bad["one word"], bad["keyword salad"]) < 2.5
    assert bad["off topic"] < 6.5
    for name, value in bad.items():
        assert value < strong - 0.25, name


def test_vocabulary_counts_inflections_once_and_never_the_prompts_own_words() -> None:
    def vocabulary(text: str, prompt: str = "Write a LinkedIn post about rain:") -> float:
        return lab_v1.components(text, prompt, "linkedin_post")["vocabulary"]

    one = vocabulary("We had to change the strategy of the whole firm in a day.")
    assert one == 2.0
    assert vocabulary("We had to change the strategies of a strategic firm in a day and in all.") == one
    assert vocabulary("We had to be unprofessional with the whole firm for a day.") == 0.0
    assert (
        vocabulary("We had to change the strategy of the whole firm in a day.", "Write about strategy:")
        == 0.0
    )


def test_relevance_needs_the_topic_in_sentences() -> None:
    prompt = "Write a LinkedIn post about model monitoring:"

    def relevance(text: str) -> float:
        return lab_v1.components(text, prompt, "linkedin_post")["relevance"]

    assert relevance("We monitor every model that the team has put into use.") == 10.0
    assert relevance("The weather was fine when we met in the garden.") == 0.0
    assert relevance("Models monitoring models monitors.") == 0.0
    assert relevance(prompt) == 0.0


@given(st.dictionaries(st.sampled_from(list(lab_v1.WEIGHTS)), st.floats(0, 10)))
def test_combine_is_the_weighted_geometric_mean(some: dict[str, float]) -> None:
    components = {name: some.get(name, 0.0) for name in lab_v1.WEIGHTS}
    product = math.prod(
        (max(components[name], 0.5) / 10) ** weight for name, weight in lab_v1.WEIGHTS.items()
    )
    assert lab_v1.combine(components) == pytest.approx(10 * product if any(components.values()) else 0.0)
    better = {name: min(10.0, value + 1) for name, value in components.items()}
    assert lab_v1.combine(better) >= lab_v1.combine(components)


def test_without_a_part_the_other_weights_are_scaled_up() -> None:
    parts = dict.fromkeys(lab_v1.WEIGHTS, 7.0)
    assert lab_v1.combine(parts) == pytest.approx(7.0)
    del parts["relevance"]
    assert lab_v1.combine(parts) == pytest.approx(7.0)
    assert lab_v1.combine({"length": 10.0, "prose": 2.5}) == pytest.approx(5.0)  # equal weights


def test_weights_add_up_to_one() -> None:
    assert sum(lab_v1.WEIGHTS.values()) == pytest.approx(1.0)


def test_engagement_hand_worked() -> None:
    kind = lab_v1.kinds()["linkedin_post"]
    assert lab_v1.engagement("What did we learn? The lesson was short.", kind) == 10.0
    assert lab_v1.engagement("It was fine.", kind) == 0.0


def test_the_factors_are_the_published_ones() -> None:
    types = lab_v1.kinds()
    questions, insights, value = types["linkedin_post"].factors
    assert questions.ends_with == "?" and "lesson" in insights.words and "saved" in value.words
    _, proven, implemented, validated = types["technical_article"].factors
    assert (proven.words[0], *implemented.words, *validated.words) == ("proven", "implemented", "validated")
