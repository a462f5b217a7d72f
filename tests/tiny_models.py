"""Tiny random models of four families, built in memory: small enough to decode in milliseconds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from nbhelpers.generation import decode
from nbhelpers.loading.load import Loaded, LoadingReport
from nbhelpers.records import ModelSpec, Prompt, Sample, Settings

FAMILIES = ("gpt2", "bloom", "opt", "llama")
PAD, BOS, EOS = 0, 1, 2
PROMPTS = [
    Prompt("p1", "Hi:", "short_post"),
    Prompt("p2", "Tell me of ships:", "linkedin_post"),
    Prompt("p3", "A note, please:", "business_note"),
]
FEW = Settings(repeats=3, max_new_tokens=12)
MANY_ENDS = [EOS, *range(100, 125)]  # about every tenth random token ends a text


def texts(samples: list[Sample]) -> list[tuple[str, int, str, int]]:
    return [(s.prompt_id, s.repeat, s.text, s.new_tokens) for s in samples]


def byte_tokenizer(begins: bool = True, bos: str | None = "<s>", eos: str | None = "</s>") -> Any:
    """One token per byte, ids 3 to 258; `<pad>` 0, `<s>` 1, `</s>` 2; `<s>` put in front if begins."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {name: number for number, name in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BOS)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token=bos, eos_token=eos, padding_side="left"
    )


def build(family: str, context: int = 64, eos: int | list[int] | None = EOS, seed: int = 0) -> Any:
    """A random causal language model of 259 tokens, wide weights, so that its choices are not all alike."""
    torch.manual_seed(seed)
    ids = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": eos}
    common: dict[str, Any] = {
        "vocab_size": 259,
        "initializer_range": 0.4,
        "tie_word_embeddings": False,
        **ids,
    }
    if family == "gpt2":
        config = GPT2Config(n_embd=16, n_head=2, n_layer=2, n_positions=context, **common)
        model: Any = GPT2LMHeadModel(config)
    elif family == "bloom":
        model = BloomForCausalLM(BloomConfig(hidden_size=16, n_head=2, n_layer=2, **common))
    elif family == "opt":
        common["init_std"] = common.pop("initializer_range")
        sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32}
        heads = {"num_attention_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": context}
        model = OPTForCausalLM(OPTConfig(**sizes, **heads, **common))
    else:
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_key_value_heads": 1}
        heads = {"num_attention_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": context}
        model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, **common))
    decode.engine_for(model.eval())  # now, so that the passes of a test are those of its rows
    return model


def tiny(
    family: str = "gpt2",
    context: int = 64,
    eos: int | list[int] | None = EOS,
    prompt_format: Any = "plain",
    tokenizer: Any = None,
) -> Loaded:
    """A tiny model as loading.load would return it."""
    model = build(family, context, eos)
    spec = ModelSpec(
        f"tiny-{family}",
        "memory",
        "local",
        family,
        context=context,
        prompt_format=prompt_format,
        layers=2,
        kv_heads=1 if family == "llama" else 2,
        head_dim=8,
    )
    count = sum(p.numel() for p in model.parameters())
    report = LoadingReport(
        model=spec.alias,
        slug=spec.slug,
        revision="memory",
        source="memory",
        family=family,
        parameters=count,
        context=context,
        vocabulary=259,
        device="cpu",
        dtype="float32",
        fetch_s=0.0,
        load_s=0.0,
        parameter_bytes=4 * count,
        rss_before_bytes=0,
        rss_after_load_bytes=0,
        rss_after_forward_bytes=0,
        device_peak_bytes=None,
        prompt_format=prompt_format,
    )
    return Loaded(spec, model, tokenizer or byte_tokenizer(), None, "memory", report, "cpu")


def watch(model: Any) -> list[int]:
    """The batch size of every forward pass from now on."""
    sizes: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return sizes


def break_above(model: Any, rows: int, error: Exception) -> None:
    """From now on a forward pass of more than `rows` rows raises the error."""

    def check(module: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        if len(kwargs["input_ids"]) > rows:
            raise error

    model.register_forward_pre_hook(check, with_kwargs=True)


def fixed_judge(wishes: dict[str, float], context: int = 512) -> Loaded:
    """A GPT-2 that gives every next token a given probability, whatever it has read; the rest on <pad>."""
    loaded = tiny("gpt2", context=context)
    rest = 1 - sum(wishes.values())
    weights = torch.full((259,), -30.0)
    for text, p in wishes.items():
        weights[loaded.tokenizer(text, add_special_tokens=False)["input_ids"][0]] = math.log(p)
    weights[PAD] = math.log(rest)
    with torch.no_grad():  # the last layer norm gives (1, 0, 0, …), so the head's first column is the logits
        loaded.model.transformer.ln_f.weight.zero_()
        loaded.model.transformer.ln_f.bias.zero_()[0] = 1.0
        loaded.model.lm_head.weight.zero_()[:, 0] = weights
    return loaded
