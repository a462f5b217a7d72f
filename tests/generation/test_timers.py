"""Timers against a planted truth: a model whose prefill and steps take known times."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest
import scipy
import torch
from planted_clock import VirtualClock, planted

from nbhelpers import store
from nbhelpers.generation import decode, generate, latency
from nbhelpers.records import Prompt, Sample, Settings
from nbhelpers.stats.estimate import estimate, median_estimate
from nbhelpers.tracking import metrics

# The last letter is the plan: c ends after 3 tokens, e after 5, z would after 26 but meets the limit.
PROMPTS = [Prompt("p1", "Hi c", "short_post"), Prompt("p2", "A longer one e", "short_post")]
PROMPTS += [Prompt("p3", "Last z", "short_post"), Prompt("p4", "One a", "short_post")]
LENGTHS = (3, 5, 9, 1)
SETTINGS = Settings(repeats=1, max_new_tokens=9)
PREFILL, STEP = (
    0.150,
    0.080,
)  # the engine's own work on a step, a millisecond here, is part of what it measures


def virtual(monkeypatch: pytest.MonkeyPatch, prefill: float, step: float) -> Any:
    """The planted model, and the engine reading the clock which that model advances."""
    clock = VirtualClock()
    monkeypatch.setattr(decode, "decode", partial(decode.decode, clock=clock))
    return planted(prefill, step, clock.pause)


def off(samples: Sequence[Sample], prefill: float, step: float) -> float:
    """The largest error of TTFT and TPOT as a share of what is allowed: 2 % or 1 ms, the larger."""
    found = []
    for sample in samples:
        for measured, truth in ((sample.ttft_s, prefill), (sample.tpot_s, step)):
            if measured is not None:
                found.append(abs(measured - truth) / max(0.02 * truth, 0.001))
    return max(found)


def check(samples: Sequence[Sample], lengths: Sequence[int], prefill: float, step: float) -> None:
    """Everything a timer must get right, for rows of these planted lengths."""
    assert [s.error for s in samples] == [None] * len(lengths)
    assert [s.new_tokens for s in samples] == list(lengths)
    assert [s.tpot_s is None for s in samples] == [n == 1 for n in lengths]
    assert off(samples, prefill, step) <= 1
    for sample, n in zip(samples, lengths, strict=True):
        assert sample.latency_s == pytest.approx(prefill + (n - 1) * step, rel=0.02, abs=0.001)


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize(("prefill", "step"), [(0.5, 0.02), (0.004, 0.3)])
def test_the_planted_times_are_recovered(
    monkeypatch: pytest.MonkeyPatch, size: int, prefill: float, step: float
) -> None:
    loaded = virtual(monkeypatch, prefill, step)
    samples = generate.generate_samples(loaded, PROMPTS, SETTINGS, batch_size=size)
    check(samples, LENGTHS, prefill, step)
    assert off(samples, prefill, step) < 1e-6  # nothing but the model moves this clock
    assert [s.finish_reason for s in samples] == ["eos", "eos", "length", "eos"]


@pytest.mark.parametrize("size", [2, 3])
def test_a_row_that_takes_a_freed_slot_is_timed_from_its_own_prefill(
    monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Those who are being written meanwhile wait for its prefill: that is their time, not the newcomer's."""
    loaded = virtual(monkeypatch, 0.5, 0.02)
    samples = generate.generate_samples(loaded, PROMPTS, SETTINGS, batch_size=size)
    assert [s.new_tokens for s in samples] == list(LENGTHS)
    assert [s.ttft_s for s in samples] == pytest.approx([0.5] * 4)
    for s in samples:
        waited = ((s.latency_s or 0) - 0.5 - 0.02 * (s.new_tokens - 1)) / 0.5  # prefills of others
        assert waited == pytest.approx(round(waited)) and waited >= -1e-6


@pytest.mark.parametrize("size", [1, 4])
def test_real_time_is_recovered(size: int, capsys: pytest.CaptureFixture[str]) -> None:
    """In real time a busy machine sleeps longer than asked: the model notes how long each pass really took.

    What other processes do between the passes only adds time, so the best of a few tries is judged.
    """
    plans, errors = [3, 5, 26, 1], []
    while len(errors) < 6 and min(errors, default=2.0) > 1:
        loaded = planted(PREFILL, STEP)
        samples = generate.generate_samples(loaded, PROMPTS, SETTINGS, batch_size=size)
        assert [s.new_tokens for s in samples] == list(LENGTHS)
        took = [[seconds for rows, seconds in loaded.model.passes if plan in rows] for plan in plans]
        truths = [(prefill, mean(steps or [0.0])) for prefill, *steps in took]
        errors.append(max(off([s], *truth) for s, truth in zip(samples, truths, strict=True)))
    with capsys.disabled():
        print(f"\nplanted clock, batch {size}: off by {min(errors):.0%} of what is allowed")
    assert min(errors) <= 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_the_clock_waits_for_the_gpu() -> None:
    """The planted time passes on the GPU, behind the processor's back: read too early, it would be missed."""
    started = time.perf_counter()
    torch.cuda._sleep(10**9)
    torch.cuda.synchronize()
    per_second = 1e9 / (time.perf_counter() - started)
    loaded = planted(PREFILL, STEP, lambda seconds: torch.cuda._sleep(int(seconds * per_second)))
    loaded = replace(loaded, device="cuda", model=loaded.model.to("cuda"))
    errors = []
    for _ in range(6):
        samples = generate.generate_samples(loaded, PROMPTS, SETTINGS)
        errors.append(off(samples, PREFILL, STEP))
    print(f"planted clock on the GPU: off by {min(errors):.0%} of what is allowed")
    assert [s.new_tokens for s in samples] == list(LENGTHS)
    assert min(errors) <= 1


def ttft_inside_tpot(sample: Sample) -> Sample:
    """The mistake of a published tool: the prefill is spread over the tokens."""
    return replace(sample, tpot_s=(sample.latency_s or 0) / sample.new_tokens)


def padded_tokens(sample: Sample) -> Sample:
    """The mistake of counting a row by the longest of its batch."""
    span = (sample.latency_s or 0) - (sample.ttft_s or 0)
    return replace(sample, new_tokens=max(LENGTHS), tpot_s=span / (max(LENGTHS) - 1))


def padded_divisor(sample: Sample) -> Sample:
    """The same, but hidden: the count is right and only the time per token uses the padding."""
    return replace(padded_tokens(sample), new_tokens=sample.new_tokens)


def batch_time(sample: Sample) -> Sample:
    """The mistake of giving each row the time of its batch."""
    latency = 0.5 + 0.02 * (max(LENGTHS) - 1)
    return replace(sample, latency_s=latency)


@pytest.mark.parametrize("mistake", [ttft_inside_tpot, padded_tokens, padded_divisor, batch_time])
def test_the_known_mistakes_would_be_caught(
    monkeypatch: pytest.MonkeyPatch, mistake: Callable[[Sample], Sample]
) -> None:
    loaded = virtual(monkeypatch, 0.5, 0.02)
    real = generate.sample_of
    monkeypatch.setattr(generate, "sample_of", lambda *args, **kw: mistake(real(*args, **kw)))
    samples = generate.generate_samples(loaded, PROMPTS, SETTINGS)
    with pytest.raises(AssertionError):
        check(samples, LENGTHS, 0.5, 0.02)


def test_latency_excludes_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first pass of a fresh model is planted slow: no row may show it."""
    loaded = virtual(monkeypatch, 0.5, 0.02)
    wait = loaded.model.pause
    loaded.model.pause = lambda seconds: wait(seconds if len(loaded.model.passes) > 1 else 30.0)
    samples = latency.measure_latency(loaded, PROMPTS, SETTINGS)
    assert off(samples, 0.5, 0.02) < 1e-6
    assert [s.new_tokens for s in samples] == [9] * 8  # ends are ignored: every row has the same length
    assert len(loaded.model.passes) == latency.WARM_UP_TOKENS + 8 * 9


def test_latency_prompts_run_in_a_seeded_order_and_come_back_in_their_own(tmp_path: Path) -> None:
    prompts = [Prompt(f"p{n}", f"Hi {n}", "short_post") for n in range(5)]
    orders = []
    for seed in (0, 0, 1, 2):
        path = tmp_path / f"{len(orders)}.jsonl"
        settings = replace(SETTINGS, seed=seed)
        samples = latency.measure_latency(planted(0.0, 0.0), prompts, settings, path)
        assert [(s.prompt_id, s.repeat) for s in samples] == [(p.id, n) for p in prompts for n in (0, 1)]
        orders.append([row.prompt_id for row in store.read_rows(path, Sample)])
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) == 3


# Medians


def test_bootstrap_medians_against_scipy_and_their_floor() -> None:
    values = np.random.default_rng(3).lognormal(0, 0.6, 40)
    ours = median_estimate(values)
    theirs = scipy.stats.bootstrap((values,), np.median, method="percentile", rng=2).confidence_interval
    assert (ours.mean, ours.method) == (pytest.approx(np.median(values)), "p50, bootstrap")
    assert (ours.low, ours.high) == (
        pytest.approx(theirs.low, rel=0.03),
        pytest.approx(theirs.high, rel=0.03),
    )
    assert median_estimate(range(5)).low is not None
    few = median_estimate(range(4))
    assert (few.mean, few.low) == (1.5, None) and few.reason.startswith("n = 4: too few values to resample")


def test_the_median_is_covered() -> None:
    rows = np.random.default_rng(0).lognormal(0, 0.6, (300, 15))
    found = map(median_estimate, rows)
    assert mean(float((e.low or 0) <= 1 <= (e.high or 0)) for e in found) > 0.89  # 92.5% in many more


def test_a_model_s_medians_say_why_they_have_no_interval() -> None:
    rows = latency.measure_latency(planted(0.0, 0.0), PROMPTS, SETTINGS)
    planned = {"ttft_s": 0.5, "tpot_s": None}
    rows = [replace(row, prompt_id=f"{n}", latency_s=1.0 + n, **planned) for n, row in enumerate(rows * 3)]
    found = metrics.latency_estimates(rows)
    assert found["latency_s/p50"].mean == 12.5 and found["latency_s/p50"].low is not None
    assert found["ttft_s/p50"].reason == "all 24 values are equal: no interval"
    assert found["tpot_s/p50"].reason == "no data"


def test_no_latency_interval_goes_below_zero() -> None:
    """One slow row among five: the t interval of their mean is negative, ours ends at zero or above."""
    rows = latency.measure_latency(planted(0.0, 0.0), PROMPTS[:1] * 5, SETTINGS)
    times = (0.1, 0.11, 0.12, 0.13, 2.0)
    rows = [replace(rows[0], prompt_id=f"{time_s}", latency_s=time_s) for time_s in (*times, 0.1)]
    rows[-1] = replace(rows[-1], repeat=1)  # the first prompt once more: no sixth value
    assert (estimate(times).low or 0) < 0
    found = metrics.latency_estimates(rows)["latency_s"]
    assert (found.n, found.mean) == (5, pytest.approx(np.mean(times)))
    assert found.method == "bootstrap-t" and found.low is not None and found.low >= 0


def test_one_odd_row_does_not_promise_speed() -> None:
    """Four rows at 100 tokens per second and one three times as fast: the interval stays in their reach."""
    rows = latency.measure_latency(planted(0.0, 0.0), PROMPTS[:1] * 5, SETTINGS)
    speeds = (100.0, 99.0, 101.0, 98.0, 300.0)
    rows = [replace(rows[0], prompt_id=f"{s}", new_tokens=10, latency_s=10 / s) for s in speeds]
    found = metrics.latency_estimates(rows)["tokens_per_s"]
    assert 0 <= found.low < found.mean < found.high < max(speeds)
    assert estimate(speeds, method="bootstrap-t").high > 2 * max(speeds)
