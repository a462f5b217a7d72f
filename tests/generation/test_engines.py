"""Freed slots, windows of attention, and models that only transformers.generate can serve."""

from __future__ import annotations

import functools
import itertools
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_models import edit_json, make_model
from scipy import stats
from tiny_models import BOS, FAMILIES, FEW, MANY_ENDS, PROMPTS, build, texts, tiny, watch
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertLMHeadModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    Phi3Config,
    Phi3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from nbhelpers.generation import decode, engines, generate, latency, sampling
from nbhelpers.loading import load, tokenization
from nbhelpers.loading.load import Loaded
from nbhelpers.records import LabError

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


WAITING = [[BOS, *range(3, 4 + n % 7)] for n in range(30)]
LIMITS = [5 + 7 * n % 11 for n in range(30)]


@functools.cache
def alone(family: str) -> list[tuple[int, ...]]:
    """What each of the waiting rows becomes with the model to itself."""
    model = build(family)
    return [
        tuple(decode.decode_all(model, [p], [n], sampling.sampler([row], 1.0), MANY_ENDS)[0].tokens)
        for row, (p, n) in enumerate(zip(WAITING, LIMITS, strict=True))
    ]


@pytest.mark.parametrize("slots", [1, 3, 4, 7, 30])
@pytest.mark.parametrize("family", FAMILIES)
def test_freed_slots_are_given_to_waiting_rows_and_change_no_text(family: str, slots: int) -> None:
    model, prompts = build(family), WAITING
    sizes = watch(model)
    choose = sampling.sampler(range(30), 1.0)
    events = list(decode.decode(model, prompts, LIMITS, choose, MANY_ENDS, slots=slots))
    admitted = [event.rows for event in events if isinstance(event, decode.Started)]
    rows = {event.row: event.tokens for event in events if isinstance(event, decode.Finished)}
    assert [tuple(rows[row]) for row in range(30)] == alone(family)
    assert max(sizes) <= slots
    order = list(itertools.chain(*admitted))
    assert sorted(order) == list(range(30))
    assert [len(prompts[row]) for row in order] == sorted(map(len, prompts), reverse=True)
    if 1 < slots < 30:
        assert len(admitted) > 30 // slots  # places were filled before all had ended


def test_a_cache_holds_what_one_that_is_made_anew_for_every_token_would() -> None:
    dice, make = random.Random(0), torch.Generator().manual_seed(0)
    numbers = functools.partial(torch.randn, generator=make)
    window, plain = engines.Window(), numbers(2, 5, 3, 9, 4)  # keys and values
    window.update(*plain)
    for turn in range(300):
        more = numbers(2, plain.shape[1], 3, 1, 4)
        plain = torch.cat([plain, more], dim=3)
        window.update(*more)
        if turn % 3 == 0:  # rows leave in any order, or come several times
            among = range(plain.shape[1])
            rows = dice.sample(among, dice.randint(1, len(among)))
            rows = dice.choices(among, k=dice.randint(len(among), 9)) if turn % 30 == 0 else rows
            columns = dice.randint(1, plain.shape[3])
            plain = plain[:, rows, :, -columns:]
            window.keep(rows, columns)
        assert torch.equal(torch.stack([window.keys, window.values]), plain)


@pytest.mark.parametrize("rows", [3, 40])
def test_products_are_torchs_own_and_have_gradients(rows: int) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(rows, 2, 24), torch.randn(40, 24), torch.randn(40)
    own = torch.nn.functional.linear(x, weight, bias)
    with torch.no_grad():
        torch.testing.assert_close(engines._linear(x, weight, bias), own)
        conv = engines._addmm(bias, x.view(-1, 24), weight.t().contiguous())
        torch.testing.assert_close(conv.view_as(own), own)
        double = engines._linear(x.double(), weight.double(), bias.double())
        assert torch.equal(double, torch.nn.functional.linear(x.double(), weight.double(), bias.double()))
    engines._linear(x, weight.requires_grad_(), bias).sum().backward()
    assert weight.grad is not None


def test_little_work_takes_one_thread_and_leaves_the_others_as_they_were(monkeypatch: Any) -> None:
    set_to: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    with pytest.raises(KeyError), engines.threads_for(1000):
        raise KeyError
    with engines.threads_for(10**9):
        pass
    assert set_to == [1, 8, 8, 8]


def test_a_row_is_timed_from_its_own_prefill() -> None:
    ticks = itertools.count()  # one second a reading: as rows start and after every pass
    choose = sampling.sampler(range(3), 1.0)
    rows = decode.decode_all(
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
    assert decode.engine_for(model) == "loop"
    prompts = [list(range(3, 3 + n)) for n in (2, 9, 14)]
    rows = decode.decode_all(model, prompts, [15] * 3, sampling.sampler([0] * 3, 0.0))
    for prompt, row in zip(prompts, rows, strict=True):
        options = {"do_sample": False, "max_new_tokens": 15, "eos_token_id": None}
        ids = torch.tensor([prompt])
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert theirs[0, len(prompt) :].tolist() == list(row.tokens)


def test_a_state_space_model_is_served_by_generate_and_the_row_says_so(tmp_path: Path) -> None:
    loaded = mamba(MANY_ENDS)
    path = tmp_path / "samples.jsonl"
    whole = generate.generate_samples(loaded, PROMPTS, FEW, path)
    assert {s.engine for s in whole} == {"generate"} and {s.error for s in whole} == {None}
    assert {s.finish_reason for s in whole} == {"eos", "length"} and len({s.text for s in whole}) > 5
    for size in (1, 2):
        assert texts(generate.generate_samples(loaded, PROMPTS, FEW, batch_size=size)) == texts(whole)
    assert generate.generate_samples(loaded, PROMPTS, FEW, path) == whole
    for s in latency.measure_latency(loaded, PROMPTS, FEW):
        assert s.ttft_s is not None and s.latency_s is not None and 0 < s.ttft_s < s.latency_s


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_both_engines_write_the_same(temperature: float) -> None:
    model = build("llama")
    prompts, limits = [[5], [6, 7], [5], [8, 9, 3]], [12, 9, 7, 12]
    choose = sampling.sampler(range(4), temperature)
    ours = decode.decode_all(model, prompts, limits, choose, MANY_ENDS)
    theirs = decode.decode_all(model, prompts, limits, choose, MANY_ENDS, engine="generate")
    assert [(r.tokens, r.finish_reason) for r in ours] == [(r.tokens, r.finish_reason) for r in theirs]
    assert {r.finish_reason for r in ours} == {"eos", "length"} or temperature == 0


def plain(model: Any, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens by whole passes over one row, without any cache."""
    row = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            row.append(int(model(input_ids=torch.tensor([row])).logits[0, -1].argmax()))
    return row[len(prompt) :]


UNLIKE = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16], [20], [5, 6, 7]]


def wide(model: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.3, generator=generator)
    return model.eval()


def test_a_model_without_a_cache_is_read_anew_for_every_token() -> None:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 259}
    model = wide(OpenAIGPTLMHeadModel(OpenAIGPTConfig(**sizes)))
    assert decode.engine_for(model) == "generate"
    rows = decode.decode_all(model, UNLIKE, [9] * 4, sampling.sampler([0] * 4, 0.0), slots=3)
    assert [list(row.tokens) for row in rows] == [plain(model, prompt, 9) for prompt in UNLIKE]


def test_learned_positions_that_cannot_be_given_are_never_padded() -> None:
    sizes = {"d_model": 16, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
    config = BartConfig(vocab_size=259, max_position_embeddings=64, **sizes)
    model = wide(BartForCausalLM(config))
    assert decode.engine_for(model) == "generate"
    rows = decode.decode_all(model, UNLIKE, [9] * 4, sampling.sampler([0] * 4, 0.0))
    assert [list(row.tokens) for row in rows] == [plain(model, prompt, 9) for prompt in UNLIKE]


def test_a_model_that_looks_ahead_is_refused_in_one_sentence() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = wide(BertLMHeadModel(BertConfig(vocab_size=259, **sizes)))
    with pytest.raises(LabError, match=r"BertLMHeadModel gives other logits .* choose another") as caught:
        decode.engine_for(model)
    assert "\n" not in str(caught.value)
    with pytest.raises(LabError, match="BertLMHeadModel"):
        generate.generate_samples(of(model), PROMPTS, FEW)


@pytest.mark.parametrize("kind", ["longrope", "dynamic", "longrope by layer"])
def test_the_longest_row_of_a_batch_does_not_turn_the_positions_of_the_others(kind: str) -> None:
    sizes = {**HEADS, "num_key_value_heads": 2}
    if kind == "longrope":
        rope = {"rope_type": kind, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 1e4}
        config: Any = Phi3Config(
            max_position_embeddings=128, original_max_position_embeddings=16, rope_parameters=rope, **sizes
        )
        build_model: Any = Phi3ForCausalLM
    elif kind == "longrope by layer":
        rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "factor": 8.0}
        rope |= {"rope_theta": 1e4, "original_max_position_embeddings": 16}
        plain = {"rope_type": "default", "rope_theta": 1e4}
        config = Gemma3TextConfig(
            max_position_embeddings=128,
            layer_types=["sliding_attention", "full_attention"],
            rope_parameters={"full_attention": rope, "sliding_attention": plain},
            **sizes,
        )
        build_model = Gemma3ForCausalLM
    else:
        rope = {"rope_type": kind, "factor": 4.0, "rope_theta": 1e4}
        config, build_model = (
            LlamaConfig(max_position_embeddings=16, rope_parameters=rope, **sizes),
            LlamaForCausalLM,
        )
    torch.manual_seed(0)
    model = build_model(config).eval()
    prompts = [list(range(3, 3 + n)) for n in (40, 4, 13, 5)]

    def alone(prompt: list[int]) -> list[int]:
        ids = torch.tensor([prompt])
        model(ids[:, :1])  # forget the longest row so far
        options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}
        return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()

    truth = [alone(prompt) for prompt in prompts]
    for slots in (1, 4):
        rows = decode.decode_all(model, prompts, [8] * 4, sampling.sampler([0] * 4, 0.0), slots=slots)
        assert [list(row.tokens) for row in rows] == truth
    assert decode.engine_for(model, tokens=16) == "loop"
    assert decode.engine_for(model, tokens=17) == "generate"


def test_a_model_that_fails_by_itself_is_not_refused_for_its_engine() -> None:
    model = build("gpt2", seed=3)
    decode.SERVES.pop(model)
    handle = model.register_forward_pre_hook(lambda module, args: 1 / 0)
    assert decode.engine_for(model) == "loop" and model not in decode.SERVES
    handle.remove()
    assert decode.engine_for(model) == decode.SERVES[model] == "loop"


LEFT_OVER: dict[str, Any] = {
    **{"repetition_penalty": 1.8, "no_repeat_ngram_size": 2, "suppress_tokens": list(range(3, 120))},
    **{"bad_words_ids": [[k] for k in range(3, 120)], "forced_eos_token_id": 2, "min_new_tokens": 11},
    **{
        "stop_strings": ["a"],
        "max_time": 1e-4,
        "num_beams": 3,
        "temperature": 0.1,
        "num_return_sequences": 2,
    },
    **{"exponential_decay_length_penalty": (1, 9.0), "begin_suppress_tokens": list(range(200))},
}


def leave(model: Any, **settings: Any) -> None:
    for name, value in settings.items():
        setattr(model.generation_config, name, value)


@pytest.mark.parametrize("make", [mamba, lambda eos: tiny("llama", eos=eos)], ids=["generate", "loop"])
def test_what_the_maker_asks_is_set_aside_by_both_engines_and_the_record_says_so(make: Any) -> None:
    loaded = make(MANY_ENDS)
    expected = texts(generate.generate_samples(loaded, PROMPTS, FEW))
    assert generate.report_of(loaded, PROMPTS, FEW).generation_config == ""
    for name, value in LEFT_OVER.items():
        leave(loaded.model, **{name: value})
        assert texts(generate.generate_samples(loaded, PROMPTS, FEW)) == expected, name
        assert f"{name}={value}" in generate.report_of(loaded, PROMPTS, FEW).generation_config
    assert generate.report_of(loaded, PROMPTS, FEW).generation_config.startswith("set aside: ")


@pytest.mark.parametrize("make", [mamba, lambda eos: tiny("llama", eos=eos)], ids=["generate", "loop"])
@pytest.mark.parametrize(
    "asked",
    [
        {"repetition_penalty": 1.8},
        {"no_repeat_ngram_size": 2, "suppress_tokens": list(range(3, 120))},
        {"bad_words_ids": [[k] for k in range(3, 120)], "min_new_tokens": 11},
        {"forced_eos_token_id": 2, "begin_suppress_tokens": list(range(200))},
    ],
)
def test_what_the_maker_asks_is_used_on_purpose_as_transformers_uses_it(make: Any, asked: Any) -> None:
    loaded = make([2])
    greedy = replace(FEW, repeats=1, temperature=0.0, maker_settings=True)
    before = generate.generate_samples(loaded, PROMPTS, greedy)
    leave(loaded.model, **asked)
    rows = generate.generate_samples(loaded, PROMPTS, greedy)
    for row, prompt in zip(rows, PROMPTS, strict=True):
        ids = torch.tensor([loaded.tokenizer(prompt.text)["input_ids"]])
        options = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
        theirs = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :]
        assert row.text == loaded.tokenizer.decode(theirs, skip_special_tokens=True).strip()
    assert texts(rows) != texts(before)
    leave(loaded.model, stop_strings=["a"])
    said = generate.report_of(loaded, PROMPTS, greedy).generation_config
    assert said.startswith("used: ") and said.endswith("; set aside: stop_strings=['a']")
    plain_keys = generate.requests(PROMPTS, replace(greedy, maker_settings=False), loaded.report)
    assert {row.key for row in rows}.isdisjoint(request.key for request in plain_keys)


@pytest.fixture(scope="module")
def sensible(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A model that asks for nothing, and what it writes."""
    folder = make_model(tmp_path_factory.mktemp("sensible"))
    loaded = load.load(str(folder), "cpu", "float32")
    return folder, texts(generate.generate_samples(loaded, PROMPTS, FEW))


@pytest.mark.parametrize(
    "asked",
    [
        *({"temperature": "hot"}, {"temperature": -1}, {"top_k": "50"}, {"top_p": "0.9"}, {"min_p": 2}),
        *({"repetition_penalty": 0}, {"bad_words_ids": [1, 2]}, {"sequence_bias": "x"}),
        *({"suppress_tokens": "x"}, {"suppress_tokens": 7}, {"exponential_decay_length_penalty": 5}),
        *({"forced_eos_token_id": "2"}, {"no_repeat_ngram_size": "3"}, {"min_new_tokens": "3"}),
    ],
)
def test_what_makes_no_sense_stops_only_who_asks_for_it(
    tmp_path: Path, sensible: tuple[Path, list[str]], asked: Any
) -> None:
    folder, plain = sensible
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    edit_json(tmp_path / "generation_config.json", **asked)
    loaded = load.load(str(tmp_path), "cpu", "float32")
    assert texts(generate.generate_samples(loaded, PROMPTS, FEW)) == plain
    with pytest.raises(LabError, match=f"makes no sense .*{next(iter(asked))}=.*leave out") as caught:
        generate.generate_samples(loaded, PROMPTS, replace(FEW, maker_settings=True))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "asked", [{"num_return_sequences": 3}, {"cache_implementation": "x"}, {"pad_token_id": "x"}]
)
def test_what_no_engine_reads_stops_nothing(tmp_path: Path, asked: Any) -> None:
    make_model(tmp_path)
    edit_json(tmp_path / "generation_config.json", **asked)
    load.load(str(tmp_path), "cpu", "float32")


@pytest.mark.parametrize("content", ["null", "[]", "{", ""])
def test_a_generation_config_that_cannot_be_read_is_not_passed_over(tmp_path: Path, content: str) -> None:
    (make_model(tmp_path) / "generation_config.json").write_text(content)
    with pytest.raises(LabError, match=r"generation_config\.json that cannot be read"):
        load.load(str(tmp_path), "cpu", "float32")


@pytest.mark.parametrize(
    ("named", "ends"),
    [("4", {1, 4}), ([4, "5"], {1, 4, 5}), ([[4]], {1}), ({"a": 4}, {1}), (True, {1}), (4.0, {1}), ([], {1})],
)
def test_ends_are_whole_numbers_whatever_a_file_holds(tmp_path: Path, named: Any, ends: set[int]) -> None:
    make_model(tmp_path)
    edit_json(tmp_path / "generation_config.json", eos_token_id=named)
    assert tokenization.end_tokens(load.load(str(tmp_path), "cpu", "float32")) == ends


def test_the_maker_s_temperature_is_used_on_purpose() -> None:
    loaded = tiny("llama")
    leave(loaded.model, temperature=1e-5, top_k=7)
    cold = generate.generate_samples(loaded, PROMPTS, replace(FEW, maker_settings=True))
    greedy = generate.generate_samples(loaded, PROMPTS, replace(FEW, temperature=0.0))
    assert [s.text for s in cold] == [s.text for s in greedy]
    for size in (1, 4):
        again = generate.generate_samples(loaded, PROMPTS, replace(FEW, maker_settings=True), batch_size=size)
        assert texts(again) == texts(cold)


def test_an_encoder_decoder_is_refused_in_one_sentence(tmp_path: Path) -> None:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 259}
    T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(tmp_path)
    tiny().tokenizer.save_pretrained(tmp_path)
    with pytest.raises(LabError, match="encoder-decoder") as caught:
        load.load(str(tmp_path), "cpu", "float32")
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
            [choose(logits.repeat(50, 1), list(range(n, n + 50)), [step] * 50) for n in range(0, draws, 50)]
        )
        counts = [int((chosen == token).sum()) for token in best]
        assert stats.chisquare([*counts, draws - sum(counts)], expected.numpy()).pvalue > 1e-3
