"""The choice of a dtype against the loss of transformers, planted speeds, damage, and a run that goes on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from definitions import definitions
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny

from nbhelpers import pipeline, store
from nbhelpers.devices import machine
from nbhelpers.devices.machine import DeviceReport, DtypeTrial
from nbhelpers.loading import load
from nbhelpers.loading.load import Loaded
from nbhelpers.records import DTYPES, Settings

latency = definitions("01_device_detection", "definitions")
INSIDE = latency.probe.__globals__  # where its functions look names up
SPEEDS = {"float32": 100.0, "bfloat16": 300.0, "float16": 200.0}


def here(**given: Any) -> DeviceReport:
    return replace(machine.detect("cpu"), **given)


def settings(tmp_path: Path, **given: Any) -> Settings:
    return Settings(model="lab-opt", run_dir=str(tmp_path), device="cpu", **given)


def choose(report: DeviceReport, asked: Settings) -> DeviceReport:
    return latency.choose_dtype(report, pipeline.open_run(asked))


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Real models of any size with planted speeds; the dtypes that were loaded."""
    tried: list[str] = []

    def speed(loaded: Loaded) -> float:
        tried.append(loaded.report.dtype)
        return SPEEDS[loaded.report.dtype]

    monkeypatch.setitem(INSIDE, "SMALLEST", 0)
    monkeypatch.setitem(INSIDE, "batch_speed", speed)
    return tried


def damage(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[torch.Tensor], object], dtype: str) -> None:
    make_model = load.load

    def loader(*given: Any) -> Loaded:
        loaded = make_model(*given)
        if loaded.report.dtype == dtype:
            with torch.no_grad():
                spoil(list(loaded.model.parameters())[-1])  # the last norm
        return loaded

    monkeypatch.setitem(INSIDE, "load", loader)


@pytest.mark.parametrize("family", ["gpt2", "bloom", "opt", "llama"])
def test_perplexity_is_that_of_transformers_loss(family: str) -> None:
    loaded, ids = tiny(family), [5, 9, 200, 31, 7, 7, 120]
    batch = torch.tensor([ids])
    with torch.inference_mode():
        theirs = loaded.model(input_ids=batch, labels=batch).loss.item()
    assert latency.perplexity(loaded, ids) == pytest.approx(math.exp(theirs), rel=1e-5)


@pytest.mark.parametrize("seconds", [0.0, 0.2])  # however short the time, one step is timed
def test_the_speed_is_that_of_a_step_and_the_text_is_no_models_training(seconds: float) -> None:
    loaded, step_s = tiny("llama"), 0.02
    loaded.model.register_forward_pre_hook(lambda *_: time.sleep(step_s))
    assert 0 < latency.batch_speed(loaded, seconds) < latency.ROWS / step_s
    assert 2 < len(latency.held_out(loaded)) <= latency.HELD_OUT_TOKENS


def test_the_fastest_faithful_dtype_is_chosen_and_stays(tmp_path: Path, planted: list[str]) -> None:
    asked = settings(tmp_path)
    report = choose(here(), asked)
    assert report.dtype == "bfloat16" and report.dtype_reason.startswith("measured: 3.00 times")
    assert [t.speed_ratio for t in report.dtype_trials] == [1.0, 3.0, 2.0]
    ratios = [t.perplexity_ratio or 0 for t in report.dtype_trials]
    assert ratios[0] == 1 and all(0 < abs(ratio - 1) < 0.01 for ratio in ratios[1:])
    store.write_json(pipeline.open_run(asked).folder / "device.json", report)
    planted.clear()
    assert choose(replace(report, dtype="float32", dtype_trials=()), asked) == report
    assert not planted  # a run that goes on tries nothing again
    assert machine.make_device(pipeline.open_run(asked)) == report
    by_hand = machine.make_device(pipeline.open_run(replace(asked, dtype="fp16")))
    assert (by_hand.dtype, by_hand.dtype_reason) == ("float16", "asked for")
    assert choose(by_hand, replace(asked, dtype="fp16")) == by_hand and not planted


def test_a_gain_within_the_noise_of_the_clock_changes_nothing(
    tmp_path: Path, planted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for dtype, speed in (("bfloat16", 104.0), ("float16", 109.0)):
        monkeypatch.setitem(SPEEDS, dtype, speed)
    report = choose(here(), settings(tmp_path))
    assert report.dtype == "float32"
    assert report.dtype_reason == "measured: no faithful dtype is faster by a tenth"
    monkeypatch.setitem(SPEEDS, "float16", 111.0)
    assert choose(here(), settings(tmp_path)).dtype == "float16"


def test_other_weights_are_tried_again(tmp_path: Path, planted: list[str]) -> None:
    asked = settings(tmp_path)
    old = DtypeTrial("float32", 1.0, 2.0, 1.0, 1.0, "another revision")
    store.write_json(pipeline.open_run(asked).folder / "device.json", here(dtype_trials=(old,)))
    assert choose(here(), asked).dtype == "bfloat16"
    assert planted == list(DTYPES)


@pytest.mark.parametrize("spoil", [lambda weight: weight.mul_(1.2), lambda weight: weight.fill_(math.nan)])
def test_a_fast_dtype_that_predicts_worse_is_not_chosen(
    tmp_path: Path, planted: list[str], monkeypatch: pytest.MonkeyPatch, spoil: Any
) -> None:
    damage(monkeypatch, spoil, "bfloat16")
    assert choose(here(), settings(tmp_path)).dtype == "float16"


def test_without_a_usable_reference_the_rule_stays(
    tmp_path: Path, planted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = choose(here(memory_free_bytes=1000), settings(tmp_path))
    assert (small.dtype, planted) == ("float32", []) and "does not fit" in small.dtype_reason
    damage(monkeypatch, lambda weight: weight.fill_(math.nan), "float32")
    assert choose(here(), settings(tmp_path)).dtype == "float32"


def test_a_slower_dtype_is_asked_nothing_more(
    tmp_path: Path, planted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SPEEDS, "float16", 25.0)
    last = choose(here(), settings(tmp_path)).dtype_trials[-1]
    assert (last.dtype, last.speed_ratio, last.perplexity) == ("float16", 0.25, None)


def test_small_models_cost_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(INSIDE, "load", lambda *_: pytest.fail("a small model was tried"))
    report = choose(here(), settings(tmp_path))
    assert report.dtype == "float32"
    assert report.dtype_reason.endswith("; not measured: below 50 million parameters")


ratio = st.one_of(st.none(), st.floats(0.9, 1.1).filter(lambda r: abs(abs(r - 1) - 0.01) > 1e-9))  # no edge


@given(st.lists(st.tuples(st.floats(0.1, 20), ratio), min_size=1, max_size=4))
def test_the_choice_is_brute_force_over_the_trials(rows: list[tuple[float, float | None]]) -> None:
    rows = [(1.0, 1.0), *rows]  # float32, the reference
    trials = tuple(DtypeTrial(f"d{n}", 1.0, 1.0, speed, worse, "r") for n, (speed, worse) in enumerate(rows))
    base = DeviceReport("cpu", "", 1, 1, 1, (), "float32", "rule", {}, "")
    found = latency.with_trials(base, trials)
    allowed = [speed for speed, worse in rows if worse is not None and 0.99 <= worse <= 1.01]
    right = max(allowed) if max(allowed) >= 1.1 else 1.0
    assert trials[int(found.dtype[1:])].speed_ratio == right
