"""The memory that a block of code takes at most: the meter of notebooks 02, 13 and 17."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from nbhelpers.devices import machine


@dataclass
class MemoryUse:
    """Bytes of a block, complete when it has ended."""

    process_before_bytes: int  # resident
    process_peak_bytes: int
    process_peak_by: str  # "kernel", or "sampling", which misses peaks between two readings


@contextmanager
def track_memory() -> Iterator[MemoryUse]:
    """Meter the memory of a block: ``with track_memory() as use: ...``. Blocks must not be nested.

    The peak is the kernel's (VmHWM, set back at the start; proc(5)), or else comes from readings in between.
    """
    by_kernel, ended, before = machine.reset_peak("cpu"), threading.Event(), machine.resident_memory()
    use = MemoryUse(before, before, "kernel" if by_kernel else "sampling")

    def watch() -> None:
        while not ended.wait(0.005):
            use.process_peak_bytes = max(use.process_peak_bytes, machine.resident_memory())

    watcher = threading.Thread(target=watch, name="watch", daemon=True)
    watcher.start()
    try:
        yield use
    finally:
        ended.set()
        watcher.join()
        last = machine.peak_memory("cpu") if by_kernel else machine.resident_memory()
        use.process_peak_bytes = max(use.process_peak_bytes, last or 0)
