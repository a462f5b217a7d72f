"""Tests of paired differences against brute force, scipy and planted truths."""

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as sps

from nbhelpers.records import LabError
from nbhelpers.stats import paired
from nbhelpers.stats.estimate import bonett_price

quick = settings(max_examples=60)


def brute_force_flips(differences) -> float:
    total = abs(sum(differences))
    sums = [sum(s * d for s, d in zip(signs, differences, strict=True)) for signs in signs_of(differences)]
    return sum(abs(value) >= total - 1e-9 for value in sums) / len(sums)


def signs_of(values):
    return itertools.product((1, -1), repeat=len(values))


@quick
@given(st.lists(st.integers(-20, 20).map(lambda i: i / 4), min_size=1, max_size=9))
def test_sign_flips_agree_with_every_pattern(differences):
    assert paired.sign_flip_p(differences) == pytest.approx(brute_force_flips(differences), abs=1e-12)


def test_sign_flips_agree_with_scipys_permutation_test():
    x = np.random.default_rng(4).normal(0.4, 1.0, 11)
    pairs = (x, np.zeros(11))
    expected = sps.permutation_test(
        pairs, lambda a, b, axis: np.mean(a - b, axis=axis), permutation_type="samples", n_resamples=np.inf
    )
    assert paired.sign_flip_p(x) == pytest.approx(expected.pvalue, abs=1e-12)


def test_sign_flips_known_answers():
    assert paired.sign_flip_p([3.0]) == 1.0
    assert paired.sign_flip_p([0.0, 0.0]) == 1.0
    assert paired.sign_flip_p([1.0] * 5) == 2 / 2**5
    assert paired.sign_flip_p([0.7] * 20) == 2 / 2**20
    assert paired.sign_flip_p([0.7] * 20 + [0.0] * 30) == 2 / 2**20  # zeros have no sign: still exact
    for bad in ([], [1.0, math.nan]):
        with pytest.raises(LabError, match="No sign-flip test"):
            paired.sign_flip_p(bad)


def counted(steps) -> float:
    """Sign-flip p of whole numbers, exactly: the chances of every sum, one difference after the other."""
    chances = np.ones(1)
    for step in map(abs, steps):
        chances = (np.pad(chances, (0, 2 * step)) + np.pad(chances, (2 * step, 0))) / 2
    sums = np.arange(len(chances)) - len(chances) // 2
    return chances[np.abs(sums) >= abs(sum(steps))].sum()


@pytest.mark.parametrize("scale", [1.0, 0.1, 1 / 3])
@pytest.mark.parametrize("steps", [[1] * 13 + [-1] * 5 + [2] * 6, [3, -1] * 12 + [7] * 3, [1] * 40])
def test_differences_of_few_sizes_are_counted_exactly(steps, scale):
    assert paired.sign_flip_p([scale * s for s in steps]) == pytest.approx(counted(steps), rel=1e-9)


@pytest.mark.parametrize("n", [21, 100])
def test_counting_on_a_grid_is_never_too_bold_and_hardly_too_careful(n):
    """Whole numbers far finer than the grid, whose p can be counted exactly."""
    rng = np.random.default_rng(n)
    for shift in (0.5, 2, 3):
        steps = np.rint(2000 * (rng.normal(0, 1, n) + shift / math.sqrt(n))).astype(int).tolist()
        exact = counted(steps)
        assert exact * (1 - 1e-9) <= paired.sign_flip_p(steps) < exact + 0.002


def test_many_differences_are_counted_as_well_as_the_normal_curve_knows_them():
    x = np.random.default_rng(1).normal(0.1, 1, 400)
    curve = 2 * sps.norm.sf(abs(x.sum()) / math.sqrt(x @ x))
    assert curve - 1e-3 < paired.sign_flip_p(x) < curve + 0.01


def test_a_hundred_differences_take_milliseconds():
    x = np.random.default_rng(0).normal(0.2, 1, 100)
    started = time.process_time()
    for _ in range(10):
        paired.sign_flip_p(x)
    assert time.process_time() - started < 10 * 0.015


# --- against skew ----------------------------------------------------------------------------------------


def all_or_nothing(n: int, runs: int, rng) -> np.ndarray:
    """Differences of two equal models, [runs, n]: one gets nearly 0 or nearly 10, the other steadily 7.1."""
    return 10 * rng.beta(0.5, 0.2, (runs, n)) - 50 / 7 + rng.normal(0, 0.5, (runs, n))


@pytest.mark.parametrize(("n", "most"), [(8, 0.065), (15, 0.05), (30, 0.05)])
def test_a_model_that_is_all_or_nothing_raises_no_more_false_alarms(n, most):
    rows = all_or_nothing(n, 300, np.random.default_rng(n))
    alarms = sum(paired.paired_p(row) < 0.05 for row in rows)
    assert sps.binomtest(alarms, len(rows), most, alternative="greater").pvalue > 0.01
    if n == 8:
        bold = sum(paired.sign_flip_p(row) < 0.05 for row in rows)
        assert bold > alarms


def test_what_is_not_skewed_against_its_mean_keeps_its_sign_flip_p():
    for x in (
        [1.0, 2, 3, 4, 5, 6],
        [0, 0, 0, 0, 1, 1, 2, 9.0],
        [-0.5, 1, 1.5, 2, 2.5, 3, 3.5, 6.5],
        [1.0, 2],
    ):
        assert paired.paired_p(x) == paired.sign_flip_p(x)
    against = [-4.0, 1.5, 2, 2, 2, 2.5, 2.5, 2.5, 3, 3]  # the tail on the other side of 0
    assert paired.paired_p(against) > paired.sign_flip_p(against)
    mirrored = paired.paired_p([-value for value in against])
    assert mirrored == pytest.approx(paired.paired_p(against), rel=1e-12)


# --- binary outcomes -------------------------------------------------------------------------------------


def tables(n: int):
    """Every (wins, losses) of n prompts."""
    return [(w, m - w) for m in range(n + 1) for w in range(m + 1)]


def mid_p(wins: int, losses: int) -> float:
    m, k = wins + losses, min(wins, losses)
    tail = sum(math.comb(m, i) for i in range(k + 1)) - math.comb(m, k) / 2
    return min(1.0, 2 * tail / 2**m)


@pytest.mark.parametrize("n", [5, 8, 15])
def test_mcnemar_p_is_the_largest_chance_over_all_shares_of_discordant_prompts(n):
    orders = {table: mid_p(*table) for table in tables(n)}
    shares = np.linspace(0.001, 1, 120)
    chances = {m: sps.binom.pmf(m, n, shares) for m in range(n + 1)}
    for found in [(n, 0), (n - 1, 1), (n - 2, 0), (1, n // 2), (2, 2), (0, 0)]:
        extreme = [table for table in orders if orders[table] <= orders[found] * (1 + 1e-12)]
        worst = sum(chances[w + m] * math.comb(w + m, w) / 2 ** (w + m) for w, m in extreme).max()
        assert paired.mcnemar_p(*found, n) == pytest.approx(worst, abs=0.002)
        assert paired.mcnemar_p(*found[::-1], n) == paired.mcnemar_p(*found, n)


@pytest.mark.parametrize(("n", "power"), [(8, 0.06), (15, 0.32), (30, 0.72)])
def test_binary_outcomes_have_the_power_of_mid_p_without_its_false_alarms(n, power):
    """Added up over every table. One model alone passes 32% of the prompts, the other 5%."""
    found = np.array([[w, m, paired.mcnemar_p(w, m, n) < 0.05] for w, m in tables(n)])
    wins, losses, significant = found.T
    interval = np.array([bonett_price(int(w), int(m), n) for w, m in tables(n)])
    significant *= (interval[:, 0] > 0) | (interval[:, 1] < 0)

    def share(one, other):
        counts = np.column_stack([wins, losses, n - wins - losses])
        return float(significant @ sps.multinomial.pmf(counts, n, [one, other, 1 - one - other]))

    assert share(0.32, 0.05) >= power
    assert max(share(q / 2, q / 2) for q in np.linspace(0.01, 1, 50)) <= 0.05
    exact = 2 * sps.binom.cdf(np.minimum(wins, losses), wins + losses, 0.5) < 0.05
    assert np.all(significant >= exact)  # whatever the conditional test finds


def test_bonett_price_against_the_published_example():
    """1,600 people asked twice (Agresti 2002, table 10.1): 150 changed one way, 86 the other."""
    low, high = bonett_price(150, 86, 1600)
    assert (round(low, 3), round(high, 3)) == (0.021, 0.059)
    assert bonett_price(8, 0, 8)[1] == 1.0
    low, high = bonett_price(0, 0, 15)
    assert -0.2 < low < 0 < high < 0.2


# --- Holm ------------------------------------------------------------------------------------------------


@quick
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_the_closed_testing_of_bonferroni(p_values):
    """Adjusted p of i: the largest Bonferroni p over every subset of hypotheses that holds i."""
    indices = range(len(p_values))
    subsets = [s for size in indices for s in itertools.combinations(indices, size + 1)]
    expected = [
        max(min(1.0, len(s) * min(p_values[j] for j in s)) for s in subsets if i in s) for i in indices
    ]
    assert paired.holm(p_values) == pytest.approx(expected, abs=1e-12)


@quick
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_holm_keeps_order_and_never_lowers_a_p(p_values, random):
    adjusted = paired.holm(p_values)
    assert all(p <= q <= 1 for p, q in zip(p_values, adjusted, strict=True))
    assert [q for _, q in sorted(zip(p_values, adjusted, strict=True))] == sorted(adjusted)
    order = random.sample(range(len(p_values)), len(p_values))
    assert paired.holm([p_values[i] for i in order]) == [adjusted[i] for i in order]


def test_holm_edges():
    assert paired.holm([]) == []
    assert paired.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
