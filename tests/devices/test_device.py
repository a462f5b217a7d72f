"""What the machine is said to be, held against what it really does."""

import platform
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbhelpers import registry, store
from nbhelpers.devices import device as devices
from nbhelpers.devices.device import DeviceReport
from nbhelpers.records import LabError, ModelSpec, Settings

MIB = 2**20
linux_only = pytest.mark.skipif(platform.system() != "Linux", reason="only Linux can reset a process's peak")


def a_report(free=8 * 2**30, dtypes=("float32", "bfloat16", "float16")) -> DeviceReport:
    return DeviceReport("cpu", "planted", 2, 2 * free, free, dtypes, "float32", "planted", {}, "planted")


def test_versions_need_no_import_and_print_as_one_line():
    code = (
        "import sys; from nbhelpers import devices; devices.print_versions(); print('torch' in sys.modules)"
    )
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    first, heavy = lines.splitlines()
    assert first.startswith(f"python {platform.python_version()}, torch ") and heavy == "False"


def test_detection_holds_together_and_survives_json(tmp_path):
    report = devices.detect()
    assert report.device == devices.available_devices()[0]
    assert report.dtype in report.dtypes and report.dtype_reason
    assert 0 < report.memory_free_bytes <= report.memory_total_bytes
    assert report.cores >= 1 and report.name
    path = store.write_json(tmp_path / "device.json", report)
    assert store.read_json(path, DeviceReport) == report


@given(present=st.sets(st.sampled_from(devices.DEVICES[:-1])))
def test_cuda_comes_before_mps_before_xpu_before_cpu(present):
    available = tuple(name for name in devices.DEVICES if name in present or name == "cpu")
    best = next(name for name in ("cuda", "mps", "xpu", "cpu") if name in available)
    assert devices.pick_device(available) == best
    for wanted in devices.DEVICES:
        if wanted in available:
            assert devices.pick_device(available, wanted) == wanted
        else:
            with pytest.raises(LabError, match=f"no {wanted} device"):
                devices.pick_device(available, wanted)


def test_an_unknown_device_is_refused():
    with pytest.raises(LabError, match=r"no device 'cuda:1'.*auto, cuda"):
        devices.detect("cuda:1")


ALL = ("float32", "bfloat16", "float16")


@pytest.mark.parametrize(
    ("device", "supported", "native", "dtype"),
    [
        ("cpu", ALL, True, "float32"),
        ("cuda", ALL, True, "bfloat16"),
        ("cuda", ALL, False, "float16"),  # an older card that only emulates bfloat16
        ("mps", ALL, True, "float16"),
        ("xpu", ALL, True, "bfloat16"),
        ("xpu", ("float32", "float16"), True, "float16"),
        ("mps", ("float32",), True, "float32"),
    ],
)
def test_the_dtype_follows_the_device(device, supported, native, dtype):
    chosen, reason = devices.pick_dtype(device, supported, native_bfloat16=native)
    assert chosen == dtype and len(reason) > 10


def test_a_dtype_asked_for_is_taken_or_refused():
    assert devices.pick_dtype("cpu", ALL, "bf16") == ("bfloat16", devices.ASKED)
    assert devices.pick_dtype("cpu", ALL, "float16")[0] == "float16"
    for wanted in ("float8", "int8", ""):
        with pytest.raises(LabError, match="does not run on cpu: use float32"):
            devices.pick_dtype("cpu", ALL, wanted)


def test_a_dtype_counts_as_supported_only_if_it_really_runs():
    assert "float32" in devices.supported_dtypes("cpu")
    assert not devices._runs("cpu", "int8")  # exists, multiplies, but cannot be normalised
    assert not devices._runs("cpu", "float8_e4m3fn")  # exists, does not multiply


@linux_only
def test_the_peak_sees_memory_that_was_given_back_and_can_be_reset():
    devices.reset_peak("cpu")
    start = devices.peak_memory("cpu")
    block = bytearray(200 * MIB)
    held = devices.resident_memory()
    del block
    assert devices.resident_memory() < held - 150 * MIB
    assert devices.peak_memory("cpu") >= start + 190 * MIB
    devices.reset_peak("cpu")
    assert devices.peak_memory("cpu") <= held - 150 * MIB


def test_a_container_limit_counts_as_the_memory_there_is(tmp_path):
    (tmp_path / "memory.max").write_text("4000\n")
    (tmp_path / "memory.current").write_text("3000\n")
    (tmp_path / "memory.stat").write_text("anon 2000\ninactive_file 500\n")
    assert devices.container_memory(tmp_path) == (4000, 1500)
    (tmp_path / "memory.max").write_text("max\n")
    assert devices.container_memory(tmp_path) == (sys.maxsize, sys.maxsize)
    assert devices.container_memory(tmp_path / "absent") == (sys.maxsize, sys.maxsize)


@pytest.mark.skipif(devices.available_devices()[0] != "cuda", reason="needs CUDA")
def test_cuda_memory_follows_an_allocation():
    import torch

    devices.reset_peak("cuda")
    start, free = devices.peak_memory("cuda"), devices.free_memory("cuda")
    block = torch.ones(256 * MIB, dtype=torch.uint8, device="cuda")
    devices.synchronize("cuda")
    assert devices.free_memory("cuda") <= free - 200 * MIB
    del block
    devices.empty_cache("cuda")
    assert devices.peak_memory("cuda") >= start + 256 * MIB
    assert devices.free_memory("cuda") >= free - 50 * MIB


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_cache_formula_gives_the_bytes_of_a_real_cache(family, dtype):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "gpt2": {"n_embd": 24, "n_layer": 3, "n_head": 4},
        "llama": {
            "hidden_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 8,
        },
    }
    config = AutoConfig.for_model(family, vocab_size=10, **sizes[family])
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    with torch.inference_mode():
        cache = model(input_ids=torch.ones(5, 7, dtype=torch.long), use_cache=True).past_key_values
    real = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    kv_heads = 4 if family == "gpt2" else 2
    spec = ModelSpec("x", "x", "local", layers=3, kv_heads=kv_heads, head_dim=6)
    assert devices.kv_cache_bytes(spec, batch=5, tokens=7, dtype=dtype) == real


@given(
    parameters=st.integers(1, 10**10),
    batch=st.integers(1, 64),
    tokens=st.integers(1, 5000),
    free=st.integers(1, 10**11),
)
def test_a_dtype_fits_when_weights_and_cache_leave_room(parameters, batch, tokens, free):
    spec = ModelSpec("x", "x", "hub", parameters=parameters, context=2048, layers=4, kv_heads=2, head_dim=8)
    (row,) = devices.fit_table([spec], a_report(free), batch, tokens)
    assert row.tokens == min(tokens, 2048)
    for dtype, size in (("float32", 4), ("bfloat16", 2), ("float16", 2)):
        need = parameters * size + 2 * 4 * 2 * 8 * min(tokens, 2048) * batch * size
        assert row.need_bytes(dtype) == need
        assert (dtype in row.fits) == (need <= devices.HEADROOM * free)


def test_the_fit_table_has_a_row_for_every_model_known_or_not():
    specs = [*registry.load_registry().values(), registry.resolve("someone/unknown")]
    rows = devices.fit_table(specs, a_report(), batch=8, tokens=512)
    assert [row.model for row in rows] == [spec.alias for spec in specs]
    assert rows[-1].parameters is None and rows[-1].fits == ()
    assert all(row.fits for row in rows[:4])  # the embedded models fit anywhere
    with pytest.raises(LabError, match="at least one prompt"):
        devices.fit_table(specs, a_report(), batch=0, tokens=512)


def test_device_json_is_made_once_and_again_when_something_else_is_asked(tmp_path):
    settings = Settings(model="lab-gpt2", run_dir=str(tmp_path), device="cpu")
    path = tmp_path / "lab-gpt2" / "device.json"
    first = devices.device_for(settings)
    marked = replace(first, name="marked")  # tells a file that was read from one that was made
    assert store.read_json(path, DeviceReport) == first
    store.write_json(path, marked)
    assert devices.device_for(settings) == marked
    assert devices.device_for(replace(settings, device="auto")) == marked
    asked = devices.device_for(replace(settings, dtype="fp16"))
    assert (asked.dtype, asked.dtype_reason) == ("float16", devices.ASKED)
    assert devices.device_for(replace(settings, dtype="float16")) == asked
    assert devices.device_for(settings).dtype == first.dtype != "float16"
    store.write_json(path, replace(marked, versions={"python": "2.7"}))
    assert devices.device_for(settings).versions == devices.versions()
