"""A model as judge: it rates a text from 1 to 10. Notebook 18 asks whether to listen; off by default.

The rating is the expected value over the probabilities of the ten answers (the weighting of G-Eval, Liu et
al. 2023): nothing is sampled or parsed. A server's model writes its rating instead, at temperature 0.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from nbhelpers import registry
from nbhelpers.errors import NoScore
from nbhelpers.generation import likelihood, server
from nbhelpers.generation.server import Served
from nbhelpers.loading import remote
from nbhelpers.loading.load import Loaded
from nbhelpers.loading.tokenization import render, split_reasoning
from nbhelpers.records import LabError, Limits, Prompt, Settings

LEAST_MASS = 0.1  # ours: below it at least nine tenths of what the model would write is no rating
QUESTION = """Rate the text below as an answer to its instruction, from 1 (worthless) to 10 (excellent).

Instruction: {prompt}

Text:
{text}

Answer with the number only. Rating:"""
BY_RUBRIC = """Rate the answer below by this rubric, with a whole number from {low} (worst) to {high} (best).

Rubric: {rubric}

Question:
{prompt}

Answer:
{text}

Answer with the number only. Rating:"""
SERVER_SETTINGS = Settings(temperature=0, max_new_tokens=2048)  # the model may reason first
Judge = Loaded | Served


class JudgeScore(NamedTuple):
    score: float | None  # on the scale; None where ``mass`` is too small
    expected: float | None  # mean rating given that there is one, however unlikely
    mass: float  # probability that the answer is a rating at all


def judge(loaded: Judge, prompt: str, text: str, question: str = QUESTION) -> JudgeScore:
    """``rate`` a text by the question, from 1 to 10."""
    return rate(loaded, question.format(prompt=prompt, text=text))


def rate(loaded: Judge, question: str, low: int = 1, high: int = 10) -> JudgeScore:
    """A rating; no score where less than LEAST_MASS is on the scale or the question exceeds the context.

    LabError when the tokenizer cannot tell the ratings apart.
    """
    chances = probabilities(loaded, question, [*map(str, range(low, high + 1))])
    mass = sum(chances)
    expected = sum(rating * p for rating, p in enumerate(chances, low)) / mass if mass > 0 else None
    return JudgeScore(expected if mass >= LEAST_MASS else None, expected, mass)


def probabilities(loaded: Judge, question: str, answers: Sequence[str]) -> list[float]:
    """Probability of each of the answers to a question; [] where it exceeds the model's context.

    That of an answer is the product over all its tokens, as the tokenizer writes it after the question; that
    of "10" is taken off that of "1", which it begins with. A server's model has 1 for what it writes, else 0.
    """
    if isinstance(loaded, Served):
        written = _written(loaded, question)
        return [float(written == answer) for answer in answers]
    prompt, ids = _tokens(loaded, question, answers)
    if len(prompt) + max(map(len, ids)) > (loaded.report.context or math.inf):
        return []
    chances = [*map(math.exp, likelihood.log_likelihoods(loaded, [(prompt, [*answer]) for answer in ids]))]
    for i in sorted(range(len(ids)), key=lambda i: -len(ids[i])):  # the longest first
        longer = (j for j, other in enumerate(ids) if j != i and other[: len(ids[i])] == ids[i])
        chances[i] -= sum(chances[j] for j in longer)
    return chances


def _tokens(loaded: Loaded, question: str, answers: Sequence[str]) -> tuple[list[int], list[tuple[int, ...]]]:
    """Ids of the question, and of each of the answers as they follow it."""
    tokenizer = loaded.tokenizer
    templated = loaded.spec.prompt_format == "chat" and getattr(tokenizer, "chat_template", None)
    prompt = render(tokenizer, question) if templated else f"{question}\n"
    options = {"add_special_tokens": not templated, "verbose": False}
    rows = [tuple(tokenizer(f"{prompt}{answer}", **options)["input_ids"]) for answer in answers]
    shared = next((i for i, column in enumerate(zip(*rows, strict=False)) if len(set(column)) > 1), 0)
    endings = [ids[shared:] for ids in rows]
    if len(set(endings)) < len(answers) or not all(endings):
        raise LabError(f"{loaded.spec.alias} cannot tell {answers[0]} to {answers[-1]} apart: name another.")
    return list(rows[0][:shared]), endings


def _written(served: Served, question: str) -> str:
    """A server model's answer, without marks around it and "Rating:" before it. LabError for no answer."""
    with remote.client_errors(served.report.source.partition("#")[0], "does not judge"):
        answer = server.ask(served, question, SERVER_SETTINGS, 0, Limits().generation_s)
        if answer.finish_reason == "time":
            raise EOFError(f"no whole answer within {Limits().generation_s:g} s")
    return re.sub(r"^\W*(rating\W+)?|\W*$", "", split_reasoning(answer.text)[1], flags=re.IGNORECASE)


def by_rubric(text: str, item: Prompt, options: Mapping[str, Any]) -> float:
    """The rating of an answer by the user's rubric, and a right answer where there is one. Raises NoScore."""
    model, (low, high), judges = options["model"], options["scale"], options["judges"]
    if model not in judges:
        judges[model] = server.open_model(registry.resolve(model))
    right = f"\n\nA right answer: {' or '.join(item.target)}" if item.target else ""
    fields = {"rubric": options["rubric"], "prompt": item.text + right, "text": text}
    rating = rate(judges[model], BY_RUBRIC.format(low=low, high=high, **fields), low, high)
    if rating.score is None:
        alias = registry.resolve(model).alias
        raise NoScore(f"the judge {alias} gave no rating ({rating.mass:.1%} of what it would say is one)")
    return rating.score
