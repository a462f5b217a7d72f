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

from nbhelpers.loading import remote, tokenization
from nbhelpers.records import LabError, ModelSpec, Prompt

if TYPE_CHECKING:
    from openai import OpenAI
    from torch import Tensor

    from nbhelpers.loading.load import Loaded

LOGITS_BYTES = 2**28  # of a batch
PLAIN = "log-likelihoods are of the prompt as plain text: its chat template cannot be asked so"
FIRST_ANSWER_S = 120.0  # a server may load the model before it answers
Pair = tuple[list[int], list[int]]  # ids, and those that follow


def log_likelihoods(loaded: Loaded, pairs: Sequence[Pair]) -> list[float]:
    """Log-probability of what follows, for each pair; one that is too long loses its beginning."""
    import torch

    longest = (loaded.report.context or sys.maxsize) + 1  # the last token is not read
    rows = [[*before, *after][-longest:] for before, after in pairs]
    counts = [min(len(after), longest - 1) for _, after in pairs]
    sums = [0.0] * len(pairs)
    order = sorted(range(len(rows)), key=lambda n: len(rows[n]))  # those of a batch are about as long
    while order:
        width = len(rows[order[-1]]) - 1
        size = max(1, LOGITS_BYTES // (4 * width * (loaded.report.vocabulary or 1)))
        order, batch = order[:-size], order[-size:]
        padding = {n: width + 1 - len(rows[n]) for n in batch}
        inputs = list(dict.fromkeys(tuple(rows[n][:-1]) for n in batch))  # what is read alike is read once
        keep = max(padding[n] + counts[n] for n in batch)
        logprobs = _next_logprobs(loaded, inputs, width, keep)
        for n in batch:
            end = keep - padding[n]
            steps = logprobs[inputs.index(tuple(rows[n][:-1])), end - counts[n] : end]
            after = torch.tensor(rows[n][-counts[n] :], device=steps.device)
            sums[n] = sum(steps.gather(1, after[:, None])[:, 0].tolist())
    return sums


def _next_logprobs(loaded: Loaded, rows: Sequence[Sequence[int]], width: int, keep: int) -> Tensor:
    """[rows, keep, vocabulary]: of what follows the last ``keep`` places of rows, padded on the right."""
    import torch

    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=loaded.device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=loaded.device)
    takes = inspect.signature(loaded.model.forward).parameters
    options = {"attention_mask": mask, "logits_to_keep": keep}
    with torch.inference_mode():
        output = loaded.model(input_ids=ids, **{n: value for n, value in options.items() if n in takes})
        return output.logits[:, -keep:].float().log_softmax(-1)


def choices(loaded: Loaded, prompt: Prompt) -> list[Pair]:
    """A pair for each choice: after a blank, unless the prompt ends in one or is a chat template's."""
    lead, gap = parted(tokenization.written(loaded, prompt), loaded.spec.prompt_format)
    before = tokenization.ids_of(loaded, lead)
    pairs = list[Pair]()
    for choice in prompt.choices:
        after = tokenization.ids_of(loaded, f"{lead}{gap}{choice}")[len(before) :]
        if not after:
            raise LabError(f"The choice {choice!r} of {prompt.id!r} has no token of its own: reword it.")
        pairs.append((before, after))
    return pairs


def parted(text: str, prompt_format: str = "plain") -> tuple[str, str]:
    """A prompt without the blanks at its end, and what stands between it and a choice."""
    lead = text.rstrip()
    return lead, text[len(lead) :] or ("" if prompt_format == "chat" else " ")


def windows(loaded: Loaded, prompt: Prompt) -> list[Pair]:
    """The prompt's text after the beginning token, as pairs that fill the context; each id follows once."""
    encode, context = loaded.tokenizer, loaded.report.context or sys.maxsize
    text = encode(prompt.text, add_special_tokens=False, verbose=False)["input_ids"]
    begin = encode.eos_token_id if encode.bos_token_id is None else encode.bos_token_id
    ids = [begin or 0, *text]
    ends = [(start, min(start + context, len(text))) for start in range(0, len(text), context)]
    return [(ids[max(0, end - context) : start + 1], ids[start + 1 : end + 1]) for start, end in ends]


def of_server(
    client: OpenAI, model: str, kinds: Sequence[str], limit_s: float, prompt: Prompt
) -> dict[str, tuple[float, ...]]:
    """``Sample.logprobs`` of a prompt as plain text, of kinds the server reports; raises as the client."""
    lead, gap = parted(tokenization.plain(prompt.text, prompt.before))
    reported = dict[str, tuple[float, ...]]()
    for kind in kinds:
        pairs = [("", prompt.text)] if kind == "text" else [(lead, gap + choice) for choice in prompt.choices]
        sums = [_echoed(client, model, *pair, limit_s) for pair in pairs]
        known = tuple(logprob for logprob in sums if logprob is not None)
        if len(known) == len(pairs):
            reported[kind] = known
    return reported


def _echoed(client: OpenAI, model: str, before: str, after: str, limit_s: float) -> float | None:
    """Log-probability of what follows a text, by a completion that echoes its prompt (echo and logprobs).

    None where the server reports none, or where no token begins what follows. Of the first token of a prompt
    only servers that echo the beginning token before it report one.
    """
    remote.CLOCK.until = time.perf_counter() + limit_s
    # One token, as 0 would be as many as fit.
    request: Any = {"model": model, "max_tokens": 1, "temperature": 0, "timeout": limit_s}
    text = before + after
    echo = client.completions.create(**request, prompt=text, echo=True, logprobs=1).choices[0].logprobs
    if not (echo and echo.tokens and echo.text_offset and echo.token_logprobs):
        return None
    begin = "" if text.startswith(echo.tokens[0]) else echo.tokens[0]  # the beginning token is echoed
    tokens = [(n - len(begin), p) for n, p in zip(echo.text_offset, echo.token_logprobs, strict=False)]
    logprobs = [p for start, p in tokens if len(before) <= start < len(text)]
    known = [p for p in logprobs if p is not None]
    split = len(before) in (start for start, _ in tokens)
    return sum(known) if split and len(known) == len(logprobs) else None


def check_server(spec: ModelSpec, kinds: Sequence[str]) -> None:
    """LabError for a server that does not report the log-likelihoods of "choices" or "text" as kinds ask."""
    import openai

    address, _, model = spec.source.partition("#")
    trial = Prompt("", "Once upon", choices=("a time",))
    refusals: list[Any] = [openai.BadRequestError, openai.UnprocessableEntityError]
    refusals.append(openai.InternalServerError)  # llama-cpp-python's without --logits_all
    for kind in kinds:
        reported: Any = {}
        with remote.client_errors(address, "tells no log-likelihood"), suppress(*refusals):
            reported = of_server(remote.client_of(address), model, (kind,), FIRST_ANSWER_S, trial)
        if not reported:
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
        sums = iter(log_likelihoods(loaded, [pair for of_prompt in pairs.values() for pair in of_prompt]))
        for prompt, of_prompt in pairs.items():
            table[prompt][kind] = tuple(next(sums) for _ in of_prompt)
    return table
