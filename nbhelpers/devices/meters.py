"""Memory of a stretch of work, and whether something is left behind each time it runs."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from nbhelpers.devices import device as devices
from nbhelpers.loading import load as loading
from nbhelpers.records import LabError

LEAK_FLOOR = 4096  # bytes a call, one page: less is not told from the allocator's own coming and going
LEAK_CALLS, LEAK_WARM_UP = 50, 5
RESTS_PER_READING = 20  # a reading of private memory may take 1 part in this of the time


@dataclass(frozen=True)
class MemoryUse:
    """Bytes. Private memory is what ends with the process (USS); None where the system does not tell."""

    parameter_bytes: int | None  # of the model given, tied weights once
    device_peak_bytes: int | None  # of the device's allocator; None on a CPU
    process_before_bytes: int  # resident: private and shared
    process_after_bytes: int
    process_peak_bytes: int
    process_peak_by: Literal["kernel", "sampling"]  # sampling misses peaks between two readings
    private_before_bytes: int | None
    private_after_bytes: int | None
    private_peak_bytes: int | None  # by sampling


class Tracker:
    """What :func:`track_memory` yields; ``use`` is there when the block has ended."""

    use: MemoryUse

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._resident: list[int] = []
        self._private: list[int] = []

    def read(self) -> None:
        self._resident.append(devices.resident_memory())
        if (private := private_memory()) is not None:
            self._private.append(private)

    def watch(self) -> None:
        """Read until stopped, and rest long enough not to slow down what is measured."""
        took = 0.0
        while not self._stop.wait(max(0.005, RESTS_PER_READING * took)):
            started = time.perf_counter()
            self.read()
            took = time.perf_counter() - started

    def finish(self, device: str, model: Any, by_kernel: bool) -> None:
        self._stop.set()
        peak = devices.peak_memory("cpu") if by_kernel else None
        self.read()
        resident, private = self._resident, self._private
        self.use = MemoryUse(
            parameter_bytes=None if model is None else loading.parameter_bytes(model),
            device_peak_bytes=None if device == "cpu" else devices.peak_memory(device),
            process_before_bytes=resident[0],
            process_after_bytes=resident[-1],
            process_peak_bytes=max(resident) if peak is None else peak,
            process_peak_by="sampling" if peak is None else "kernel",
            private_before_bytes=private[0] if private else None,
            private_after_bytes=private[-1] if private else None,
            private_peak_bytes=max(private) if private else None,
        )


@contextmanager
def track_memory(device: str = "cpu", model: Any = None) -> Iterator[Tracker]:
    """Meter the memory of a block: ``with track_memory() as meter: ...``, then ``meter.use``.

    The process's peak is the kernel's (VmHWM, set back at the start; proc(5)), which misses nothing; where
    it cannot be set back it comes from readings in between, and ``process_peak_by`` says so. One block at a
    time: a block inside another one, or ``devices.reset_peak``, starts the outer peak anew.
    """
    tracker = Tracker()
    if device != "cpu":
        devices.reset_peak(device)
    by_kernel = devices.reset_peak("cpu")
    tracker.read()
    watcher = threading.Thread(target=tracker.watch, name="watch", daemon=True)
    watcher.start()
    try:
        yield tracker
    finally:
        devices.synchronize(device)
        tracker.finish(device, model, by_kernel)
        watcher.join()


def private_memory() -> int | None:
    """Bytes that only this process holds (unique set size, ``psutil``), or None. Takes milliseconds."""
    import psutil

    try:
        return int(psutil.Process().memory_full_info().uss)
    except (psutil.AccessDenied, AttributeError, OSError):
        return None


@dataclass(frozen=True)
class Leak:
    """Bytes left behind by each call: the Theil-Sen slope of ``readings`` over the calls, with its interval.

    Theil (1950), Sen (1968): the median of the slopes of all pairs, which a few jumps do not move. The
    interval takes readings to be independent; they are not quite, which is why ``verdict`` has a floor.
    """

    readings: tuple[int, ...]  # bytes held after each call
    slope: float | None
    low: float | None
    high: float | None
    floor: int = LEAK_FLOOR
    level: float = 0.95
    reason: str | None = None

    @property
    def verdict(self) -> Literal["leaks", "no leak found", "cannot tell"]:
        """A leak has its whole interval above the floor; none has it below; in between nobody knows."""
        if self.low is None or self.high is None:
            return "cannot tell"
        return (
            "leaks" if self.low > self.floor else "no leak found" if self.high < self.floor else "cannot tell"
        )


def leak_slope(readings: Sequence[int], level: float = 0.95) -> Leak:
    """The slope of memory readings taken after each of some equal calls, bytes per call.

    Below 10 readings there is no slope but a reason (``scipy.stats.theilslopes``).
    """
    from scipy import stats

    held = tuple(readings)
    if len(held) < 10:
        reason = f"n = {len(held)}: too few calls to tell a trend (10 are needed)"
        return Leak(held, None, None, None, level=level, reason=reason)
    found = stats.theilslopes(held, alpha=level)
    return Leak(held, float(found.slope), float(found.low_slope), float(found.high_slope), level=level)


def leak_test(
    call: Callable[[], object], device: str = "cpu", calls: int = LEAK_CALLS, warm_up: int = LEAK_WARM_UP
) -> Leak:
    """Run the same call again and again and look whether the memory it leaves behind grows.

    First calls fill caches and are left out. Before each reading garbage is collected and freed pages are
    handed back, so that only what something still holds is counted: private memory, the device's allocator.
    Raises LabError where the system does not tell a process's private memory.
    """
    if private_memory() is None:
        raise LabError("This system does not tell a process's private memory: there is no leak test here.")
    for _ in range(warm_up):
        call()
    loading.release(device)
    gc.freeze()  # what is there already need not be looked through at every reading
    readings = []
    try:
        for _ in range(calls):
            call()
            loading.release(device)
            readings.append((private_memory() or 0) + devices.allocated_memory(device))
    finally:
        gc.unfreeze()
    return leak_slope(readings)
