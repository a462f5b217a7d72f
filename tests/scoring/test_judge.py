"""The judge against token-by-token probabilities, and on models whose answer is known."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from made_runs import make_sample
from openai_server import Fault, serve
from saved_models import make_tokenizer
from tiny_models import byte_tokenizer, fixed_judge, tiny
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nbhelpers import registry, tasks
from nbhelpers.generation import server
from nbhelpers.loading import load
from nbhelpers.loading.load import Loaded
from nbhelpers.records import LabError, Limits, ModelSpec, Scale, Settings
from nbhelpers.scoring import judge, reference

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
    return judge.probabilities(
        loaded, judge.QUESTION.format(prompt=PROMPT, text=TEXT), [*map(str, range(1, 11))]
    )


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


def test_ratings_of_any_scale_lose_what_longer_ones_begin_with() -> None:
    """p("1") = 0.3 and p("0") = 0.3 anywhere: from 0 to 100, "1" is not "10", and "10" not "100"."""
    loaded = fixed_judge({"1": 0.3, "0": 0.3})
    found = judge.probabilities(loaded, "How many?", [str(n) for n in range(101)])
    assert [found[n] for n in (0, 100, 10)] == pytest.approx([0.3, 0.027, 0.09 - 0.027], abs=1e-6)
    assert found[1] == pytest.approx(0.3 - 0.09 - 0.09, abs=1e-6)  # 11 and all that begins with 10


RUBRIC = "5 where every {figure} is right, 1 where none is."


def rubric_task(folder: Path) -> Settings:
    items = [{"id": "b01", "text": "Count to two.", "target": "one two"}]
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    given = f'prompts = "items.jsonl"\n[scorers.judge]\nmodel = "lab-gpt2"\nrubric = "{RUBRIC}"\n'
    (folder / "task.toml").write_text(f"{given}scale = [1, 5]\n")
    return Settings(task=str(folder / "task.toml"))


def test_a_judge_scores_a_task_by_the_users_rubric(tmp_path: Path, monkeypatch: Any) -> None:
    loads, asked, freed = [], [], []
    wishes, rate = {"4": 0.6, "5": 0.2}, judge.rate

    def load_fixed(spec: ModelSpec, *where: str) -> Loaded:
        loads.append(spec.alias)
        return fixed_judge(wishes, 1024)

    monkeypatch.setattr(load, "load", load_fixed)
    monkeypatch.setattr(load, "unload", freed.append)
    monkeypatch.setattr(judge, "rate", lambda *given: asked.append(given[1]) or rate(*given))
    settings = rubric_task(tmp_path)
    samples = [make_sample("m", "b01", repeat, text=f"one {repeat}") for repeat in range(2)]
    samples.append(make_sample("m", "b01", 2, error="failed"))
    scores = list(reference.scored(settings, samples))
    assert [score.values["judge"] for score in scores] == pytest.approx([4.25, 4.25, 1.0])
    assert loads == ["lab-gpt2"] and len(asked) == 2  # once loaded; what failed is not asked
    assert RUBRIC in asked[1] and "from 1 (worst) to 5 (best)" in asked[1]
    assert "Count to two.\n\nA right answer: one two\n\nAnswer:\none 1\n\n" in asked[1]
    assert tasks.load_task(settings.task).scale == Scale(1, 5, 4 / 18, unit="judge")
    # nonsense has no score, and says why
    wishes.update({"4": 0.01, "5": 0.01})
    (score,) = reference.scored(settings, samples[:1])
    assert (score.values, len(freed)) == ({}, 2)  # each scoring frees its own
    assert score.reason == "the judge lab-gpt2 gave no rating (2.0% of what it would say is one)"


@pytest.mark.parametrize(
    ("said", "rating"),
    [
        ("4", 4),
        (" **5**\n", 5),
        ("Rating: 3.", 3),
        ("<think>Is it a 5? No.</think>2", 2),
        ("6", None),
        ("4 or 5", None),
        ("-", None),
        ("I cannot rate 3 texts", None),
        ("", None),
    ],
)
def test_a_servers_judge_rates_by_what_it_says_and_nonsense_is_counted(
    tmp_path: Path, monkeypatch: Any, said: str, rating: float | None
) -> None:
    monkeypatch.setenv("NBHELPERS_SERVER_KEY", "secret-of-mine")
    settings = rubric_task(tmp_path)
    samples = [make_sample("m", "b01", repeat, text=f"one {repeat}") for repeat in range(2)]
    with serve(answer=lambda text, seed: [said], reason="stop", key="secret-of-mine") as tiny:
        text = (tmp_path / "task.toml").read_text()
        (tmp_path / "task.toml").write_text(text.replace("lab-gpt2", f"server:{tiny.url}#tiny"))
        reference.check_scorers(tasks.load_task(settings.task))
        tiny.faults = [Fault(429, {"Retry-After": "0"})]
        scores = list(reference.scored(settings, samples))
        asked = [body for body in tiny.requests if RUBRIC in str(body)]
    assert [body["temperature"] for body in asked] == [0, 0]
    for score in scores:
        assert score.values == ({} if rating is None else {"judge": rating})
        no = "the judge server:tiny gave no rating (0.0% of what it would say is one)"
        assert score.reason == (no if rating is None else None) and "secret" not in str(score)


def test_a_servers_judge_is_asked_as_many_at_a_time_as_allowed_and_the_order_is_kept(tmp_path: Path) -> None:
    settings, together = rubric_task(tmp_path), threading.Barrier(2)

    def answer(text: str, seed: int | None) -> list[str]:
        if RUBRIC in text and "one 5" not in text:  # the first is asked alone: it opens the judge
            together.wait(60)
        return [str(int(text.partition("Answer:\none ")[2][:1] or 0))]

    samples = [make_sample("m", "b01", repeat, text=f"one {5 - repeat}") for repeat in range(5)]
    with serve(answer=answer, reason="stop") as tiny:
        text = (tmp_path / "task.toml").read_text()
        (tmp_path / "task.toml").write_text(text.replace("lab-gpt2", f"server:{tiny.url}#tiny"))
        scores = list(reference.scored(settings, samples, Limits(at_once=2)))
    assert [score.values["judge"] for score in scores] == [5, 4, 3, 2, 1] and tiny.most == 2


@pytest.mark.parametrize("fault", [Fault(500), Fault(sent=1, then="drop"), Fault(sent=1, then='{"choi')])
def test_a_servers_judge_that_breaks_off_stops_the_scoring(tmp_path: Path, fault: Fault) -> None:
    with serve() as tiny:
        served = server.open_model(registry.resolve(f"server:{tiny.url}#tiny"))
        tiny.faults = [fault] * 3
        with pytest.raises(LabError, match=r"does not judge|not reachable"):
            judge.judge(served, PROMPT, TEXT)


def test_two_answers_are_put_to_a_servers_judge() -> None:
    with serve(answer=lambda text, seed: ["B"], reason="stop") as tiny:
        served = server.open_model(registry.resolve(f"server:{tiny.url}#tiny"))
        assert judge.probabilities(served, "Which?", ("A", "B")) == [0.0, 1.0]
        server.close(served)


def test_a_judge_that_cannot_judge_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    settings = rubric_task(tmp_path)
    reference.check_scorers(tasks.load_task(settings.task))
    text = (tmp_path / "task.toml").read_text()
    gone = "server:http://127.0.0.1:9/v1#m"
    for model, said in (("lab-gpt", "did you mean lab-gpt2"), (gone, "is not reachable")):
        (tmp_path / "task.toml").write_text(text.replace("lab-gpt2", model))
        with pytest.raises(LabError, match=said):
            reference.check_scorers(tasks.load_task(settings.task))
