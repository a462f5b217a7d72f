"""What the machine is said to be, held against what it really does."""

import platform
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbhelpers import records, registry, store
from nbhelpers.devices import machine
from nbhelpers.devices.machine import DeviceReport
from nbhelpers.records import DEVICES, LabError, ModelRun, Settings

MIB = 2**20
linux_only = pytest.mark.skipif(platform.system() != "Linux", reason="only Linux can reset a process's peak")


def test_versions_need_no_import_and_print_as_one_line():
    code = (
        "import nbhelpers.devices.machine as d; d.print_versions(); import sys; print('torch' in sys.modules)"
    )
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    first, heavy = lines.splitlines()
    assert first.startswith(f"python {platform.python_version()}, torch ") and heavy == "False"


def test_detection_holds_together_and_survives_json(tmp_path):
    report = machine.detect()
    assert report.device == machine.available_devices()[0]
    assert report.dtype in report.dtypes and report.dtype_reason
    assert 0 < report.memory_free_bytes <= report.memory_total_bytes
    assert report.cores >= 1 and report.name
    path = store.write_json(tmp_path / "device.json", report)
    assert store.read_json(path, DeviceReport) == report


@given(present=st.sets(st.sampled_from(DEVICES[:-1])))
def test_cuda_comes_before_mps_before_xpu_before_cpu(present):
    available = tuple(name for name in DEVICES if name in present or name == "cpu")
    best = next(name for name in ("cuda", "mps", "xpu", "cpu") if name in available)
    assert machine.pick_device(available) == best
    for wanted in DEVICES:
        if wanted in available:
            assert machine.pick_device(available, wanted) == wanted
        else:
            with pytest.raises(LabError, match=f"no {wanted} device"):
                machine.pick_device(available, wanted)


def test_an_unknown_device_is_refused():
    with pytest.raises(LabError, match=r"no cuda:1 device: use auto or one of .*cpu"):
        machine.detect("cuda:1")


ALL = ("float32", "bfloat16", "float16")


@pytest.mark.parametrize(
    ("device", "supported", "dtype"),
    [
        ("cpu", ALL, "float32"),
        ("cuda", ALL, "bfloat16"),
        ("cuda", ("float32", "float16"), "float16"),  # an older card
        ("mps", ALL, "float16"),
        ("xpu", ALL, "bfloat16"),
        ("xpu", ("float32", "float16"), "float16"),
        ("mps", ("float32",), "float32"),
    ],
)
def test_the_dtype_follows_the_device(device, supported, dtype):
    chosen, reason = machine.pick_dtype(device, supported)
    assert chosen == dtype and len(reason) > 10


def test_a_dtype_asked_for_is_taken_or_refused():
    assert machine.pick_dtype("cpu", ALL, "bf16") == ("bfloat16", "asked for")
    assert machine.pick_dtype("cpu", ALL, "float16")[0] == "float16"
    for wanted in ("float8", "int8", ""):
        with pytest.raises(LabError, match="does not run on cpu: use float32"):
            machine.pick_dtype("cpu", ALL, wanted)


def test_a_dtype_counts_as_supported_only_if_it_really_runs(monkeypatch):
    assert "float32" in machine.supported_dtypes("cpu")
    # The first exists and multiplies but cannot be normalised, the second exists and does not multiply.
    monkeypatch.setattr(records, "DTYPES", {"int8": 1, "float8_e4m3fn": 1, "float64": 8})
    assert machine.supported_dtypes("cpu") == ("float64",)


@linux_only
def test_the_peak_sees_memory_that_was_given_back_and_can_be_reset():
    machine.reset_peak("cpu")
    start = machine.peak_memory("cpu")
    block = bytearray(200 * MIB)
    held = machine.resident_memory()
    del block
    assert machine.resident_memory() < held - 150 * MIB
    assert machine.peak_memory("cpu") >= start + 190 * MIB
    machine.reset_peak("cpu")
    assert machine.peak_memory("cpu") <= held - 150 * MIB


def test_a_container_limit_counts_as_the_memory_there_is(tmp_path):
    (tmp_path / "memory.max").write_text("4000\n")
    (tmp_path / "memory.current").write_text("3000\n")
    (tmp_path / "memory.stat").write_text("anon 2000\ninactive_file 500\n")
    assert machine.container_memory(tmp_path) == (4000, 1500)
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.container_memory(tmp_path) == (sys.maxsize, sys.maxsize)
    assert machine.container_memory(tmp_path / "absent") == (sys.maxsize, sys.maxsize)


@pytest.mark.skipif(machine.available_devices()[0] != "cuda", reason="needs CUDA")
def test_cuda_memory_follows_an_allocation():
    import torch

    machine.reset_peak("cuda")
    start, free = machine.peak_memory("cuda"), machine.free_memory("cuda")
    block = torch.ones(256 * MIB, dtype=torch.uint8, device="cuda")
    machine.synchronize("cuda")
    assert machine.free_memory("cuda") <= free - 200 * MIB
    del block
    machine.empty_cache("cuda")
    assert machine.peak_memory("cuda") >= start + 256 * MIB
    assert machine.free_memory("cuda") >= free - 50 * MIB


def test_device_json_is_made_once_and_again_when_something_else_is_asked(tmp_path):
    run = ModelRun(Settings(device="cpu"), registry.resolve("lab-gpt2"), tmp_path)

    def made(**asked):
        return machine.make_device(replace(run, settings=replace(run.settings, **asked)))

    first = made()
    marked = replace(first, name="marked")  # tells a file that was read from one that was made
    assert machine.read_device(run) == first
    store.write_json(tmp_path / "device.json", marked)
    assert made() == made(device="auto") == marked
    asked = made(dtype="fp16")
    assert (asked.dtype, asked.dtype_reason, asked.dtype_asked) == ("float16", "asked for", True)
    assert made(dtype="float16") == asked
    assert made().dtype == first.dtype != "float16"
    assert made(dtype=first.dtype).dtype_asked  # the same dtype, but no trial may change it
