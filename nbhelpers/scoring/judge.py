"""A model as judge: it rates a text from 1 to 10. Notebook 04 asks whether to listen. Off by default.

The rating is the expected value over the probabilities of the ten answers (the weighting of G-Eval, Liu et
al. 2023), from one forward pass: nothing is sampled or parsed.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import TYPE_CHECKING

from nbhelpers.loading import tokenizer as chat
from nbhelpers.records import Estimate, LabError
from nbhelpers.stats.estimate import estimate, krippendorff

if TYPE_CHECKING:
    from nbhelpers.loading.load import Loaded

LEAST_MASS = 0.1  # ours: below it at least nine tenths of what the model would say is no rating
QUESTION = """Rate the text below as an answer to its instruction, from 1 (worthless) to 10 (excellent).

Instruction: {prompt}

Text:
{text}

Answer with the number only. Rating:"""
AGAIN = """Text:
{text}

It was written to this instruction: {prompt}

How good is it, from 1 (worthless) to 10 (excellent)? Answer with the number only. Rating:"""
PAIR = """Which text is the better answer to the instruction, A or B?

Instruction: {prompt}

Text A:
{first}

Text B:
{second}

Answer with the letter only. Better:"""
RATINGS = tuple(map(str, range(1, 11)))


@dataclass(frozen=True)
class JudgeScore:
    score: float | None  # 1 to 10; None with a reason
    expected: float | None  # mean rating given that there is one, however unlikely
    mass: float  # probability that the answer is a rating at all
    probabilities: tuple[float, ...] = ()  # of the answers 1 to 10
    reason: str | None = None


def judge(loaded: Loaded, prompt: str, text: str, question: str = QUESTION) -> JudgeScore:
    """Rate one text; no score where less than LEAST_MASS is on 1 to 10 or the text exceeds the context.

    LabError when the tokenizer cannot tell the ratings apart.
    """
    found = _chances(loaded, question.format(prompt=prompt, text=text), RATINGS)
    if isinstance(found, str):
        return JudgeScore(None, None, 0.0, (), found)
    mass = sum(found)
    expected = sum(rating * p for rating, p in enumerate(found, 1)) / mass if mass > 0 else None
    if mass >= LEAST_MASS:  # false for NaN too
        return JudgeScore(expected, expected, mass, tuple(found))
    return JudgeScore(None, expected, mass, tuple(found), f"{mass:.1%} of the probability is on a rating")


def prefer(loaded: Loaded, prompt: str, first: str, second: str) -> float | None:
    """The probability that the first of two texts is called the better one; None as in ``judge``."""
    found = _chances(loaded, PAIR.format(prompt=prompt, first=first, second=second), ("A", "B"))
    return None if isinstance(found, str) or not sum(found) >= LEAST_MASS else found[0] / sum(found)


@dataclass(frozen=True)
class Judge:
    """A judge as functions; each may refuse with None."""

    rate: Callable[[str, str], float | None]  # prompt, text -> 1 to 10
    again: Callable[[str, str], float | None]  # the same, asked in other words
    prefer: Callable[[str, str, str], float | None]  # prompt, first, second -> chance of the first


@dataclass(frozen=True)
class Case:
    """A text to probe a judge with."""

    prompt: str
    text: str
    own: bool = False  # written by the judge's own model
    reader: float | None = None  # a reader's rating, 1 to 10


@dataclass(frozen=True)
class Probes:
    """What a judge answers to besides the text, over prompts. Biases are 0 for a good judge."""

    position: Estimate  # how much likelier the first of two texts is preferred, over both orders: -1 to 1
    length: Estimate  # points that a text gains by being said twice
    own: Estimate  # points above the readers', on its own texts more than on others'
    retest: Estimate  # Krippendorff's alpha of its ratings, asked twice
    agreement: Estimate  # alpha with the readers


def judge_by(loaded: Loaded) -> Judge:
    """A loaded model as a judge."""
    return Judge(
        lambda prompt, text: judge(loaded, prompt, text).score,
        lambda prompt, text: judge(loaded, prompt, text, AGAIN).score,
        lambda prompt, first, second: prefer(loaded, prompt, first, second),
    )


def probe(by: Judge, cases: Sequence[Case]) -> Probes:
    """Probe a judge with texts, best several to a prompt; what it refuses counts in none of the figures."""
    rated = [by.rate(case.prompt, case.text) for case in cases]
    kinds: dict[str, dict[str, list[float]]] = {name: {} for name in ("position", "length", "own", "others")}
    for case, rating in zip(cases, rated, strict=True):
        twice = by.rate(case.prompt, f"{case.text}\n\n{case.text}")
        if rating is not None and twice is not None:
            kinds["length"].setdefault(case.prompt, []).append(twice - rating)
        if rating is not None and case.reader is not None:
            whose = kinds["own" if case.own else "others"]
            whose.setdefault(case.prompt, []).append(rating - case.reader)
    for one, other in combinations(cases, 2):
        if one.prompt == other.prompt:
            both = (by.prefer(one.prompt, *pair) for pair in ((one.text, other.text), (other.text, one.text)))
            chances = [chance for chance in both if chance is not None]
            if len(chances) == 2:
                kinds["position"].setdefault(one.prompt, []).append(sum(chances) - 1)
    means = {name: {prompt: fmean(values) for prompt, values in of.items()} for name, of in kinds.items()}
    favour = [means["own"][p] - means["others"][p] for p in means["own"].keys() & means["others"].keys()]
    again = [by.again(case.prompt, case.text) for case in cases]
    return Probes(
        estimate(means["position"].values(), "position"),
        estimate(means["length"].values(), "length"),
        estimate(favour, "own texts"),
        krippendorff(list(zip(rated, again, strict=True)), "asked twice"),
        krippendorff([(r, case.reader) for r, case in zip(rated, cases, strict=True)], "with readers"),
    )


def _chances(loaded: Loaded, asked: str, known: Sequence[str]) -> list[float] | str:
    """Probability of each of the known answers to a question, or why it cannot be asked.

    That of an answer is the product over all its tokens, as the tokenizer writes it after the question; that
    of "10" is taken off that of "1" where it begins so.
    """
    import torch

    question, answers = _tokens(loaded, asked, known)
    starts = {answer[:-1] for answer in answers}  # what has to be read to know the next token
    rows = [row for row in starts if not any(row == other[: len(row)] for other in starts - {row})]
    width, context = max(map(len, rows)), loaded.report.context
    if (needed := len(question) + width) >= context:
        return f"{needed} tokens do not fit in the context of {context}"
    ids = [[*question, *row, *[0] * (width - len(row))] for row in rows]  # padding on the right is never seen
    keeps = "logits_to_keep" in inspect.signature(loaded.model.forward).parameters
    extra = {"logits_to_keep": width + 1} if keeps else {}
    with torch.inference_mode():
        logits = loaded.model(input_ids=torch.tensor(ids, device=loaded.device), **extra).logits
    steps = logits[:, -width - 1 :].float().softmax(-1).cpu()
    found = []
    for answer in answers:
        read = next(i for i, row in enumerate(rows) if row[: len(answer) - 1] == answer[:-1])
        found.append(math.prod(float(steps[read, place, token]) for place, token in enumerate(answer)))
    if answers[-1][: len(answers[0])] == answers[0]:
        found[0] -= found[-1]
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
