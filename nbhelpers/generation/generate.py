"""Prompts in, one ``Sample`` per prompt and repeat out, written down as they end and never made twice."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from nbhelpers import registry, store
from nbhelpers.devices import device as devices
from nbhelpers.devices import meters
from nbhelpers.generation import failures, inputs
from nbhelpers.generation.decode import Row, decode, decode_by_generate, engine_for
from nbhelpers.generation.inputs import Job, Purpose, Request
from nbhelpers.generation.sampling import row_seed, sampler
from nbhelpers.loading import load as loading
from nbhelpers.loading.folder import describe
from nbhelpers.loading.load import Loaded
from nbhelpers.records import Engine, LabError, Prompt, Sample, Settings
from nbhelpers.runner import limits

LATENCY_PROMPTS = 5
LATENCY_TOKENS = 64
ALLOCATION = ("out of memory", "not enough memory", "can't allocate memory")  # the last is Linux without room
WARM_UPS, WARM_UP_TOKENS = 1, 8  # generations before the first timed one, in no row

OnSample = Callable[[Sample], None]


def generate_samples(
    loaded: Loaded,
    prompts: Sequence[Prompt],
    settings: Settings,
    path: Path | None = None,
    on_sample: OnSample | None = None,
    batch_size: int | None = None,
) -> list[Sample]:
    """One sample per prompt and repeat, in that order, each exactly once, generated in batches.

    path: a JSONL file; its finished rows are reused, its failed ones tried again, new rows appended as
    they end. batch_size: None chooses by memory. What goes wrong with a row is recorded in the row and the
    run goes on. Raises LabError for settings that make no sense and for a file that cannot be written.
    """
    wanted = inputs.requests(prompts, settings, _identity(loaded))
    return _complete(loaded, wanted, settings, path, on_sample, batch_size)


def measure_latency(
    loaded: Loaded, prompts: Sequence[Prompt], settings: Settings, path: Path | None = None
) -> list[Sample]:
    """Latency as one user meets it: the first prompts (at most 5), one at a time, after a warm-up.

    Every row gets the same number of new tokens (64, or max_new_tokens if that is less) and end tokens are
    ignored, so that a model that writes short answers is not called fast. The prompts are run in an order
    drawn from the seed, so that a machine that slows down does not slow the same prompts in every run, and
    returned in their own. Same schema as samples.
    """
    wanted = inputs.requests(prompts[:LATENCY_PROMPTS], settings, _identity(loaded), "latency")
    fixed = replace(settings, max_new_tokens=min(LATENCY_TOKENS, settings.max_new_tokens))
    have = _finished(path)
    if any(request.key not in have for request in wanted):
        warm_up = replace(fixed, max_new_tokens=min(WARM_UP_TOKENS, fixed.max_new_tokens))
        _complete(loaded, wanted[:1] * WARM_UPS, warm_up, batch_size=1, stop=False)
    shuffled = random.Random(settings.seed).sample(wanted, len(wanted))
    rows = _complete(loaded, shuffled, fixed, path, batch_size=1, stop=False, warm_ups=WARM_UPS)
    places = {request.key: place for place, request in enumerate(wanted)}
    return sorted(rows, key=lambda row: places[row.key])


def samples_for(settings: Settings) -> Sequence[Sample]:
    """The samples of this run folder and model; what its samples.jsonl lacks is generated.

    A failed row counts as there. Nothing heavy is imported when no row is missing, and
    rows are read from the file as they are asked for.
    """
    prompts = registry.load_prompts(settings.prompts, settings.limit)
    return _read_or_make(settings, prompts, "sample")


def latency_for(settings: Settings) -> Sequence[Sample]:
    """The latency rows of this run folder and model; what its latency.jsonl lacks is measured."""
    prompts = registry.load_prompts(settings.prompts, settings.limit)
    return _read_or_make(settings, prompts[:LATENCY_PROMPTS], "latency")


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


def _read_or_make(settings: Settings, prompts: list[Prompt], purpose: Purpose) -> Sequence[Sample]:
    spec, device = registry.resolve(settings.model), devices.device_for(settings)
    spec = spec if spec.kind == "shape" else describe(spec, loading.fetch(spec))  # as load does
    path = registry.model_dir(settings) / ("samples.jsonl" if purpose == "sample" else "latency.jsonl")
    identity = inputs.identity(spec, loading.revision_of(spec), device.device, device.dtype)
    wanted = inputs.requests(prompts, settings, identity, purpose)
    have = store.index(path, Sample)
    if all(request.key in have for request in wanted):
        return store.Rows(path, Sample, (have[request.key] for request in wanted))
    make = generate_samples if purpose == "sample" else measure_latency
    loaded = loading.load(spec, device.device, device.dtype)
    try:
        return make(loaded, prompts, settings, path)
    finally:
        loading.unload(loaded)


def _complete(
    loaded: Loaded,
    wanted: Sequence[Request],
    settings: Settings,
    path: Path | None = None,
    on_sample: OnSample | None = None,
    batch_size: int | None = None,
    stop: bool = True,
    warm_ups: int = 0,
) -> list[Sample]:
    """The wanted samples in order: the finished rows of the file, and the rest made now."""
    with store.appending(path) if path else nullcontext() as append:
        have = _finished(path)
        tolerated = limits.current().tolerated(len(wanted))
        failed: list[Sample] = []

        def keep(sample: Sample) -> None:
            have[sample.key] = sample
            if append is not None:
                append(sample)
                failed.extend([sample] if sample.error else [])
            if on_sample is not None:
                on_sample(sample)
            if failed and len(failed) >= tolerated:
                raise LabError(failures.stopped(len(failed), len(wanted), failed[-1].error))

        jobs = []
        for request in wanted:
            if request.key not in have:
                try:
                    jobs.append(inputs.prepare(loaded, request, settings.max_new_tokens))
                except Exception as error:
                    keep(_sample(loaded, Job(request, (), 0, False), settings, 1, error=error))
        if jobs:
            size = batch_size or inputs.best_batch_size(loaded, jobs)
            ends = inputs.end_tokens(loaded) if stop else frozenset()
            with meters.recorded(path, [job.request.key for job in jobs], warm_ups):
                _run(loaded, jobs, settings, keep, size, ends)
    return [have[request.key] for request in wanted]


def _run(
    loaded: Loaded, jobs: list[Job], settings: Settings, keep: OnSample, size: int, ends: frozenset[int]
) -> None:
    """Run all jobs, `size` at a time; when memory runs out, halve that and try what is left again.

    After failures in a row one job is tried alone; if it fails too, the rest is recorded as not tried.
    """
    devices.reset_peak(loaded.device)
    breaker = failures.Breaker()

    def count(sample: Sample) -> None:
        keep(sample)
        breaker.record(sample.error is None)

    while jobs and not breaker.given_up:
        now, later = (jobs[:1], jobs[1:]) if breaker.on_trial() else (jobs, [])
        size = min(size, len(jobs))
        started, waiting, error = _decode(loaded, now, settings, count, min(size, len(now)), ends, breaker)
        again = isinstance(error, failures.GivenUp)
        if error is not None and min(size, len(now)) > 1 and _out_of_memory(error):
            size, again = size // 2, True
        if not again:
            for job in started:
                count(_sample(loaded, job, settings, min(size, len(now)), error=error))
        jobs = (started if again else []) + waiting + later
    for job in jobs:
        reason = failures.GivenUp(
            f"{loaded.spec.alias} was given up after {breaker.in_a_row} failures in a row"
        )
        keep(_sample(loaded, job, settings, size, error=reason))


def _decode(
    loaded: Loaded,
    jobs: list[Job],
    settings: Settings,
    keep: OnSample,
    size: int,
    ends: frozenset[int],
    breaker: failures.Breaker,
) -> tuple[list[Job], list[Job], Exception | None]:
    """Decode the jobs. Returns those that had started and did not end, those that never started, and why."""
    waiting, started = dict(enumerate(jobs)), dict[int, Job]()
    paid: dict[int, meters.Share] = {}  # by the rows before it, when a row started
    engine = engine_for(loaded.model)
    run = decode if engine == "loop" else decode_by_generate
    limit_s = limits.current().batch_s

    def on_admit(rows: list[int]) -> None:
        if breaker.state == "open":
            raise failures.GivenUp
        paid.update(dict.fromkeys(rows, ledger.charge(max(1, len(started)))))
        started.update((row, waiting.pop(row)) for row in rows)

    def on_row(index: int, row: Row) -> None:
        share = ledger.charge(len(started)).since(paid[index])
        late = TimeoutError(f"the limit of {limit_s:g} s passed") if row.finish_reason == "time" else None
        keep(_sample(loaded, started.pop(index), settings, size, row, late, share, engine))

    seeds = [row_seed(settings.seed, job.request.prompt.id, job.request.repeat) for job in jobs]
    choose = sampler(seeds, settings.temperature, settings.top_k, settings.top_p)
    ids, room = [job.ids for job in jobs], [job.limit for job in jobs]
    try:
        devices.synchronize(loaded.device)
        ledger = meters.Ledger(loaded.device)
        run(loaded.model, ids, room, choose, ends, on_row, slots=size, on_admit=on_admit, limit_s=limit_s)
    except LabError:  # the file could not be written: nothing that another batch could mend
        raise
    except Exception as error:
        # Without the traceback, whose frames would keep this batch's tensors alive during the next try.
        return list(started.values()), list(waiting.values()), error.with_traceback(None)
    return [], [], None


def _out_of_memory(error: Exception) -> bool:
    """torch raises OutOfMemoryError on CUDA and XPU, plain RuntimeErrors on MPS and the CPU."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(said in text for said in ALLOCATION)


def _sample(
    loaded: Loaded,
    job: Job,
    settings: Settings,
    batch_size: int,
    row: Row | None = None,
    error: Exception | None = None,
    share: meters.Share | None = None,
    engine: Engine = "loop",
) -> Sample:
    """The record of one row, or of its failure."""
    tokens = row.tokens if row else ()
    ended = row is not None and row.finish_reason == "eos"
    text = loaded.tokenizer.decode(list(tokens[:-1] if ended else tokens), skip_special_tokens=True).strip()
    per_token = (row.latency_s - row.ttft_s) / (len(tokens) - 1) if row and len(tokens) > 1 else None
    return Sample(
        key=job.request.key,
        model=loaded.spec.alias,
        revision=loaded.revision,
        prompt_id=job.request.prompt.id,
        content_type=job.request.prompt.content_type,
        repeat=job.request.repeat,
        seed=settings.seed,
        prompt=job.request.prompt.text,
        text=text,
        prompt_tokens=len(job.ids),
        new_tokens=len(tokens),
        bytes=len(text.encode("utf-8", "surrogatepass")),
        finish_reason=row.finish_reason if row else "error",
        error=f"{type(error).__name__}: {error}".splitlines()[0] if error else None,
        batch_size=batch_size,
        latency_s=row.latency_s if row else None,
        ttft_s=row.ttft_s if row else None,
        tpot_s=per_token,
        peak_memory_bytes=devices.peak_memory(loaded.device) if row else None,
        energy_j=share.joules if share else None,
        prompt_truncated=job.truncated,
        engine=engine,
        share_s=share.seconds if share else None,
    )


def _identity(loaded: Loaded) -> dict[str, str]:
    return inputs.identity(loaded.spec, loaded.revision, loaded.device, loaded.report.dtype)


def _finished(path: Path | None) -> dict[str, Sample]:
    """Key -> row of a samples file; of two rows with one key the later counts, if it did not fail."""
    last = {row.key: row for row in store.read_rows(path, Sample)} if path else {}
    return {key: row for key, row in last.items() if row.error is None}
