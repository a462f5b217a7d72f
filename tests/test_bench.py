"""The bench's arithmetic by hand, and its plumbing with real engines on tiny work; no timing is judged."""

import json
import math
import subprocess
import sys

import pytest

from nbhelpers import bench, store
from nbhelpers.bench import Timing
from nbhelpers.records import LabError

sys.path.insert(0, str(bench.TOOLS))
import bench_engines
from bench_engines import ALONE, LOOP, OURS


def timing(way: str, *rates: float, bound: float | None = None) -> Timing:
    return Timing("lab-llama", way, 120, 100, rates, bound)


def test_ratios_are_taken_within_a_round_against_the_best_rival():
    rows = [
        timing(OURS, 2000.0, 1000.0, 4000.0),
        timing(LOOP, 100.0, 100.0, 200.0),  # within rounds 20, 10, 20
        timing("generate, batch 15", 9999.0, 1.0, 1.0),  # the fastest round, but not the best median
        timing("generate, batch 60", 1000.0, 500.0, 1000.0),
        timing("lm-eval, batch 15", 1000.0, 1000.0, 1000.0),
        timing(ALONE, 30.0, 60.0, 90.0, bound=300.0),
    ]
    start = {"lab-llama, ours": 2.0, "lab-llama, lm-eval": 8.0}
    found = {r.name: (r.median, r.low, r.high) for r in bench_engines.ratios(rows, start)}
    assert found["the one-prompt loop"] == (20.0, 10.0, 20.0)
    assert found["batched generate"] == (2.0, 2.0, 4.0)
    assert found["lm-eval's best batch"] == (2.0, 1.0, 4.0)
    assert found["the bound of one at a time"] == pytest.approx((0.2, 0.1, 0.3))
    # 12,000 tokens: 12 + 8 s against 6, 12 and 3 s + 2 s
    assert found["lm-eval with its start"] == pytest.approx((20 / 8, 20 / 14, 20 / 5))
    assert not any("llama.cpp" in name for name in found)  # was not timed


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_a_planted_exponent_is_found(power):
    sizes = [1, 2, 4, 8, 16]
    assert bench.exponent(sizes, [3 * x**power for x in sizes]) == pytest.approx((power,) * 3)


def test_the_interval_of_an_exponent_is_that_of_the_regression():
    sizes, seconds = [1, 2, 4, 8, 16], [1.0, 2.2, 3.9, 8.4, 15.5]
    slope, low, high = bench.exponent(sizes, seconds)
    xs, ys = [math.log(x) for x in sizes], [math.log(y) for y in seconds]
    mx, my = sum(xs) / 5, sum(ys) / 5
    sxx = sum((x - mx) ** 2 for x in xs)
    hand = sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True)) / sxx
    rest = sum((y - my - hand * (x - mx)) ** 2 for x, y in zip(xs, ys, strict=True))
    assert slope == pytest.approx(hand)
    assert high - low == pytest.approx(2 * 3.1824463 * math.sqrt(rest / 3 / sxx))  # t of 3 degrees of freedom


def test_a_quick_bench_with_real_engines(tmp_path):
    report = bench.run(["engine"], ["lab-gpt2"], quick=True)
    rows = {t.way: (t.rows, len(t.tokens_per_s)) for t in report.timings}
    assert rows[OURS] == rows["generate, 15 prompts x 8 returned"] == (4, 2)
    assert rows[LOOP] == rows[ALONE] == (1, 2)
    assert not any(word in way for way in rows for word in ("lm-eval", "llama.cpp"))
    assert all(rate > 0 for t in report.timings for rate in t.tokens_per_s)
    assert report.same_text == {"lab-gpt2, ours": 1.0, "lab-gpt2, generate": 1.0}
    bounds = {t.way: t.bound for t in report.timings if t.bound}
    assert set(bounds) == {OURS, ALONE} and bounds[OURS] > bounds[ALONE]
    path = store.write_json(tmp_path / "bench.json", report)
    assert store.read_json(path, bench.BenchReport) == report
    bench.picture(report).savefig(tmp_path / "bench.png")


def test_a_peer_that_is_not_installed_is_named(tmp_path, monkeypatch):
    (tmp_path / "lm_eval.py").write_text("raise ModuleNotFoundError(name='lm_eval')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    worker = [sys.executable, str(bench.TOOLS / "bench_worker.py")]
    given = {"engine": "lm-eval", "model": "lab-gpt2", "dtype": "float32", "gguf": None}
    done = subprocess.run([*worker, json.dumps(given)], capture_output=True, text=True)
    assert json.loads(done.stdout) == {"missing": "lm_eval"}


def test_mistakes_are_one_sentence(capfd):
    with pytest.raises(LabError, match="no part 'speed'"):
        bench.run(["speed"])
    with pytest.raises(LabError, match=r"bench_engines\.py failed"):
        bench.run(["engine"], ["nope"])
    assert "The bench has no case for nope" in capfd.readouterr().err
