"""What a run will do: models, settings and folder, all checked before anything is made."""

from __future__ import annotations

import os
import platform
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from nbhelpers import registry, store
from nbhelpers.devices import device as devices
from nbhelpers.loading.folder import inspect
from nbhelpers.records import LabError, ModelSpec, RunInfo, Settings
from nbhelpers.runner.notebook import COMPARISON, PIPELINE, notebook_path

SMALL_PARAMETERS = 50_000_000  # up to this size two models at a time are no burden


@dataclass(frozen=True)
class Plan:
    """A validated run that has not started."""

    run_dir: Path
    info: RunInfo

    @property
    def models(self) -> dict[str, ModelSpec]:
        return dict(zip(self.info.models, self.info.specs, strict=True))


def missing_notebooks() -> list[str]:
    """A sentence for each notebook of a run that is not there."""
    paths = (notebook_path(name) for name in (*PIPELINE, COMPARISON))
    missing = "The notebook notebooks/{} is missing: restore it from the repository."
    return [missing.format(path.name) for path in paths if not path.is_file()]


def plan_run(models: Sequence[str], settings: Settings, out: str = "", until_decided: bool = False) -> Plan:
    """Check models, prompts and the output folder. Raises LabError.

    until_decided: the prompts are asked in a random order, which the folder keeps as its file of prompts.
    """
    from nbhelpers.stats.sequential import plan_looks

    for problem in missing_notebooks():
        raise LabError(problem)
    prompts = registry.load_prompts(settings.prompts, settings.limit)
    names = models or registry.embedded_models()
    specs = tuple(registry.tell_apart(inspect(registry.resolve(name)) for name in names))
    slugs = [spec.slug for spec in specs]
    if twice := {slug for slug in slugs if slugs.count(slug) > 1}:
        raise LabError(f"Two models would write to the same folder {twice.pop()!r}: name each model once.")
    started = datetime.now(UTC)
    run_dir = Path(out).resolve() if out else store.outputs_dir() / started.strftime("%Y%m%d-%H%M%S")
    if (run_dir / "run.json").exists():
        hint = "continue it with --resume, or choose another --out"
        raise LabError(f"The folder {run_dir} already holds a run: {hint}.")
    if until_decided:
        if len(specs) < 2:
            raise LabError("The option --until-decided compares models: name at least two.")
        random.Random(settings.seed).shuffle(prompts)
        path = store.write_rows(run_dir / "prompts.jsonl", prompts)
        settings = replace(settings, prompts=str(path), limit=None)
    if settings.prompts:
        settings = replace(settings, prompts=str(Path(settings.prompts).expanduser().resolve()))
    info = RunInfo(
        run=run_dir.name,
        # A folder by its full path, so that the run can be resumed from any working directory.
        models=tuple(s.source if s.kind == "local" else n for n, s in zip(names, specs, strict=True)),
        settings=replace(settings, model="", run_dir=""),
        started=started.isoformat(timespec="seconds"),
        seconds=None,
        versions=devices.versions(),
        machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        git_commit=_git_commit(),
        specs=specs,
        prompts=registry.digests(prompts),
        looks=plan_looks(len(prompts)) if until_decided else (),
    )
    return Plan(run_dir, info)


def plan_resume(run: str) -> Plan:
    """The rest of an earlier run, by folder or by name below outputs/ ("latest" is the newest)."""
    run_dir = find_run(run)
    info = store.read_json(run_dir / "run.json", RunInfo)
    if len(info.specs) != len(info.models):  # older runs kept only the names
        info = replace(info, specs=tuple(inspect(registry.resolve(name)) for name in info.models))
    prompts = registry.load_prompts(info.settings.prompts, info.settings.limit)
    info = replace(info, prompts=info.prompts or registry.digests(prompts))  # older runs kept none
    registry.check_unchanged(prompts, info)
    return Plan(run_dir, info)


def find_run(run: str) -> Path:
    """The folder of a run, given its path, its name below outputs/, or "latest"."""
    known = sorted(p.parent for p in store.outputs_dir().glob("*/run.json"))
    if run == "latest" and known:
        return max(known, key=_started)
    for folder in (Path(run), store.outputs_dir() / run):
        if (folder / "run.json").is_file():
            return folder.resolve()
    names = ", ".join(p.name for p in known[-5:]) or "none yet"
    raise LabError(f"There is no run {run!r}: give a folder with a run.json or one of these: {names}.")


def _started(folder: Path) -> str:
    try:
        return store.read_json(folder / "run.json", RunInfo).started
    except LabError:  # an unreadable run is never the latest
        return ""


def _git_commit() -> str | None:
    command = ["git", "-C", str(store.project_root()), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def default_jobs(plan: Plan) -> int:
    """Two models at a time where all are small and run on a CPU with several cores, otherwise one.

    Much of a small model's run is kernel start and imports, which a second core can share: two at a time were
    1.4 times as fast as one with all threads (``run`` in docs/bench.json). Large models and accelerators
    would fight over memory. Every model gets its share of the cores.
    """
    device = plan.info.settings.device
    accelerator = sys.platform == "darwin" or shutil.which("nvidia-smi") is not None
    on_cpu = device == "cpu" or (device == "auto" and not accelerator)
    small = all(0 < (spec.parameters or 0) <= SMALL_PARAMETERS for spec in plan.info.specs)
    return 2 if on_cpu and small and devices.usable_cores() > 1 and len(plan.info.specs) > 1 else 1
