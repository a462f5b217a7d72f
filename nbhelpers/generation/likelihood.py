"""How likely a model finds given texts: multiple choice by log-likelihood, and bits per byte.

Tokens, what stands between a question and a choice, and the windows of a long text are those of
lm-evaluation-harness (``loglikelihood`` and ``loglikelihood_rolling``).
"""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from nbhelpers.loading import remote, tokenizer
from nbhelpers.records import LabError, ModelSpec, Prompt

if TYPE_CHECKING:
    from openai import OpenAI

    from nbhelpers.loading.load import Loaded

LOGITS_BYTES = 2**28  # of a batch
PLAIN = "log-likelihoods are of the prompt as plain text: its chat template cannot be asked so"
FIRST_ANSWER_S = 120.0  # a server may load the model before it answers
Pair = tuple[list[int], list[int]]  # ids, and those that follow


def log_likelihoods(loaded: Loaded, pairs: Sequence[Pair]) -> list[float]:
    """Log-probability of what follows, for each pair; one that is too long loses its beginning.

    What is read alike is read once. Shorter rows are padded on the right, which no place before it sees.
    """
    import torch

    most, found = (loaded.report.context or sys.maxsize) + 1, [0.0] * len(pairs)
    rows = [([*before, *after][-most:], min(len(after), most - 1)) for before, after in pairs]
    order = sorted(range(len(rows)), key=lambda n: len(rows[n][0]))  # those of a batch are about as long
    known = inspect.signature(loaded.model.forward).parameters
    while order:
        width = len(rows[order[-1]][0]) - 1  # the last token is not read
        size = max(1, LOGITS_BYTES // (4 * width * (loaded.report.vocabulary or 1)))
        order, batch = order[:-size], order[-size:]
        read = list(dict.fromkeys(tuple(rows[n][0][:-1]) for n in batch))
        keep = max(width + 1 - len(rows[n][0]) + rows[n][1] for n in batch)
        padded = [
            ([*row, *[0] * (width - len(row))], [1] * len(row) + [0] * (width - len(row))) for row in read
        ]
        ids, mask = (torch.tensor(side, device=loaded.device) for side in zip(*padded, strict=True))
        given = {"attention_mask": mask, "logits_to_keep": keep}
        with torch.inference_mode():
            out = loaded.model(input_ids=ids, **{n: value for n, value in given.items() if n in known})
            steps = out.logits[:, -keep:].float().log_softmax(-1)
        for n in batch:
            row, count = rows[n]
            said, end = torch.tensor(row[-count:], device=steps.device), keep - (width + 1 - len(row))
            step = steps[read.index(tuple(row[:-1]))]
            found[n] = sum(step[end - count : end].gather(1, said[:, None])[:, 0].tolist())
    return found


def choices(loaded: Loaded, prompt: Prompt) -> list[Pair]:
    """A pair for each choice: after a blank, unless the prompt ends in one or is a chat template's."""
    lead, gap = parted(tokenizer.written(loaded, prompt), loaded.spec.prompt_format)
    before, found = tokenizer.ids_of(loaded, lead), list[Pair]()
    for choice in prompt.choices:
        found.append((before, tokenizer.ids_of(loaded, f"{lead}{gap}{choice}")[len(before) :]))
        if not found[-1][1]:
            raise LabError(f"The choice {choice!r} of {prompt.id!r} has no token of its own: reword it.")
    return found


def parted(whole: str, prompt_format: str = "plain") -> tuple[str, str]:
    """A prompt without the blanks at its end, and what stands between it and a choice."""
    lead = whole.rstrip()
    return lead, whole[len(lead) :] or ("" if prompt_format == "chat" else " ")


def windows(loaded: Loaded, prompt: Prompt) -> list[Pair]:
    """The prompt's text after the beginning token, as pairs that each fill the context and tell new ids."""
    words, most = loaded.tokenizer, loaded.report.context or sys.maxsize
    ids = words(prompt.text, add_special_tokens=False, verbose=False)["input_ids"]
    first = words.eos_token_id if words.bos_token_id is None else words.bos_token_id
    whole, starts = [first or 0, *ids], range(0, len(ids), most)
    ends = [min(start + most, len(ids)) for start in starts]
    return [
        (whole[max(0, e - most) : s + 1], whole[s + 1 : e + 1]) for s, e in zip(starts, ends, strict=True)
    ]


def of_server(
    client: OpenAI, model: str, kinds: Sequence[str], limit_s: float, prompt: Prompt
) -> dict[str, tuple[float, ...]]:
    """``Sample.logprobs`` of a prompt as plain text, without those that the server does not tell.

    Raises what the client raises.
    """
    (lead, gap), found = parted(tokenizer.plain(prompt.text, prompt.before)), dict[str, tuple[float, ...]]()
    for kind in kinds:
        pairs = [("", prompt.text)] if kind == "text" else [(lead, gap + one) for one in prompt.choices]
        told = [_told(client, model, *pair, limit_s) for pair in pairs]
        known = tuple(one for one in told if one is not None)
        found |= {kind: known} if len(known) == len(pairs) else {}
    return found


def _told(client: OpenAI, model: str, lead: str, rest: str, limit_s: float) -> float | None:
    """Log-probability of what follows a lead, by a completion that echoes its prompt (echo and logprobs).

    None where the server tells none, or its tokens do not part the two. That of a text's first token is only
    told by servers that echo the beginning token before it.
    """
    remote.CLOCK.until, whole = time.perf_counter() + limit_s, lead + rest
    asked: Any = {"model": model, "max_tokens": 1, "temperature": 0, "timeout": limit_s}  # 0: as many as fit
    found = client.completions.create(**asked, prompt=whole, echo=True, logprobs=1).choices[0].logprobs
    if not (found and found.tokens and found.text_offset and found.token_logprobs):
        return None
    begun = 0 if whole.startswith(found.tokens[0]) else len(found.tokens[0])  # the beginning token is echoed
    each = [(n - begun, p) for n, p in zip(found.text_offset, found.token_logprobs, strict=False)]
    own = [p for start, p in each if len(lead) <= start < len(whole)]
    parts, known = len(lead) in (start for start, _ in each), [p for p in own if p is not None]
    return sum(known) if parts and len(known) == len(own) else None


def check_server(spec: ModelSpec, kinds: Sequence[str]) -> None:
    """LabError for a server that does not tell the log-likelihoods of "choices" or "text" as kinds ask."""
    import openai

    (address, _, model), tried = spec.source.partition("#"), Prompt("", "Once upon", choices=("a time",))
    refused: list[Any] = [openai.BadRequestError, openai.UnprocessableEntityError]
    refused.append(openai.InternalServerError)  # llama-cpp-python's without --logits_all
    for kind in kinds:
        found: Any = {}
        with remote.one_sentence(address, "tells no log-likelihood"), suppress(*refused):
            found = of_server(remote.client_of(address), model, (kind,), FIRST_ANSWER_S, tried)
        if not found:
            instead = "load the model here" + (", or take the scorer letter" if kind == "choices" else "")
            raise LabError(f"{spec.alias}: the log-likelihood of {kind} is not available there: {instead}.")


MAKERS = {"choices": choices, "text": windows}


def of_prompts(
    loaded: Loaded, prompts: Iterable[Prompt], kinds: Sequence[str]
) -> dict[Prompt, dict[str, tuple[float, ...]] | None]:
    """``Sample.logprobs`` of prompts as a task's scorers want them; None where they want none."""
    table: dict[Prompt, Any] = {prompt: {} if kinds else None for prompt in prompts}
    for kind in kinds:
        pairs = dict[Prompt, list[Pair]]()
        for prompt in table:
            with suppress(LabError):  # the row, or its score, will say so
                pairs[prompt] = MAKERS[kind](loaded, prompt)
        sums = iter(log_likelihoods(loaded, [pair for own in pairs.values() for pair in own]))
        for prompt, own in pairs.items():
            table[prompt][kind] = tuple(next(sums) for _ in own)
    return table
