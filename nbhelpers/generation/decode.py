"""The decode loop: token ids in, rows out as they end, with a key-value cache and a clock.

Imports torch and transformers: modules that must start light import this one inside functions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from nbhelpers.generation.engines import KeyValues, States, engine_for
from nbhelpers.generation.sampling import NextToken
from nbhelpers.records import Engine, Failure, FinishReason, LabError

# Share of the slots that must be free before waiting rows are admitted. Steps and prefills together, counted
# for 150 texts of about 210 tokens in 16 slots with lab-gpt2 and lab-llama: 2,232 and 2,392 at a quarter,
# 2,317 and 2,516 at half, 2,459 and 2,450 when all must be free. A small gain, as these texts end alike.
REFILL = 0.25
ALLOCATION = ("out of memory", "not enough memory", "can't allocate memory")  # the last is Linux without room


@dataclass(frozen=True)
class Started:
    """These rows are about to be prefilled; their clock starts when the next event is asked for."""

    rows: list[int]


@dataclass(frozen=True)
class Finished:
    """What one row produced; seconds count from the start of its own prefill."""

    row: int
    tokens: tuple[int, ...]  # unpadded, the end token included
    finish_reason: FinishReason  # "eos", "length" or "time"
    ttft_s: float
    latency_s: float  # until this row's own last token


@torch.inference_mode()
def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: Sequence[int],
    choose: NextToken,
    end_tokens: Collection[int] = (),
    slots: int | None = None,
    timeout_s: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
    engine: Engine | None = None,
) -> Iterator[Started | Finished]:
    """Continue all prompts, at most `slots` of them at a time (None: all), one token each per pass.

    prompts: lists of token ids, none empty; equal ones share one prefill. max_new_tokens: for each row, at
    least 1. end_tokens: the ids that end a row; only generated tokens are looked at. engine: None is that of
    engine_for. A row that ends leaves; when a quarter of the slots are free, the longest waiting prompts
    take them. A row that took more than timeout_s ends after the pass it is in ("time"); a pass itself cannot
    be stopped from within its process.
    """
    longest = max(len(ids) + room for ids, room in zip(prompts, max_new_tokens, strict=True))
    loop = (engine or engine_for(model, longest)) == "loop"
    slots = slots or len(prompts)
    # Like lengths pad little; states (see States) share a batch with their own kind only.
    waiting = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), () if loop else tuple(prompts[i])))
    tokens: list[list[int]] = [[] for _ in prompts]
    began, ttft_s = dict[int, float](), dict[int, float]()
    live, held = list[int](), cast(Any, None)
    while live or waiting:
        new = waiting[: slots - len(live)] if len(live) <= slots * (1 - REFILL) else []
        if not loop:
            new = [] if live else [row for row in new if tuple(prompts[row]) == tuple(prompts[new[0]])]
        if new:
            waiting = waiting[len(new) :]
            yield Started(new)
            began.update(dict.fromkeys(new, clock()))
            asked = [prompts[row] for row in new]
            rows, memory = new, KeyValues(model, asked) if loop else States(model, asked)
        else:
            rows, memory = live, held
            memory.step([tokens[row][-1] for row in live], [len(prompts[r]) + len(tokens[r]) for r in live])
        ids = choose(memory.logits.float(), rows, [len(tokens[row]) for row in rows]).tolist()  # waits
        now, stay = clock(), []
        for place, (row, token) in enumerate(zip(rows, ids, strict=True)):
            tokens[row].append(token)
            latency_s = now - began[row]
            ttft_s.setdefault(row, latency_s)
            reason: FinishReason | None = "time" if latency_s > timeout_s else None
            if token in end_tokens:
                reason = "eos"
            elif len(tokens[row]) == max_new_tokens[row]:
                reason = "length"
            if reason:
                yield Finished(row, tuple(tokens[row]), reason, ttft_s[row], latency_s)
            else:
                stay.append(place)
        if len(stay) < len(rows):
            rows = [rows[place] for place in stay]
            memory.keep(stay, max((len(prompts[row]) + len(tokens[row]) for row in rows), default=1) - 1)
        if new and live:
            held.join(memory)
            live = live + rows
        else:
            live, held = rows, memory


def decode_all(*args: Any, **kwargs: Any) -> list[Finished]:
    """The rows of ``decode``, which takes the same arguments, in their order."""
    events = decode(*args, **kwargs)
    return sorted((e for e in events if isinstance(e, Finished)), key=lambda event: event.row)


def failure_of(error: Exception) -> Failure:
    """The kind of an exception, by its type; only where memory ran out on the CPU or on MPS by its text.

    There torch raises a plain RuntimeError, which nothing else tells from others.
    """
    if isinstance(error, LabError):
        return error.kind
    full = isinstance(error, RuntimeError) and any(words in str(error).lower() for words in ALLOCATION)
    if full or isinstance(error, MemoryError | torch.OutOfMemoryError):
        return Failure.OUT_OF_MEMORY
    if isinstance(error, TimeoutError):
        return Failure.TIMEOUT
    return Failure.BAD_OUTPUT if isinstance(error, UnicodeError) else Failure.OTHER
