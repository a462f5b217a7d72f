"""The two engines: what rows remember between passes, and which of the two serves a model.

Imports torch and transformers: modules that must start light import this one inside functions.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Generator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from nbhelpers.records import Engine, Failure, LabError

SPARE = 64  # columns of a cache for tokens to come
PROMPTS, STEPS = (2, 6), 3  # tokens of what a model is tried with, and of what follows
# How far the logits of an engine may lie from those of passes without a cache, in their standard deviations.
# Of 160 architectures in float32, those that are served right lay below 0.002, the others above 0.06.
CLOSE, CLOSE_IN_HALF = 0.01, 0.3
PLAIN = GenerationConfig(max_new_tokens=1, pad_token_id=0)
TRIED: WeakKeyDictionary[Any, tuple[Engine, str]] = WeakKeyDictionary()


def engine_for(model: Any, tokens: int = 0) -> Engine:
    """What serves a model and rows of so many tokens: the loop, otherwise transformers' generate."""
    engine = tried(model)[0]
    return "generate" if tokens > reach(model) else engine


@torch.inference_mode()
def tried(model: Any) -> tuple[Engine, str]:
    """The engine that serves a model, and what its trial gave; a model is tried once.

    Some greedy tokens of unlike rows, padded together where the engine does that, are compared with passes
    that use no cache at all. Raises LabError where neither engine gives the same. A model that fails without
    a cache too is not tried: each of its rows will say why.
    """
    if model in TRIED:
        return TRIED[model]
    engines: list[Engine] = ["loop", "generate"] if _remembers_keys_and_values(model) else ["generate"]
    try:
        prompts = _ordinary(model)
        right = _greedy(NoCache(model, prompts), prompts)
    except Exception as error:
        return engines[0], f"not tried: {type(error).__name__}"
    found, apart = "", math.inf
    for engine in engines:
        try:
            apart = _distance(model, engine, prompts, right)
            found += f", {engine} by {apart:.1g} standard deviations"
        except Exception as error:  # whatever a model raises that is used in a way it is not made for
            found += f", {engine} fails ({type(error).__name__}: {error})"
        if apart <= (CLOSE if model.dtype.itemsize >= 4 else CLOSE_IN_HALF):
            TRIED[model] = engine, f"logits off from those of passes without a cache:{found[1:]}"
            return TRIED[model]
    why = f"gives other logits with a cache than without one ({found[2:]})".splitlines()[0]
    raise LabError(f"The class {type(model).__name__} {why}: choose another model.", Failure.REFUSED)


def _remembers_keys_and_values(model: Any) -> bool:
    """Whether that is all it remembers, in a cache that its forward takes."""
    config = model.config.get_text_config(decoder=True)
    kinds = {type(layer) for layer in DynamicCache(config=config).layers}
    chunked = "chunked_attention" in (getattr(config, "layer_types", None) or ())
    odd = chunked or config.is_encoder_decoder or kinds - {DynamicLayer, DynamicSlidingWindowLayer}
    return not odd and "past_key_values" in takes(model)


def _ordinary(model: Any) -> list[list[int]]:
    """Prompts of two lengths, without tokens that the configuration names."""
    config, size = model.config.get_text_config(decoder=True), model.get_input_embeddings().weight.shape[0]
    special = [value for name, value in config.to_dict().items() if name.endswith(("_id", "_index"))]
    plain = [token for token in range(size) if token not in special]
    plain = plain[:: len(plain) // sum(PROMPTS) or 1]
    return [plain[: PROMPTS[0]], plain[-PROMPTS[1] :]]


def _greedy(memory: Any, prompts: Sequence[Sequence[int]], right: Tensor | None = None) -> Tensor:
    """Logits [STEPS, rows, vocabulary] after each prompt and its likeliest tokens: by ``right``, if given."""
    logits = memory.logits.float()[None]
    for step in range(1, STEPS):
        likeliest = (logits if right is None else right)[step - 1].argmax(-1).tolist()
        memory.step(likeliest, [len(prompt) + step for prompt in prompts])
        logits = torch.cat([logits, memory.logits.float()[None]])
    return logits


def _distance(model: Any, engine: Engine, prompts: list[list[int]], right: Tensor) -> float:
    """How far an engine's logits lie from the right ones, in standard deviations of these.

    The largest of a token, the median of a row, the worst row.
    """
    if engine == "loop":
        logits = _greedy(KeyValues(model, prompts), prompts, right)
    else:  # each twice, as repeats of a prompt share a batch
        right = right.repeat_interleave(2, 1)
        twice = [([prompt] * 2, right[:, [2 * row] * 2]) for row, prompt in enumerate(prompts)]
        logits = torch.cat([_greedy(States(model, pair), pair, own) for pair, own in twice], dim=1)
    best = right.amax(-1, keepdim=True)
    there = right > best - 1e3  # some models mask a part of their vocabulary
    spread = right.where(there, best).std(-1).clamp(min=1e-3)
    return ((logits - right).abs().where(there, 0.0).amax(-1) / spread).median(0).values.max().item()


def takes(model: Any) -> Collection[str]:
    """The names of what a model's forward takes."""
    return inspect.signature(type(model).forward).parameters


def reach(model: Any) -> float:
    """Above how many tokens of a row the longest of a batch turns the positions of all the others too."""
    config = model.config.get_text_config(decoder=True)
    ropes = getattr(config, "rope_parameters", None) or {}
    turning = [
        rope.get("original_max_position_embeddings") or config.max_position_embeddings
        for rope in (ropes, *ropes.values())  # one for all layers, or one for each kind of them
        if isinstance(rope, dict) and rope.get("rope_type") in ("dynamic", "longrope")
    ]
    return min(turning, default=math.inf)


class KeyValues:
    """Prompts that were read once each, and the rows that continue them: rows may leave and join.

    logits: after each row's last token, [rows, vocabulary].
    """

    logits: Tensor

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]]) -> None:
        self.model, self.cache = model, Cache(layer_class_to_replicate=Window)  # layers come as it asks
        self.takes = takes(model)
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

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]]) -> None:
        ids = torch.tensor([list(prompt) for prompt in prompts], device=model.device)
        self.idle, self.places = torch.zeros_like(ids[:, 0]), list(range(len(ids)))
        if reach(model) < math.inf:  # a short pass: such a model remembers the longest row it has read
            model(ids[:, :1])
        own, model.generation_config = model.generation_config, PLAIN  # no settings of the maker's
        try:
            mask = torch.ones_like(ids)
            self.passes = model.generate(ids, attention_mask=mask, custom_generate=_passes)
        finally:
            model.generation_config = own
        self.logits = next(self.passes)

    def step(self, last: list[int], lengths: list[int]) -> None:
        ids = self.idle.clone()
        ids[self.places] = ids.new_tensor(last)
        self.logits = self.passes.send(ids)[self.places]

    def keep(self, rows: list[int], columns: int) -> None:
        self.places = [self.places[row] for row in rows]


def _passes(model: Any, ids: Tensor, **kwargs: Any) -> Generator[Tensor, Tensor, None]:
    """A decoding method for generate (its ``_sample``): yields logits and is sent the next tokens.

    Processors of logits and criteria to stop are left out: rows are chosen and ended alike by both engines.
    """
    prepared = ("generation_config", "logits_processor", "stopping_criteria")
    config, *_ = (kwargs.pop(name) for name in prepared)
    out = model._prefill(ids, config, kwargs)
    while True:
        kwargs = model._update_model_kwargs_for_generation(out, kwargs, is_encoder_decoder=False)
        chosen = yield out.logits[:, -1]
        ids = torch.cat([ids, chosen[:, None]], dim=-1)
        new = 1 if kwargs["use_cache"] else None
        inputs = model.prepare_inputs_for_generation(ids, next_sequence_length=new, **kwargs)
        out = model(**inputs, return_dict=True)


class NoCache:
    """The same by whole passes over each row alone: slow, and right."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]]) -> None:
        self.model, self.rows = model, [list(prompt) for prompt in prompts]
        self._read()

    def step(self, last: list[int], lengths: list[int]) -> None:
        self.rows = [[*row, token] for row, token in zip(self.rows, last, strict=True)]
        self._read()

    def _read(self) -> None:
        off = {"use_cache": False} if "use_cache" in takes(self.model) else {}
        rows = [torch.tensor([row], device=self.model.device) for row in self.rows]
        self.logits = torch.cat([self.model(input_ids=row, **off).logits[:, -1] for row in rows])


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
