"""What failed: its kind, and when to stop trying."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Literal

STOPPED = "stopped by --fail-on-error"
GIVE_UP_AFTER = 3  # failures in a row
PAUSE_S = 1.0  # before a model that failed so often gets one more try
KINDS = {  # the first pattern found in an error decides
    "refused": rf"{STOPPED}|given up|never loads|never does|pickle|gated|is a link out of|skipped",
    "download": r"download of|Hub|arrived damaged",
    "out of memory": r"out of memory|not enough memory|can't allocate memory|MemoryError|GiB free",
    "timeout": r"(?i:timeout)|limit of [\d.]+ s|stopped by the runner after",
    "dead kernel": r"DeadKernelError|kernel stopped early|worker process died",
    "bad output": r"NaN|Unicode",
}


def kind(error: str) -> str:
    """The kind of a failure, read off its sentence: a key of KINDS, or "other"."""
    return next((name for name, pattern in KINDS.items() if re.search(pattern, error)), "other")


def stopped(failed: int, attempted: int, last: str | None) -> str:
    return f"{STOPPED}: {failed} of {attempted} samples failed, the last with {last}"


class GivenUp(Exception):
    """The error of a sample that was not tried, and what stops a batch that should admit nobody else."""


class Breaker:
    """A circuit breaker: closed, open after failures in a row, half-open for one trial after a pause.

    A trial that succeeds closes it; one that fails gives the model up.
    """

    def __init__(
        self, most: int = GIVE_UP_AFTER, pause_s: float = PAUSE_S, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self.most, self.pause_s, self.sleep = most, pause_s, sleep
        self.state: Literal["closed", "open", "half-open"] = "closed"
        self.in_a_row = 0
        self.given_up = False

    def record(self, passed: bool) -> None:
        self.in_a_row = 0 if passed else self.in_a_row + 1
        if passed:
            self.state = "closed"
        elif self.state == "half-open" or self.in_a_row >= self.most:
            self.given_up = self.state == "half-open"
            self.state = "open"

    def on_trial(self) -> bool:
        """Whether only one may be tried now; waits first where that is not allowed yet."""
        if self.state == "open":
            self.sleep(self.pause_s)
            self.state = "half-open"
        return self.state == "half-open"
