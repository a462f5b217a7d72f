"""`nbhelpers run`, one and two models at a time, beside the same notebooks by papermill in a shell loop.

    python tools/run_vs_papermill.py [--rounds 2] [--limit 15] [--repeats 4] [--max-new-tokens 256] [MODEL]

Interleaved (loop, run with --jobs 1, run with --jobs 2, loop, …), each into a fresh outputs folder. Prints a
line per execution and, as JSON, wall and processor seconds with the ratio of the loop's medians to those of
the default, --jobs 2; exits with 1 if a notebook failed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

from nbhelpers import registry, store
from nbhelpers.runner.notebook import COMPARISON, PIPELINE

SIZES = ("limit", "repeats", "max_new_tokens")


def loop(models: list[str], given: argparse.Namespace, run_dir: Path) -> list[list[str]]:
    """The commands a shell script would hold, in order."""
    commands, notebooks = [], store.project_root() / "notebooks"
    common = [part for name in SIZES for part in ("-p", name, str(getattr(given, name)))]
    for model in models:
        folder = run_dir / registry.resolve(model).slug
        folder.mkdir(parents=True)
        parameters = ["-p", "model", model, "-p", "run_dir", str(run_dir), *common]
        for name in PIPELINE:
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


def timed(commands: list[list[str]], outputs: Path) -> tuple[float, float]:
    """Wall and processor seconds of the commands, one after another."""
    environment = {**os.environ, "NBHELPERS_OUTPUTS": str(outputs), "HF_HUB_OFFLINE": "1"}
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    for command in commands:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        done = subprocess.run([sys.executable, *command], env=environment, text=True, **quiet)
        if done.returncode != 0:
            sys.exit(f"{' '.join(command[:5])} failed: {done.stderr[-500:]}")
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=registry.embedded_models())
    parser.add_argument("--rounds", type=int, default=2)
    for name, value in zip(SIZES, (15, 4, 256), strict=True):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    given = parser.parse_args()
    ways = {"papermill": loop, "jobs 1": partial(ours, jobs=1), "jobs 2": partial(ours, jobs=2)}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(given.rounds):
        for name, make in ways.items():
            with tempfile.TemporaryDirectory() as outputs:
                seconds = timed(make(given.models, given, Path(outputs) / "run"), Path(outputs))
            found[name].append(seconds)
            print(f"{name:10} {seconds[0]:7.1f} s wall, {seconds[1]:7.1f} s of processor", flush=True)
    middle = {name: [median(column) for column in zip(*rows, strict=True)] for name, rows in found.items()}
    ratios = [a / b for a, b in zip(middle["papermill"], middle["jobs 2"], strict=True)]
    jobs = middle["jobs 1"][0] / middle["jobs 2"][0]
    sizes = {"limit": given.limit, "repeats": given.repeats, "tokens": given.max_new_tokens}
    ratio = {"wall_ratio": ratios[0], "processor_ratio": ratios[1], "jobs_1_to_2": jobs}
    print(json.dumps({"models": given.models, **sizes, "seconds": found, **ratio}))


if __name__ == "__main__":
    main()
