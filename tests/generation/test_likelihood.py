"""Log-likelihoods against token-by-token reading and against lm-evaluation-harness, and what they score.

data/likelihoods.json is what lm-evaluation-harness said, recorded by tools/record_likelihoods.py.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from made_runs import make_sample
from openai_server import Fault, serve
from tiny_models import FAMILIES, byte_tokenizer, tiny, watch

from nbhelpers import pipeline, registry, tasks
from nbhelpers.generation import generate, likelihood, server
from nbhelpers.loading import load, remote, tokenization
from nbhelpers.records import LabError, Prompt, Settings
from nbhelpers.runner import plan
from nbhelpers.scoring import reference
from tools import make_questions

CONTEXT = 64
QUESTIONS = [
    ("The sky is", ["blue", "green and old", "£ 5"]),
    ("Two and two:", ["4", "five", "4."]),
    ("A question that is longer than the context of these models, which has sixty-four places", ["a", "bcd"]),
]
TEXTS = ["A short text.", "Ships sail, and nobody measured it. " * 5, "x" * 64, "y" * 65]
RECORDED = json.loads((Path(__file__).parent / "data" / "likelihoods.json").read_text())


def loaded(family: str, **changes: Any):
    return tiny(family, CONTEXT, tokenizer=byte_tokenizer(begins=family != "gpt2"), **changes)


def prompt(text: str, choices: list[str] | tuple = (), **more: Any) -> Prompt:
    return Prompt(f"id {text}", text, choices=tuple(choices), **more)


def brute(model, pair: likelihood.Pair) -> float:
    """A forward pass a token, without batch, padding or shortcuts."""
    (before, after), total = pair, 0.0
    for place, token in enumerate(after):
        with torch.inference_mode():
            logits = model.model(torch.tensor([[*before, *after[:place]]])).logits[0, -1]
        total += float(logits.log_softmax(-1)[token])
    return total


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_says_what_reading_token_by_token_says(family: str, monkeypatch) -> None:
    model = loaded(family)
    pairs = [pair for text, known in QUESTIONS[:2] for pair in likelihood.choices(model, prompt(text, known))]
    want = [brute(model, pair) for pair in pairs]
    assert likelihood.log_likelihoods(model, pairs) == pytest.approx(want, abs=1e-4)
    monkeypatch.setattr(likelihood, "LOGITS_BYTES", 4 * 259 * 30 * 2)  # two rows of thirty tokens
    sizes = watch(model.model)
    assert likelihood.log_likelihoods(model, pairs) == pytest.approx(want, abs=1e-4)
    assert len(sizes) > 1 and sum(sizes) == len(pairs)


def test_a_long_sum_is_not_rounded_on_the_way() -> None:
    """Added up in float32, 2,000 summands lose up to a thousandth: more than the harness may differ."""
    logits = torch.rand(1, 2000, 3, generator=torch.manual_seed(0))

    class Planted:
        def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=logits)

        __call__ = forward

    model = replace(tiny("gpt2", 4096, tokenizer=byte_tokenizer(begins=False)), model=Planted())
    (found,) = likelihood.log_likelihoods(model, [([0], [1] * 2000)])
    assert found == pytest.approx(math.fsum(logits.log_softmax(-1)[0, :, 1].tolist()), abs=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_choices_and_texts_are_those_of_lm_evaluation_harness(family: str) -> None:
    model = loaded(family)
    for (text, known), want in zip(QUESTIONS, RECORDED[family]["choices"], strict=True):
        found = likelihood.log_likelihoods(model, likelihood.choices(model, prompt(text, known)))
        assert found == pytest.approx(want, abs=1e-4)
    for text, want in zip(TEXTS, RECORDED[family]["texts"], strict=True):
        pairs = likelihood.windows(model, prompt(text))
        assert sum(map(len, (after for _, after in pairs))) == len(text)
        assert sum(likelihood.log_likelihoods(model, pairs)) == pytest.approx(want, abs=1e-4)


def test_the_harness_agrees_today() -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed (extra bench)")
    from tools import record_likelihoods

    found = record_likelihoods.record("llama")
    assert found["texts"] == pytest.approx(RECORDED["llama"]["texts"], abs=1e-4)
    for one, other in zip(found["choices"], RECORDED["llama"]["choices"], strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_what_stands_between_a_question_and_a_choice(monkeypatch) -> None:
    model = loaded("gpt2")
    for text, lead, gap in (("Sky:", "Sky:", " "), ("Sky: ", "Sky:", " "), ("Sky:\n", "Sky:", "\n")):
        ((before, after),) = likelihood.choices(model, prompt(text, ["blue"]))
        assert model.tokenizer.decode(before) == lead and model.tokenizer.decode(after) == f"{gap}blue"
    words = byte_tokenizer(begins=False)
    words.chat_template = "{% for m in messages %}{{ m.role }}> {{ m.content }}\n{% endfor %}assistant> "
    chat = tiny("gpt2", 256, prompt_format="chat", tokenizer=words)
    ((before, after),) = likelihood.choices(chat, prompt("Sky?", ["blue"], before=(("system", "Be brief."),)))
    assert chat.tokenizer.decode(before) == "system> Be brief.\nuser> Sky?\nassistant>"
    assert chat.tokenizer.decode(after) == " blue"
    monkeypatch.setattr(tokenization, "ids_of", lambda loaded, text: [1])  # letters that it does not know
    with pytest.raises(LabError, match="The choice 'blue' of 'id Sky:' has no token of its own"):
        likelihood.choices(model, prompt("Sky:", ["blue"]))


def task(folder: Path, scorer: str, rows: list[dict[str, Any]], more: str = "") -> Settings:
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "task.toml").write_text(f'prompts = "items.jsonl"\n{more}\n[scorers.{scorer}]\n')
    return Settings(task=str(folder / "task.toml"), repeats=2, max_new_tokens=4)


ROWS = [
    {"id": text, "text": text, "choices": known, "target": known[place]}
    for place, (text, known) in enumerate(QUESTIONS[:2])
]


def test_a_run_of_a_multiple_choice_task_scores_by_log_likelihood(tmp_path: Path) -> None:
    settings, model = task(tmp_path, "loglikelihood", ROWS), loaded("llama")
    asked, file = tasks.prompts_of(settings), tmp_path / "samples.jsonl"
    samples = generate.generate_samples(model, asked, settings, file)
    scores = list(reference.scored(settings, samples))
    for sample, score in zip(samples, scores, strict=True):
        item = next(item for item in tasks.items(settings) if item.id == sample.prompt_id)
        want = [brute(model, pair) for pair in likelihood.choices(model, item)]
        assert sample.logprobs == {"choices": pytest.approx(want, abs=1e-4)}
        per_byte = [total / len(choice.encode()) for total, choice in zip(want, item.choices, strict=True)]
        right = item.choices.index(item.target[0])
        acc, acc_bytes = (float(sums.index(max(sums)) == right) for sums in (want, per_byte))
        assert score.values == {"loglikelihood": acc, "loglikelihood/per_byte": acc_bytes}
    # nothing is made twice, and other choices are other rows, though the prompt is the same
    assert generate.generate_samples(model, asked, settings, file) == samples
    ROWS[0]["choices"].append("red")
    other = task(tmp_path, "loglikelihood", ROWS)
    again = generate.generate_samples(model, tasks.prompts_of(other), other, file)
    ROWS[0]["choices"].pop()
    new = [sample.key not in {row.key for row in samples} for sample in again]
    assert new == [True, True, False, False] and len(again[0].logprobs["choices"]) == 4


def test_bits_per_byte_of_texts_are_those_of_the_harness_and_less_is_better(tmp_path: Path) -> None:
    rows = [{"id": f"t{n}", "text": text} for n, text in enumerate(TEXTS)]
    settings, model = task(tmp_path, "bits_per_byte", rows), loaded("opt")
    samples = generate.generate_samples(model, tasks.prompts_of(settings), settings)
    found = [score.values["bits_per_byte"] for score in reference.scored(settings, samples)][::2]
    want = zip(RECORDED["opt"]["texts"], TEXTS, strict=True)
    assert found == pytest.approx([-s / math.log(2) / len(text) for s, text in want], abs=1e-4)
    assert not tasks.load_task(settings.task).scale.higher_is_better


def test_without_log_likelihoods_there_is_no_score(tmp_path: Path) -> None:
    settings = task(tmp_path, "loglikelihood", ROWS)
    (score,) = reference.scored(settings, [make_sample("m", "The sky is", 0, text="blue")])
    assert score.values == {} and score.reason == "the log-likelihood of its choices is not available"
    # a text that is tried out alone stands for the choice that it is
    item, known = tasks.items(settings)[0], tasks.load_task(settings.task)
    assert set(reference.scores_of(known, item, "Blue.")[0].values()) == {1.0}
    assert set(reference.scores_of(known, item, "green and old")[0].values()) == {0.0}


def echo(model: Any, begins: bool, prompt: str) -> dict[str, Any]:
    """Log-probabilities of a prompt and one token more: vLLM echoes the beginning token, llama.cpp does not
    and tells none of the first."""
    read = model.tokenizer(prompt, return_offsets_mapping=True)
    ids, spans = [*read["input_ids"], 2], read["offset_mapping"]
    with torch.inference_mode():
        steps = model.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    logprobs = [None, *(float(steps[n, token]) for n, token in enumerate(ids[1:]))]
    tokens, starts = [prompt[a:b] for a, b in spans] + ["</s>"], [a for a, _ in spans] + [len(prompt)]
    if not begins:
        logprobs[1] = None
        return {"tokens": tokens[1:], "text_offset": starts[1:], "token_logprobs": logprobs[1:]}
    starts[1:] = [start + len("<s>") for start in starts[1:]]
    return {"tokens": ["<s>", *tokens[1:]], "text_offset": starts, "token_logprobs": logprobs}


@pytest.mark.parametrize("begins", [True, False], ids=["vLLM", "llama.cpp"])
def test_a_server_tells_the_log_likelihoods_that_the_model_has_here(tmp_path: Path, begins: bool) -> None:
    model, shown = load.load("lab-llama", "cpu", "float32"), {"before": (("system", "Be brief."),)}
    asked = [prompt(text, known, **shown) for text, known in QUESTIONS[:2]]
    asked += [prompt("Café costs:\n", ["4.", "so naïve"]), prompt("Café au lait, and nobody measured it.")]
    with serve(echo=lambda text: echo(model, begins, text)) as tiny:
        client = remote.client_of(tiny.url)
        for one in asked[:3]:
            found = likelihood.of_server(client, "tiny", ("choices",), 10, one)
            want = likelihood.log_likelihoods(model, likelihood.choices(model, one))
            assert found["choices"] == pytest.approx(want, abs=1e-4)
        found = likelihood.of_server(client, "tiny", ("text",), 10, asked[3])
        want = likelihood.log_likelihoods(model, likelihood.windows(model, asked[3]))
        assert found == ({"text": pytest.approx([sum(want)], abs=1e-4)} if begins else {})
        # a run asks once a prompt, whatever its repeats, and scores as one of the model here
        settings, asked_before = task(tmp_path, "loglikelihood", ROWS), len(tiny.requests)
        plan.plan_run([f"server:{tiny.url}#tiny"], settings, str(tmp_path / "run"))
        run = pipeline.open_run(replace(settings, run_dir=str(tmp_path), model=f"server:{tiny.url}#tiny"))
        pipeline.make(run, "samples")
        bodies = [body for body in tiny.requests[asked_before:] if body.get("echo")]
    assert len(bodies) == 1 + sum(len(row["choices"]) for row in ROWS)  # 1: of the plan
    samples = generate.read_samples(run)
    ours = generate.generate_samples(model, tasks.prompts_of(settings), settings)
    for one, other in zip(samples, ours, strict=True):
        assert one.logprobs["choices"] == pytest.approx(other.logprobs["choices"], abs=1e-4)
    values = [[score.values for score in reference.scored(settings, rows)] for rows in (samples, ours)]
    assert values[0] == values[1]
    assert likelihood.PLAIN in load.read_report(run).notes


@pytest.mark.parametrize("given", [{}, {"refused": ("echo",)}, {"faults": [Fault(500)] * 3}])
def test_a_server_that_tells_no_log_likelihood_is_refused_before_anything_is_made(
    tmp_path: Path, given: dict[str, Any]
) -> None:
    settings, out = task(tmp_path, "loglikelihood", ROWS), tmp_path / "run"
    said = "server:tiny: the log-likelihood of choices is not available there: load the model here, or take"
    with serve(**given) as tiny, pytest.raises(LabError, match=said):
        plan.plan_run([f"server:{tiny.url}#tiny"], settings, str(out))
    assert not out.exists()


def test_a_row_whose_log_likelihood_broke_off_is_asked_again(tmp_path: Path) -> None:
    settings, model = replace(task(tmp_path, "loglikelihood", ROWS), repeats=1), loaded("llama")
    with serve(echo=lambda text: echo(model, True, text)) as tiny:
        served = server.connect(registry.resolve(f"server:{tiny.url}#tiny"))
        asked, file = tasks.prompts_of(settings), tmp_path / "samples.jsonl"
        tiny.faults = [Fault(500)] * 3  # the first choice of the first item, and its retries
        first = generate.generate_samples(served, asked, settings, file, batch_size=1)
        assert [(row.failure, row.logprobs is None) for row in first] == [("server", True), (None, False)]
        second = generate.generate_samples(served, asked, settings, file)
    assert second[1] == first[1] and len(second[0].logprobs["choices"]) == 3


def test_the_shipped_questions_are_made_of_the_question_bank() -> None:
    items = tasks.items(Settings(task="questions"))
    kept = [{"id": i.id, "text": i.text, "target": i.target[0], "choices": [*i.choices]} for i in items]
    assert [row | {"tags": [*i.tags]} for row, i in zip(kept, items, strict=True)] == make_questions.items()
    assert len(items) == 71 and {len(set(item.choices)) for item in items} == {4}
    places = [item.choices.index(item.target[0]) for item in items]
    assert all(10 <= places.count(place) <= 25 for place in range(4))
    assert tasks.load_task("questions").primary == "loglikelihood/per_byte"


def test_a_prompt_is_written_as_it_is_generated_from() -> None:
    model = loaded("llama")
    ids = tokenization.encode(model, prompt("Sky:", ["x"]))
    assert likelihood.choices(model, prompt("Sky:", ["x"]))[0][0] == ids
