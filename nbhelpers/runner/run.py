"""Several models, one run: a worker process per model, then the comparison and the report.

The runner itself stays light (no torch, no papermill). It validates everything before it makes anything,
keeps run.json up to date after every notebook, and kills what passes its limit.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from nbhelpers import registry, store
from nbhelpers.devices import device as devices
from nbhelpers.devices.device import usable_cores
from nbhelpers.loading.folder import inspect
from nbhelpers.records import LabError, ModelSpec, NotebookStatus, Result, RunInfo, Settings
from nbhelpers.runner.limits import Limits
from nbhelpers.runner.notebook import KERNEL_ENVIRONMENT
from nbhelpers.runner.processes import Children, kill_tree
from nbhelpers.runner.worker import COMPARISON, PIPELINE, notebook_path

DEVICES = ("auto", "cpu", "cuda", "mps", "xpu")
DTYPES = ("auto", "float32", "float16", "bfloat16")
SMALL_PARAMETERS = 50_000_000  # up to this size two models at a time are no burden
GRACE_S = 90.0  # a worker may take this much longer than a cell's limit: kernel start, saving, HTML
WORKER = ("-m", "nbhelpers.runner.worker")
DATABASE = ("-c", "from nbhelpers.tracking.mlflow_run import init_database; init_database()")
STOPPED = "stopped by --fail-on-error"
REPORT = "report"  # the step after the comparison; it is in run.json only if it failed


@dataclass(frozen=True)
class Event:
    """What the runner tells whoever watches: a notebook started (no status) or ended."""

    model: str
    notebook: str
    status: NotebookStatus | None = None


@dataclass(frozen=True)
class Plan:
    """A validated run that has not started."""

    run_dir: Path
    specs: tuple[ModelSpec, ...]
    info: RunInfo
    samples_per_model: int


Watcher = Callable[[Event], None]


def plan_run(models: Sequence[str], settings: Settings, out: str = "") -> Plan:
    """Check models, prompts, settings and the output folder. Raises LabError."""
    _check_settings(settings)
    prompts = registry.load_prompts(settings.prompts, settings.limit)
    names = models or registry.embedded_models()
    specs = tuple(inspect(registry.resolve(name)) for name in names)
    slugs = [spec.slug for spec in specs]
    if twice := {slug for slug in slugs if slugs.count(slug) > 1}:
        raise LabError(f"two models would write to the same folder {twice.pop()!r}: name each model once.")
    started = datetime.now(UTC)
    run_dir = Path(out).resolve() if out else store.outputs_dir() / started.strftime("%Y%m%d-%H%M%S")
    if (run_dir / "run.json").exists():
        raise LabError(f"{run_dir} already holds a run: continue it with --resume, or choose another --out.")
    _check_writable(run_dir)
    if settings.prompts:
        prompts_file = str(Path(settings.prompts).expanduser().resolve())
        settings = dataclasses.replace(settings, prompts=prompts_file)
    info = RunInfo(
        run=run_dir.name,
        # A folder by its full path, so that the run can be resumed from any working directory.
        models=tuple(s.source if s.kind == "local" else n for n, s in zip(names, specs, strict=True)),
        settings=dataclasses.replace(settings, model="", run_dir=""),
        started=started.isoformat(timespec="seconds"),
        seconds=None,
        versions=devices.versions(),
        machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        git_commit=_git_commit(),
        specs=specs,
    )
    return Plan(run_dir, specs, info, len(prompts) * settings.repeats)


def plan_resume(run: str) -> Plan:
    """The rest of an earlier run, by folder or by name below outputs/ ("latest" is the newest)."""
    run_dir = find_run(run)
    info = store.read_json(run_dir / "run.json", RunInfo)
    specs = info.specs or tuple(inspect(registry.resolve(name)) for name in info.models)
    prompts = registry.load_prompts(info.settings.prompts, info.settings.limit)
    return Plan(run_dir, specs, info, len(prompts) * info.settings.repeats)


def find_run(run: str) -> Path:
    """The folder of a run, given its path, its name below outputs/, or "latest"."""
    known = sorted(p.parent for p in store.outputs_dir().glob("*/run.json"))
    if run == "latest" and known:
        return max(known, key=_started)
    for folder in (Path(run), store.outputs_dir() / run):
        if (folder / "run.json").is_file():
            return folder.resolve()
    names = ", ".join(p.name for p in known[-5:]) or "none yet"
    raise LabError(f"no run {run!r}: give a folder with a run.json or one of these: {names}.")


def default_jobs(plan: Plan) -> int:
    """Two models at a time where all are small and run on a CPU with several cores, otherwise one.

    Much of a small model's run is kernel start and imports, which a second core can share: two at a time were
    1.4 times as fast as one with all threads (``run`` in docs/bench.json). Large models and accelerators
    would fight over memory. Every worker gets its share of the cores.
    """
    device = plan.info.settings.device
    accelerator = sys.platform == "darwin" or shutil.which("nvidia-smi") is not None
    on_cpu = device == "cpu" or (device == "auto" and not accelerator)
    small = all(0 < (spec.parameters or 0) <= SMALL_PARAMETERS for spec in plan.specs)
    return 2 if on_cpu and small and devices.usable_cores() > 1 and len(plan.specs) > 1 else 1


def run(plan: Plan, jobs: int = 1, limits: Limits | None = None, watch: Watcher | None = None) -> RunInfo:
    """Execute a plan: 01 to 06 for each model, `jobs` models at a time, then 07 and the HTML report.

    Returns the run's final RunInfo; a model that fails is in there as failed, never raised.
    KeyboardInterrupt kills the workers and leaves a run that can be resumed. Raises LabError where another
    process is at this run.
    """
    with _alone(plan.run_dir):
        mended = dataclasses.replace(plan, info=_mended(plan))
        return _Runner(mended, jobs, limits or Limits(), watch or (lambda event: None)).run()


def _mended(plan: Plan) -> RunInfo:
    """Wait for what a killed run left, cut half rows off; a model that lost or failed one passed nothing."""
    torn = {path.parent.name for path in plan.run_dir.glob("*/result.json") if _samples_failed(path)}
    for rows in plan.run_dir.glob("*/*.jsonl"):
        size = rows.stat().st_size
        with store.appending(rows):
            torn |= {rows.parent.name} if rows.stat().st_size < size else set()
    again = {m for m, spec in zip(plan.info.models, plan.specs, strict=True) if spec.slug in torn}
    kept = tuple(s for s in plan.info.notebooks if s.model not in again)
    return dataclasses.replace(plan.info, notebooks=kept)


def _samples_failed(path: Path) -> bool:
    try:
        return store.read_json(path, Result).failed > 0
    except LabError:  # 06 did not come to its end
        return False


@contextmanager
def _alone(run_dir: Path) -> Iterator[None]:
    """Be the only runner of a folder. The system frees the lock of a dead process, so none is ever stale."""
    from filelock import FileLock, Timeout

    run_dir.mkdir(parents=True, exist_ok=True)
    runner = run_dir / ".runner"
    try:
        with FileLock(run_dir / ".lock", timeout=0):
            store.write_text(runner, [str(os.getpid())])
            yield
    except Timeout:
        pid = runner.read_text() if runner.exists() else "unknown"
        raise LabError(f"{run_dir} is being run by process {pid}: wait for it, or stop it first.") from None


class _Runner:
    def __init__(self, plan: Plan, jobs: int, limits: Limits, watch: Watcher) -> None:
        self.plan, self.jobs, self.limits, self.watch = plan, jobs, limits, watch
        self.patience = limits.cell_s + GRACE_S
        self.stopped = False  # by --fail-on-error
        self.info = plan.info
        self.lock = threading.Lock()
        self.children = Children(max(1, devices.usable_cores() // jobs), preload=KERNEL_ENVIRONMENT)
        self.children.environment |= limits.environment()
        self.started = time.monotonic() - (plan.info.seconds or 0.0)

    def run(self) -> RunInfo:
        self._save()
        # Outside the group that is stopped on Ctrl-C: half a migration would spoil the database for good.
        databases = Children(threads=1)
        database = databases.start(*DATABASE)
        pool = ThreadPoolExecutor(self.jobs)
        try:
            work = zip(self.info.models, self.plan.specs, strict=True)
            list(pool.map(lambda item: self._model(*item), work))
            self._supervise("", self.plan.run_dir / "worker.log", (COMPARISON,))
            self._report()
            databases.wait(database, self.patience)  # long done, unless a tracking server does not answer
        finally:
            self.children.stop()
            pool.shutdown(cancel_futures=True)
            self._save()
        return self.info

    def _model(self, model: str, spec: ModelSpec) -> None:
        log = self.plan.run_dir / spec.slug / "worker.log"
        if self.stopped:
            self._close(model, self._pending(model, PIPELINE, set()), "", "")
        else:
            self._supervise(model, log, PIPELINE)

    def _supervise(self, model: str, log: Path, notebooks: tuple[str, ...]) -> None:
        """Follow one worker's events; kill it when a notebook or the whole model passes its limit."""
        log.parent.mkdir(parents=True, exist_ok=True)
        arguments = [str(self.plan.run_dir), str(self.limits.cell_s), *([model] if model else [])]
        said, current, problem = set(), None, f"the worker process died; see {log.parent.name}/{log.name}"
        end = time.monotonic() + self.limits.model_s
        with log.open("a", encoding="utf-8") as errors:
            reader, writer = os.pipe()
            with os.fdopen(writer, "w") as events:
                child = self.children.start(*WORKER, *arguments, stdout=events, stderr=errors)
            lines: queue.Queue[str | None] = queue.Queue()
            threading.Thread(target=_pump, args=(reader, lines), daemon=True).start()
            while True:
                left = min(self.patience, end - time.monotonic())
                try:
                    line = lines.get(timeout=max(0.0, left))
                except queue.Empty:
                    kill_tree(child.pid)
                    limit = f"{self.limits.model_s:.0f} s for a model" if left < self.patience else ""
                    problem = f"stopped by the runner after {limit or f'{self.patience:.0f} s'}"
                    break
                if line is None:
                    break
                event = json.loads(line)
                if "problem" in event:
                    problem = event["problem"]
                elif "start" in event:
                    current = event["start"]
                    self.watch(Event(model, current))
                else:
                    current = None
                    said.add(event["notebook"])
                    self._record(NotebookStatus(**event))
                if model and self.stopped:
                    kill_tree(child.pid)
                    break
            self.children.wait(child, self.patience)
        unsaid = [n for n in notebooks if n == current or n in self._pending(model, notebooks, said)]
        if unsaid and not self.children.stopping:
            self._close(model, unsaid, current or unsaid[0], problem)

    def _pending(self, model: str, notebooks: tuple[str, ...], said: set[str]) -> list[str]:
        passed = {s.notebook for s in self.info.notebooks if s.model == model and s.status == "passed"}
        return [name for name in notebooks if name not in said | passed]

    def _report(self) -> None:
        """Write the report once run.json is complete, in a process of its own: plots and MLflow are heavy."""
        log = self.plan.run_dir / "worker.log"
        with self.lock:
            earlier = tuple(s for s in self.info.notebooks if s.notebook != REPORT)
            self.info = dataclasses.replace(self.info, notebooks=earlier)
        self._save()
        with log.open("a", encoding="utf-8") as errors:
            child = self.children.start(*WORKER, str(self.plan.run_dir), REPORT, stdout=errors, stderr=errors)
            status = self.children.wait(child, self.patience)
        if status != 0:
            problem = f"the report was not written; see {log.name}"
            self._record(NotebookStatus(REPORT, "", "failed", 0.0, problem))

    def _close(self, model: str, unsaid: list[str], failed: str, problem: str) -> None:
        """What the worker left unsaid: one notebook failed, and the rest is skipped."""
        for name in unsaid:
            if model and self.stopped:
                self._record(NotebookStatus(name, model, "skipped", 0.0, STOPPED))
            elif name == failed:
                self._record(NotebookStatus(name, model, "failed", 0.0, problem))
            else:
                self._record(NotebookStatus(name, model, "skipped", 0.0, f"{failed} failed"))

    def _record(self, status: NotebookStatus) -> None:
        with self.lock:
            wanted = self.limits.fail_on_error == 1 or STOPPED in (status.error or "")
            self.stopped |= status.status == "failed" and wanted
            others = [
                s for s in self.info.notebooks if (s.model, s.notebook) != (status.model, status.notebook)
            ]
            self.info = dataclasses.replace(self.info, notebooks=(*others, status))
        self._save()
        self.watch(Event(status.model, status.notebook, status))

    def _save(self) -> None:
        with self.lock:
            self.info = dataclasses.replace(
                self.info,
                seconds=round(time.monotonic() - self.started, 1),
                jobs=self.jobs,
                threads=self.children.environment["OMP_NUM_THREADS"],
                kernels=f"plain: {self.children.plain}" if self.children.plain else "forked",
            )
            store.write_json(self.plan.run_dir / "run.json", self.info)


def _pump(reader: int, lines: queue.Queue[str | None]) -> None:
    with os.fdopen(reader) as events:
        for line in events:
            lines.put(line)
    lines.put(None)


def _check_settings(settings: Settings) -> None:
    for name in ("repeats", "max_new_tokens"):
        if getattr(settings, name) < 1:
            flag = name.replace("_", "-")
            raise LabError(f"--{flag} must be at least 1, not {getattr(settings, name)}.")
    if settings.device not in DEVICES:
        raise LabError(f"unknown device {settings.device!r}: choose one of {', '.join(DEVICES)}.")
    if settings.dtype not in DTYPES:
        raise LabError(f"unknown dtype {settings.dtype!r}: choose one of {', '.join(DTYPES)}.")
    for name in (*PIPELINE, COMPARISON):
        if not notebook_path(name).is_file():
            raise LabError(f"notebooks/{name}.ipynb is missing: restore it from the repository.")


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = error.strerror or error
        raise LabError(f"cannot write to {folder} ({reason}): choose another folder with --out.") from None


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
