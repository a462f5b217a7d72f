"""The child process of a run: ``python -m nbhelpers.runner.worker RUN_DIR TIMEOUT [MODEL]``, or ``RUN_DIR report``.

With a MODEL it executes that model's notebooks which have not passed yet, without one the comparison. It
reads run.json and prints one JSON object a line: ``{"start": name}`` before a notebook, its NotebookStatus
after, ``{"problem": sentence}`` when it cannot go on. ``report`` writes the HTML pages and completes the
MLflow runs. A process of its own gives each model a clean memory, and the runner something it can kill.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from nbhelpers import registry, store
from nbhelpers.records import LabError, NotebookStatus, RunInfo, Settings
from nbhelpers.runner.processes import end_with_parent

Say = Callable[[dict[str, object]], None]

PIPELINE = (
    "01_device_detection",
    "02_loading",
    "03_generation",
    "04_scoring",
    "05_statistics",
    "06_tracking",
)
COMPARISON = "07_comparison"
PARAMETERS = ("model", "run_dir", "prompts", "limit", "repeats", "max_new_tokens", "seed", "device", "dtype")


def notebook_path(name: str) -> Path:
    return store.project_root() / "notebooks" / f"{name}.ipynb"


def parameters_of(settings: Settings) -> dict[str, object]:
    """The values a pipeline notebook's ``parameters`` cell receives."""
    return {name: getattr(settings, name) for name in PARAMETERS}


def run_model(run_dir: Path, model: str, timeout: float, say: Say) -> None:
    """Execute 01 to 06 in order; what follows a failure is skipped, what passed before is kept."""
    info = store.read_json(run_dir / "run.json", RunInfo)
    passed = {s.notebook for s in info.notebooks if s.model == model and s.status == "passed"}
    settings = dataclasses.replace(info.settings, model=model, run_dir=str(run_dir))
    folder = registry.model_dir(settings)
    failed = None
    for name in PIPELINE:
        output = folder / f"{name}.ipynb"
        if name in passed and output.exists():
            continue
        if failed:
            say(dataclasses.asdict(NotebookStatus(name, model, "skipped", 0.0, f"{failed} failed")))
        elif not run_one(name, output, parameters_of(settings), timeout, model, say):
            failed = name


def write_pages(run_dir: Path) -> None:
    """The run's report; then the index of runs and MLflow, whose trouble must not cost the report."""
    from nbhelpers.report import html as report
    from nbhelpers.tracking import mlflow_run as tracking

    report.write_report(run_dir)
    for step in (lambda: report.write_runs_index(run_dir.parent), lambda: tracking.attach(run_dir)):
        try:
            step()
        except LabError as error:
            print(f"the report was written, but: {error}", file=sys.stderr)


def run_one(
    name: str, output: Path, parameters: dict[str, object], timeout: float, model: str, say: Say
) -> bool:
    from nbhelpers.runner.notebook import run_notebook, to_html

    say({"start": name})
    status = run_notebook(notebook_path(name), output, parameters, timeout, model)
    if output.exists():
        to_html(output)
    say(dataclasses.asdict(status))
    return status.status == "passed"


def main() -> None:
    end_with_parent()
    run_dir = Path(sys.argv[1])
    if sys.argv[2] == "report":
        write_pages(run_dir)
        return
    # The runner reads events from stdout; whatever libraries print there goes to the log on stderr.
    events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(event: dict[str, object]) -> None:
        print(json.dumps(event), file=events, flush=True)

    timeout = float(sys.argv[2])
    try:
        if len(sys.argv) > 3:
            run_model(run_dir, sys.argv[3], timeout, say)
        else:
            output = run_dir / f"{COMPARISON}.ipynb"
            run_one(COMPARISON, output, {"run_dir": str(run_dir)}, timeout, "", say)
    except LabError as error:
        say({"problem": str(error)})


if __name__ == "__main__":
    main()
