"""What notebook 04 defines: contributions, overlap, test-retest, and the text that fools a rubric."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from definitions import definitions

from nbhelpers.records import Score
from nbhelpers.scoring import rubric, texts, validity

BOOK = definitions("04_scoring", "definitions")


def test_the_ceiling_is_the_root_of_the_share_of_pairs_with_an_expected_order() -> None:
    levels = sorted(validity.levels().values())
    pairs = list(combinations(levels, 2))
    expected = math.sqrt(sum(a != b for a, b in pairs) / len(pairs))
    assert validity.tau(range(len(levels)), levels) == pytest.approx(expected)


def test_lab_v1_puts_every_bad_answer_below_every_strong_one_and_the_published_rubrics_do_not() -> None:
    for name in rubric.RUBRICS:
        strong, other = BOOK.overlap(name)
        assert (strong > other) == (name == "lab_v1"), name


@pytest.mark.parametrize("name", rubric.RUBRICS)
def test_a_gain_is_the_agreement_that_leaving_the_part_out_costs(name: str) -> None:
    for part in rubric.parts_of("a", "b", "short_post")[name]:
        found = BOOK.gain(name, part)

        def rate(*answer: str, without: str | None) -> float:
            parts = rubric.parts_of(*answer)[name]
            return rubric.total(name, {key: value for key, value in parts.items() if key != without})

        whole, less = (
            validity.agreement(lambda *answer, without=without: rate(*answer, without=without)).mean or 0.0
            for without in (None, part)
        )
        assert found.n == 8 and found.mean == pytest.approx(whole - less, abs=1e-9)
        break  # the first part of each rubric


def rows(values: np.ndarray) -> list[Score]:
    """values [prompts, repeats] as scores."""
    return [
        Score(f"{p}-{r}", f"b{p:02d}", r, "linkedin_post", False, 10, {"x": float(value)})
        for p, row in enumerate(values)
        for r, value in enumerate(row)
    ]


def test_retest_correlates_the_means_of_alternate_repeats() -> None:
    values = np.random.default_rng(1).normal(size=(12, 5))
    found = BOOK.retest(reversed(rows(values)), "x")
    halves = values[:, 0::2].mean(1), values[:, 1::2].mean(1)
    assert found.mean == pytest.approx(np.corrcoef(*halves)[0, 1])
    z, half = math.atanh(found.mean), 1.959963984540054 / math.sqrt(12 - 3)
    assert (found.low, found.high) == pytest.approx((math.tanh(z - half), math.tanh(z + half)))


def test_retest_recovers_a_planted_reliability() -> None:
    """Variance 4 between prompts, 2 within: means of two repeats correlate by 4 / (4 + 1)."""
    rng = np.random.default_rng(2)
    values = rng.normal(0, 2, (4000, 1)) + rng.normal(0, math.sqrt(2), (4000, 4))
    found = BOOK.retest(rows(values), "x")
    assert found.mean == pytest.approx(0.8, abs=0.02)
    assert found.low < 0.8 < found.high


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.ones((3, 2)), "needs 4"),
        (np.arange(9.0).reshape(9, 1), "0 prompts"),
        (np.ones((5, 2)), "same mean"),
        (np.arange(5.0)[:, None] * np.ones(2), "at its limit"),
    ],
)
def test_retest_says_why_there_is_no_interval(values: np.ndarray, reason: str) -> None:
    found = BOOK.retest(rows(values), "x")
    assert found.low is None and reason in (found.reason or "")


def test_nonsense_keeps_the_small_words_and_fools_the_rubric() -> None:
    answer = validity.reference_answers()[2]
    text = BOOK.nonsense(answer.text)
    bags = [sorted(texts.words(" ".join(texts.sentences(each)))) for each in (text, answer.text)]
    assert text != answer.text and bags[0] == bags[1]
    # The known limit of counting words, stated in notebook 04: keep it visible.
    assert rubric.score_text(text, answer.prompt, answer.content_type)["lab_v1"] > 9
