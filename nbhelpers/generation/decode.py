"""The decode loop: token ids in, token ids out, with a key-value cache and a clock.

``torch`` is imported inside the functions, so that rooms which only read results start without it.
"""

from __future__ import annotations

import functools
import inspect
import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nbhelpers.generation.sampling import Chooser
from nbhelpers.records import Engine, FinishReason

if TYPE_CHECKING:
    from torch import Tensor

# Share of the slots that must be free before waiting rows are admitted. Steps and prefills together, counted
# for 150 texts of about 210 tokens in 16 slots with lab-gpt2 and lab-llama: 2,232 and 2,392 at a quarter,
# 2,317 and 2,516 at half, 2,459 and 2,450 when all must be free. A small gain, as these texts end alike.
REFILL = 0.25

OnRow = Callable[[int, "Row"], None]
OnAdmit = Callable[[list[int]], None]


@dataclass(frozen=True)
class Row:
    """What one row produced; seconds count from the start of its own prefill."""

    tokens: tuple[int, ...]  # unpadded, the end token included
    finish_reason: FinishReason  # "eos", "length" or "time"
    ttft_s: float
    latency_s: float  # until this row's own last token


def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    choose: Chooser,
    end_tokens: Collection[int] = (),
    on_row: OnRow = lambda index, row: None,
    clock: Callable[[], float] = time.perf_counter,
    slots: int | None = None,
    on_admit: OnAdmit = lambda rows: None,
    limit_s: float = math.inf,
) -> list[Row]:
    """Continue all prompts, at most `slots` of them at a time (None: all), one token each per pass.

    prompts: lists of token ids, none empty; equal ones share one prefill. limits: most new tokens per row, at
    least 1. choose: (logits [rows, vocabulary] in float32, indices of the rows, tokens that each has so far)
    -> token ids [rows]. end_tokens: the ids that end a row; only generated tokens are looked at.
    A row that ends leaves; when a quarter of the slots are free, the longest waiting prompts take them.
    on_admit is called with the rows that start, on_row as they end. A row that took more than limit_s seconds
    ends after the pass it is in ("time"); a pass itself cannot be stopped from within its process.
    """
    import torch

    from nbhelpers.generation import caches

    writer = Writer(prompts, limits, end_tokens, on_row, on_admit, clock, limit_s)
    slots = slots or len(prompts)
    waiting = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))  # like lengths pad little
    live: list[int] = []
    cache: Any = None
    with torch.inference_mode():
        while live or waiting:
            new = waiting[: slots - len(live)] if len(live) <= slots * (1 - REFILL) else []
            if new:
                waiting = waiting[len(new) :]
                writer.start(new)
                logits, memory, places = prefill(model, [prompts[row] for row in new])
                rows = new
            else:
                rows, memory, places = live, cache, list(range(len(live)))
                logits = step(model, cache, [writer.tokens[row][-1] for row in live], writer.lengths(live))
            stay = writer.write(rows, choose(logits[places].float(), rows, writer.counts(rows)))
            if not new and len(stay) == len(rows):
                continue
            rows = [rows[place] for place in stay]
            caches.keep(memory, [places[place] for place in stay], max(writer.lengths(rows), default=1) - 1)
            if new and live:
                caches.join(cache, memory)
                rows, memory = live + rows, cache
            live, cache = rows, memory
    return writer.done()


def engine_for(model: Any) -> Engine:
    """The loop where the model's memory is keys and values alone, otherwise transformers.generate."""
    from nbhelpers.generation import caches

    return "loop" if caches.serves(model) else "generate"


def prefill(model: Any, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Any, list[int]]:
    """Read every distinct prompt once: logits [distinct, vocabulary], cache, each prompt's place."""
    from nbhelpers.generation import caches

    distinct = list(dict.fromkeys(tuple(ids) for ids in prompts))
    ids, mask = pad_left(distinct, model.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # 0, 1, 2, … from each row's first real token
    cache = caches.new()
    padded = len({len(row) for row in distinct}) > 1
    logits = _forward(model, ids, positions, mask if padded else None, cache)
    return logits, cache, [distinct.index(tuple(ids)) for ids in prompts]


def step(model: Any, cache: Any, last: list[int], lengths: list[int]) -> Tensor:
    """One more token for every row: logits [rows, vocabulary] after its last one.

    lengths: tokens of each row so far, prompt included. The cache has a column for all but the last.
    """
    import torch

    ids, length = torch.tensor([last, lengths], device=model.device)[..., None]
    mask = None
    if min(lengths) < max(lengths):
        mask = torch.arange(max(lengths), 0, -1, device=model.device) <= length
    return _forward(model, ids, length - 1, mask, cache)


def _forward(model: Any, ids: Tensor, positions: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
    takes = _parameters(type(model).forward)
    extra: dict[str, Any] = {"position_ids": positions} if "position_ids" in takes else {}
    if "logits_to_keep" in takes:  # otherwise logits of every prompt token are computed and dropped
        extra["logits_to_keep"] = 1
    out = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **extra)
    logits: Tensor = out.logits[:, -1]
    return logits


@functools.lru_cache
def _parameters(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def decode_by_generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    choose: Chooser,
    end_tokens: Collection[int] = (),
    on_row: OnRow = lambda index, row: None,
    clock: Callable[[], float] = time.perf_counter,
    slots: int | None = None,
    on_admit: OnAdmit = lambda rows: None,
    limit_s: float = math.inf,
) -> list[Row]:
    """The same rows by transformers.generate, for models whose memory is more than keys and values.

    Only the repeats of one prompt share a batch: a state that has read padding does not forget it.
    """
    import torch
    from transformers import GenerationConfig

    writer = Writer(prompts, limits, end_tokens, on_row, on_admit, clock, limit_s)
    slots = slots or len(prompts)
    waiting = sorted(range(len(prompts)), key=lambda row: (-len(prompts[row]), tuple(prompts[row])))
    while waiting:
        same = [row for row in waiting if tuple(prompts[row]) == tuple(prompts[waiting[0]])]
        rows = same[:slots]
        waiting = [row for row in waiting if row not in rows]
        live = list(rows)

        def force(ids: Tensor, scores: Tensor, rows: list[int] = rows, live: list[int] = live) -> Tensor:
            """Our chooser as a logits processor: all but the chosen token become impossible."""
            chosen = choose(scores[[rows.index(row) for row in live]].float(), live, writer.counts(live))
            forced = torch.full_like(scores, float("-inf"))
            forced[:, 0] = 0.0
            for row, token in zip(live, chosen.tolist(), strict=True):
                forced[rows.index(row), token] = 1.0
            live[:] = [live[place] for place in writer.write(live, chosen)]
            return forced

        def ended(ids: Tensor, scores: Tensor, rows: list[int] = rows, live: list[int] = live) -> Tensor:
            return torch.tensor([row not in live for row in rows], device=ids.device)

        ids = torch.tensor([list(prompts[row]) for row in rows], device=model.device)
        plan = GenerationConfig(
            do_sample=False, max_new_tokens=max(limits[row] for row in rows), pad_token_id=0
        )
        writer.start(rows)
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=plan,
            logits_processor=[force],
            stopping_criteria=[ended],
            eos_token_id=None,  # ours end rows, and not in the latency pass
            repetition_penalty=1.0,
        )
    return writer.done()


class Writer:
    """Takes down what each row writes, and reads the clock once as rows start and once a pass."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        end_tokens: Collection[int],
        on_row: OnRow,
        on_admit: OnAdmit,
        clock: Callable[[], float],
        limit_s: float,
    ) -> None:
        self.prompts, self.limits, self.end_tokens = prompts, limits, end_tokens
        self.on_row, self.on_admit, self.clock, self.limit_s = on_row, on_admit, clock, limit_s
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.started, self.first = [0.0] * len(prompts), [0.0] * len(prompts)
        self.rows: dict[int, Row] = {}

    def start(self, rows: list[int]) -> None:
        self.on_admit(rows)
        now = self.clock()
        for row in rows:
            self.started[row] = now

    def write(self, rows: list[int], chosen: Tensor) -> list[int]:
        """Note one token for each row; the places of those that go on."""
        ids, stay = chosen.tolist(), []  # waits for the device
        now = self.clock()
        for place, (row, token) in enumerate(zip(rows, ids, strict=True)):
            tokens = self.tokens[row]
            tokens.append(token)
            if len(tokens) == 1:
                self.first[row] = now - self.started[row]
            reason: FinishReason | None = None
            if token in self.end_tokens:
                reason = "eos"
            elif len(tokens) == self.limits[row]:
                reason = "length"
            elif now - self.started[row] > self.limit_s:
                reason = "time"
            if reason:
                self.rows[row] = Row(tuple(tokens), reason, self.first[row], now - self.started[row])
                self.on_row(row, self.rows[row])
            else:
                stay.append(place)
        return stay

    def counts(self, rows: list[int]) -> list[int]:
        """Tokens that each row has written."""
        return [len(self.tokens[row]) for row in rows]

    def lengths(self, rows: list[int]) -> list[int]:
        """Tokens of each row, its prompt included."""
        return [len(self.prompts[row]) + len(self.tokens[row]) for row in rows]

    def done(self) -> list[Row]:
        return [self.rows[row] for row in range(len(self.prompts))]


def pad_left(prompts: Sequence[Sequence[int]], device: Any) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, both [B, longest] int64; zeros in front, so that every row ends at the edge.

    The padding id is irrelevant: the mask hides it, and it is never counted.
    """
    import torch

    width = max(len(ids) for ids in prompts)
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in prompts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    return ids.to(device), mask.to(device)
