"""A model's chat template is a stranger's program: sandboxed by transformers, limited here."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from nbhelpers.records import LabError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

LIMIT_S = 10.0
LONGEST_BYTES = 4 * 2**20
EXTRA_MEMORY_BYTES = 2**30


def render(tokenizer: Any, text: str, limit_s: float = LIMIT_S) -> str:
    """The text as the user's turn in the tokenizer's chat template, ready for the answer.

    On Linux in a forked child with limits on time, memory and length (fork is not safe on macOS and absent on
    Windows; there the runner's limit on a notebook remains). Raises LabError for a template that fails.
    """
    if sys.platform != "linux":
        return _apply(tokenizer, text)
    import multiprocessing

    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(theirs, tokenizer, text))
    child.start()
    theirs.close()
    try:
        if not ours.poll(limit_s):
            raise LabError(f"The chat template takes longer than {limit_s:.0f} s: choose another model.")
        said = ours.recv_bytes(LONGEST_BYTES)
    except (EOFError, OSError):  # it died, or the text is longer than allowed
        raise LabError(
            f"The chat template takes more than {EXTRA_MEMORY_BYTES >> 20} MiB of memory or makes more than "
            f"{LONGEST_BYTES >> 20} MiB of text: choose another model."
        ) from None
    finally:
        child.kill()
        child.join()
        ours.close()
    if not said.startswith(b"+"):
        raise LabError(f"The chat template fails ({said[1:].decode()}): choose another model.")
    return said[1:].decode("utf-8", "surrogatepass")


def _apply(tokenizer: Any, text: str) -> str:
    turns = [{"role": "user", "content": text}]
    return str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))


def _answer(pipe: Connection, tokenizer: Any, text: str) -> None:
    import resource

    import psutil

    most = psutil.Process().memory_info().vms + EXTRA_MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    try:
        pipe.send_bytes(b"+" + _apply(tokenizer, text).encode("utf-8", "surrogatepass"))
    except MemoryError:
        os._exit(1)
    except Exception as error:  # whatever a template can raise
        pipe.send_bytes(b"-" + f"{type(error).__name__}: {error}"[:200].encode("utf-8", "replace"))
