"""The decode bound by hand-worked numbers; of the measurement only what holds on every machine."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from tiny_models import FAMILIES, build

from nbhelpers import store
from nbhelpers.devices import fit
from nbhelpers.devices.fit import MachineSpeed

MIB = 2**20
# 40 GB/s from the cache up to 1 MiB, 10 GB/s from 4 MiB on; 100 billion operations a second
SPEED = MachineSpeed("cpu", "float32", (MIB, 4 * MIB), (40e9, 10e9), 100e9)


@pytest.mark.parametrize(
    ("weights", "cache", "rows", "tokens_per_s"),
    [
        (2_000_000_000, 0, 1, 5.0),  # 2 GB at 10 GB/s: 0.2 s; 1e9 operations: 0.01 s
        (1_900_000_000, 100_000_000, 1, 5.0),  # the cache is read as well
        (2_000_000_000, 0, 8, 40.0),  # eight rows share one reading
        (2_000_000_000, 0, 40, 100.0),  # 4e10 operations take 0.4 s: arithmetic decides
        (1_000_000_000, 250_000_000, 4, 20.0),  # each row brings its own cache
        (400_000, 0, 1, 100_000.0),  # fits the cache: 40 GB/s
    ],
)
def test_the_bound_by_hand(weights: int, cache: int, rows: int, tokens_per_s: float) -> None:
    assert fit.decode_bound(SPEED, weights, cache, rows) == pytest.approx(tokens_per_s)


def test_half_formats_do_twice_the_operations_per_byte() -> None:
    half = MachineSpeed("cuda", "bfloat16", (MIB,), (1e12,), 1e12)
    # 2 GB are 1e9 weights: 2e12 operations for 1,000 rows take 2 s, their reading 0.002 s
    assert fit.decode_bound(half, 2_000_000_000, 0, 1000) == pytest.approx(500.0)


def test_bandwidth_between_two_sizes_is_read_on_a_logarithmic_scale() -> None:
    assert fit.bandwidth_at(SPEED, 2 * MIB) == pytest.approx(25e9)
    assert fit.bandwidth_at(SPEED, 100) == 40e9 and fit.bandwidth_at(SPEED, 10**12) == 10e9


@pytest.mark.parametrize("family", FAMILIES)
def test_tables_that_are_looked_up_are_not_read(family: str) -> None:
    model = build(family)
    names = dict(model.named_parameters())
    looked_up = [
        p for name, p in names.items() if "embed" in name.split(".")[-2] or ".wte." in name or ".wpe." in name
    ]
    looked_up = [p for p in looked_up if p.ndim == 2]
    assert looked_up
    total = sum(p.nbytes for p in names.values())
    assert fit.bytes_per_step(model) == total - sum(p.nbytes for p in looked_up)
    model.get_output_embeddings().weight = model.get_input_embeddings().weight  # tied: now it is read whole
    tied = sum(p.nbytes for p in model.parameters())
    positions = sum(p.nbytes for p in looked_up if p is not model.get_input_embeddings().weight)
    assert fit.bytes_per_step(model) == tied - positions


def test_a_measurement_is_plausible_and_made_once_per_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "SIZES", (MIB, 4 * MIB))
    monkeypatch.setattr(fit, "measure", lambda *args, real=fit.measure: real(*args, seconds=0.05))
    speed = fit.machine_speed(tmp_path, "cpu", "float32")
    assert speed.sizes_bytes == (MIB, 4 * MIB)
    assert all(
        1e6 < b < 1e13 and math.isfinite(b) for b in (*speed.bandwidth_bytes_per_s, speed.operations_per_s)
    )
    assert list(speed.bandwidth_bytes_per_s) == sorted(speed.bandwidth_bytes_per_s, reverse=True)
    assert fit.machine_speed(tmp_path, "cpu", "float32") == speed
    assert [path.name for path in tmp_path.iterdir()] == ["speed_cpu_float32.json"]
    assert store.read_json(tmp_path / "speed_cpu_float32.json", MachineSpeed) == speed
