"""The two engines: what rows remember between passes. (Imports torch.)"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import Parameter, functional
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, GenerationConfig
from transformers.cache_utils import DynamicLayer

Rows = Sequence[Sequence[int]]  # token ids
SPARE = 64  # columns of a cache for tokens to come
# Products of weights and tokens below which a pass takes one thread: half a millisecond of a core. Where
# another process had the second core, a pass of lab-gpt2 with one row took 62 ms instead of 1.
ALONE = 5e7
ROWS = 24  # from so many on, products are oneDNN's
LINEAR, ADDMM = functional.linear, torch.addmm
ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkl.is_available() else None
PLAIN = GenerationConfig(max_new_tokens=1, pad_token_id=0)


def takes(model: Any) -> Collection[str]:
    """The names of the arguments of a model's forward."""
    return inspect.signature(type(model).forward).parameters


def reach(model: Any) -> float:
    """Above how many tokens of a row the longest of a batch turns the positions of all the others too."""
    config = model.config.get_text_config(decoder=True)
    rope = str(getattr(config, "rope_parameters", None))  # for each kind of layer, in some models
    if not re.search("dynamic|longrope", rope):
        return math.inf
    return min(map(int, re.findall(r"original_max\w+': (\d+)", rope)), default=config.max_position_embeddings)


@contextmanager
def threads_for(products: int) -> Iterator[None]:
    """One thread for a pass of few products, which waits for no other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if products < ALONE else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class KeyValues:
    """Prompts that were read once each, and the rows that continue them: rows may leave and join.

    logits: after each row's last token, [rows, vocabulary].
    """

    logits: Tensor

    def __init__(self, model: Any, prompts: Rows) -> None:
        self.model, self.takes = model, takes(model)
        self.cache = Cache(layer_class_to_replicate=Window)  # layers come as the model asks
        distinct = list(dict.fromkeys(map(tuple, prompts)))
        rows = [torch.tensor(prompt, device=model.device) for prompt in distinct]
        self._read(pad_sequence(rows, batch_first=True, padding_side="left"), list(map(len, distinct)))
        indices = [distinct.index(tuple(prompt)) for prompt in prompts]
        self.logits = self.logits[indices]
        self.keep(indices, max(map(len, prompts)))

    def step(self, last: list[int], lengths: list[int]) -> None:
        """Read each row's last token; lengths: tokens of each so far, prompt and last included."""
        self._read(torch.tensor(last, device=self.model.device)[:, None], lengths)

    def keep(self, rows: list[int], columns: int) -> None:
        """Only these rows, in this order (a row may come several times), and only the last columns."""
        for layer in self.cache.layers:
            layer.keep(rows, columns)

    def join(self, other: KeyValues) -> None:
        """Add the other's rows below, all ending at the same column."""
        for layer, added in zip(self.cache.layers, other.cache.layers, strict=True):
            columns = max(layer.keys.shape[2], added.keys.shape[2])
            pairs = (layer.keys, added.keys), (layer.values, added.values)
            # Zeros, never garbage: a masked column is multiplied by 0, and 0 x NaN is NaN.
            joined = (torch.cat([pad(x, (0, 0, columns - x.shape[2], 0)) for x in pair]) for pair in pairs)
            layer.hold(*joined)

    def _read(self, ids: Tensor, lengths: list[int]) -> None:
        """Read ids [rows, n] that end rows of these lengths; shorter rows are padded on the left."""
        ends = torch.tensor(lengths, device=ids.device)[:, None]
        from_end = torch.arange(max(lengths), 0, -1, device=ids.device)
        mask = from_end <= ends if min(lengths) < max(lengths) else None
        positions = (ends - from_end).clamp(min=0)[:, -ids.shape[1] :]  # 0, 1, 2, … from the first real token
        optional = {"position_ids": positions, "logits_to_keep": 1}  # 1: not every prompt token's logits
        inputs = {"input_ids": ids, "attention_mask": mask, "past_key_values": self.cache, "use_cache": True}
        inputs |= {name: value for name, value in optional.items() if name in self.takes}
        with patch.object(functional, "linear", _linear), patch.object(torch, "addmm", _addmm):
            self.logits = self.model(**inputs).logits[:, -1]


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """functional.linear, by oneDNN where that is faster. Without gradients, which that has none of.

    torch asks MKL, which leaves half of the arithmetic of AMD's processors unused (AVX-512). For few rows
    oneDNN's preparations take longer than the product.
    """
    plain = x.dtype == torch.float32 and x.device.type == "cpu" and type(weight) in (Tensor, Parameter)
    if plain and ONEDNN and x.numel() >= ROWS * x.shape[-1] and not torch.is_grad_enabled():
        with suppress(RuntimeError):  # without memory for its own code; torch's may do with what is left
            return cast(Tensor, ONEDNN(x, weight, bias, "none", [], ""))
    return LINEAR(x, weight, bias)


def _addmm(bias: Tensor, x: Tensor, weight: Tensor, **scales: Any) -> Tensor:
    """torch.addmm as GPT-2's layers call it, for functional.linear."""
    return ADDMM(bias, x, weight, **scales) if scales or bias.dim() > 1 else _linear(x, weight.t(), bias)


class States:
    """The same for a model that remembers more than keys and values, by transformers' own generate.

    All rows have one prompt, as a state that has read padding does not forget it, and none can join. One that
    leaves reads on in vain until the last has ended.
    """

    def __init__(self, model: Any, prompts: Rows) -> None:
        ids = torch.tensor([list(prompt) for prompt in prompts], device=model.device)
        self.idle, self.indices = torch.zeros_like(ids[:, 0]), list(range(len(ids)))
        if reach(model) < math.inf:  # a short pass: such a model remembers the longest row it has read
            model(ids[:, :1])
        with patch.object(model, "generation_config", PLAIN):  # no settings of the maker's
            self.passes = model.generate(ids, attention_mask=torch.ones_like(ids), custom_generate=_passes)
        self.logits = next(self.passes)

    def step(self, last: list[int], lengths: list[int]) -> None:
        ids = self.idle.clone()
        ids[self.indices] = ids.new_tensor(last)
        self.logits = self.passes.send(ids)[self.indices]

    def keep(self, rows: list[int], columns: int) -> None:
        self.indices = [self.indices[row] for row in rows]


def _passes(model: Any, ids: Tensor, **kwargs: Any) -> Generator[Tensor, Tensor, None]:
    """A decoding method for generate (its ``_sample``): yields logits and is sent the next tokens.

    Processors of logits and criteria to stop are left out: rows are chosen and ended alike by both engines.
    """
    prepared = ("generation_config", "logits_processor", "stopping_criteria")
    config, *_ = (kwargs.pop(name) for name in prepared)
    out = model._prefill(ids, config, kwargs)
    while True:
        kwargs = model._update_model_kwargs_for_generation(out, kwargs, is_encoder_decoder=False)
        tokens = yield out.logits[:, -1]
        ids = torch.cat([ids, tokens[:, None]], dim=-1)
        unread = 1 if kwargs["use_cache"] else None
        inputs = model.prepare_inputs_for_generation(ids, next_sequence_length=unread, **kwargs)
        out = model(**inputs, return_dict=True)


class Window(DynamicLayer):
    """Keys and values of one layer, [rows, heads, columns, size]; every row ends at the last column.

    transformers' own layer copies everything it holds for each new token; this one keeps room at the end.
    A sliding-window layer is held in full: the model's mask hides what is outside its window.
    """

    keys: Tensor
    values: Tensor
    room: tuple[Tensor, ...] = ()  # keys and values with columns to come, never read before written

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.hold(key_states, value_states)
            return self.keys, self.values
        start = self.keys.shape[2]
        end = start + key_states.shape[2]
        if not self.room or self.room[0].shape[2] < end:
            spare = (-1, -1, end + SPARE - start, -1)
            states = self.keys, self.values
            self.room = tuple(torch.cat([held, held[:, :, :1].expand(spare)], dim=2) for held in states)
        for held, new in zip(self.room, (key_states, value_states), strict=True):
            held[:, :, start:end] = new
        self.keys, self.values = (held[:, :, :end] for held in self.room)
        return self.keys, self.values

    def keep(self, rows: list[int], columns: int) -> None:
        """See KeyValues.keep. Where rows only leave, only those that take another's place are copied."""
        first, count = self.keys.shape[2] - columns, len(rows)
        moved = [index for index, row in enumerate(rows) if index != row]
        if self.room and count <= len(self.keys):
            for held in self.room:
                held[moved] = held[[rows[index] for index in moved]]
            self.room = tuple(held[:count, :, first:] for held in self.room)
            self.keys, self.values = (held[:, :, :columns] for held in self.room)
        else:
            self.hold(*(held[rows, :, first:] for held in (self.keys, self.values)))

    def hold(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values, self.room = keys, values, ()
