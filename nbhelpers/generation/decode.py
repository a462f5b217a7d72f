"""The decode loop: token ids in, rows out as they end, with a key-value cache and a clock.

Imports torch and transformers: modules that must start light import this one inside functions.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from nbhelpers.generation.sampling import NextToken
from nbhelpers.records import Engine, FinishReason

# Share of the slots that must be free before waiting rows are admitted. Steps and prefills together, counted
# for 150 texts of about 210 tokens in 16 slots with lab-gpt2 and lab-llama: 2,232 and 2,392 at a quarter,
# 2,317 and 2,516 at half, 2,459 and 2,450 when all must be free. A small gain, as these texts end alike.
REFILL = 0.25
SPARE = 64  # columns of a cache for tokens to come


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
    loop = (engine or engine_for(model)) == "loop"
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
            asked, longest = [prompts[row] for row in new], max(max_new_tokens[row] for row in new)
            rows, memory = new, KeyValues(model, asked) if loop else States(model, asked, longest)
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


def engine_for(model: Any) -> Engine:
    """The loop where all that the model remembers is keys and values, otherwise transformers' generate."""
    config = model.config.get_text_config(decoder=True)
    kinds = {type(layer) for layer in DynamicCache(config=config).layers}
    chunked = "chunked_attention" in (getattr(config, "layer_types", None) or ())
    odd = chunked or config.is_encoder_decoder or kinds - {DynamicLayer, DynamicSlidingWindowLayer}
    return "generate" if odd else "loop"


class KeyValues:
    """Prompts that were read once each, and the rows that continue them: rows may leave and join.

    logits: after each row's last token, [rows, vocabulary].
    """

    logits: Tensor

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]]) -> None:
        self.model, self.cache = model, Cache(layer_class_to_replicate=Window)  # layers come as it asks
        self.takes = inspect.signature(type(model).forward).parameters
        distinct = list(dict.fromkeys(map(tuple, prompts)))
        ids, mask = pad_left(distinct, model.device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)  # 0, 1, 2, … from each row's first real token
        self._forward(ids, positions, mask if len(set(map(len, distinct))) > 1 else None)
        places = [distinct.index(tuple(prompt)) for prompt in prompts]
        self.logits = self.logits[places]
        self.keep(places, ids.shape[1])

    def step(self, last: list[int], lengths: list[int]) -> None:
        """Read each row's last token; lengths: tokens of each so far, prompt and last included."""
        ids, length = torch.tensor([last, lengths], device=self.model.device)[..., None]
        mask = None
        if min(lengths) < max(lengths):
            mask = torch.arange(max(lengths), 0, -1, device=self.model.device) <= length
        self._forward(ids, length - 1, mask)

    def keep(self, rows: list[int], columns: int) -> None:
        """Only these rows, in this order (a row may come several times), and only the last columns."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.model.device)
        for layer in self.cache.layers:
            layer.hold(*(held[:, :, -columns:].index_select(0, index) for held in (layer.keys, layer.values)))

    def join(self, other: KeyValues) -> None:
        """Add the other's rows below, all ending at the same column."""
        for layer, more in zip(self.cache.layers, other.cache.layers, strict=True):
            columns = max(layer.keys.shape[2], more.keys.shape[2])
            pairs = (layer.keys, more.keys), (layer.values, more.values)
            # Zeros, never garbage: a masked column is multiplied by 0, and 0 x NaN is NaN.
            layer.hold(
                *(torch.cat([pad(x, (0, 0, columns - x.shape[2], 0)) for x in pair]) for pair in pairs)
            )

    def _forward(self, ids: Tensor, positions: Tensor, mask: Tensor | None) -> None:
        extra = {"position_ids": positions, "logits_to_keep": 1}  # without it, every prompt token's logits
        extra = {name: value for name, value in extra.items() if name in self.takes}
        out = self.model(
            input_ids=ids, attention_mask=mask, past_key_values=self.cache, use_cache=True, **extra
        )
        self.logits = out.logits[:, -1]


class States:
    """The same for a model that remembers more than keys and values, by transformers' own generate.

    All rows have one prompt, as a state that has read padding does not forget it, and none can join. One that
    leaves reads on in vain until the last has ended.
    """

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        ids = torch.tensor([list(prompt) for prompt in prompts], device=model.device)
        self.idle, self.places = torch.zeros_like(ids[:, 0]), list(range(len(ids)))
        self.passes = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(
                do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=0
            ),
            eos_token_id=None,  # ours end rows, and not in the latency pass
            repetition_penalty=1.0,
            custom_generate=_passes,
        )
        self.logits = next(self.passes)

    def step(self, last: list[int], lengths: list[int]) -> None:
        ids = self.idle.clone()
        ids[self.places] = ids.new_tensor(last)
        self.logits = self.passes.send(ids)[self.places]

    def keep(self, rows: list[int], columns: int) -> None:
        self.places = [self.places[row] for row in rows]


def _passes(model: Any, ids: Tensor, **kwargs: Any) -> Generator[Tensor, Tensor, None]:
    """A decoding method for generate (its ``_sample``): yields logits and is sent the next tokens."""
    prepared = ("logits_processor", "generation_config", "stopping_criteria")
    processor, config, _ = (kwargs.pop(name) for name in prepared)
    out = model._prefill(ids, config, kwargs)
    while True:
        kwargs = model._update_model_kwargs_for_generation(out, kwargs, is_encoder_decoder=False)
        chosen = yield processor(ids, out.logits[:, -1].float())
        ids = torch.cat([ids, chosen[:, None]], dim=-1)
        inputs = model.prepare_inputs_for_generation(ids, next_sequence_length=1, **kwargs)
        out = model(**inputs, return_dict=True)


def pad_left(prompts: Sequence[Sequence[int]], device: Any) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, both [B, longest] int64; zeros in front, so that every row ends at the edge."""
    rows = [torch.tensor(list(ids)) for ids in prompts]
    ones = [torch.ones_like(row) for row in rows]
    ids, mask = (pad_sequence(part, batch_first=True, padding_side="left") for part in (rows, ones))
    return ids.to(device), mask.to(device)


class Window(DynamicLayer):
    """Keys and values of one layer, [rows, heads, columns, size]; every row ends at the last column.

    transformers' own layer copies everything it holds for each new token; this one keeps room at the end.
    A sliding-window layer is held in full: the model's mask hides what is outside its window.
    """

    room: list[Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return self.keys, self.values
        start, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if self.room is None or self.room[0].shape[2] < end:
            self.room = [pad(held, (0, 0, 0, end + SPARE - start)) for held in (self.keys, self.values)]
        for held, more in zip(self.room, (key_states, value_states), strict=True):
            held[:, :, start:end] = more
        self.keys, self.values = (held[:, :, :end] for held in self.room)
        return self.keys, self.values

    def hold(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values, self.room = keys, values, None
