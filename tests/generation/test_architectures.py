"""Every causal architecture that the installed transformers can build small: token-exact, or refused.

The default run takes a sample of them; `make sweep` takes all and writes a table of what serves each.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from architectures import KINDS, build

from nbhelpers.generation import decode, sampling
from nbhelpers.records import LabError

TABLE = os.environ.get("NBHELPERS_SWEEP")  # a file: take all of them
# One of each way to be served or refused, and every sixteenth of the rest.
SAMPLE = sorted(
    {"openai-gpt", "bart", "bert", "rwkv", "mpt", "phi3", "xlm", "cpmant", *KINDS[::16]} & {*KINDS}
)
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16], [20], [5, 6, 7]]
TOKENS = 8


def verdict(kind: str) -> tuple[str, str]:
    """What serves an architecture, and what came of it."""
    model, why = build(kind)
    if model is None:
        return "not built", why
    try:
        engine = decode.engine_for(model)
    except LabError as error:
        return "refused", str(error)
    rows = decode.decode_all(model, PROMPTS, [TOKENS] * 4, sampling.sampler([0] * 4, 0.0), slots=3)
    with torch.inference_mode():
        for prompt, row in zip(PROMPTS, rows, strict=True):
            text = list(prompt)
            for _ in range(TOKENS):
                text.append(int(model(input_ids=torch.tensor([text])).logits[0, -1].argmax()))
            if list(row.tokens) != text[len(prompt) :]:
                return engine, f"differs after {prompt}: {list(row.tokens)}, not {text[len(prompt) :]}"
    return engine, "exact"


@pytest.mark.parametrize("kind", KINDS if TABLE else SAMPLE)
def test_an_architecture_is_exact_or_refused_in_one_sentence(kind: str) -> None:
    served, result = verdict(kind)
    if TABLE:
        with Path(TABLE).open("a", encoding="utf-8") as table:
            table.write(f"{kind:28} {served:10} {result}\n")
    if served == "not built":
        pytest.skip(result)
    assert result == "exact" or (served == "refused" and "\n" not in result), (served, result)
