"""Live progress of a run on the terminal: which model, which notebook, how many samples, time left."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from nbhelpers.runner.worker import COMPARISON, PIPELINE
from nbhelpers.scoring.texts import printable

if TYPE_CHECKING:
    from rich.table import Table

    from nbhelpers.runner.run import Event, Plan, Watcher


class Board:
    """The state behind the display; rich asks for it a few times a second."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.started = time.monotonic()
        self.lock = threading.Lock()
        self.running: dict[str, str] = {}
        self.done: dict[str, list[tuple[str, float]]] = {model: [] for model in (*plan.info.models, "")}
        self.failed: dict[str, str] = {}

    def watch(self, event: Event) -> None:
        with self.lock:
            if event.status is None:
                self.running[event.model] = event.notebook
                return
            self.running.pop(event.model, None)
            self.done[event.model].append((event.notebook, event.status.seconds))
            if event.status.status == "failed":
                self.failed[event.model] = printable(f"{event.notebook}: {event.status.error}")

    def seconds_left(self) -> float | None:
        """From the mean time of each notebook so far; None before the first model is through."""
        times: dict[str, list[float]] = {}
        for finished in self.done.values():
            for name, seconds in finished:
                times.setdefault(name, []).append(seconds)
        if set(PIPELINE) - set(times):
            return None
        mean = {name: sum(values) / len(values) for name, values in times.items()}
        mean.setdefault(COMPARISON, mean[PIPELINE[0]])
        left = 0.0
        for model, finished in self.done.items():
            names = PIPELINE if model else (COMPARISON,)
            left += sum(mean[name] for name in names[len(finished) :])
        return left

    def __rich__(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        with self.lock:
            left = self.seconds_left()
            elapsed = time.monotonic() - self.started
            title = f"{elapsed:.0f} s" + (f", about {left:.0f} s left" if left is not None else "")
            table = Table("model", "notebook", "samples", "", title=title, title_justify="left", box=None)
            for model, spec in zip(self.plan.info.models, self.plan.specs, strict=True):
                samples = count_rows(self.plan.run_dir / spec.slug / "samples.jsonl")
                table.add_row(
                    Text(spec.alias),
                    self._stage(model),
                    f"{samples}/{self.plan.samples_per_model}",
                    Text(self.failed.get(model, ""), style="red"),
                )
            table.add_row("comparison", self._stage(""), "", Text(self.failed.get("", ""), style="red"))
        return table

    def _stage(self, model: str) -> str:
        total = len(PIPELINE) if model else 1
        if model in self.failed:
            return "failed"
        if model in self.running:
            return f"{self.running[model]}"
        return "done" if len(self.done[model]) >= total else "waiting"


def count_rows(path: Path) -> int:
    """Lines of a file that another process is appending to; 0 while it does not exist."""
    try:
        with path.open("rb") as lines:
            return sum(1 for _ in lines)
    except OSError:
        return 0


@contextmanager
def watching(plan: Plan, quiet: bool = False) -> Iterator[Watcher]:
    """A watcher for batch.run: a live table on a terminal, a line per notebook otherwise."""
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True)
    board = Board(plan)
    names = {model: spec.alias for model, spec in zip(plan.info.models, plan.specs, strict=True)}
    if quiet:
        yield board.watch
    elif console.is_terminal:
        with Live(board, console=console, refresh_per_second=2):
            yield board.watch
    else:

        def line(event: Event) -> None:
            board.watch(event)
            if event.status is not None:
                status = event.status
                error = f": {status.error}" if status.error else ""
                name = names.get(event.model, "comparison")
                said = f"{name:<24} {event.notebook:<22} {status.status:>7} {status.seconds:6.1f} s{error}"
                print(printable(said), flush=True)

        yield line
