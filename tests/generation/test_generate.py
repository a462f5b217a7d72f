"""The engine against transformers' own, brute force, and planted ends, clocks and failures."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from scipy import stats
from tiny_models import (
    BOS,
    EOS,
    FAMILIES,
    FEW,
    MANY_ENDS,
    PROMPTS,
    break_above,
    byte_tokenizer,
    texts,
    tiny,
    watch,
)
from tokenizers import AddedToken
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from nbhelpers import pipeline, registry, store
from nbhelpers.devices import machine, meters
from nbhelpers.generation import decode, generate, latency, sampling
from nbhelpers.loading import load, tokenization
from nbhelpers.records import Failure, LabError, Limits, Prompt, Sample, Settings

# The decode loop


@pytest.mark.parametrize("ends", [None, MANY_ENDS])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers_with_left_padding(family: str, ends: list[int] | None) -> None:
    loaded = tiny(family, eos=ends)
    ids = [list(loaded.tokenizer(p.text)["input_ids"]) for p in PROMPTS]
    rows = decode.decode_all(loaded.model, ids, [20] * 3, sampling.sampler([0] * 3, 0.0), ends or ())
    batch = loaded.tokenizer([p.text for p in PROMPTS], padding=True, return_tensors="pt")
    width = batch["input_ids"].shape[1]
    theirs = loaded.model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        do_sample=False,
        max_new_tokens=20,
    )
    for row, their in zip(rows, theirs[:, width:].tolist(), strict=True):
        assert list(row.tokens) == their[: len(row.tokens)]
        assert set(their[len(row.tokens) :]) <= {0}  # generate pads what has ended
    assert ends or len({row.tokens for row in rows}) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_does_not_depend_on_its_batch(family: str) -> None:
    loaded = tiny(family, eos=MANY_ENDS)
    settings = replace(FEW, repeats=6)
    alone = generate.generate_samples(loaded, PROMPTS, settings, batch_size=1)
    assert "eos" in {s.finish_reason for s in alone}  # rows leave early, and not all at once
    assert len({s.new_tokens for s in alone}) > 2 and len({s.text for s in alone}) > 6
    for size in (2, 7, 9):
        assert texts(generate.generate_samples(loaded, PROMPTS, settings, batch_size=size)) == texts(alone)
    backwards = generate.generate_samples(loaded, PROMPTS[::-1], settings)
    assert sorted(texts(backwards)) == sorted(texts(alone))


def test_rows_leave_the_batch_and_are_timed_by_their_own_tokens() -> None:
    loaded = tiny("llama", eos=MANY_ENDS)
    sizes = watch(loaded.model)
    ids = [[BOS, 3 + n] for n in range(12)]
    ticks = itertools.count(100.0)  # read once at the start and once a step: a step takes one second
    choose = sampling.sampler(list(range(12)), 1.0)
    begun, *rows = decode.decode(loaded.model, ids, [9] * 12, choose, MANY_ENDS, clock=lambda: next(ticks))
    assert begun == decode.Started(list(range(12)))
    ended = [row.row for row in rows]
    rows.sort(key=lambda row: row.row)
    lengths = [len(row.tokens) for row in rows]
    assert len(set(lengths)) > 3 and 9 in lengths
    assert [row.latency_s for row in rows] == lengths
    assert {row.ttft_s for row in rows} == {1.0}
    assert sizes == [12] + [sum(n > step for n in lengths) for step in range(1, max(lengths))]
    assert ended == sorted(range(12), key=lambda n: (lengths[n], n))
    for row in rows:
        assert (row.tokens[-1] in MANY_ENDS) == (row.finish_reason == "eos")
        assert not set(row.tokens[:-1]) & set(MANY_ENDS)


def test_each_row_has_its_own_limit() -> None:
    loaded = tiny("opt", eos=None)
    rows = decode.decode_all(loaded.model, [[5], [6, 7], [8]], [1, 4, 2], sampling.sampler([1, 2, 3], 1.0))
    assert [len(row.tokens) for row in rows] == [1, 4, 2]


# Draws, temperature, top-k, top-p


def splitmix64(state: int) -> int:
    """The reference in plain integers (Vigna's splitmix64.c)."""
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
    return state ^ (state >> 31)


def test_a_variate_is_splitmix64_made_gumbel() -> None:
    gamma = 0x9E3779B97F4A7C15
    variates = sampling.gumbel([7, 2**63 - 1], [5, 5], torch.arange(50).expand(2, -1))
    for row, seed in enumerate((7, 2**63 - 1)):
        base = splitmix64((seed + 6 * gamma) % 2**64)
        for token in range(50):
            bits = splitmix64((base + (token + 1) * gamma) % 2**64) >> 11
            exact = -math.log(-math.log1p(-(bits + 0.5) / 2**53))
            assert variates[row, token].item() == pytest.approx(exact, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("axis", ["tokens", "steps", "rows"])
def test_variates_are_standard_gumbel_and_independent_along_every_axis(axis: str) -> None:
    n = 3_000 if axis == "steps" else 20_000
    if axis == "tokens":
        variates = sampling.gumbel([3], [0], torch.arange(n)[None])[0]
    elif axis == "steps":
        variates = sampling.gumbel([3] * n, range(n), torch.zeros(n, 1, dtype=torch.long))[:, 0]
    else:
        seeds = [sampling.row_seed(0, "b01", r) for r in range(n)]
        variates = sampling.gumbel(seeds, [0] * n, torch.zeros(n, 1, dtype=torch.long))[:, 0]
    values = variates.double().numpy()
    assert np.isfinite(values).all()
    assert stats.kstest(values, "gumbel_r").pvalue > 1e-3
    ranks = stats.rankdata(values)
    assert abs(np.corrcoef(ranks[1:], ranks[:-1])[0, 1]) < 4 / math.sqrt(n)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.8, 0, 1.0), (0.8, 3, 1.0), (1.3, 0, 0.7), (0.5, 5, 0.9)],
)
def test_samples_follow_the_softmax(temperature: float, top_k: int, top_p: float) -> None:
    logits = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -1.0, -2.0])
    expected = brute_force(logits.tolist(), temperature, top_k, top_p)
    draws, steps = 5_000, 4
    choose = sampling.sampler([sampling.row_seed(1, "p", r) for r in range(draws)], temperature, top_k, top_p)
    for step in range(steps):
        chosen = choose(logits.repeat(draws, 1), list(range(draws)), [step] * draws)
        counts = np.bincount(chosen.numpy(), minlength=7)
        inside = expected > 0
        assert counts[~inside].sum() == 0
        assert stats.chisquare(counts[inside], draws * expected[inside]).pvalue > 1e-3


@pytest.mark.parametrize("size", [64, 65, 200, 4_096])
def test_samples_over_many_blocks_follow_the_softmax(size: int) -> None:
    rng = np.random.default_rng(size)
    logits = torch.tensor(rng.normal(0, 2.5, size), dtype=torch.float32)
    logits[rng.integers(0, size, size // 8)] = float("-inf")
    expected = brute_force(logits.tolist(), 0.9, 0, 1.0)
    draws = 40_000
    choose = sampling.sampler([sampling.row_seed(1, "p", r) for r in range(draws)], 0.9)
    chosen = torch.cat(
        [
            choose(logits.repeat(1_000, 1), list(range(start, start + 1_000)), [7] * 1_000)
            for start in range(0, draws, 1_000)
        ]
    )
    counts = np.bincount(chosen.numpy(), minlength=size)
    assert counts[expected == 0].sum() == 0
    often = draws * expected >= 10  # chi-square wants expected counts; the rest is one cell
    seen = np.append(counts[often], counts[~often].sum())
    wanted = np.append(draws * expected[often], draws * expected[~often].sum())
    assert stats.chisquare(seen[wanted > 0], wanted[wanted > 0]).pvalue > 1e-3


def brute_force(logits: list[float], temperature: float, top_k: int, top_p: float) -> Any:
    """Probabilities by sorting and adding up in plain Python."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[: top_k or None]
    weights = {i: math.exp(logits[i] / temperature) for i in order}
    total, reached, kept = sum(weights.values()), 0.0, []
    for i in order:
        kept.append(i)
        reached += weights[i] / total
        if reached >= top_p:
            break
    inside = sum(weights[i] for i in kept)
    return np.array([weights[i] / inside if i in kept else 0.0 for i in range(len(logits))])


@given(
    st.lists(st.integers(-60, 60), min_size=2, max_size=30, unique=True),
    st.integers(0, 35),
    st.floats(0.05, 1.0),
    st.floats(0.3, 3.0),
)
@examples(max_examples=150)
def test_filters_keep_what_brute_force_and_transformers_keep(
    tenths: list[int], top_k: int, top_p: float, temperature: float
) -> None:
    logits = torch.tensor([[n / 10 for n in tenths]], dtype=torch.float64)
    expected = brute_force(logits[0].tolist(), temperature, top_k, top_p)
    ordered = np.sort(expected)[::-1]
    if np.isclose(np.cumsum(ordered), top_p, atol=1e-6).any() and top_p < 1:
        return  # on the edge of the nucleus rounding may decide either way
    kept, ids = sampling.shortlist(logits / temperature, top_k, top_p)
    assert (kept > float("-inf")).sum() == kept.shape[1] == (expected > 0).sum()
    ours = torch.zeros_like(logits).scatter(1, ids, kept.softmax(-1))
    assert np.allclose(ours[0].numpy(), expected, atol=1e-9)
    theirs = TemperatureLogitsWarper(temperature)(None, logits)
    theirs = TopKLogitsWarper(top_k)(None, theirs) if top_k else theirs
    theirs = TopPLogitsWarper(top_p)(None, theirs) if top_p < 1 else theirs
    assert torch.allclose(ours, theirs.softmax(-1), atol=1e-9)


def test_seeds_differ_by_run_prompt_and_repeat_and_stay_in_63_bits() -> None:
    seeds = [
        sampling.row_seed(run, prompt, repeat)
        for run in range(5)
        for prompt in ("b1", "b11", "b1\x1f1")
        for repeat in (0, 1, 11)
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


# Prompts


def test_the_prompt_is_cut_off_by_tokens() -> None:
    loaded = tiny("gpt2", eos=None)
    sample = generate.generate_samples(loaded, PROMPTS[1:2], replace(FEW, temperature=0.0, repeats=1))[0]
    batch = loaded.tokenizer([PROMPTS[1].text], return_tensors="pt")
    theirs = loaded.model.generate(batch["input_ids"], do_sample=False, max_new_tokens=12)
    new = theirs[0, batch["input_ids"].shape[1] :]
    assert sample.text == loaded.tokenizer.decode(new, skip_special_tokens=True).strip()
    assert (sample.prompt_tokens, sample.new_tokens) == (batch["input_ids"].shape[1], 12)
    assert sample.bytes == len(sample.text.encode())


@pytest.mark.parametrize(
    ("context", "new", "letters", "kept", "limit", "truncated"),
    [
        (64, 12, 10, 11, 12, False),  # fits: the beginning token and ten letters
        (64, 12, 52, 53, 12, False),  # fits exactly: the last token is not read, and needs no place
        (64, 12, 53, 53, 12, True),  # one too long
        (64, 12, 500, 53, 12, True),
        (11, 6, 5, 6, 6, False),
        (16, 256, 5, 6, 11, False),  # a context smaller than the answer
        (16, 256, 40, 8, 9, True),
        (64, 60, 40, 32, 33, True),  # the prompt keeps at least half
    ],
)
def test_a_prompt_too_long_keeps_its_end_and_its_beginning_token(
    context: int, new: int, letters: int, kept: int, limit: int, truncated: bool
) -> None:
    loaded = tiny("gpt2", context=context, eos=None)
    text = "".join(chr(ord("a") + n % 26) for n in range(letters))
    job = generate.prepare(loaded, generate.Request("k", Prompt("p", text, "short_post"), 0), new)
    whole = loaded.tokenizer(text)["input_ids"]
    assert job.ids == (BOS, *whole[len(whole) - kept + 1 :])
    assert (job.max_new_tokens, job.truncated) == (limit, truncated)
    once = Settings(repeats=1, max_new_tokens=new)
    sample = generate.generate_samples(loaded, [job.prompt], once)[0]
    assert sample.error is None
    assert (sample.prompt_tokens, sample.new_tokens) == (kept, limit)
    assert (sample.prompt_truncated, sample.finish_reason) == (truncated, "length")


def test_an_end_token_that_is_also_the_beginning_ends_only_generated_text() -> None:
    ends = list(range(100, 180))
    loaded = tiny("llama", eos=[BOS, *ends])
    samples = generate.generate_samples(loaded, PROMPTS, FEW)
    assert all(s.new_tokens >= 1 and s.error is None for s in samples)
    assert max(s.new_tokens for s in samples) > 1
    planted = tiny("llama", eos=BOS)
    with torch.no_grad():  # a model that always says the beginning token
        planted.model.lm_head.weight.zero_()
        planted.model.model.norm.weight.zero_()
    greedy = generate.generate_samples(planted, PROMPTS[:1], replace(FEW, temperature=0.0, repeats=1))
    assert greedy[0].finish_reason == "length"  # all logits equal: token 0, the padding id, which counts


def test_without_an_end_token_only_length_ends() -> None:
    loaded = tiny("gpt2", eos=None, tokenizer=byte_tokenizer(eos=None))
    assert tokenization.end_tokens(loaded) == frozenset()
    samples = generate.generate_samples(loaded, PROMPTS, FEW)
    assert {(s.finish_reason, s.new_tokens) for s in samples} == {("length", 12)}


def test_special_tokens_and_the_end_token_are_not_text() -> None:
    loaded = tiny("gpt2", eos=[EOS, 3 + 30])  # 33 is an ordinary byte that ends a text here
    job = generate.prepare(loaded, generate.Request("k", PROMPTS[0], 0), 5)
    letters = loaded.tokenizer("ab", add_special_tokens=False)["input_ids"]
    row = decode.Finished(0, (BOS, *letters, 0, 33), "eos", 1.0, 3.0)
    sample = generate.sample_of(loaded, job, FEW, 1, row)
    assert (sample.text, sample.new_tokens, sample.tpot_s) == ("ab", 5, 0.5)
    single = generate.sample_of(loaded, job, FEW, 1, decode.Finished(0, (33,), "eos", 1.0, 1.0))
    assert (single.text, single.tpot_s) == ("", None)


@pytest.mark.parametrize(
    ("asked", "said", "reasoning", "text"),
    [
        ("Hi:", "<think>It greets.</think>Hello.", "It greets.", "Hello."),
        ("Hi:<think>", "It greets.</think>Hello.", "It greets.", "Hello."),  # the prompt opened it
        ("Hi:<think>", "It gree", "It gree", ""),
        ("Hi:", "<think>It gree", "It gree", ""),
        ("Hi:", "Hello.", None, "Hello."),
    ],
)
@pytest.mark.parametrize("special", [True, False])
def test_reasoning_is_recorded_beside_the_text(
    tmp_path: Path, asked: str, said: str, reasoning: str | None, text: str, special: bool
) -> None:
    loaded = tiny("gpt2")
    marks = [AddedToken(mark, special=special) for mark in ("<think>", "</think>")]
    loaded.tokenizer.add_tokens(marks)
    loaded = replace(loaded, report=replace(loaded.report, vocabulary=261))
    ids = loaded.tokenizer(said, add_special_tokens=False)["input_ids"]
    job = generate.prepare(loaded, generate.Request("k", replace(PROMPTS[0], text=asked), 0), 30)
    row = decode.Finished(0, (*ids, EOS), "eos", 1.0, 3.0)
    sample = generate.sample_of(loaded, job, FEW, 1, row)
    assert (sample.reasoning, sample.text) == (reasoning, text)
    assert (sample.new_tokens, sample.bytes) == (len(ids) + 1, len(text))  # all tokens, the answer's bytes
    path = store.write_rows(tmp_path / "samples.jsonl", [sample])
    assert list(store.read_rows(path, Sample)) == [sample]
    assert ("reasoning" in json.loads(path.read_text())) == (reasoning is not None)


def test_chat_models_get_their_template_once() -> None:
    loaded = tiny("gpt2", prompt_format="chat")
    request = generate.Request("k", Prompt("p", "Hi", "short_post"), 0)
    with pytest.raises(LabError, match="no chat template"):
        generate.prepare(loaded, request, 5)
    loaded.tokenizer.chat_template = (
        "{{ bos_token }}[{{ messages[0]['content'] }}]{{ '=' if add_generation_prompt }}"
    )
    job = generate.prepare(loaded, request, 5)
    assert loaded.tokenizer.decode(job.ids) == "<s>[Hi]="
    assert job.ids.count(BOS) == 1


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("parts", [False, True])
def test_a_text_ends_at_whatever_any_of_its_sources_names(parts: bool) -> None:
    words = byte_tokenizer(eos="</s>")
    words.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    words.chat_template = CHATML.replace("m['content']", "m['content'][0]['text']") if parts else CHATML
    turn = words.convert_tokens_to_ids("<|im_end|>")
    loaded = tiny("gpt2", eos=[7, 8], tokenizer=words)
    loaded.model.config.eos_token_id = 9
    assert tokenization.end_tokens(loaded) == {7, 8, 9, EOS}
    chat = replace(loaded, spec=replace(loaded.spec, prompt_format="chat"))
    assert tokenization.end_tokens(chat) == {7, 8, 9, EOS, turn}


def test_the_ids_of_a_prompt_are_in_its_key_and_its_record() -> None:
    loaded = tiny("gpt2")
    rows = generate.generate_samples(loaded, PROMPTS, FEW)
    report = generate.report_of(loaded, PROMPTS, FEW)
    assert [row.ids_digest for row in rows] == [report.ids_digests[row.prompt_id] for row in rows]
    assert [row.key for row in rows] == [r.key for r in generate.requests(PROMPTS, FEW, report)]
    other = replace(loaded, tokenizer=byte_tokenizer(begins=False))
    others = generate.generate_samples(other, PROMPTS, FEW)
    assert not {row.key for row in rows} & {row.key for row in others}
    assert not {row.ids_digest for row in rows} & {row.ids_digest for row in others}


def test_rows_of_the_release_before_digests_are_found_by_its_keys(tmp_path: Path) -> None:
    run = pipeline.open_run(Settings("lab-gpt2", str(tmp_path), limit=1, repeats=1, device="cpu"))
    report = replace(tiny().report, model="lab-gpt2", revision="r")
    assert report.ids_digests is None
    store.write_json(run.folder / "loading.json", report)
    prompt = registry.load_prompts(limit=1)[0]
    parts = {"max_new_tokens": 256, "temperature": 0.8, "top_k": 0, "top_p": 1.0, "seed": 0, "repeat": 0}
    parts |= {"model": "lab-gpt2", "revision": "r", "format": "plain", "device": "cpu", "dtype": "float32"}
    key = store.row_key(**parts, engine=2, purpose="sample", prompt_id=prompt.id, prompt=prompt.text)
    job = generate.Request(key, prompt, 0)
    row = generate.sample_of(tiny(), job, run.settings, 1, decode.Finished(0, (5,), "length", 0.1, 0.1))
    store.append_row(run.folder / "samples.jsonl", row)
    assert [found.key for found in generate.read_samples(run)] == [key]


# Failures


@pytest.mark.parametrize(
    "error",
    [RuntimeError("CUDA out of memory. Tried"), MemoryError(), RuntimeError("not enough memory: you")],
)
def test_out_of_memory_halves_the_batch_and_loses_nothing(error: Exception) -> None:
    expected = texts(generate.generate_samples(tiny("gpt2"), PROMPTS, FEW))
    loaded = tiny("gpt2")
    sizes = watch(loaded.model)
    break_above(loaded.model, 2, error)
    samples = generate.generate_samples(loaded, PROMPTS, FEW)
    assert texts(samples) == expected
    assert sizes[:3] == [3, 2, 4]  # three prompts; of four rows two prompts, then the rows: too many
    assert {s.batch_size for s in samples} == {2}


def test_out_of_memory_at_one_row_is_recorded_and_the_run_goes_on() -> None:
    loaded = tiny("gpt2")
    error = torch.OutOfMemoryError("out of memory")

    def refuse(module: Any, args: Any, kwargs: Any) -> None:  # only the prompt p2, which is the longest
        if kwargs["input_ids"].shape[1] >= len(PROMPTS[1].text):
            raise error

    handle = loaded.model.register_forward_pre_hook(refuse, with_kwargs=True)
    samples = generate.generate_samples(loaded, PROMPTS, replace(FEW, max_new_tokens=2))
    handle.remove()
    assert [s.prompt_id for s in samples if s.error] == ["p2"] * 3
    failed = next(s for s in samples if s.error)
    assert (failed.error, failed.failure) == ("OutOfMemoryError: out of memory", Failure.OUT_OF_MEMORY)
    assert (failed.text, failed.new_tokens, failed.finish_reason) == ("", 0, "error")
    assert (failed.latency_s, failed.ttft_s, failed.tpot_s) == (None, None, None)


def test_a_failing_batch_keeps_the_others_and_is_tried_again(tmp_path: Path) -> None:
    loaded = tiny("gpt2")
    path = tmp_path / "samples.jsonl"
    expected = texts(generate.generate_samples(loaded, PROMPTS, FEW))
    passes = itertools.count()

    def stumble(module: Any, args: Any, kwargs: Any) -> None:
        if next(passes) == 3:  # in the middle of the first batch
            raise ValueError("a planted fault\nsecond line")

    handle = loaded.model.register_forward_pre_hook(stumble, with_kwargs=True)
    samples = generate.generate_samples(loaded, PROMPTS, FEW, path, batch_size=3)
    handle.remove()
    failed = [s.prompt_id for s in samples if s.error == "ValueError: a planted fault"]
    assert failed == ["p2"] * 3 and sum(s.error is None for s in samples) == 6  # the longest goes first
    sizes = watch(loaded.model)
    again = generate.generate_samples(loaded, PROMPTS, FEW, path)
    assert texts(again) == expected
    assert sizes == [1, *[3] * 11]  # only the three that had failed, their prompt read once
    assert len(list(store.read_rows(path, Sample))) == 12


def test_nan_logits_are_a_failure_not_a_text() -> None:
    loaded = tiny("gpt2")
    with torch.no_grad():
        loaded.model.transformer.ln_f.weight[0] = float("nan")
    for temperature in (0.0, 0.8):
        samples = generate.generate_samples(loaded, PROMPTS, replace(FEW, temperature=temperature))
        assert all("NaN" in str(s.error) and s.failure == Failure.BAD_OUTPUT for s in samples)


@pytest.mark.parametrize(
    "wrong", [{"repeats": 0}, {"max_new_tokens": 0}, {"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}]
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(LabError, match=next(iter(wrong))):
        replace(FEW, **wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"repeats": "2"}, {"repeats": 2.0}, {"repeats": True}, {"repeats": None}, {"limit": "3"}),
        *({"temperature": "hot"}, {"temperature": None}, {"top_p": "1"}, {"seed": 1.5}, {"seed": "0"}),
        *({"maker_settings": "false"}, {"maker_settings": 1}, {"prompts": None}, {"device": 0}),
    ],
)
def test_settings_of_another_type_are_refused_in_one_sentence(wrong: dict[str, Any]) -> None:
    with pytest.raises(LabError, match=f"{next(iter(wrong))} is .*: it must be of the type"):
        Settings(**wrong)
    with pytest.raises(LabError, match="timeout is '5': it must be of the type float"):
        Limits(cell_s="5")  # type: ignore[arg-type]


def test_numbers_of_numpy_are_the_same_settings_as_python_s(tmp_path: Path) -> None:
    numbers: Any = {"repeats": np.int64(2), "limit": np.int32(3), "seed": np.int64(7)}
    odd = Settings(**numbers, top_p=np.float64(0.5), prompts=Path("p.jsonl"))  # type: ignore[arg-type]
    plain = Settings(repeats=2, limit=3, top_p=0.5, seed=7, prompts="p.jsonl")
    assert odd == plain
    assert store.read_json(store.write_json(tmp_path / "settings.json", odd), Settings) == plain
    report = tiny("llama").report
    keys = [[r.key for r in generate.requests(PROMPTS, one, report)] for one in (odd, plain)]
    assert keys[0] == keys[1]


def test_a_file_that_cannot_be_written_is_said_before_anything_is_generated(tmp_path: Path) -> None:
    loaded = tiny()
    sizes = watch(loaded.model)
    (tmp_path / "file").write_text("")
    with pytest.raises(LabError, match="cannot be written"):
        generate.generate_samples(loaded, PROMPTS, FEW, tmp_path / "file" / "samples.jsonl")
    assert sizes == []


# Files and resume


def test_resume_makes_nothing_twice_and_gives_the_same_texts(tmp_path: Path) -> None:
    loaded = tiny("llama", eos=MANY_ENDS)
    whole = generate.generate_samples(loaded, PROMPTS, FEW)
    path = tmp_path / "run" / "samples.jsonl"
    generate.generate_samples(loaded, PROMPTS[:2], replace(FEW, repeats=2), path)
    sizes = watch(loaded.model)
    resumed = generate.generate_samples(loaded, PROMPTS, FEW, path)
    assert texts(resumed) == texts(whole)
    assert sizes[0] == 3 and max(sizes) <= 5  # three prompts are read for five rows
    sizes.clear()
    assert (
        generate.generate_samples(loaded, PROMPTS, FEW, path) == resumed
    )  # timings too: nothing measured anew
    assert sizes == []
    assert len(path.read_text().splitlines()) == 9


def test_parts_of_the_rows_are_those_of_the_whole_and_together_all_of_them(tmp_path: Path) -> None:
    loaded, path = tiny("llama", eos=MANY_ENDS), tmp_path / "samples.jsonl"
    whole = generate.generate_samples(loaded, PROMPTS, FEW)
    assert [(s.prompt_id, s.repeat) for s in whole] == [
        (p.id, r) for p in PROMPTS for r in range(FEW.repeats)
    ]
    for part in (slice(3), slice(3, 9), slice(1, None, FEW.repeats), slice(4, 4), slice(None)):
        made = generate.generate_samples(loaded, PROMPTS, FEW, path, part=part)
        assert texts(made) == texts(whole[part]) and [s.key for s in made] == [s.key for s in whole[part]]
    assert sorted(row.key for row in store.read_rows(path, Sample)) == sorted(s.key for s in whole)


def test_a_torn_last_line_costs_one_row(tmp_path: Path) -> None:
    loaded = tiny("gpt2")
    path = tmp_path / "samples.jsonl"
    first = generate.generate_samples(loaded, PROMPTS, FEW, path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]) + lines[-1][:50])
    sizes = watch(loaded.model)
    second = generate.generate_samples(loaded, PROMPTS, FEW, path)
    assert texts(second) == texts(first)
    assert set(sizes) == {1}
    assert {row.key for row in store.read_rows(path, Sample)} == {row.key for row in first}


def test_an_interrupt_passes_and_what_had_ended_is_kept(tmp_path: Path) -> None:
    loaded = tiny("llama", eos=MANY_ENDS)
    path = tmp_path / "samples.jsonl"
    passes = itertools.count()

    def interrupt(module: Any, args: Any, kwargs: Any) -> None:
        if next(passes) == 5:
            raise KeyboardInterrupt

    handle = loaded.model.register_forward_pre_hook(interrupt, with_kwargs=True)
    with pytest.raises(KeyboardInterrupt):
        generate.generate_samples(loaded, PROMPTS, FEW, path)
    handle.remove()
    kept = list(store.read_rows(path, Sample))
    assert 0 < len(kept) < 9 and all(0 < row.new_tokens <= 5 for row in kept)
    whole = generate.generate_samples(loaded, PROMPTS, FEW, path)
    assert texts(whole) == texts(generate.generate_samples(loaded, PROMPTS, FEW))


@pytest.mark.parametrize(
    "other",
    [{"max_new_tokens": 13}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.9}, {"seed": 1}],
)
def test_rows_of_other_settings_stay_and_are_not_returned(tmp_path: Path, other: dict[str, Any]) -> None:
    loaded, path, settings = tiny("gpt2"), tmp_path / "samples.jsonl", replace(FEW, repeats=1)
    first = generate.generate_samples(loaded, PROMPTS, settings, path)
    second = generate.generate_samples(loaded, PROMPTS, replace(settings, **other), path)
    assert not {s.key for s in first} & {s.key for s in second}
    assert len(list(store.read_rows(path, Sample))) == 6
    assert generate.generate_samples(loaded, PROMPTS, settings, path) == first


def test_the_key_holds_everything_that_decides_the_text() -> None:
    report = tiny("gpt2").report
    others = (
        ("revision", "s"),
        ("device", "cuda"),
        ("dtype", "bfloat16"),
        ("prompt_format", "chat"),
        ("model", "x"),
    )
    variants = [report, *(replace(report, **{name: value}) for name, value in others)]
    keys = [request.key for v in variants for request in generate.requests(PROMPTS, FEW, v)]
    reworded = [replace(PROMPTS[0], text="Ho:"), replace(PROMPTS[0], id="p9")]
    keys += [request.key for request in generate.requests(reworded, FEW, variants[0])]
    keys += [request.key for request in generate.requests(PROMPTS, FEW, variants[0], "latency")]
    assert len(set(keys)) == len(keys) == 6 * 9 + 2 * 3 + 3 * 2  # latency: two rounds
    second = generate.requests(PROMPTS, FEW, replace(report, device="cuda:1"))
    assert second == generate.requests(PROMPTS, FEW, variants[2])
    whole, real = (replace(FEW, temperature=zero, top_p=one) for zero, one in ((0, 1), (0.0, 1.0)))
    assert generate.requests(PROMPTS, whole, report) == generate.requests(PROMPTS, real, report)


# Latency and throughput


def test_latency_is_measured_one_by_one_over_a_fixed_length_after_a_warm_up(tmp_path: Path) -> None:
    loaded = tiny("gpt2", context=128, eos=MANY_ENDS)
    sizes = watch(loaded.model)
    path = tmp_path / "latency.jsonl"
    prompts = [Prompt(f"p{n}", "Hello " * n, "short_post") for n in range(1, 11)]
    samples = latency.measure_latency(loaded, prompts, Settings(max_new_tokens=20), path)
    assert [s.prompt_id for s in samples] == [f"p{n}" for n in range(1, 9) for _ in range(2)]
    assert {(s.batch_size, s.new_tokens, s.repeat) for s in samples} == {(1, 20, 0), (1, 20, 1)}
    assert sizes == [1] * (8 + 16 * 20)  # eight tokens to warm up, in no row
    for s in samples:
        assert s.latency_s is not None and s.ttft_s is not None and s.tpot_s is not None
        assert 0 < s.ttft_s < s.latency_s
        assert s.tpot_s == pytest.approx((s.latency_s - s.ttft_s) / 19)
    assert latency.measure_latency(loaded, prompts, Settings(max_new_tokens=20), path) == samples
    assert len(sizes) == 328 + 8  # the warm-up alone


def test_throughput_by_hand() -> None:
    loaded = tiny()
    job = generate.Request("k", PROMPTS[0], 0, (1,), 9)

    def row(tokens: int, seconds: float) -> Sample:
        made = decode.Finished(0, (5,) * tokens, "length", 0.1, 9.9)
        return generate.sample_of(loaded, job, FEW, 2, made, share=meters.Share(seconds, None))

    failed = generate.sample_of(loaded, job, FEW, 2, error=ValueError("x"))
    assert generate.throughput([row(10, 4.0), row(5, 2.0), failed]) == pytest.approx(15 / 6)
    assert generate.throughput([]) == generate.throughput([failed]) == 0.0


def test_the_shares_of_a_batch_add_up_to_its_time() -> None:
    started = time.perf_counter()
    samples = generate.generate_samples(tiny(), PROMPTS, Settings(repeats=3, max_new_tokens=9))
    wall = time.perf_counter() - started
    together = sum(sample.share_s or 0.0 for sample in samples)
    longest = max(sample.latency_s or 0.0 for sample in samples)
    assert longest <= together < wall
    assert all(sample.share_s for sample in samples)
    assert all(sample.energy_j is None for sample in samples) == (not meters.read_energy())


def test_the_batch_is_chosen_by_memory_and_split_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny("llama")
    job = generate.Request("k", PROMPTS[0], 0, (1,) * 20, 30)
    # keys and values x layers x one key-value head x head size 8 x 50 tokens x 4 bytes, and the vocabulary
    row = 2 * 2 * 1 * 8 * 50 * 4 + 24 * 259
    for free, rows, expected in (
        (10**9, 60, 60),
        (10**9, 129, 65),
        (20 * row, 60, 15),  # 18 fit into nine tenths
        (20 * row, 12, 12),
        (10 * row, 12, 6),
        (0, 5, 1),
    ):
        monkeypatch.setattr(machine, "free_memory", lambda device, free=free: free)
        assert generate.best_batch_size(loaded, [job] * rows) == expected


def test_rows_are_read_by_key_without_torch_and_what_is_missing_is_named(tmp_path: Path) -> None:
    settings = Settings(
        "lab-gpt2", str(tmp_path), limit=2, repeats=1, max_new_tokens=4, device="cpu", dtype="float32"
    )
    run = pipeline.open_run(settings)
    loaded = load.load(run.spec, "cpu", "float32")
    prompts = registry.load_prompts(limit=2)
    store.write_json(run.folder / "loading.json", generate.report_of(loaded, prompts, settings))
    made = generate.generate_samples(loaded, prompts, settings, run.folder / "samples.jsonl")
    timed = latency.measure_latency(loaded, prompts, settings, run.folder / "latency.jsonl")
    assert [(s.prompt_id, s.error) for s in made] == [("b01", None), ("b02", None)]
    assert None not in generate.stored_samples(run) + generate.stored_samples(run, "latency")
    code = (
        "import sys; from nbhelpers import pipeline; from nbhelpers.generation import generate;"
        f"from nbhelpers.records import Settings; run = pipeline.open_run({settings!r});"
        "rows = [*generate.read_samples(run), *generate.read_samples(run, 'latency')];"
        "print(*(r.key for r in rows)); print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == [*(s.key for s in made + timed), "False", "False"]
    more = replace(run, settings=replace(settings, repeats=2))
    assert generate.stored_samples(more).count(None) == 2 and None not in generate.stored_samples(
        more, "latency"
    )
    with pytest.raises(LabError, match=r"lacks 2 of 4 rows: .*through='samples'"):
        generate.read_samples(more)


def test_a_prompt_is_encoded_no_more_often_for_its_repeats(monkeypatch):
    encode, asked = tokenization.encode, list[str]()
    monkeypatch.setattr(tokenization, "encode", lambda m, p: asked.append(p.id) or encode(m, p))
    prompts = [Prompt("p", "Tell me of ships:", "short_post"), Prompt("q", "And of tea:", "short_post")]
    counts = []
    for repeats in (1, 5):
        asked.clear()
        rows = generate.generate_samples(tiny(), prompts, Settings(repeats=repeats, max_new_tokens=2))
        assert len(rows) == 2 * repeats and len({row.key for row in rows}) == 2 * repeats
        counts.append(sorted(asked))
    assert counts[0] == counts[1]


def test_a_stop_string_ends_a_row_and_is_no_part_of_its_text(tmp_path):
    """The text is that of a run without it, up to the string; the row was not written to its end."""
    loaded = load.load("lab-gpt2")
    prompts = registry.load_prompts(limit=2)
    free = generate.generate_samples(loaded, prompts, Settings(repeats=2, max_new_tokens=40))
    words = [sample.text.split() for sample in free]
    stop = next(word for word in words[0][2:] if word not in "".join(words[0][:2]))
    task = tmp_path / "t.toml"
    task.write_text(f'prompts = "p"\nstop = [{json.dumps(" " + stop)}]\n[scorers.rubric]\n')
    asked = Settings(task=str(task), repeats=2, max_new_tokens=40)
    stopped = generate.generate_samples(loaded, prompts, asked)
    ended = 0
    for whole, cut in zip(free, stopped, strict=True):
        assert cut.text == whole.text.split(f" {stop}")[0].rstrip()
        assert cut.key != whole.key and cut.new_tokens <= whole.new_tokens
        ended += cut.finish_reason == "stop"
    assert ended and stopped[0].new_tokens < free[0].new_tokens
