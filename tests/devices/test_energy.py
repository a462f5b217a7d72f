"""Energy counters: a planted powercap tree, planted clocks, and the machine's own."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbhelpers.devices import meters
from nbhelpers.devices.meters import Ledger, Share


def plant(tree: Path, zone: str, name: str, microjoules: int, around: int = 1_000_000_000) -> None:
    folder = tree / zone
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in {"name": name, "energy_uj": microjoules, "max_energy_range_uj": around}.items():
        (folder / file).write_text(f"{text}\n")


def test_two_packages_are_added_and_nothing_is_counted_twice(tmp_path: Path) -> None:
    plant(tmp_path, "intel-rapl:0", "package-0", 5_000_000)
    plant(tmp_path, "intel-rapl:0:0", "core", 4_000_000)  # a part of package 0
    plant(tmp_path, "intel-rapl:0:1", "dram", 3_000_000)
    plant(tmp_path, "intel-rapl:1", "package-1", 7_000_000)
    plant(tmp_path, "intel-rapl:2", "psys", 99_000_000)  # the whole board, packages included
    plant(tmp_path, "intel-rapl-mmio:0", "package-0", 5_000_000)  # package 0 once more
    before = meters.read_energy("cpu", tmp_path)
    assert before == ((5.0, 1000.0), (7.0, 1000.0))
    plant(tmp_path, "intel-rapl:0", "package-0", 6_500_000)
    plant(tmp_path, "intel-rapl:0:0", "core", 5_400_000)
    plant(tmp_path, "intel-rapl:1", "package-1", 7_250_000)
    assert meters.spent_joules(before, meters.read_energy("cpu", tmp_path)) == pytest.approx(1.75)


@given(st.integers(0, 999), st.integers(0, 999), st.integers(0, 999))
def test_a_counter_that_starts_again_loses_nothing(start: int, first: int, second: int) -> None:
    """Two counters of range 1,000 J, read as the hardware shows them: modulo their range."""
    before = (float(start), 1000.0), (0.0, 1000.0)
    after = ((start + first) % 1000, 1000.0), (float(second), 1000.0)
    assert meters.spent_joules(before, after) == pytest.approx(first + second)


def test_a_wrap_in_the_tree(tmp_path: Path) -> None:
    plant(tmp_path, "intel-rapl:0", "package-0", 262_143_000_000, 262_143_328_850)
    before = meters.read_energy("cpu", tmp_path)
    plant(tmp_path, "intel-rapl:0", "package-0", 671_150, 262_143_328_850)
    assert meters.spent_joules(before, meters.read_energy("cpu", tmp_path)) == pytest.approx(1.0, abs=1e-6)


def test_a_counter_that_went_back_without_a_known_range_is_no_measurement() -> None:
    assert meters.spent_joules(((9.0, 0.0),), ((8.0, 0.0),)) is None


def test_without_a_counter_that_can_be_read_there_is_no_number(tmp_path: Path) -> None:
    missing = meters.read_energy("cpu", tmp_path / "absent")
    plant(tmp_path, "intel-rapl:0", "package-0", 1)
    good = meters.read_energy("cpu", tmp_path)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("")
    broken = meters.read_energy("cpu", tmp_path)
    assert (
        missing == broken == meters.read_energy("mps", tmp_path) == meters.read_energy("xpu", tmp_path) == ()
    )
    for before, after in ((missing, missing), (good, broken), (broken, good)):
        assert meters.spent_joules(before, after) is None


def test_a_counter_that_only_root_may_read_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(tmp_path, "intel-rapl:0", "package-0", 1)
    plain = Path.read_text

    def refused(path: Path) -> str:  # the tests may run as root, whom file modes do not stop
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return plain(path)

    monkeypatch.setattr(Path, "read_text", refused)
    assert meters.read_energy("cpu", tmp_path) == ()


def test_this_machine_has_a_counter_or_none() -> None:
    before, after = meters.read_energy(), meters.read_energy()
    assert (meters.spent_joules(before, after) is None) == (not before)


class NVMLError(Exception):
    pass


def card(monkeypatch: pytest.MonkeyPatch, millijoules: int | None) -> None:
    """A driver with one card, or (None) a card too old to count. No machine of the tests has one."""

    def total(handle: str) -> int:
        assert handle == "card GPU-1234"
        if millijoules is None:
            raise NVMLError("Not Supported")
        return millijoules

    names = {
        "NVMLError": NVMLError,
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByUUID": lambda uuid: f"card {uuid}",
        "nvmlDeviceGetTotalEnergyConsumption": total,
    }
    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(**names))
    properties = {0: SimpleNamespace(uuid="1234")}
    monkeypatch.setattr("torch.cuda.get_device_properties", properties.__getitem__)


def test_nvml_counts_millijoules_of_the_card_that_torch_means(monkeypatch: pytest.MonkeyPatch) -> None:
    card(monkeypatch, 12_500)
    before = meters.read_energy("cuda")
    card(monkeypatch, 14_000)
    assert meters.spent_joules(before, meters.read_energy("cuda")) == pytest.approx(1.5)
    card(monkeypatch, None)
    assert meters.read_energy("cuda") == ()
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert meters.read_energy("cuda") == ()


def test_live_rows_share_a_batch_equally(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows: all alive for 3 s, two for 2 s more, one for 1 s more; 10 W, 20 W and 40 W."""
    times = iter([100.0, 103.0, 105.0, 106.0])
    joules = iter([500.0, 530.0, 570.0, 610.0])
    monkeypatch.setattr(meters, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    monkeypatch.setattr(meters, "read_energy", lambda device: ((next(joules), 1000.0),))
    ledger = Ledger("cpu")
    first, second, third = (ledger.charge(alive) for alive in (3, 2, 1))
    assert (first, second, third) == (Share(1.0, 10.0), Share(2.0, 30.0), Share(3.0, 70.0))
    shares = (first, second, third)
    assert sum(share.seconds for share in shares) == 6 and sum(share.joules or 0 for share in shares) == 110
    assert third.since(first) == Share(2.0, 60.0)


def test_a_counter_that_fails_once_leaves_the_batch_unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = ((1.0, 9.0),), ()
    readings = iter([good, bad, good])
    monkeypatch.setattr(meters, "read_energy", lambda device: next(readings))
    ledger = Ledger("cpu")
    assert ledger.charge(1).joules is None and ledger.charge(1).joules is None
