"""The conditions of a measurement: planted load and drift, and the words that go beside a timing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from nbhelpers import store
from nbhelpers.devices import meters
from nbhelpers.devices.meters import Moment, NoisePass

CALM = Moment(0.010)
QUIET = NoisePass(("a", "b"), CALM, CALM, 0.02)
BURN = "print(flush=True)\nwhile True: pass"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "quiet"),
        ({"other_load": 0.10}, "quiet"),
        ({"other_load": 0.484}, "noisy: 48% load by other processes"),
        ({"after": replace(CALM, spin_s=0.0109)}, "quiet"),
        ({"after": replace(CALM, spin_s=0.0125)}, "noisy: clock drift of +25%"),
        ({"after": replace(CALM, spin_s=0.0080)}, "noisy: clock drift of -20%"),
    ],
)
def test_the_words_say_what_crossed_its_threshold(changes: dict[str, object], words: str) -> None:
    one = replace(QUIET, **changes)  # type: ignore[arg-type]
    assert meters.verdict([one]) == meters.verdict([QUIET, one]) == meters.verdict([one, QUIET]) == words


def test_without_a_record_nothing_is_called_quiet(tmp_path: Path) -> None:
    assert meters.verdict([]) == meters.verdict(meters.passes(tmp_path, ["a"])) == "not recorded"
    assert meters.metrics([]) == {}


def test_a_row_finds_the_pass_that_made_it(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    with meters.recorded({path: ["a", "b"]}):
        pass
    with meters.recorded({path: ["c"], tmp_path / "lost" / "samples.jsonl": []}):
        pass
    with meters.recorded({}):
        pass  # nothing was made, or nothing is kept
    assert not (tmp_path / "lost").exists()
    assert [p.keys for p in store.read_rows(tmp_path / meters.NOISE_FILE, NoisePass)] == [("a", "b"), ("c",)]
    assert [p.keys for p in meters.passes(tmp_path, ["b", "z"])] == [("a", "b")]


def test_a_pass_that_fails_is_recorded_too(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), meters.recorded({tmp_path / "samples.jsonl": ["a"]}):
        raise KeyboardInterrupt
    assert len(meters.passes(tmp_path, ["a"])) == 1


def test_a_planted_burner_is_load_by_others_and_our_own_work_is_not(tmp_path: Path) -> None:
    """A shell of its own starts the burner, so that it is nobody's child here; it counts as another's."""
    started = meters.cpu_times()
    spins = time.perf_counter()
    while time.perf_counter() - spins < 0.5:
        meters.spin()
    wall, busy, mine = (b - a for a, b in zip(started, meters.cpu_times(), strict=True))
    assert 0 < mine <= busy + 0.05 and mine <= wall + 0.05  # one thread
    child = subprocess.Popen([sys.executable, "-c", BURN], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        first = meters.cpu_times()
        time.sleep(0.5)
        last = meters.cpu_times()
        import psutil

        used = sum(psutil.Process(child.pid).cpu_times()[:2])
    finally:
        child.kill()
        child.communicate()
    assert last[2] - first[2] == pytest.approx(min(used, 0.5), abs=0.3)  # a child's work is ours
    without_us = (first[0], first[1], 0.0), (last[0], last[1], 0.0)
    assert meters.other_load(*without_us) > meters.other_load(first, last)


@pytest.mark.parametrize(
    ("mine", "cores", "load"), [(0.0, 2, 0.5), (1.0, 2, 0.25), (2.0, 2, 0.0), (9.0, 2, 0.0), (0.0, 4, 0.25)]
)
def test_load_by_hand(monkeypatch: pytest.MonkeyPatch, mine: float, cores: int, load: float) -> None:
    monkeypatch.setattr("psutil.cpu_count", lambda: cores)
    assert meters.other_load((10.0, 100.0, 5.0), (12.0, 102.0, 5.0 + mine)) == pytest.approx(load)


def test_a_row_of_an_older_release_is_read(tmp_path: Path) -> None:
    moment = '{"other_load": 0.3, "spin_s": 0.01, "frequency_mhz": null, "throttled": 5}'
    row = f'"keys": ["a"], "before": {moment}, "during": {moment}, "after": {moment}, "other_load": 0.02'
    text = "{" + row + ', "warm_ups": 1, "schema_version": 1}\n'
    (tmp_path / meters.NOISE_FILE).write_text(text)
    assert meters.passes(tmp_path, ["a"]) == [NoisePass(("a",), CALM, CALM, 0.02)]


@pytest.mark.skipif(sys.platform != "linux", reason="names itself by prctl(2)")
def test_the_program_that_disturbs_is_named(tmp_path: Path) -> None:
    """A burner with a name of its own, started by a shell that is gone: nobody's child here."""
    code = "import ctypes; ctypes.CDLL(None).prctl(15, b'burner'); print(flush=True)\nwhile True: pass"
    (said := tmp_path / "said").touch()
    started = f'"{sys.executable}" -c "$0" >"$1" 2>&1 & echo $!'
    told = subprocess.run(["sh", "-c", started, code, str(said)], stdout=subprocess.PIPE, text=True)
    try:
        while not said.read_text():
            time.sleep(0.01)
        before = meters.programs()
        [burner] = [program for program in before if program[1] == "burner"]
        with meters.recorded({tmp_path / "samples.jsonl": ["a"]}):
            while meters.programs()[burner] < before[burner] + 0.1:
                time.sleep(0.1)
        [found] = meters.passes(tmp_path, ["a"])
        assert found.busiest and os.getpid() not in {pid for pid, _ in before}
    finally:
        os.kill(int(told.stdout), signal.SIGKILL)
