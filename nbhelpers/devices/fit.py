"""What this machine allows: does a model fit its memory, and how fast could it decode, whatever the program?

Bytes of generating come from a model's architecture. A step takes at least bytes / bandwidth and at least
operations / rate: the roofline model (Williams, Waterman and Patterson 2009, doi 10.1145/1498765.1498785).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from nbhelpers.devices import machine
from nbhelpers.records import DTYPES, ModelSpec

HEADROOM = 0.9  # assumed: share of the free memory that a need may take; the rest is for activations
LOGIT_BYTES = 24  # for each row and entry of the vocabulary: logits, and what drawing from them takes
LARGEST = 2**28  # bytes: well beyond a processor's cache, all is read as fast
COLUMNS, MATRIX = 1024, 512  # of the matrix that is read; both sides of those multiplied
MEASURE_S = 0.1


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


def bandwidth(size: float, device: str = "cpu", dtype: str = "float32") -> float:
    """Bytes per second at which a matrix of about this size, LARGEST at most, is multiplied by a vector."""
    lines = max(1, int(min(size, LARGEST)) // (COLUMNS * DTYPES[dtype]))
    return lines * COLUMNS * DTYPES[dtype] / _seconds("a.mv(b)", (lines, COLUMNS), (COLUMNS,), device, dtype)


def operations_per_s(device: str = "cpu", dtype: str = "float32") -> float:
    """Rate of matrix products. A linear layer's matrix is transposed: CPUs may have no fast routine else."""
    return 2 * MATRIX**3 / _seconds("a @ b.T", (MATRIX, MATRIX), (MATRIX, MATRIX), device, dtype)


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
