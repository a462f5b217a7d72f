"""A model as judge: it rates a text from 1 to 10. Notebook 18 asks whether to listen; off by default.

The rating is the expected value over the probabilities of the ten answers (the weighting of G-Eval, Liu et
al. 2023), from one forward pass: nothing is sampled or parsed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from nbhelpers.errors import NoScore
from nbhelpers.generation import likelihood
from nbhelpers.loading import load
from nbhelpers.loading import tokenizer as chat
from nbhelpers.records import LabError, Prompt

if TYPE_CHECKING:
    from nbhelpers.loading.load import Loaded

LEAST_MASS = 0.1  # ours: below it at least nine tenths of what the model would say is no rating
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
RATINGS = tuple(map(str, range(1, 11)))
JUDGES: dict[str, Loaded] = {}  # of ``by_rubric``, each loaded once


class JudgeScore(NamedTuple):
    score: float | None  # on the scale; None where ``mass`` is too small
    expected: float | None  # mean rating given that there is one, however unlikely
    mass: float  # probability that the answer is a rating at all


def judge(loaded: Loaded, prompt: str, text: str, question: str = QUESTION) -> JudgeScore:
    """``rate`` a text by the question, from 1 to 10."""
    return rate(loaded, question.format(prompt=prompt, text=text))


def rate(loaded: Loaded, asked: str, low: int = 1, high: int = 10) -> JudgeScore:
    """A rating; no score where less than LEAST_MASS is on the scale or the question exceeds the context.

    LabError when the tokenizer cannot tell the ratings apart.
    """
    found = chances(loaded, asked, [*map(str, range(low, high + 1))])
    mass = sum(found)
    expected = sum(rating * p for rating, p in enumerate(found, low)) / mass if mass > 0 else None
    return JudgeScore(expected if mass >= LEAST_MASS else None, expected, mass)


def chances(loaded: Loaded, asked: str, known: Sequence[str]) -> list[float]:
    """Probability of each of the known answers to a question; [] where it exceeds the model's context.

    That of an answer is the product over all its tokens, as the tokenizer writes it after the question; that
    of "10" is taken off that of "1", which it begins with.
    """
    question, answers = _tokens(loaded, asked, known)
    starts = {answer[:-1] for answer in answers}  # what has to be read to know the next token
    rows = [row for row in starts if not any(row == other[: len(row)] for other in starts - {row})]
    width = max(map(len, rows))
    if len(question) + width >= (loaded.report.context or math.inf):
        return []
    steps = likelihood.next_tokens(loaded, [[*question, *row] for row in rows], width + 1).exp().cpu()
    found = list[float]()
    for answer in answers:
        read = next(i for i, row in enumerate(rows) if row[: len(answer) - 1] == answer[:-1])
        found.append(math.prod(float(steps[read, place, token]) for place, token in enumerate(answer)))
    for one in sorted(range(len(answers)), key=lambda n: -len(answers[n])):  # what goes on is taken off first
        begun = (n for n, ids in enumerate(answers) if n != one and ids[: len(answers[one])] == answers[one])
        found[one] -= sum(found[n] for n in begun)
    return found


def _tokens(loaded: Loaded, question: str, known: Sequence[str]) -> tuple[list[int], list[tuple[int, ...]]]:
    """Ids of the question, and of each of the known answers as they follow it."""
    tokenizer = loaded.tokenizer
    templated = loaded.spec.prompt_format == "chat" and getattr(tokenizer, "chat_template", None)
    lead, special = chat.render(tokenizer, question) if templated else f"{question}\n", not templated
    texts = [f"{lead}{answer}" for answer in known]
    whole = [tuple(tokenizer(t, add_special_tokens=special, verbose=False)["input_ids"]) for t in texts]
    shared = next((i for i, column in enumerate(zip(*whole, strict=False)) if len(set(column)) > 1), 0)
    answers = [ids[shared:] for ids in whole]
    if len(set(answers)) < len(known) or not all(answers):
        apart = f"cannot tell {known[0]} to {known[-1]} apart"
        raise LabError(f"The tokenizer of {loaded.spec.alias} {apart}: choose another judge.")
    return list(whole[0][:shared]), answers


def by_rubric(text: str, item: Prompt, options: Mapping[str, Any]) -> float:
    """The rating of an answer by the user's rubric, and a right answer where there is one. Raises NoScore."""
    model, (low, high) = options["model"], options["scale"]
    if model not in JUDGES:
        JUDGES[model] = load.load(model)
    right = f"\n\nA right answer: {' or '.join(item.target)}" if item.target else ""
    said = {"rubric": options["rubric"], "prompt": item.text + right, "text": text}
    found = rate(JUDGES[model], BY_RUBRIC.format(low=low, high=high, **said), low, high)
    if found.score is None:
        raise NoScore(f"the judge {model} gave no rating ({found.mass:.1%} of what it would say is one)")
    return found.score


def unload() -> None:
    """Free the judges of ``by_rubric``."""
    while JUDGES:
        load.unload(JUDGES.popitem()[1])
