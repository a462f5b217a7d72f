"""Statistics against brute force, independent formulas, textbook values and planted truths."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import integrate
from scipy import stats as sps

from nbhelpers import store
from nbhelpers.records import Estimate, LabError, Score
from nbhelpers.stats import paired
from nbhelpers.stats.estimate import bonett_price, by_prompt, estimate, median_estimate
from nbhelpers.stats.paired import Comparison

BLOOM = [7.9, 4.2, 6.3, 7.5, 7.5, 7.5, 7.5, 7.2, 7.0, 4.8, 5.8, 5.8, 7.5, 7.6, 5.8]
OPT = [8.0, 8.0, 8.0, 8.0, 10.0]

points = st.floats(0, 10).map(lambda x: round(x, 3))  # scores as the rubrics give them
score_lists = st.lists(points, min_size=2, max_size=12)
pair_lists = st.lists(st.tuples(points, points), min_size=2, max_size=12)
quick = settings(max_examples=60)


def score(prompt: str, repeat: int, value: float, failed: bool = False) -> Score:
    return Score(f"{prompt}/{repeat}", prompt, repeat, "short_post", failed, 10, {"lab_v1": value})


def on_prompts(values) -> dict[str, float]:
    return {f"b{i:02d}": float(value) for i, value in enumerate(values)}


def planted(mean: float, sd: float, n: int) -> np.ndarray:
    """n symmetric values with exactly this mean and sample deviation."""
    shape = np.linspace(-1, 1, n)
    return mean + sd * shape / shape.std(ddof=1)


# --- estimates -------------------------------------------------------------------------------------------


def test_the_published_lists():
    bloom, opt = estimate(BLOOM), estimate(OPT)
    assert [round(v, 2) for v in (bloom.mean, bloom.low, bloom.high, bloom.sd)] == [6.66, 6.03, 7.29, 1.14]
    assert [round(v, 2) for v in (opt.mean, opt.low, opt.high, opt.sd)] == [8.40, 7.29, 9.51, 0.89]


@quick
@given(score_lists)
def test_t_interval_agrees_with_scipy(values):
    e = estimate(values)
    assert e.n == len(values) and e.mean == pytest.approx(sum(values) / len(values), abs=1e-9)
    if len(set(values)) == 1:
        assert (e.sd, e.low, e.high) == (0.0, None, None)
        return
    ends = sps.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (e.low, e.high) == pytest.approx((ends.low, ends.high), abs=1e-9)
    assert e.sd == pytest.approx(np.std(values, ddof=1), abs=1e-9)


@pytest.mark.parametrize(
    ("values", "mean", "sd", "reason"),
    [
        ([], None, None, "no data"),
        ([7.0], 7.0, None, "n = 1: no interval"),
        ([7.3] * 4, 7.3, 0.0, "all 4 values are equal: no interval"),
        ([0.1 + 0.2, 0.3], 0.3, 0.0, "all 2 values are equal: no interval"),
        ([1.0, math.nan, 2.0, -math.inf], None, None, "2 of 4 values are not finite"),
        ([1e308, 1e308], None, None, "2 of 2 values are not finite"),
    ],
)
@pytest.mark.parametrize("method", ["t", "bootstrap-t"])
def test_too_little_data_is_a_result_with_a_reason(values, mean, sd, reason, method):
    e = estimate(iter(values), method=method)
    assert (e.n, e.sd, e.low, e.high) == (len(values), sd, None, None)
    assert e.mean == (mean if mean is None else pytest.approx(mean, abs=1e-12))
    assert e.reason.startswith(reason)


def test_bootstrap_wants_five_values():
    assert estimate([1, 2, 3, 4], method="bootstrap-t").reason.startswith("n = 4: too few values to resample")
    assert estimate([1, 2, 3, 4, 5], method="bootstrap-t").low is not None
    assert estimate([1, 2]).low is not None


@quick
@given(
    st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=8),
    st.sampled_from(["t", "bootstrap-t"]),
)
def test_any_input_gives_an_interval_or_a_reason(values, method):
    e = estimate(values, method=method)
    if e.reason is None:
        assert e.low < e.high and (method != "t" or e.low < e.mean < e.high)
    else:
        assert e.low is None and e.high is None
    json.dumps([e.mean, e.sd, e.low, e.high], allow_nan=False)


@quick
@given(score_lists, st.randoms(use_true_random=False), st.floats(-50, 50).map(lambda x: round(x, 2)))
def test_order_is_irrelevant_and_a_shift_moves_everything(values, random, shift):
    shuffled = random.sample(values, len(values))
    for method in ("t", "bootstrap-t"):
        e = estimate(values, method=method)
        assert estimate(shuffled, method=method) == e
        moved = estimate([v + shift for v in values], method=method)
        if e.low is not None:
            assert (moved.low, moved.high) == pytest.approx((e.low + shift, e.high + shift), abs=1e-6)


def test_t_interval_covers_a_known_truth_as_often_as_it_says():
    """2,000 samples of 6 from a known normal: 95% +- 1.5 points (three standard errors)."""
    rows = np.random.default_rng(0).normal(6.5, 1.2, (2000, 6))
    found = [estimate(row) for row in rows]
    assert np.mean([e.low <= 6.5 <= e.high for e in found]) == pytest.approx(0.95, abs=0.015)


# --- scores by prompt ------------------------------------------------------------------------------------


def test_by_prompt_averages_repeats_and_keeps_failures():
    rows = [score("b02", 0, 4), score("b01", 0, 6), score("b01", 1, 0.0, failed=True), score("b02", 1, 5)]
    assert by_prompt(rows, "lab_v1") == {"b02": 4.5, "b01": 3.0}
    assert list(by_prompt(rows, "lab_v1")) == ["b02", "b01"]
    assert by_prompt([], "lab_v1") == {}


def test_by_prompt_names_a_missing_score():
    with pytest.raises(LabError, match="b01 has no score 'lab_v2': it has lab_v1"):
        by_prompt([score("b01", 0, 4)], "lab_v2")


# --- medians ----------------------------------------------------------------------------------------------


def test_a_median_only_where_the_sample_supports_it():
    few, enough = median_estimate(range(1)), median_estimate(range(2))
    assert few.mean is None and few.reason == "n = 1: p50 needs at least 2 values"
    assert enough.mean == 0.5 and enough.low is None and "too few values to resample" in enough.reason
    whole = median_estimate(range(5))
    assert whole.low < whole.mean < whole.high and whole.reason is None


def test_median_edges():
    assert median_estimate([]).reason == "no data"
    assert median_estimate([1.0] * 30).reason.startswith("all 30 values are equal")
    assert median_estimate([1.0, math.nan]).reason.startswith("1 of 2 values")


# --- power ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("difference", "n"), [(0.3, 15), (1.0, 4), (0.05, 200), (2.5, 2)])
def test_power_against_direct_integration(difference, n):
    """P(|T| > t) by integrating the normal over the chi distribution of the deviation."""
    df, critical = n - 1, sps.t.isf(0.025, n - 1)

    def beyond(s: float) -> float:
        reach, shift = critical * s / math.sqrt(df), difference * math.sqrt(n)
        return (sps.norm.sf(reach - shift) + sps.norm.cdf(-reach - shift)) * sps.chi.pdf(s, df)

    expected = integrate.quad(beyond, 0, math.sqrt(df) + 12, epsabs=1e-12, limit=200)[0]
    assert paired.power(difference, 1.0, n) == pytest.approx(expected, abs=1e-9)


def test_power_grows_with_n_and_with_the_difference_up_to_the_extremes():
    differences, sizes = np.logspace(-4, 4, 30), (2, 3, 4, 5, 8, 15, 40, 200, 3000, 100_000)
    for alpha in (0.05, 1e-4):
        table = np.array([[paired.power(d, 1.0, n, alpha) for n in sizes] for d in differences])
        assert np.all(np.diff(table, axis=0) >= -1e-9) and np.all(np.diff(table, axis=1) >= -1e-9)
        assert table.min() >= alpha - 1e-9 and table.max() == pytest.approx(1.0)


def test_prompts_needed_textbook_values():
    """Paired t test, two-sided 5%, 80% power: d_z 0.2, 0.5, 0.8 need 199, 34, 15 pairs (G*Power, Cohen)."""
    assert [paired.prompts_needed(d, 1.0) for d in (0.2, 0.5, 0.8)] == [199, 34, 15]
    assert paired.prompts_needed(-1.0, 2.0) == 34
    assert paired.prompts_needed(0.5, 1.0, alpha=0.01) > 34
    assert paired.prompts_needed(1000.0, 1.0) == 2


@quick
@given(st.floats(0.02, 5), st.sampled_from([0.05, 0.01]))
def test_prompts_needed_is_the_smallest(difference, alpha):
    n = paired.prompts_needed(difference, 1.0, alpha)
    assert paired.power(difference, 1.0, n, alpha) >= 0.8
    assert n == 2 or paired.power(difference, 1.0, n - 1, alpha) < 0.8


def test_prompts_needed_that_nobody_has():
    assert paired.prompts_needed(0.0, 1.0) is None
    assert paired.prompts_needed(0.5, 0.0) is None
    assert paired.prompts_needed(0.001, 1.0) is None


# --- comparisons -----------------------------------------------------------------------------------------


def compared(differences, **options) -> Comparison:
    """paired() on scores around 5 with these differences."""
    a = on_prompts(5 + np.sin(np.arange(len(differences))) + differences)
    b = on_prompts(5 + np.sin(np.arange(len(differences))))
    return paired.compare_two(a, b, "one", "two", **options)


@pytest.mark.parametrize(
    ("mean", "sd", "n", "verdict"),
    [
        (1.5, 1.0, 15, "better"),
        (-1.5, 1.0, 15, "worse"),
        (0.05, 0.3, 15, "tied"),
        (0.6, 2.0, 15, "cannot tell"),
        (0.2, 0.3, 15, "tied"),  # significant, but wholly inside the margin
    ],
)
def test_verdicts(mean, sd, n, verdict):
    c = compared(planted(mean, sd, n))
    half = sps.t.isf(0.025, n - 1) * sd / math.sqrt(n)
    assert (c.difference, c.low, c.high) == pytest.approx((mean, mean - half, mean + half), abs=1e-9)
    assert (c.a, c.b, c.n, c.margin, c.verdict) == ("one", "two", n, 0.5, verdict)
    assert c.p == c.p_holm == pytest.approx(paired.sign_flip_p(planted(mean, sd, n)))
    assert (c.prompts_needed is not None) == (verdict == "cannot tell")


def test_a_small_but_certain_difference_is_tied_and_says_so():
    c = compared(planted(0.2, 0.3, 15))
    assert c.low > 0 and c.p < 0.05 and c.verdict == "tied" and "significant" in c.reason
    assert compared(planted(0.2, 0.3, 15), margin=0.1).verdict == "better"
    assert compared(planted(0.0, 0.3, 15)).reason is None


def test_cannot_tell_says_how_many_prompts_to_plan_for_the_margin():
    """Equal models are to be tied: (1.96 + 1.28)² sd² / margin² = 168, and t is wider."""
    c = compared(planted(0.6, 2.0, 15))
    assert c.prompts_needed == paired.planned(2.0, 0.5) == 171
    assert c.reason == "the interval holds 0 and reaches outside ±0.5"
    assert compared(planted(0.2, 60.0, 15)).prompts_needed is None
    assert compared(planted(1.0, 2.0, 15)).prompts_needed == c.prompts_needed  # whatever was seen
    assert compared(planted(0.6, 2.0, 15), margin=1.0).prompts_needed < c.prompts_needed / 3


def test_the_plan_has_the_interval_of_the_spread():
    """By chi-square: a plan from 15 differences holds the plan from the true spread in 95% of the samples."""
    x, truth = np.random.default_rng(5).normal(0.4, 1.6, (200, 15)), paired.planned(1.6, 0.5)
    found = [c for c in map(compared, x) if c.verdict == "cannot tell"]
    assert len(found) > 150
    held = sum(c.prompts_low <= truth <= c.prompts_high for c in found)
    assert sps.binomtest(held, len(found), 0.95).pvalue > 0.01
    assert compared(planted(1.5, 1.0, 15)).prompts_low is None  # settled


@pytest.mark.parametrize("tests", [1, 6])
def test_a_plan_keeps_its_promise(tests):
    """Equal models are tied four times of five, and a difference of the margin is found at least as often."""
    n = paired.planned(1.0, 0.5, tests)
    x = np.random.default_rng(0).normal(0, 1.0, (20_000, n))
    means, errors = x.mean(axis=1), x.std(axis=1, ddof=1) / math.sqrt(n)
    tied = np.mean(np.abs(means) + sps.t.isf(0.025, n - 1) * errors < 0.5)
    apart = np.mean((means + 0.5) / errors > sps.t.isf(0.025 / tests, n - 1))
    assert min(tied, apart) == pytest.approx(0.8, abs=0.02)
    assert paired.planned(1.0, 0.0) is None and paired.planned(0.0, 0.5) is None


def test_five_prompts_cannot_reach_significance_by_sign_flips():
    """All five differ the same way, the interval excludes 0, and still p is 2/32."""
    c = compared(planted(3.0, 0.5, 5))
    assert c.low > 0 and c.p == 2 / 32 and c.verdict == "cannot tell"
    assert "0.062 is not below 0.05" in c.reason and c.prompts_needed >= 6
    assert compared(planted(3.0, 0.01, 4)).prompts_needed == 6


@quick
@example([(6.0, 8.882), (1.9, 0.0), (1.9, 0.0), (1.9, 0.0), (7.438, 6.026)])  # p differed in its last bit
@given(pair_lists)
def test_swapping_the_models_mirrors_everything(pairs):
    a, b = (on_prompts(side) for side in zip(*pairs, strict=True))
    one, two = paired.compare_two(a, b, "one", "two"), paired.compare_two(b, a, "two", "one")
    flip = {"better": "worse", "worse": "better"}

    def negative(value: float | None) -> float | None:
        return None if value is None else -value

    assert two == replace(
        one,
        a="two",
        b="one",
        difference=negative(one.difference),
        low=negative(one.high),
        high=negative(one.low),
        verdict=flip.get(one.verdict, one.verdict),
    )


@quick
@given(pair_lists, st.randoms(use_true_random=False), st.integers(-40, 40).map(lambda i: i / 4))
def test_order_of_prompts_and_a_common_shift_change_nothing(pairs, random, shift):
    a, b = (on_prompts(side) for side in zip(*pairs, strict=True))
    c = paired.compare_two(a, b)
    ids = random.sample(list(a), len(a))
    assert paired.compare_two({i: a[i] for i in ids}, b) == c
    moved = paired.compare_two({i: a[i] + shift for i in a}, {i: b[i] + shift for i in b})
    for name in ("difference", "low", "high", "p"):
        before, after = getattr(c, name), getattr(moved, name)
        assert after is before is None or after == pytest.approx(before, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(
    ("a", "b", "difference", "p", "reason"),
    [
        ([], [], None, None, "no data"),
        ([6], [5], 1.0, None, "n = 1: no interval"),
        ([6, math.nan], [5, math.inf], None, None, "2 of 4 scores are not finite (NaN or infinite): refused"),
    ],
)
def test_comparisons_that_cannot_be_made(a, b, difference, p, reason):
    c = paired.compare_two(on_prompts(a), on_prompts(b))
    assert c.difference == (None if difference is None else pytest.approx(difference))
    assert (c.n, c.low, c.high, c.p) == (len(a), None, None, p)
    assert (c.verdict, c.prompts_needed, c.reason) == ("cannot tell", None, reason)


def constant(difference, n, **options) -> Comparison:
    return compared(np.full(n, float(difference)), **options)


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        (10.0, 0.0, "better"),
        (0.0, 10.0, "worse"),
        (0.0, 0.0, "tied"),
        (1.0, 1.0, "tied"),
        (10.0, 9.6, "tied"),  # significant, and too small to matter
    ],
)
def test_one_difference_on_every_prompt_is_decided_by_the_exact_test(a, b, verdict):
    level = np.resize([0, 0.1, 0.3], 15)  # more than two values: no binary outcome
    c = paired.compare_two(on_prompts(a + level), on_prompts(b + level))
    exact = sps.permutation_test(
        (np.full(15, a - b),), np.mean, permutation_type="samples", n_resamples=np.inf
    )
    assert (c.verdict, c.low, c.high, c.prompts_needed) == (verdict, None, None, None)
    assert c.p == pytest.approx(exact.pvalue if a != b else 1.0)
    assert c.reason == (
        "the difference is significant, but inside ±0.5: too small to matter"
        if 0 < a - b < 0.5
        else "all 15 differences are equal: no interval"
    )


@pytest.mark.parametrize("scale", [1, 10])
def test_a_binary_outcome_is_told_by_the_values(scale):
    """Two values in all: McNemar's p and Bonett and Price's interval, in points."""
    a, b = [1] * 9 + [0] * 6, [0] * 8 + [1] + [0] * 6
    c = paired.compare_two(*(on_prompts(scale * x for x in side) for side in (a, b)), margin=0.05 * scale)
    assert c.p == paired.mcnemar_p(8, 0, 15)
    assert (c.low, c.high) == pytest.approx([scale * end for end in bonett_price(8, 0, 15)])
    assert (c.verdict, c.reason, c.n) == ("better", None, 15)
    always = paired.compare_two(on_prompts([1] * 15), on_prompts([0] * 15), margin=0.05)
    assert (always.verdict, always.p, always.low) == ("better", 2**-14, None)
    same = paired.compare_two(on_prompts(a), on_prompts(a), margin=0.05)
    assert (same.verdict, same.low) == ("tied", None)  # a model against itself
    third = paired.compare_two(on_prompts([*a[:-1], 0.5]), on_prompts(b))
    assert third.p == paired.paired_p([1] * 8 + [0] * 6 + [0.5])


@pytest.mark.parametrize("difference", [0.0, 0.2, 2.0, 10.0, -3.0])
def test_a_verdict_does_not_hang_on_whether_differences_are_equal_or_nearly_so(difference):
    steady = constant(difference, 15).verdict
    for off in (1e-13, 1e-9, 0.001, 0.1):
        nearly = np.full(15, difference)
        nearly[-1] += off
        assert compared(nearly).verdict == steady
    assert compared(np.array([0.0] * 14 + [10.0])).verdict == "cannot tell"  # one prompt is not nearly all


@pytest.mark.parametrize("difference", [0.0, 0.2, 10.0])
def test_equal_differences_on_few_prompts_settle_nothing(difference):
    """2^(1-n) is the least p of n prompts, against 0 and against a margin alike: 6 come below 5%."""
    assert (constant(difference, 1).verdict, constant(difference, 1).prompts_needed) == ("cannot tell", None)
    for n in (3, 4, 5):
        c = constant(difference, n)
        assert (c.verdict, c.prompts_needed) == ("cannot tell", 6)
        assert c.reason == f"all {n} differences are equal: no interval"
    assert constant(difference, 6).verdict != "cannot tell"


def test_equal_differences_are_adjusted_for_the_pairs_too():
    """Four models, six pairs: 7 prompts are too few for 6 / 64, and 8 are enough for 6 / 128."""
    for n, verdict in ((7, "cannot tell"), (8, "better")):
        levels = {name: on_prompts([level] * n) for name, level in (("a", 9), ("b", 6), ("c", 3), ("d", 0))}
        found = paired.compare_all(levels)
        assert {c.verdict for c in found} == {verdict} and {c.p for c in found} == {2.0 ** (1 - n)}
        assert {c.prompts_needed for c in found} == {8 if verdict == "cannot tell" else None}


def test_different_prompts_are_refused_with_counts():
    c = paired.compare_two({"p1": 1, "p2": 2, "p3": 3}, {"p2": 2, "p9": 4}, "one", "two")
    assert (c.n, c.difference, c.p, c.verdict) == (1, None, None, "cannot tell")
    assert c.reason == "prompt sets differ: 2 only in one, 1 only in two"


def test_ties_between_scores_stay_exact():
    """Rubric scores tie often: half the differences are 0 and the rest count."""
    c = compared(np.array([0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1.0]))
    assert c.p == 2 / 2**7


def test_compare_all_makes_every_pair_and_adjusts_p():
    rng = np.random.default_rng(9)
    hard = rng.normal(5, 1.5, 15)
    gaps = {"w": 0.0, "x": 0.1, "y": 0.9, "z": 2.0}
    models = {name: on_prompts(hard + gap + rng.normal(0, 0.8, 15)) for name, gap in gaps.items()}
    found = paired.compare_all(models)
    assert [(c.a, c.b) for c in found] == list(itertools.combinations("wxyz", 2))
    assert [c.p_holm for c in found] == paired.holm([c.p for c in found])
    for c in found:
        alone = paired.compare_two(models[c.a], models[c.b], c.a, c.b)
        assert (c.difference, c.low, c.high, c.p) == (alone.difference, alone.low, alone.high, alone.p)
        assert c.p_holm >= alone.p_holm
    assert {(c.a, c.b): c.verdict for c in found}["w", "z"] == "worse"


def test_adjustment_can_take_a_verdict_back():
    """p = 0.03 alone is enough; as one of three pairs it is not, and the prompts needed go up."""
    d = planted(0.9, 1.4, 15)
    base = on_prompts(np.full(15, 5.0))
    near = on_prompts(5.0 + np.tile([1.0, -1.0, 2.0], 5))
    alone = paired.compare_two(on_prompts(5 + d), base)
    found = paired.compare_all({"a": on_prompts(5 + d), "b": base, "c": near})[0]
    assert alone.verdict == "better" and alone.prompts_needed is None
    assert found.verdict == "cannot tell" and found.p_holm > 0.05 > found.p
    assert "adjusted p" in found.reason
    assert found.prompts_needed == paired.planned(1.4, 0.5, tests=3)
    assert paired.planned(1.4, 0.5, tests=6) > paired.planned(1.4, 0.5)


def test_a_pair_without_a_p_takes_no_part_in_the_adjustment():
    a, b = on_prompts(5 + planted(1.5, 1.0, 15)), on_prompts(np.full(15, 5.0))
    found = paired.compare_all({"a": a, "b": b, "other": {"p1": 3.0}})
    assert found[0].p_holm == found[0].p and found[0].verdict == "better"
    assert all("prompt sets differ" in c.reason and c.p_holm is None for c in found[1:])
    assert paired.compare_all({"a": a}) == () == paired.compare_all({})


def test_identical_models_are_rarely_called_different():
    """150 runs of four equal models: some pair is called better or worse in at most about 5% of them."""
    rng = np.random.default_rng(10)
    runs = rng.normal(5, 1.5, (150, 1, 8)) + rng.normal(0, 1.0, (150, 4, 8))
    families = [paired.compare_all({str(i): on_prompts(row) for i, row in enumerate(run)}) for run in runs]
    alarms = [any(c.verdict in ("better", "worse") for c in family) for family in families]
    unadjusted = [any(c.p < 0.05 for c in family) for family in families]
    assert np.mean(alarms) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 150) < np.mean(unadjusted)


def test_a_plan_is_made_for_every_pair_that_stays_open_and_for_no_other():
    """Eight models, by hand: the spread that is planned for is that of the differences."""
    rng = np.random.default_rng(3)
    models = {str(i): on_prompts(rng.normal(5 + 0.3 * i, 1, 25)) for i in range(8)}
    found = paired.compare_all(models)
    for c in found:
        gaps = np.array([models[c.a][p] - models[c.b][p] for p in models[c.a]])
        wanted = paired.planned(float(np.std(np.round(gaps, 12), ddof=1)), 0.5, 28)
        assert c.prompts_needed == (wanted if c.verdict == "cannot tell" else None)
    assert {"cannot tell", "worse"} <= {c.verdict for c in found}


# --- very many models ------------------------------------------------------------------------------------


def test_of_very_many_models_the_best_is_compared_with_each_and_so_is_the_best_of_the_rest():
    """Three planted levels, 20 models each, 5 points apart: a group a level, and p counts for all pairs."""
    rng = np.random.default_rng(5)
    levels = {f"{level}-{i:02d}": level + rng.normal(0, 0.3, 40) for level in (15, 10, 5) for i in range(20)}
    order = sorted(levels, key=lambda name: -levels[name].mean())
    models = {name: on_prompts(levels[name]) for name in order}
    found, tests = paired.compare_all(models, margin=0.01), 60 * 59 // 2
    assert [c.b for c in found if c.a == order[0]] == order[1:]
    assert [c.b for c in found if c.a == order[20]] == order[21:]
    assert [c.b for c in found if c.a == order[40]] == order[41:]
    assert len(found) == 59 + 39 + 19
    for c in found:
        assert c.p_holm == min(1, tests * c.p)
        assert (c.verdict == "better") == (c.a[:2] != c.b[:2])
        alone = paired.compare_two(models[c.a], models[c.b], c.a, c.b, margin=0.01)
        assert (c.difference, c.low, c.high, c.p) == (alone.difference, alone.low, alone.high, alone.p)


def test_up_to_fifty_models_every_pair_is_compared():
    rng = np.random.default_rng(6)
    models = {f"{i:02d}": on_prompts(rng.normal(5, 1, 8)) for i in range(paired.EVERY_PAIR)}
    found = paired.compare_all(models)
    assert [(c.a, c.b) for c in found] == list(itertools.combinations(models, 2))
    assert [c.p_holm for c in found] == paired.holm([c.p for c in found])


def test_the_best_of_very_many_equal_models_is_rarely_called_better():
    """100 runs of 60 equal models, 30 prompts. Whoever leads was chosen by luck: were p corrected for the
    59 pairs that are tested, and not for all 1,770, most runs would raise an alarm.
    """
    rng, alarms, few = np.random.default_rng(8), 0, 0
    for _ in range(100):
        table = rng.normal(5, 1, (60, 30))
        table = table[np.argsort(-table.mean(axis=1))]
        found = paired.compare_all({str(i): on_prompts(row) for i, row in enumerate(table)}, margin=0.01)
        alarms += any(c.verdict in ("better", "worse") for c in found)
        few += min(c.p for c in found) * 59 < 0.05
    assert sps.binomtest(alarms, 100, 0.05, alternative="greater").pvalue > 0.01
    assert few > 25


def test_paired_design_finds_what_an_unpaired_one_misses():
    """Prompts differ by 2 points, the models by 0.8: planted truth, 200 runs of 15 prompts."""
    rng = np.random.default_rng(12)
    found, welch = 0, 0
    for _ in range(200):
        hard = rng.normal(5, 2, 15)
        a, b = hard + 0.8 + rng.normal(0, 0.6, 15), hard + rng.normal(0, 0.6, 15)
        found += paired.compare_two(on_prompts(a), on_prompts(b)).verdict == "better"
        welch += sps.ttest_ind(a, b, equal_var=False).pvalue < 0.05
    expected = paired.power(0.8, 0.6 * math.sqrt(2), 15)
    assert found / 200 == pytest.approx(expected, abs=0.07) and welch / 200 < 0.4


# --- more intervals and paired tests ---------------------------------------------------------------------


def test_bootstrap_t_against_a_hand_made_one():
    x = np.sort(np.random.default_rng(11).exponential(2.0, 15))
    rows = np.random.default_rng(12).choice(x, (40_000, 15))
    t = (rows.mean(axis=1) - x.mean()) / sps.sem(rows, axis=1)
    low, high = x.mean() - np.quantile(t, [0.975, 0.025]) * sps.sem(x)
    e = estimate(x, method="bootstrap-t")
    assert (e.low, e.high) == pytest.approx((low, high), rel=0.05)
    assert e.high - e.mean > 1.3 * (e.mean - e.low)  # the long tail may hide more above than below
    assert estimate([5, 5, 5, 5, 6], method="bootstrap-t").low is None  # resamples without spread


def test_tied_is_two_one_sided_tests_at_half_of_five_percent():
    for mean in (0.05, 0.2, 0.45):
        d = planted(mean, 0.4, 15)
        above = sps.ttest_1samp(d, -0.5, alternative="greater").pvalue
        below = sps.ttest_1samp(d, 0.5, alternative="less").pvalue
        assert (max(above, below) < 0.025) == (compared(d).verdict == "tied")


# --- the module ------------------------------------------------------------------------------------------


def test_results_survive_a_round_trip_through_json(tmp_path):
    for record, kind in ((estimate(BLOOM), Estimate), (compared(planted(0.6, 2.0, 15)), Comparison)):
        assert store.read_json(store.write_json(tmp_path / "x.json", record), kind) == record


def test_points_that_meet_by_chance_are_no_passes() -> None:
    """A clipped scale gives two values now and then; its interval may leave them."""
    one, other = {"a": 1.0, "b": 2.48}, {"a": 1.0, "b": 1.0}
    (found,) = paired.compare_all({"one": one, "other": other})
    assert found.high is not None and found.high > 1.48
