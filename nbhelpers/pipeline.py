"""One model's files, from device.json to result.json: what its name means, and what is still missing."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal, get_args

from nbhelpers import registry, store, tasks
from nbhelpers.devices import machine
from nbhelpers.generation import generate, latency, likelihood
from nbhelpers.loading import load
from nbhelpers.loading.checkpoint import inspect
from nbhelpers.loading.load import Loaded
from nbhelpers.records import ModelRun, Settings
from nbhelpers.scoring import reference, rubric
from nbhelpers.tracking import metrics, result

Step = Literal["device", "loading", "samples", "latency", "scores", "stats", "result"]
STEPS: tuple[Step, ...] = get_args(Step)
# What is computed from other files: the function that does it, the file it writes, and those it reads.
COMPUTED: dict[Step, tuple[Callable[[ModelRun], object], str, tuple[str, ...]]] = {
    "scores": (reference.make_scores, "scores.jsonl", ("samples.jsonl",)),
    "stats": (metrics.make_stats, "stats.json", ("scores.jsonl", "latency.jsonl")),
    "result": (result.make_result, "result.json", ("stats.json",)),
}


def open_run(settings: Settings) -> ModelRun:
    """What these settings work on: a model as run.json has it or, in a notebook run alone, as its name means.

    Raises LabError for a name that means nothing and for a model that cannot be used.
    """
    folder = store.run_dir(settings)
    if info := result.read_info(folder):
        of_run = info.settings
        if (settings.task, settings.prompts, settings.limit) == (of_run.task, of_run.prompts, of_run.limit):
            tasks.check_unchanged(info, settings)
        if spec := dict(zip(info.models, info.specs, strict=False)).get(settings.model):
            return ModelRun(settings, spec, folder / spec.slug, info.limits)
    spec = inspect(registry.resolve(settings.model))
    return ModelRun(settings, spec, folder / spec.slug)


def make(run: ModelRun, through: Step, part: slice = slice(None)) -> None:
    """Make what is missing of a model's files, up to ``through``, and print what is made.

    The model is loaded once, if at all. part: of its samples. Raises LabError as the steps do.
    """
    steps = STEPS[: STEPS.index(through) + 1]
    device = machine.make_device(run)
    if "loading" in steps:
        _make_rows(run, device, [purpose for purpose in get_args(generate.Purpose) if purpose in steps], part)
    for step in (step for step in steps if step in COMPUTED):
        compute, name, sources = COMPUTED[step]
        inputs = [run.folder / source for source in sources]
        inputs += reference.files(tasks.load_task(run.settings.task)) if step == "scores" else []
        path = run.folder / name
        current = path.exists() and path.stat().st_mtime >= max(file.stat().st_mtime for file in inputs)
        if current and step == "scores":  # of fewer prompts, perhaps
            current = [s.key for s in rubric.read_scores(run)] == [s.key for s in generate.read_samples(run)]
        if not current:
            print(f"making {run.folder.name}/{name}")
            compute(run)


def _make_rows(
    run: ModelRun, device: machine.DeviceReport, purposes: list[generate.Purpose], part: slice
) -> None:
    """loading.json, and the rows for these purposes; another revision of a model makes all of them again."""
    path, served = run.folder / "loading.json", run.spec.kind == "server"
    old = load.read_report(run) if path.exists() else None
    if old and not served:
        current = (device.device, device.dtype, load.revision_of(run.spec))
        old = old if (old.device, old.dtype, old.revision) == current else None
    if old and not any(None in generate.stored_samples(run, purpose)[part] for purpose in purposes):
        return
    prompts = tasks.prompts_of(run.settings)
    with latency.opened(run) as loaded:
        if served or not old:
            print(f"making {run.folder.name}/{path.name}")
        report = loaded.report
        if isinstance(loaded, Loaded):
            loaded = replace(loaded, report=old or report)
            report = generate.report_of(loaded, prompts, run.settings)
        if served and report.prompt_format == "chat" and tasks.load_task(run.settings.task).likelihoods():
            report = replace(report, notes=(*report.notes, likelihood.PLAIN))
        store.write_json(path, report)
        for purpose in purposes:
            if None in generate.stored_samples(run, purpose)[part]:
                print(f"making {run.folder.name}/{purpose}.jsonl")
                samples = partial(generate.generate_samples, part=part)
                generator = latency.measure_latency if purpose == "latency" else samples
                generator(loaded, prompts, run.settings, run.folder / f"{purpose}.jsonl", limits=run.limits)
