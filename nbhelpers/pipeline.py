"""One model's files, from device.json to result.json: what a name means, and what is still missing.

A notebook opens its run, makes what is missing in one visible call, and only reads from there on.
"""

from __future__ import annotations

from typing import Literal, get_args

from nbhelpers import registry, store
from nbhelpers.devices import device
from nbhelpers.generation import generate
from nbhelpers.loading import load
from nbhelpers.loading.folder import inspect
from nbhelpers.records import ModelRun, RunInfo, Settings
from nbhelpers.scoring import rubric
from nbhelpers.tracking import result

Step = Literal["device", "loading", "samples", "latency", "scores", "stats", "result"]
STEPS: tuple[Step, ...] = get_args(Step)


def open_run(settings: Settings) -> ModelRun:
    """What these settings work on. The runner has resolved the model and written it to run.json.

    A folder without a run.json is a notebook run alone: the name is resolved here. Raises LabError for a
    name that means nothing and for a model that cannot be used.
    """
    folder = store.run_dir(settings)
    if (folder / "run.json").exists():
        info = store.read_json(folder / "run.json", RunInfo)
        specs = dict(zip(info.models, info.specs, strict=False))
        if (spec := specs.get(settings.model)) is not None:
            return ModelRun(settings, spec, folder / spec.slug, info.limits)
    spec = inspect(registry.resolve(settings.model))
    return ModelRun(settings, spec, folder / spec.slug)


def make(run: ModelRun, through: Step) -> None:
    """Make what is missing of a model's files, up to ``through``, and print what was made.

    What is there and answers these settings stays. Texts and latencies are made with one load of the model.
    """
    makers = {
        "device": device.device_for,
        "loading": load.report_for,
        "samples": generate.samples_for,
        "latency": generate.latency_for,
        "scores": rubric.scores_for,
        "stats": result.stats_for,
        "result": result.summarise,
    }
    for step in STEPS[: STEPS.index(through) + 1]:
        makers[step](run.settings)
