"""The correction by ratings: against deletion by hand, ppi-python, and where it must be Student's."""

from __future__ import annotations

import math
from collections import Counter
from statistics import fmean

import numpy as np
import pytest
from scipy import optimize
from scipy import stats as sps

from nbhelpers.stats import estimate, paired, ppi
from nbhelpers.stats.ppi import Rated

RNG = np.random.default_rng(1)
TYPES = {f"p{i:02d}": "post" if i < 30 else "note" if i < 45 else "rare" for i in range(48)}
# Of ppi-python 0.2.3, ppi_mean_ci(y, f, rest) and ppi_mean_pointestimate.
Y = """
-1.1 -2.1 0.0 1.3 2.8 0.7 -0.6 -1.1 2.0 3.8 1.0 -2.0 -1.4 3.7 0.9 -3.0 0.3 -1.8 -0.8 -0.5 -0.9 1.6
0.4 -0.7 1.3 2.2 -2.8 0.0 -1.5 0.2
"""
F = """
-2.3 -1.4 0.6 1.5 1.9 0.8 -1.5 -2.4 3.0 2.8 3.5 -0.2 -3.7 4.8 -0.1 -2.3 1.1 -4.1 -0.5 -0.2 1.2 0.5
2.2 -1.6 1.5 1.6 0.1 1.6 2.8 1.9
"""
REST = """
3.3 3.3 -0.3 1.0 4.6 0.2 1.7 1.1 2.7 0.3 0.8 1.8 1.5 -1.0 3.4 -2.0 -1.8 -2.0 3.6 0.3 -1.2 -1.6 2.3
-1.4 -2.0 2.7 -1.8 0.4 1.2 0.1 1.1 4.5 -0.1 -1.9 -3.4 0.7 0.3 1.9 0.0 0.0 -0.6 -0.1 1.6 0.2 1.5 6.0
2.4 -2.7 5.5 2.1 -1.2 3.5 1.2 -0.3 -0.4 -1.3 1.3 3.9 0.4 2.3 5.9 -1.8 1.8 0.4 -1.4 -1.4 1.2 2.3 -0.1
1.3
"""
PPI_POINT, PPI_ENDS = 0.22250419, (-0.27951953, 0.7245279)


def draw(n: int, others: int, repeats: bool = True) -> tuple[np.ndarray, ...]:
    """Readers' differences; the score's on the same texts, on all texts of these prompts, on the others."""
    y = RNG.normal(0.4, 2, n)
    g = y + RNG.normal(0.7, 1, n)
    return y, g, g / 2 + RNG.normal(0.3, 1, n) if repeats else g, RNG.normal(0.9, 2, others)


@pytest.mark.parametrize(("n", "others"), [(6, 9), (20, 80), (80, 20), (15, 0)])
def test_the_estimate_and_its_error_are_those_of_deleting_each_prompt_by_hand(n: int, others: int) -> None:
    y, g, f, rest = draw(n, others)
    total = n + others

    def estimated(keep: np.ndarray) -> tuple[float, float]:
        a, b, c = y[keep], g[keep], f[keep]

        def variance(t: float) -> float:  # n stays that of the design
            own = np.var(a + t * (n / total * c - b)) / n
            return float(own + t**2 * others / total**2 * np.var(c))

        t = optimize.minimize_scalar(variance, bounds=(-9, 9), method="bounded", options={"xatol": 1e-11}).x
        return fmean(a - t * b) + t * (n / total * fmean(c) + rest.sum() / total), t

    every = np.arange(n)
    mean, tuning = estimated(every)
    without = np.array([estimated(np.delete(every, i))[0] for i in every])
    first = (n - 1) / n * np.sum((without - without.mean()) ** 2)
    second = tuning**2 * others / total**2 * np.var(np.concatenate([f, rest]), ddof=1)
    found = ppi.tuned(y, g, f, rest)
    assert (found.mean, found.tuning) == pytest.approx((mean, tuning), abs=1e-5)
    assert found.error == pytest.approx(math.sqrt(first + second), rel=1e-5)
    assert found.df == pytest.approx(
        (first + second) ** 2 / (first**2 / (n - 2) + second**2 / (total - 1)), rel=1e-4
    )


@pytest.mark.parametrize("case", ["all rated", "constant score"])
def test_it_is_students_where_a_score_can_add_nothing(case: str) -> None:
    y, g, f, rest = draw(12, 0 if case == "all rated" else 30, repeats=False)
    if case == "constant score":
        g, f, rest = np.full_like(g, 3.0), np.full_like(f, 3.0), np.full_like(rest, 3.0)
    found = ppi.tuned(y, g, f, rest)
    low, high, p = found.interval()
    assert found.tuning == 0.0 and found.df == pytest.approx(11)
    assert (low, high) == pytest.approx(estimate.t_interval(y.mean(), y.std(ddof=1), 12))
    assert p == pytest.approx(sps.ttest_1samp(y, 0).pvalue)


def test_neither_favour_nor_scale_of_the_score_matters() -> None:
    y, g, f, rest = draw(20, 80)
    plain = ppi.tuned(y, g, f, rest)
    moved = ppi.tuned(y, 10 * g + 7, 10 * f + 7, 10 * rest + 7)
    assert moved[:3] == pytest.approx(plain[:3]) and moved.tuning == pytest.approx(plain.tuning / 10)
    back = ppi.tuned(-y, -g, -f, -rest)
    assert back.mean == pytest.approx(-plain.mean) and back.error == pytest.approx(plain.error)


def test_it_is_near_ppi_python_and_wider() -> None:
    y, f, rest = (np.array(row.split(), dtype=float) for row in (Y, F, REST))
    found = ppi.tuned(y, f, f, rest)
    low, high, _ = found.interval()
    assert abs(found.mean - PPI_POINT) < found.error / 4
    assert 1.02 < (high - low) / (PPI_ENDS[1] - PPI_ENDS[0]) < 1.15  # theirs is normal, with one tuning


def test_unequal_chances_are_weighed() -> None:
    """Two of 40 prompts of one kind and six of 10 of the other: their means count 40 to 10."""
    y, none = np.array([1.0, 2.0, *[7.0, 8.0, 9.0] * 2]), np.zeros(8)
    found = ppi.tuned(y, none, none, np.zeros(42), np.array([20.0] * 2 + [10 / 6] * 6))
    assert found.mean == pytest.approx((40 * 1.5 + 10 * 8) / 50)


def test_weights_of_a_score_count_on_the_rated_texts_only() -> None:
    y, g, f, rest = draw(8, 12)
    weight = np.array([3.0, 1.0] * 4)
    found = ppi.tuned(y, g, f, rest, weight)
    everything = np.concatenate([f, rest]).mean()
    assert found.mean == pytest.approx(
        np.average(y - found.tuning * g, weights=weight) + found.tuning * everything
    )


# ---- models ----------------------------------------------------------------------------------------------


def planted(favour: float, truth: float, rated: int = 20, seed: int = 3) -> dict[str, Rated]:
    """Two models; readers see ``truth`` between them, the score ``favour`` more for the second."""
    n, rng = 100, np.random.default_rng(seed)
    prompts = [f"p{i:03d}" for i in range(n)]
    models = {}
    for name, level, bias in (("one", truth, 0.0), ("other", 0.0, favour)):
        readers = dict(zip(prompts, 5 + level + rng.normal(0, 1, n), strict=True))
        scores = {p: value + bias + rng.normal(0, 0.5) for p, value in readers.items()}
        some = prompts[:rated]
        models[name] = Rated({p: readers[p] for p in some}, {p: scores[p] for p in some}, scores)
    return models


def test_ratings_overrule_a_score_that_favours_a_model() -> None:
    models, even = planted(favour=2.0, truth=1.0), dict.fromkeys(TYPES | planted(0, 0)["one"].scores, 5.0)
    (by_score,) = paired.compare_all({name: model.scores for name, model in models.items()})
    (found,) = ppi.correct_all(models, even)
    assert by_score.verdict == "worse" and found.verdict == "better"
    assert (found.a, found.b, found.n, found.rated) == ("one", "other", 100, 20)
    assert found.low < 1.0 < found.high and found.p_holm == found.p
    differences = [value - models["other"].ratings[p] for p, value in models["one"].ratings.items()]
    alone = 2 * estimate.t_interval(0, float(np.std(differences, ddof=1)), 20)[1]
    assert found.high - found.low < 0.75 * alone
    mean, _ = ppi.corrected_mean(models["other"], even, "x")
    assert mean.low < 5 < mean.high and mean.mean < fmean(models["other"].scores.values()) - 1


def test_too_few_ratings_or_equal_ones_say_so() -> None:
    even = dict.fromkeys(planted(0, 0)["one"].scores, 1.0)
    (few,) = ppi.correct_all(planted(0, 0, rated=5), even)
    assert few.difference is None and few.verdict == "cannot tell"
    assert few.reason == "5 rated prompts: a correction needs at least 6"
    model = planted(0, 0)["one"]
    (same,) = ppi.correct_all({"a": model, "b": model}, even)
    assert same.difference is None and same.reason == "all differences are equal: no interval"
    broken = Rated(model.ratings | {"p000": math.nan}, model.same, model.scores)
    (refused,) = ppi.correct_all({"a": model, "b": broken}, even)
    assert "not finite" in refused.reason


def test_where_all_is_rated_the_ratings_are_compared_as_scores_are() -> None:
    """A t interval leaves out 0, and the tests that assume less cannot tell."""
    prompts, gains = [f"p{i}" for i in range(6)], [3.0, 3.2, 2.8, 3.1, 2.9, -0.5]
    one, other = (dict(zip(prompts, values, strict=True)) for values in (gains, [0.0] * 6))
    known = {"one": Rated(one, one, one), "other": Rated(other, other, other)}
    (found,) = ppi.correct_all(known, dict.fromkeys(prompts, 1.0))
    (alone,) = paired.compare_all({"one": one, "other": other})
    assert found.low > 0 and found.verdict == "cannot tell" and found.rated == 6
    assert (found.low, found.high, found.p) == (alone.low, alone.high, alone.p)
    assert found.p > 0.05


def test_p_is_adjusted_over_all_pairs() -> None:
    models = planted(0.0, 0.4) | {"third": planted(0.0, 0.2, seed=4)["one"]}
    found = ppi.correct_all(models, dict.fromkeys(models["one"].scores, 1.0))
    assert [c.p_holm for c in found] == pytest.approx(paired.holm([c.p for c in found]))


# ---- the draw --------------------------------------------------------------------------------------------


def test_every_beginning_is_a_stratified_sample() -> None:
    sizes = Counter(TYPES.values())
    for seed in range(50):
        order = ppi.random_order(TYPES, seed)
        assert sorted(order) == sorted(TYPES) and order == ppi.random_order(
            dict(reversed(TYPES.items())), seed
        )
        assert {TYPES[p] for p in order[:3]} == set(sizes)
        for k in range(3, len(order)):
            for kind, count in Counter(TYPES[p] for p in order[:k]).items():
                assert abs(count - k * sizes[kind] / len(TYPES)) <= 2
        assert ppi.chances(TYPES, order[:24])["note"] == sum(TYPES[p] == "note" for p in order[:24]) / 15


def test_within_a_stratum_every_prompt_is_as_likely() -> None:
    first = Counter(p for seed in range(4000) for p in ppi.random_order(TYPES, seed)[:12])
    for kind in set(TYPES.values()):
        assert sps.chisquare([first[p] for p in TYPES if TYPES[p] == kind]).pvalue > 1e-4


@pytest.mark.parametrize("rated", [20, 80])
def test_the_planned_width_comes_true(rated: int) -> None:
    rng, widths = np.random.default_rng(8), []
    for _ in range(400):
        y = rng.normal(0, 3.4, 100)
        f = y + rng.normal(0.7, 2.55, 100)  # correlation 0.8
        low, high, _ = ppi.tuned(y[:rated], f[:rated], f[:rated], f[rated:]).interval()
        widths.append((high - low) / 2)
    assert fmean(widths) == pytest.approx(ppi.half_width(3.4, rated, 100, 0.8), rel=0.04)
