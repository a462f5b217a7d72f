"""What this machine allows: does a model fit its memory, and how fast could it decode, whatever the program?

Bytes of generating come from a model's architecture. A step takes at least bytes / bandwidth and at least
operations / rate: the roofline model (Williams, Waterman and Patterson 2009, doi 10.1145/1498765.1498785).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nbhelpers import store
from nbhelpers.devices import device as devices
from nbhelpers.records import DTYPES, SCHEMA_VERSION, ModelSpec, Record

HEADROOM = 0.9  # assumed: share of the free memory that a need may take; the rest is for activations
LOGIT_BYTES = 24  # for each row and entry of the vocabulary: logits, and what drawing from them takes
SIZES = tuple(mib * 2**20 for mib in (1, 4, 16, 64, 256))  # bytes: from a processor's cache to well beyond it
COLUMNS, MATRIX = 1024, 512  # of the matrix that is read; both sides of those multiplied


@dataclass(frozen=True)
class Need:
    """Bytes of generating. What is not known before a model is fetched counts as 0."""

    weights: int
    cache: int  # keys and values of all rows
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.logits


def kv_cache_bytes(spec: ModelSpec, rows: int, tokens: int, dtype: str) -> int:
    """2 x layers x key-value heads x head size x tokens x rows x item size; 0 where one is not known."""
    size = (spec.layers or 0) * (spec.kv_heads or 0) * (spec.head_dim or 0)
    return 2 * size * tokens * rows * DTYPES[dtype]


def generation_need(
    spec: ModelSpec, dtype: str, rows: int = 1, tokens: int = 512, vocabulary: int = 0
) -> Need:
    """What generating ``rows`` texts at a time takes, each of ``tokens`` tokens with its prompt, cut to the
    model's context."""
    cache = kv_cache_bytes(spec, rows, min(tokens, spec.context or tokens), dtype)
    return Need((spec.parameters or 0) * DTYPES[dtype], cache, LOGIT_BYTES * rows * vocabulary)


def fits(need: Need, free: int) -> bool:
    return need.total <= HEADROOM * free


def rows_that_fit(one: Need, free: int, loaded: bool = False) -> int:
    """How many rows fit, given the need of one; 0 where not even one does. loaded: the weights are there."""
    room = HEADROOM * free - (0 if loaded else one.weights)
    return max(0, int(room // max(1, one.cache + one.logits)))


@dataclass(frozen=True)
class MachineSpeed(Record):
    """speed_….json of a run: what the machine can do at most."""

    device: str
    dtype: str
    sizes_bytes: tuple[int, ...]  # working sets, ascending
    bandwidth_bytes_per_s: tuple[float, ...]  # reading each of them
    operations_per_s: float  # of matrix products
    schema_version: int = SCHEMA_VERSION


def measure(device: str = "cpu", dtype: str = "float32", seconds: float = 0.6) -> MachineSpeed:
    """Bandwidth of matrix-vector products by working set, and rate of matrix products; about ``seconds``."""
    import torch
    from torch.utils.benchmark import Timer

    def clock() -> float:
        devices.synchronize(device)
        return time.perf_counter()

    def best(call: str, *shape: int) -> float:  # disturbances only slow down
        a, b = (torch.ones(size, dtype=getattr(torch, dtype), device=device) for size in (shape, shape[1:]))
        timer = Timer(call, timer=clock, globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
        return min(timer.blocked_autorange(min_run_time=seconds / (len(SIZES) + 1)).times)

    bandwidth = [size / best("a.mv(b)", size // (COLUMNS * DTYPES[dtype]), COLUMNS) for size in SIZES]
    # A smaller set can be read as fast as a larger one: a slower measurement of it is overhead.
    envelope = np.maximum.accumulate(bandwidth[::-1])[::-1]
    # A linear layer multiplies by a transposed matrix: CPUs may have no fast routine for the other layout.
    rate = 2 * MATRIX**3 / best("a @ a.T", MATRIX, MATRIX)
    return MachineSpeed(device, dtype, SIZES, tuple(envelope.tolist()), rate)


def machine_speed(folder: Path, device: str, dtype: str) -> MachineSpeed:
    """The speed in a run's folder; measured and written there by the first model that asks."""
    path = folder / f"speed_{device}_{dtype}.json"
    if not path.exists():
        store.write_json(path, measure(device, dtype))
    return store.read_json(path, MachineSpeed)


def bandwidth_at(speed: MachineSpeed, working_set: float) -> float:
    """Bytes per second for a working set in bytes: between the measured ones on a logarithmic scale."""
    return float(np.interp(np.log(working_set), np.log(speed.sizes_bytes), speed.bandwidth_bytes_per_s))


def decode_bound(speed: MachineSpeed, weight_bytes: int, cache_bytes: int, rows: int = 1) -> float:
    """The most tokens per second of ``rows`` together. cache_bytes: keys and values of one row."""
    read = weight_bytes + rows * cache_bytes
    operations = 2 * weight_bytes / DTYPES[speed.dtype] * rows  # without attention's few: still a bound
    return rows / max(read / bandwidth_at(speed, read), operations / speed.operations_per_s)


def bytes_per_step(model: Any) -> int:
    """Bytes of parameters that a decode step reads: all but tables of which it looks up a row a token."""
    import torch

    tables = {module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    tables -= {getattr(model.get_output_embeddings(), "weight", None)}  # tied to the output layer: read whole
    return sum(p.nbytes for p in model.parameters() if p not in tables)
