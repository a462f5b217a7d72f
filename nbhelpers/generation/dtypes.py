"""Which dtype suits one model on this machine: how fast each is, and what it does to the model's predictions.

Half the bytes are no promise of speed: a processor without instructions for a format imitates it, and one
may be fast at a matrix times a vector and slow at a product of matrices. So each is tried.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from nbhelpers import registry, store
from nbhelpers.devices import device as devices
from nbhelpers.devices import fit
from nbhelpers.devices.device import DeviceReport, DtypeTrial
from nbhelpers.generation.decode import decode, decode_by_generate, engine_for
from nbhelpers.loading import load as loading
from nbhelpers.loading.folder import describe
from nbhelpers.loading.load import Loaded
from nbhelpers.records import ModelSpec, Settings
from nbhelpers.scoring import validity

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST = 50_000_000  # parameters: below, a run takes less time than the trials
SECONDS = 0.5  # of decoding, for each dtype
ROWS, PROMPT_TOKENS = 16, 16  # the batch that is timed
TOKENS = 128  # of held-out text, for the perplexity


def choose(report: DeviceReport, settings: Settings) -> DeviceReport:
    """The report with the dtype that suits the run's model, and why; tried once for each model and run.

    A dtype asked for stays, as does that of a model below 50 million parameters or whose float32 weights,
    the reference, do not fit.
    """
    path = registry.model_dir(settings) / "device.json"
    old = store.read_json(path, DeviceReport) if path.exists() else report
    trials = old.dtype_trials if old.device == report.device else ()
    if report.dtype_asked:
        return devices.with_trials(report, trials)
    spec = registry.resolve(settings.model)
    if spec.parameters is None:
        spec = describe(spec, loading.fetch(spec))
    if (spec.parameters or 0) < SMALLEST:
        return _unmeasured(report, f"below {SMALLEST / 1e6:.0f} million parameters")
    if not trials or trials[0].revision != loading.revision_of(spec):
        needs = {dtype: fit.generation_need(spec, dtype, ROWS, TOKENS) for dtype in report.dtypes}
        fitting = [dtype for dtype, need in needs.items() if fit.fits(need, report.memory_free_bytes)]
        if "float32" not in fitting:
            return _unmeasured(report, "float32, the reference, does not fit")
        trials = probe(spec, report.device, fitting)
    return devices.with_trials(report, trials)


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
    stamps: list[float] = []

    def greedy(logits: Tensor, rows: list[int], steps: list[int]) -> Tensor:
        stamps.append(time.perf_counter())
        return logits.argmax(-1)

    run = decode if engine_for(loaded.model) == "loop" else decode_by_generate
    prompts, room = [held_out(loaded)[:PROMPT_TOKENS]] * ROWS, loaded.report.context - PROMPT_TOKENS
    for steps, limit_s in ((2, math.inf), (room, seconds)):  # at least one step, however long it takes
        run(loaded.model, prompts, [steps] * ROWS, greedy, limit_s=limit_s)
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
    text = " ".join(answer.text for answer in validity.reference_answers())
    return list(loaded.tokenizer(text, verbose=False)["input_ids"])[: min(TOKENS, loaded.report.context)]


def _unmeasured(report: DeviceReport, why: str) -> DeviceReport:
    return replace(report, dtype_reason=f"{report.dtype_reason}; not measured: {why}")
