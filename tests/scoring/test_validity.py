"""Rank agreement, repeatability and alpha against brute force, published examples and planted truths."""

from __future__ import annotations

import math
from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbhelpers.scoring import rubric as scoring
from nbhelpers.scoring import validity

# Krippendorff 2011, Computing Krippendorff's Alpha-Reliability, section C: four observers, twelve units.
PUBLISHED = (
    "1 2 3 3 2 1 4 1 2 . . .",
    "1 2 3 3 2 2 4 1 2 5 . 3",
    ". 3 3 3 2 3 4 2 2 5 1 .",
    "1 2 3 3 2 4 4 1 2 5 1 .",
)
LEVELS = validity.levels()


def level_of(text: str, prompt: str, kind: str) -> int:
    """The expected level of a known answer, looked up by its text."""
    answers = next(validity.known_answers(a) for a in validity.reference_answers() if a.prompt == prompt)
    return LEVELS[next(name for name, known in answers.items() if known == text)]


# ---- tau -----------------------------------------------------------------------------------------------


def brute_tau(a: list[float], b: list[int]) -> float:
    pairs = list(combinations(range(len(a)), 2))
    signs = [(np.sign(a[i] - a[j]), np.sign(b[i] - b[j])) for i, j in pairs]
    tied_a, tied_b = (sum(pair[k] != 0 for pair in signs) for k in (0, 1))
    agree = sum(x * y for x, y in signs)
    return agree / math.sqrt(tied_a * tied_b) if tied_a and tied_b else 0.0


@given(st.lists(st.tuples(st.integers(0, 4).map(float), st.integers(0, 4)), min_size=2, max_size=12))
def test_tau_against_counting_pairs(pairs: list[tuple[float, int]]) -> None:
    ratings, levels = map(list, zip(*pairs, strict=True))
    assert validity.tau(ratings, levels) == pytest.approx(brute_tau(ratings, levels), abs=1e-12)


def test_tau_leaves_refused_ratings_out() -> None:
    assert validity.tau([1.0, None, 2.0], [1, 0, 2]) == pytest.approx(1.0)
    assert validity.tau([None, 1.0], [0, 1]) is None
    assert validity.tau([3.0, 3.0], [0, 1]) == 0.0


def test_agreement_of_a_perfect_a_reversed_and_a_constant_rating() -> None:
    perfect = validity.agreement(lambda *a: float(level_of(*a)))
    assert perfect.mean == pytest.approx(1.0) and perfect.n == 8 and perfect.low is None
    assert validity.agreement(lambda *a: -level_of(*a)).mean == pytest.approx(-1.0)
    assert validity.agreement(lambda *a: 5.0).mean == 0.0


def test_agreement_counts_the_prompts_that_were_rated() -> None:
    first = validity.reference_answers()[0].prompt
    some = validity.agreement(lambda *a: float(level_of(*a)) if a[1] == first else None)
    none = validity.agreement(lambda *a: None)
    assert (some.n, some.low, none.n, none.mean, none.reason) == (1, None, 0, None, "no data")


def test_the_interval_is_about_prompts() -> None:
    """A rating that is perfect on half of the prompts and reversed on the others: 0, and very unsure."""
    signs = {a.prompt: 1 if i % 2 else -1 for i, a in enumerate(validity.reference_answers())}
    found = validity.agreement(lambda *a: float(signs[a[1]] * level_of(*a)))
    assert found.mean == pytest.approx(0.0, abs=1e-9)
    assert found.low is not None and found.high is not None and found.low < -0.3 and found.high > 0.3


def test_the_rubrics_rank_as_notebook_04_says() -> None:
    found = {
        name: validity.agreement(lambda *a, name=name: scoring.score_text(*a)[name], name)  # type: ignore[misc]
        for name in scoring.RUBRICS
    }
    assert found["lab_v1"].low > found["composite"].high > found["business_v1"].high  # type: ignore[operator]
    assert found["business_v2"].mean < 0.1  # type: ignore[operator]


# ---- alpha ---------------------------------------------------------------------------------------------


def brute_alpha(ratings: list[list[float | None]]) -> float:
    units = [[v for v in row if v is not None] for row in ratings]
    units = [unit for unit in units if len(unit) > 1]
    every = [value for unit in units for value in unit]
    observed = sum(sum((a - b) ** 2 for a, b in permutations(u, 2)) / (len(u) - 1) for u in units)
    chance = sum((a - b) ** 2 for a, b in permutations(every, 2)) / (len(every) - 1)
    return 1 - observed / chance


def test_alpha_of_the_published_example() -> None:
    table = [[None if cell == "." else float(cell) for cell in line.split()] for line in PUBLISHED]
    found = validity.krippendorff(list(zip(*table, strict=True)))
    assert round(found.mean or 0.0, 3) == 0.849 and found.n == 11
    assert found.low < found.mean < found.high  # type: ignore[operator]


RATINGS = st.lists(
    st.lists(st.none() | st.integers(1, 10).map(float), min_size=1, max_size=4), min_size=1, max_size=10
)


@settings(max_examples=60)
@given(RATINGS)
def test_alpha_against_brute_force(ratings: list[list[float | None]]) -> None:
    found = validity.krippendorff(ratings)
    values = {v for row in ratings if sum(v is not None for v in row) > 1 for v in row if v is not None}
    if len(values) < 2:
        assert found.mean is None and found.reason
    else:
        assert found.mean == pytest.approx(brute_alpha(ratings), abs=1e-9)
        assert (found.low is None) == (found.reason is not None)


def test_alpha_of_full_agreement_has_no_interval_and_of_noise_holds_zero() -> None:
    full = validity.krippendorff([(float(v), float(v)) for v in range(1, 9)])
    assert full.mean == pytest.approx(1.0) and full.low is None
    noise = validity.krippendorff(np.random.default_rng(3).integers(1, 11, (60, 2)).astype(float).tolist())
    assert noise.low < 0 < noise.high  # type: ignore[operator]
    assert validity.krippendorff([(1.0, math.nan), (2.0, 3.0)]).mean is None
