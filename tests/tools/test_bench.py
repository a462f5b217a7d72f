"""The bench's arithmetic by hand, and its plumbing with real engines on tiny work; no timing is judged."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from nbhelpers import registry, store
from nbhelpers.records import LabError
from tools import bench, bench_engines
from tools.bench import Timing
from tools.bench_engines import ALONE, COMPILED, LOOP, OURS, Case, Way


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
        timing(COMPILED, 300.0, 600.0, 900.0, bound=300.0),
        timing("llama.cpp, one at a time", 150.0, 200.0, 300.0),
    ]
    start = {"lab-llama, ours": 2.0, "lab-llama, lm-eval": 8.0}
    found = {r.name: (r.median, r.low, r.high) for r in bench_engines.ratios(rows, start)}
    assert found["the one-prompt loop"] == (20.0, 10.0, 20.0)
    assert found["batched generate"] == (2.0, 2.0, 4.0)
    assert found["lm-eval's best batch"] == (2.0, 1.0, 4.0)
    assert found["the bound of one at a time"] == pytest.approx((2, 1, 3))
    assert found["llama.cpp, one at a time"] == (3.0, 2.0, 3.0)  # the best of ours
    assert found["llama.cpp, one at a time, not compiled"] == pytest.approx((0.3, 0.2, 0.3))
    # 12,000 tokens: 12 + 8 s against 6, 12 and 3 s + 2 s
    assert found["lm-eval with its start"] == pytest.approx((20 / 8, 20 / 14, 20 / 5))
    alone = [row for row in rows if "llama.cpp" not in row.way]
    assert not any("llama.cpp" in r.name for r in bench_engines.ratios(alone, start))


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
    report = bench.run(["engine"], ["lab-gpt2"], quick=True, folder=tmp_path)
    assert (report.device, report.dtype) == ("cpu", "float32")
    rows = {t.way: (t.rows, len(t.tokens_per_s)) for t in report.timings}
    assert rows[OURS] == rows["generate, 15 prompts x 8 returned"] == (4, 2)
    assert rows[LOOP] == rows[ALONE] == (1, 2)
    assert not any(word in way for way in rows for word in ("lm-eval", "llama.cpp"))
    assert all(rate > 0 for t in report.timings for rate in t.tokens_per_s)
    assert report.same_text == {"lab-gpt2, ours": 1.0, "lab-gpt2, generate": 1.0}
    bounds = {t.way: t.bound for t in report.timings if t.bound}
    assert set(bounds) == {OURS, ALONE} and min(bounds.values()) > 0  # by the clock: not compared here
    assert store.read_json(tmp_path / "bench.json", bench.BenchReport) == report
    assert (tmp_path / "bench.png").exists() and set(report.dates) == set(report.loads) == {"lab-gpt2"}


def test_what_a_gpu_is_asked_runs_in_half_precision_on_a_processor_too():
    case = bench_engines.CASES[0]
    ways = bench_engines.ways_on(case, "cuda")
    assert {way.engine for way in ways} == {"generate", "ours", "lm-eval", "static", "vllm"}
    assert bench_engines.ways_on(case, "cpu") == case.ways
    ways = tuple(way for way in ways if way.engine in ("ours", "static"))
    small = replace(case, ways=ways, dtype="bfloat16", prompts=2, alone=1, repeats=2, tokens=4, rounds=1)
    found = bench_engines.engines(small, ["engine"], sys.executable)
    assert [(t.way, t.rows) for t in found["timings"]] == [
        (way.name, 1 if way.batch == 1 else 4) for way in ways
    ]
    assert all(t.tokens_per_s[0] > 0 for t in found["timings"]) and not found["not_run"]
    assert found["same_text"] == {"lab-gpt2, ours": 1.0, "lab-gpt2, static": 1.0}


def test_a_bound_is_asked_for_the_rows_that_a_way_writes_at_a_time_and_for_their_cache():
    asked = []

    def ask(worker, **given):
        asked.append((worker, given["rows"], given["columns"]))
        return {"tokens_per_s": 7.0}

    field = SimpleNamespace(workers={"ours": SimpleNamespace(facts={"prompt_tokens": [10, 20, 60]})}, ask=ask)
    case = Case("lab-gpt2", 2, 100, 1, (), prompts=3, alone=2)
    for way in (Way(OURS, "ours", 4), Way(OURS, "ours", 99), Way(ALONE, "ours", 1)):
        assert bench_engines._bound(case, way, field) == 7.0
    assert asked == [("ours", 4, 80.0), ("ours", 6, 80.0), ("ours", 1, 65.0)]
    assert bench_engines._bound(case, Way(LOOP, "loop", 1), field) is None


PLAIN = {"start_s": {}, "same_text": {}, "compile_s": {}, "not_run": {}, "versions": {}, "ratios": []}


def part(model: str, rate: float, **more: object) -> dict:
    row = {"model": model, "way": OURS, "rows": 1, "tokens": 1, "tokens_per_s": [rate], "bound": None}
    return PLAIN | {"timings": [row]} | more


def test_a_part_takes_the_place_of_its_own_only(tmp_path, monkeypatch):
    answers = {
        "bench_engines": [
            part("lab-llama", 1.0, not_run={"lab-llama, lm-eval": "x"}, start_s={"lab-llama, ours": 1.0}),
            part("lab-gpt2", 2.0, not_run={"lab-gpt2, lm-eval": "y"}),
            part("lab-llama", 3.0),
        ],
        "run_vs_papermill": [{"wall_ratio": 2.0}],
        "bench_growth": [{"prompts": {"exponent": 1.0}}, {"models": {"exponent": 0.9}}],
    }

    def tool(name: str, flags: object) -> dict:
        if not answers[name]:
            raise LabError(f"tools/{name}.py failed")
        return answers[name].pop(0)

    monkeypatch.setattr(bench, "_tool", tool)
    monkeypatch.setattr(bench, "picture", lambda report: SimpleNamespace(savefig=lambda path, dpi: None))
    bench.run(["engine"], ["lab-llama"], folder=tmp_path)
    bench.run(["run", "growth"], folder=tmp_path)
    with pytest.raises(LabError, match="run_vs_papermill"):  # nothing that was saved is lost
        bench.run(["run"], folder=tmp_path)
    bench.run(["engine"], ["lab-gpt2"], folder=tmp_path)
    bench.run(["models"], folder=tmp_path)
    bench.run(["engine"], ["lab-llama"], folder=tmp_path)
    found = store.read_json(tmp_path / "bench.json", bench.BenchReport)
    assert [(t.model, t.tokens_per_s) for t in found.timings] == [("lab-gpt2", (2.0,)), ("lab-llama", (3.0,))]
    assert found.run == {"wall_ratio": 2.0}
    assert found.growth == {"prompts": {"exponent": 1.0}, "models": {"exponent": 0.9}}
    assert {k for k in found.not_run if k != "CUDA"} == {"lab-gpt2, lm-eval"} and not found.start_s
    assert set(found.dates) == set(found.seconds) == {"lab-gpt2", "lab-llama", "run", "growth", "models"}
    with pytest.raises(LabError, match="choose another --out"):
        bench.run(["run"], quick=True, folder=tmp_path)


class Stub:
    """A worker that answers so many times and then fails as a real one does."""

    def __init__(self, engine: str, answers: int) -> None:
        self.engine, self.answers, self.start_s = engine, answers, 1.0
        self.facts = {"version": "1", "weight_bytes": 8, "cache_bytes_per_token": 2, "prompt_tokens": [4, 4]}

    def ask(self, do: str, **what: object) -> dict:
        self.answers -= 1
        if self.answers < 0:
            raise LabError(f"The bench of {self.engine} ended early: out of memory")
        if do == "bound":
            return {"tokens_per_s": 1.0}
        return {"seconds": 1.0, "tokens": 10, "texts": ["a", "b"]}


@pytest.mark.parametrize("answers", [0, 1, 2, 3, 4])  # greedy texts, warm-up, three rounds
def test_a_peer_that_fails_in_any_round_leaves_and_the_others_go_on(answers, monkeypatch):
    def start(stack: object, engine: str, case: Case, python: str) -> Stub:
        return Stub(engine, answers if engine == "llama.cpp" else 99)

    monkeypatch.setattr(bench_engines, "_start", start)
    ways = tuple(Way(name, name, 2) for name in ("ours", "generate", "lm-eval", "llama.cpp"))
    found = bench_engines.engines(Case("lab-gpt2", 1, 8, 3, ways, prompts=2), ["engine", "peers"], "")
    assert found["not_run"] == {"lab-gpt2, llama.cpp": "The bench of llama.cpp ended early: out of memory"}
    timed = {t.way: t.tokens_per_s for t in found["timings"]}
    assert timed == dict.fromkeys(("ours", "generate", "lm-eval"), (10.0, 10.0, 10.0))


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        (
            "Loading\n(core) ERROR 11:07 ValueError: head 26\nx.DeadError: see above\nwarn('leaked')",
            "ValueError: head 26",
        ),
        ("Killed", "Killed"),
        ("", "no reason given"),
    ],
)
def test_the_cause_of_an_early_end_is_its_first_error(log, cause):
    assert bench_engines.cause(log) == cause


def test_an_engine_of_ours_that_fails_ends_the_bench(monkeypatch):
    monkeypatch.setattr(bench_engines, "_start", lambda stack, engine, case, python: Stub(engine, 3))
    case = Case("lab-gpt2", 1, 8, 3, (Way("ours", "ours", 2), Way("generate", "generate", 2)), prompts=2)
    with pytest.raises(LabError, match="ended early"):
        bench_engines.engines(case, ["engine"], "")


def test_the_step_that_is_compiled_writes_what_the_loop_writes(monkeypatch):
    """As Python here: compiling takes 40 s of processor, and every bench checks its texts."""
    from tools import bench_compiled, bench_worker

    def uncompiled(self: bench_compiled.Compiled, threads: int) -> tuple:
        return 0.0, 0.0, threads, bench_compiled.Step(self.loaded.model)

    monkeypatch.setattr(bench_compiled.Compiled, "compiled", uncompiled)
    compiled = bench_worker.ENGINES["compiled"]("lab-llama", "float32", "cpu", None)
    ours = bench_worker.Ours("lab-llama", "float32", "cpu", None)
    prompts = registry.load_prompts(limit=2)
    for temperature in (0.0, 0.8):
        assert compiled.write(prompts, 2, 24, 1, temperature) == ours.write(prompts, 2, 24, 4, temperature)
    with pytest.raises(RuntimeError, match="room for 128"):
        compiled.write(prompts, 1, 128, 1, 0.0)


def test_a_peer_that_is_not_installed_is_named(tmp_path, monkeypatch):
    (tmp_path / "lm_eval.py").write_text("raise ModuleNotFoundError(name='lm_eval')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    worker = [sys.executable, "-m", "tools.bench_worker"]
    given = {"engine": "lm-eval", "model": "lab-gpt2", "dtype": "float32", "device": "cpu", "gguf": None}
    done = subprocess.run([*worker, json.dumps(given)], capture_output=True, text=True, cwd=bench.ROOT)
    assert json.loads(done.stdout) == {"missing": "lm_eval"}


@pytest.mark.parametrize("module", ["pydantic", "torch"])
def test_another_python_that_lacks_our_package_is_refused_before_the_bench(module, tmp_path, monkeypatch):
    """As an environment with the peers alone has it: what is missing is named, no peer is blamed."""
    (tmp_path / f"{module}.py").write_text(f"raise ModuleNotFoundError(\"No module named '{module}'\")")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{tmp_path}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(bench, "_tool", lambda *tool: pytest.fail("the bench began"))
    with pytest.raises(LabError, match=f"No module named '{module}'.*pip install -e") as caught:
        bench.run(["peers"], python=str(python))
    assert "\n" not in str(caught.value)


def test_a_python_that_is_none_is_refused_before_the_bench(tmp_path):
    with pytest.raises(LabError, match="no-python cannot be started"):
        bench.run(["engine", "peers"], python=str(tmp_path / "no-python"))


def test_mistakes_are_one_sentence():
    with pytest.raises(LabError, match="no part 'speed'"):
        bench.run(["speed"])
    with pytest.raises(LabError, match="no model 'nope'"):
        bench.run(["engine"], ["nope"])
