"""The embedded models: their corpus, their recipe, and the files that are shipped."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.models import card, corpus, grammar, training

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "data" / "models"

ALIASES = ("lab-gpt2", "lab-bloom", "lab-opt", "lab-llama")  # smallest first
BENCHMARK_PROMPTS = (
    "write a linkedin post about ai cost optimization for enterprise teams",
    "create professional content about apple silicon ml deployment",
    "draft thought leadership about local model deployment strategy",
    "write a linkedin article about ai infrastructure optimization",
    "create content about enterprise ai cost reduction success",
    "draft professional content about ml deployment achievements",
    "write strategic content about ai competitive advantages",
    "create linkedin content about technical leadership",
    "draft professional content about ai implementation results",
    "write thought leadership about ml infrastructure strategy",
    "create content about ai transformation in business",
    "draft linkedin content about technical innovation",
    "write professional content about ai optimization",
    "create strategic content about ml cost management",
    "draft linkedin content about ai technical excellence",
)


@pytest.fixture(scope="module")
def texts() -> list[corpus.Text]:
    few = {content_type: count // 5 for content_type, count in corpus.VARIANTS.items()}
    return list(corpus.training_texts(few, banned=corpus.banned_phrases(ROOT / "data" / "prompts.jsonl")))


def expand(source: str, seed: int = 0, slots: dict[str, tuple[str, ...]] | None = None, **given: str) -> str:
    return grammar.expand(grammar.parse(source), slots or {}, random.Random(seed), **given)


# The grammar


@st.composite
def template(draw: Any, depth: int = 3) -> tuple[str, set[str]]:
    """A source text and, worked out beside it, everything it may expand to."""
    source, outcomes = "", {""}
    for _ in range(draw(st.integers(0, 3))):
        if depth and draw(st.booleans()):
            options = draw(st.lists(template(depth=depth - 1), min_size=1, max_size=3))
            piece = "[" + "|".join(part for part, _ in options) + "]"
            words = set().union(*(results for _, results in options))
        else:
            piece = draw(st.text("xyz.", min_size=1, max_size=3))
            words = {piece}
        source += piece
        outcomes = {left + right for left in outcomes for right in words}
    return source, outcomes


@given(template(), st.integers(0, 99))
def test_an_expansion_is_one_of_the_possible_ones(case: tuple[str, set[str]], seed: int) -> None:
    source, outcomes = case
    assert expand(source, seed) in outcomes


def test_every_alternative_turns_up() -> None:
    seen = {expand("[a|b[c|d]|]e", seed) for seed in range(100)}
    assert seen == {"ae", "bce", "bde", "e"}


@pytest.mark.parametrize("source", ["[a", "a]", "[a|[b]", "{topic", "a}b{", "{to pic}"])
def test_a_broken_template_is_refused(source: str) -> None:
    with pytest.raises(ValueError):
        grammar.parse(source)


def test_a_slot_keeps_its_value_and_a_numbered_one_differs() -> None:
    slots = {"name": ("ann", "bob", "eve")}
    for seed in range(30):
        first, again, capital, second, third = expand(
            "{name} {name} {Name} {name2} {name3}", seed, slots
        ).split()
        assert first == again == capital.lower() and capital[0].isupper()
        assert {first, second, third} == set(slots["name"])


def test_values_hold_slots_and_choices() -> None:
    slots = {"firm": ("a {size} firm[ here|]",), "size": ("small", "old")}
    seen = {expand("{Firm}.", seed, slots) for seed in range(60)}
    assert seen == {"A small firm here.", "A small firm.", "An old firm here.", "An old firm."}


@pytest.mark.parametrize(
    ("value", "article"),
    [
        ("ML team", "an"), ("GPU", "a"), ("AI plan", "an"), ("hour", "an"), ("use", "a"), ("unit", "a"),
        ("8% cut", "an"), ("12% cut", "a"), ("18 days", "an"), ("idea", "an"), ("one-off", "a"), ("law", "a"),
    ],
)  # fmt: skip
def test_the_article_agrees_with_what_is_drawn(value: str, article: str) -> None:
    assert expand("a {topic}, an {topic}", topic=value) == f"{article} {value}, {article} {value}"
    assert expand(f"It is a [{value}].") == f"It is {article} {value}."


def test_empty_alternatives_leave_no_stray_spaces() -> None:
    assert expand("One [|] two [|].\n\n[|]\n\nThree [|]") == "One two.\n\nThree"


# The corpus


def test_there_are_enough_authored_passages_and_all_differ() -> None:
    passages = [p for name in corpus.CONTENT_TYPES for p in corpus.load_passages(name)]
    assert len(passages) >= 400
    assert len(set(passages)) == len(passages)


def test_every_passage_parses_names_its_topic_and_every_slot_has_values() -> None:
    slots = corpus.load_slots()
    sources = [p for name in corpus.CONTENT_TYPES for p in corpus.load_passages(name)]
    for source in sources:
        assert "topic" in {slot.name for slot in grammar.slots_of(grammar.parse(source))}, source
    for source in [*sources, *itertools.chain.from_iterable(slots.values())]:
        unknown = {slot.name for slot in grammar.slots_of(grammar.parse(source))} - set(slots)
        assert not unknown, f"{unknown} in {source!r}"
    assert len(set(slots["topic"])) >= 60


def test_the_expansion_is_deterministic() -> None:
    few = dict.fromkeys(corpus.CONTENT_TYPES, 2)
    first = list(corpus.training_texts(few))
    assert first == list(corpus.training_texts(few))
    assert first != list(corpus.training_texts(few, seed=1))


@pytest.mark.parametrize("part", [0, 1])
def test_copying_texts_repeat_topics_of_any_words_and_no_held_out_one(part: int) -> None:
    banned = corpus.banned_phrases(ROOT / "data" / "prompts.jsonl")
    texts = list(itertools.islice(corpus.copying_texts(part=part, banned=banned), 0, None, 40))
    assert texts == list(itertools.islice(corpus.copying_texts(part=part, banned=banned), 0, None, 40))
    assert len({text.topic for text in texts}) > 0.99 * len(texts) > 200
    assert len({word for text in texts for word in text.topic.split()}) > 500
    for text in texts:
        assert text.prompt.endswith(f"about {text.topic}:")
        assert text.topic in text.text or text.topic[:1].upper() + text.topic[1:] in text.text
        assert not corpus.contains_any(text.document, (*banned, *corpus.HELD_OUT_WORDS))


def test_a_later_part_minds_the_theme_of_a_topic() -> None:
    def suited(part: int) -> float:
        themed = []
        for text in itertools.islice(corpus.copying_texts(part=part), 0, None, 10):
            themes = corpus.passage_themes(text.content_type)[text.passage]
            own = {name for name, words in corpus.THEMES.items() if words.search(text.topic)}
            themed += [bool(own & themes)] if own and themes else []
        return sum(themed) / len(themed)

    assert suited(0) < 0.4 < 0.6 < suited(1)


def test_all_texts_differ_and_so_do_thousands_of_topics(texts: list[corpus.Text]) -> None:
    distinct = {text.text for text in texts}
    assert len(distinct) == len(texts)
    assert len({text.topic for text in texts}) > 5000


def test_nothing_is_left_unexpanded(texts: list[corpus.Text]) -> None:
    assert not [text for text in texts if re.search(r"[\[\]{}|\x00]|  | [.,;:!?](\s|$)", text.document)]


def test_benchmark_prompts_and_topics_are_held_out(texts: list[corpus.Text]) -> None:
    everything = re.sub(r"\s+", " ", "\n".join(text.document for text in texts)).lower()
    for prompt in BENCHMARK_PROMPTS:
        topic = prompt.split(" about ")[1]
        assert prompt not in everything
        assert topic not in everything, topic


def test_the_prompts_of_the_laboratory_are_held_out(texts: list[corpus.Text]) -> None:
    lines = (ROOT / "data" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["text"].lower() for line in lines]
    assert set(BENCHMARK_PROMPTS) <= {prompt.rstrip(":") for prompt in prompts}
    everything = re.sub(r"\s+", " ", "\n".join(text.document for text in texts)).lower()
    for prompt in prompts:
        assert prompt.split(" about ")[1].rstrip(":") not in everything, prompt


def test_a_text_names_the_topic_of_its_instruction(texts: list[corpus.Text]) -> None:
    for text in texts:
        assert text.prompt.endswith(f" about {text.topic}:")
        assert text.topic.lower() in text.text.lower(), text


def test_short_posts_are_short(texts: list[corpus.Text]) -> None:
    assert max(len(text.text) for text in texts if text.content_type == "short_post") <= 280


def test_held_out_texts_share_neither_text_nor_topic_with_training(texts: list[corpus.Text]) -> None:
    held_out, unseen = list(corpus.held_out_texts()), list(corpus.unseen_passage_texts())
    everything = "\n".join(text.document.lower() for text in texts)
    assert not [word for word in corpus.HELD_OUT_WORDS if word in everything]
    for text in held_out + unseen:
        assert [word for word in corpus.HELD_OUT_WORDS if word in text.topic]
    trained = {(text.content_type, text.passage) for text in texts}
    assert trained == {(text.content_type, text.passage) for text in held_out}
    assert not trained & {(text.content_type, text.passage) for text in unseen}
    assert {text.content_type for text in unseen} == set(corpus.CONTENT_TYPES)


# The recipe


@given(st.lists(st.integers(2, 40), min_size=1, max_size=60), st.integers(40, 120))
def test_an_epoch_holds_every_document_once_whole_and_within_budget(lengths: list[int], budget: int) -> None:
    rows = [[number + 3] * length for number, length in enumerate(lengths)]
    seen: list[list[int]] = []
    for ids in training.batches(rows, budget, seed=0):
        assert ids.numel() <= budget or ids.shape[0] == 1
        seen += [[token for token in row if token != training.PAD_ID] for row in ids.tolist()]
        if len(seen) >= len(rows):
            break
    assert sorted(seen) == sorted(rows)


def test_training_is_reproducible_and_learns(texts: list[corpus.Text]) -> None:
    import torch

    tokenizer = training.train_tokenizer([text.document for text in texts[::50]])
    assert tokenizer("Write")["input_ids"][0] == tokenizer.bos_token_id == training.BOS_ID
    rows = training.encode(tokenizer, texts[:40])
    assert all(ids[0] == training.BOS_ID and ids[-1] == training.EOS_ID for ids in rows)
    shape = {
        "n_embd": 16,
        "n_layer": 1,
        "n_head": 2,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }
    recipe = training.Recipe("tiny", "gpt2", shape, steps=12, learning_rate=0.02, batch_tokens=400, warm_up=2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        models = [training.new_model(recipe) for _ in range(2)]
        results = [training.train(model, rows, recipe, log=lambda line: None) for model in models]
    finally:
        torch.set_num_threads(threads)
    assert results[0].losses == results[1].losses
    for left, right in zip(*(model.state_dict().values() for model in models), strict=True):
        assert torch.equal(left, right)
    assert results[0].losses[-1] < results[0].losses[0] - 0.3


@pytest.mark.parametrize("shape", [(8, 12), (12, 8)])
def test_an_orthogonalised_gradient_keeps_its_directions(shape: tuple[int, int]) -> None:
    import torch

    grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = training._orthogonalised(grad, (3.4445, -4.775, 2.0315), 5, 1e-7)
    left, _, right = torch.linalg.svd(grad, full_matrices=False)
    turned = left.T @ found @ right.T
    sizes = turned.diagonal()
    assert torch.allclose(turned, torch.diag(sizes), atol=1e-4)
    assert sizes.min() > 0.3 and sizes.max() < 1.5


def test_perplexity_of_a_uniform_model_is_the_vocabulary(texts: list[corpus.Text]) -> None:
    import torch

    tokenizer = training.train_tokenizer([text.document for text in texts[::100]])

    def uniform(input_ids: Any, use_cache: bool) -> Any:
        logits = torch.zeros(*input_ids.shape, 4096)
        return type("Output", (), {"logits": logits})

    chosen = texts[:5]
    result = training.perplexity(uniform, tokenizer, chosen, batch=2)
    assert result.per_token == pytest.approx(4096, rel=1e-4)
    answers = [
        len(tokenizer(text.document)["input_ids"]) + 1 - len(tokenizer(text.prompt)["input_ids"])
        for text in chosen
    ]
    assert result.tokens == sum(answers)
    assert result.bytes == sum(len(text.text.encode()) for text in chosen)


@given(
    st.lists(st.lists(st.sampled_from("abc"), max_size=9).map(" ".join), min_size=1, max_size=3),
    st.lists(st.lists(st.sampled_from("abcd"), max_size=9).map(" ".join), min_size=1, max_size=3),
)
def test_shared_runs_agree_with_brute_force(known: list[str], asked: list[str]) -> None:
    def contains(words: list[str]) -> bool:
        return any(f" {' '.join(words)} " in f" {text} " for text in known)

    for text, runs in zip(asked, card.shared_runs(known, asked), strict=True):
        words = text.split()
        for start, run in enumerate(runs):
            assert run == 0 or contains(words[start : start + run])
            assert start + run == len(words) or not contains(words[start : start + run + 1])


def test_copied_words_counts_the_words_in_long_runs() -> None:
    assert card.copied_words(np.array([2, 1, 4, 3, 2, 1, 0]), n=3) == 4
    assert card.copied_words(np.array([3, 3, 2, 1]), n=3) == 4
    assert card.copied_words(np.array([], dtype=int)) == 0


# The files that are shipped


@pytest.fixture(scope="module")
def loaded() -> dict[str, tuple[Any, Any]]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return {
        alias: (
            AutoModelForCausalLM.from_pretrained(MODELS / alias, dtype=torch.float32).eval(),
            AutoTokenizer.from_pretrained(MODELS / alias),
        )
        for alias in ALIASES
    }


@pytest.mark.parametrize("alias", ALIASES)
def test_the_files_match_their_digests(alias: str) -> None:
    digests = json.loads((MODELS / alias / "sha256.json").read_text())
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(digests)
    for name, value in digests.items():
        assert hashlib.sha256((MODELS / alias / name).read_bytes()).hexdigest() == value, name


@pytest.mark.parametrize("alias", ALIASES)
def test_a_model_is_what_its_card_says(alias: str, loaded: dict[str, tuple[Any, Any]]) -> None:
    model, tokenizer = loaded[alias]
    stated = re.search(
        r"\| parameters \| ([\d,]+)", (MODELS / alias / "README.md").read_text(encoding="utf-8")
    )
    assert stated and int(stated[1].replace(",", "")) == sum(p.numel() for p in model.parameters())
    special = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert special == (0, 1, 2)
    config = model.generation_config
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == special
    assert tokenizer.padding_side == "left" and tokenizer.model_max_length == 512
    assert len(tokenizer) == model.config.vocab_size == 4096
    text = "Naïve “quotes”, 8% – and\n\n  two  spaces"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_sizes_rise_and_the_largest_knows_its_corpus_best(loaded: dict[str, tuple[Any, Any]]) -> None:
    some = list(corpus.held_out_texts())[::15]
    sizes = [sum(p.numel() for p in loaded[alias][0].parameters()) for alias in ALIASES]
    values = [training.perplexity(*loaded[alias], some).per_token for alias in ALIASES]
    assert sizes == sorted(sizes)
    assert values[-1] == min(values) and values[0] == max(values)
    files = [path for alias in ALIASES for path in (MODELS / alias).iterdir()]
    assert sum(path.stat().st_size for path in files) < 30_000_000
