"""One row at a time without Python between its operations: a decode step compiled ahead, as llama.cpp is.

torch.export traces the step with transformers' static cache and AOTInductor compiles it to one library, draw
included. Measured for lab-gpt2: torch.compile leaves half a millisecond of Python a step, this next to none.
"""

from __future__ import annotations

import tempfile
import time
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch._inductor import config as inductor
from torch._inductor.utils import fresh_cache
from transformers import StaticCache

from nbhelpers.generation import sampling
from nbhelpers.generation.decode import KeyValues
from nbhelpers.records import Prompt
from tools.bench_texts import Texts, endless

# Weights packed at compile time and products by inductor's own kernels: ATen's product of one row runs on one
# thread: lab-llama's step took 2.8 ms instead of 1.2, on two threads.
OPTIONS = {"freezing": True, "max_autotune": True}
COLUMNS = 128  # of the cache: prompt and new tokens; every step reads them all


class Step(torch.nn.Module):
    """Logits [1, vocabulary] and the next token [1] drawn from them, as sampling.sampler draws it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config.get_text_config()

    def forward(
        self, last: Tensor, position: Tensor, temperature: Tensor, gumbel: Tensor, held: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        cache = StaticCache(config=self.config, max_cache_len=COLUMNS)
        for layer, keys, values in zip(cache.layers, held[::2], held[1::2], strict=True):
            layer.keys, layer.values, layer.is_initialized = keys, values, True
            layer.device, layer.cumulative_length = keys.device, position.clone()
        out = self.model(last[None], position_ids=position[None, None], past_key_values=cache, use_cache=True)
        logits = out.logits[:, -1]
        blocks = (logits / temperature).softmax(-1).unflatten(1, (-1, sampling.BLOCK))
        count = blocks.shape[1]
        block = (blocks.sum(-1).log() + gumbel[:, :count]).argmax(-1)
        within = blocks[0].index_select(0, block).log() + gumbel[:, count:]
        return logits, block * sampling.BLOCK + within.argmax(-1)


class Compiled:
    """The product's prefill and the compiled step, with one thread or all: which is faster is measured."""

    def __init__(self, model: str, dtype: str, device: str, gguf: str | None) -> None:
        self.loaded = endless(model, dtype, device)
        self.loaded.model.set_attn_implementation(
            "eager"
        )  # fused, where sdpa calls a kernel made for long rows
        config = self.loaded.model.config.get_text_config()
        self.numbers = config.vocab_size // sampling.BLOCK + sampling.BLOCK
        with torch.inference_mode():
            cache = KeyValues(self.loaded.model, [[0]]).cache
        rows = [held for layer in cache.layers for held in (layer.keys, layer.values)]
        self.held = [torch.zeros(*held.shape[:2], COLUMNS, held.shape[3], dtype=held.dtype) for held in rows]
        tried = [self.compiled(threads) for threads in sorted({1, torch.get_num_threads()})]
        _, seconds, threads, self.step = min(tried, key=lambda one: one[0])
        torch.set_num_threads(threads)
        self.facts = {"compile_s": seconds, "threads": threads}

    def compiled(self, threads: int) -> tuple[float, float, int, Any]:
        """Seconds of a step (the median of 200), of the compilation, the threads and the step."""
        torch.set_num_threads(threads)
        given = torch.tensor([0]), torch.tensor(1), torch.tensor(1.0), torch.zeros(1, self.numbers), self.held
        started, times = time.perf_counter(), []
        with tempfile.TemporaryDirectory() as folder, fresh_cache(), inductor.patch(OPTIONS), torch.no_grad():
            program = torch.export.export(Step(self.loaded.model), given)
            path = torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/step.pt2")
            step = torch._inductor.aoti_load_package(path)
        ended = time.perf_counter()
        for _ in range(200):
            begun = time.perf_counter()
            step(*given)
            times.append(time.perf_counter() - begun)
        return median(times), ended - started, threads, step

    def write(
        self, prompts: list[Prompt], repeats: int, tokens: int, batch: int, temperature: float
    ) -> Texts:
        rows = [(prompt, repeat) for prompt in prompts for repeat in range(repeats)]
        with torch.inference_mode():
            found = [self.row(*row, tokens, temperature) for row in rows]
        decode = self.loaded.tokenizer.decode
        return [decode(row, skip_special_tokens=True).strip() for row in found], sum(map(len, found))

    def row(self, prompt: Prompt, repeat: int, tokens: int, temperature: float) -> list[int]:
        ids, seed = self.loaded.tokenizer(prompt.text)["input_ids"], sampling.row_seed(0, prompt.id, repeat)
        if len(ids) + tokens > COLUMNS:
            raise RuntimeError(f"the compiled step has room for {COLUMNS} tokens, prompt included")
        read = KeyValues(self.loaded.model, [ids])
        for layer, keys, values in zip(read.cache.layers, self.held[::2], self.held[1::2], strict=True):
            keys[:, :, : len(ids)], values[:, :, : len(ids)] = layer.keys, layer.values
        numbers = torch.arange(self.numbers).expand(tokens, -1)
        gumbel = sampling.gumbel([seed] * tokens, range(tokens), numbers).split(1)
        heat, places = torch.tensor(temperature or 1.0), torch.arange(len(ids), len(ids) + tokens).unbind()
        written = [sampling.sampler([seed], temperature)(read.logits, [0], [0])]
        for step in range(1, tokens):
            logits, token = self.step(written[-1], places[step - 1], heat, gumbel[step], self.held)
            written.append(token if temperature else logits.argmax(-1))
        return torch.cat(written).tolist()
