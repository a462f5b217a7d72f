"""A model as judge: it rates a text from 1 to 10. Notebook 04 asks whether to listen. Off by default.

The rating is the expected value over the probabilities of the ten answers (the weighting of G-Eval, Liu et
al. 2023), from one forward pass: nothing is sampled or parsed.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nbhelpers.loading import tokenizer as chat
from nbhelpers.records import LabError

if TYPE_CHECKING:
    from nbhelpers.loading.load import Loaded

LEAST_MASS = 0.1  # ours: below it at least nine tenths of what the model would say is no rating
QUESTION = """Rate the text below as an answer to its instruction, from 1 (worthless) to 10 (excellent).

Instruction: {prompt}

Text:
{text}

Answer with the number only. Rating:"""


@dataclass(frozen=True)
class JudgeScore:
    score: float | None  # 1 to 10; None with a reason
    expected: float | None  # mean rating given that there is one, however unlikely
    mass: float  # probability that the answer is a rating at all
    probabilities: tuple[float, ...] = ()  # of the answers 1 to 10
    reason: str | None = None


def judge(loaded: Loaded, prompt: str, text: str) -> JudgeScore:
    """Rate one text; no score where less than LEAST_MASS is on 1 to 10 or the text exceeds the context.

    The probability of an answer is that of all its tokens, as the tokenizer writes it after the question;
    that of "10" is taken off that of "1" where it begins so. LabError when the tokenizer cannot tell them
    apart.
    """
    import torch

    question, answers = _tokens(loaded, QUESTION.format(prompt=prompt, text=text))
    starts = {answer[:-1] for answer in answers}  # what has to be read to know the next token
    rows = [row for row in starts if not any(row == other[: len(row)] for other in starts - {row})]
    width, context = max(map(len, rows)), loaded.report.context
    if (needed := len(question) + width) >= context:
        return JudgeScore(None, None, 0.0, (), f"{needed} tokens do not fit in the context of {context}")
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
    if answers[9][: len(answers[0])] == answers[0]:
        found[0] -= found[9]
    mass = sum(found)
    expected = sum(rating * p for rating, p in enumerate(found, 1)) / mass if mass > 0 else None
    if mass >= LEAST_MASS:  # false for NaN too
        return JudgeScore(expected, expected, mass, tuple(found))
    return JudgeScore(None, expected, mass, tuple(found), f"{mass:.1%} of the probability is on a rating")


def _tokens(loaded: Loaded, question: str) -> tuple[list[int], list[tuple[int, ...]]]:
    """Ids of the question, and of each of the answers 1 to 10 as they follow it."""
    tokenizer = loaded.tokenizer
    templated = loaded.spec.prompt_format == "chat" and getattr(tokenizer, "chat_template", None)
    lead, special = chat.render(tokenizer, question) if templated else f"{question}\n", not templated
    texts = [f"{lead}{rating}" for rating in range(1, 11)]
    whole = [tuple(tokenizer(t, add_special_tokens=special, verbose=False)["input_ids"]) for t in texts]
    shared = next((i for i, column in enumerate(zip(*whole, strict=False)) if len(set(column)) > 1), 0)
    answers = [ids[shared:] for ids in whole]
    if len(set(answers)) < 10 or not all(answers):
        model = loaded.spec.alias
        raise LabError(f"The tokenizer of {model} cannot tell 1 to 10 apart: choose another judge.")
    return list(whole[0][:shared]), answers
