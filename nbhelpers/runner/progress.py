"""Live progress of a run on the terminal: each model's notebook and samples, and the time left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nbhelpers.runner.notebook import PIPELINE
from nbhelpers.runner.plan import Plan
from nbhelpers.runner.run import Event, Watcher
from nbhelpers.scoring.texts import printable


@dataclass(frozen=True)
class _Samples:
    """A model's samples as text, counted when rich asks for it."""

    path: Path
    total: int

    def __str__(self) -> str:
        try:
            with self.path.open("rb") as lines:
                return f"{sum(1 for _ in lines)}/{self.total} samples"
        except OSError:  # none yet
            return f"0/{self.total} samples"


@contextmanager
def watching(plan: Plan, quiet: bool = False) -> Iterator[Watcher]:
    """A watcher of a run: live bars on a terminal, a line per notebook otherwise."""
    from rich import progress
    from rich.console import Console

    names = {model: spec.alias for model, spec in plan.models.items()} | {"": "comparison"}
    console = Console(stderr=True)

    def line(event: Event) -> None:
        if status := event.status:
            error = f": {status.error}" if status.error else ""
            time = f"{status.status:>7} {status.seconds:6.1f} s"
            print(printable(f"{names[event.model]:<24} {event.notebook:<22} {time}{error}"), flush=True)

    if quiet or not console.is_terminal:
        yield (lambda event: None) if quiet else line
        return
    texts = ("{task.description}", "{task.fields[notebook]}", "{task.fields[samples]}")
    columns = (*(progress.TextColumn(text, markup=False) for text in texts), progress.BarColumn(20))
    times = progress.TimeElapsedColumn(), progress.TimeRemainingColumn()
    with progress.Progress(
        *columns, *times, console=console, refresh_per_second=2, speed_estimate_period=3600
    ) as bars:
        passed = [status.model for status in plan.info.notebooks if status.status == "passed"]
        rows = {}
        for model, alias in names.items():
            samples = (
                _Samples(plan.run_dir / plan.models[model].slug / "samples.jsonl", plan.samples_per_model)
                if model
                else ""
            )
            total, done = len(PIPELINE) if model else 1, passed.count(model) if model else 0
            rows[model] = bars.add_task(
                alias, total=total, completed=done, notebook="waiting", samples=samples
            )
        everything = sum(task.total or 0 for task in bars.tasks)
        whole = bars.add_task("run", total=everything, completed=len(passed), notebook="", samples="")

        def watch(event: Event) -> None:
            done = event.status is not None
            error = event.status.error if event.status and event.status.status == "failed" else ""
            shown = printable(f"{event.notebook} {error}".strip())
            bars.update(rows[event.model], advance=int(done), notebook=shown)
            bars.update(whole, advance=int(done))

        yield watch
