"""The decode bound by hand-worked numbers; of the measurement only what holds on every machine."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tiny_models import FAMILIES, build

from tools import roofline

MIB = 2**20


def planted(patch: pytest.MonkeyPatch, bandwidth: Callable[[float], float], operations_per_s: float) -> None:
    patch.setattr(roofline, "bandwidth", lambda size, device, dtype: bandwidth(size))
    patch.setattr(roofline, "operations_per_s", lambda device, dtype: operations_per_s)


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
def test_the_bound_by_hand(
    weights: int, cache: int, rows: int, tokens_per_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 GB/s from the cache up to 1 MiB, 10 GB/s beyond; 100 billion operations a second."""
    planted(monkeypatch, lambda size: 40e9 if size <= MIB else 10e9, 100e9)
    assert roofline.decode_bound("cpu", "float32", weights, cache, rows) == pytest.approx(tokens_per_s)


def test_half_formats_do_twice_the_operations_per_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, lambda size: 1e12, 1e12)
    # 2 GB are 1e9 weights: 2e12 operations for 1,000 rows take 2 s, their reading 0.002 s
    assert roofline.decode_bound("cuda", "bfloat16", 2_000_000_000, 0, 1000) == pytest.approx(500.0)


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
    assert roofline.bytes_per_step(model) == total - sum(p.nbytes for p in looked_up)
    model.get_output_embeddings().weight = model.get_input_embeddings().weight  # tied: now it is read whole
    tied = sum(p.nbytes for p in model.parameters())
    positions = sum(p.nbytes for p in looked_up if p is not model.get_input_embeddings().weight)
    assert roofline.bytes_per_step(model) == tied - positions


def test_a_measurement_is_plausible_and_no_larger_than_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "MEASURE_S", 0.02)
    monkeypatch.setattr(roofline, "LARGEST", 4 * MIB)
    read = list[tuple[int, ...]]()
    real = roofline._seconds
    monkeypatch.setattr(roofline, "_seconds", lambda call, a, *rest: read.append(a) or real(call, a, *rest))
    for size in (MIB, 2**40):
        assert 1e6 < roofline.bandwidth(size) < 1e13
    assert read == [(256, 1024), (1024, 1024)] and 1e6 < roofline.operations_per_s() < 1e15
