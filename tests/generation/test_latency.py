"""Models timed in turn: the order, what is kept, memory and servers, and a machine that drifts by plan."""

from __future__ import annotations

import math
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import made_runs
import openai_server
import pytest
from planted_clock import VirtualClock, planted

from nbhelpers import pipeline, registry, store
from nbhelpers.comparison import speed
from nbhelpers.devices import machine, meters
from nbhelpers.generation import decode, generate, latency
from nbhelpers.loading import load
from nbhelpers.records import ModelRun, Sample, Settings

MODELS = ("lab-gpt2", "lab-opt", "lab-bloom")


def opened(folder: Path, *models: str, limit: int = 2) -> list[ModelRun]:
    asked = Settings(run_dir=str(folder), limit=limit, repeats=1, max_new_tokens=3, device="cpu")
    runs = [pipeline.open_run(replace(asked, model=model)) for model in models]
    for run in runs:
        if run.spec.kind != "server":
            pipeline.make(run, "loading")
    return runs


def passed(folder: Path) -> latency.LatencyPass:
    return store.read_json(folder / latency.FILE, latency.LatencyPass)


def rows_by_key(runs: list[ModelRun]) -> dict[str, tuple[str, Sample]]:
    found = ((run, row) for run in runs for row in store.read_rows(run.folder / "latency.jsonl", Sample))
    return {row.key: (run.folder.name, row) for run, row in found}


@pytest.fixture(scope="module")
def timed(tmp_path_factory: pytest.TempPathFactory) -> list[ModelRun]:
    runs = opened(tmp_path_factory.mktemp("run"), *MODELS)
    assert not latency.is_whole(runs)
    latency.measure_in_turn(runs)
    return runs


def test_all_models_meet_a_prompt_before_any_goes_on_and_another_one_begins(timed: list[ModelRun]) -> None:
    found, folder = rows_by_key(timed), timed[0].folder.parent
    order = [(found[key][0], found[key][1].prompt_id, found[key][1].repeat) for key in passed(folder).keys]
    blocks = [order[n : n + 3] for n in range(0, len(order), 3)]
    assert [[model for model, *_ in block] for block in blocks] == [
        ["lab-gpt2", "lab-opt", "lab-bloom"],
        ["lab-opt", "lab-bloom", "lab-gpt2"],
        ["lab-bloom", "lab-gpt2", "lab-opt"],
        ["lab-gpt2", "lab-opt", "lab-bloom"],
    ]
    assert all(len({turn[1:] for turn in block}) == 1 for block in blocks)
    assert {block[0][1:] for block in blocks} == {(p, n) for p in ("b01", "b02") for n in (0, 1)}
    assert passed(folder).together and latency.is_whole(timed)


def test_the_timings_are_those_of_the_run_s_results_and_are_not_made_again(timed: list[ModelRun]) -> None:
    run = timed[0]
    before = (run.folder / "latency.jsonl").read_bytes()
    pipeline.make(run, "result")
    assert (run.folder / "latency.jsonl").read_bytes() == before
    keys = [row.key for row in generate.read_samples(run, "latency")]
    [noise] = meters.passes(run.folder, keys)
    assert set(noise.keys) == set(keys) and len(keys) == 2 * generate.ROUNDS
    (run.folder.parent / latency.FILE).rename(run.folder.parent / "away")
    assert not latency.is_whole(timed)
    (run.folder.parent / "away").rename(run.folder.parent / latency.FILE)


def test_a_row_that_lacks_or_a_model_that_came_later_makes_the_pass_again(timed: list[ModelRun]) -> None:
    folder = timed[0].folder.parent
    more = [*timed, *opened(folder, "lab-llama")]
    assert latency.is_whole(timed) and not latency.is_whole(more)
    path = timed[1].folder / "latency.jsonl"
    rows = list(store.read_rows(path, Sample))
    store.write_rows(path, rows[:-1])
    assert not latency.is_whole(timed)
    store.write_rows(path, rows)


def test_without_memory_for_all_each_is_loaded_for_its_turn_in_every_round(
    timed: list[ModelRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine tenths of the memory that all weights take: they are loaded in turn, and write the same texts."""
    runs = opened(tmp_path, *MODELS)
    weights = sum(load.read_report(run).parameter_bytes or 0 for run in runs)
    monkeypatch.setattr(machine, "free_memory", lambda device: weights)
    opens, real = Counter[str](), load.load
    monkeypatch.setattr(load, "load", lambda spec, *of: opens.update([spec.alias]) or real(spec, *of))
    latency.measure_in_turn(runs)
    assert opens == dict.fromkeys(MODELS, generate.ROUNDS) and not passed(tmp_path).together
    found, others = rows_by_key(runs), rows_by_key(timed)
    assert {key: row.text for key, (_, row) in found.items()} == {
        k: row.text for k, (_, row) in others.items()
    }
    order = [found[key][0] for key in passed(tmp_path).keys]
    assert order == [m for m in (*MODELS, *MODELS[1:], MODELS[0]) for _ in range(2)]


def test_a_server_takes_its_turns_and_one_that_is_down_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with openai_server.serve() as tiny:
        names = ("lab-gpt2", f"{registry.SERVER}{tiny.url}#tiny")
        runs = opened(tmp_path, *names)
        latency.measure_in_turn(runs)
        found = rows_by_key(runs)
        engines = [found[key][1].engine for key in passed(tmp_path).keys]
        assert engines == ["loop", "server", "server", "loop"] * 2 and tiny.most == 1
        pipeline.make(runs[1], "latency")
        assert latency.is_whole(runs)
    capsys.readouterr()
    latency.measure_in_turn(runs)
    assert "is not timed with the others: " in capsys.readouterr().out
    assert {found[key][0] for key in passed(tmp_path).keys} == {"lab-gpt2"}


def test_the_work_of_others_is_named_and_that_of_a_server_for_us_is_left_out(tmp_path: Path) -> None:
    start = meters.cpu_times()
    with meters.recorded({tmp_path / "latency.jsonl": ["a"]}) as apart:
        wall, busy, mine = (b - a for a, b in zip(start, meters.cpu_times(), strict=True))
        apart.append((wall, busy + 1e9, mine))  # whatever else was busy was a server's answer to us
    [found] = meters.passes(tmp_path, ["a"])
    assert found.other_load == 0.0
    noisy = replace(found, other_load=0.4, busiest="backup", after=found.before)
    assert meters.verdict([noisy]) == "noisy: 40% load by other processes, above all backup"


# A machine that drifts by plan


def planted_pass(
    folder: Path, monkeypatch: pytest.MonkeyPatch, slower: dict[str, float], drift: float
) -> tuple[speed.Comparison, ...]:
    """The verdicts on models whose steps take planted times, on a clock that runs slower and slower."""
    clock = VirtualClock()
    began = clock.now

    def pause(seconds: float) -> None:
        clock.pause(seconds * (1 + drift * (clock.now - began)))

    monkeypatch.setattr(decode, "decode", partial(decode.decode, clock=clock))
    runs = opened(folder, *slower, limit=8)
    runs = [replace(run, settings=replace(run.settings, max_new_tokens=16)) for run in runs]

    @contextmanager
    def opened_planted(run: ModelRun) -> Any:
        loaded = planted(0.05, 0.01 * slower[run.settings.model], pause)
        loaded = replace(loaded, report=load.read_report(run), spec=run.spec)
        yield loaded

    monkeypatch.setattr(latency, "opened", opened_planted)
    latency.measure_in_turn(runs)
    results = []
    for run in runs:
        sample = made_runs.make_sample(run.settings.model, "", 0, text="As long as the others'.")
        prompts = dict.fromkeys(row.prompt_id for _, row in rows_by_key([run]).values())
        store.write_rows(run.folder / "samples.jsonl", [replace(sample, key=p, prompt_id=p) for p in prompts])
        results.append(made_runs.make_result(run.settings.model, made_runs.planted(4, 1)))
    return speed.compare_speeds(folder, results)


def test_a_drift_of_the_machine_is_not_a_difference_of_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine loses a third of its speed within the pass: equal models stay equal."""
    [pair] = planted_pass(tmp_path, monkeypatch, {"lab-gpt2": 1.0, "lab-opt": 1.0}, drift=0.05)
    rows = [row for _, row in rows_by_key(opened(tmp_path, "lab-gpt2", limit=8)).values()]
    times = [row.latency_s or 0.0 for row in rows]
    assert max(times) > 1.3 * min(times)
    assert pair.verdict == "tied" and pair.n == 8
    assert "are equally fast within 5%: 1.00 times as fast" in speed.speed_sentence(pair)


def test_a_step_that_is_a_tenth_slower_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slower = {"lab-gpt2": 1.0, "lab-opt": 1.1, "lab-bloom": 1.0, "lab-llama": 1.0}
    pairs = planted_pass(tmp_path, monkeypatch, slower, drift=0.01)
    for pair in pairs:
        assert pair.verdict == ("better" if pair.b == "lab-opt" else "tied"), pair
    told = next(pair for pair in pairs if pair.b == "lab-opt")
    assert math.exp(told.difference or 0) == pytest.approx((0.05 + 0.165) / 0.2, rel=0.01)


def test_ratios_by_hand() -> None:
    """Two rounds of three prompts: means of log ratios within a round, t over prompts."""
    fast = {(p, n): math.log(200 * (1 + n)) for p in "abc" for n in (0, 1)}
    by_prompt = {"a": 2.0, "b": 2.1, "c": 1.9}
    slow = {cell: value - math.log(by_prompt[cell[0]]) for cell, value in fast.items()}
    [pair] = speed.in_pairs({"slow": slow, "fast": fast}, {})
    assert (pair.a, pair.b, pair.n, pair.verdict) == ("fast", "slow", 3, "better")
    assert math.exp(pair.difference or 0) == pytest.approx((2.0 * 2.1 * 1.9) ** (1 / 3))
    assert speed.speed_sentence(pair).startswith("fast is 2.00 times as fast [1.76, 2.26] as slow")
    [one] = speed.in_pairs({"slow": slow, "fast": fast}, dict.fromkeys("abc", "a"))
    assert one.n == 1 and one.verdict == "cannot tell"
    del slow["a", 0]
    assert speed.in_pairs({"slow": slow, "fast": fast}, {})[0].difference == pytest.approx(pair.difference)
    assert speed.in_pairs({}, {}) == speed.in_pairs({"fast": fast}, {}) == ()


def test_a_run_that_was_not_timed_in_turn_has_no_verdict_on_speed(tmp_path: Path) -> None:
    made_runs.write_model(tmp_path, made_runs.make_result("a", made_runs.planted(4, 1)))
    assert speed.compare_speeds(tmp_path, [made_runs.make_result("a", made_runs.planted(4, 1))]) == ()
