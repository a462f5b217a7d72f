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
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from nbhelpers import store, tasks
from nbhelpers.devices import machine
from nbhelpers.phases import COMPARISON, NOTEBOOKS, Phase, pipeline_of
from nbhelpers.records import Failure, LabError, Limits, ModelRun, NotebookStatus, RunInfo, Settings
from nbhelpers.redact import printable
from nbhelpers.runner import kernels, notebook
from nbhelpers.runner.plan import Plan, still_valid

LEAST_FREE = 2**20  # bytes of a disk that is not full
GRACE_S = 90.0  # a notebook may take this much longer than a cell's limit: kernel start, saving
TIMING, REPORT = "timing", "report"  # steps of the whole run; they are in run.json only if they failed
STOPPED = "stopped by --fail-on-error"

Watcher = Callable[[NotebookStatus], None]  # called when a notebook ends


def run_models(
    plan: Plan,
    jobs: int = 1,
    limits: Limits = Limits(),
    watch: Watcher = lambda status: None,
    spread: Callable[[Run], None] | None = None,
) -> RunInfo:
    """Execute a plan, `jobs` models at a time, and return the run's final RunInfo.

    spread: makes first what it can elsewhere (``cluster.join_cluster``). A model that fails is in the result.
    KeyboardInterrupt kills the kernels and leaves a run that can be resumed. Raises LabError where another
    process executes this run.
    """
    from filelock import FileLock, Timeout

    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, machine.usable_cores() // jobs))
    start_method = "forked" if kernels.FORKS else "plain"
    info = replace(plan.info, jobs=jobs, threads=threads, kernels=start_method, limits=limits)
    plan.run_dir.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(plan.run_dir / ".lock", timeout=0), kernels.environment(threads):
            notebooks = still_valid(plan) if (plan.run_dir / "run.json").exists() else ()
            return Run(plan, replace(info, notebooks=notebooks), watch).execute(spread)
    except Timeout:
        busy = f"The run {plan.run_dir} is being executed by another process"
        raise LabError(f"{busy}: wait, or stop it.") from None


class Run:
    def __init__(self, plan: Plan, info: RunInfo, watch: Watcher) -> None:
        self.folder, self.models, self.info, self.watch = plan.run_dir, plan.models, info, watch
        self.limits, self.jobs = info.limits, info.jobs or 1
        self.log = plan.run_dir / kernels.LOG
        self.began = time.monotonic() - (info.seconds or 0.0)
        self.next_write = 0.0  # of run.json
        self.refused = False  # --fail-on-error: no further notebook of a model
        self.ending = False  # whatever fails from now on was killed
        self.lock = threading.Lock()
        self.futures = list[Future[bool]]()

    def execute(self, spread: Callable[[Run], None] | None) -> RunInfo:
        self.save()
        try:
            kernels.serve(self.log)  # it imports for seconds; meanwhile this process does
            notebook.engine(), notebook.exporter()
            import nbhelpers.report.html  # noqa: F401  # for the outcome
            from nbhelpers.generation import latency
            from nbhelpers.tracking import mlflow_run

            database = kernels.start(self.log, mlflow_run.init_database)
            settings = replace(self.info.settings, run_dir=str(self.folder))
            if spread:
                spread(self)
            runs = self.runs(settings)
            passed = self._together(partial(self.pipeline, run, end=Phase.ANSWERS) for run in runs)
            loaded = list(compress(runs, passed))
            database.join(GRACE_S)
            timed = len(loaded) < 2 or self.info.nodes  # by 03, each by itself
            if not (timed or self.refused or latency.is_whole(loaded)):
                self._forget_answers()  # they show other timings
                limit_s = self.limits.cell_s * len(loaded) + GRACE_S
                self._step(TIMING, "no timing in turn", limit_s, latency.measure_in_turn, loaded)
            if self.info.looks:
                settings = self._until_decided(settings, {run.settings.model for run in loaded})
            runs = self.runs(settings)
            self._together(partial(self.pipeline, run, Phase.ANSWERS, Phase.SCORES) for run in runs)
            judged = "judge" in tasks.load_task(settings.task).kinds()  # by a model, which may be large
            # No clock runs any more, and kernels that start leave cores idle.
            at_once = self.jobs if judged else 2 * self.jobs
            self._together((partial(self.pipeline, run, Phase.SCORES) for run in runs), at_once)
            parameters = {"run_dir": str(self.folder)}
            self._together([partial(self._notebooks, "", self.folder, (COMPARISON,), parameters)])
            self.save()  # the report reads it
            self._step(REPORT, "the report was not written", self.limits.cell_s, write_pages, self.folder)
        finally:
            self.ending = True
            kernels.kill(self.folder)
            while wait(self.futures, 0.5).not_done:  # a thread was about to start one
                kernels.kill(self.folder)
            self.save()
        return self.info

    def runs(self, settings: Settings) -> list[ModelRun]:
        return [
            ModelRun(replace(settings, model=model), spec, self.folder / spec.slug, self.limits)
            for model, spec in self.models.items()
        ]

    def _together(self, calls: Iterable[Callable[[], bool]], at_once: int = 0) -> list[bool]:
        """What the calls return, so many of them at a time; 0: as many as models of the run."""
        pool = ThreadPoolExecutor(at_once or self.jobs)
        self.futures = [pool.submit(call) for call in calls]
        return [future.result() for future in self.futures]

    def _step(self, name: str, problem: str, limit_s: float, target: Callable[..., object], *of: Any) -> None:
        """Do something for the whole run in a process of its own; run.json says so where it failed."""
        if not self._process(self.log, limit_s, target, *of):
            problem = f"{problem}; see {self.log.name}"
            self.save(NotebookStatus(name, "", "failed", 0.0, problem, Failure.OTHER))

    def _process(self, log: Path, limit_s: float, target: Callable[..., object], *arguments: Any) -> bool:
        """Whether a call in a process of its own succeeds in time; one that takes longer is killed."""
        code = kernels.exit_code(kernels.start(log, target, *arguments), limit_s)
        if code != 0:
            kernels.kill(log)
        return code == 0

    def _forget_answers(self) -> None:
        statuses = self.info.notebooks
        earlier = (s for s in statuses if not s.model or NOTEBOOKS[s.notebook] < Phase.ANSWERS)
        self.info = replace(self.info, notebooks=tuple(earlier))

    def _until_decided(self, settings: Settings, answering: set[str]) -> Settings:
        """Have these models answer more prompts, look by look, until no pair waits; the last look's settings.

        A look makes what is missing and compares: a resumed run comes to where it was. A model that cannot
        answer takes no further part: notebook 03 says what failed.
        """
        from nbhelpers import pipeline
        from nbhelpers.comparison import compare

        def answer(run: ModelRun) -> bool:
            limit_s = self.limits.cell_s + GRACE_S
            return self._process(run.folder / kernels.LOG, limit_s, pipeline.make, run, "scores")

        for prompts in self.info.looks:
            settings = replace(settings, limit=prompts)
            runs = [run for run in self.runs(settings) if run.settings.model in answering]
            runs = list(compress(runs, self._together(partial(answer, run) for run in runs)))
            answering = {run.settings.model for run in runs}
            if compare.settled(self.info, runs):
                break
        self._forget_answers()  # others showed fewer prompts before a resume
        return settings

    def pipeline(self, run: ModelRun, first: Phase = Phase.LOADING, end: Phase = Phase.COMPARISON) -> bool:
        """The notebooks of a model from one phase on and before another."""
        names = [n for n in pipeline_of(run.spec, run.settings.task) if first <= NOTEBOOKS[n] < end]
        return self._notebooks(run.settings.model, run.folder, names, asdict(run.settings))

    def _notebooks(self, model: str, folder: Path, names: Sequence[str], parameters: dict[str, Any]) -> bool:
        """Execute what is left of some notebooks, skip what follows a failure, and say whether all passed."""
        done = {s.notebook: s.status for s in self.info.notebooks if s.model == model}
        failed = next((name for name, status in done.items() if status != "passed" and name != TIMING), "")
        limit_s = self.limits.cell_s + GRACE_S
        for name in names:
            if self.ending or name in done:
                continue
            if failed or (model and self.refused):
                reason = STOPPED if self.refused else f"{failed} failed"
                self.save(NotebookStatus(name, model, "skipped", 0.0, reason))
                continue
            began = time.monotonic()
            timer = threading.Timer(limit_s, kernels.kill, [folder / kernels.LOG])
            timer.start()
            source = store.project_root() / "notebooks" / f"{name}.ipynb"
            output = folder / source.name
            status = notebook.run_notebook(source, output, parameters, self.limits.cell_s, model)
            timer.cancel()
            if status.status == "failed":
                if time.monotonic() - began > limit_s:
                    error = f"stopped by the runner after {limit_s:.0f} s"
                    status = replace(status, error=error, failure=Failure.TIMEOUT)
                failed = name
            self.save(status)
        return not failed

    def save(self, *new: NotebookStatus, **changes: Any) -> None:
        """Write run.json, with what came of these notebooks unless the run is ending.

        Where notebooks of many models pass, writing takes a twentieth of the time at most.
        """
        new = () if self.ending else tuple(with_disk(status, self.folder) for status in new)
        failed = [status for status in new if status.status == "failed"]
        for status in (status for status in failed if status.model):
            counts = status.failure is not Failure.TRACKING
            if (counts and self.limits.fail_on_error.count == 1) or status.failure is Failure.STOPPED:
                self.refused = True
        with self.lock:
            now = time.monotonic()
            changes |= {"notebooks": (*self.info.notebooks, *new), "seconds": round(now - self.began, 1)}
            self.info = replace(self.info, **changes)
            if failed or not new or now >= self.next_write:
                store.write_json(self.folder / "run.json", self.info)
                self.next_write = now + 20 * (time.monotonic() - now)
        for status in new:
            self.watch(status)


def with_disk(status: NotebookStatus, folder: Path) -> NotebookStatus:
    """A failure with what may be behind it: a process that dies of a full disk cannot even write why."""
    if status.status != "failed" or shutil.disk_usage(folder).free > LEAST_FREE:
        return status
    return replace(status, error=f"{status.error}; no space is left on the disk of {folder}")


def write_pages(run_dir: Path) -> None:
    """The run's report, the index of runs, and MLflow's copy, whose trouble must not cost the report."""
    from nbhelpers.report import html
    from nbhelpers.tracking import mlflow_run

    html.write_report(run_dir, rated := html.read_ratings(run_dir))
    html.write_runs_index(run_dir.parent)
    try:
        mlflow_run.attach(run_dir, rated[0])
    except LabError as error:
        print(f"the report was written, but: {error}", file=sys.stderr)


@contextmanager
def watching(plan: Plan, quiet: bool = False) -> Iterator[Watcher]:
    """A watcher of a run that says how each notebook went and, on a terminal, how far the run is."""
    aliases = {model: spec.alias for model, spec in plan.models.items()} | {"": "comparison"}
    console = Console()
    with Progress(console=console, disable=quiet or not console.is_terminal) as progress:
        passed = sum(status.status == "passed" for status in plan.info.notebooks)
        total = sum(len(pipeline_of(spec)) for spec in plan.models.values()) + 1
        bar = progress.add_task("starting", completed=passed, total=total)

        def watch(s: NotebookStatus) -> None:
            progress.update(bar, advance=1, description="notebooks")
            line = f"{aliases[s.model]:<24} {s.notebook:<22} {s.status:>7} {s.seconds:6.1f} s"
            if not quiet:
                print(printable(f"{line}: {s.error}" if s.error else line))

        yield watch
