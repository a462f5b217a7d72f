"""Energy that was measured: the counters of processors (RAPL) and of NVIDIA cards (NVML).

Where no counter can be read there is no measurement, and ``Reading.reason`` says why; what is assumed
instead is decided in ``costs``. A RAPL counter covers the whole processor package, every other process
and the idle power included, but not the memory modules; an NVML counter covers one whole card, not its host.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Reading:
    """What the counters said at one moment; without counters, ``joules`` is empty and ``reason`` says why."""

    source: str = ""  # "RAPL" or "NVML"
    joules: tuple[float, ...] = ()  # one counter for each processor package or card, from an arbitrary start
    range_j: tuple[float, ...] = ()  # where each counter starts again from zero; 0: not known
    reason: str | None = None


@dataclass(frozen=True)
class Share:
    """What one row took of its machine: seconds, and joules where they were measured."""

    seconds: float
    joules: float | None

    def since(self, earlier: Share) -> Share:
        """What came after an earlier share."""
        metered = self.joules is not None and earlier.joules is not None
        joules = (self.joules or 0.0) - (earlier.joules or 0.0)
        return Share(self.seconds - earlier.seconds, joules if metered else None)


def read(device: str = "cpu", powercap: Path = POWERCAP) -> Reading:
    """The energy counters behind a device now. Never raises: what cannot be read is a reason."""
    kind, _, index = device.partition(":")
    if kind == "cuda":
        return _nvml(int(index or 0))
    if kind == "cpu":
        return _rapl(powercap)
    return Reading(reason=f"no energy counter is known for {kind}")


def spent(before: Reading, after: Reading) -> float | None:
    """Joules between two readings, a counter that started again in between included (once).

    None where there is no counter, or one went back and its range is not known.
    """
    if not before.joules or (before.source, before.range_j) != (after.source, after.range_j):
        return None
    total = 0.0
    for first, last, around in zip(before.joules, after.joules, after.range_j, strict=True):
        step = last - first if last >= first else last - first + around
        if step < 0:
            return None
        total += step
    return total


class Ledger:
    """Splits the time and the energy of a batch among the rows that are alive.

    In every step each live row gets one token, so between two moments all of them pay the same.
    """

    def __init__(
        self,
        device: str,
        clock: Callable[[], float] = time.perf_counter,
        meter: Callable[[str], Reading] = read,
    ) -> None:
        self._device, self._clock, self._meter = device, clock, meter
        self._time, self._reading = clock(), meter(device)
        self._share = Share(0.0, 0.0 if self._reading.joules else None)

    def charge(self, alive: int) -> Share:
        """Split what was spent since the last call among ``alive`` rows.

        Returns what a row that was there from the start has paid so far. A later row's own share is the
        difference to what this returned when it came in.
        """
        now, reading = self._clock(), self._meter(self._device)
        joules, paid = spent(self._reading, reading), self._share.joules
        self._share = Share(
            self._share.seconds + (now - self._time) / alive,
            None if joules is None or paid is None else paid + joules / alive,
        )
        self._time, self._reading = now, reading
        return self._share


def _rapl(powercap: Path) -> Reading:
    """The package zones of Linux's powercap tree (Intel, and AMD since Zen), microjoules.

    Zones below a package (core, uncore, dram) are parts of it or read apart, "psys" contains it, and
    intel-rapl-mmio shows it a second time: none of them is added.
    Source: docs.kernel.org/power/powercap/powercap.html.
    """
    joules, ranges = [], []
    try:
        for zone in sorted(powercap.glob("intel-rapl:*")):
            if zone.name.count(":") == 1 and (zone / "name").read_text().startswith("package"):
                joules.append(int((zone / "energy_uj").read_text()) / 1e6)
                ranges.append(int((zone / "max_energy_range_uj").read_text()) / 1e6)
    except PermissionError:  # since CVE-2020-8694 only root may read them
        return Reading(
            reason="the processor's energy counter may only be read by the administrator (energy_uj)"
        )
    except (OSError, ValueError) as error:
        return Reading(reason=f"the processor's energy counter cannot be read ({type(error).__name__})")
    if not joules:
        return Reading(reason="this machine shows no energy counter of its processor (powercap)")
    return Reading("RAPL", tuple(joules), tuple(ranges))


def _nvml(index: int) -> Reading:
    """The card's counter in millijoules since its driver was loaded; Volta or newer."""
    try:
        import pynvml
    except ImportError:
        return Reading(reason="reading the card's energy counter needs the package nvidia-ml-py")
    import torch

    try:
        pynvml.nvmlInit()
        # By name: CUDA_VISIBLE_DEVICES renumbers cards for torch and not for NVML.
        card = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(index).uuid}")
        return Reading("NVML", (pynvml.nvmlDeviceGetTotalEnergyConsumption(card) / 1e3,), (0.0,))
    except (pynvml.NVMLError, RuntimeError, AssertionError) as error:  # torch's own are the latter two
        return Reading(reason=f"the card's energy counter cannot be read ({error})")
