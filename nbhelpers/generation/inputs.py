"""From prompts to what a model is given: input ids, end tokens and the size of a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from nbhelpers.devices import device as devices
from nbhelpers.devices import fit
from nbhelpers.loading import tokenizer as chat
from nbhelpers.loading.load import Loaded
from nbhelpers.records import FailOnError, LabError, Limits, Prompt
from nbhelpers.runner import limits

BATCH_CAP = 128  # rows


def current_limits() -> Limits:
    """The limits of the environment."""
    now = limits.current()
    asked = now.fail_on_error
    policy = FailOnError(share=asked) if 0 < asked < 1 else FailOnError(count=int(asked) or None)
    return Limits(generation_s=now.batch_s, fail_on_error=policy)


def encode(loaded: Loaded, prompt: Prompt) -> list[int]:
    """The input ids of a prompt as written, or through the chat template if the model has one; never empty.

    Raises LabError for a prompt that gives no tokens and for a chat model without a template.
    """
    tokenizer, text = loaded.tokenizer, prompt.text
    templated = loaded.spec.prompt_format == "chat"
    if templated:
        text = _in_template(loaded, text)
    # A template brings its own special tokens. verbose: too long is our business, see prepare.
    ids = list(tokenizer(text, add_special_tokens=not templated, verbose=False)["input_ids"])
    if not ids and tokenizer.bos_token_id is None:
        raise LabError(f"prompt {prompt.id} has no token that this model's tokenizer knows: reword it.")
    return ids or [tokenizer.bos_token_id]


def end_tokens(loaded: Loaded) -> frozenset[int]:
    """The ids that end a text: from the generation settings, else the model, else the tokenizer; or none."""
    for source in (loaded.model.generation_config, loaded.model.config, loaded.tokenizer):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            return frozenset([ids] if isinstance(ids, int) else ids)
    return frozenset()


def best_batch_size(loaded: Loaded, jobs: Sequence[Any]) -> int:
    """As many rows as fit the free memory, at most 128, split evenly where there are more."""
    tokens, report = max(len(job.ids) + job.max_new_tokens for job in jobs), loaded.report
    one = fit.generation_need(loaded.spec, report.dtype, 1, tokens, report.vocabulary)
    most = min(BATCH_CAP, max(1, fit.rows_that_fit(one, devices.free_memory(loaded.device), loaded=True)))
    return math.ceil(len(jobs) / math.ceil(len(jobs) / most))


def _in_template(loaded: Loaded, text: str) -> str:
    if not getattr(loaded.tokenizer, "chat_template", None):
        raise LabError(
            f"{loaded.spec.alias} is registered with a chat prompt format, but its tokenizer has no chat "
            'template: set prompt = "plain" in data/models.toml.'
        )
    return chat.render(loaded.tokenizer, text)
