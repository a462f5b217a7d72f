"""The judge against token-by-token probabilities, and on models whose answer is known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from saved_models import make_tokenizer
from tiny_models import byte_tokenizer, fixed_judge, tiny
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nbhelpers.loading.load import Loaded
from nbhelpers.records import LabError
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


def ratings(loaded: Loaded) -> list[float]:
    """Probabilities of the ratings 1 to 10."""
    return judge.chances(loaded, judge.QUESTION.format(prompt=PROMPT, text=TEXT), judge.RATINGS)


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
    found, chances = judge.judge(loaded, PROMPT, TEXT), ratings(loaded)
    assert chances == pytest.approx(brute(loaded, lead_of()), rel=1e-4)
    assert found.mass == pytest.approx(sum(chances)) and 0 < found.mass < 1
    assert found.expected == pytest.approx(sum(n * p for n, p in enumerate(chances, 1)) / found.mass)


def test_numbers_of_unequal_token_counts() -> None:
    loaded = tiny("llama", context=512, tokenizer=merging_tokenizer())
    lengths = {len(ids) for ids in answers(loaded, lead_of())[1:9]}
    assert lengths == {len(answers(loaded, lead_of())[0]) + 1} == {len(answers(loaded, lead_of())[9])}
    assert ratings(loaded) == pytest.approx(brute(loaded, lead_of()), rel=1e-4)


def test_ten_as_a_token_of_its_own(tmp_path: Any) -> None:
    make_tokenizer(tmp_path, ("<unk>", *map(str, range(1, 11)), "Rating", ":"), unk_token="<unk>")
    loaded = tiny("gpt2", context=512, tokenizer=AutoTokenizer.from_pretrained(tmp_path))
    assert len({len(ids) for ids in answers(loaded, lead_of())}) == 1
    assert ratings(loaded) == pytest.approx(brute(loaded, lead_of()), rel=1e-4)


def test_a_chat_model_is_asked_through_its_template() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}USER {{ m.content }} {% endfor %}ASSISTANT "
    loaded = tiny("llama", context=512, prompt_format="chat", tokenizer=tokenizer)
    assert ratings(loaded) == pytest.approx(brute(loaded, lead_of(chat=True)), rel=1e-4)


def test_a_known_rating_is_recovered() -> None:
    found = judge.judge(fixed_judge({"7": 0.6, "8": 0.2}), PROMPT, TEXT)
    assert found.mass == pytest.approx(0.8, abs=1e-6)
    assert found.score == found.expected == pytest.approx(7.25, abs=1e-5)


def test_ten_takes_its_share_of_the_one() -> None:
    """p("1") = 0.4 and p("0") = 0.5 anywhere: 10 gets 0.4 x 0.5, and 1 keeps the other half."""
    loaded = fixed_judge({"1": 0.4, "0": 0.5})
    assert ratings(loaded)[::9] == pytest.approx([0.2, 0.2])
    assert judge.judge(loaded, PROMPT, TEXT).score == pytest.approx(5.5)


def test_a_judge_that_does_not_rate_has_no_score_but_tells_its_mass() -> None:
    found = judge.judge(fixed_judge({"7": 0.01, "3": 0.01}), PROMPT, TEXT)
    assert found.score is None and found.mass == pytest.approx(0.02, abs=1e-6)
    assert found.expected == pytest.approx(5.0, abs=1e-4)


def test_a_text_beyond_the_context_is_not_rated_and_not_cut() -> None:
    found = judge.judge(tiny("gpt2", context=64), PROMPT, TEXT)
    assert found.score is found.expected is None and found.mass == 0.0


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
