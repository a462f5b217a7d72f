"""The always-valid test against brute force over signs, closed forms, simulation and planted truths."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as sps

from nbhelpers.records import RunInfo, Scale, Settings
from nbhelpers.stats import paired, sequential

TEN = [10] * 10  # looks at 100 prompts
quick = settings(max_examples=60, deadline=None)


def planted(difference: float, sd: float = 1.0, n: int = 100, seed: int = 0) -> np.ndarray:
    """n differences with exactly this mean and standard deviation."""
    x = np.random.default_rng(seed).normal(size=n)
    return difference + sd * (x - x.mean()) / x.std(ddof=1)


def models(**differences: np.ndarray) -> dict[str, dict[str, float]]:
    """A model of five points a prompt, and one for each of these differences from it."""
    n = len(next(iter(differences.values())))
    base = {f"p{i:03}": 5.0 for i in range(n)}
    return {"base": base} | {name: {p: 5 + float(d) for p, d in zip(base, x, strict=True)}
                             for name, x in differences.items()}  # fmt: skip


def looks(n: int, size: int = 10) -> list[list[str]]:
    return [[f"p{i:03}" for i in range(start, start + size)] for start in range(0, n, size)]


def compare_in_order(table, order, planned: int):
    return paired.judged(sequential.always_valid_pairs(table, 0.5, order, planned))


@pytest.mark.parametrize(("prompts", "expected"), [
    (100, tuple(range(10, 101, 10))), (15, (2, 3, 5, 6, 8, 9, 11, 12, 14, 15)), (3, (1, 2, 3)),
])  # fmt: skip
def test_ten_looks_or_as_many_as_there_are_prompts(prompts, expected):
    assert sequential.plan_looks(prompts) == expected


def test_the_looks_of_a_run_are_its_prompts_in_the_order_asked():
    info = RunInfo("run", (), Settings(), "", None, {}, "", None, prompts=dict.fromkeys("cabed", ""))
    assert sequential.looks_of(info) == []
    whole = {**vars(info), "looks": (2, 4, 5)}
    assert sequential.looks_of(RunInfo(**whole)) == [["c", "a"], ["b", "e"], ["d"]]


# --- the evidence ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[3, 3, 3], [1, 4, 2, 5], [12]])
def test_over_all_signs_the_game_is_fair_and_rarely_won(sizes):
    """Differences of given sizes and all sign patterns: E is 1 on average at each look, and the share of
    patterns in which it ever reaches a limit is at most 1 / the limit (Ville)."""
    n = sum(sizes)
    x = np.abs(np.random.default_rng(n).standard_cauchy(n))
    x[n // 2] = 0  # a prompt on which the models do not differ
    signs = np.array(list(itertools.product((1, -1), repeat=n)))
    e = np.exp(sequential.log_e(signs * x, sizes, planned=n))
    assert e.mean(axis=0) == pytest.approx(np.ones(len(sizes)))
    for limit in (2, 5, 20):
        assert np.mean(e.max(axis=1) >= limit) <= 1 / limit


@quick
@given(st.lists(st.floats(-10, 10), min_size=4, max_size=40), st.integers(1, 4), st.floats(0.1, 50))
def test_the_evidence_by_hand(values, per_look, scale):
    """One product a side, in units that do not matter, and neither do names (signs)."""
    sizes = [min(per_look, len(values) - i) for i in range(0, len(values), per_look)]
    capital, seen, expected = [1.0, 1.0], [], []
    for size in sizes:
        new = values[len(seen) : len(seen) + size]
        seen += new
        rms = math.sqrt(sum(v * v for v in seen) / len(seen)) or 1.0
        for v in new:
            b = sequential.AIM / math.sqrt(50) * v / rms
            capital = [
                c * 2 / (1 + math.exp(-2 * side * b)) for c, side in zip(capital, (1, -1), strict=True)
            ]
        expected.append(sum(capital) / 2)
    x = np.array(values)
    assert np.exp(sequential.log_e(x, sizes, 50)) == pytest.approx(expected, rel=1e-9)
    if np.abs(x).max() > 1e-9:
        assert np.exp(sequential.log_e(-scale * x, sizes, 50)) == pytest.approx(expected, rel=1e-6)


def test_the_interval_holds_the_shifts_that_are_not_refuted():
    x = planted(0.4)
    low, high = sequential.early_interval(x, TEN, 100)
    for shift in np.linspace(x.mean() - 1, x.mean() + 1, 41):
        refuted = math.exp(sequential.log_e(x - shift, TEN, 100)[-1]) > 20
        assert refuted == (not low < shift < high)
    assert sequential.early_interval(3 * x - 7, TEN, 100) == pytest.approx((3 * low - 7, 3 * high - 7))
    # Between Student's interval and one and a half times as wide: the price of ten looks and more.
    half = sps.t.ppf(0.975, 99) * 0.1
    assert half < (high - low) / 2 < 1.6 * half


def test_few_differences_have_no_interval_and_equal_ones_none_with_a_width():
    assert sequential.early_interval(planted(2, n=10), [10], 100) is None  # however large they are
    assert sequential.early_interval(planted(2, n=20), [10, 10], 100) is not None
    assert sequential.early_interval(np.full(20, 2.0), [10, 10], 100) == (2.0, 2.0)
    assert sequential.early_interval(np.full(10, 2.0), [10], 100) is None


def test_an_interval_is_found_where_the_first_look_was_another_world():
    low, high = sequential.early_interval(np.r_[np.full(10, -0.1), planted(9, n=90)], TEN, 100)
    assert low < high


def test_skew_against_the_mean_is_asked_and_other_skew_is_not():
    """Hall's formula by hand; one that wins nine of ten prompts and loses the rest by far."""
    x = np.r_[np.full(27, 1.0), np.full(3, -4.0)] + planted(0, 0.2, 30)
    m, s, n = x.mean(), x.std(), len(x)
    skew, noise = np.mean((x - m) ** 3) / s**3, 6 * 30 * 29 / (28 * 31 * 33)
    k, u = skew - noise / skew, m / x.std(ddof=1)
    t = math.sqrt(n) * (u + k * u**2 / 3 + k**2 * u**3 / 27 + k / 180)
    assert skew < 0 < u and paired.hall_t(x) == pytest.approx(t)
    assert paired.hall_t(-x) == pytest.approx(-t)
    right = x - 2 * m  # the same skew, on the side of the mean
    assert paired.hall_t(right) is None
    evidence = math.exp(-sequential.log_e(x, [10] * 3, 30)[-1])
    assert sequential.p_value(x, [10] * 3, 30) > 1.5 * evidence


# --- verdicts --------------------------------------------------------------------------------------------


def test_verdicts_of_a_planted_truth():
    table = models(far=planted(-1), near=planted(0.02, 0.5, seed=1), open=planted(0.25, 1, seed=2))
    found = {c.b: c for c in compare_in_order(table, looks(100), 100) if c.a == "base"}
    assert {name: c.verdict for name, c in found.items()} == {
        "far": "better", "near": "tied", "open": "cannot tell",
    }  # fmt: skip
    ends = sequential.early_interval(planted(1), TEN, 100)
    assert (found["far"].difference, found["far"].n) == (pytest.approx(1), 100)
    assert ends[0] < 1 < ends[1] and found["far"].prompts_needed is None
    assert found["far"].p_holm == pytest.approx(6 * found["far"].p)  # six pairs, the smallest p
    fixed = {c.b: c for c in paired.compare_all(table) if c.a == "base"}
    for name, c in found.items():  # looking has its price, and the point estimate is the same
        assert c.high - c.low > fixed[name].high - fixed[name].low
        assert c.difference == fixed[name].difference


def test_of_very_many_models_groups_rest_on_the_test_that_holds_at_every_look():
    table = models(**{f"m{i:02d}": planted(-0.05 * i, 1, seed=i) for i in range(60)})
    order = sorted(table, key=lambda name: -sum(table[name].values()))
    found = sequential.always_valid_pairs({name: table[name] for name in order}, 0.5, looks(100), 100)
    judged = paired.judged(found, 61 * 60 // 2)
    assert [c.b for c in judged if c.a == order[0]] == order[1:]
    told = [c.b for c in judged if c.a == order[0] and c.verdict == "better"]
    assert told and [c.b for c in judged if c.a == told[0]] == told[1:]
    for c in judged[:5]:
        gaps = {p: round(table[c.a][p] - table[c.b][p], 12) for p in table[c.a]}
        assert c.p == sequential.p_value(*sequential.in_order(gaps, looks(100)), 100)


def test_a_run_is_decided_when_no_pair_is_open():
    scale = Scale(0, 10, 0.5)
    assert sequential.decided(
        models(far=planted(-1), near=planted(0.02, 0.5, seed=1)), scale, looks(100), 100
    )
    assert not sequential.decided(models(open=planted(0.25, 1, seed=2)), scale, looks(100), 100)


def test_early_and_equal_differences():
    early = compare_in_order(models(far=planted(-3, n=10)), looks(10), 100)[0]
    assert (early.verdict, early.p_holm, early.low) == ("cannot tell", None, None)
    assert early.reason == "n = 10: too few for an early verdict"
    for n, verdict in ((10, "cannot tell"), (20, "better")):
        c = compare_in_order(models(flat=np.full(n, -1.0)), looks(n), 100)[0]
        assert (c.verdict, c.low) == (verdict, None)
    assert compare_in_order(models(same=np.zeros(20)), looks(20), 100)[0].verdict == "tied"


def test_prompts_that_have_no_scores_belong_to_no_look():
    table = models(far=planted(-1))
    part = {name: {p: v for p, v in own.items() if p[-1] != "7"} for name, own in table.items()}
    c = compare_in_order(part, looks(100), 100)[0]
    x = -planted(-1)[[i for i in range(100) if i % 10 != 7]]
    assert c.n == 90 and (c.low, c.high) == pytest.approx(sequential.early_interval(x, [9] * 10, 100))
    assert compare_in_order(part, [*looks(100), ["more"]], 100)[0] == c
