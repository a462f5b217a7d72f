"""One model's files, from device.json to result.json: what its name means, and what is still missing."""

from collections.abc import Callable
from dataclasses import replace
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
    """What these settings work on. The runner has resolved the model and written it to run.json.

    A folder without a run.json is a notebook run alone: the name is resolved here. Raises LabError for a
    name that means nothing and for a model that cannot be used.
    """
    folder = store.run_dir(settings)
    if info := result.read_info(folder):
        asked = info.settings
        if (settings.task, settings.prompts, settings.limit) == (asked.task, asked.prompts, asked.limit):
            tasks.check_unchanged(info, settings)
        if spec := dict(zip(info.models, info.specs, strict=False)).get(settings.model):
            return ModelRun(settings, spec, folder / spec.slug, info.limits)
    spec = inspect(registry.resolve(settings.model))
    return ModelRun(settings, spec, folder / spec.slug)


def make(run: ModelRun, through: Step) -> None:
    """Make what is missing of a model's files, up to ``through``, and print what is made.

    What is there and answers the settings stays. The model is loaded once, if at all. Raises LabError as
    the steps do.
    """
    wanted = STEPS[: STEPS.index(through) + 1]
    place = machine.make_device(run)
    if "loading" in wanted:
        _make_rows(run, place, [purpose for purpose in get_args(generate.Purpose) if purpose in wanted])
    for step in (step for step in wanted if step in COMPUTED):
        compute, name, sources = COMPUTED[step]
        read = [run.folder / file for file in sources]
        read += reference.files(tasks.load_task(run.settings.task)) if step == "scores" else []
        path, newest = run.folder / name, max(file.stat().st_mtime for file in read)
        made = path.exists() and path.stat().st_mtime >= newest
        if made and step == "scores":  # of fewer prompts, perhaps
            made = [s.key for s in rubric.read_scores(run)] == [s.key for s in generate.read_samples(run)]
        if not made:
            print(f"making {run.folder.name}/{name}")
            compute(run)


def _make_rows(run: ModelRun, place: machine.DeviceReport, purposes: list[generate.Purpose]) -> None:
    """loading.json, and the rows for these purposes; another revision of a model makes all of them again."""
    path, served, old = run.folder / "loading.json", run.spec.kind == "server", None
    if path.exists():
        old, right = load.read_report(run), (place.device, place.dtype)
        if not served and (old.device, old.dtype, old.revision) != (*right, load.revision_of(run.spec)):
            old = None
    if old and not any(None in generate.stored_samples(run, purpose) for purpose in purposes):
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
            if None in generate.stored_samples(run, purpose):
                print(f"making {run.folder.name}/{purpose}.jsonl")
                make = latency.measure_latency if purpose == "latency" else generate.generate_samples
                make(loaded, prompts, run.settings, run.folder / f"{purpose}.jsonl", limits=run.limits)
