"""A/A checks on planted tables, where what they should find is known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from nbhelpers.records import LabError
from nbhelpers.stats import paired, same_model


def test_every_split_of_a_small_table_by_brute_force() -> None:
    table = np.array([[0.0, 1.0], [0.0, 3.0], [0.0, 5.0]])
    found = same_model.split_halves(table, margin=0.1, splits=400)
    every = {round(sum(s * d for s, d in zip(signs, (1, 3, 5), strict=True)) / 3, 9)
             for signs in itertools.product((1, -1), repeat=3)}  # fmt: skip
    assert {round(d, 9) for d in found.differences} == every
    assert found.largest == pytest.approx(3.0)
    assert found.alarms.mean == 0  # three prompts cannot reach p < 0.05
    assert found == same_model.split_halves(table, margin=0.1, splits=400)


def test_the_noise_floor_of_a_planted_spread() -> None:
    """Halves of r / 2 repeats differ by a normal with variance 2 within / (r / 2) / prompts."""
    found = same_model.planted(15, 4, between=1.0, within=0.25, margin=0.5, runs=800)
    sd = (2 * 0.25 / 4 / 15) ** 0.5
    assert found.typical == pytest.approx(0.6745 * sd, rel=0.12)
    assert found.largest == pytest.approx(1.96 * sd, rel=0.12)


def test_the_false_alarm_rate_is_the_nominal_one_and_half_of_it_stops_the_gate() -> None:
    """With a margin too small for ties, 5% of equal models are told apart, half of them as worse."""
    found = same_model.planted(15, 2, between=1.0, within=1.0, margin=1e-6, runs=800)
    assert found.alarms.n == 800 and found.alarms.low <= 0.05 <= found.alarms.high  # type: ignore[operator]
    assert found.gate.low <= 0.025 <= found.gate.high  # type: ignore[operator]


def test_a_check_that_can_fail_does() -> None:
    """Repeats that are not exchangeable inside `planted` would show: a planted shift is found."""
    a = {f"{n}": float(n % 3) for n in range(15)}
    b = {name: value + 1.0 + 0.01 * len(name) * (int(name) % 2) for name, value in a.items()}
    assert paired.compare_two(a, b).verdict == "worse"
    pairs = [(np.array(list(a.values())), np.array(list(b.values())))] * 10
    assert same_model._judged(pairs, 0.5).gate.mean == 1.0


@pytest.mark.parametrize("shape", [(0, 4), (1, 4), (5, 1), (5, 0)])
def test_what_cannot_be_halved_says_so(shape: tuple[int, int]) -> None:
    found = same_model.split_halves(np.zeros(shape), margin=0.5)
    assert found.reason and "cannot be halved" in found.reason
    assert (found.typical, found.alarms.mean, found.differences) == (None, None, ())
    with pytest.raises(LabError, match="prompts x repeats"):
        same_model.split_halves(np.zeros(4), margin=0.5)
