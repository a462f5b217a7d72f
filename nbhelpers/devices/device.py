"""What this machine is: the device, its memory, the dtypes it runs, and which models fit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nbhelpers import registry, store
from nbhelpers.records import SCHEMA_VERSION, LabError, ModelSpec, Record, Settings

DEVICES = ("cuda", "mps", "xpu", "cpu")  # in order of preference
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
LIBRARIES = ("torch", "transformers", "numpy", "scipy", "mlflow", "papermill")
HEADROOM = 0.9  # assumed: share of the free memory that weights and cache may take; the rest is activations
ASKED = "asked for"
FIDELITY = 0.01  # most by which a dtype may change the perplexity on held-out text


@dataclass(frozen=True)
class DtypeTrial(Record):
    """What one dtype does to one model on this machine."""

    dtype: str
    tokens_per_s: float  # of a batch
    perplexity: float | None  # None: not finite, or slower than float32 and so not asked for
    speed_ratio: float  # to float32
    perplexity_ratio: float | None  # to float32
    revision: str  # of the model


@dataclass(frozen=True)
class DeviceReport(Record):
    device: str  # "cuda", "mps", "xpu" or "cpu"
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
    schema_version: int = SCHEMA_VERSION


def versions() -> dict[str, str]:
    """Python's and the main libraries' versions, from package metadata: nothing is imported."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            found[library] = "missing"
    return found


def print_versions() -> None:
    print(", ".join(f"{name} {version}" for name, version in versions().items()))


def usable_cores() -> int:
    """The cores this process may use; containers and clusters often grant fewer than the machine has."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def detect(device: str = "auto", dtype: str = "auto") -> DeviceReport:
    """Look at the machine. Raises LabError when the device or dtype asked for is not there."""
    chosen = pick_device(available_devices(), device)
    supported = supported_dtypes(chosen)
    chosen_dtype, reason = pick_dtype(chosen, supported, dtype, _native_bfloat16(chosen))
    total, free = _memory(chosen)
    return DeviceReport(
        device=chosen,
        name=_device_name(chosen),
        cores=usable_cores(),
        memory_total_bytes=total,
        memory_free_bytes=free,
        dtypes=supported,
        dtype=chosen_dtype,
        dtype_reason=reason,
        versions=versions(),
        platform=f"{platform.system()} {platform.machine()}",
    )


def available_devices() -> tuple[str, ...]:
    """The devices PyTorch can use here, in order of preference; "cpu" is always the last."""
    import torch

    present = {
        "cuda": torch.cuda.is_available(),  # NVIDIA, and AMD through ROCm
        "mps": torch.backends.mps.is_available(),  # Apple
        "xpu": torch.xpu.is_available(),  # Intel
        "cpu": True,
    }
    return tuple(name for name in DEVICES if present[name])


def pick_device(available: tuple[str, ...], wanted: str = "auto") -> str:
    """The device wanted, or the first available. Raises LabError when it is unknown or not there."""
    if wanted == "auto":
        return available[0]
    if wanted not in DEVICES:
        raise LabError(f"There is no device {wanted!r}: use auto, {', '.join(DEVICES)}.")
    if wanted not in available:
        raise LabError(f"This machine has no {wanted} device: use auto or one of {', '.join(available)}.")
    return wanted


def supported_dtypes(device: str) -> tuple[str, ...]:
    """The dtypes in which the device really runs a matrix product and a normalisation."""
    return tuple(name for name in ITEM_BYTES if _runs(device, name))


def _runs(device: str, dtype: str) -> bool:
    import torch

    try:
        x = torch.eye(4, dtype=getattr(torch, dtype), device=device)
        y = torch.nn.functional.layer_norm(x @ x, (4,))
        return bool(torch.isfinite(y).all())
    except (RuntimeError, TypeError):
        return False


def _native_bfloat16(device: str) -> bool:
    import torch

    # Older NVIDIA cards emulate bfloat16: it runs, slowly.
    return device != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def pick_dtype(
    device: str, supported: tuple[str, ...], wanted: str = "auto", native_bfloat16: bool = True
) -> tuple[str, str]:
    """The dtype to load weights in, and why. Raises LabError when the one wanted does not run."""
    wanted = SHORT_DTYPES.get(wanted, wanted)
    if wanted != "auto":
        if wanted not in supported:
            raise LabError(f"The dtype {wanted!r} does not run on {device}: use {', '.join(supported)}.")
        return wanted, ASKED
    if device == "cpu":
        return "float32", "fidelity first: CPUs compute in float32, and many emulate the half formats slowly"
    if device != "mps" and "bfloat16" in supported and native_bfloat16:
        return "bfloat16", "half the bytes of float32 with the same range, run natively"
    if "float16" in supported:
        return "float16", "half the bytes of float32, run natively"
    return "float32", "no half format runs here"


def _memory(device: str) -> tuple[int, int]:
    """Total and free bytes of the device's memory (Apple's GPU shares the machine's)."""
    import psutil

    if device in ("cuda", "xpu"):
        free, total = _torch_module(device).mem_get_info()
        return total, free
    machine = psutil.virtual_memory()
    if device == "mps":
        mps = _torch_module(device)
        total = mps.recommended_max_memory()
        return total, min(total - mps.driver_allocated_memory(), machine.available)
    limit, unused = container_memory()
    return min(machine.total, limit), min(machine.available, unused)


def container_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> tuple[int, int]:
    """Limit and unused bytes of the container this process runs in; sys.maxsize where there is none.

    Source: cgroup v2 memory.max, memory.current, memory.stat (inactive file pages can be reclaimed).
    """
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no cgroup v2, or no limit ("max")
        return sys.maxsize, sys.maxsize
    return limit, max(0, limit - used + int(stat.get("inactive_file", 0)))


def _torch_module(device: str) -> Any:
    import torch

    return getattr(torch, device)


def free_memory(device: str) -> int:
    """Bytes that can still be allocated on the device."""
    return _memory(device)[1]


def synchronize(device: str) -> None:
    """Wait until the device has finished: without it a timer stops before the work does."""
    if device != "cpu":
        _torch_module(device).synchronize()


def empty_cache(device: str) -> None:
    """Hand unused blocks of the device's allocator back to the driver."""
    if device != "cpu":
        _torch_module(device).empty_cache()


def peak_memory(device: str) -> int | None:
    """Peak bytes since reset_peak: the allocator's on CUDA and XPU, the process's on a CPU.

    On Apple MPS, which keeps no peak, what the driver holds for the process. None where unknown.
    """
    if device in ("cuda", "xpu"):
        return int(_torch_module(device).max_memory_allocated())
    if device == "mps":
        return int(_torch_module(device).driver_allocated_memory())
    status = Path("/proc/self/status")
    if not status.exists():
        return _lifetime_peak()
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def _lifetime_peak() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def reset_peak(device: str) -> bool:
    """Start a new peak, and say whether that worked.

    Only Linux can for a process (proc(5), clear_refs); elsewhere the old one stays.
    """
    if device in ("cuda", "xpu"):
        _torch_module(device).reset_peak_memory_stats()
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # another system, or a container that forbids it
        return False
    return True


def allocated_memory(device: str) -> int:
    """Bytes that tensors hold in a device's own memory; 0 on a CPU, where the process holds them."""
    if device == "mps":
        return int(_torch_module(device).current_allocated_memory())
    return 0 if device == "cpu" else int(_torch_module(device).memory_allocated())


def resident_memory() -> int:
    """Bytes of this process that are in physical memory now (the resident set)."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def _device_name(device: str) -> str:
    if device in ("cuda", "xpu"):
        return str(_torch_module(device).get_device_name())
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@dataclass(frozen=True)
class FitRow:
    """What one model needs for a workload, and the dtypes in which it fits."""

    model: str
    parameters: int | None  # None: not known before the model is fetched
    tokens: int  # of the workload, or the model's context where that is shorter
    weights_bytes: dict[str, int]  # dtype -> bytes
    kv_bytes: dict[str, int]
    fits: tuple[str, ...]

    def need_bytes(self, dtype: str) -> int:
        return self.weights_bytes[dtype] + self.kv_bytes[dtype]


def kv_cache_bytes(spec: ModelSpec, batch: int, tokens: int, dtype: str) -> int:
    """Bytes of the key-value cache: 2 x layers x key-value heads x head size x tokens x batch x item size.

    0 where the architecture is not known.
    """
    if spec.layers is None or spec.kv_heads is None or spec.head_dim is None:
        return 0
    return 2 * spec.layers * spec.kv_heads * spec.head_dim * tokens * batch * ITEM_BYTES[dtype]


def fit_table(specs: list[ModelSpec], report: DeviceReport, batch: int, tokens: int) -> list[FitRow]:
    """For each model: bytes of weights and cache at each supported dtype, against the free memory."""
    if batch < 1 or tokens < 1:
        raise LabError(
            f"A workload has at least one prompt of one token, not batch {batch}, tokens {tokens}."
        )
    return [_fit_row(spec, report, batch, tokens) for spec in specs]


def _fit_row(spec: ModelSpec, report: DeviceReport, batch: int, tokens: int) -> FitRow:
    held = min(tokens, spec.context or tokens)
    count = spec.parameters
    weights = {dtype: count * ITEM_BYTES[dtype] for dtype in report.dtypes} if count else {}
    cache = {dtype: kv_cache_bytes(spec, batch, held, dtype) for dtype in weights}
    room = HEADROOM * report.memory_free_bytes
    fits = tuple(dtype for dtype in weights if weights[dtype] + cache[dtype] <= room)
    return FitRow(spec.alias, count, held, weights, cache, fits)


def device_for(settings: Settings) -> DeviceReport:
    """The run's device.json for this model, made now if it is missing or answers another question."""
    path = registry.model_dir(settings) / "device.json"
    if path.exists():
        report = store.read_json(path, DeviceReport)
        if _answers(report, settings):
            return report
    report = detect(settings.device, settings.dtype)
    report = with_trials(report, kept_trials(settings, report.device))
    store.write_json(path, report)
    return report


def kept_trials(settings: Settings, device: str) -> tuple[DtypeTrial, ...]:
    """What this run has measured about the model's dtypes on this device; nothing if it has not."""
    path = registry.model_dir(settings) / "device.json"
    old = store.read_json(path, DeviceReport) if path.exists() else None
    return old.dtype_trials if old and old.device == device else ()


def with_trials(report: DeviceReport, trials: tuple[DtypeTrial, ...]) -> DeviceReport:
    """The report with these trials and, unless a dtype was asked for, the dtype they speak for.

    That is the fastest of those whose perplexity is within 1 % of float32's.
    """
    report = replace(report, dtype_trials=trials)
    faithful = [t for t in trials if t.perplexity_ratio and abs(t.perplexity_ratio - 1) <= FIDELITY]
    if not faithful or report.dtype_reason == ASKED:
        return report
    best = max(faithful, key=lambda trial: trial.speed_ratio)
    reason = (
        f"measured: {best.speed_ratio:.2f} times the speed of float32 in a batch, "
        f"{best.perplexity_ratio:.4f} times its perplexity"
    )
    return replace(report, dtype=best.dtype, dtype_reason=reason)


def _answers(report: DeviceReport, settings: Settings) -> bool:
    dtype = SHORT_DTYPES.get(settings.dtype, settings.dtype)
    same_dtype = report.dtype_reason != ASKED if dtype == "auto" else report.dtype == dtype
    return same_dtype and settings.device in ("auto", report.device) and report.versions == versions()
