"""Speed: latency as one user meets it, a batch's throughput, and the dtype that suits a model here.

Half the bytes are no promise of speed: a processor without instructions for a format imitates it, and one
may be fast at a matrix times a vector and slow at a product of matrices. So each dtype is tried.
"""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from nbhelpers import registry, store
from nbhelpers.devices import device as devices
from nbhelpers.devices import fit
from nbhelpers.devices.device import DeviceReport, DtypeTrial
from nbhelpers.generation import generate
from nbhelpers.loading import load as loading
from nbhelpers.loading.folder import describe
from nbhelpers.loading.load import Loaded
from nbhelpers.records import Limits, ModelRun, ModelSpec, Prompt, Sample, Settings

if TYPE_CHECKING:
    from torch import Tensor

TOKENS = 64  # of each latency row
WARM_UPS, WARM_UP_TOKENS = 1, 8  # generations before the first timed one, in no row
SMALLEST = 50_000_000  # parameters: below, a run takes less time than trying dtypes
SECONDS = 0.5  # of decoding, for each dtype
ROWS, PROMPT_TOKENS = 16, 16  # the batch that is timed
HELD_OUT_TOKENS = 128  # for the perplexity


def measure_latency(
    loaded: Loaded,
    prompts: Sequence[Prompt],
    settings: Settings,
    path: Path | None = None,
    limits: Limits = Limits(),
) -> list[Sample]:
    """Latency as one user meets it: the first prompts (at most 5), one at a time, after a warm-up.

    Every row gets the same number of new tokens (64, or max_new_tokens if that is less) and end tokens are
    ignored, so that a model that writes short answers is not called fast. The prompts are run in an order
    drawn from the seed, so that a machine that slows down does not slow the same prompts in every run, and
    returned in their own. Same schema as samples.
    """
    wanted = generate.requests(prompts, settings, loaded.report, "latency")
    fixed = replace(settings, max_new_tokens=min(TOKENS, settings.max_new_tokens))
    have = generate.finished(path)
    if any(request.key not in have for request in wanted):
        warm_up = replace(fixed, max_new_tokens=min(WARM_UP_TOKENS, fixed.max_new_tokens))
        generate.complete(loaded, wanted[:1] * WARM_UPS, warm_up, batch_size=1, stop=False)
    shuffled = random.Random(settings.seed).sample(wanted, len(wanted))
    rows = generate.complete(loaded, shuffled, fixed, path, 1, limits, stop=False, warm_ups=WARM_UPS)
    places = {request.key: place for place, request in enumerate(wanted)}
    return sorted(rows, key=lambda row: places[row.key])


def read_latency(run: ModelRun) -> store.Rows[Sample]:
    """The latency rows of this run. Raises LabError where some are missing."""
    return generate.read_samples(run, "latency")


def throughput(samples: Iterable[Sample]) -> float:
    """New tokens per second of batched generation: all tokens / the machine's time that the rows took.

    The shares of the rows of a batch add up to its wall time. Failed rows bring no tokens; 0.0 when no row
    finished.
    """
    tokens, seconds = 0, 0.0
    for row in samples:
        tokens += row.new_tokens
        seconds += row.share_s or 0.0
    return tokens / seconds if seconds > 0 else 0.0


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


def choose_dtype(report: DeviceReport, settings: Settings, spec: ModelSpec) -> DeviceReport:
    """The report with the dtype that suits the run's model, and why; tried once for each model and run.

    A dtype asked for stays, as does that of a model below 50 million parameters or whose float32 weights,
    the reference, do not fit.
    """
    path = store.run_dir(settings) / spec.slug / "device.json"
    old = store.read_json(path, DeviceReport) if path.exists() else report
    trials = old.dtype_trials if old.device == report.device else ()
    if report.dtype_asked:
        return devices.with_trials(report, trials)
    if spec.parameters is None:
        spec = describe(spec, loading.fetch(spec))
    if (spec.parameters or 0) < SMALLEST:
        return _unmeasured(report, f"below {SMALLEST / 1e6:.0f} million parameters")
    if not trials or trials[0].revision != loading.revision_of(spec):
        needs = {dtype: fit.generation_need(spec, dtype, ROWS, HELD_OUT_TOKENS) for dtype in report.dtypes}
        fits = [dtype for dtype, need in needs.items() if fit.fits(need, report.memory_free_bytes)]
        if "float32" not in fits:
            return _unmeasured(report, "float32, the reference, does not fit")
        trials = probe(spec, report.device, fits)
    return devices.with_trials(report, trials)


def _unmeasured(report: DeviceReport, why: str) -> DeviceReport:
    return replace(report, dtype_reason=f"{report.dtype_reason}; not measured: {why}")


def probe(spec: ModelSpec, device: str, dtypes: Sequence[str]) -> tuple[DtypeTrial, ...]:
    """Load the model in each dtype, time a batch and, unless it is slower than the first, see its perplexity.

    The first dtype is the reference. Raises LabError as loading.load does.
    """
    trials: list[DtypeTrial] = []
    for dtype in dtypes:
        loaded = loading.load(spec, device, dtype)
        try:
            speed = batch_speed(loaded)
            base = trials[0].tokens_per_s if trials else speed
            surprise = perplexity(loaded, held_out(loaded)) if speed >= base else None
        finally:
            loading.unload(loaded)
        reference = trials[0].perplexity if trials else surprise
        worse = surprise / reference if surprise and reference else None
        trials.append(DtypeTrial(dtype, speed, surprise, speed / base, worse, loaded.revision))
    return tuple(trials)


def batch_speed(loaded: Loaded, seconds: float = SECONDS) -> float:
    """Tokens per second of 16 rows by their quickest step, after as many steps as the time allows."""
    from nbhelpers.generation.decode import decode_all

    stamps: list[float] = []

    def greedy(logits: Tensor, rows: list[int], steps: list[int]) -> Tensor:
        stamps.append(time.perf_counter())
        return logits.argmax(-1)

    prompts, room = [held_out(loaded)[:PROMPT_TOKENS]] * ROWS, loaded.report.context - PROMPT_TOKENS
    for steps, timeout_s in ((2, math.inf), (room, seconds)):  # at least one step, however long it takes
        decode_all(loaded.model, prompts, [steps] * ROWS, greedy, timeout_s=timeout_s)
    return ROWS / min(b - a for a, b in itertools.pairwise(stamps))


def perplexity(loaded: Loaded, ids: Sequence[int]) -> float | None:
    """exp of the mean negative log-likelihood of each token after the first; None where it is not finite."""
    import torch

    given = torch.tensor([list(ids)], device=loaded.device)
    with torch.inference_mode():
        logits = loaded.model(input_ids=given).logits[0, :-1].float()
        mean = torch.nn.functional.cross_entropy(logits, given[0, 1:]).item()
    return math.exp(mean) if math.isfinite(mean) else None


def held_out(loaded: Loaded) -> list[int]:
    """128 tokens written by hand that no embedded model was trained on (data/planted.toml)."""
    ids = loaded.tokenizer(registry.held_out_text(), verbose=False)["input_ids"]
    return list(ids)[: min(HELD_OUT_TOKENS, loaded.report.context)]
