"""Speed: latency as one user meets it, and the throughput of a batch."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from nbhelpers.generation import generate
from nbhelpers.loading.load import Loaded
from nbhelpers.records import Limits, Prompt, Sample, Settings

WARM_UP_TOKENS = 8  # of a generation before the first timed one, in no row


def measure_latency(
    loaded: Loaded,
    prompts: Sequence[Prompt],
    settings: Settings,
    path: Path | None = None,
    limits: Limits = Limits(),
) -> list[Sample]:
    """Latency as one user meets it: the first prompts (at most 5), one at a time, after a warm-up.

    Every row gets as many new tokens (64, or max_new_tokens if that is less), end tokens or not, so that
    short answers are not called fast. The order is drawn from the seed, as machines slow down.
    """
    first = prompts[: generate.LATENCY_PROMPTS]
    warm_up = replace(settings, max_new_tokens=min(WARM_UP_TOKENS, settings.max_new_tokens))
    generate.generate_samples(loaded, first[:1], warm_up, batch_size=1, purpose="latency")
    shuffled = random.Random(settings.seed).sample(first, len(first))
    rows = generate.generate_samples(loaded, shuffled, settings, path, 1, limits, "latency")
    by_prompt = {row.prompt_id: row for row in rows}
    return [by_prompt[prompt.id] for prompt in first]


def throughput(samples: Iterable[Sample]) -> float:
    """New tokens per second of batched generation: all tokens / the machine's time that the rows took.

    The shares of a batch add up to its wall time. Failed rows bring no tokens; 0.0 when no row finished.
    """
    took = [(row.new_tokens, row.share_s or 0.0) for row in samples]
    seconds = sum(share_s for _, share_s in took)
    return sum(tokens for tokens, _ in took) / seconds if seconds > 0 else 0.0
