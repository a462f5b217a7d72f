"""What disturbed a measurement: other processes, a changing clock, throttling.

Each pass that generates rows appends one ``NoisePass`` to noise.jsonl beside them, with the keys of its rows,
so that a row always finds the conditions under which it was made. Only the processor is looked at: another
program on the same GPU is not seen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nbhelpers import store
from nbhelpers.records import SCHEMA_VERSION, Record

MOST_LOAD = 0.10  # of all cores' time used by others; above it a run is called noisy (a choice)
MOST_DRIFT = 0.10  # change of the time that a fixed work takes, from before a pass to after it (a choice)
SPIN_TRIES = 10
FILE = "noise.jsonl"

Times = tuple[float, float, float]  # wall, all cores' busy time, this process's share of it; seconds


@dataclass(frozen=True)
class Moment(Record):
    """The machine at one moment of a pass: before, at the end of, and after the generation."""

    other_load: float  # 0..1: share of all cores' time used by other processes since the last reading
    spin_s: float | None  # time of a fixed piece of work; None at the end of the generation
    frequency_mhz: float | None  # mean of the cores
    throttled: int | None  # thermal throttling events since boot


@dataclass(frozen=True)
class NoisePass(Record):
    """A row of noise.jsonl: the conditions under which some rows of a model were made."""

    keys: tuple[str, ...]  # of the rows
    before: Moment
    during: Moment
    after: Moment
    other_load: float  # 0..1, from the beginning of before to the end of after
    warm_ups: int  # generations before the first timed one, in no row
    schema_version: int = SCHEMA_VERSION


@contextmanager
def recorded(path: Path | None, keys: Sequence[str], warm_ups: int = 0) -> Iterator[None]:
    """Record the conditions under which the rows ``keys`` of the file ``path`` are made, if there are any."""
    if path is None or not keys:
        yield
        return
    start = cpu_times()
    before = _moment(start, spin())
    middle = cpu_times()
    try:
        yield
    finally:
        during = _moment(middle)  # read at once: the clock is still the one of the work
        end = cpu_times()
        after = _moment(end, spin())
        load = other_load(start, cpu_times())
        store.append_row(path.with_name(FILE), NoisePass(tuple(keys), before, during, after, load, warm_ups))


def passes(folder: Path, keys: Iterable[str]) -> list[NoisePass]:
    """The passes of a model's folder that made any of the rows ``keys``, oldest first."""
    wanted = set(keys)
    return [found for found in store.read_rows(folder / FILE, NoisePass) if wanted & set(found.keys)]


def verdict(found: Sequence[NoisePass]) -> str:
    """ "quiet", "noisy: " with the reasons, or "not recorded": the words beside every timing of a run.

    Thresholds: others use more than MOST_LOAD of the cores' time, the fixed work takes MOST_DRIFT longer or
    shorter after a pass than before, or the processor reports that it throttled.
    """
    if not found:
        return "not recorded"
    reasons = []
    if (load := max(p.other_load for p in found)) > MOST_LOAD:
        reasons.append(f"{load:.0%} load by other processes")
    if abs(change := max((drift(p) for p in found), key=abs)) > MOST_DRIFT:
        reasons.append(f"clock drift of {change:+.0%}")
    if any((p.after.throttled or 0) > (p.before.throttled or 0) for p in found):
        reasons.append("the processor throttled")
    return f"noisy: {', '.join(reasons)}" if reasons else "quiet"


def metrics(found: Sequence[NoisePass]) -> dict[str, float]:
    """The worst of the passes under ``noise/…``, and how many warm-ups no row shows; empty without passes."""
    if not found:
        return {}
    return {
        "noise/other_load": max(p.other_load for p in found),
        "noise/clock_drift": max((drift(p) for p in found), key=abs),
        "latency/warm_ups_excluded": float(sum(p.warm_ups for p in found)),
    }


def drift(found: NoisePass) -> float:
    """Change of the fixed work's time over a pass: +0.1 is 10% slower afterwards."""
    before, after = found.before.spin_s, found.after.spin_s
    return after / before - 1 if before and after else 0.0


def spin(clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of a fixed piece of work (about 10 ms), the best of a few: others only add time."""
    tries = []
    for _ in range(SPIN_TRIES):
        started = clock()
        sum(range(500_000))
        tries.append(clock() - started)
    return min(tries)


def cpu_times() -> Times:
    """Wall clock, busy time of all cores, and that of this process with its children (psutil)."""
    import psutil

    machine, me = psutil.cpu_times(), psutil.Process()
    idle = machine.idle + getattr(machine, "iowait", 0.0)
    guests = getattr(machine, "guest", 0.0) + getattr(machine, "guest_nice", 0.0)  # are in user and nice too
    own = me.cpu_times()
    mine = sum(own[:4])  # user and system, of the process and of its children that ended
    for child in me.children(recursive=True):
        try:
            mine += sum(child.cpu_times()[:2])
        except psutil.Error:  # it ended while we looked: its time is in the parent's from now on
            continue
    return time.monotonic(), sum(machine) - guests - idle, mine


def other_load(first: Times, last: Times) -> float:
    """Share of all cores' time, 0..1, that other processes used between two readings (10 ms resolution)."""
    import psutil

    wall, busy, mine = (b - a for a, b in zip(first, last, strict=True))
    cores = psutil.cpu_count() or 1
    return min(1.0, max(0.0, (busy - mine) / (wall * cores))) if wall > 0 else 0.0


def _moment(since: Times, spin_s: float | None = None) -> Moment:
    return Moment(other_load(since, cpu_times()), spin_s, _frequency(), throttle_events())


def _frequency() -> float | None:
    """Mean clock of the cores in MHz, where the system tells (a virtual machine may report a constant)."""
    import psutil

    try:
        now = psutil.cpu_freq()
    except (AttributeError, OSError, NotImplementedError):
        return None
    return float(now.current) if now and now.current else None


def throttle_events(cpus: Path = Path("/sys/devices/system/cpu")) -> int | None:
    """Thermal throttling events of all cores since boot (Linux on Intel); None where nothing counts them."""
    counts = [int(path.read_text()) for path in cpus.glob("cpu[0-9]*/thermal_throttle/core_throttle_count")]
    return sum(counts) if counts else None
