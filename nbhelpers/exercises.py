"""Exercises that check themselves."""

from collections.abc import Callable
from contextlib import suppress
from numbers import Real
from typing import Any


def check(answer: Any, right: Any | Callable[[Any], bool], hint: str, within: float = 0.0) -> None:
    """Print whether an exercise is answered; ``...`` means that the reader has not tried yet.

    right: the value itself (of numbers: give or take ``within``), or a function that says whether an answer
    is right. Raises AssertionError with the hint where it is not.
    """
    if answer is ...:
        print("not answered yet")
        return
    passed = False
    if callable(right):
        with suppress(AttributeError, LookupError, TypeError, ValueError):  # an answer of another kind
            passed = right(answer)
    elif isinstance(right, int | float) and isinstance(answer, Real):
        passed = abs(float(answer) - right) <= within
    else:
        passed = answer == right
    assert passed, f"not yet. {hint}"
    print(f"right: {answer}")
