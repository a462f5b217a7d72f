"""The committed calibration table, the simulation behind it, and what it must show."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from definitions import definitions
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats as sps
from test_ppi import PPI_ENDS, REST, F, Y

from nbhelpers.comparison import speed
from nbhelpers.generation.generate import LATENCY_PROMPTS
from nbhelpers.records import Score
from nbhelpers.stats import paired
from nbhelpers.stats.estimate import by_prompt, estimate
from tools import calibrate

ROOT = Path(__file__).resolve().parents[2]


def wilson(successes, n):
    return sps.binomtest(successes, n).proportion_ci(method="wilson")


TABLE = {(r.kind, r.method, r.data, r.n): r for r in calibrate.read(ROOT / "data" / "calibration.csv")}
LOW, HIGH = 0.935, 0.965
ANSWERS = ("passes", "worse", "cannot tell")
GATE = {calibrate.GATED[0]: (calibrate.GATE_PROMPTS,), calibrate.GATED[1]: calibrate.GATE_RATED}


def test_the_table_is_complete_and_says_how_exact_it_is():
    cells = {
        (data, n) for data in (*calibrate.DATA, calibrate.UNEQUAL, calibrate.BINARY) for n in calibrate.SIZES
    }
    cells |= {(calibrate.FAVOUR, n) for n in calibrate.RATED}
    cells |= {(data, calibrate.PLANNED) for data in calibrate.LOOKED}
    cells |= {(data, n) for data, sizes in GATE.items() for n in sizes}
    cells |= {(data, LATENCY_PROMPTS) for data in calibrate.TIMED}
    assert {(r.data, r.n) for r in TABLE.values()} == cells
    for r in TABLE.values():
        assert r.simulations >= 10_000 and 0 <= r.rate <= 1 and 0 <= r.none < 0.6
        given = r.simulations * (1 - r.none)
        assert r.kind in ("width", "prompts") or r.mc_error == pytest.approx(
            math.sqrt(r.rate * (1 - r.rate) / given), abs=6e-5
        )


@pytest.mark.parametrize(
    ("data", "n"),
    [
        ("normal", 5),
        ("skewed", 15),
        ("ceilinged", 15),
        ("discrete", 30),
        ("clustered", 15),
        ("ranked", 5),
        (calibrate.FAVOUR, 20),
        (calibrate.UNEQUAL, 15),
        (calibrate.BINARY, 15),
        (calibrate.LOOKED[2], calibrate.PLANNED),
        (calibrate.GATED[0], calibrate.GATE_PROMPTS),
        (calibrate.GATED[1], 60),
        (calibrate.TIMED[0], LATENCY_PROMPTS),
    ],
)
def test_a_slice_simulated_again_agrees_with_the_table(data, n):
    """Another seed, so independent: within 4.5 standard errors of the difference."""
    for r in calibrate.run_cell(data, n, 1500, seed=7):
        known = TABLE[r.kind, r.method, r.data, r.n]
        again = (
            r.mc_error
            if r.kind in ("width", "prompts")
            else math.sqrt(max(known.rate * (1 - known.rate), 1e-3) / 1500)
        )
        error = math.hypot(known.mc_error, again)
        assert r.rate == pytest.approx(known.rate, abs=4.5 * error), (r, known)


@pytest.mark.parametrize("data", [*calibrate.RATES])
def test_rates_agree_with_the_binomial_count(data):
    """Coverage of Wilson's interval can be added up exactly."""
    for n in calibrate.SIZES:
        ends = [wilson(k, n) for k in range(n + 1)]
        p = calibrate.RATES[data]
        exact = sum(sps.binom.pmf(k, n, p) for k, e in enumerate(ends) if e.low <= p <= e.high)
        row = TABLE["interval", "wilson", data, n]
        assert row.rate == pytest.approx(
            exact, abs=4.5 * math.sqrt(exact * (1 - exact) / row.simulations) + 1e-4
        )


def test_what_we_recommend_keeps_its_promise():
    for n in (15, 30, 60):
        for data in ("normal", "clustered"):
            assert LOW <= TABLE["interval", "t", data, n].rate <= HIGH
        for data in calibrate.SHAPES:
            r = TABLE["interval", "bootstrap-t", data, n]
            assert LOW <= r.rate <= HIGH + 3 * r.mc_error
        assert LOW <= TABLE["interval", "clustered", "clustered", n].rate <= HIGH
    for r in TABLE.values():
        if r.data == "binary" and r.method == "bonett-price":
            assert r.rate >= LOW, r
        if r.kind == "test" and r.method in ("McNemar, unconditional", "against skew"):
            assert r.rate <= 0.05 + 3 * r.mc_error, r
        known = r.kind == "test" and r.data != "all or nothing"
        if known and r.method in ("sign-flip", "paired t", "wilcoxon", "six pairs, Holm"):
            assert r.rate <= 0.05 + 0.008 + 3 * r.mc_error, r
        if r.method == "exact (Clopper-Pearson)":
            assert r.rate >= 0.95 - 3 * r.mc_error, r
        if r.method == "rank":
            assert r.rate >= 0.95, r


def test_binary_outcomes_and_skew_get_what_they_need():
    for n, least in ((15, 0.32), (30, 0.70)):
        ours, mid_p, flips = (
            TABLE["power", method, "binary", n].rate
            for method in ("McNemar, unconditional", "McNemar, mid-p", "sign-flip")
        )
        assert ours > least and ours > flips + 0.08 and ours > mid_p - 0.02
        assert TABLE["test", "sign-flip", "all or nothing", n].rate > 0.05


def test_what_we_warn_of_fails():
    assert TABLE["test", "z against a claim", "normal", 5].rate == pytest.approx(0.122, abs=0.01)
    assert TABLE["interval", "z", "normal", 5].rate == pytest.approx(0.878, abs=0.01)
    assert TABLE["interval", "every text a sample", "clustered", 15].rate < 0.8
    assert TABLE["test", "unpaired (Welch)", "normal", 15].rate < 0.01  # blind, not careful
    assert TABLE["test", "six pairs, as is", "normal", 15].rate > 0.15


def test_the_correction_keeps_its_promise_where_the_score_does_not():
    for n in calibrate.RATED:
        rate = {m: TABLE["interval", m, calibrate.FAVOUR, n].rate for m in ("corrected", "score alone")}
        assert 0.945 <= rate["corrected"] <= 0.955 and rate["score alone"] < 0.65
        r, least = TABLE["width", "corrected", calibrate.FAVOUR, n], math.sqrt(0.36 + 0.64 * n / 100)
        assert 0.99 * least < r.rate < 1.02 * least  # the least that a correlation of 0.8 allows
    assert TABLE["interval", "PPI++, 1.96", calibrate.FAVOUR, 20].rate < 0.93


def test_models_in_turn_are_told_apart_by_their_speed_and_by_nothing_else():
    turn, after = (
        {kind: TABLE[kind, "ratios", data, LATENCY_PROMPTS].rate for kind in ("test", "power")}
        for data in calibrate.TIMED
    )
    assert turn["test"] <= 0.05 and turn["power"] >= 0.95
    assert after["test"] > 0.5  # the drift of the machine is taken for the models'


def test_the_simulated_verdicts_on_speed_are_those_of_the_package():
    for slower in (0.0, 0.04, 0.1):
        speeds = calibrate.draw_speeds(calibrate.TIMED[0], 8, 30, slower, np.random.default_rng(5))
        for told, models in zip(calibrate.told_apart(speeds), speeds, strict=True):
            given = {
                f"m{i}": {(f"p{j}", 0): float(x) for j, x in enumerate(row)} for i, row in enumerate(models)
            }
            pairs = {frozenset((pair.a, pair.b)): pair.verdict for pair in speed.in_pairs(given, {})}
            names = [frozenset(pair) for pair in itertools.combinations(given, 2)]
            assert [pairs[name] in ("better", "worse") for name in names] == told.tolist()


def test_looking_early_is_safe_by_the_always_valid_test_only():
    n, (normal, *_, skewed) = calibrate.PLANNED, calibrate.LOOKED
    for data in calibrate.LOOKED:
        assert TABLE["test", "each look alone", data, n].rate > 0.15
        assert TABLE["test", "always valid", data, n].rate <= 0.05
        assert TABLE["power", "always valid", data, n].rate >= (0.9 if data == skewed else 0.95)
        assert TABLE["prompts", "always valid", data, n].rate <= (0.65 if data == skewed else 0.45)
    for rival in ("Pocock", "asymptotic sequence", "O'Brien-Fleming"):
        assert TABLE["test", rival, skewed, n].rate > 0.06
    assert TABLE["prompts", "O'Brien-Fleming", normal, n].rate > 0.5
    assert TABLE["prompts", "capital bets", normal, n].rate > 0.65


# --- the vectorised methods are the package's ------------------------------------------------------------


def test_bca_is_scipys():
    """From scipy's own resamples the ends must be scipy's, ties included."""
    rng = np.random.default_rng(0)
    for x in (rng.exponential(1, 15), np.round(rng.normal(7, 1, 12) * 2) / 2):
        found = sps.bootstrap((x,), lambda v, axis: np.round(v.mean(axis=axis), 12), n_resamples=999, rng=1)
        ends = calibrate.bca(np.sort(found.bootstrap_distribution)[None], x[None])
        assert [float(e[0]) for e in ends] == pytest.approx(list(found.confidence_interval), abs=1e-9)


def test_interval_methods_are_the_package_s():
    """Same ends as estimate; bootstraps up to their different resamples."""
    x = np.exp(0.6 * np.random.default_rng(3).standard_normal(20))
    width = x.std() / math.sqrt(20)
    ends = calibrate.intervals(x[None], np.random.default_rng(4))
    for method, tolerance in (("t", 1e-9), ("bootstrap-t", 0.35 * width)):
        e = estimate(x, method=method)
        assert [float(end[0]) for end in ends[method]] == pytest.approx([e.low, e.high], abs=tolerance)


def test_clustered_interval_is_the_notebook_s():
    scores, texts = calibrate.draw("clustered", (1, 4, 7), np.random.default_rng(5))
    sizes = np.resize(calibrate.REPEATS, 7)
    groups = np.split(texts[0], np.cumsum(sizes)[:-1])
    low, high = calibrate.text_intervals(texts, 7)["clustered"]
    assert definitions("05_statistics", "definitions").clustered(groups) == pytest.approx((low[0], high[0]))
    rows = [Score("k", f"p{p}", 0, "short_post", False, 9, {"v": t}) for p, g in enumerate(groups) for t in g]
    assert by_prompt(rows, "v") == pytest.approx({f"p{i}": m for i, m in enumerate(scores[0, 0])}, abs=1e-9)


def test_test_methods_are_the_package_s():
    rng = np.random.default_rng(6)
    rows = np.round(rng.normal(0.5, 1, (20, 9)) * 2) / 2  # with ties and zeros
    signs = calibrate.sign_patterns(9, rng)
    flips = calibrate.flip_p(rows, signs)
    ranks = calibrate.flip_p(calibrate.signed_ranks(rows), signs)
    assert list(flips) == pytest.approx([paired.sign_flip_p(row) for row in rows], abs=1e-12)
    both = np.maximum(flips, calibrate.skew_p(rows))
    assert list(both) == pytest.approx([paired.paired_p(row) for row in rows], abs=1e-9)
    assert list(ranks) == pytest.approx([sps.wilcoxon(row).pvalue for row in rows], abs=1e-12)
    for row, low, high in zip(rows, *calibrate.superiority_intervals(rows), strict=True):
        wins = sum(row > 0) + sum(row == 0) / 2
        assert (low, high) == pytest.approx(calibrate.chance_to_win(wins, 9), abs=1e-12)


def test_capital_bets_are_a_fair_game():
    """Over all signs of some sizes the capital is 1 on average, and it cannot be lost."""
    signs = np.array(list(itertools.product((1, -1), repeat=8)))
    found = np.exp(calibrate.capital(signs * np.linspace(0.1, 1, 8)))
    assert found.mean(axis=0) == pytest.approx(np.ones(8)) and found.min() > 0


def test_the_rival_is_ppi_python():
    """On numbers whose interval version 0.2.3 of it gave."""
    y, f, rest = (np.array(row.split(), dtype=float)[None] for row in (Y, F, REST))
    assert [float(end[0]) for end in calibrate.ppi_python(y, f, rest)] == pytest.approx(PPI_ENDS, abs=1e-4)


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=15))
@example([-1] * 7)
def test_the_chance_to_win_counts_half_the_ties(differences):
    n, wins = len(differences), sum(d > 0 for d in differences) + sum(d == 0 for d in differences) / 2
    low, high = calibrate.chance_to_win(wins, n)
    assert 0 <= low <= wins / n <= high <= 1
    assert calibrate.chance_to_win(n - wins, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)
    if wins == int(wins):
        e = wilson(int(wins), n)
        assert (low, high) == pytest.approx((e.low, e.high), abs=1e-9)


def gate_rate(answer: str, data: str, n: int) -> tuple[float, float]:
    """95% interval of how often the gate gives an answer."""
    row = TABLE["gate", answer, data, n]
    found = wilson(round(row.rate * row.simulations), row.simulations)
    return found.low, found.high


@pytest.mark.parametrize(("data", "n"), [(data, n) for data, sizes in GATE.items() for n in sizes])
def test_the_gate_blocks_equal_models_in_at_most_five_percent(data, n):
    assert gate_rate("equal: worse", data, n)[1] <= 0.05
    assert gate_rate("at the margin: passes", data, n)[1] <= 0.065  # of rates the bound is approximate
    answers = [
        TABLE["gate", f"equal: {answer}", data, n].rate for answer in ("passes", "worse", "cannot tell")
    ]
    assert sum(answers) == pytest.approx(1, abs=2e-4)


def test_the_gate_catches_a_model_two_margins_worse():
    for data, sizes in GATE.items():
        for n in sizes:
            assert gate_rate("two margins worse: passes", data, n)[1] <= 0.1
    assert gate_rate("two margins worse: worse", calibrate.GATED[0], 15)[0] >= 0.9
    assert gate_rate("equal: passes", calibrate.GATED[0], 15)[0] >= 0.9


def test_the_page_on_the_gate_has_these_rates():
    lines = (ROOT / "docs" / "gate.md").read_text().splitlines()
    for data, sizes in GATE.items():
        for n, behind in itertools.product(sizes, calibrate.BEHIND):
            rates = [f"{100 * TABLE['gate', f'{behind}: {a}', data, n].rate:.1f}%" for a in ANSWERS]
            unit = "prompts, points" if data == calibrate.GATED[0] else "items, pass or fail"
            assert f"| {n} {unit} | {behind} | {' | '.join(rates)} |" in lines
