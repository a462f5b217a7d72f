"""Speed: latency as one user meets it, and the throughput of a batch."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from nbhelpers.generation import generate
from nbhelpers.loading.load import Loaded
from nbhelpers.records import Limits, ModelRun, Prompt, Sample, Settings

TOKENS = 64  # of each latency row
WARM_UP_TOKENS = 8  # of a generation before the first timed one, in no row


def measure_latency(
    loaded: Loaded,
    prompts: Sequence[Prompt],
    settings: Settings,
    path: Path | None = None,
    limits: Limits = Limits(),
) -> list[Sample]:
    """Latency as one user meets it: the first prompts (at most 5), one at a time, after a warm-up.

    Every row gets the same number of new tokens (64, or max_new_tokens if that is less) and end tokens are
    ignored, so that a model that writes short answers is not called fast. The order is drawn from the seed:
    a machine that slows down does not slow the same prompts in every run. Same schema as samples.
    """
    report = generate.report_of(loaded, prompts[: generate.LATENCY_PROMPTS], settings)
    wanted = generate.requests(prompts, settings, report, "latency")
    fixed = replace(settings, max_new_tokens=min(TOKENS, settings.max_new_tokens))
    if {request.key for request in wanted} - generate.finished(path).keys():
        warm_up = replace(fixed, max_new_tokens=min(WARM_UP_TOKENS, fixed.max_new_tokens))
        generate.complete(loaded, wanted[:1], warm_up, batch_size=1, stop=False)
    shuffled = random.Random(settings.seed).sample(wanted, len(wanted))
    rows = generate.complete(loaded, shuffled, fixed, path, 1, limits, stop=False)
    by_key = {row.key: row for row in rows}
    return [by_key[request.key] for request in wanted]


def read_latency(run: ModelRun) -> list[Sample]:
    """The latency rows of this run. Raises LabError where some are missing."""
    return generate.read_samples(run, "latency")


def throughput(samples: Iterable[Sample]) -> float:
    """New tokens per second of batched generation: all tokens / the machine's time that the rows took.

    The shares of a batch add up to its wall time. Failed rows bring no tokens; 0.0 when no row finished.
    """
    took = [(row.new_tokens, row.share_s or 0.0) for row in samples]
    seconds = sum(share_s for _, share_s in took)
    return sum(tokens for tokens, _ in took) / seconds if seconds > 0 else 0.0


def batch_variants(samples: Iterable[Sample], latency: Iterable[Sample]) -> tuple[int, int]:
    """How many texts differ between a full batch and batch 1, and how many were compared.

    The latency pass has the seeds of the first repeat and a shorter limit, and ignores end tokens: of the two
    texts one must begin with the other. Where both are the same batch, there is nothing to compare.
    """
    alone = {row.prompt_id: row for row in latency if row.error is None and row.repeat == 0}
    pairs = [
        (row.text, alone[row.prompt_id].text.rstrip("\ufffd"))  # a character cut in the middle
        for row in samples
        if row.error is None and row.repeat == 0 and row.batch_size > 1 and row.prompt_id in alone
        if row.prompt_tokens == alone[row.prompt_id].prompt_tokens
    ]
    return sum(not (a.startswith(b) or b.startswith(a)) for a, b in pairs), len(pairs)
