"""Prompts in, one ``Sample`` per prompt and repeat out: written as they end, never made twice, and timed."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nbhelpers import store, tasks
from nbhelpers.devices import fit, machine, meters
from nbhelpers.errors import failure_of
from nbhelpers.generation import likelihood, server
from nbhelpers.generation.server import Served
from nbhelpers.loading import load, tokenization
from nbhelpers.loading.load import Loaded, LoadingReport
from nbhelpers.records import Engine, Failure, LabError, Limits, ModelRun, Prompt, Sample, Settings
from nbhelpers.redact import redacted

if TYPE_CHECKING:
    from nbhelpers.generation.decode import Finished

ENGINE = 3  # raise it when the same settings would give another text: older rows are then made again
SAMPLING = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")  # settings that decide a text
LATENCY_PROMPTS, ROUNDS, LATENCY_TOKENS = 8, 2, 64  # of latency: the first prompts, each so often
BATCH_CAP = 128  # rows

Purpose = Literal["samples", "latency"]  # of rows, and the name of their file


@dataclass(frozen=True)
class Request:
    """A sample to make; its key says whether a file already has it. ``prepare`` adds ids and what follows."""

    key: str
    prompt: Prompt
    repeat: int
    ids: tuple[int, ...] = ()
    max_new_tokens: int = 0  # that may follow the ids
    truncated: bool = False
    ids_digest: str | None = None  # of the whole prompt's ids


def requests(
    prompts: Sequence[Prompt],
    settings: Settings,
    report: LoadingReport,
    purpose: Purpose = "samples",
) -> list[Request]:
    """Every (prompt, repeat) in order, keyed by all that decides its text."""
    latency = purpose == "latency"
    sampling = {name: getattr(settings, name) for name in SAMPLING}
    sampling |= {"maker_settings": True} if settings.maker_settings else {}
    model = {"model": report.model, "revision": report.revision, "format": report.prompt_format}
    engine = ENGINE if report.ids_digests is not None else 2  # of an older release
    device = {"device": report.device.split(":")[0], "dtype": report.dtype, "engine": engine}
    task = {} if latency else tasks.load_task(settings.task).decides()
    decides: dict[str, Any] = sampling | model | device | task
    wanted = list[Request]()
    asked, repeats = (prompts[:LATENCY_PROMPTS], ROUNDS) if latency else (prompts, settings.repeats)
    for prompt, repeat in itertools.product(asked, range(repeats)):
        digest = (report.ids_digests or {}).get(prompt.id)
        choices = prompt.choices if "likelihoods" in task else ()
        optional = {"ids": digest, "before": prompt.before, "choices": choices}
        row: dict[str, Any] = {"prompt_id": prompt.id, "prompt": prompt.text, "repeat": repeat}
        row |= {name: value for name, value in optional.items() if value}
        key = store.row_key(**decides, **row, purpose="latency" if latency else "sample")
        wanted.append(Request(key, prompt, repeat, ids_digest=digest))
    return wanted


def report_of(loaded: Loaded, prompts: Sequence[Prompt], settings: Settings) -> LoadingReport:
    """The report of a loaded model with what generating adds. Raises LabError if no engine serves it."""
    from nbhelpers.generation import decode, sampling

    digests = dict[str, str]()
    for prompt in prompts:
        with suppress(LabError):  # its rows will say so
            digests[prompt.id] = store.row_key(ids=tokenization.encode(loaded, prompt))
    maker = sampling.maker_settings(loaded.model, settings.maker_settings)
    engine = decode.engine_for(loaded.model)
    return replace(loaded.report, engine=engine, generation_config=maker, ids_digests=digests)


def stored_samples(run: ModelRun, purpose: Purpose = "samples") -> list[Sample | None]:
    """The rows of this run's settings that its file has, in order; None for each that it lacks."""
    wanted = requests(tasks.prompts_of(run.settings), run.settings, load.read_report(run), purpose)
    by_key = {row.key: row for row in store.read_rows(run.folder / f"{purpose}.jsonl", Sample)}
    return [by_key.get(request.key) for request in wanted]


def read_samples(run: ModelRun, purpose: Purpose = "samples") -> list[Sample]:
    """The rows of this run's settings, in order. Raises LabError where some are missing."""
    rows = stored_samples(run, purpose)
    if missing := rows.count(None):
        message = f"The file {run.folder / purpose}.jsonl lacks {missing} of {len(rows)} rows"
        raise LabError(f"{message}: make them with pipeline.make(run, through={purpose!r}).")
    return [row for row in rows if row is not None]


def prepare(loaded: Loaded, request: Request, max_new_tokens: int) -> Request:
    """The request with its prompt's ids, cut to fit the context. Raises LabError as encode does.

    The answer is promised max_new_tokens, but at most half of the context. A longer prompt keeps its last
    tokens, with the beginning token in front. The last token of an answer is not read: it needs no place.
    """
    context = loaded.report.context or sys.maxsize
    ids = tokenization.encode(loaded, request.prompt)
    if max(ids) >= (loaded.report.vocabulary or sys.maxsize):
        token = loaded.tokenizer.convert_ids_to_tokens(max(ids))
        raise LabError(f"The prompt {request.prompt.id!r} has {token!r}, which the model lacks: reword it.")
    longest = max(context - max_new_tokens + 1, context // 2, 1)
    if truncated := len(ids) > longest:
        begin = [ids[0]] if ids[0] == loaded.tokenizer.bos_token_id and longest > 1 else []
        ids = begin + ids[len(ids) - longest + len(begin) :]
    most = max(1, min(max_new_tokens, context - len(ids) + 1))
    return replace(request, ids=tuple(ids), max_new_tokens=most, truncated=truncated)


def generate_samples(
    model: Loaded | Served,
    prompts: Sequence[Prompt],
    settings: Settings,
    path: Path | None = None,
    batch_size: int | None = None,
    limits: Limits = Limits(),
    purpose: Purpose = "samples",
    part: slice = slice(None),
) -> list[Sample]:
    """One sample per prompt and repeat (or a part of them), in that order, each exactly once.

    path: a JSONL file; its finished rows are reused, its failed ones tried again, new rows appended as they
    end. batch_size: rows or requests at a time; None: what memory holds, limits.at_once of a server. What
    goes wrong with a row is recorded in it. Raises LabError for a file or a model that cannot be used, and
    where limits.fail_on_error is reached.
    """
    report = report_of(model, prompts, settings) if isinstance(model, Loaded) else model.report
    every = requests(prompts, settings, report, purpose)
    wanted = every[part]
    if purpose == "latency":  # all texts as long, whatever ends those of the task
        settings = replace(settings, task="", max_new_tokens=min(LATENCY_TOKENS, settings.max_new_tokens))
    limit = limits.generation_s, purpose == "latency"

    def make(missing: list[Request]) -> Iterator[Sample]:
        if isinstance(model, Loaded):
            yield from _decoded(model, settings, missing, batch_size or 0, *limit)
            return
        at_once = batch_size or limits.at_once
        asked = [(request.prompt, request.repeat) for request in missing]
        for place, error, fields in server.answers(model, asked, settings, at_once, *limit):
            yield _sample(model, missing[place], settings, at_once, error, engine="server", **fields)

    with store.appending(path) if path else nullcontext(lambda row: None) as append:
        rows = store.read_rows(path, Sample) if path else ()
        finished = {row.key: row for row in rows if row.error is None}
        missing = [request for request in wanted if request.key not in finished]
        failed = 0
        with meters.recorded({path: [request.key for request in missing]} if path and missing else {}):
            for sample in make(missing):
                finished[sample.key] = sample
                append(sample)
                failed += sample.error is not None
                if limits.fail_on_error.reached(failed, len(every)):
                    count = f"{failed} of {len(every)} samples failed, the last with {sample.error}"
                    raise LabError(f"The run was stopped by --fail-on-error: {count}", Failure.STOPPED)
    return [finished[request.key] for request in wanted]


def _decoded(
    loaded: Loaded, settings: Settings, wanted: list[Request], size: int, limit_s: float, latency: bool
) -> Iterator[Sample]:
    """A sample for every request, `size` rows at a time (0: all that fit), fewer when memory runs out."""
    from nbhelpers.generation.decode import Finished, decode, engine_for
    from nbhelpers.generation.sampling import maker_sampler, row_seed, sampler

    task = tasks.load_task(settings.task)
    logprobs = likelihood.of_prompts(loaded, (request.prompt for request in wanted), task.likelihoods())
    jobs, prepared = list[Request](), dict[Prompt, Request]()
    for request in wanted:  # a prompt is encoded once, whatever its repeats
        try:
            if request.prompt not in prepared:
                prepared[request.prompt] = prepare(loaded, request, settings.max_new_tokens)
            jobs.append(replace(prepared[request.prompt], key=request.key, repeat=request.repeat))
        except Exception as problem:
            yield sample_of(loaded, request, settings, 1, error=problem)
    ends = frozenset[int]() if latency else tokenization.end_tokens(loaded)
    engine = engine_for(loaded.model, max((len(job.ids) + job.max_new_tokens for job in jobs), default=0))
    too_late = TimeoutError(f"the limit of {limit_s:g} s passed")
    machine.reset_peak(loaded.device)
    while jobs:
        size = min(size or best_batch_size(loaded, jobs), len(jobs))
        pending = dict(enumerate(jobs))
        charged = dict[int, meters.Share]()  # to others, when a live row began
        ids, most = [job.ids for job in jobs], [job.max_new_tokens for job in jobs]
        seeds = [row_seed(settings.seed, job.prompt.id, job.repeat) for job in jobs]
        choose = sampler(seeds, settings.temperature, settings.top_k, settings.top_p)
        if settings.maker_settings:
            choose = maker_sampler(loaded.model, settings, [*zip(ids, most, seeds, strict=True)], ends)
        batch = loaded.model, ids, most, choose, ends, size, limit_s
        stopped = tokenization.stop_check(loaded.tokenizer, ids, task.stop)
        failure: Exception | None = None
        try:
            machine.synchronize(loaded.device)
            ledger = meters.Ledger(loaded.device)
            for event in decode(*batch, engine=engine, stopped=stopped):
                share = ledger.charge(max(1, len(charged)))
                if isinstance(event, Finished):
                    job, share = pending.pop(event.row), share.since(charged.pop(event.row))
                    error = too_late if event.finish_reason == "time" else None
                    sample = sample_of(loaded, job, settings, size, event, error, share, engine)
                    yield replace(sample, logprobs=logprobs[job.prompt])
                else:
                    charged |= dict.fromkeys(event.rows, share)
        except Exception as problem:
            # Without the traceback, whose frames would keep this batch's tensors alive during the next try.
            failure = problem.with_traceback(None)
        if failure and size > 1 and failure_of(failure) == Failure.OUT_OF_MEMORY:
            size //= 2  # try again with what is left
        elif failure:  # is that of the rows which had begun
            for row in list(charged or pending):
                yield sample_of(loaded, pending.pop(row), settings, size, error=failure)
        jobs = list(pending.values())


def best_batch_size(loaded: Loaded, jobs: Sequence[Request]) -> int:
    """As many rows as fit the free memory, at most 128, in batches of one size."""
    tokens = max(len(job.ids) + job.max_new_tokens for job in jobs)
    row = fit.generation_need(loaded.spec, loaded.report.dtype, 1, tokens, loaded.report.vocabulary or 0)
    most = min(BATCH_CAP, max(1, fit.rows_that_fit(row, machine.free_memory(loaded.device), loaded=True)))
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
    """The record of one row, or of its failure; its text ends before the first of the stop strings."""
    end, tokens = (row.finish_reason, row.tokens) if row else ("error", ())
    written = tokens[:-1] if end == "eos" else tokens
    thought, text = tokenization.read_answer(loaded.tokenizer, job.ids, written)
    text = tokenization.before_stop(text, tasks.load_task(settings.task).stop) if end == "stop" else text
    text = text.encode("utf-8", "replace").decode()  # a vocabulary may hold halves of surrogate pairs
    fields = dict[str, Any](text=text, reasoning=thought, new_tokens=len(tokens), finish_reason=end)
    fields |= {"prompt_tokens": len(job.ids), "engine": engine}
    if error:
        fields["failure"] = failure_of(error)
    if row:
        peak = machine.peak_memory(loaded.device)
        fields |= {"ttft_s": row.ttft_s, "latency_s": row.latency_s, "peak_memory_bytes": peak}
    if share:
        fields |= {"energy_j": share.joules, "share_s": share.seconds}
    return _sample(loaded, job, settings, batch_size, error, **fields)


def _sample(
    model: Loaded | Served, job: Request, settings: Settings, size: int, error: Exception | None, **row: Any
) -> Sample:
    """A row by what is known with either engine, and by the fields that one of them filled."""
    row = dict[str, Any](text="", prompt_tokens=0, new_tokens=0, finish_reason="error") | row
    timed = row.get("ttft_s") is not None and row["new_tokens"] > 1
    return Sample(
        key=job.key,
        model=model.spec.alias,
        revision=model.report.revision,
        prompt_id=job.prompt.id,
        content_type=job.prompt.content_type,
        repeat=job.repeat,
        seed=settings.seed,
        prompt=job.prompt.text,
        bytes=len(row["text"].encode()),
        error=redacted(f"{type(error).__name__}: {error}".splitlines()[0])[:300] if error else None,
        batch_size=size,
        tpot_s=(row["latency_s"] - row["ttft_s"]) / (row["new_tokens"] - 1) if timed else None,
        prompt_truncated=job.truncated,
        ids_digest=job.ids_digest,
        **row,
    )


def throughput(samples: Iterable[Sample]) -> float:
    """New tokens per second: those of all rows / their shares of the machine's time; 0.0 if none finished."""
    rows = list(samples)
    seconds = sum(row.share_s or 0.0 for row in rows)
    return sum(row.new_tokens for row in rows) / seconds if seconds > 0 else 0.0
