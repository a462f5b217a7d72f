"""What notebook 05 defines, against brute force, scipy and planted truths."""

import itertools
import math

import numpy as np
import pytest
from definitions import definitions
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as sps

BOOK = definitions("05_statistics", "definitions")
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


# --- repeats: clustered errors, the split of the variance, the best design -------------------------------


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


@quick
@given(
    st.floats(0, 4), st.floats(0.01, 4), st.integers(6, 60), st.sampled_from([0, 1, 3, 10]), st.integers(2, 9)
)
def test_best_design_is_the_best_of_all(between, within, budget, prompt_cost, most):
    fits = [
        sps.t.ppf(0.975, p - 1) * math.sqrt(between / p + within / (p * r))
        for p in range(2, most + 1)
        for r in range(1, budget)
        if p * (prompt_cost + r) <= budget
    ]
    if fits:
        p, r = BOOK.best_design((between, within), budget, prompt_cost, most)
        assert BOOK.half_width((between, within), p, r) == pytest.approx(min(fits), abs=1e-9)
        assert p <= most and p * (prompt_cost + r) <= budget


def test_best_design_by_hand():
    """Only generations cost: one repeat. Prompts that cost 9 times a repeat: sqrt(1/1 * 9) = 3 repeats."""
    assert BOOK.best_design((1.0, 1.0), 60) == (60, 1)
    assert BOOK.best_design((1.0, 1.0), 60, most_prompts=15) == (15, 4)
    assert BOOK.best_design((1.0, 1.0), 1200, prompt_cost=9) == (100, 3)
    assert BOOK.best_design((0.0, 1.0), 600, prompt_cost=9)[0] > 10  # few prompts may look alike


# --- rates -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("passed", "n"), [(0, 5), (3, 8), (15, 15), (1, 1)])
def test_outcomes_of_0_and_1_have_wilsons_interval(passed, n):
    found = BOOK.wilson([1] * passed + [0] * (n - passed))
    ends = sps.binomtest(passed, n).proportion_ci(method="wilson")
    assert (found.mean, found.low, found.high) == pytest.approx((passed / n, ends.low, ends.high), abs=1e-9)


@pytest.mark.parametrize("truth", [0.5, 0.8, 0.95])
def test_shares_of_repeats_are_clustered_by_prompt(truth):
    """Repeats of one prompt mostly agree (correlation 0.5): as single outcomes they would be overcounted."""
    rng = np.random.default_rng(4)
    shares = rng.binomial(4, rng.beta(truth, 1 - truth, (800, 15))) / 4
    held = np.mean([e.low <= truth <= e.high for e in map(BOOK.wilson, shares)])
    naive = (sps.binomtest(round(60 * row.mean()), 60).proportion_ci(method="wilson") for row in shares)
    assert held > 0.93 > np.mean([e.low <= truth <= e.high for e in naive]) + 0.03


def test_pass_at_k_is_the_share_of_draws_that_hold_a_pass():
    """By brute force over every draw of k tries; the interval is over prompts."""
    passed = {"a": [1, 0, 0, 0, 1], "b": [0] * 5, "c": [1] * 5, "d": [0, 0, 1, 0, 0]}
    for k in (1, 2, 5):
        shares = [np.mean([any(d) for d in itertools.combinations(p, k)]) for p in passed.values()]
        found, again = BOOK.pass_at_k(passed, k), BOOK.wilson(shares)
        assert (found.n, found.mean) == (4, pytest.approx(np.mean(shares)))
        assert (found.low, found.high) == pytest.approx((again.low, again.high))


# --- the same model twice --------------------------------------------------------------------------------


def test_every_split_of_a_small_table_by_brute_force():
    pairs = BOOK.halves(np.array([[0.0, 1.0], [0.0, 3.0], [0.0, 5.0]]), splits=400)
    every = itertools.product((1, -1), repeat=3)
    expected = {round(sum(s * d for s, d in zip(signs, (1, 3, 5), strict=True)) / 3, 9) for signs in every}
    assert {round(d, 9) for d in (pairs[:, 0] - pairs[:, 1]).mean(axis=1)} == expected
    assert BOOK.false_alarms(pairs, 0.1)[0].mean == 0  # three prompts cannot reach p < 0.05


def test_the_noise_floor_of_a_planted_spread():
    """Means of r repeats of p prompts differ by a normal with variance 2 within / r / p."""
    pairs = BOOK.runs_of_one_model((1.0, 0.25), 15, 4, runs=800)
    sizes = np.abs((pairs[:, 0] - pairs[:, 1]).mean(axis=1))
    sd = (2 * 0.25 / 4 / 15) ** 0.5
    assert np.percentile(sizes, (50, 95)) == pytest.approx([0.6745 * sd, 1.96 * sd], rel=0.12)


def test_the_false_alarm_rate_is_the_nominal_one_and_half_of_it_stops_the_gate():
    """With a margin too small for ties, 5% of equal models are told apart, half of them as worse."""
    alarms, gate = BOOK.false_alarms(BOOK.runs_of_one_model((1.0, 1.0), 15, 2, runs=800), 1e-6)
    assert alarms.n == 800 and alarms.low <= 0.05 <= alarms.high
    assert gate.low <= 0.025 <= gate.high


def test_a_check_that_can_fail_does():
    a = np.arange(15.0) % 3
    assert BOOK.false_alarms([(a, a + 1 + 0.01 * (np.arange(15) % 2))] * 10, 0.5)[1].mean == 1.0
