"""A model that does nothing but take time: what it takes is known, so a timer can be judged by it."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from tiny_models import BOS, EOS, PAD, byte_tokenizer, tiny
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from nbhelpers.loading.load import Loaded

ORDINARY = 50  # the token it writes until a row's end


class Planted(PreTrainedModel):
    """Every pass over prompts takes `prefill_s`, every further step `step_s`, whatever the batch.

    `pause(seconds)` takes the time: time.sleep, a virtual clock's advance, or a kernel that waits on a GPU.
    A prompt that ends in the letters a, b, c … is answered with 1, 2, 3 … tokens, the end token included.
    A row knows its plan from the key-value cache alone: keys hold its length, values what it has written.
    """

    config_class = PretrainedConfig
    _supports_cache_class = True

    def __init__(self, prefill_s: float, step_s: float, pause: Callable[[float], None] = time.sleep) -> None:
        sizes = {"vocab_size": 259, "hidden_size": 4, "num_attention_heads": 1, "num_hidden_layers": 1}
        ids = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
        super().__init__(PretrainedConfig(max_position_embeddings=512, **sizes, **ids))
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.prefill_s, self.step_s, self.pause = prefill_s, step_s, pause
        self.passes: list[tuple[tuple[int, ...], float]] = []  # each pass: its rows' lengths, and seconds

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = True,
        **extra: Any,
    ) -> CausalLMOutputWithPast:
        cache = past_key_values if past_key_values is not None else DynamicCache()
        started, first = time.perf_counter(), cache.get_seq_length() == 0
        self.pause(self.prefill_s if first else self.step_s)
        length = input_ids[:, -1] - self.letter + 1 if first else cache.layers[0].keys[:, 0, -1, 0]
        shape = (len(input_ids), 1, input_ids.shape[1], 4)
        keys = length.to(self.weight.dtype)[:, None, None, None].expand(shape).contiguous()
        values = torch.zeros(shape, device=keys.device) if first else torch.ones(shape, device=keys.device)
        keys, values = cache.update(keys, values, 0)
        written = values[:, 0, :, 0].sum(1) + 1
        logits = torch.full((len(input_ids), 1, 259), -1e4, device=keys.device)
        logits[:, 0, ORDINARY] = 0.0
        logits[:, 0, EOS] = torch.where(written == keys[:, 0, -1, 0], 1e4, -1e4)
        self.passes.append((tuple(length.int().tolist()), time.perf_counter() - started))
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    letter = int(byte_tokenizer()("a", add_special_tokens=False)["input_ids"][0])


def planted(prefill_s: float, step_s: float, pause: Callable[[float], None] = time.sleep) -> Loaded:
    """The model as loading.load would return it."""
    real = tiny("gpt2", context=512)
    model = Planted(prefill_s, step_s, pause).eval()
    model.generation_config = SimpleNamespace(eos_token_id=EOS)
    return Loaded(real.spec, model, real.tokenizer, None, "memory", real.report, "cpu")


class VirtualClock:
    """A clock that only `pause` moves: reads are exact, and no other process can disturb them."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def pause(self, seconds: float) -> None:
        self.now += seconds
