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

from nbhelpers.devices.device import DeviceReport
from nbhelpers.records import Estimate, LabError, Sample
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
    assert found["savings_usd_per_year"] == pytest.approx((bought - local) * 365_000)
    assert found["break_even_requests"] == pytest.approx(2000 / (bought - local))
    assert found["break_even_utilisation"] == pytest.approx(
        found["break_even_requests"] * 2 / (4 * 365 * 86400)
    )
    assert found["utilisation"] == pytest.approx(1000 * 2 / 86400)
    assert found["break_even_years"] == pytest.approx(found["break_even_requests"] / 365_000)
    assert found["usd_per_piece_review"] == pytest.approx(40 / 12)
    machine = local + 2000 / (4 * 365_000)
    assert found["usd_per_piece"] == pytest.approx(machine + 40 / 12)
    assert found["return_usd_per_piece"] == pytest.approx(10 - machine - 40 / 12)


def test_a_finished_piece_pays_for_the_failed_requests() -> None:
    good = costs.cost_summary([sample()] * 2, CPU)
    half = costs.cost_summary([sample(), sample(error="no")], CPU)
    assert half["usd_per_request"] == pytest.approx(good["usd_per_request"] / 2)  # a failed row has no time
    extra = half["usd_per_piece_machine"] - good["usd_per_piece_machine"]
    assert extra == pytest.approx(good["hardware_usd_per_request"])
    assert half["api_usd_per_request"] == pytest.approx(good["api_usd_per_request"] / 2)  # no text, no bill


def test_more_work_than_one_machine_can_do_takes_more_machines() -> None:
    half, full = (costs.cost_summary([sample(seconds)], CPU) for seconds in (43.2, 86.5))
    assert half["utilisation"] == pytest.approx(0.5)
    assert half["hardware_usd_per_request"] == pytest.approx(2000 / (4 * 365_000))
    assert full["hardware_usd_per_request"] == pytest.approx(2 * 2000 / (4 * 365_000))


def saving(mean: float | None, low: float | None, high: float | None) -> Estimate:
    return Estimate("saving", 9, mean, None, low, high)


def test_break_even_by_hand() -> None:
    """2,000 dollars, 1,000 requests a day for 4 years: 1.46 million requests."""

    def found(seconds: float = 10.0, *given: float | None) -> dict[str, float | None]:
        even = costs.break_even(saving(*given), seconds, GIVEN)  # type: ignore[arg-type]
        return {name.removeprefix("break_even_"): value for name, value in even.items()}

    soon = found(10.0, 0.01, 0.005, 0.02)
    assert (soon["requests"], soon["requests_low"], soon["requests_high"]) == (200_000, 100_000, 400_000)
    assert soon["years"] == pytest.approx(200 / 365)
    assert soon["utilisation"] == pytest.approx(2_000_000 / (4 * 365 * 86400))
    assert found(10.0, 0.001, 0.0005, 0.002)["requests"] == 2_000_000
    open_ended = found(10.0, 0.01, -0.001, 0.02)
    assert (open_ended["requests_low"], open_ended["requests_high"]) == (100_000, None)
    assert found(10.0, 0.01, None, None) == soon | {"requests_low": None, "requests_high": None}


@pytest.mark.parametrize(
    "mean, seconds", [(0.0, 1.0), (-1.0, 1.0), (0.01, 1000.0), (1e-320, 0.0), (None, 1.0)]
)
def test_a_break_even_that_never_comes_is_absent(mean: float | None, seconds: float) -> None:
    assert costs.break_even(saving(mean, None, None), seconds, GIVEN) == {}


def test_a_slow_model_never_breaks_even() -> None:
    slow = costs.cost_summary([sample(1000.0)], CPU)
    assert slow["savings_percent"] < 0 and "break_even_years" not in slow


def test_the_interval_of_the_break_even_covers_a_planted_truth() -> None:
    """Runs of 15 prompts whose energy varies like a latency; the truth is that of all prompts."""
    random, covered, runs = np.random.default_rng(0), 0, 200
    price = 160 * 0.6e-6  # of an answer of 640 characters, prompts free
    mean_joules = 600.0
    truth = GIVEN.hardware_usd / (price - costs.electricity_usd(mean_joules, GIVEN.tariff_usd_per_kwh))
    for _ in range(runs):
        joules = random.gamma(4.0, mean_joules / 4.0, 15)
        rows = [
            sample(1.0, energy, text="x" * 640, prompt="", prompt_id=str(i))
            for i, energy in enumerate(joules)
        ]
        found = costs.cost_summary(rows, CPU)
        low, high = (found.get(f"break_even_requests_{end}", math.inf) for end in ("low", "high"))
        covered += low <= truth <= high
    assert 0.91 <= covered / runs <= 0.99


@pytest.mark.parametrize("samples", [[], [sample(error="no")], [sample(share_s=None)]])
def test_what_cannot_be_computed_is_absent(samples: list[Sample]) -> None:
    found = costs.cost_summary(samples, CPU)
    assert "usd_per_request" not in found and "usd_per_piece" not in found
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
