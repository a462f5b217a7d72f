"""Costs against hand-worked figures, inverses, and open input."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbhelpers.devices.machine import DeviceReport
from nbhelpers.records import LabError, Sample
from nbhelpers.scoring import costs

PRICES = costs.load_prices()
GIVEN = PRICES.assumptions
CPU = DeviceReport("cpu", "a processor", 2, 8 * 2**30, 4 * 2**30, ("float32",), "float32", "", {}, "test")


def sample(
    share_s: float | None = 1.0,
    energy_j: float | None = None,
    error: str | None = None,
    text: str = "x" * 400,
    prompt: str = "y" * 60,
    prompt_id: str = "p",
) -> Sample:
    return Sample(
        key="k",
        model="m",
        revision="r",
        prompt_id=prompt_id,
        content_type="linkedin_post",
        repeat=0,
        seed=0,
        prompt=prompt,
        text="" if error else text,
        prompt_tokens=15,
        new_tokens=100,
        bytes=len(text),
        finish_reason="error" if error else "eos",
        error=error,
        batch_size=1,
        latency_s=None if error else share_s,
        share_s=None if error else share_s,
        ttft_s=None,
        tpot_s=None,
        peak_memory_bytes=None,
        energy_j=energy_j,
    )


def test_a_kilowatt_for_an_hour_costs_one_tariff() -> None:
    assert costs.electricity_usd(1000 * 3600, 0.17) == pytest.approx(0.17)


def test_measured_energy_goes_before_assumed_watts() -> None:
    both = costs.cost_summary([sample(2.0), sample(2.0, energy_j=7.0)], CPU)
    assert both["joules_per_request"] == (2 * GIVEN.watts["cpu"] + 7) / 2
    measured = costs.cost_summary([sample(energy_j=7.0), sample(error="no")], CPU)
    mixed = costs.cost_summary([sample(energy_j=7.0), sample()], CPU)
    assert (measured["energy_measured"], mixed["energy_measured"]) == (1.0, 0.0)
    assert measured["joules_per_request"] == 3.5


def test_summary_hand_worked() -> None:
    given = PRICES.assumptions
    found = costs.cost_summary([sample(2.0)] * 3, CPU)
    joules = given.watts["cpu"] * 2
    local = joules / 3.6e6 * given.tariff_usd_per_kwh
    bought = (15 * 0.15 + 100 * 0.60) / 1e6  # 60 and 400 characters at four a token
    assert found["joules_per_request"] == pytest.approx(joules)
    assert found["usd_per_request"] == pytest.approx(local)
    assert found["api_usd_per_request"] == pytest.approx(bought)
    assert found["savings_percent"] == pytest.approx(100 * (bought - local) / bought)


def test_a_failed_request_has_neither_time_nor_bill() -> None:
    good = costs.cost_summary([sample()] * 2, CPU)
    half = costs.cost_summary([sample(), sample(error="no")], CPU)
    assert half["usd_per_request"] == pytest.approx(good["usd_per_request"] / 2)
    assert half["api_usd_per_request"] == pytest.approx(good["api_usd_per_request"] / 2)


def test_a_slow_model_saves_nothing() -> None:
    assert costs.cost_summary([sample(1000.0)], CPU)["savings_percent"] < 0


def test_the_interval_of_the_energy_covers_a_planted_truth() -> None:
    """Runs of 15 prompts whose energy varies like a latency; the truth is that of all prompts."""
    random, covered, runs = np.random.default_rng(0), 0, 200
    truth = 600.0
    for _ in range(runs):
        joules = random.gamma(4.0, truth / 4.0, 15)
        rows = [sample(1.0, energy, prompt_id=str(i)) for i, energy in enumerate(joules)]
        found = costs.cost_summary(rows, CPU)
        covered += found["joules_per_request_low"] <= truth <= found["joules_per_request_high"]
    assert 0.91 <= covered / runs <= 0.99


@pytest.mark.parametrize("samples", [[], [sample(error="no")], [sample(share_s=None)]])
def test_what_cannot_be_computed_is_absent(samples: list[Sample]) -> None:
    found = costs.cost_summary(samples, CPU)
    assert "usd_per_request" not in found
    assert found["watts_assumed"] == PRICES.assumptions.watts["cpu"]


ROW = st.builds(
    sample,
    share_s=st.none() | st.floats(0, 1e4),
    prompt_id=st.sampled_from("abcdef"),
    energy_j=st.none() | st.floats(0, 1e6),
    error=st.none() | st.just("RuntimeError"),
    text=st.text(max_size=50),
    prompt=st.text(max_size=5),
)


@settings(deadline=None, max_examples=40)
@given(st.lists(ROW, max_size=12))
def test_every_summary_is_finite_and_json_safe(samples: list[Sample]) -> None:
    found = costs.cost_summary(samples, CPU)
    json.dumps(found, allow_nan=False)
    assert all(isinstance(value, float) and math.isfinite(value) for value in found.values())


def test_prices_are_dated_and_their_basis_is_named() -> None:
    assert PRICES.api[0].name == "gpt-4o-mini"
    assert all(price.as_of[:2] == "20" and price.basis in ("secondary", "assumed") for price in PRICES.api)
    assert {"cpu", "cuda", "mps", "xpu"} <= PRICES.assumptions.watts.keys()
    second_gpu = replace(CPU, device="cuda:1")
    assert costs.cost_summary([sample()], second_gpu)["watts_assumed"] == PRICES.assumptions.watts["cuda"]


def test_a_broken_prices_file_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs.store, "data_dir", lambda: tmp_path)
    (tmp_path / "prices.toml").write_text("[assumptions]\nas_of = 1\n")
    with pytest.raises(LabError, match=r"prices\.toml in the data folder is not usable"):
        costs.load_prices()
