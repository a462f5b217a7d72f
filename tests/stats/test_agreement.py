"""Alpha against brute force, a published example and planted truths."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbhelpers.stats import estimate

# Krippendorff 2011, Computing Krippendorff's Alpha-Reliability, section C: four observers, twelve units.
PUBLISHED = (
    "1 2 3 3 2 1 4 1 2 . . .",
    "1 2 3 3 2 2 4 1 2 5 . 3",
    ". 3 3 3 2 3 4 2 2 5 1 .",
    "1 2 3 3 2 4 4 1 2 5 1 .",
)


def brute_alpha(ratings: list[list[float | None]]) -> float:
    units = [[v for v in row if v is not None] for row in ratings]
    units = [unit for unit in units if len(unit) > 1]
    every = [value for unit in units for value in unit]
    observed = sum(sum((a - b) ** 2 for a, b in permutations(u, 2)) / (len(u) - 1) for u in units)
    chance = sum((a - b) ** 2 for a, b in permutations(every, 2)) / (len(every) - 1)
    return 1 - observed / chance


def test_alpha_of_the_published_example() -> None:
    table = [[None if cell == "." else float(cell) for cell in line.split()] for line in PUBLISHED]
    found = estimate.krippendorff(list(zip(*table, strict=True)))
    assert round(found.mean or 0.0, 3) == 0.849 and found.n == 11
    assert found.low < found.mean < found.high  # type: ignore[operator]


RATINGS = st.lists(
    st.lists(st.none() | st.integers(1, 10).map(float), min_size=1, max_size=4), min_size=1, max_size=10
)


@settings(max_examples=60)
@given(RATINGS)
def test_alpha_against_brute_force(ratings: list[list[float | None]]) -> None:
    found = estimate.krippendorff(ratings)
    values = {v for row in ratings if sum(v is not None for v in row) > 1 for v in row if v is not None}
    if len(values) < 2:
        assert found.mean is None and found.reason
    else:
        assert found.mean == pytest.approx(brute_alpha(ratings), abs=1e-9)
        assert (found.low is None) == (found.reason is not None)


def test_alpha_of_full_agreement_has_no_interval_and_of_noise_holds_zero() -> None:
    full = estimate.krippendorff([(float(v), float(v)) for v in range(1, 9)])
    assert full.mean == pytest.approx(1.0) and full.low is None
    noise = estimate.krippendorff(np.random.default_rng(3).integers(1, 11, (60, 2)).astype(float).tolist())
    assert noise.low < 0 < noise.high  # type: ignore[operator]
    assert estimate.krippendorff([(1.0, math.nan), (2.0, 3.0)]).mean is None
