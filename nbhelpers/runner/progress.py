"""Progress of a run on the terminal: a line for each notebook, and a bar below them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress

from nbhelpers.records import NotebookStatus
from nbhelpers.runner.notebook import PIPELINE
from nbhelpers.runner.plan import Plan
from nbhelpers.runner.run import Watcher
from nbhelpers.scoring.texts import printable


@contextmanager
def watching(plan: Plan, quiet: bool = False) -> Iterator[Watcher]:
    """A watcher of a run that says how each notebook went and, on a terminal, how far the run is."""
    names = {model: spec.alias for model, spec in plan.models.items()} | {"": "comparison"}
    console = Console()
    with Progress(console=console, disable=quiet or not console.is_terminal) as progress:
        passed = sum(status.status == "passed" for status in plan.info.notebooks)
        bar = progress.add_task("notebooks", completed=passed, total=len(plan.models) * len(PIPELINE) + 1)

        def watch(s: NotebookStatus) -> None:
            progress.advance(bar)
            error = f": {s.error}" if s.error else ""
            if not quiet:
                print(
                    printable(
                        f"{names[s.model]:<24} {s.notebook:<22} {s.status:>7} {s.seconds:6.1f} s{error}"
                    )
                )

        yield watch
