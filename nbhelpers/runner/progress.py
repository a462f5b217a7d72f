"""Live progress of a run on the terminal: each model's notebook and samples, and the time left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich import progress
from rich.console import Console

from nbhelpers.records import NotebookStatus
from nbhelpers.runner.notebook import PIPELINE
from nbhelpers.runner.plan import Plan
from nbhelpers.runner.run import Watcher
from nbhelpers.scoring.texts import printable


@dataclass(frozen=True)
class _Samples:
    """A model's samples as text, counted when rich asks for it."""

    path: Path
    total: int

    def __str__(self) -> str:
        made = self.path.read_bytes().count(b"\n") if self.path.exists() else 0
        return f"{made}/{self.total} samples"


@contextmanager
def watching(plan: Plan, quiet: bool = False) -> Iterator[Watcher]:
    """A watcher of a run: live bars on a terminal, a line per notebook otherwise."""
    names = {model: spec.alias for model, spec in plan.models.items()} | {"": "comparison"}
    console = Console(stderr=True)

    def line(model: str, notebook: str, status: NotebookStatus | None) -> None:
        if status and not quiet:
            error = f": {status.error}" if status.error else ""
            time = f"{status.status:>7} {status.seconds:6.1f} s"
            print(printable(f"{names[model]:<24} {notebook:<22} {time}{error}"), flush=True)

    if quiet or not console.is_terminal:
        yield line
        return
    texts = ("{task.description}", "{task.fields[samples]}", "{task.fields[notebook]}")
    columns = (*(progress.TextColumn(text, markup=False) for text in texts), progress.BarColumn(20))
    times = progress.TimeElapsedColumn(), progress.TimeRemainingColumn()
    with progress.Progress(*columns, *times, console=console, speed_estimate_period=3600) as bars:
        total = {model: len(PIPELINE) for model in plan.models} | {"": 1}
        whole = bars.add_task("run", total=sum(total.values()), notebook="", samples="")
        rows = {m: bars.add_task(n, total=total[m], notebook="waiting", samples="") for m, n in names.items()}
        samples = len(plan.info.prompts) * plan.info.settings.repeats
        for model, spec in plan.models.items():
            path = plan.run_dir / spec.slug / "samples.jsonl"
            bars.update(rows[model], samples=_Samples(path, samples))

        def watch(model: str, notebook: str, status: NotebookStatus | None) -> None:
            error = f": {status.error}" if status and status.status == "failed" else ""
            bars.update(rows[model], advance=int(status is not None), notebook=printable(notebook + error))
            bars.update(whole, advance=int(status is not None))

        for status in plan.info.notebooks:  # of a resumed run
            if status.status == "passed" and status.model:
                watch(status.model, status.notebook, status)
        yield watch
