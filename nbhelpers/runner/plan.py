"""What a run will do: models, settings and folder, all checked before anything is made."""

import os
import platform
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nbhelpers import registry, store, tasks
from nbhelpers.devices import machine
from nbhelpers.generation import likelihood
from nbhelpers.loading.checkpoint import inspect
from nbhelpers.phases import NOTEBOOKS, Phase
from nbhelpers.records import LabError, ModelSpec, NotebookStatus, Result, RunInfo, Settings

SMALL_PARAMETERS = 50_000_000  # up to this size two models at a time are no burden


@dataclass(frozen=True)
class Plan:
    """A validated run that has not started."""

    run_dir: Path
    info: RunInfo

    @property
    def models(self) -> dict[str, ModelSpec]:
        return dict(zip(self.info.models, self.info.specs, strict=True))


def plan_run(models: Sequence[str], settings: Settings, out: str = "", until_decided: bool = False) -> Plan:
    """Check models, prompts and the output folder. Raises LabError.

    until_decided: the prompts are asked in a random order, which the folder keeps as its file of prompts.
    """
    settings = absolute(settings)
    prompts, task = tasks.items(settings), tasks.load_task(settings.task)
    if task is not tasks.POSTS:
        from nbhelpers.scoring import reference

        reference.check_scorers(task)
    names = models or registry.embedded_models()
    specs = tuple(registry.tell_apart(inspect(registry.resolve(name)) for name in names))
    if settings.top_k and any(spec.kind == "server" for spec in specs):
        raise LabError("A server's model takes no --top-k: leave it out, or use --top-p.")
    for spec in specs:
        if spec.kind == "server":
            likelihood.check_server(spec, task.likelihoods())
    slugs = [spec.slug for spec in specs]
    if twice := {slug for slug in slugs if slugs.count(slug) > 1}:
        raise LabError(f"Two models would write to the same folder {twice.pop()!r}: name each model once.")
    started = datetime.now(UTC)
    run_dir = Path(out).resolve() if out else store.outputs_dir() / started.strftime("%Y%m%d-%H%M%S")
    if (run_dir / "run.json").exists():
        hint = "continue it with --resume, or choose another --out"
        raise LabError(f"The folder {run_dir} already holds a run: {hint}.")
    looks: tuple[int, ...] = ()
    if until_decided:
        from nbhelpers.stats.sequential import plan_looks

        if len(specs) < 2:
            raise LabError("The option --until-decided compares models: name at least two.")
        if any(prompt.cluster for prompt in prompts):
            raise LabError("The option --until-decided takes prompts one by one: leave it out with clusters.")
        random.Random(settings.seed).shuffle(prompts)
        path = store.write_rows(run_dir / "prompts.jsonl", prompts)
        settings, looks = replace(settings, prompts=str(path), limit=None), plan_looks(len(prompts))
    commit = ""
    with suppress(OSError):  # no git
        command = ["git", "-C", str(store.project_root()), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout
    info = RunInfo(
        run=run_dir.name,
        # A folder by its full path, so that the run can be resumed from any working directory.
        models=tuple(s.source if s.kind == "local" else n for n, s in zip(names, specs, strict=True)),
        settings=replace(settings, model="", run_dir=""),
        started=started.isoformat(timespec="seconds"),
        seconds=None,
        versions=machine.versions(),
        machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        git_commit=commit.strip() or None,
        specs=specs,
        prompts=registry.digests(tasks.prompts_of(settings)),
        task=task.digest,
        looks=looks,
    )
    return Plan(run_dir, info)


def absolute(settings: Settings) -> Settings:
    """The same settings with the full paths of their files, which hold from any working directory."""
    names = {"prompts": settings.prompts, "task": "" if settings.task in tasks.shipped() else settings.task}
    paths = {field: store.user_path(name).resolve() for field, name in names.items()}
    found: dict[str, Any] = {field: str(path) for field, path in paths.items() if path.is_file()}
    return replace(settings, **found)


def plan_resume(run: str) -> Plan:
    """The rest of an earlier run, by folder or by name below outputs/ ("latest" is the newest)."""
    run_dir = find_run(run)
    info = store.read_json(run_dir / "run.json", RunInfo)
    if len(info.specs) != len(info.models):  # older runs kept only the names
        info = replace(info, specs=tuple(inspect(registry.resolve(name)) for name in info.models))
    prompts = tasks.prompts_of(info.settings)
    info = replace(info, prompts=info.prompts or registry.digests(prompts))  # older runs kept none
    tasks.check_unchanged(info, info.settings)
    return Plan(run_dir, info)


def still_valid(plan: Plan) -> tuple[NotebookStatus, ...]:
    """What has passed before, once half rows are cut off: nothing of a model that lost or failed a row, and
    no more than its answers where a file that decides their scores has changed."""
    from nbhelpers.scoring import reference

    scorers = reference.files(tasks.load_task(plan.info.settings.task))
    changed = max((file.stat().st_mtime for file in scorers), default=0.0)
    scores = plan.run_dir.glob("*/scores.jsonl")
    stale = {path.parent.name for path in scores if path.stat().st_mtime < changed}
    incomplete = set[str]()
    for path in plan.run_dir.glob("*/result.json"):
        with suppress(LabError):  # 06 did not come to its end
            if store.read_json(path, Result).failed:
                incomplete.add(path.parent.name)
    for path in plan.run_dir.glob("*/*.jsonl"):
        if path.is_dir():  # the notebook that writes the file will say so
            incomplete.add(path.parent.name)
            continue
        size = path.stat().st_size
        with store.appending(path):  # waits for what a killed run left
            if path.stat().st_size < size:
                incomplete.add(path.parent.name)
    for unfinished in plan.run_dir.rglob(f".*.{'[0-9a-f]' * 32}"):  # store.write_text was killed
        unfinished.unlink(missing_ok=True)
    slugs = {model: spec.slug for model, spec in plan.models.items() if spec.slug not in incomplete}
    passed = (s for s in plan.info.notebooks if s.status == "passed" and s.model in slugs)
    return tuple(s for s in passed if NOTEBOOKS[s.notebook] < Phase.SCORES or slugs[s.model] not in stale)


def find_run(run: str) -> Path:
    """The folder of a run, given its path, its name below outputs/, or "latest" (the one last worked on)."""
    runs = sorted(store.outputs_dir().glob("*/run.json"), key=lambda path: path.stat().st_mtime)
    if run == "latest" and runs:
        return runs[-1].parent
    for folder in (Path(run), store.outputs_dir() / run):
        if (folder / "run.json").is_file():
            return folder.resolve()
    names = ", ".join(path.parent.name for path in runs[-5:]) or "none yet"
    raise LabError(f"There is no run {run!r}: give a folder with a run.json or one of these: {names}.")


def default_jobs(plan: Plan) -> int:
    """Two models at a time where all are small and run on a CPU with several cores, otherwise one.

    Much of a small model's run is kernel start and imports, which a second core can share (``run`` in
    docs/bench.json). Large models and accelerators would fight over memory.
    """
    device, specs = plan.info.settings.device, plan.info.specs
    accelerator = sys.platform == "darwin" or shutil.which("nvidia-smi") is not None
    on_cpu = device == "cpu" or (device == "auto" and not accelerator)
    small = len(specs) > 1 and all(0 < (spec.parameters or 0) <= SMALL_PARAMETERS for spec in specs)
    return 2 if on_cpu and small and machine.usable_cores() > 1 else 1
