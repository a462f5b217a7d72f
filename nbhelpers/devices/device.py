"""What this machine is: its device and memory, the dtypes it runs, and the one to load weights in."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from nbhelpers import records, store
from nbhelpers.records import LabError, ModelRun, Record

LIBRARIES = ("torch", "transformers", "numpy", "scipy", "mlflow", "papermill")
FIDELITY = 0.01  # most by which a faithful dtype changes float32's perplexity on held-out text


@dataclass(frozen=True)
class DtypeTrial(Record):
    """What one dtype does to one model on this machine."""

    dtype: str
    tokens_per_s: float  # of a batch
    perplexity: float | None  # None: not finite, or slower than float32 and so not measured
    speed_ratio: float  # to float32
    perplexity_ratio: float | None  # to float32
    revision: str  # of the model


@dataclass(frozen=True)
class DeviceReport(Record):
    """device.json: the machine, and the dtype chosen for one model."""

    device: str  # one of records.DEVICES
    name: str
    cores: int
    memory_total_bytes: int
    memory_free_bytes: int
    dtypes: tuple[str, ...]
    dtype: str
    dtype_reason: str
    versions: dict[str, str]
    platform: str
    dtype_trials: tuple[DtypeTrial, ...] = ()  # float32 first; empty: not measured
    dtype_asked: bool = False  # by the user: then no trial decides
    schema_version: int = records.SCHEMA_VERSION


def versions() -> dict[str, str]:
    """Python's and the main libraries' versions, from package metadata: nothing is imported."""
    return {"python": platform.python_version()} | {n: importlib.metadata.version(n) for n in LIBRARIES}


def print_versions() -> None:
    print(", ".join(f"{name} {version}" for name, version in versions().items()))


def usable_cores() -> int:
    """The cores this process may use; containers and clusters often grant fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def detect(device: str = "auto", dtype: str = "auto") -> DeviceReport:
    """Look at the machine. Raises LabError when the device or dtype asked for is not there."""
    device = pick_device(available_devices(), device)
    dtypes, (total, free) = supported_dtypes(device), memory(device)
    # Older NVIDIA cards emulate bfloat16: it runs, slowly.
    native = device != "cuda" or _backend(device).is_bf16_supported(including_emulation=False)
    chosen = pick_dtype(device, dtypes, dtype, native)
    place, system = (device, _name(device), usable_cores()), f"{platform.system()} {platform.machine()}"
    return DeviceReport(*place, total, free, dtypes, *chosen, versions(), system, dtype_asked=dtype != "auto")


def available_devices() -> tuple[str, ...]:
    """The devices PyTorch can use here, in order of preference; "cpu" is always the last."""
    return tuple(name for name in records.DEVICES if _backend(name).is_available())


def pick_device(available: tuple[str, ...], wanted: str = "auto") -> str:
    """The device wanted, or the first available. Raises LabError when it is not there."""
    if wanted not in ("auto", *available):
        raise LabError(f"This machine has no {wanted} device: use auto or one of {', '.join(available)}.")
    return available[0] if wanted == "auto" else wanted


def supported_dtypes(device: str) -> tuple[str, ...]:
    """The dtypes in which the device really runs a matrix product and a normalisation."""
    import torch

    running = []
    for dtype in records.DTYPES:
        with suppress(RuntimeError, TypeError):
            x = torch.eye(4, dtype=getattr(torch, dtype), device=device)
            if torch.nn.functional.layer_norm(x @ x, (4,)).isfinite().all():
                running.append(dtype)
    return tuple(running)


def pick_dtype(
    device: str, supported: tuple[str, ...], wanted: str = "auto", native_bfloat16: bool = True
) -> tuple[str, str]:
    """The dtype to load weights in, and why. Raises LabError when the one wanted does not run."""
    wanted = records.SHORT_DTYPES.get(wanted, wanted)
    if wanted in supported:
        return wanted, "asked for"
    if wanted != "auto":
        raise LabError(f"The dtype {wanted!r} does not run on {device}: use {', '.join(supported)}.")
    if device == "cpu":
        return "float32", "fidelity first: CPUs compute in float32, and many emulate the half formats slowly"
    if device != "mps" and "bfloat16" in supported and native_bfloat16:
        return "bfloat16", "half the bytes of float32 with the same range, run natively"
    if "float16" in supported:
        return "float16", "half the bytes of float32, run natively"
    return "float32", "no half format runs here"


def with_trials(report: DeviceReport, trials: tuple[DtypeTrial, ...]) -> DeviceReport:
    """The report with these trials and, unless the user asked for one, the fastest dtype that is faithful."""
    report = replace(report, dtype_trials=trials)
    faithful = [t for t in trials if t.perplexity_ratio and abs(t.perplexity_ratio - 1) <= FIDELITY]
    if not faithful or report.dtype_asked:
        return report
    best = max(faithful, key=lambda trial: trial.speed_ratio)
    speed, surprise = f"{best.speed_ratio:.2f} times", f"{best.perplexity_ratio:.4f} times"
    reason = f"measured: {speed} the speed of float32 in a batch, {surprise} its perplexity"
    return replace(report, dtype=best.dtype, dtype_reason=reason)


def read_report(run: ModelRun) -> DeviceReport:
    return store.read_json(run.folder / "device.json", DeviceReport)


def make_report(run: ModelRun) -> DeviceReport:
    """device.json: the one there if it still holds, else a new one that keeps its trials."""
    path, asked = run.folder / "device.json", run.settings
    dtype = records.SHORT_DTYPES.get(asked.dtype, asked.dtype)
    old = read_report(run) if path.exists() else None
    holds = old and (old.dtype_asked, old.versions) == (dtype != "auto", versions())
    if old and holds and dtype in ("auto", old.dtype) and asked.device in ("auto", old.device):
        return old
    report = detect(asked.device, dtype)
    report = with_trials(report, old.dtype_trials if old and old.device == report.device else ())
    store.write_json(path, report)
    return report


def _backend(device: str) -> Any:
    """torch.cuda, torch.mps, torch.xpu or torch.cpu: the functions of one kind of device."""
    return importlib.import_module(f"torch.{device}")


def _name(device: str) -> str:
    if device in ("cuda", "xpu"):
        return str(_backend(device).get_device_name())
    with suppress(OSError):
        if found := re.search(r"^model name\s*: (.+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return found[1]
    return platform.processor() or platform.machine()


def memory(device: str) -> tuple[int, int]:
    """Total and free bytes of the device's memory (Apple's GPU shares the machine's)."""
    if device not in ("cpu", "mps"):
        return _backend(device).mem_get_info()[::-1]
    machine, (limit, unused) = psutil.virtual_memory(), container_memory()
    return min(machine.total, limit), min(machine.available, unused)


def container_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> tuple[int, int]:
    """Limit and unused bytes of this process's container; sys.maxsize where there is none."""
    try:
        limit, used = (int((cgroup / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no cgroup v2, or no limit ("max")
        return sys.maxsize, sys.maxsize
    return limit, max(0, limit - used + int(stat.get("inactive_file", 0)))  # file pages can be reclaimed


def free_memory(device: str) -> int:
    """Bytes that can still be allocated on the device."""
    return memory(device)[1]


def resident_memory() -> int:
    """Bytes of this process that are in physical memory now (the resident set)."""
    return int(psutil.Process().memory_info().rss)


def reset_peak(device: str) -> bool:
    """Start a new peak, and say whether that worked: for a process, only Linux can (proc(5), clear_refs)."""
    with suppress(OSError):  # another system, or a container that forbids it
        if device in ("cuda", "xpu"):
            _backend(device).reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def peak_memory(device: str) -> int | None:
    """Peak bytes since reset_peak: on CUDA and XPU the allocator's, else the process's (Linux only)."""
    if device in ("cuda", "xpu"):
        return int(_backend(device).max_memory_allocated())
    status = Path("/proc/self/status")
    return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024 if status.exists() else None


def synchronize(device: str) -> None:
    """Wait until the device has finished: without it a timer stops before the work does."""
    _backend(device).synchronize()


def empty_cache(device: str) -> None:
    """Hand unused blocks of the device's allocator back to the driver."""
    if device != "cpu":
        _backend(device).empty_cache()
