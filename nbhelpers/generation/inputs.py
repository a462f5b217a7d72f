"""From prompts to what a model is given: keys, input ids, end tokens and the size of a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from nbhelpers import store
from nbhelpers.devices import device as devices
from nbhelpers.devices import fit
from nbhelpers.loading import tokenizer as chat
from nbhelpers.records import LabError, ModelSpec, Prompt, Settings

if TYPE_CHECKING:
    from nbhelpers.loading.load import Loaded

ENGINE = 2  # raise it when the same settings would give another text: older rows are then made again
BATCH_CAP = 128  # rows
Purpose = Literal["sample", "latency"]


@dataclass(frozen=True)
class Request:
    """One sample that is wanted; its key says whether a file already has it."""

    key: str
    prompt: Prompt
    repeat: int


@dataclass(frozen=True)
class Job:
    """A request ready for the model: its input ids, and how many tokens may follow them."""

    request: Request
    ids: tuple[int, ...]
    limit: int
    truncated: bool


def requests(
    prompts: Sequence[Prompt],
    settings: Settings,
    identity: dict[str, str],
    purpose: Purpose = "sample",
) -> list[Request]:
    """Every (prompt, repeat) in order, keyed by all that decides its text; latency takes no repeats.

    Raises LabError for settings that make no sense.
    """
    _check(settings)
    decides = {
        name: getattr(settings, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
    }
    fixed = {**identity, **decides, "engine": ENGINE, "purpose": purpose}
    return [
        Request(store.row_key(**fixed, prompt_id=p.id, prompt=p.text, repeat=repeat), p, repeat)
        for p in prompts
        for repeat in range(1 if purpose == "latency" else settings.repeats)
    ]


def identity(spec: ModelSpec, revision: str, device: str, dtype: str) -> dict[str, str]:
    """What about the model decides a text."""
    kind = device.split(":")[0]
    return {
        "model": spec.alias,
        "revision": revision,
        "format": spec.prompt_format,
        "device": kind,
        "dtype": dtype,
    }


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


def prepare(loaded: Loaded, request: Request, max_new_tokens: int) -> Job:
    """The prompt's ids, cut to fit the context. Raises LabError as encode does.

    The answer is promised max_new_tokens, but at most half of the context. A longer prompt keeps its last
    tokens, with the beginning token in front.
    """
    context, begin = loaded.report.context, loaded.tokenizer.bos_token_id
    ids = encode(loaded, request.prompt)
    room = max(context - max_new_tokens, context // 2, 1)
    truncated = len(ids) > room
    if truncated:
        ids = [begin, *ids[len(ids) - room + 1 :]] if ids[0] == begin and room > 1 else ids[-room:]
    return Job(request, tuple(ids), max(1, min(max_new_tokens, context - len(ids))), truncated)


def end_tokens(loaded: Loaded) -> frozenset[int]:
    """The ids that end a text: from the generation settings, else the model, else the tokenizer; or none."""
    for source in (loaded.model.generation_config, loaded.model.config, loaded.tokenizer):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            return frozenset([ids] if isinstance(ids, int) else ids)
    return frozenset()


def best_batch_size(loaded: Loaded, jobs: Sequence[Job]) -> int:
    """As many rows as fit the free memory, at most 128, split evenly where there are more."""
    tokens, report = max(len(job.ids) + job.limit for job in jobs), loaded.report
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


def _check(settings: Settings) -> None:
    if settings.repeats < 1 or settings.max_new_tokens < 1:
        raise LabError(
            f"repeats is {settings.repeats} and max_new_tokens is {settings.max_new_tokens}: "
            "both must be at least 1."
        )
    if not settings.temperature >= 0:
        raise LabError(f"temperature is {settings.temperature}: give 0 (greedy) or more.")
    if settings.top_k < 0 or not 0 < settings.top_p <= 1:
        raise LabError(
            f"top_k is {settings.top_k} and top_p is {settings.top_p}: "
            "top_k must be at least 0 (off), top_p above 0 and at most 1 (off)."
        )
