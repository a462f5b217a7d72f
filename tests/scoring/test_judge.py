"""The judge against token-by-token probabilities, and on models whose answer is known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from definitions import definitions
from saved_models import make_tokenizer
from tiny_models import PAD, byte_tokenizer, tiny
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nbhelpers.loading.load import Loaded
from nbhelpers.records import Estimate, LabError
from nbhelpers.scoring import judge

PROMPT, TEXT = "Write a short post about rain:", "It rained for a week, and nobody measured it."


def answers(loaded: Loaded, lead: str) -> list[list[int]]:
    special = loaded.spec.prompt_format != "chat"
    texts = [f"{lead}{rating}" for rating in range(1, 11)]
    return [loaded.tokenizer(text, add_special_tokens=special)["input_ids"] for text in texts]


def brute(loaded: Loaded, lead: str) -> list[float]:
    """Probability of each answer, one forward pass a token, without cache, batch or shortcuts."""
    whole = answers(loaded, lead)
    start = max(n for n in range(len(whole[0])) if len({tuple(ids[:n]) for ids in whole}) == 1)
    found = []
    for ids in whole:
        p = 1.0
        for place in range(start, len(ids)):
            with torch.inference_mode():
                logits = loaded.model(torch.tensor([ids[:place]])).logits[0, -1]
            p *= float(logits.softmax(-1)[ids[place]])
        found.append(p)
    if whole[9][: len(whole[0])] == whole[0]:
        found[0] -= found[9]
    return found


def lead_of(chat: bool = False) -> str:
    question = judge.QUESTION.format(prompt=PROMPT, text=TEXT)
    return f"USER {question} ASSISTANT " if chat else f"{question}\n"


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, but "\\n1" is one token: 2 to 9 take two tokens, 1 takes one, 10 is one of 1 and one more."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    names = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    names[-1] = "Ċ1"  # instead of the last byte, which no text of ours holds
    bpe = models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[("Ċ", "1")])
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>")


@pytest.mark.parametrize("family", ["gpt2", "bloom", "opt", "llama"])
def test_probabilities_are_those_of_token_by_token_reading(family: str) -> None:
    loaded = tiny(family, context=512)
    assert len(answers(loaded, lead_of())[9]) == len(answers(loaded, lead_of())[0]) + 1  # "10" is two tokens
    found = judge.judge(loaded, PROMPT, TEXT)
    assert found.probabilities == pytest.approx(brute(loaded, lead_of()), rel=1e-4)
    assert found.mass == pytest.approx(sum(found.probabilities)) and 0 < found.mass < 1
    assert found.expected == pytest.approx(
        sum(n * p for n, p in enumerate(found.probabilities, 1)) / found.mass
    )


def test_numbers_of_unequal_token_counts() -> None:
    loaded = tiny("llama", context=512, tokenizer=merging_tokenizer())
    lengths = {len(ids) for ids in answers(loaded, lead_of())[1:9]}
    assert lengths == {len(answers(loaded, lead_of())[0]) + 1} == {len(answers(loaded, lead_of())[9])}
    assert judge.judge(loaded, PROMPT, TEXT).probabilities == pytest.approx(
        brute(loaded, lead_of()), rel=1e-4
    )


def test_ten_as_a_token_of_its_own(tmp_path: Any) -> None:
    make_tokenizer(tmp_path, ("<unk>", *map(str, range(1, 11)), "Rating", ":"), unk_token="<unk>")
    loaded = tiny("gpt2", context=512, tokenizer=AutoTokenizer.from_pretrained(tmp_path))
    assert len({len(ids) for ids in answers(loaded, lead_of())}) == 1
    assert judge.judge(loaded, PROMPT, TEXT).probabilities == pytest.approx(
        brute(loaded, lead_of()), rel=1e-4
    )


def test_a_chat_model_is_asked_through_its_template() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}USER {{ m.content }} {% endfor %}ASSISTANT "
    loaded = tiny("llama", context=512, prompt_format="chat", tokenizer=tokenizer)
    found = judge.judge(loaded, PROMPT, TEXT)
    assert found.probabilities == pytest.approx(brute(loaded, lead_of(chat=True)), rel=1e-4)


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


def test_a_known_rating_is_recovered() -> None:
    found = judge.judge(fixed_judge({"7": 0.6, "8": 0.2}), PROMPT, TEXT)
    assert found.mass == pytest.approx(0.8, abs=1e-6)
    assert found.score == pytest.approx(7.25, abs=1e-5) and found.reason is None


def test_ten_takes_its_share_of_the_one() -> None:
    """p("1") = 0.4 and p("0") = 0.5 anywhere: 10 gets 0.4 x 0.5, and 1 keeps the other half."""
    found = judge.judge(fixed_judge({"1": 0.4, "0": 0.5}), PROMPT, TEXT)
    assert found.probabilities[0] == pytest.approx(0.2) and found.probabilities[9] == pytest.approx(0.2)
    assert found.score == pytest.approx(5.5)


def test_a_judge_that_does_not_rate_has_no_score_but_tells_its_mass() -> None:
    found = judge.judge(fixed_judge({"7": 0.01, "3": 0.01}), PROMPT, TEXT)
    assert found.score is None and found.mass == pytest.approx(0.02, abs=1e-6)
    assert found.reason == "2.0% of the probability is on a rating"
    assert found.expected == pytest.approx(5.0, abs=1e-4)


def test_a_text_beyond_the_context_is_not_rated_and_not_cut() -> None:
    found = judge.judge(tiny("gpt2", context=64), PROMPT, TEXT)
    assert found.score is found.expected is None and found.mass == 0.0
    assert "do not fit in the context of 64" in (found.reason or "")


def test_a_model_that_returns_nan_has_not_rated() -> None:
    loaded = tiny("gpt2", context=512)
    with torch.no_grad():
        loaded.model.lm_head.weight.fill_(math.nan)
    assert judge.judge(loaded, PROMPT, TEXT).score is None


def test_a_tokenizer_without_numbers_is_refused(tmp_path: Any) -> None:
    make_tokenizer(tmp_path, unk_token="<unk>")
    loaded = tiny("gpt2", context=512, tokenizer=AutoTokenizer.from_pretrained(tmp_path))
    with pytest.raises(LabError, match="cannot tell 1 to 10 apart"):
        judge.judge(loaded, PROMPT, TEXT)


# ---- probes --------------------------------------------------------------------------------------------


def planted_judge(
    first: float = 0.0, length: float = 0.0, own: float = 0.0, noise: float = 0.0
) -> judge.Judge:
    """Rates a text by the number that it begins with, but for biases: in chances, points, points, points."""

    def rate(prompt: str, text: str, extra: float = 0.0) -> float:
        mine = own if "mine" in text else 0.0
        return float(text.split()[0]) + length * (text.count("end") > 1) + mine + extra

    def prefer(prompt: str, one: str, other: str) -> float:
        return 0.5 + 0.04 * (float(one.split()[0]) - float(other.split()[0])) + first / 2

    again = {}
    rng = np.random.default_rng(0)

    def repeat(prompt: str, text: str) -> float:
        return again.setdefault((prompt, text), rate(prompt, text, rng.normal(0, noise)))

    return judge.Judge(rate, repeat, prefer)


CASES = [
    judge.Case(
        f"prompt {i}",
        f"{2 + (i + 3 * j) % 5} {'mine' if j == 0 else 'yours'} end",
        j == 0,
        2.5 + (i + 3 * j) % 5,
    )
    for i in range(8)
    for j in range(3)
]


def test_a_fair_judge_shows_no_bias_and_full_agreement_but_for_its_level() -> None:
    found = judge.probe(planted_judge(), CASES)
    for bias in (found.position, found.length, found.own):
        assert bias.n == 8 and bias.mean == pytest.approx(0.0, abs=1e-12), bias
    assert found.retest.mean == 1.0 and 0.8 < found.agreement.mean < 1.0  # half a point below the readers


def test_planted_biases_are_recovered() -> None:
    found = judge.probe(planted_judge(first=0.3, length=1.5, own=0.8, noise=1.0), CASES)
    assert found.position.mean == pytest.approx(0.3)
    assert found.length.mean == pytest.approx(1.5)
    assert found.own.mean == pytest.approx(0.8)
    assert found.retest.mean < 0.95 and found.retest.low < found.retest.mean < found.retest.high


def test_a_judge_that_refuses_leaves_nothing_to_measure() -> None:
    silent = judge.Judge(lambda *_: None, lambda *_: None, lambda *_: None)
    found = judge.probe(silent, CASES)
    assert {e.reason for e in vars(found).values()} == {"no data"}


def test_a_model_can_be_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = fixed_judge({"7": 0.5, "A": 0.3, "B": 0.1}, context=1024)
    assert judge.prefer(loaded, PROMPT, TEXT, "Another.") == pytest.approx(0.75, abs=1e-5)
    found = judge.probe(judge.judge_by(loaded), [judge.Case(PROMPT, TEXT), judge.Case(PROMPT, "Another.")])
    assert found.position.mean == pytest.approx(0.5, abs=1e-5) and found.length.mean == pytest.approx(0)
    assert judge.prefer(fixed_judge({"A": 0.05}), PROMPT, TEXT, "Another.") is None


def test_a_judge_that_never_rates_orders_nothing_whatever_its_expected_values_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    book = definitions("04_scoring", "definitions")
    names = book.taus.__globals__  # byte by byte, all eight take a minute
    monkeypatch.setitem(names, "ANSWERS", [book.ANSWERS[0], book.ANSWERS[1]])

    def agreement(loaded: Loaded, field: str) -> Estimate:
        return book.agreement(lambda text, prompt, _: getattr(judge.judge(loaded, prompt, text), field))

    assert agreement(fixed_judge({"7": 0.9}, context=1024), "score").mean == 0.0
    silent = fixed_judge({"7": 0.001}, context=1024)
    assert agreement(silent, "score").reason == "no data"
    assert agreement(silent, "expected").n == 2  # what would be reported without the check
