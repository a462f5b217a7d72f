"""What notebooks 05 and 19 define, against brute force, scipy and planted truths."""

import itertools
import math

import numpy as np
import pytest
from definitions import definitions
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as sps

BOOK = definitions("05_statistics", "definitions")
CALIBRATION = definitions("19_calibration", "definitions")
BLOOM = [7.9, 4.2, 6.3, 7.5, 7.5, 7.5, 7.5, 7.2, 7.0, 4.8, 5.8, 5.8, 7.5, 7.6, 5.8]
OPT = [8.0, 8.0, 8.0, 8.0, 10.0]
points = st.floats(0, 10).map(lambda x: round(x, 3))  # scores as the rubrics give them
quick = settings(max_examples=60, deadline=None)


# --- a claim ---------------------------------------------------------------------------------------------


def test_claim_keeps_its_sign():
    *_, t, p, verdict = BOOK.against(BLOOM, 8.0)
    assert (round(t, 2), round(p, 5), verdict) == (-4.55, 0.00045, "below the claim")
    *_, t, p, verdict = BOOK.against(OPT, 8.0)
    assert (round(t, 2), round(p, 2), verdict) == (1.00, 0.37, "cannot tell")
    assert BOOK.against(BLOOM, 5.0)[-1] == "above the claim"


@pytest.mark.parametrize(("n", "alarms"), [(5, 0.122), (15, 0.070)])
def test_false_alarms_of_the_normal_quantile(n, alarms):
    """How often |t| > 1.96 under a true claim: from the t distribution, and through the test."""
    assert 2 * sps.t.sf(1.96, n - 1) == pytest.approx(alarms, abs=0.001)
    found = [BOOK.against(row, 8.0) for row in np.random.default_rng(1).normal(8.0, 1.0, (1000, n))]
    assert np.mean([abs(t) > 1.96 for *_, t, _, _ in found]) == pytest.approx(alarms, abs=0.028)
    assert np.mean([verdict != "cannot tell" for *_, verdict in found]) == pytest.approx(0.05, abs=0.021)


# --- repeats: clustered errors and the split of the variance ---------------------------------------------


@quick
@given(st.lists(st.lists(points, min_size=1, max_size=4), min_size=2, max_size=6))
def test_clustered_error_adds_up_every_pair_of_one_prompt(groups):
    values = [v for group in groups for v in group]
    owner = [i for i, group in enumerate(groups) for _ in group]
    n, mean, k = len(values), sum(values) / len(values), len(groups)
    pairs = sum(
        (values[i] - mean) * (values[j] - mean)
        for i, j in itertools.permutations(range(n), 2)
        if owner[i] == owner[j]
    )
    variance = sum((v - mean) ** 2 for v in values) / (n - 1) / n + pairs / n**2
    low, high = BOOK.clustered(groups)
    half = sps.t.ppf(0.975, k - 1) * math.sqrt(k / (k - 1) * max(0, variance))
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=1e-6)


def test_clustered_error_of_single_texts_and_of_equal_repeats():
    """One text a prompt: Student's interval, but for the factor of few prompts. Copies add nothing."""
    half = sps.t.ppf(0.975, 14) * sps.sem(BLOOM) * math.sqrt(15 / 14)
    low, high = BOOK.clustered([[v] for v in BLOOM])
    assert (high - low) / 2 == pytest.approx(half, abs=1e-9)
    low, high = BOOK.clustered([[v] * 4 for v in BLOOM])
    assert (high - low) / 2 == pytest.approx(half, rel=0.04)


def test_variance_split_against_the_textbook_anova():
    """F of scipy's one-way ANOVA is MSB/MSW, and between = (MSB - MSW) / repeats."""
    rng = np.random.default_rng(5)
    grid = rng.normal(0, 2, (8, 1)) + rng.normal(0, 1, (8, 4))
    between, within = BOOK.variance_split(grid)
    expected = grid.var(axis=1, ddof=1).mean()
    assert within == pytest.approx(expected)
    assert between == pytest.approx((sps.f_oneway(*grid).statistic - 1) * expected / 4)
    by_hand = grid.mean(axis=1).std(ddof=1) / math.sqrt(8)  # the design that was run
    assert BOOK.half_width((between, within), 8, 4) == pytest.approx(sps.t.ppf(0.975, 7) * by_hand)


def test_variance_split_recovers_a_planted_truth():
    rng = np.random.default_rng(6)
    between, within = BOOK.variance_split(rng.normal(5, 2.0, (3000, 1)) + rng.normal(0, 1.0, (3000, 3)))
    assert (between, within) == (pytest.approx(4.0, rel=0.1), pytest.approx(1.0, rel=0.1))
    assert BOOK.variance_split(np.array([[0.0, 1.0], [0.0, 1.0]])) == (0.0, 0.5)  # no negative variance


def test_upper_split_is_above_a_planted_truth_as_often_as_it_says():
    """The ratio of the variances is below its upper end in 97.5% of the pilots, however small they are."""
    rng = np.random.default_rng(9)
    pilots = rng.normal(0, 0.6, (2000, 5, 1)) + rng.normal(0, 0.4, (2000, 5, 2))
    ends = [BOOK.upper_split(pilot) for pilot in pilots]
    assert np.mean([between / within >= 0.36 / 0.16 for between, within in ends]) == pytest.approx(
        0.975, abs=0.01
    )


# --- calibration -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "missed"), [(5, 0.122), (15, 0.070)])
def test_coverage_is_counted_as_the_distribution_says(n, missed):
    x = np.random.default_rng(2).normal(3, 2, (20_000, n))
    share, error = CALIBRATION.covered(x.mean(axis=1), 1.96 * sps.sem(x, axis=1), 3)
    assert share == pytest.approx(1 - missed, abs=4 * error)
    assert error == pytest.approx(math.sqrt(missed * (1 - missed) / 20_000), rel=0.1)


def test_the_noise_floor_of_a_planted_spread():
    """Means of r repeats of p prompts differ by a normal with variance 2 within / r / p."""
    pairs = CALIBRATION.runs_of_one_model((1.0, 0.25), 15, 4, runs=800)
    sizes = np.abs((pairs[:, 0] - pairs[:, 1]).mean(axis=1))
    sd = (2 * 0.25 / 4 / 15) ** 0.5
    assert np.percentile(sizes, (50, 95)) == pytest.approx([0.6745 * sd, 1.96 * sd], rel=0.12)


def test_the_false_alarm_rate_is_the_nominal_one_and_half_of_it_stops_the_gate():
    """With a margin too small for ties, 5% of equal models are told apart, half of them as worse."""
    alarms, gate = CALIBRATION.false_alarms(CALIBRATION.runs_of_one_model((1.0, 1.0), 15, 2, runs=800), 1e-6)
    assert alarms.n == 800 and alarms.low <= 0.05 <= alarms.high
    assert gate.low <= 0.025 <= gate.high


def test_a_check_that_can_fail_does():
    a = np.arange(15.0) % 3
    assert CALIBRATION.false_alarms([(a, a + 1 + 0.01 * (np.arange(15) % 2))] * 10, 0.5)[1].mean == 1.0
