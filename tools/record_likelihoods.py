"""Record what lm-evaluation-harness says of small items, which tests/generation/test_likelihood.py compares.

Needs lm_eval (extra ``bench``). The models are the tests' own: random, of four families, with one token a
byte. From the repository: python tools/record_likelihoods.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests"
FILE = TESTS / "generation" / "data" / "likelihoods.json"


def record(family: str) -> dict[str, list[list[float]] | list[float]]:
    """Log-likelihoods of the choices of each question, and of each text."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    sys.path[:0] = [str(TESTS), str(TESTS / "generation")]
    from test_likelihood import CONTEXT, QUESTIONS, TEXTS
    from tiny_models import build, byte_tokenizer

    model, words = build(family, CONTEXT), byte_tokenizer(begins=family != "gpt2")
    options = {"device": "cpu", "batch_size": 3, "max_length": CONTEXT}
    plain = HFLM(pretrained=model.eval(), tokenizer=words, **options)
    bare = HFLM(pretrained=model.eval(), tokenizer=words, add_bos_token=False, **options)

    def asked(kind: str, *said: str) -> Instance:
        return Instance(kind, {}, said, 0)

    found = []
    for text, choices in QUESTIONS:
        pairs = [asked("loglikelihood", text, f" {choice}") for choice in choices]
        found.append([total for total, _ in plain.loglikelihood(pairs, disable_tqdm=True)])
    texts = [asked("loglikelihood_rolling", text) for text in TEXTS]
    return {"choices": found, "texts": bare.loglikelihood_rolling(texts, disable_tqdm=True)}


if __name__ == "__main__":
    FILE.parent.mkdir(exist_ok=True)
    said = {family: record(family) for family in ("gpt2", "bloom", "opt", "llama")}
    FILE.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
