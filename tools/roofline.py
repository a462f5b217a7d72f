"""How fast could this machine decode, whatever the program? Measured for notebooks 01, 03, 16 and the bench.

A step takes at least bytes / bandwidth and at least operations / rate: the roofline model (Williams, Waterman
and Patterson 2009, doi 10.1145/1498765.1498785).
"""

from __future__ import annotations

import time
from typing import Any

from nbhelpers.devices import machine
from nbhelpers.records import DTYPES

LARGEST = 2**28  # bytes: well beyond a processor's cache, all is read as fast
COLUMNS, MATRIX = 1024, 512  # of the matrix that is read; both sides of those multiplied
MEASURE_S = 0.1


def bandwidth(size: float, device: str = "cpu", dtype: str = "float32") -> float:
    """Bytes per second at which a matrix of about this size, LARGEST at most, is multiplied by a vector."""
    lines = max(1, int(min(size, LARGEST)) // (COLUMNS * DTYPES[dtype]))
    return lines * COLUMNS * DTYPES[dtype] / _seconds("a.mv(b)", (lines, COLUMNS), (COLUMNS,), device, dtype)


def operations_per_s(device: str = "cpu", dtype: str = "float32") -> float:
    """Rate of matrix products. A linear layer's matrix is transposed: CPUs may have no fast routine else."""
    import torch

    square, calls = (MATRIX, MATRIX), ["a @ b.T"]
    if device == "cpu" and hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # as generation.engines multiplies
        calls.append("torch.ops.mkldnn._linear_pointwise(a, b, None, 'none', [], '')")
    return 2 * MATRIX**3 / min(_seconds(call, square, square, device, dtype) for call in calls)


def _seconds(call: str, a: tuple[int, ...], b: tuple[int, ...], device: str, dtype: str) -> float:
    """Seconds of a call with two tensors of ones, its best in MEASURE_S: disturbances only slow down."""
    import torch
    from torch.utils.benchmark import Timer

    def clock() -> float:
        machine.synchronize(device)
        return time.perf_counter()

    shapes, how = {"a": a, "b": b}, {"dtype": getattr(torch, dtype), "device": device}
    given = {name: torch.ones(shape, **how) for name, shape in shapes.items()}
    timer = Timer(call, timer=clock, globals=given, num_threads=torch.get_num_threads())
    return min(timer.blocked_autorange(min_run_time=MEASURE_S).times)


def decode_bound(device: str, dtype: str, weight_bytes: int, cache_bytes: int, rows: int = 1) -> float:
    """The most tokens per second of ``rows`` together, as measured now. cache_bytes: of one row."""
    read = weight_bytes + rows * cache_bytes
    operations = 2 * weight_bytes / DTYPES[dtype] * rows  # without attention's few: still a bound
    return rows / max(read / bandwidth(read, device, dtype), operations / operations_per_s(device, dtype))


def bytes_per_step(model: Any) -> int:
    """Bytes of parameters that a decode step reads: all but tables of which it looks up a row a token."""
    import torch

    tables = {module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    tables -= {getattr(model.get_output_embeddings(), "weight", None)}  # tied to the output layer: read whole
    return sum(p.nbytes for p in model.parameters() if p not in tables)
