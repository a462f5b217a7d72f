"""The size of a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from nbhelpers.devices import device as devices
from nbhelpers.devices import fit
from nbhelpers.loading.load import Loaded
from nbhelpers.records import FailOnError, Limits
from nbhelpers.runner import limits

BATCH_CAP = 128  # rows


def current_limits() -> Limits:
    """The limits of the environment."""
    now = limits.current()
    asked = now.fail_on_error
    policy = FailOnError(share=asked) if 0 < asked < 1 else FailOnError(count=int(asked) or None)
    return Limits(generation_s=now.batch_s, fail_on_error=policy)


def best_batch_size(loaded: Loaded, jobs: Sequence[Any]) -> int:
    """As many rows as fit the free memory, at most 128, split evenly where there are more."""
    tokens, report = max(len(job.ids) + job.max_new_tokens for job in jobs), loaded.report
    one = fit.generation_need(loaded.spec, report.dtype, 1, tokens, report.vocabulary)
    most = min(BATCH_CAP, max(1, fit.rows_that_fit(one, devices.free_memory(loaded.device), loaded=True)))
    return math.ceil(len(jobs) / math.ceil(len(jobs) / most))
