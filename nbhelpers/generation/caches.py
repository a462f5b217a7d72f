"""The decode loop's key-value cache: written in place, and rows repeat, leave and join.

A class here inherits from transformers, so other modules import this one inside functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

SPARE = 64  # columns of room for tokens to come


class Window(DynamicLayer):
    """Keys and values of one layer, [rows, heads, columns, size]; every row ends at the last column.

    transformers' own layer copies everything it holds for each new token; this one keeps room at the end.
    A sliding-window layer is held in full: the model's mask hides what is outside its window.
    """

    rooms: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return self.keys, self.values
        start = self.keys.shape[2]
        end = start + key_states.shape[2]
        if self.rooms is None or self.rooms[0].shape[2] < end:
            self.rooms = _with_room(self.keys, end + SPARE), _with_room(self.values, end + SPARE)
        keys, values = self.rooms
        keys[:, :, start:end], values[:, :, start:end] = key_states, value_states
        self.keys, self.values = keys[:, :, :end], values[:, :, :end]
        return self.keys, self.values

    def hold(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values, self.rooms = keys, values, None


def _with_room(held: Tensor, columns: int) -> Tensor:
    room = held.new_empty(*held.shape[:2], columns, held.shape[3])
    room[:, :, : held.shape[2]] = held
    return room


def serves(model: Any) -> bool:
    """Whether all that the model remembers is keys and values (no state-space or chunked layers)."""
    config = model.config.get_text_config(decoder=True)
    kinds = {type(layer) for layer in DynamicCache(config=config).layers}
    known = kinds <= {DynamicLayer, DynamicSlidingWindowLayer} and not config.is_encoder_decoder
    return known and "chunked_attention" not in (getattr(config, "layer_types", None) or ())


def new() -> Any:
    """An empty cache; layers are added as the model asks for them."""
    return Cache(layer_class_to_replicate=Window)


def keep(cache: Any, rows: Sequence[int], columns: int) -> None:
    """Only these rows, in this order (a row may come several times), and only the last columns."""
    for layer in cache.layers:
        index = torch.tensor(rows, dtype=torch.int64, device=layer.keys.device)
        layer.hold(*(held[:, :, -columns:].index_select(0, index) for held in (layer.keys, layer.values)))


def join(cache: Any, other: Any) -> None:
    """Add the other's rows below, all ending at the same column."""
    for layer, more in zip(cache.layers, other.layers, strict=True):
        layer.hold(_stacked(layer.keys, more.keys), _stacked(layer.values, more.values))


def _stacked(above: Tensor, below: Tensor) -> Tensor:
    columns = max(above.shape[2], below.shape[2])
    # Zeros, never garbage: a masked column is multiplied by 0, and 0 x NaN is NaN.
    return torch.cat([torch.nn.functional.pad(x, (0, 0, columns - x.shape[2], 0)) for x in (above, below)])
