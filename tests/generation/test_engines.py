"""Freed slots, windows of attention, and models that only transformers.generate can serve."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from tiny_models import BOS, FAMILIES, FEW, MANY_ENDS, PROMPTS, build, texts, tiny, watch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from nbhelpers.generation import decode as decoding
from nbhelpers.generation import generate as generation
from nbhelpers.generation import latency, sampling
from nbhelpers.loading import load as loading
from nbhelpers.loading.load import Loaded
from nbhelpers.records import LabError, Prompt, Sample, Settings

SIZES: dict[str, Any] = {
    **{"vocab_size": 259, "hidden_size": 16, "num_hidden_layers": 2, "initializer_range": 0.4},
    **{"pad_token_id": 0, "bos_token_id": BOS, "eos_token_id": 2},
}
HEADS: dict[str, Any] = {
    **SIZES,
    **{"intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8},
}


def of(model: Any) -> Loaded:
    return replace(tiny("llama", eos=MANY_ENDS), model=model.eval())


def mamba(eos: list[int] | None = None) -> Loaded:
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(state_size=4, **SIZES))
    with torch.no_grad():  # its own initialisation makes all choices alike
        model.backbone.embeddings.weight.normal_(0, 0.4)
    model.generation_config.eos_token_id = eos or 2
    return of(model)


@pytest.mark.parametrize("slots", [1, 3, 4, 7, 30])
@pytest.mark.parametrize("family", FAMILIES)
def test_freed_slots_are_given_to_waiting_rows_and_change_no_text(family: str, slots: int) -> None:
    model = build(family)
    sizes = watch(model)
    prompts = [[BOS, *range(3, 4 + n % 7)] for n in range(30)]
    limits = [5 + 7 * n % 11 for n in range(30)]
    choose = sampling.sampler(range(30), 1.0)
    alone = [
        decoding.decode_all(model, [p], [n], sampling.sampler([row], 1.0), MANY_ENDS)[0].tokens
        for row, (p, n) in enumerate(zip(prompts, limits, strict=True))
    ]
    sizes.clear()
    events = list(decoding.decode(model, prompts, limits, choose, MANY_ENDS, slots=slots))
    admitted = [event.rows for event in events if isinstance(event, decoding.Started)]
    rows = {event.row: event.tokens for event in events if isinstance(event, decoding.Finished)}
    assert [rows[row] for row in range(30)] == alone
    assert max(sizes) <= slots
    order = list(itertools.chain(*admitted))
    assert sorted(order) == list(range(30))
    assert [len(prompts[row]) for row in order] == sorted(map(len, prompts), reverse=True)
    if 1 < slots < 30:
        assert len(admitted) > 30 // slots  # places were filled before all had ended


def test_a_row_is_timed_from_its_own_prefill() -> None:
    ticks = itertools.count()  # one second a reading: as rows start and after every pass
    choose = sampling.sampler(range(3), 1.0)
    rows = decoding.decode_all(
        build("gpt2"), [[5], [6], [7]], [4] * 3, choose, clock=lambda: next(ticks), slots=1
    )
    assert [(row.ttft_s, row.latency_s) for row in rows] == [(1.0, 4.0)] * 3


@pytest.mark.parametrize("kind", ["mistral", "gemma3", "llama"])
def test_a_window_of_attention_is_kept(kind: str) -> None:
    torch.manual_seed(0)
    if kind == "mistral":
        model: Any = MistralForCausalLM(MistralConfig(sliding_window=6, **HEADS))
    elif kind == "gemma3":
        types = ["sliding_attention", "full_attention"]
        model = Gemma3ForCausalLM(Gemma3TextConfig(sliding_window=6, layer_types=types, **HEADS))
    else:
        model = LlamaForCausalLM(LlamaConfig(**{**HEADS, "num_key_value_heads": 2}))
    model.eval()
    assert decoding.engine_for(model) == "loop"
    prompts = [list(range(3, 3 + n)) for n in (2, 9, 14)]
    rows = decoding.decode_all(model, prompts, [15] * 3, sampling.sampler([0] * 3, 0.0))
    for prompt, row in zip(prompts, rows, strict=True):
        options = {"do_sample": False, "max_new_tokens": 15, "eos_token_id": None}
        ids = torch.tensor([prompt])
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert theirs[0, len(prompt) :].tolist() == list(row.tokens)


def test_a_state_space_model_is_served_by_generate_and_the_row_says_so(tmp_path: Path) -> None:
    loaded = mamba(MANY_ENDS)
    path = tmp_path / "samples.jsonl"
    whole = generation.generate_samples(loaded, PROMPTS, FEW, path)
    assert {s.engine for s in whole} == {"generate"} and {s.error for s in whole} == {None}
    assert {s.finish_reason for s in whole} == {"eos", "length"} and len({s.text for s in whole}) > 5
    for size in (1, 2):
        assert texts(generation.generate_samples(loaded, PROMPTS, FEW, batch_size=size)) == texts(whole)
    assert generation.generate_samples(loaded, PROMPTS, FEW, path) == whole
    for s in latency.measure_latency(loaded, PROMPTS, FEW):
        assert s.ttft_s is not None and s.latency_s is not None and 0 < s.ttft_s < s.latency_s


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_both_engines_write_the_same(temperature: float) -> None:
    model = build("llama")
    prompts, limits = [[5], [6, 7], [5], [8, 9, 3]], [12, 9, 7, 12]
    choose = sampling.sampler(range(4), temperature)
    ours = decoding.decode_all(model, prompts, limits, choose, MANY_ENDS)
    theirs = decoding.decode_all(model, prompts, limits, choose, MANY_ENDS, engine="generate")
    assert [(r.tokens, r.finish_reason) for r in ours] == [(r.tokens, r.finish_reason) for r in theirs]
    assert {r.finish_reason for r in ours} == {"eos", "length"} or temperature == 0


def test_an_encoder_decoder_is_refused_in_one_sentence(tmp_path: Path) -> None:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 259}
    T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(tmp_path)
    tiny().tokenizer.save_pretrained(tmp_path)
    with pytest.raises(LabError, match="encoder-decoder") as caught:
        loading.load(str(tmp_path), "cpu", "float32")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (40, 1.0), (0, 0.6), (40, 0.6)])
def test_a_large_vocabulary_is_drawn_from_by_its_softmax(top_k: int, top_p: float) -> None:
    """Variates for blocks, and for a shortlist only, leave the distribution as it is, step by step."""
    logits = torch.randn(10_000, generator=torch.Generator().manual_seed(1)) * 3
    kept, ids = sampling.shortlist(logits[None], top_k, top_p)
    best = ids[0, :9]
    draws = 600
    seeds = [sampling.row_seed(0, "p", row) for row in range(draws)]
    choose = sampling.sampler(seeds, 1.0, top_k, top_p)
    share = kept.softmax(-1)[0, :9].double()
    expected = torch.cat([share, 1 - share.sum(0, keepdim=True)]) * draws
    for step in (0, 7):
        chosen = torch.cat(
            [choose(logits.expand(50, -1), list(range(n, n + 50)), [step] * 50) for n in range(0, draws, 50)]
        )
        counts = [int((chosen == token).sum()) for token in best]
        assert stats.chisquare([*counts, draws - sum(counts)], expected.numpy()).pvalue > 1e-3


def test_texts_that_depend_on_the_batch_are_counted() -> None:
    def row(text: str, prompt: str, size: int, error: str | None = None) -> Sample:
        job = generation.Request("k", Prompt(prompt, "Hi", "short_post"), 0, (1,), 9)
        made = generation.sample_of(
            tiny(), job, Settings(), size, decoding.Finished(0, (5,), "length", 0.1, 0.1)
        )
        return replace(made, text=text, error=error)

    batch = [row("abc def", "p1", 4), row("abx", "p2", 4), row("ab", "p3", 4), row("z", "p4", 4, "failed")]
    alone = [row("abc\ufffd", "p1", 1), row("aby", "p2", 1), row("ab and on", "p3", 1), row("y", "p4", 1)]
    assert latency.batch_variants(batch, alone) == (1, 3)
    assert latency.batch_variants(alone, alone) == (0, 0)  # the same batch: nothing was compared
