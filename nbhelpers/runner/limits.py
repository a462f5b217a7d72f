"""How long things may take and how much may fail: set by whoever starts a run, known to all its processes."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass

from nbhelpers.records import LabError

VARIABLE = "NBHELPERS_LIMITS"  # environment variable: Limits as JSON


@dataclass(frozen=True)
class Limits:
    """They decide how far a run comes and never what a text says, so they are no part of its settings."""

    cell_s: float = 1800.0  # one cell of a notebook
    model_s: float = 21_600.0  # all notebooks of one model
    batch_s: float = 300.0  # a generation, from its prefill on
    download_s: float = 1800.0  # fetching one model
    memory_wait_s: float = 0.0  # until enough memory is free to load a model
    fail_on_error: float = (
        0.0  # failed samples of a model that stop the run: a count, a share below 1, 0: never
    )

    def tolerated(self, samples: int) -> float:
        """Failed samples, of so many, that stop the run (inspect_ai's fail_on_error); inf: none do."""
        share = self.fail_on_error < 1
        return (self.fail_on_error * samples if share else self.fail_on_error) or math.inf

    def environment(self) -> dict[str, str]:
        """What tells a child process."""
        return {VARIABLE: json.dumps(dataclasses.asdict(self))}


def current() -> Limits:
    """The limits that this process was told; the defaults otherwise."""
    return Limits(**json.loads(os.environ.get(VARIABLE, "{}")))


def fail_on_error(said: str) -> float:
    """--fail-on-error as a number: true is the first failure, false none. Raises LabError."""
    try:
        number = {"true": 1.0, "false": 0.0}.get(said.lower()) if not said[:1].isdigit() else float(said)
    except ValueError:
        number = None
    if number is None or not math.isfinite(number):
        raise LabError(
            f"--fail-on-error is {said!r}: give true, false, a share such as 0.1 or a count such as 5."
        )
    return number
