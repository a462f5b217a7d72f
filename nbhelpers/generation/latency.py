"""Latency as one user meets it: one answer at a time, after a warm-up; the models of a run in turn.

A machine is slower at one time than at another. Models that answer the same prompt within a moment of each
other, in an order that changes, meet that alike: their ratios lose it (randomised multiple interleaved
trials, Abedi & Brecht 2017, doi 10.1145/3030207.3030229).
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from nbhelpers import store, tasks
from nbhelpers.devices import fit, machine, meters
from nbhelpers.generation import generate, server
from nbhelpers.generation.server import Served
from nbhelpers.loading import load
from nbhelpers.loading.load import Loaded
from nbhelpers.records import SCHEMA_VERSION, LabError, Limits, ModelRun, Prompt, Record, Sample, Settings

FILE = "latency.json"
WARM_UP_TOKENS = 8  # of a generation before the first timed one, in no row


@dataclass(frozen=True)
class LatencyPass(Record):
    """latency.json of a run: whose timings were taken in turn, so that they may be compared in pairs."""

    keys: tuple[str, ...]  # of the rows of all latency.jsonl that have no error, as they were made
    together: bool  # all models were loaded: a turn was one answer; else it was all prompts of a round
    schema_version: int = SCHEMA_VERSION


def measure_latency(
    loaded: Loaded | Served,
    prompts: Sequence[Prompt],
    settings: Settings,
    path: Path | None = None,
    limits: Limits = Limits(),
) -> list[Sample]:
    """The latency of one model alone: its first prompts (at most 8) in two rounds, one at a time.

    Every row gets as many new tokens (64, or max_new_tokens if that is less), end tokens or not, so that
    short answers are not called fast; a server may end an answer all the same. The order is drawn from the
    seed, as machines slow down.
    """
    prompts = prompts[: generate.LATENCY_PROMPTS]
    _warm_up(loaded, prompts, settings, limits)
    shuffled = random.Random(settings.seed).sample(prompts, len(prompts))
    samples = generate.generate_samples(loaded, shuffled, settings, path, 1, limits, "latency")
    by_round = {(sample.prompt_id, sample.repeat): sample for sample in samples}
    return [by_round[prompt.id, number] for prompt in prompts for number in range(generate.ROUNDS)]


def measure_in_turn(runs: Sequence[ModelRun]) -> None:
    """The latency of a run's models in one pass; writes latency.jsonl of each, and the run's latency.json.

    Where memory holds all of them (and no server has two), they take turns at every prompt of every round;
    else each is loaded for its turn at all prompts of a round. All is measured anew, as half a pass would
    pair timings of different hours. A model that cannot be opened is left out, and the log says why.
    """
    prompts = tasks.prompts_of(runs[0].settings)[: generate.LATENCY_PROMPTS]
    shuffled = random.Random(runs[0].settings.seed).sample(prompts, len(prompts))
    together = _fit_together(runs)
    groups = [[prompt] for prompt in shuffled] if together else [shuffled]
    samples = {run.folder / "latency.jsonl": list[Sample]() for run in runs}
    keys = {path: list[str]() for path in samples}
    timed = list[str]()
    models = dict[Path, Loaded | Served]()

    @contextmanager
    def left_out(path: Path) -> Iterator[None]:
        try:
            yield
        except Exception as problem:  # libraries and servers have no common base
            samples.pop(path)
            print(f"{path.parent.name} is not timed with the others: {problem}")

    with ExitStack() as stack:
        for path, run in zip(list(samples), runs, strict=True) if together else ():
            with left_out(path):
                models[path] = stack.enter_context(_warmed(run, prompts))
        servers_work = stack.enter_context(meters.recorded(keys))
        turns = itertools.product(range(generate.ROUNDS), groups, range(len(runs)))
        for turn, (number, group, place) in enumerate(turns):
            run = runs[(turn // len(runs) + place) % len(runs)]  # another one begins each time
            path = run.folder / "latency.jsonl"
            if path not in samples:
                continue
            before = meters.cpu_times() if run.spec.kind == "server" else None
            with left_out(path), nullcontext(models[path]) if together else _warmed(run, prompts) as model:
                job = model, group, run.settings, None, 1, run.limits
                of_round = slice(number, None, generate.ROUNDS)
                rows = generate.generate_samples(*job, "latency", of_round)
                samples[path] += rows
                keys[path] += [row.key for row in rows]
                timed += [row.key for row in rows if row.error is None]
            if before:  # a server on this machine works for us
                wall, busy, mine = (b - a for a, b in zip(before, meters.cpu_times(), strict=True))
                servers_work.append((wall, busy, mine))
    for path, rows in samples.items():
        store.write_rows(path, rows)
    store.write_json(runs[0].folder.parent / FILE, LatencyPass(tuple(timed), together))


def is_whole(runs: Sequence[ModelRun]) -> bool:
    """Whether these models were timed in one pass, without a row that lacks or failed."""
    with suppress(LabError):
        keys = set(store.read_json(runs[0].folder.parent / FILE, LatencyPass).keys)
        rows = [row for run in runs for row in generate.stored_samples(run, "latency")]
        return None not in rows and {row.key for row in rows if row} <= keys
    return False


def _fit_together(runs: Sequence[ModelRun]) -> bool:
    """Whether all models can be held at once: memory for the local ones, a server each for the others."""
    servers = [run.spec.source.partition("#")[0] for run in runs if run.spec.kind == "server"]
    held, free = 0, 0  # bytes
    for run in (run for run in runs if run.spec.kind != "server"):
        report = load.read_report(run)
        need = fit.generation_need(run.spec, report.dtype, vocabulary=report.vocabulary or 0)
        held += (report.parameter_bytes or 0) + need.cache + need.logits
        free = machine.free_memory(report.device)
    return len(set(servers)) == len(servers) and fit.fits(fit.Need(held, 0, 0), free)


@contextmanager
def opened(run: ModelRun) -> Iterator[Loaded | Served]:
    """The model of a run: loaded here, or asked at its server."""
    report = None if run.spec.kind == "server" else machine.read_device(run)
    model = server.open_model(run.spec, *((report.device, report.dtype) if report else ()))
    try:
        yield model
    finally:
        server.close(model)


@contextmanager
def _warmed(run: ModelRun, prompts: Sequence[Prompt]) -> Iterator[Loaded | Served]:
    with opened(run) as model:
        _warm_up(model, prompts, run.settings, run.limits)
        yield model


def _warm_up(model: Loaded | Served, prompts: Sequence[Prompt], settings: Settings, limits: Limits) -> None:
    short = replace(settings, max_new_tokens=min(WARM_UP_TOKENS, settings.max_new_tokens))
    generate.generate_samples(model, prompts[:1], short, None, 1, limits, "latency", slice(1))
