"""What this machine is: its device and memory, the dtypes it runs, and the one to load weights in."""

import importlib.metadata
import os
import platform
import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from nbhelpers import records, store
from nbhelpers.records import LabError, ModelRun, Record

LIBRARIES = ("torch", "transformers", "numpy", "scipy", "mlflow", "papermill")


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
    dtype_trials: tuple[DtypeTrial, ...] = ()  # float32 first; empty: not measured (notebook 01 does)
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
    dtypes = supported_dtypes(device)
    hardware = (_name(device), usable_cores(), *memory(device))
    choice = (dtypes, *pick_dtype(device, dtypes, dtype))
    system = f"{platform.system()} {platform.machine()}"
    return DeviceReport(device, *hardware, *choice, versions(), system, dtype_asked=dtype != "auto")


def available_devices() -> tuple[str, ...]:
    """The devices PyTorch can use here, in order of preference; "cpu" is always the last."""
    return tuple(name for name in records.DEVICES if _backend(name).is_available())


def pick_device(available: tuple[str, ...], wanted: str = "auto") -> str:
    """The device wanted, or the first available. Raises LabError when it is not there."""
    if wanted not in ("auto", *available):
        raise LabError(f"This machine has no {wanted} device: use auto or one of {', '.join(available)}.")
    return available[0] if wanted == "auto" else wanted


def supported_dtypes(device: str) -> tuple[str, ...]:
    """The dtypes in which the device itself runs a matrix product and a normalisation."""
    import torch

    running = []
    for dtype in records.DTYPES:
        if (device, dtype) == ("cuda", "bfloat16") and not torch.cuda.is_bf16_supported(False):
            continue  # older cards emulate it, slowly
        with suppress(RuntimeError, TypeError):
            x = torch.eye(4, dtype=getattr(torch, dtype), device=device)
            if torch.nn.functional.layer_norm(x @ x, (4,)).isfinite().all():
                running.append(dtype)
    return tuple(running)


def pick_dtype(device: str, supported: tuple[str, ...], wanted: str = "auto") -> tuple[str, str]:
    """The dtype to load weights in, and why. Raises LabError when the one wanted does not run."""
    wanted = records.SHORT_DTYPES.get(wanted, wanted)
    if wanted in supported:
        return wanted, "asked for"
    if wanted != "auto":
        raise LabError(f"The dtype {wanted!r} does not run on {device}: use {', '.join(supported)}.")
    halves = ("float16",) if device == "mps" else () if device == "cpu" else ("bfloat16", "float16")
    for half in halves:
        if half in supported:
            return half, "half the bytes of float32, run natively"
    return "float32", "fidelity first, and many CPUs emulate the half formats, slowly"


def read_device(run: ModelRun) -> DeviceReport:
    return store.read_json(run.folder / "device.json", DeviceReport)


def make_device(run: ModelRun) -> DeviceReport:
    """device.json: the one there if it answers what is asked, else a new one."""
    path, settings = run.folder / "device.json", run.settings
    dtype = records.SHORT_DTYPES.get(settings.dtype, settings.dtype)
    if path.exists():
        old = read_device(run)
        if dtype == (old.dtype if old.dtype_asked else "auto") and settings.device in ("auto", old.device):
            return old
    store.write_json(path, report := detect(settings.device, dtype))
    return report


def _backend(device: str) -> Any:
    """torch.cuda, torch.mps, torch.xpu or torch.cpu: the functions of one kind of device."""
    return importlib.import_module(f"torch.{device}")


def _name(device: str) -> str:
    if device in ("cuda", "xpu"):
        return str(_backend(device).get_device_name())
    with suppress(OSError):
        if match := re.search(r"^model name\s*: (.+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return match[1]
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
    if device != "cpu":
        _backend(device).empty_cache()
