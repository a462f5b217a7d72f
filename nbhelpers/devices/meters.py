"""Meters of a stretch of work: its energy, and what disturbed it meanwhile."""

from __future__ import annotations

import time
import timeit
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from nbhelpers import store
from nbhelpers.records import SCHEMA_VERSION, Lenient

MOST_LOAD = 0.10  # of all cores' time used by others; above it a pass is called noisy (a choice)
MOST_DRIFT = 0.10  # change of the time that a fixed work takes, from before a pass to after it (a choice)
NOISE_FILE = "noise.jsonl"

Times = tuple[float, float, float]  # wall, all cores' busy time, this process's share of it; seconds
# For each processor package or card: joules from some start, and where they begin again (0: not known).
Counters = tuple[tuple[float, ...], ...]


def read_energy(device: str = "cpu", powercap: Path = Path("/sys/class/powercap")) -> Counters:
    """The energy counters behind a device now; none where they cannot be read, as often only root may.

    RAPL (docs.kernel.org/power/powercap/powercap.html) covers whole processor packages, idle power included,
    but no memory modules. NVML covers PyTorch's first card, from Volta on.
    """
    with suppress(Exception):  # no nvidia-ml-py; no right to read; NVML's errors have no common base
        if device == "cuda":
            import pynvml
            import torch

            pynvml.nvmlInit()
            # By name: CUDA_VISIBLE_DEVICES renumbers cards for torch and not for NVML.
            card = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(0).uuid}")
            return ((pynvml.nvmlDeviceGetTotalEnergyConsumption(card) / 1e3, 0.0),)
        if device == "cpu":
            # Zones inside a package, "psys" around it and intel-rapl-mmio count the same energy again.
            zones = [zone for zone in sorted(powercap.glob("intel-rapl:*")) if zone.name.count(":") == 1]
            zones = [zone for zone in zones if (zone / "name").read_text().startswith("package")]
            files = ("energy_uj", "max_energy_range_uj")
            return tuple(tuple(int((zone / file).read_text()) / 1e6 for file in files) for zone in zones)
    return ()


def spent_joules(before: Counters, after: Counters) -> float | None:
    """Joules between two readings; None without a counter, or if one went back and has no known range."""
    if not before or len(before) != len(after):
        return None
    pairs = zip(before, after, strict=True)
    joules = [last - first + (wraps_at if last < first else 0.0) for (first, wraps_at), (last, _) in pairs]
    return sum(joules) if min(joules) >= 0 else None


@dataclass(frozen=True)
class Share:
    """What one row took of its machine: seconds, and joules where they were measured."""

    seconds: float
    joules: float | None

    def since(self, earlier: Share) -> Share:
        """The share of a row that joined when ``Ledger.charge`` returned ``earlier``."""
        joules = None if self.joules is None else self.joules - (earlier.joules or 0.0)
        return Share(self.seconds - earlier.seconds, joules)


class Ledger:
    """Splits the time and the energy of a batch among the live rows, equally: each gets a token a step.

    Of our own, because libraries (codecarbon, zeus) meter a process and not the rows of a batch.
    """

    def __init__(self, device: str) -> None:
        self._device, self._share = device, Share(0.0, 0.0)
        self._time, self._reading = time.perf_counter(), read_energy(device)

    def charge(self, alive: int) -> Share:
        """Split what was spent since the last call; returns what a row that was there all along has paid."""
        now, reading = time.perf_counter(), read_energy(self._device)
        joules, paid = spent_joules(self._reading, reading), self._share.joules
        total = None if joules is None or paid is None else paid + joules / alive
        self._share = Share(self._share.seconds + (now - self._time) / alive, total)
        self._time, self._reading = now, reading
        return self._share


@dataclass(frozen=True)
class Moment(Lenient):
    """The machine before or after a pass."""

    spin_s: float | None  # time of a fixed piece of work: also throttling changes it


@dataclass(frozen=True)
class NoisePass(Lenient):
    """A row of noise.jsonl: the conditions under which rows were made. Other work on a GPU is not seen."""

    keys: tuple[str, ...]  # of the rows
    before: Moment
    after: Moment
    other_load: float  # 0..1, from the beginning of before to the end of after
    busiest: str = ""  # of the other programs
    schema_version: int = SCHEMA_VERSION


@contextmanager
def recorded(rows: Mapping[Path, Sequence[str]]) -> Iterator[list[Times]]:
    """Record the conditions under which rows are made, for each of their files by their keys, if any.

    Times that are appended to the list, in which other processes worked for this one, are left out.
    """
    if not rows:
        yield []
        return
    start, seconds_before, before = cpu_times(), programs(), Moment(spin())
    delegated = list[Times]()
    try:
        yield delegated
    finally:
        after, used = Moment(spin()), dict[str, float]()
        for (pid, name), seconds in programs().items():
            used[name] = used.get(name, 0.0) + seconds - seconds_before.get((pid, name), 0.0)
        busiest = max(used, key=lambda name: used[name], default="")
        left_out = [sum(times) for times in zip(*delegated, strict=True)] or (0.0, 0.0, 0.0)
        wall, busy, mine = (a - b for a, b in zip(cpu_times(), left_out, strict=True))
        load = other_load(start, (wall, busy, mine))
        for path, keys in rows.items():
            if keys:
                row = NoisePass(tuple(keys), before, after, load, busiest)
                store.append_row(path.with_name(NOISE_FILE), row)


def passes(folder: Path, keys: Iterable[str]) -> list[NoisePass]:
    """The passes of a model's folder that made any of the rows ``keys``, oldest first."""
    wanted = set(keys)
    return [row for row in store.read_rows(folder / NOISE_FILE, NoisePass) if wanted & set(row.keys)]


def verdict(rows: Sequence[NoisePass]) -> str:
    """ "quiet", "noisy: " with the reasons, or "not recorded": the words beside every timing of a run."""
    if not rows:
        return "not recorded"
    worst, reasons = metrics(rows), []
    if (load := worst["noise/other_load"]) > MOST_LOAD:
        busiest = max(rows, key=lambda row: row.other_load).busiest
        reasons.append(f"{load:.0%} load by other processes{f', above all {busiest}' if busiest else ''}")
    if abs(drift := worst["noise/clock_drift"]) > MOST_DRIFT:
        reasons.append(f"clock drift of {drift:+.0%}")
    return f"noisy: {', '.join(reasons)}" if reasons else "quiet"


def metrics(rows: Sequence[NoisePass]) -> dict[str, float]:
    """The worst of the passes; empty without any. Clock drift: +0.1 is 10% slower after a pass."""
    if not rows:
        return {}
    spins = ((row.before.spin_s, row.after.spin_s) for row in rows)
    drift = max((after / before - 1 for before, after in spins if before and after), key=abs, default=0.0)
    return {"noise/other_load": max(row.other_load for row in rows), "noise/clock_drift": drift}


def spin() -> float:
    """Seconds of a fixed piece of work (about 10 ms), the best of ten: others only add time."""
    return min(timeit.repeat(lambda: sum(range(500_000)), number=1, repeat=10))


def cpu_times() -> Times:
    """Wall clock, busy time of all cores, and that of this process with its children (psutil)."""
    idle, mine = ("idle", "iowait", "guest", "guest_nice"), 0.0  # guests are in user and nice too
    busy = sum(seconds for kind, seconds in psutil.cpu_times()._asdict().items() if kind not in idle)
    for process in (me := psutil.Process(), *me.children(recursive=True)):
        with suppress(psutil.Error):  # it ended meanwhile: its time is in the parent's from now on
            mine += sum(process.cpu_times()[:4])  # user and system, and those of its children that ended
    return time.monotonic(), busy, mine


def programs() -> dict[tuple[int, str], float]:
    """CPU seconds of every program but this one, its children and its parent, by process id and name."""
    ours = {(me := psutil.Process()).pid, me.ppid(), *(child.pid for child in me.children(recursive=True))}
    seconds = dict[tuple[int, str], float]()
    for process in psutil.process_iter(["name", "cpu_times"]):
        if process.pid not in ours and (times := process.info["cpu_times"]):
            seconds[process.pid, process.info["name"] or "?"] = sum(times[:2])
    return seconds


def other_load(first: Times, last: Times) -> float:
    """Share of all cores' time, 0..1, that other processes used between two readings (10 ms resolution)."""
    wall, busy, mine = (b - a for a, b in zip(first, last, strict=True))
    return min(1.0, max(0.0, (busy - mine) / (wall * (psutil.cpu_count() or 1)))) if wall > 0 else 0.0
