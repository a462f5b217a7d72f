"""The memory meter against planted allocations, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from typing import Any

import pytest

from nbhelpers.devices import machine
from tools import memory

PLANTED = 256 * 2**20
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="counters of Linux")


def alone(code: str) -> Any:
    """Run code in a fresh process with one thread; it leaves what it found in `found`."""
    head = "import json\nfrom nbhelpers.devices import machine\nfrom tools import memory\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{head}{code}\nprint(json.dumps(found))"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


TRACK = """
from dataclasses import asdict
if not by_kernel:
    machine.reset_peak = lambda device: False  # as in a container that forbids it
with memory.track_memory() as meter:
    block = b"x" * {size}
    {during}
found = asdict(meter)
"""


@linux_only
@pytest.mark.parametrize("by_kernel", [True, False])
def test_a_planted_allocation_is_read_within_two_percent(by_kernel: bool) -> None:
    code = TRACK.format(size=PLANTED, during="import time; time.sleep(0.3)")
    use = alone(f"by_kernel = {by_kernel}\n{code}")
    grown = use["process_peak_bytes"] - use["process_before_bytes"]
    assert grown == pytest.approx(PLANTED, rel=0.02)
    assert use["process_peak_by"] == ("kernel" if by_kernel else "sampling")


@linux_only
def test_memory_that_is_freed_inside_the_block_is_in_the_peak() -> None:
    use = alone("by_kernel = True\n" + TRACK.format(size=PLANTED, during="del block"))
    assert use["process_peak_bytes"] - use["process_before_bytes"] == pytest.approx(PLANTED, rel=0.02)


@linux_only
def test_an_earlier_peak_is_not_this_blocks() -> None:
    code = f"by_kernel = True\nearlier = b'x' * {2 * PLANTED}\ndel earlier\n"
    use = alone(code + TRACK.format(size=PLANTED, during="pass"))
    assert use["process_peak_bytes"] - use["process_before_bytes"] == pytest.approx(PLANTED, rel=0.02)


def test_the_meter_reads_and_stops_when_the_block_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "reset_peak", lambda device: False)
    with pytest.raises(ZeroDivisionError), memory.track_memory() as use:
        1 / 0  # noqa: B018
    assert use.process_peak_bytes >= use.process_before_bytes > 0 and use.process_peak_by == "sampling"
    assert "watch" not in [thread.name for thread in threading.enumerate()]
