"""How often do our 95% intervals contain the truth, and how often do our tests raise a false alarm?

    nice python tools/calibrate.py [--simulations 20000] [--out data/calibration.csv]

Every cell (a shape of data and a number of prompts) is simulated from its own seed and appended to the CSV
when it is done, so an interrupted run goes on where it stopped. The simulations of a block share their
bootstrap resamples and random signs, which makes them fast and biases nothing. Here the bootstrap has 1,999
resamples and sign flips above 10 prompts have 1,999 random patterns (the package: 9,999, and all patterns
up to 20).
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special
from scipy import stats as sps

from nbhelpers.comparison.speed import MARGIN
from nbhelpers.generation.generate import LATENCY_PROMPTS, ROUNDS
from nbhelpers.stats import noninferiority, paired, ppi, sequential
from nbhelpers.stats.estimate import bonett_price

Array = NDArray[np.float64]
Ends = tuple[Array, Array]  # lower and upper ends of many intervals; NaN where there is none

SIZES = (5, 15, 30, 60)
RESAMPLES = 1999
BLOCK = 250  # simulations that share resamples
SHARED = 0.7  # correlation of two models' latent scores on a prompt: its difficulty
MODELS = 4  # in a family of comparisons
REPEATS = (2, 6)  # texts of every other prompt in the clustered data
STEPS = np.array([0, 5, 5.5, 6, 6.5, 7, 8, 8.5, 9, 9.5, 10])  # every score that business_v1 can give

SHAPES: dict[str, Callable[[Array], Array]] = {
    "normal": lambda z: 6 + 1.2 * z,
    "skewed": lambda z: np.exp(0.6 * z),  # skewness 2.3, like latencies
    "ceilinged": lambda z: np.minimum(10.0, 9 + 1.5 * z),  # a quarter of the scores are 10
    "discrete": lambda z: STEPS[np.searchsorted((STEPS[1:] + STEPS[:-1]) / 2, 7 + 1.2 * z)],
}
RATES = {"rate 0.5": 0.5, "rate 0.8": 0.8, "rate 0.95": 0.95}
LEADS = np.array([0.0, -0.3, -1.0, -2.0])  # of four models whose true ranks are 1, 2, 3 and 4, in points
DATA = (*SHAPES, "clustered", *RATES, "ranked")
UNEQUAL, BINARY = "all or nothing", "binary"
DISCORDANT = (0.32, 0.05)  # shares of the prompts that one of two models alone passes, and the other
# Readers rate n of 100 prompts; a judge, whose correlation with them is 0.8, favours one of two equal models.
FAVOUR, FAVOURED, RATED, PROMPTS = "judge +0.7", 0.7, (20, 40, 80), 100
READERS_SD, JUDGE_SD = 3.4, 2.55  # of the readers' differences, and of what the judge adds to them
# Ten looks at 100 prompts: differences of equal models, and half a standard deviation apart.
LOOKED, PLANNED, APART = ("normal, looks", "discrete, looks", "all or nothing, looks"), 100, 0.5
BOUND = 6.0  # standard deviations that differences of bounded scores can reach: 10 points at a sd of 1.7
# The gate: a default run of the embedded models (means and spreads of their scores, in points), and rates.
GATED, GATE_PROMPTS, GATE_RATED = ("gate, points", "gate, pass or fail"), 15, (60, 400)
GATE_REPEATS, WITHIN, BETWEEN, INTERACTION, LEVEL = 4, 0.8, 0.7, 0.5, 5.0
POINTS, SHARE, DIFFERING = (
    0.5,
    0.05,
    0.1,
)  # margins, and the share of items that either of two equal models wins
# The latency of four models of which the last is slower, on a machine that changes its speed (logs of times).
TIMED, SLOWER = ("speed, in turn", "speed, one after the other"), 0.1
JITTER, WANDER, DRIFT = (
    0.03,
    0.005,
    0.2,
)  # of a row; of the machine from row to row, and over the pass at most
BURST, LONGEST = 0.2, 8  # a neighbour's: what it adds, and to how many rows at most
BEHIND = {"equal": 0, "at the margin": 1, "two margins worse": 2}  # true differences, in margins


class Row(NamedTuple):
    # "gate": how often it gives the answer of ``method``, which begins with how far the candidate is behind;
    # "interval": rate is the coverage; "test": the false-alarm rate at 5%; "power": what is found of a real
    # difference; "prompts": the share of the planned ones that it took; "width": in those of ratings alone
    kind: str
    method: str
    data: str
    n: int
    simulations: int
    rate: float
    mc_error: float  # standard error of rate
    none: float  # share of the samples that gave no interval; they are not in the coverage


def run_cell(data: str, n: int, simulations: int, seed: int = 0) -> list[Row]:
    """Coverage and false-alarm rates of every method for one shape of data and n prompts."""
    if data == FAVOUR:
        return _rated_rows(n, simulations, np.random.default_rng([seed, len(DATA), n]))
    for i, (name, rows_of) in enumerate(((UNEQUAL, _unequal_rows), (BINARY, _binary_rows)), len(DATA) + 1):
        if data == name:
            return rows_of(n, simulations, np.random.default_rng([seed, i, n]))
    if data in GATED:
        return _gate_rows(data, n, simulations, np.random.default_rng([seed, 99, GATED.index(data), n]))
    if data in TIMED:
        return _speed_rows(data, n, simulations, np.random.default_rng([seed, 98, TIMED.index(data), n]))
    if data in LOOKED:
        return _look_rows(data, simulations, np.random.default_rng([seed, len(DATA), LOOKED.index(data)]))
    rng = np.random.default_rng([seed, DATA.index(data), n])
    if data in RATES:
        return _rate_rows(data, n, simulations, rng)
    if data == "ranked":
        return [_row("interval", "rank", data, n, _rank_hits(n, simulations, rng))]
    truth = _truth(data)
    hits: dict[tuple[str, str], list[Array]] = {}
    for start in range(0, simulations, BLOCK):
        rows = min(BLOCK, simulations - start)
        scores, texts = draw(data, (rows, MODELS, n), rng)
        for method, (low, high) in intervals(scores[:, 0], rng).items():
            hits.setdefault(("interval", method), []).append(_covered(low, high, truth))
        if texts is not None:
            for method, (low, high) in text_intervals(texts, n).items():
                hits.setdefault(("interval", method), []).append(_covered(low, high, truth))
        low, high = superiority_intervals(scores[:, 0] - scores[:, 1])
        hits.setdefault(("interval", "superiority"), []).append(_covered(low, high, 0.5))
        for method, alarm in tests(scores, truth, rng).items():
            hits.setdefault(("test", method), []).append(alarm.astype(float))
    return [_row(*key, data, n, np.concatenate(found)) for key, found in hits.items()]


def draw(data: str, size: tuple[int, int, int], rng: np.random.Generator) -> tuple[Array, Array | None]:
    """Scores (simulations, models, prompts) of equal models, and the first one's texts if clustered."""
    rows, _, n = size
    difficulty = rng.standard_normal((rows, 1, n))
    own = rng.standard_normal(size)
    if data != "clustered":
        return SHAPES[data](math.sqrt(SHARED) * difficulty + math.sqrt(1 - SHARED) * own), None
    sizes = _repeats(n)
    texts = np.repeat(6 + difficulty[:, 0], sizes, axis=1) + 0.8 * rng.standard_normal((rows, sizes.sum()))
    scores = 6 + difficulty + 0.8 * own / np.sqrt(sizes)
    scores[:, 0] = np.add.reduceat(texts, np.cumsum(sizes) - sizes, axis=1) / sizes
    return scores, texts


def resample_counts(n: int, resamples: int, seed: int) -> NDArray[np.int_]:
    """How often each of n prompts is drawn in each resample, as a bootstrap over prompts draws."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)


def intervals(x: Array, rng: np.random.Generator) -> dict[str, Ends]:
    """95% intervals of every row's mean; x has shape (simulations, n)."""
    n = x.shape[1]
    mean, sd = x.mean(axis=1), x.std(axis=1, ddof=1)
    sd = np.where(np.ptp(x, axis=1) < 1e-9, np.nan, sd)  # equal scores give no interval
    error = sd / math.sqrt(n)
    z = (x - mean[:, None]) / sd[:, None]
    counts = resample_counts(n, RESAMPLES, int(rng.integers(2**32))).astype(float)
    means = np.round(z @ counts.T / n, 12)
    spread = np.sqrt(np.maximum((z**2) @ counts.T / n - means**2, 0) * n / (n - 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(spread > 1e-9, means / spread * math.sqrt(n), np.copysign(np.inf, means))
    means.sort(axis=1)
    low, high = _quantiles(means, 0.025), _quantiles(means, 0.975)
    t_low, t_high = _quantiles(np.sort(ratio, axis=1), 0.025), _quantiles(np.sort(ratio, axis=1), 0.975)
    t_low, t_high = (np.where(np.isfinite(t_low) & np.isfinite(t_high), t, np.nan) for t in (t_low, t_high))
    b_low, b_high = bca(means, z)
    return {
        "z": _around(mean, error, 1.96),
        "t": _around(mean, error, sps.t.isf(0.025, n - 1)),
        "percentile": (mean + sd * low, mean + sd * high),
        "bca": (mean + sd * b_low, mean + sd * b_high),
        "bootstrap-t": (mean - error * t_high, mean - error * t_low),
    }


def bca(means: Array, x: Array) -> Ends:
    """BCa ends (Efron 1987) from each row's sorted resampled means and the sample it was drawn from."""
    middle = np.round(x.mean(axis=1), 12)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        bias = special.ndtri((np.mean(means < middle, axis=1) + np.mean(means <= middle, axis=1)) / 2)
        rest = x - x.mean(axis=1, keepdims=True)
        speed = np.sum(rest**3, axis=1) / (6 * np.sum(rest**2, axis=1) ** 1.5)
        shifted = [bias + special.ndtri(tail) for tail in (0.025, 0.975)]
        low, high = (special.ndtr(bias + s / (1 - speed * s)) for s in shifted)
    return _quantiles(means, low), _quantiles(means, high)


def text_intervals(texts: Array, n: int) -> dict[str, Ends]:
    """Intervals that use every text: as if independent, and clustered by prompt (see clustered_se)."""
    total, sizes = texts.shape[1], _repeats(n)
    mean = texts.mean(axis=1)
    rest = texts - mean[:, None]
    squares = np.sum(rest**2, axis=1)
    sums = np.add.reduceat(rest, np.cumsum(sizes) - sizes, axis=1)
    naive = np.sqrt(squares / (total - 1) / total)
    clustered = np.sqrt(naive**2 + (np.sum(sums**2, axis=1) - squares) / total**2)
    few = math.sqrt(n / (n - 1)) * sps.t.isf(0.025, n - 1)
    return {
        "every text a sample": _around(mean, naive, sps.t.isf(0.025, total - 1)),
        "clustered, 1.96": _around(mean, clustered, 1.96),
        "clustered": _around(mean, clustered, few),
    }


def superiority_intervals(differences: Array) -> Ends:
    """chance_to_win of every row, looked up by its number of half wins."""
    n = differences.shape[1]
    halves = np.sum(np.sign(np.round(differences, 12)) + 1, axis=1).astype(int)
    ends = np.array([chance_to_win(h / 2, n) for h in range(2 * n + 1)])[halves]
    return ends[:, 0], ends[:, 1]


def chance_to_win(wins: float, n: int) -> tuple[float, float]:
    """95% interval of the probability that one model beats another on a prompt (McGraw & Wong 1992).

    Wilson's formula; a tie is half a win, which makes it too wide rather than too narrow.
    """
    share, z = wins / n, float(special.ndtri(0.975))
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))  # rounding


def tests(scores: Array, truth: float, rng: np.random.Generator) -> dict[str, NDArray[np.bool_]]:
    """False alarms at 5% of tests whose null is true: equal models, a true claim, a true margin."""
    n = scores.shape[2]
    signs = sign_patterns(n, rng)
    one, other = scores[:, 0], scores[:, 1]
    d = np.round(one - other, 12)
    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # two models with all scores equal: no alarm
        t_claim = np.abs(one.mean(axis=1) - truth) / (one.std(axis=1, ddof=1) / math.sqrt(n))
        welch = sps.ttest_ind(one, other, axis=1, equal_var=False).pvalue
        # The margin is two deviations of the differences and the truth lies on it.
        margin = 2 * d.std()
        near = (margin - np.abs(d.mean(axis=1) + margin)) / (d.std(axis=1, ddof=1) / math.sqrt(n))
    pairs = [scores[:, i] - scores[:, j] for i, j in itertools.combinations(range(MODELS), 2)]
    flips = np.array([flip_p(np.round(pair, 12), signs) for pair in pairs]).T
    return {
        "z against a claim": t_claim > 1.96,
        "t against a claim": t_claim > sps.t.isf(0.025, n - 1),
        "paired t": _t_p(d) < 0.05,
        "sign-flip": flips[:, 0] < 0.05,
        "wilcoxon": flip_p(signed_ranks(d), signs) < 0.05,
        "unpaired (Welch)": welch < 0.05,
        "equivalence": near > sps.t.isf(0.05, n - 1),
        "six pairs, as is": flips.min(axis=1) < 0.05,
        "six pairs, Holm": flips.min(axis=1) * len(pairs) < 0.05,  # Holm's first step decides on any alarm
    }


def sign_patterns(n: int, rng: np.random.Generator) -> Array:
    """All sign patterns up to n = 10, else RESAMPLES random ones after the observed signs themselves."""
    if n <= 10:
        return np.array(list(itertools.product((1.0, -1.0), repeat=n)))
    return np.vstack([np.ones(n), rng.integers(0, 2, (RESAMPLES, n)) * 2.0 - 1])


def flip_p(differences: Array, signs: Array) -> Array:
    """Sign-flip p of every row; the patterns hold the observed one, so p is never 0."""
    observed = np.abs(differences.sum(axis=1)) - 1e-9 * np.abs(differences).sum(axis=1)
    return np.mean(np.abs(differences @ signs.T) >= observed[:, None], axis=1)


def skew_p(d: Array) -> Array:
    """Hall's t of every row with its skewness shrunk (paired_p); 0 where the tail is no danger."""
    n, u = d.shape[1], d.mean(axis=1) / d.std(axis=1, ddof=1)
    skew = sps.skew(d, axis=1)
    noise = 6 * n * (n - 1) / ((n - 2) * (n + 1) * (n + 3))
    skew = np.where(skew**2 > noise, skew - noise / skew, 0)
    t = math.sqrt(n) * (u + skew * u**2 / 3 + skew**2 * u**3 / 27 + skew / (6 * n))
    return np.where(skew * u < 0, 2 * special.stdtr(n - 1, -np.abs(t)), 0.0)


def signed_ranks(differences: Array) -> Array:
    """Ranks of the sizes with the signs of the differences, 0 for 0: flipping them is Wilcoxon's test."""
    zeros = np.sum(differences == 0, axis=1, keepdims=True)
    return np.sign(differences) * (sps.rankdata(np.abs(differences), axis=1) - zeros)


def _t_p(d: Array) -> Array:
    sd = np.where(np.ptp(d, axis=1) < 1e-9, np.nan, d.std(axis=1, ddof=1))
    return np.nan_to_num(
        2 * special.stdtr(d.shape[1] - 1, -np.abs(d.mean(axis=1)) / sd * math.sqrt(d.shape[1])), nan=1.0
    )


def _rate_rows(data: str, n: int, simulations: int, rng: np.random.Generator) -> list[Row]:
    truth, counts = RATES[data], np.arange(n + 1)
    score = [sps.binomtest(int(k), n).proportion_ci(0.95, method="wilson") for k in counts]
    exact = [sps.binomtest(int(k), n).proportion_ci(0.95, method="exact") for k in counts]
    wald = _around(counts / n, np.sqrt(counts / n * (1 - counts / n) / n), 1.96)
    known = {
        "wilson": [(e.low, e.high) for e in score],
        "exact (Clopper-Pearson)": [(e.low, e.high) for e in exact],
        "rate, 1.96": list(zip(*wald, strict=True)),
    }
    drawn = rng.binomial(n, truth, simulations)
    return [
        _row("interval", method, data, n, _covered(*np.array(ends, dtype=float)[drawn].T, truth))
        for method, ends in known.items()
    ]


def _unequal_rows(n: int, simulations: int, rng: np.random.Generator) -> list[Row]:
    """False alarms where one model gets nearly 0 or nearly 10 and the other steadily the same mean."""
    hits: dict[str, list[Array]] = {}
    for start in range(0, simulations, BLOCK):
        rows = min(BLOCK, simulations - start)
        d = 10 * rng.beta(0.5, 0.2, (rows, n)) - 50 / 7 + 0.5 * rng.standard_normal((rows, n))
        flips = flip_p(d, sign_patterns(n, rng))
        found = {"paired t": _t_p(d), "sign-flip": flips, "against skew": np.maximum(flips, skew_p(d))}
        for method, p in found.items():
            hits.setdefault(method, []).append((p < 0.05).astype(float))
    return [_row("test", method, UNEQUAL, n, np.concatenate(found)) for method, found in hits.items()]


def _binary_rows(n: int, simulations: int, rng: np.random.Generator) -> list[Row]:
    """Pass or fail on n prompts: tests of equal models, what they find, and intervals of the difference."""
    tables = [(wins, m - wins) for m in range(n + 1) for wins in range(m + 1)]
    wins, losses = np.array(tables).T
    fewer = np.minimum(wins, losses)
    conditional = np.minimum(1, 2 * sps.binom.cdf(fewer, wins + losses, 0.5))
    mid = np.where(wins == losses, 1, conditional - sps.binom.pmf(fewer, wins + losses, 0.5))
    ours = np.array([paired.mcnemar_p(w, m, n) for w, m in tables])
    mean = (wins - losses) / n
    sd = np.sqrt((wins + losses - n * mean**2) / (n - 1))
    sd[sd < 1e-9] = np.nan  # all differences are equal
    price = np.array([bonett_price(w, m, n) for w, m in tables]).T
    ends = {"bonett-price": price, "paired t": _around(mean, sd / math.sqrt(n), sps.t.isf(0.025, n - 1))}
    p = {"McNemar, unconditional": ours, "McNemar, mid-p": mid, "sign-flip": conditional}
    place = {table: i for i, table in enumerate(tables)}

    def drawn(one: float, other: float) -> NDArray[np.int_]:
        counts = rng.multinomial(n, [one, other, 1 - one - other], simulations)
        return np.array([place[w, m] for w, m, _ in counts.tolist()])

    equal, apart = drawn(sum(DISCORDANT) / 2, sum(DISCORDANT) / 2), drawn(*DISCORDANT)
    gap = DISCORDANT[0] - DISCORDANT[1]
    rows = [_row("test", m, BINARY, n, (p[m][equal] < 0.05).astype(float)) for m in p]
    rows += [_row("power", m, BINARY, n, (p[m][apart] < 0.05).astype(float)) for m in p]
    return rows + [
        _row("interval", m, BINARY, n, _covered(low[apart], high[apart], gap))
        for m, (low, high) in ends.items()
    ]


def _rank_hits(n: int, simulations: int, rng: np.random.Generator) -> Array:
    """1 where the percentile bootstrap interval of the best model's rank holds the true one, 1."""
    hits = []
    for start in range(0, simulations, BLOCK):
        latent, _ = draw("normal", (min(BLOCK, simulations - start), MODELS, n), rng)
        counts = resample_counts(n, RESAMPLES, int(rng.integers(2**32))).astype(float)
        means = (latent + LEADS[:, None]) @ counts.T / n  # simulations x models x resamples
        ranks = 1 + np.sum(means[:, 1:] > means[:, :1], axis=1)
        low, high = np.quantile(ranks, [0.025, 0.975], axis=1, method="inverted_cdf")
        hits.append(_covered(low, high, 1.0))
    return np.concatenate(hits)


def _rated_rows(n: int, simulations: int, rng: np.random.Generator) -> list[Row]:
    """Intervals of the readers' mean difference, which is 0, from a judge's differences and n ratings."""
    readers = rng.normal(0, READERS_SD, (simulations, PROMPTS))
    judge = readers + rng.normal(FAVOURED, JUDGE_SD, readers.shape)
    y, f, rest = readers[:, :n], judge[:, :n], judge[:, n:]
    t, means = sps.t.isf(0.025, n - 1), [ppi.tuned(*row) for row in zip(y, f, f, rest, strict=True)]
    ends = {
        "score alone": _around(judge.mean(axis=1), sps.sem(judge, axis=1), sps.t.isf(0.025, PROMPTS - 1)),
        "ratings alone": _around(y.mean(axis=1), sps.sem(y, axis=1), t),
        "PPI++, 1.96": ppi_python(y, f, rest),
        "corrected": tuple(np.array([found.interval()[:2] for found in means]).T),
    }
    rows = [_row("interval", method, FAVOUR, n, _covered(*found, 0.0)) for method, found in ends.items()]
    alone = np.subtract(*reversed(ends["ratings alone"])).mean()
    widths = np.subtract(*reversed(ends["corrected"])) / alone
    error = round(float(sps.sem(widths)), 4)
    return [*rows, Row("width", "corrected", FAVOUR, n, simulations, round(widths.mean(), 4), error, 0.0)]


def _gate_rows(data: str, n: int, simulations: int, rng: np.random.Generator) -> list[Row]:
    """How often the gate passes, blocks and cannot tell, by how far the candidate is behind.

    Models that are apart also differ by prompt; equal ones are the same model, sampled again. Scores are
    tenths between 1 and 10.
    """
    rows, answers = [], ("passes", "worse", "cannot tell")
    for behind, margins in BEHIND.items():
        given = [_pass_or_fail, _points][data == GATED[0]](n, simulations, margins, rng)
        for answer in answers:
            hits = np.array([found == answer for found in given], dtype=float)
            rows.append(_row("gate", f"{behind}: {answer}", data, n, hits))
    return rows


def _points(n: int, simulations: int, margins: int, rng: np.random.Generator) -> list[str]:
    levels = LEVEL + BETWEEN * rng.standard_normal((simulations, n))
    apart = INTERACTION * rng.standard_normal((simulations, n)) * bool(margins)
    means = []
    for level in (levels, levels + apart - margins * POINTS):
        texts = level[..., None] + WITHIN * rng.standard_normal((simulations, n, GATE_REPEATS))
        means.append(np.round(np.clip(texts, 1, 10), 1).mean(axis=2))
    return [noninferiority.difference(*pair, POINTS).outcome for pair in zip(*means, strict=True)]


def _pass_or_fail(n: int, simulations: int, margins: int, rng: np.random.Generator) -> list[str]:
    """A third of the items that neither model alone passes is failed by both."""
    behind = margins * SHARE
    drawn = rng.multinomial(n, [DIFFERING, DIFFERING + behind, 1 - 2 * DIFFERING - behind], simulations)
    known = dict[tuple[int, int], str]()
    for wins, losses, both in drawn.tolist():
        if (wins, losses) not in known:
            rest = [0] * (both // 3) + [1] * (both - both // 3)
            old, new = [0] * wins + [1] * losses + rest, [1] * wins + [0] * losses + rest
            known[wins, losses] = noninferiority.difference(old, new, SHARE).outcome
    return [known[wins, losses] for wins, losses, _ in drawn.tolist()]


def _speed_rows(data: str, n: int, simulations: int, rng: np.random.Generator) -> list[Row]:
    """Equal models of which some pair is called different; a slower model that is told from the first."""
    equal, apart = (told_apart(draw_speeds(data, n, simulations, slower, rng)) for slower in (0.0, SLOWER))
    alarms, found = equal.any(axis=1).astype(float), apart[:, MODELS - 2].astype(float)
    return [_row("test", "ratios", data, n, alarms), _row("power", "ratios", data, n, found)]


def draw_speeds(data: str, n: int, simulations: int, slower: float, rng: np.random.Generator) -> Array:
    """Mean log speeds over the rounds, (simulations, models, prompts), of a pass on an unsteady machine."""
    blocks = n * ROUNDS
    rows = np.arange(MODELS * blocks)
    start, size = rng.integers(0, len(rows), (simulations, 1)), rng.integers(0, LONGEST + 1, (simulations, 1))
    slow = rng.uniform(-DRIFT, DRIFT, (simulations, 1)) * rows / len(rows)
    slow = slow + rng.normal(0, WANDER, (simulations, len(rows))).cumsum(axis=1)
    slow += BURST * ((rows >= start) & (rows < start + size)) + rng.normal(0, JITTER, slow.shape)
    model, block = np.ogrid[
        :MODELS, :blocks
    ]  # a block: all models at one prompt, another one first each time
    place = block * MODELS + (model - block) % MODELS if data == TIMED[0] else model * blocks + block
    slow = slow[:, place]
    slow[:, -1] += math.log1p(slower)
    return -slow.reshape(simulations, MODELS, ROUNDS, n).mean(axis=2)


def told_apart(speeds: Array) -> NDArray[np.bool_]:
    """Which pairs of models ``speed.in_pairs`` calls different: (simulations, pairs)."""
    first, second = np.triu_indices(MODELS, 1)
    d, n = speeds[:, first] - speeds[:, second], speeds.shape[2]
    mean, error = np.abs(d.mean(axis=2)), sps.sem(d, axis=2)
    p, half = 2 * special.stdtr(n - 1, -mean / error), error * sps.t.isf(0.025, n - 1)
    order = np.argsort(p, axis=1)
    steps = np.maximum.accumulate(np.take_along_axis(p, order, 1) * np.arange(p.shape[1], 0, -1), axis=1)
    holm = np.empty_like(p)
    np.put_along_axis(holm, order, steps, 1)
    return (mean > half) & (holm < 0.05) & (mean + half >= MARGIN)


def ppi_python(y: Array, f: Array, rest: Array) -> Ends:
    """PPI++ as ppi-python's ppi_mean_ci has it: normal quantile, tuning clipped to [0, 1]."""
    n, m = y.shape[1], rest.shape[1]
    both = np.concatenate([f, rest], axis=1)
    centred = (y - y.mean(axis=1, keepdims=True)) * (f - f.mean(axis=1, keepdims=True))
    tuning = np.clip(centred.mean(axis=1) / ((1 + n / m) * both.var(axis=1, ddof=1)), 0, 1)
    mean = y.mean(axis=1) + tuning * (rest.mean(axis=1) - f.mean(axis=1))
    variance = (y - tuning[:, None] * f).var(axis=1) / n + tuning**2 * rest.var(axis=1) / m
    return _around(mean, np.sqrt(variance), 1.96)


def _look_rows(data: str, simulations: int, rng: np.random.Generator) -> list[Row]:
    """False alarms by the last of ten looks; power and the share of the prompts used, at APART."""
    rows = []
    for kind, apart in (("test", 0.0), ("power", APART)):
        looks = np.array(sequential.plan_looks(PLANNED))
        for method, told in looked(draw_differences(data, simulations, rng) + apart, looks).items():
            rows.append(_row(kind, method, data, PLANNED, told.any(axis=1).astype(float)))
            if apart:
                used = np.where(told.any(axis=1), looks[told.argmax(axis=1)], PLANNED) / PLANNED
                error, mean = round(float(sps.sem(used)), 4), round(float(used.mean()), 4)
                rows.append(Row("prompts", method, data, PLANNED, simulations, mean, error, 0.0))
    return rows


def draw_differences(data: str, simulations: int, rng: np.random.Generator) -> Array:
    """Differences of two models whose true difference is 0, in standard deviations of one difference."""
    size = simulations, PLANNED
    if data.startswith("all"):  # one model has 10 points on four fifths of the prompts, else 0; the other 8
        return (10.0 * (rng.random(size) < 0.8) - 8 + 0.5 * rng.standard_normal(size)) / math.sqrt(16.25)
    scores, _ = draw(data.split(",")[0], (simulations, 2, PLANNED), rng)
    return (scores[:, 0] - scores[:, 1]) / (scores[:, 0] - scores[:, 1]).std()


def looked(x: Array, looks: NDArray[np.int_]) -> dict[str, NDArray[np.bool_]]:
    """At which looks (the columns) each test at 5% tells a difference, of simulations (the rows)."""
    steps = np.arange(1, len(looks) + 1)
    mean, square = (np.cumsum(v, axis=1)[:, looks - 1] / looks for v in (x, x**2))
    sd = np.sqrt(np.maximum(square - mean**2, 1e-12))
    t = np.abs(mean) / sd * np.sqrt(looks - 1)
    z = -special.ndtri(special.stdtr(looks - 1, -t))
    rho = (-2 * math.log(0.05) + math.log(-2 * math.log(0.05) + 1)) / 30  # narrowest near 30 prompts
    width = np.sqrt(2 * (looks * rho + 1) / rho * np.log(np.sqrt(looks * rho + 1) / 0.05)) / looks
    sizes = [int(size) for size in np.diff(looks, prepend=0)]
    told = sequential.log_e(x, sizes, PLANNED) >= math.log(20)
    for row in np.flatnonzero(told.any(axis=1)):  # skew is asked where it may matter
        for look in np.flatnonzero(told[row]):
            told[row, look] = sequential.p_value(x[row, : looks[look]], sizes[: look + 1], PLANNED) <= 0.05
            if told[row, look]:
                break
    return {
        "each look alone": z > 1.96,
        "Pocock": z > 2.555,
        "O'Brien-Fleming": z > 2.087 * np.sqrt(len(looks) / steps),
        "asymptotic sequence": np.abs(mean) > sd * width,
        "capital bets": capital(x / BOUND)[:, looks - 1] > math.log(20),
        "always valid": told,
    }


def capital(x: Array) -> Array:
    """Log capital of bets against a mean of 0 within -1 and 1, sized as approximate GRAPA.

    Section 5 and appendix B of Waudby-Smith & Ramdas (2023); values outside are cut, and mean and variance
    start as those of one value of 0 and a quarter of the largest variance.
    """
    y, n = np.clip(x, -1, 1), np.arange(1, x.shape[1] + 1)
    mean = np.cumsum(y, axis=1) / (n + 1)
    variance = (1 + np.cumsum((y - mean) ** 2, axis=1)) / (n + 1)
    before = [np.pad(v, ((0, 0), (1, 0)), constant_values=c)[:, :-1] for v, c in ((mean, 0), (variance, 1))]
    stakes = np.clip(before[0] / (before[1] + before[0] ** 2), -0.75, 0.75)
    return np.asarray(np.cumsum(np.log1p(stakes * y), axis=1))


def _repeats(n: int) -> NDArray[np.int_]:
    return np.resize(REPEATS, n)


def _truth(data: str) -> float:
    if data == "clustered":
        return 6.0
    steps = 400_000
    return float(SHAPES[data](special.ndtri((np.arange(steps) + 0.5) / steps)).mean())


def _around(mean: Array, error: Array, quantile: float) -> Ends:
    return mean - quantile * error, mean + quantile * error


def _quantiles(rows: Array, q: float | Array) -> Array:
    """Quantile q of every sorted row (linear interpolation, as np.quantile); NaN where q is."""
    at = np.broadcast_to(np.asarray(q, dtype=float), rows.shape[:1]) * (rows.shape[1] - 1)
    below = np.nan_to_num(np.floor(at)).astype(int)
    first, second = (rows[np.arange(len(rows)), np.minimum(below + i, rows.shape[1] - 1)] for i in (0, 1))
    with np.errstate(invalid="ignore"):
        return np.where(first == second, first, first + (at - below) * (second - first)) + 0 * at


def _covered(low: Array, high: Array, truth: float) -> Array:
    """1 where the interval holds the truth, 0 where not, NaN where there is none."""
    return np.where(np.isnan(low) | np.isnan(high), np.nan, (low <= truth) & (truth <= high))


def _row(kind: str, method: str, data: str, n: int, hits: Array) -> Row:
    given = hits[~np.isnan(hits)]
    rate = float(given.mean()) if len(given) else math.nan
    error = math.sqrt(rate * (1 - rate) / len(given)) if len(given) else math.nan
    return Row(
        kind,
        method,
        data,
        n,
        len(hits),
        round(rate, 4),
        round(error, 4),
        round(1 - len(given) / len(hits), 4),
    )


def read(path: Path) -> list[Row]:
    """The rows of a calibration table."""
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Row(
                r["kind"],
                r["method"],
                r["data"],
                int(r["n"]),
                int(r["simulations"]),
                *map(float, list(r.values())[5:]),
            )
            for r in csv.DictReader(file)
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--simulations", type=int, default=20_000)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).resolve().parent.parent / "data/calibration.csv"
    )
    options = parser.parse_args()
    done = {(r.data, r.n) for r in read(options.out)} if options.out.exists() else set()
    with options.out.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if not done:
            writer.writerow(Row._fields)
        cells = [*itertools.product(SIZES, (*DATA, UNEQUAL, BINARY)), *itertools.product(RATED, (FAVOUR,))]
        cells += [*itertools.product((PLANNED,), LOOKED), (GATE_PROMPTS, GATED[0])]
        cells += itertools.product((LATENCY_PROMPTS,), TIMED)
        for n, data in (*cells, *itertools.product(GATE_RATED, GATED[1:])):
            if (data, n) not in done:
                writer.writerows(run_cell(data, n, options.simulations))
                file.flush()
                print(f"{data}, n = {n}", flush=True)


if __name__ == "__main__":
    main()
