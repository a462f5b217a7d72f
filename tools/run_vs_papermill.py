"""`nbhelpers run`, one and two models at a time, beside the same notebooks by papermill in a shell loop.

    python tools/run_vs_papermill.py [--rounds 2] [--limit 15] [--repeats 4] [--max-new-tokens 256] [MODEL]

Interleaved (loop, run with --jobs 1, run with --jobs 2, loop, …), each into a fresh outputs folder; the loop
executes the cells that a run executes. Prints a line per execution and, as JSON, the seconds with the ratio
of the loop's median to that of the default, --jobs 2; exits with 1 if a notebook failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import nbformat

from nbhelpers import registry, store
from nbhelpers.phases import COMPARISON, pipeline_of
from nbhelpers.runner.notebook import LEARNERS

SIZES = ("limit", "repeats", "max_new_tokens")


def loop(models: list[str], given: argparse.Namespace, run_dir: Path) -> list[list[str]]:
    """The commands a shell script would hold, in order."""
    commands, notebooks = [], run_dir.parent / "notebooks"
    notebooks.mkdir()
    pipeline = pipeline_of(registry.resolve(models[0]))
    for name in (*pipeline, COMPARISON):
        whole = nbformat.read(store.project_root() / "notebooks" / f"{name}.ipynb", as_version=4)
        whole.cells = [cell for cell in whole.cells if not LEARNERS & set(cell.metadata.get("tags", ()))]
        nbformat.write(whole, notebooks / f"{name}.ipynb")
    common = [part for name in SIZES for part in ("-p", name, str(getattr(given, name)))]
    for model in models:
        folder = run_dir / registry.resolve(model).slug
        folder.mkdir(parents=True)
        parameters = ["-p", "model", model, "-p", "run_dir", str(run_dir), *common]
        for name in pipeline:
            commands.append([f"{notebooks / name}.ipynb", str(folder / f"{name}.ipynb"), *parameters])
    last = [
        f"{notebooks / COMPARISON}.ipynb",
        str(run_dir / f"{COMPARISON}.ipynb"),
        "-p",
        "run_dir",
        str(run_dir),
    ]
    return [["-m", "papermill", "--no-progress-bar", *command] for command in [*commands, last]]


def ours(models: list[str], given: argparse.Namespace, run_dir: Path, jobs: int) -> list[list[str]]:
    flags = [part for name in SIZES for part in (f"--{name.replace('_', '-')}", str(getattr(given, name)))]
    return [["-m", "nbhelpers.cli", "run", *models, *flags, "--jobs", str(jobs), "--out", str(run_dir)]]


def timed(commands: list[list[str]], outputs: Path) -> float:
    """Seconds by the clock of the commands, one after another; a processor's would lack what a run forks."""
    environment = {**os.environ, "NBHELPERS_OUTPUTS": str(outputs), "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    for command in commands:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        done = subprocess.run([sys.executable, *command], env=environment, text=True, **quiet)
        if done.returncode != 0:
            sys.exit(f"{' '.join(command[:5])} failed: {done.stderr[-500:]}")
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=registry.embedded_models())
    parser.add_argument("--rounds", type=int, default=2)
    for name, value in zip(SIZES, (15, 4, 256), strict=True):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    given = parser.parse_args()
    ways = {"papermill": loop, "jobs 1": partial(ours, jobs=1), "jobs 2": partial(ours, jobs=2)}
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(given.rounds):
        for name, make in ways.items():
            with tempfile.TemporaryDirectory() as outputs:
                seconds = timed(make(given.models, given, Path(outputs) / "run"), Path(outputs))
            found[name].append(seconds)
            print(f"{name:10} {seconds:7.1f} s", flush=True)
    middle = {name: median(rows) for name, rows in found.items()}
    sizes = {"limit": given.limit, "repeats": given.repeats, "tokens": given.max_new_tokens}
    ratio = {"wall_ratio": middle["papermill"] / middle["jobs 2"]}
    ratio["jobs_1_to_2"] = middle["jobs 1"] / middle["jobs 2"]
    print(json.dumps({"models": given.models, **sizes, "seconds": found, **ratio}))


if __name__ == "__main__":
    main()
