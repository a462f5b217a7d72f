"""The speed of light of this machine: how fast could a model decode here, whatever the program around it?

A decode step must read every weight and every cached key and value once, and multiply with them: it takes at
least bytes / bandwidth and at least operations / rate (the roofline model: Williams, Waterman and Patterson
2009, doi 10.1145/1498765.1498785). Both are measured here, in two seconds for each dtype.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from nbhelpers import store
from nbhelpers.devices import device as devices
from nbhelpers.records import SCHEMA_VERSION, Record, Settings

MIB = 2**20
SIZES_MIB = (1, 4, 16, 64, 256)  # working sets: from a processor's cache to well beyond it
COLUMNS = 1024  # of the matrix that is read
MATRIX = 512  # rows and columns of the product that gives the rate of arithmetic
SECONDS = 2.0


@dataclass(frozen=True)
class MachineSpeed(Record):
    """speed_….json of a run: what the machine can do at most."""

    device: str
    dtype: str
    sizes_bytes: tuple[int, ...]  # working sets, ascending
    bandwidth_bytes_per_s: tuple[float, ...]  # reading each of them
    operations_per_s: float  # of matrix products
    schema_version: int = SCHEMA_VERSION


def measure(device: str = "cpu", dtype: str = "float32", seconds: float = SECONDS) -> MachineSpeed:
    """Bandwidth of matrix-vector products by working set, and rate of matrix products; about ``seconds``.

    The best of as many tries as the time allows: disturbances only slow down. A smaller working set can be
    read at least as fast as a larger one, so a slower measurement of it (overhead) is raised to that.
    """
    import torch

    kind, each = getattr(torch, dtype), seconds / (len(SIZES_MIB) + 1)
    bandwidth = []
    for size in SIZES_MIB:
        rows = size * MIB // (COLUMNS * kind.itemsize)
        weights = torch.ones(rows, COLUMNS, dtype=kind, device=device)
        vector = torch.ones(COLUMNS, dtype=kind, device=device)
        bandwidth.append(weights.nbytes / _best(partial(torch.mv, weights, vector), each, device))
    square = torch.ones(MATRIX, MATRIX, dtype=kind, device=device)
    # A linear layer multiplies by a transposed matrix: CPUs may have no fast routine for the other layout.
    rate = 2 * MATRIX**3 / _best(partial(torch.mm, square, square.T), each, device)
    envelope = np.maximum.accumulate(bandwidth[::-1])[::-1]
    sizes = tuple(size * MIB for size in SIZES_MIB)
    return MachineSpeed(device, dtype, sizes, tuple(float(b) for b in envelope), rate)


def speed_for(settings: Settings, device: str, dtype: str) -> MachineSpeed:
    """The run's speed of this device and dtype, measured by the first model that asks."""
    path = store.run_dir(settings) / f"speed_{device}_{dtype}.json"
    if not path.exists():
        store.write_json(path, measure(device, dtype))
    return store.read_json(path, MachineSpeed)


def bandwidth_at(speed: MachineSpeed, working_set: float) -> float:
    """Bytes per second for a working set in bytes: between the measured ones on a logarithmic scale."""
    return float(np.interp(np.log(working_set), np.log(speed.sizes_bytes), speed.bandwidth_bytes_per_s))


def decode_bound(speed: MachineSpeed, weight_bytes: int, cache_bytes: int, rows: int = 1) -> float:
    """The most tokens per second of ``rows`` together. cache_bytes: keys and values of one row.

    Operations: two per weight and row; those of attention, few at short contexts, are left out, which leaves
    the bound a bound.
    """
    item = 4 if speed.dtype == "float32" else 2
    read = weight_bytes + rows * cache_bytes
    reading = read / bandwidth_at(speed, read)
    arithmetic = 2 * (weight_bytes / item) * rows / speed.operations_per_s
    return rows / max(reading, arithmetic)


def bytes_per_step(model: Any) -> int:
    """Bytes of parameters that a decode step reads: all but tables of which it looks up a row a token.

    A table that is also the output layer (tied) is read whole.
    """
    import torch

    output = model.get_output_embeddings()
    tables = {m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    tables -= {output.weight} if output is not None else set()
    return sum(p.nbytes for p in model.parameters() if p not in tables)


def _best(work: Callable[[], object], seconds: float, device: str) -> float:
    """Shortest time of one call in seconds. On an accelerator calls are queued, so that only work counts."""
    calls, best, stop = 1 if device == "cpu" else 20, float("inf"), time.perf_counter() + seconds
    work()
    devices.synchronize(device)
    while time.perf_counter() < stop or best == float("inf"):
        started = time.perf_counter()
        for _ in range(calls):
            work()
        devices.synchronize(device)
        best = min(best, (time.perf_counter() - started) / calls)
    return best
