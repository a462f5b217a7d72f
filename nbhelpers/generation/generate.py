"""Prompts in, one ``Sample`` per prompt and repeat out, written down as they end and never made twice."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nbhelpers import registry, store
from nbhelpers.devices import device as devices
from nbhelpers.devices import fit, meters
from nbhelpers.loading import load, tokenizer
from nbhelpers.loading.load import Loaded, LoadingReport
from nbhelpers.records import Engine, Failure, LabError, Limits, ModelRun, Prompt, Sample, Settings

if TYPE_CHECKING:
    from nbhelpers.generation.decode import Finished

ENGINE = 3  # raise it when the same settings would give another text: older rows are then made again
LATENCY_PROMPTS = 5
BATCH_CAP = 128  # rows
GIVE_UP_AFTER = 3  # failures in a row
PAUSE_S = 1.0  # before a model that failed so often gets one more try

Purpose = Literal["sample", "latency"]
FILES: dict[Purpose, str] = {"sample": "samples.jsonl", "latency": "latency.jsonl"}


@dataclass(frozen=True)
class Request:
    """One sample that is wanted; its key says whether a file already has it. ``prepare`` adds the rest."""

    key: str
    prompt: Prompt
    repeat: int
    ids: tuple[int, ...] = ()
    max_new_tokens: int = 0  # that may follow the ids
    truncated: bool = False
    ids_digest: str | None = None  # of the whole prompt's ids


def requests(
    prompts: Sequence[Prompt], settings: Settings, report: LoadingReport, purpose: Purpose = "sample"
) -> list[Request]:
    """Every (prompt, repeat) in order, keyed by all that decides its text.

    Latency takes the first prompts (at most 5) and no repeats. A report without digests of ids is that of an
    older release, and so are its keys.
    """
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
    decides = {name: getattr(settings, name) for name in names}
    decides |= {"model": report.model, "revision": report.revision, "format": report.prompt_format}
    decides |= {"device": report.device.split(":")[0], "dtype": report.dtype}
    decides |= {"engine": 2 if report.ids_digests is None else ENGINE, "purpose": purpose}
    decides |= {"maker_settings": True} if settings.maker_settings else {}
    first, repeats = (LATENCY_PROMPTS, 1) if purpose == "latency" else (None, settings.repeats)
    wanted = []
    for prompt, repeat in itertools.product(prompts[:first], range(repeats)):
        digest = (report.ids_digests or {}).get(prompt.id)
        own = {"prompt_id": prompt.id, "prompt": prompt.text} | ({"ids": digest} if digest else {})
        key = store.row_key(**decides, **own, repeat=repeat)
        wanted.append(Request(key, prompt, repeat, ids_digest=digest))
    return wanted


def report_of(loaded: Loaded, prompts: Sequence[Prompt], settings: Settings) -> LoadingReport:
    """The report of a loaded model with what generating adds: its engine, the maker's settings, digests.

    Raises LabError for a model that no engine serves.
    """
    from nbhelpers.generation import engines, sampling

    digests, (engine, trial) = dict[str, str](), engines.tried(loaded.model)
    for prompt in prompts:
        with suppress(LabError):  # its rows will say so
            digests[prompt.id] = store.row_key(ids=tokenizer.encode(loaded, prompt))
    maker = sampling.maker_settings(loaded.model, settings.maker_settings)
    added = {"engine": engine, "engine_trial": trial, "generation_config": maker, "ids_digests": digests}
    return replace(loaded.report, **added)


def read_samples(run: ModelRun, purpose: Purpose = "sample") -> list[Sample]:
    """The rows of this run's settings, in order. Raises LabError where some are missing."""
    path, rows = _rows(run, purpose)
    if absent := rows.count(None):
        way_out = f"pipeline.make(run, through={path.stem!r})"
        raise LabError(f"The file {path} lacks {absent} of {len(rows)} rows: make them with {way_out}.")
    return [row for row in rows if row is not None]


def missing(run: ModelRun, purpose: Purpose = "sample") -> int:
    """How many rows of this run's settings its file lacks."""
    return _rows(run, purpose)[1].count(None)


def _rows(run: ModelRun, purpose: Purpose) -> tuple[Path, list[Sample | None]]:
    """A file of rows, and those of this run's settings: None for each that it lacks."""
    path, settings = run.folder / FILES[purpose], run.settings
    prompts = registry.load_prompts(settings.prompts, settings.limit)
    have = {row.key: row for row in store.read_rows(path, Sample)}
    wanted = requests(prompts, settings, load.read_report(run), purpose)
    return path, [have.get(request.key) for request in wanted]


def prepare(loaded: Loaded, request: Request, max_new_tokens: int) -> Request:
    """The request with its prompt's ids, cut to fit the context. Raises LabError as encode does.

    The answer is promised max_new_tokens, but at most half of the context. A longer prompt keeps its last
    tokens, with the beginning token in front. The last token of an answer is not read: it needs no place.
    """
    context, begin = loaded.report.context, loaded.tokenizer.bos_token_id
    ids = tokenizer.encode(loaded, request.prompt)
    if max(ids) >= loaded.report.vocabulary:
        word = loaded.tokenizer.convert_ids_to_tokens(max(ids))
        raise LabError(f"The prompt {request.prompt.id!r} has {word!r}, which the model lacks: reword it.")
    room = max(context - max_new_tokens + 1, context // 2, 1)
    truncated = len(ids) > room
    if truncated:
        ids = [begin, *ids[len(ids) - room + 1 :]] if ids[0] == begin and room > 1 else ids[-room:]
    follow = max(1, min(max_new_tokens, context - len(ids) + 1))
    return replace(request, ids=tuple(ids), max_new_tokens=follow, truncated=truncated)


def generate_samples(
    loaded: Loaded,
    prompts: Sequence[Prompt],
    settings: Settings,
    path: Path | None = None,
    batch_size: int | None = None,
    limits: Limits = Limits(),
) -> list[Sample]:
    """One sample per prompt and repeat, in that order, each exactly once, generated in batches.

    path: a JSONL file; its finished rows are reused, its failed ones tried again, new rows appended as they
    end. batch_size: None chooses by memory. What goes wrong with a row is recorded in it. Raises LabError for
    a file that cannot be written, a model that cannot be served, and where limits.fail_on_error is reached.
    """
    wanted = requests(prompts, settings, report_of(loaded, prompts, settings))
    return complete(loaded, wanted, settings, path, batch_size, limits)


def complete(
    loaded: Loaded,
    wanted: Sequence[Request],
    settings: Settings,
    path: Path | None = None,
    batch_size: int | None = None,
    limits: Limits = Limits(),
    stop: bool = True,
) -> list[Sample]:
    """The wanted samples in order: the finished rows of the file, and the rest made now.

    stop: whether end tokens end a row.
    """
    with store.appending(path) if path else nullcontext(lambda row: None) as append:
        have, jobs, broken, failed = finished(path), list[Request](), list[Sample](), 0
        prepared = dict[Prompt, Request]()  # a prompt is encoded once, whatever its repeats
        for request in wanted:
            if request.key not in have:
                try:
                    if (known := prepared.get(request.prompt)) is None:
                        known = prepared[request.prompt] = prepare(loaded, request, settings.max_new_tokens)
                    jobs.append(replace(known, key=request.key, repeat=request.repeat))
                except Exception as error:
                    broken.append(sample_of(loaded, request, settings, 1, error=error))
        ends = tokenizer.end_tokens(loaded) if stop and jobs else frozenset()
        made = _run(loaded, jobs, settings, batch_size or 0, ends, limits.generation_s)
        with meters.recorded(path, [job.key for job in jobs]):
            for sample in itertools.chain(broken, made):
                have[sample.key] = sample
                append(sample)
                failed += sample.error is not None
                if limits.fail_on_error.reached(failed, len(wanted)):
                    count = f"{failed} of {len(wanted)} samples failed, the last with {sample.error}"
                    raise LabError(f"The run was stopped by --fail-on-error: {count}", Failure.STOPPED)
    return [have[request.key] for request in wanted]


def finished(path: Path | None) -> dict[str, Sample]:
    """Key -> row of a samples file; of two rows with one key the later counts, if it did not fail."""
    last = {row.key: row for row in store.read_rows(path, Sample)} if path else {}
    return {key: row for key, row in last.items() if row.error is None}


def _run(
    loaded: Loaded, jobs: list[Request], settings: Settings, size: int, ends: frozenset[int], timeout_s: float
) -> Iterator[Sample]:
    """One sample for every job, `size` rows at a time (0: as many as fit).

    When memory runs out, half as many are tried with what is left; another failure is that of the rows which
    had begun. After failures in a row one job is tried alone, and if it fails too, the rest is given up.
    """
    from nbhelpers.generation.decode import Finished, decode, failure_of
    from nbhelpers.generation.engines import engine_for
    from nbhelpers.generation.sampling import maker_sampler, row_seed, sampler

    longest = max((len(job.ids) + job.max_new_tokens for job in jobs), default=0)
    in_a_row, trial, engine = 0, False, engine_for(loaded.model, longest)
    late = TimeoutError(f"the limit of {timeout_s:g} s passed")
    devices.reset_peak(loaded.device)
    while jobs and not (trial and in_a_row):
        if trial := in_a_row >= GIVE_UP_AFTER:
            time.sleep(PAUSE_S)
        size = min(size or best_batch_size(loaded, jobs), len(jobs))
        now, rows = (jobs[:1], 1) if trial else (jobs, size)
        left, paid = dict(enumerate(now)), dict[int, meters.Share]()  # paid by others, when a row began
        seeds = [row_seed(settings.seed, job.prompt.id, job.repeat) for job in now]
        ids, room = [job.ids for job in now], [job.max_new_tokens for job in now]
        choose = sampler(seeds, settings.temperature, settings.top_k, settings.top_p)
        if settings.maker_settings:
            asked = list(zip(ids, room, seeds, strict=True))
            choose = maker_sampler(loaded.model, settings, asked, ends)
        failure: Exception | None = None
        try:
            devices.synchronize(loaded.device)
            ledger = meters.Ledger(loaded.device)
            for event in decode(loaded.model, ids, room, choose, ends, rows, timeout_s, engine=engine):
                share = ledger.charge(max(1, len(paid)))
                if isinstance(event, Finished):
                    job, share = left.pop(event.row), share.since(paid.pop(event.row))
                    error = late if event.finish_reason == "time" else None
                    in_a_row = in_a_row + 1 if error else 0
                    yield sample_of(loaded, job, settings, rows, event, error, share, engine)
                elif in_a_row >= GIVE_UP_AFTER and not trial:
                    break
                else:
                    paid.update(dict.fromkeys(event.rows, share))
        except Exception as caught:
            # Without the traceback, whose frames would keep this batch's tensors alive during the next try.
            failure = caught.with_traceback(None)
        if failure and rows > 1 and failure_of(failure) == Failure.OUT_OF_MEMORY:
            size //= 2
        elif failure:
            in_a_row += len(paid)
            yield from (sample_of(loaded, left.pop(row), settings, rows, error=failure) for row in paid)
        jobs = [*left.values(), *jobs[len(now) :]]
    reason = f"The model {loaded.spec.alias!r} was given up after {in_a_row} failures in a row."
    given_up = LabError(reason, Failure.REFUSED)
    yield from (sample_of(loaded, job, settings, size, error=given_up) for job in jobs)


def best_batch_size(loaded: Loaded, jobs: Sequence[Request]) -> int:
    """As many rows as fit the free memory, at most 128, split evenly where there are more."""
    tokens, report = max(len(job.ids) + job.max_new_tokens for job in jobs), loaded.report
    one = fit.generation_need(loaded.spec, report.dtype, 1, tokens, report.vocabulary)
    most = min(BATCH_CAP, max(1, fit.rows_that_fit(one, devices.free_memory(loaded.device), loaded=True)))
    return math.ceil(len(jobs) / math.ceil(len(jobs) / most))


def sample_of(
    loaded: Loaded,
    job: Request,
    settings: Settings,
    batch_size: int,
    row: Finished | None = None,
    error: Exception | None = None,
    share: meters.Share | None = None,
    engine: Engine = "loop",
) -> Sample:
    """The record of one row, or of its failure."""
    from nbhelpers.generation.decode import failure_of

    tokens = row.tokens if row else ()
    ended = row is not None and row.finish_reason == "eos"
    reasoning, text = tokenizer.read_answer(loaded.tokenizer, job.ids, tokens[:-1] if ended else tokens)
    return Sample(
        key=job.key,
        model=loaded.spec.alias,
        revision=loaded.revision,
        prompt_id=job.prompt.id,
        content_type=job.prompt.content_type,
        repeat=job.repeat,
        seed=settings.seed,
        prompt=job.prompt.text,
        text=text,
        prompt_tokens=len(job.ids),
        new_tokens=len(tokens),
        bytes=len(text.encode("utf-8", "surrogatepass")),
        finish_reason=row.finish_reason if row else "error",
        error=f"{type(error).__name__}: {error}".splitlines()[0] if error else None,
        batch_size=batch_size,
        latency_s=row.latency_s if row else None,
        ttft_s=row.ttft_s if row else None,
        tpot_s=(row.latency_s - row.ttft_s) / (len(tokens) - 1) if row and len(tokens) > 1 else None,
        peak_memory_bytes=devices.peak_memory(loaded.device) if row else None,
        energy_j=share.joules if share else None,
        prompt_truncated=job.truncated,
        engine=engine,
        share_s=share.seconds if share else None,
        failure=failure_of(error) if error else None,
        reasoning=reasoning,
        ids_digest=job.ids_digest,
    )
