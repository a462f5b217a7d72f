"""What notebooks 04 and 18 define: known answers and agreement; habits of a judge."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from definitions import definitions
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import fixed_judge

from nbhelpers.loading.load import Loaded
from nbhelpers.records import CONTENT_TYPES, Estimate
from nbhelpers.scoring import judge

BOOK = definitions("04_scoring", "definitions")
JUDGES = definitions("18_judges_and_people", "definitions")


def test_the_ceiling_is_the_root_of_the_share_of_pairs_with_an_expected_order() -> None:
    levels = sorted(BOOK.LEVELS.values())
    pairs = list(combinations(levels, 2))
    expected = math.sqrt(sum(a != b for a, b in pairs) / len(pairs))
    assert BOOK.tau(range(len(levels)), levels) == pytest.approx(expected)


def test_lab_v1_puts_every_bad_answer_below_every_strong_one_and_the_published_rubrics_do_not() -> None:
    for name in list(BOOK.RATES)[:-1]:
        strong, other = BOOK.overlap(name)
        assert (strong > other) == (name == "lab_v1"), name


def level_of(text: str, prompt: str, kind: str) -> int:
    """The expected level of a known answer, looked up by its text."""
    answers = next(BOOK.known_answers(a) for a in BOOK.ANSWERS if a.prompt == prompt)
    return BOOK.LEVELS[next(name for name, known in answers.items() if known == text)]


def brute_tau(a: list[float], b: list[int]) -> float:
    pairs = list(combinations(range(len(a)), 2))
    signs = [(np.sign(a[i] - a[j]), np.sign(b[i] - b[j])) for i, j in pairs]
    tied_a, tied_b = (sum(pair[k] != 0 for pair in signs) for k in (0, 1))
    agree = sum(x * y for x, y in signs)
    return agree / math.sqrt(tied_a * tied_b) if tied_a and tied_b else 0.0


@given(st.lists(st.tuples(st.integers(0, 4).map(float), st.integers(0, 4)), min_size=2, max_size=12))
def test_tau_against_counting_pairs(pairs: list[tuple[float, int]]) -> None:
    ratings, levels = map(list, zip(*pairs, strict=True))
    assert BOOK.tau(ratings, levels) == pytest.approx(brute_tau(ratings, levels), abs=1e-12)


def test_tau_leaves_refused_ratings_out() -> None:
    assert BOOK.tau([1.0, None, 2.0], [1, 0, 2]) == pytest.approx(1.0)
    assert BOOK.tau([None, 1.0], [0, 1]) is None
    assert BOOK.tau([3.0, 3.0], [0, 1]) == 0.0


def test_agreement_of_a_perfect_a_reversed_and_a_constant_rating() -> None:
    perfect = BOOK.agreement(lambda *a: float(level_of(*a)))
    assert perfect.mean == pytest.approx(1.0) and perfect.n == 8 and perfect.low is None
    assert BOOK.agreement(lambda *a: -level_of(*a)).mean == pytest.approx(-1.0)
    assert BOOK.agreement(lambda *a: 5.0).mean == 0.0


def test_agreement_counts_the_prompts_that_were_rated() -> None:
    first = BOOK.ANSWERS[0].prompt
    some = BOOK.agreement(lambda *a: float(level_of(*a)) if a[1] == first else None)
    none = BOOK.agreement(lambda *a: None)
    assert (some.n, some.low, none.n, none.mean, none.reason) == (1, None, 0, None, "no data")


def test_the_interval_is_about_prompts() -> None:
    """A rating that is perfect on half of the prompts and reversed on the others: 0, and very unsure."""
    signs = {a.prompt: 1 if i % 2 else -1 for i, a in enumerate(BOOK.ANSWERS)}
    found = BOOK.agreement(lambda *a: float(signs[a[1]] * level_of(*a)))
    assert found.mean == pytest.approx(0.0, abs=1e-9)
    assert found.low is not None and found.high is not None and found.low < -0.3 and found.high > 0.3


def test_the_rubrics_rank_as_notebook_04_says() -> None:
    found = {name: BOOK.agreement(rate) for name, rate in BOOK.RATES.items()}
    assert found["lab_v1"].low > found["composite"].high > found["business_v1"].high  # type: ignore[operator]
    assert found["business_v2"].mean < 0.1  # type: ignore[operator]
    assert found["lab_v2"].mean > found["lab_v1"].mean  # type: ignore[operator]


# ---- habits of a judge ---------------------------------------------------------------------------------


def planted_judge(first: float = 0.0, twice: float = 0.0, own: float = 0.0) -> tuple[Any, Any]:
    """Rates a text by the number that it begins with, but for biases: in chances, points, points."""

    def rate(prompt: str, text: str) -> float:
        return float(text.split()[0]) + twice * (text.count("end") > 1) + own * ("mine" in text)

    def prefer(prompt: str, one: str, other: str) -> float:
        return 0.5 + 0.04 * (float(one.split()[0]) - float(other.split()[0])) + first / 2

    return rate, prefer


def case(prompt: int, place: int) -> Any:
    level = 2 + (prompt + 3 * place) % 5
    text = f"{level} {'mine' if place == 0 else 'yours'} end"
    return JUDGES.Case(f"prompt {prompt}", text, place == 0, level + 0.5)


PROBES = [case(prompt, place) for prompt in range(8) for place in range(3)]


@pytest.mark.parametrize("planted", [(0.0, 0.0, 0.0), (0.3, 1.5, 0.8)])
def test_planted_habits_of_a_judge_are_recovered(planted: tuple[float, float, float]) -> None:
    rate, prefer = planted_judge(*planted)
    found = JUDGES.position(prefer, PROBES), JUDGES.length(rate, PROBES), JUDGES.own_texts(rate, PROBES)
    assert [habit.n for habit in found] == [8, 8, 8]
    assert [habit.mean for habit in found] == pytest.approx(planted)


def test_a_judge_that_refuses_leaves_nothing_to_measure() -> None:
    def silent(*_: str) -> None:
        return None

    for habit in (JUDGES.position, JUDGES.length, JUDGES.own_texts):
        assert habit(silent, PROBES).reason == "no data"


def test_a_model_can_be_probed() -> None:
    loaded, case = fixed_judge({"A": 0.3, "B": 0.1}, context=1024), PROBES[0]
    assert JUDGES.prefer(loaded, case.prompt, case.text, "Another.") == pytest.approx(0.75, abs=1e-5)
    assert JUDGES.prefer(fixed_judge({"A": 0.05}), case.prompt, case.text, "Another.") is None


def test_a_judge_that_never_rates_orders_nothing_whatever_its_expected_values_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Byte by byte, all eight take a minute.
    monkeypatch.setitem(BOOK.taus.__globals__, "ANSWERS", [BOOK.ANSWERS[0], BOOK.ANSWERS[1]])

    def agreement(loaded: Loaded, field: str) -> Estimate:
        return BOOK.agreement(lambda text, prompt, _: getattr(judge.judge(loaded, prompt, text), field))

    assert agreement(fixed_judge({"7": 0.9}, context=1024), "score").mean == 0.0
    silent = fixed_judge({"7": 0.001}, context=1024)
    assert agreement(silent, "score").reason == "no data"
    assert agreement(silent, "expected").n == 2  # what would be reported without the check


# ---- the published rubrics, as written ----------------------------------------------------------------


def test_business_v1_hand_worked() -> None:
    assert BOOK.business_v1("") == 0.0
    assert BOOK.business_v1("hello") == 5.0
    assert BOOK.business_v1("unprofessional") == 5.5
    assert BOOK.business_v1("strategic strategies") == 5.0
    assert BOOK.business_v1(" ".join(BOOK.V1_TERMS * 25)) == 10.0
    assert BOOK.business_v1("word " * 79) == 5.0
    assert BOOK.business_v1("word " * 80) == BOOK.business_v1("word " * 200) == 8.0
    assert BOOK.business_v1("word " * 201) == 5.0


def test_business_v2_hand_worked() -> None:
    best = " ".join(BOOK.V2_TERMS * 40)
    assert BOOK.business_v2("", "linkedin_post") == 5.0
    assert BOOK.business_v2(best, "linkedin_post") == pytest.approx(9.2)
    assert BOOK.business_v2(best, "technical_article") == pytest.approx(6.2)
    assert BOOK.business_v2("word " * 99, "linkedin_post") == 5.0
    assert BOOK.business_v2("word " * 300, "linkedin_post") == 8.0


WORDS = st.lists(st.sampled_from([*BOOK.V1_TERMS, "the", "word"]), max_size=260).map(" ".join)


ATTAINABLE = (0.0, 5.0, 5.5, 6.0, 6.5, 7.0, 8.0, 8.5, 9.0, 9.5, 10.0)


@given(WORDS | st.text(max_size=60))
def test_business_v1_gives_nothing_but_its_attainable_scores(text: str) -> None:
    assert BOOK.business_v1(text) in ATTAINABLE


@given(WORDS, st.sampled_from(CONTENT_TYPES))
def test_business_v2_never_reaches_its_cap(text: str, kind: str) -> None:
    assert BOOK.business_v2(text, kind) <= (9.2 if kind == "linkedin_post" else 6.2) + 1e-9


def test_business_v1_does_not_tell_salad_from_a_strong_answer() -> None:
    answer = BOOK.ANSWERS[2]
    assert BOOK.business_v1(BOOK.known_answers(answer)["one word"]) >= BOOK.business_v1(answer.text)


def test_the_composite_is_the_plain_mean_of_four() -> None:
    parts = BOOK.composite_parts("The server and its servers had a queue for 3 seconds.", "linkedin_post")
    assert parts["technical"] == pytest.approx(4.0) and len(parts) == 4
    assert BOOK.composite("The server.", "linkedin_post") == pytest.approx(
        sum(BOOK.composite_parts("The server.", "linkedin_post").values()) / 4
    )
