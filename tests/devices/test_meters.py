"""Memory meters against planted allocations and planted leaks, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from itertools import combinations
from statistics import median
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbhelpers.devices import device as devices
from nbhelpers.devices import meters

PLANTED = 256 * 2**20
PLANTED_LEAK = 102_400
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="counters of Linux")


def alone(code: str) -> Any:
    """Run code in a fresh process with one thread; it leaves what it found in `found`."""
    head = "import json\nfrom nbhelpers import devices, meters\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{head}{code}\nprint(json.dumps(found))"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


TRACK = """
from dataclasses import asdict
if not by_kernel:
    devices.reset_peak = lambda device: False  # as in a container that forbids it
with meters.track_memory() as meter:
    block = b"x" * {size}
    {during}
found = asdict(meter.use)
"""


@linux_only
@pytest.mark.parametrize("by_kernel", [True, False])
def test_a_planted_allocation_is_read_within_two_percent(by_kernel: bool) -> None:
    code = TRACK.format(size=PLANTED, during="import time; time.sleep(0.3)")
    use = alone(f"by_kernel = {by_kernel}\n{code}")
    for kind in ("process", "private"):
        for end in ("peak", "after"):
            grown = use[f"{kind}_{end}_bytes"] - use[f"{kind}_before_bytes"]
            print(f"{kind} {end}: {100 * (grown / PLANTED - 1):+.3f} %")
            assert grown == pytest.approx(PLANTED, rel=0.02)
    assert use["process_peak_by"] == ("kernel" if by_kernel else "sampling")
    assert use["parameter_bytes"] is None and use["device_peak_bytes"] is None


@linux_only
def test_memory_that_is_freed_inside_the_block_is_in_the_peak() -> None:
    use = alone("by_kernel = True\n" + TRACK.format(size=PLANTED, during="del block"))
    assert use["process_peak_bytes"] - use["process_before_bytes"] == pytest.approx(PLANTED, rel=0.02)
    assert use["process_after_bytes"] - use["process_before_bytes"] < 0.02 * PLANTED


@linux_only
def test_an_earlier_peak_is_not_this_blocks() -> None:
    code = f"by_kernel = True\nearlier = b'x' * {2 * PLANTED}\ndel earlier\n"
    use = alone(code + TRACK.format(size=PLANTED, during="pass"))
    assert use["process_peak_bytes"] - use["process_before_bytes"] == pytest.approx(PLANTED, rel=0.02)


def test_the_meter_reads_and_stops_when_the_block_fails() -> None:
    import torch

    with pytest.raises(ZeroDivisionError), meters.track_memory("cpu", torch.nn.Linear(10, 10)) as meter:
        1 / 0  # noqa: B018
    assert meter.use.parameter_bytes == 110 * 4
    assert "watch" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.skipif(devices.available_devices()[0] != "cuda", reason="needs CUDA")
def test_a_planted_allocation_on_the_card() -> None:
    import torch

    start = devices.allocated_memory("cuda")
    with meters.track_memory("cuda") as meter:
        block = torch.ones(PLANTED, dtype=torch.uint8, device="cuda")
        del block
    assert (meter.use.device_peak_bytes or 0) - start == pytest.approx(PLANTED, rel=0.02)


LEAKS = f"""
import sys
from dataclasses import asdict
sys.path.insert(0, "tests")
from tiny_models import tiny
from nbhelpers.generation import generate as generation
from nbhelpers.records import Prompt, Settings
loaded, kept = tiny(), []
prompt, few = Prompt("p", "Tell me of ships:", "short_post"), Settings(repeats=1, max_new_tokens=4)
def clean():
    generation.generate_samples(loaded, [prompt], few)
def leaky():
    clean()
    kept.append(bytearray(b"x" * {PLANTED_LEAK}))
tests = [meters.leak_test(call) for call in (clean, leaky)]
found = [asdict(leak) | {{"verdict": leak.verdict}} for leak in tests]
"""


@linux_only
def test_a_planted_leak_is_found_and_a_clean_model_is_not_accused() -> None:
    clean, leaky = alone(LEAKS)
    print(f"planted {PLANTED_LEAK}: {leaky['slope']:,.0f} [{leaky['low']:,.0f}, {leaky['high']:,.0f}]")
    assert clean["verdict"] != "leaks" and clean["slope"] < meters.LEAK_FLOOR
    assert leaky["verdict"] == "leaks" and len(leaky["readings"]) == 50
    assert leaky["slope"] == pytest.approx(PLANTED_LEAK, rel=0.05)
    assert leaky["low"] > 0.9 * PLANTED_LEAK and leaky["high"] < 1.1 * PLANTED_LEAK


@given(st.lists(st.integers(0, 10**9), min_size=10, max_size=20))
def test_the_slope_is_the_median_of_all_pairs(readings: list[int]) -> None:
    leak = meters.leak_slope(readings)
    pairs = [(b - a) / (j - i) for (i, a), (j, b) in combinations(enumerate(readings), 2)]
    assert leak.slope == pytest.approx(median(pairs))
    assert leak.low is not None and leak.high is not None and leak.low <= leak.slope <= leak.high


def test_the_interval_covers_a_planted_slope() -> None:
    random, runs = np.random.default_rng(0), 300
    noise = random.normal(0, 50_000, (runs, 50))
    found = [meters.leak_slope([int(5000 * i + e) for i, e in enumerate(row)]) for row in noise]
    assert 0.92 <= np.mean([leak.low <= 5000 <= leak.high for leak in found]) <= 0.98


def test_a_verdict_needs_the_whole_interval_on_one_side_of_the_floor() -> None:
    base = [1_000_000 + (4096 if i % 3 else 0) for i in range(50)]
    assert meters.leak_slope(base).verdict == "no leak found"
    assert meters.leak_slope([b + 100_000 * i for i, b in enumerate(base)]).verdict == "leaks"
    jump = [b + (8_000_000 if i > 40 else 0) for i, b in enumerate(base)]  # one late growth is no leak
    assert meters.leak_slope(jump).verdict == "no leak found"
    few = meters.leak_slope(base[:9])
    assert few.verdict == "cannot tell" and few.slope is None and "n = 9" in (few.reason or "")
