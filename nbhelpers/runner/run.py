"""Several models, one run: 01 to 06 for each, some at a time, then the comparison and the report.

A thread for each model has papermill drive kernels, which are processes of their own: a crash or a hang costs
that notebook only. run.json is up to date after every notebook.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nbhelpers import store
from nbhelpers.devices import device as devices
from nbhelpers.records import Failure, LabError, Limits, ModelRun, NotebookStatus, Result, RunInfo, Settings
from nbhelpers.runner import kernels
from nbhelpers.runner.notebook import COMPARISON, PIPELINE, describe, notebook_path, run_notebook, to_html
from nbhelpers.runner.plan import Plan

LEAST_FREE = 2**20  # bytes of a disk that is not full
GRACE_S = 90.0  # a notebook may take this much longer than a cell's limit: kernel start, saving
LOOK_S = 0.5  # between two looks at the clock
BEFORE = PIPELINE.index("03_generation")  # the notebooks before any prompt is answered
REPORT = "report"  # the step after the comparison; it is in run.json only if it failed
STOPPED = "stopped by --fail-on-error"


# Called when a notebook of a model starts (no status yet) and when it ends.
Watcher = Callable[[str, str, NotebookStatus | None], None]


def run(
    plan: Plan, jobs: int = 1, limits: Limits = Limits(), watch: Watcher = lambda *event: None
) -> RunInfo:
    """Execute a plan, `jobs` models at a time, and return the run's final RunInfo.

    A model that fails is in there as failed, never raised. KeyboardInterrupt kills the kernels and leaves a
    run that can be resumed. Raises LabError where another process is at this run.
    """
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, devices.usable_cores() // jobs))
    with _alone(plan.run_dir):
        info = replace(_mended(plan), jobs=jobs, threads=threads, limits=limits)
        with kernels.environment(threads):
            return _Run(plan, info, watch).execute()


def _mended(plan: Plan) -> RunInfo:
    """Wait for what a killed run left, cut half rows off; a model that lost or failed one passed nothing."""
    torn = set()
    for path in plan.run_dir.glob("*/result.json"):
        with suppress(LabError):  # 06 did not come to its end
            torn |= {path.parent.name} if store.read_json(path, Result).failed else set()
    for rows in plan.run_dir.glob("*/*.jsonl"):
        size = rows.stat().st_size
        with store.appending(rows):
            torn |= {rows.parent.name} if rows.stat().st_size < size else set()
    again = {"", *(model for model, spec in plan.models.items() if spec.slug in torn)}
    return replace(plan.info, notebooks=tuple(s for s in plan.info.notebooks if s.model not in again))


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
        raise LabError(
            f"The run {run_dir} is being executed by process {pid}: wait for it, or stop it first."
        ) from None


class _Run:
    def __init__(self, plan: Plan, info: RunInfo, watch: Watcher) -> None:
        self.folder, self.models, self.info, self.watch = plan.run_dir, plan.models, info, watch
        self.limits, self.log = info.limits, plan.run_dir / kernels.LOG
        self.began = time.monotonic() - (info.seconds or 0.0)
        self.refused = False  # --fail-on-error: no further notebook of a model
        self.ending = False  # whatever fails from now on was killed
        self.able = set[str]()  # models that answer at the next look
        self.deadlines: dict[Path, float] = {}  # log of a running kernel -> when it is killed
        self.pool, self.work = ThreadPoolExecutor(info.jobs), list[Future[None]]()
        self.lock = threading.Lock()

    def execute(self) -> RunInfo:
        self._save()
        try:
            kernels.serve(self.log)
            import papermill  # noqa: F401  # while the server is importing

            from nbhelpers.tracking import mlflow_run

            kernels.start(self.log, mlflow_run.init_database)
            settings, names = replace(self.info.settings, run_dir=str(self.folder)), slice(0, None)
            if self.info.looks:
                settings, names = self._until_decided(settings), slice(BEFORE, None)
            self._together(self._pipeline, self._runs(settings), PIPELINE[names])
            given = {"run_dir": str(self.folder)}
            self.work = [self.pool.submit(self._notebooks, "", self.folder, (COMPARISON,), given)]
            self._follow()
            self._save()  # the report reads it
            if kernels.start(self.log, write_pages, self.folder).wait(self.limits.cell_s) != 0:
                problem = f"the report was not written; see {self.log.name}"
                failed = NotebookStatus(REPORT, "", "failed", 0.0, problem, Failure.OTHER)
                self._save(with_disk(failed, self.folder))
        finally:
            self.ending = True
            self._follow()
            self.pool.shutdown()
            kernels.kill()
            self._save()
        return self.info

    def _runs(self, settings: Settings) -> list[ModelRun]:
        given = ((replace(settings, model=model), spec) for model, spec in self.models.items())
        return [ModelRun(own, spec, self.folder / spec.slug, self.limits) for own, spec in given]

    def _until_decided(self, settings: Settings) -> Settings:
        """Have all models answer more prompts, look by look, until no pair waits; the settings of the last.

        A look makes what is missing and compares: a resumed run comes to where it was.
        """
        from nbhelpers.comparison import compare

        self._together(self._pipeline, self._runs(settings), PIPELINE[:BEFORE])
        passed = {(s.model, s.notebook) for s in self.info.notebooks if s.status == "passed"}
        self.able = {model for model in self.models if (model, PIPELINE[BEFORE - 1]) in passed}
        for prompts in self.info.looks:
            settings = replace(settings, limit=prompts)
            self._together(self._answer, [r for r in self._runs(settings) if r.settings.model in self.able])
            if settled(self.info, [r for r in self._runs(settings) if r.settings.model in self.able]):
                break
        results = compare.read_results(self.folder)[0]  # before a resume, perhaps of fewer prompts
        stale = {r.settings.model for r in results if r.settings.limit != settings.limit}
        kept = (s for s in self.info.notebooks if s.model not in stale or s.notebook in PIPELINE[:BEFORE])
        self.info = replace(self.info, notebooks=tuple(kept))
        return settings

    def _answer(self, run: ModelRun) -> None:
        """A model's answers to the prompts of a look, and their scores. Notebook 03 will say what failed."""
        from nbhelpers import pipeline

        log = run.folder / kernels.LOG
        self.watch(run.settings.model, f"{run.settings.limit} prompts", None)
        self.deadlines[log] = time.monotonic() + self.limits.cell_s + GRACE_S
        if self.ending or kernels.start(log, pipeline.make, run, "scores").wait(None) != 0:
            self.able.discard(run.settings.model)
        del self.deadlines[log]

    def _pipeline(self, run: ModelRun, names: Sequence[str]) -> None:
        self._notebooks(run.settings.model, run.folder, names, asdict(run.settings))

    def _together(self, task: Callable[..., None], runs: Sequence[ModelRun], *more: Any) -> None:
        """A task for each of the models, as many at a time as there are jobs."""
        self.work = [self.pool.submit(task, run, *more) for run in runs]
        self._follow()

    def _follow(self) -> None:
        """Wait for threads and kill the kernels that pass their deadline; all of them at the end."""
        while wait(self.work, LOOK_S).not_done:
            for log, deadline in list(self.deadlines.items()):
                if self.ending or time.monotonic() > deadline:
                    kernels.kill(log)
        for future in () if self.ending else self.work:
            future.result()

    def _notebooks(self, model: str, folder: Path, names: Sequence[str], parameters: dict[str, Any]) -> None:
        """What has not passed of some notebooks, in order; what follows a failure is skipped."""
        passed = {s.notebook for s in self.info.notebooks if s.model == model and s.status == "passed"}
        earlier = PIPELINE[: PIPELINE.index(names[0])] if model else ()
        failed = next((name for name in earlier if name not in passed), "")
        for name in names:
            output = folder / f"{name}.ipynb"
            if self.ending or (name in passed and output.exists()):
                continue
            if failed or (model and self.refused):
                reason = STOPPED if self.refused else f"{failed} failed"
                self._save(NotebookStatus(name, model, "skipped", 0.0, reason))
            elif (status := self._notebook(output, parameters, model)).status == "failed":
                failed = name
                first = self.limits.fail_on_error.count == 1 and status.failure is not Failure.TRACKING
                self.refused |= first or status.failure is Failure.STOPPED

    def _notebook(self, output: Path, parameters: dict[str, Any], model: str) -> NotebookStatus:
        """How one notebook went, within its limits."""
        began, most, log = time.monotonic(), self.limits.cell_s + GRACE_S, output.with_name(kernels.LOG)
        self.watch(model, output.stem, None)
        self.deadlines[log] = deadline = began + most
        try:
            status = run_notebook(notebook_path(output.stem), output, parameters, self.limits.cell_s, model)
            if output.exists():
                to_html(output)
        except Exception as problem:  # wrong parameters, a full disk: no reason to stop the other models
            seconds = round(time.monotonic() - began, 3)
            status = NotebookStatus(output.stem, model, "failed", seconds, *describe(problem))
        del self.deadlines[log]
        if status.status == "failed" and time.monotonic() > deadline:
            error = f"stopped by the runner after {most:.0f} s"
            status = replace(status, error=error, failure=Failure.TIMEOUT)
        status = with_disk(status, self.folder)
        self._save(status)
        return status

    def _save(self, *new: NotebookStatus) -> None:
        """Write run.json, with what came of these notebooks unless the run is ending."""
        with self.lock:
            new = () if self.ending else new
            seconds = round(time.monotonic() - self.began, 1)
            how = f"plain: {kernels.plain}" if kernels.plain else "forked"
            latest = {(s.model, s.notebook): s for s in (*self.info.notebooks, *new)}
            notebooks = tuple(latest.values())
            self.info = replace(self.info, notebooks=notebooks, seconds=seconds, kernels=how)
            store.write_json(self.folder / "run.json", self.info)
        for status in new:
            self.watch(status.model, status.notebook, status)


def settled(info: RunInfo, runs: Sequence[ModelRun]) -> bool:
    """Whether every pair of these models has a verdict after the prompts that they have scores of."""
    from nbhelpers.comparison.compare import MARGIN
    from nbhelpers.loading import load
    from nbhelpers.scoring import rubric
    from nbhelpers.stats import estimate, sequential

    runs = [run for run in runs if load.read_report(run).quality_applies]
    scores = [estimate.by_prompt(rubric.read_scores(run), rubric.PRIMARY) for run in runs]
    shared = set(scores[0]).intersection(*scores[1:]) if scores else set()
    per_model = {run.folder.name: {p: own[p] for p in shared} for run, own in zip(runs, scores, strict=True)}
    pairs = sequential.compare_in_order(per_model, sequential.looks_of(info), info.looks[-1], MARGIN)
    return all(pair.verdict != "cannot tell" for pair in pairs)


def with_disk(status: NotebookStatus, folder: Path) -> NotebookStatus:
    """A failure with what may be behind it: a process that dies of a full disk cannot even write why."""
    if status.status != "failed" or shutil.disk_usage(folder).free > LEAST_FREE:
        return status
    return replace(status, error=f"{status.error}; no space is left on the disk of {folder}")


def write_pages(run_dir: Path) -> None:
    """The run's report; then the index of runs and MLflow, whose trouble must not cost the report."""
    from nbhelpers.report import html
    from nbhelpers.tracking import mlflow_run

    html.write_report(run_dir)
    for step in (lambda: html.write_runs_index(run_dir.parent), lambda: mlflow_run.attach(run_dir)):
        try:
            step()
        except LabError as error:
            print(f"the report was written, but: {error}", file=sys.stderr)
