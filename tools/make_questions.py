"""Make data/tasks/questions.jsonl: the question bank as multiple choice, without a word written by hand.

A question's choices are the first sentence of its own answer and those of three other questions, drawn and
ordered with a seed. From the repository: python tools/make_questions.py
"""

from __future__ import annotations

import json
import random
import re
import tomllib
from pathlib import Path

DATA = Path(__file__).resolve().parents[1] / "data"
CHOICES, SEED = 4, 0


def first_sentence(text: str) -> str:
    """Up to the first stop that ends a sentence: a number or an abbreviation goes on in small letters."""
    return re.split(r"(?<=[.!?])\s+(?=[A-Z\"'`])", " ".join(text.split()), maxsplit=1)[0]


def items() -> list[dict[str, object]]:
    """The items, as the task's file has them."""
    bank = tomllib.loads((DATA / "questions.toml").read_text(encoding="utf-8"))["question"]
    first, draw, found = {q["id"]: first_sentence(q["answer"]) for q in bank}, random.Random(SEED), []
    for question in bank:
        own = first[question["id"]]
        choices = [own, *draw.sample(sorted({*first.values()} - {own}), CHOICES - 1)]
        draw.shuffle(choices)
        text = f"Question: {' '.join(question['question'].split())}\nAnswer:"
        item = {"id": question["id"], "text": text, "target": own, "choices": choices}
        found.append(item | {"tags": [question["topic"]]})
    return found


if __name__ == "__main__":
    lines = (json.dumps(item, ensure_ascii=False) + "\n" for item in items())
    (DATA / "tasks" / "questions.jsonl").write_text("".join(lines), encoding="utf-8")
