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
from contextlib import contextmanager, suppress
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
from nbhelpers.records import Failure, LabError, Limits, ModelRun, NotebookStatus, Result, RunInfo, Settings
from nbhelpers.redact import printable
from nbhelpers.runner import kernels, notebook
from nbhelpers.runner.plan import Plan

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

    spread: makes first what it can elsewhere (``cluster.join_cluster``).

    A model that fails is in there as failed, never raised. KeyboardInterrupt kills the kernels and leaves a
    run that can be resumed. Raises LabError where another process is at this run.
    """
    from filelock import FileLock, Timeout

    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, machine.usable_cores() // jobs))
    how = "forked" if kernels.FORKS else "plain"
    info = replace(plan.info, jobs=jobs, threads=threads, kernels=how, limits=limits)
    plan.run_dir.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(plan.run_dir / ".lock", timeout=0), kernels.environment(threads):
            old = (plan.run_dir / "run.json").exists()
            return Run(plan, replace(info, notebooks=_valid(plan) if old else ()), watch).execute(spread)
    except Timeout:
        busy = f"The run {plan.run_dir} is being executed by another process"
        raise LabError(f"{busy}: wait, or stop it.") from None


def _valid(plan: Plan) -> tuple[NotebookStatus, ...]:
    """What has passed before, once half rows are cut off: nothing of a model that lost or failed a row, and
    no more than its answers where a file that decides their scores has changed."""
    from nbhelpers.scoring import reference

    torn, files = set(), reference.files(tasks.load_task(plan.info.settings.task))
    newest = max((file.stat().st_mtime for file in files), default=0.0)
    old = {path.parent.name for path in plan.run_dir.glob("*/scores.jsonl") if path.stat().st_mtime < newest}
    for path in plan.run_dir.glob("*/result.json"):
        with suppress(LabError):  # 06 did not come to its end
            torn |= {path.parent.name} if store.read_json(path, Result).failed else set()
    for rows in plan.run_dir.glob("*/*.jsonl"):
        if rows.is_dir():  # the notebook that writes the file will say so
            torn.add(rows.parent.name)
            continue
        size = rows.stat().st_size
        with store.appending(rows):  # waits for what a killed run left
            torn |= {rows.parent.name} if rows.stat().st_size < size else set()
    for unfinished in plan.run_dir.rglob(f".*.{'[0-9a-f]' * 32}"):  # store.write_text was killed
        unfinished.unlink(missing_ok=True)
    whole = {model for model, spec in plan.models.items() if spec.slug not in torn}
    stale = {model for model in whole if plan.models[model].slug in old}
    passed = (s for s in plan.info.notebooks if s.status == "passed" and s.model in whole)
    return tuple(s for s in passed if NOTEBOOKS[s.notebook] < Phase.SCORES or s.model not in stale)


class Run:
    def __init__(self, plan: Plan, info: RunInfo, watch: Watcher) -> None:
        self.folder, self.models, self.info, self.watch = plan.run_dir, plan.models, info, watch
        self.limits, self.log = info.limits, plan.run_dir / kernels.LOG
        self.began, self.next_write = time.monotonic() - (info.seconds or 0.0), 0.0
        self.refused = False  # --fail-on-error: no further notebook of a model
        self.ending = False  # whatever fails from now on was killed
        self.lock, self.jobs, self.work = threading.Lock(), info.jobs or 1, list[Future[bool]]()

    def execute(self, spread: Callable[[Run], None] | None) -> RunInfo:
        self.save()
        try:
            kernels.serve(self.log)  # it imports for seconds; meanwhile this process does
            notebook.engine(), notebook.exporter()
            import nbhelpers.report.html  # noqa: F401  # it tells the outcome
            from nbhelpers.generation import latency
            from nbhelpers.tracking import mlflow_run

            database = kernels.start(self.log, mlflow_run.init_database)
            settings = replace(self.info.settings, run_dir=str(self.folder))
            if spread:
                spread(self)
            runs = self.runs(settings)
            begun = self._together(partial(self.pipeline, run, end=Phase.ANSWERS) for run in runs)
            able = list(compress(runs, begun))
            database.join(GRACE_S)
            alone = len(able) < 2 or self.info.nodes  # then 03 times each
            if not alone and not self.refused and not latency.is_whole(able):
                self._forget_answers()  # they show other timings
                most_s = self.limits.cell_s * len(able) + GRACE_S
                self._step(TIMING, "no timing in turn", most_s, latency.measure_in_turn, able)
            if self.info.looks:
                settings = self._until_decided(settings, {run.settings.model for run in able})
            runs = self.runs(settings)
            self._together(partial(self.pipeline, run, Phase.ANSWERS, Phase.SCORES) for run in runs)
            judged = "judge" in tasks.load_task(settings.task).kinds()  # by a model, which may be large
            # No clock runs any more, and kernels that start leave cores idle.
            at_once = self.jobs if judged else 2 * self.jobs
            self._together((partial(self.pipeline, run, Phase.SCORES) for run in runs), at_once)
            given = {"run_dir": str(self.folder)}
            self._together([partial(self._notebooks, "", self.folder, (COMPARISON,), given)])
            self.save()  # the report reads it
            self._step(REPORT, "the report was not written", self.limits.cell_s, write_pages, self.folder)
        finally:
            self.ending = True
            kernels.kill(self.folder)
            while wait(self.work, 0.5).not_done:  # a thread was about to start one
                kernels.kill(self.folder)
            self.save()
        return self.info

    def runs(self, settings: Settings) -> list[ModelRun]:
        given = ((replace(settings, model=model), spec) for model, spec in self.models.items())
        return [ModelRun(own, spec, self.folder / spec.slug, self.limits) for own, spec in given]

    def _together(self, parts: Iterable[Callable[[], bool]], at_once: int = 0) -> list[bool]:
        """What the parts return, so many of them at a time; 0: as many as models of the run."""
        pool = ThreadPoolExecutor(at_once or self.jobs)
        self.work = [pool.submit(part) for part in parts]
        return [future.result() for future in self.work]

    def _step(self, name: str, problem: str, most_s: float, target: Callable[..., object], *of: Any) -> None:
        """Have a process of its own do something for the whole run; run.json says so where it failed."""
        if not self._process(self.log, most_s, target, *of):
            problem = f"{problem}; see {self.log.name}"
            self.save(NotebookStatus(name, "", "failed", 0.0, problem, Failure.OTHER))

    def _process(self, log: Path, most_s: float, target: Callable[..., object], *of: Any) -> bool:
        code = kernels.exit_code(kernels.start(log, target, *of), most_s)
        if code != 0:
            kernels.kill(log)  # if it takes longer
        return code == 0

    def _forget_answers(self) -> None:
        known = self.info.notebooks
        kept = (s for s in known if not s.model or NOTEBOOKS[s.notebook] < Phase.ANSWERS)
        self.info = replace(self.info, notebooks=tuple(kept))

    def _until_decided(self, settings: Settings, able: set[str]) -> Settings:
        """Have all models answer more prompts, look by look, until no pair waits; the settings of the last.

        A look makes what is missing and compares: a resumed run comes to where it was. A model that cannot
        answer takes no further part: notebook 03 says what failed.
        """
        from nbhelpers import pipeline

        def answer(run: ModelRun) -> bool:
            log, most_s = run.folder / kernels.LOG, self.limits.cell_s + GRACE_S
            return self._process(log, most_s, pipeline.make, run, "scores")

        for prompts in self.info.looks:
            settings = replace(settings, limit=prompts)
            runs = [run for run in self.runs(settings) if run.settings.model in able]
            runs = list(compress(runs, self._together(partial(answer, run) for run in runs)))
            able = {run.settings.model for run in runs}
            if settled(self.info, runs):
                break
        self._forget_answers()  # others showed fewer prompts before a resume
        return settings

    def pipeline(self, run: ModelRun, first: Phase = Phase.LOADING, end: Phase = Phase.COMPARISON) -> bool:
        """The notebooks of a model from one phase on and before another."""
        names = [n for n in pipeline_of(run.spec, run.settings.task) if first <= NOTEBOOKS[n] < end]
        return self._notebooks(run.settings.model, run.folder, names, asdict(run.settings))

    def _notebooks(self, model: str, folder: Path, names: Sequence[str], parameters: dict[str, Any]) -> bool:
        """Execute what is left of some notebooks, skip what follows a failure, and say whether all passed."""
        known = {s.notebook: s.status for s in self.info.notebooks if s.model == model}
        failed = next((name for name, status in known.items() if status != "passed" and name != TIMING), "")
        for name in names:
            if self.ending or name in known:
                continue
            if failed or (model and self.refused):
                reason = STOPPED if self.refused else f"{failed} failed"
                self.save(NotebookStatus(name, model, "skipped", 0.0, reason))
                continue
            began, most = time.monotonic(), self.limits.cell_s + GRACE_S
            timer = threading.Timer(most, kernels.kill, [folder / kernels.LOG])
            timer.start()
            source = store.project_root() / "notebooks" / f"{name}.ipynb"
            output = folder / source.name
            status = notebook.run_notebook(source, output, parameters, self.limits.cell_s, model)
            timer.cancel()
            if status.status == "failed":
                if time.monotonic() - began > most:
                    error = f"stopped by the runner after {most:.0f} s"
                    status = replace(status, error=error, failure=Failure.TIMEOUT)
                failed = name
            self.save(status)
        return not failed

    def save(self, *new: NotebookStatus, **changes: Any) -> None:
        """Write run.json, with what came of these notebooks unless the run is ending.

        It is written as a whole: where notebooks of many models pass, in a twentieth of the time at most.
        """
        new = () if self.ending else tuple(with_disk(status, self.folder) for status in new)
        failed = [status for status in new if status.status == "failed"]
        for status in (status for status in failed if status.model):
            first = self.limits.fail_on_error.count == 1 and status.failure is not Failure.TRACKING
            self.refused |= first or status.failure is Failure.STOPPED
        with self.lock:
            now = time.monotonic()
            changes |= {"notebooks": (*self.info.notebooks, *new), "seconds": round(now - self.began, 1)}
            self.info = replace(self.info, **changes)
            if failed or not new or now >= self.next_write:
                store.write_json(self.folder / "run.json", self.info)
                self.next_write = now + 20 * (time.monotonic() - now)
        for status in new:
            self.watch(status)


def settled(info: RunInfo, runs: Sequence[ModelRun]) -> bool:
    """Whether these models are told apart, as far as that goes, by the prompts that they have scores of."""
    from nbhelpers.loading import load
    from nbhelpers.scoring import rubric
    from nbhelpers.stats import estimate, sequential

    runs = [run for run in runs if load.read_report(run).quality_applies]
    task = tasks.load_task(info.settings.task)
    scores = [estimate.by_prompt(rubric.read_scores(run), task.primary) for run in runs]
    shared = set(scores[0]).intersection(*scores[1:]) if scores else set()
    per_model = {run.folder.name: {p: own[p] for p in shared} for run, own in zip(runs, scores, strict=True)}
    return sequential.decided(per_model, task.scale, sequential.looks_of(info), info.looks[-1])


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
    names = {model: spec.alias for model, spec in plan.models.items()} | {"": "comparison"}
    console = Console()
    with Progress(console=console, disable=quiet or not console.is_terminal) as progress:
        passed = sum(status.status == "passed" for status in plan.info.notebooks)
        total = sum(len(pipeline_of(spec)) for spec in plan.models.values()) + 1
        bar = progress.add_task("starting", completed=passed, total=total)

        def watch(s: NotebookStatus) -> None:
            progress.update(bar, advance=1, description="notebooks")
            line = f"{names[s.model]:<24} {s.notebook:<22} {s.status:>7} {s.seconds:6.1f} s"
            if not quiet:
                print(printable(f"{line}: {s.error}" if s.error else line))

        yield watch
