"""A model's tokenizer: its pad token, its chat template, the tokens that end a text.

A chat template is a stranger's program: transformers runs it in a sandbox, and here it gets limits.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from nbhelpers.loading import folder as folders
from nbhelpers.records import Failure, LabError, Prompt

TIMEOUT_S = 10.0  # of a chat template
LONGEST_BYTES = 4 * 2**20
EXTRA_MEMORY_BYTES = 2**30


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder, padding on the left, with a pad token."""
    from transformers import AutoTokenizer

    safe = {"local_files_only": True, "trust_remote_code": False}
    return with_padding(AutoTokenizer.from_pretrained(folder, padding_side="left", **safe))


def with_padding(tokenizer: Any) -> Any:
    """Give a tokenizer without a pad token its end token, else its unknown token, else token 0.

    Padded positions are masked, so any token serves; a new one would need a row that the model lacks.
    """
    if tokenizer.pad_token_id is None:
        spare = (tokenizer.eos_token, tokenizer.unk_token, tokenizer.convert_ids_to_tokens(0))
        tokenizer.pad_token = next(token for token in spare if token is not None)
    return tokenizer


def encode(loaded: Any, prompt: Prompt) -> list[int]:
    """The input ids of a prompt as written, or in the chat template of a loaded chat model; never empty.

    Raises LabError for a prompt that gives no tokens and for a chat model without a template.
    """
    tokenizer, text, chat = loaded.tokenizer, prompt.text, loaded.spec.prompt_format == "chat"
    if chat and not getattr(tokenizer, "chat_template", None):
        raise folders.refusal(loaded.spec.alias, 'has no chat template: register it with prompt = "plain".')
    text = render(tokenizer, text) if chat else text  # a template brings its own special tokens
    # verbose warns of a long prompt, which is cut afterwards.
    ids = list(tokenizer(text, add_special_tokens=not chat, verbose=False)["input_ids"])
    if not ids and tokenizer.bos_token_id is None:
        raise LabError(f"The prompt {prompt.id!r} has no token that the model's tokenizer knows: reword it.")
    return ids or [tokenizer.bos_token_id]


def end_tokens(loaded: Any) -> frozenset[int]:
    """The ids that end a text: from the generation settings, else the model, else the tokenizer; or none."""
    for source in (loaded.model.generation_config, loaded.model.config, loaded.tokenizer):
        if (ids := getattr(source, "eos_token_id", None)) is not None:
            return frozenset([ids] if isinstance(ids, int) else ids)
    return frozenset()


def render(tokenizer: Any, text: str, timeout_s: float = TIMEOUT_S) -> str:
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
    why, kind = f"takes longer than {timeout_s:.0f} s", Failure.TIMEOUT
    try:
        if ours.poll(timeout_s):
            rendered, answer = ours.recv()
            if rendered:
                return answer
            why, kind = f"fails ({answer})", Failure.USAGE
    except EOFError:  # it died
        memory, length = EXTRA_MEMORY_BYTES >> 20, LONGEST_BYTES >> 20
        why, kind = f"takes more than {memory} MiB of memory or {length} MiB of text", Failure.REFUSED
    finally:
        child.kill()
        child.join()
        ours.close()
    raise LabError(f"The chat template {why}: choose another model.", kind)


def _apply(tokenizer: Any, text: str) -> str:
    turns = [{"role": "user", "content": text}]
    return str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))


def _answer(pipe: Any, tokenizer: Any, text: str) -> None:
    """In the child: send True and the text, or False and what went wrong; or die of a text too large."""
    import resource

    import psutil

    most = psutil.Process().memory_info().vms + EXTRA_MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    try:
        answer = True, _apply(tokenizer, text)
    except MemoryError:
        os._exit(1)
    except Exception as error:  # whatever a template can raise
        answer = False, f"{type(error).__name__}: {error}"[:200]
    if len(answer[1]) <= LONGEST_BYTES:
        pipe.send(answer)
