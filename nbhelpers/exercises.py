"""Exercises that check themselves."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any


def check(answer: Any, right: Any | Callable[[Any], bool], hint: str, within: float = 0.0) -> None:
    """Print whether an exercise is answered; ``...`` means that the reader has not tried yet.

    ``right`` is the value itself (numbers: up to ``within``) or a function that tells a right answer.
    Raises AssertionError with the hint when the answer is wrong.
    """
    if answer is ...:
        print("not answered yet")
        return
    if callable(right):
        good = right(answer)
    elif isinstance(right, int | float) and isinstance(answer, Real):
        good = abs(float(answer) - right) <= within
    else:
        good = answer == right
    assert good, f"not yet. {hint}"
    print(f"right: {answer}")
