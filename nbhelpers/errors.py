"""What goes wrong, by its kind, and the one exception whose sentence a user reads."""

import difflib
from collections.abc import Iterable, Mapping
from enum import StrEnum

from nbhelpers.redact import redacted


class Failure(StrEnum):
    """What kind of thing went wrong: what the report counts and what decides the exit code."""

    USAGE = "usage"  # a user's mistake
    REFUSED = "refused"  # by us: unsafe, gated, given up after failures in a row
    DOWNLOAD = "download"
    SERVER = "server"  # a model's: it refused, broke off, or cannot be reached
    OUT_OF_MEMORY = "out of memory"
    TIMEOUT = "timeout"
    DEAD_KERNEL = "dead kernel"
    BAD_OUTPUT = "bad output"  # NaN, or text that is none
    STOPPED = "stopped"  # by the user, or by --fail-on-error
    TRACKING = "tracking"  # MLflow's; the model has its result all the same
    OTHER = "other"


class LabError(Exception):
    """What the user can act on, in one sentence without secrets: what, where and what to do."""

    def __init__(self, sentence: str, kind: Failure = Failure.USAGE) -> None:
        super().__init__(redacted(sentence))
        self.kind = kind

    def _render_traceback_(self) -> list[str]:
        """What IPython shows: the sentence without a traceback, and the kind for the runner."""
        return [f"LabError: {self}", self.kind.value]


FAILURES = {  # by the names of exceptions: the libraries that define them need not be imported
    **dict.fromkeys(("TimeoutError", "CellTimeoutError", "APITimeoutError"), Failure.TIMEOUT),
    **dict.fromkeys(("MemoryError", "OutOfMemoryError"), Failure.OUT_OF_MEMORY),
    "DeadKernelError": Failure.DEAD_KERNEL,
    "UnicodeError": Failure.BAD_OUTPUT,
    "OpenAIError": Failure.SERVER,
}
ALLOCATION = ("out of memory", "not enough memory", "can't allocate memory")  # the last is Linux without room


def failure_of(error: Exception, kinds: Mapping[str, Failure] = FAILURES) -> Failure:
    """The kind of an exception by its type; where memory ran out on the CPU or on MPS, by torch's text."""
    if isinstance(error, LabError):
        return error.kind
    if isinstance(error, RuntimeError) and any(phrase in str(error).lower() for phrase in ALLOCATION):
        return Failure.OUT_OF_MEMORY
    names = (cls.__name__ for cls in type(error).__mro__)
    return next((kinds[name] for name in names if name in kinds), Failure.OTHER)


class NoScore(Exception):
    """Why an answer has no score: it is counted as missing, never as a zero."""


def some(number: int, things: str) -> str:
    """1 prompt, 2 prompts."""
    return f"{number} {things if number != 1 else things.removesuffix('s')}"


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint at the known name that is most like an unknown one, or at all of them."""
    close = difflib.get_close_matches(name.lower(), list(known), n=1)
    return f"did you mean {close[0]!r}" if close else f"known are {', '.join(known)}"
