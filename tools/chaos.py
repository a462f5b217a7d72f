"""Kill a run at random moments, resume it, and hold what comes out against what nobody disturbed.

    python tools/chaos.py --kills 50 [--seed 0]

A copy of the checkout with short notebooks is run by the real runner, kernels and fork server. Killed are the
runner (SIGKILL, SIGTERM, SIGINT), a kernel, the fork server, and all at once with the last bytes of the row
files cut off, as a power failure may leave them. Prints one line of JSON; the exit
code is 1 if a row was lost, repeated or changed, a file was left half-written, or a process survived.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
import psutil

from nbhelpers import pipeline
from nbhelpers.records import Settings

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("lab-gpt2", "lab-opt")
SETTINGS = {"limit": 3, "repeats": 2, "max_new_tokens": 16, "device": "cpu", "dtype": "float32"}
TARGETS = ("runner KILL", "runner TERM", "runner INT", "kernel", "server", "power")
ENDS_S = 120.0  # what a dead runner leaves must be gone by then: imports are not interrupted
LONGEST_S = 20.0  # before the next kill; a resumed run goes on where the last one was
PARAMETERS = "\n".join(f"{field.name} = {field.default!r}" for field in dataclasses.fields(Settings))
OPEN = f"""from nbhelpers import pipeline, registry
from nbhelpers.generation import generate, latency
from nbhelpers.loading import load
from nbhelpers.records import Settings
run = pipeline.open_run(Settings({", ".join(field.name for field in dataclasses.fields(Settings))}))
"""
NOTEBOOKS = {
    "01_device_detection": 'pipeline.make(run, "device")',
    "02_loading": 'pipeline.make(run, "loading")',
    # Two rows at a time, so that kills fall between them.
    "03_generation": """loaded = load.load(run.spec, device, dtype)
texts = registry.load_prompts(prompts, limit)
generate.generate_samples(loaded, texts, run.settings, run.folder / "samples.jsonl", batch_size=2)
latency.measure_latency(loaded, texts, run.settings, run.folder / "latency.jsonl")
""",
    "04_scoring": 'pipeline.make(run, "scores")',
    "05_statistics": 'pipeline.make(run, "stats")',
    "06_tracking": 'pipeline.make(run, "result")',
    "07_comparison": """from pathlib import Path
from nbhelpers.comparison import compare
compare.compare_run(Path(run_dir)).pick_reason
""",
}

Rows = dict[tuple[str, str], str]  # (file, key) -> text


@dataclass
class Tally:
    """What happened; everything from `lost` on must stay 0."""

    runs: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    rows_at_kills: int = 0
    lost: int = 0
    repeated: int = 0
    changed: int = 0
    half_written: int = 0
    orphans: int = 0
    unfinished: int = 0

    def harm(self) -> int:
        return self.lost + self.repeated + self.changed + self.half_written + self.orphans + self.unfinished

    def line(self) -> str:
        return json.dumps(vars(self))  # before Python 3.12, asdict takes a Counter to pieces


class Chaos:
    def __init__(self, folder: Path, seed: int, models: tuple[str, ...]) -> None:
        self.folder, self.rng, self.models = folder, random.Random(seed), models
        self.checkout, self.outputs = folder / "checkout", folder / "outputs"
        short_checkout(self.checkout)
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(self.checkout),
            "NBHELPERS_OUTPUTS": str(self.outputs),
            "OMP_NUM_THREADS": "1",
        }
        self.tally = Tally()
        self.reference = self._undisturbed()

    def run(self, kills: int, targets: tuple[str, ...] = TARGETS) -> Tally:
        """One run after the other, each killed again and again, until there were enough kills."""
        due = [targets[n % len(targets)] for n in range(kills)]
        self.rng.shuffle(due)
        while due:
            self._one_run(due)
        return self.tally

    def _one_run(self, due: list[str]) -> None:
        self.tally.runs += 1
        run_dir, seen = self.outputs / f"run-{self.tally.runs}", {}
        for attempt in range(len(due) + 4):
            process = self._start(run_dir, attempt)
            while due and self._wait(process, run_dir):
                seen |= rows(run_dir)
                self.tally.rows_at_kills = max(self.tally.rows_at_kills, len(seen))
                if not self._kill(process, due[-1]):
                    continue
                self.tally.kills[target := due.pop()] += 1
                print(f"killed: {target}, {len(seen)} rows", file=sys.stderr, flush=True)
                if target == "power":
                    process.wait()
                    seen = self._cut(run_dir)
            status = process.wait()
            self._check_ended(run_dir)
            if status == 0:
                break
        else:
            self.tally.unfinished += 1
        self._verify(run_dir, seen)

    def _start(self, run_dir: Path, attempt: int) -> subprocess.Popen[bytes]:
        fresh = not (run_dir / "run.json").exists()
        settings = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
        what = (
            [*self.models, *settings, "--out", str(run_dir)]
            if fresh
            else ["--resume", self.rng.choice(["latest", str(run_dir)])]
        )
        with (self.folder / "runner.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "nbhelpers.cli", "run", *what],
                env=self.environment, cwd=self.checkout, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def _undisturbed(self) -> Rows:
        """What the models write here, without a runner, a kernel or a fork server."""
        run_dir = self.outputs / "undisturbed"
        for model in self.models:
            settings = Settings(model=model, run_dir=str(run_dir), **SETTINGS)
            pipeline.make(pipeline.open_run(settings), through="latency")
        return rows(run_dir)

    def _wait(self, process: subprocess.Popen[bytes], run_dir: Path) -> bool:
        """Wait for a random moment: a time, or so many rows more. False if the run ended before."""
        until = time.monotonic() + self.rng.uniform(0, LONGEST_S)
        enough = len(rows(run_dir)) + self.rng.randint(1, 8) if self.rng.random() < 0.5 else 10**9
        while process.poll() is None:
            if time.monotonic() > until or len(rows(run_dir)) >= enough:
                return True
            time.sleep(0.005)
        return False

    def _kill(self, process: subprocess.Popen[bytes], target: str) -> bool:
        """Whether there was such a process to kill."""
        who, _, name = target.partition(" ")
        if who == "runner":
            process.send_signal(getattr(signal, f"SIG{name}"))
            process.wait()
            return True
        if who == "power":
            family = [psutil.Process(process.pid), *self._alive()]
            for one in family:
                _quietly(one.suspend)
            for one in family:
                _quietly(one.kill)
            return True
        found = self._role(who, process.pid)
        for one in found[:1]:
            _quietly(one.kill)
        return bool(found)

    def _role(self, who: str, runner: int) -> list[psutil.Process]:
        """The fork server, or the kernels that it forked, the latest first."""
        try:
            live = [p for p in psutil.Process(runner).children() if p.status() != psutil.STATUS_ZOMBIE]
            servers = [p for p in live if "multiprocessing.forkserver" in " ".join(p.cmdline())]
            forked = sorted((c for p in servers for c in p.children()), key=lambda p: -p.create_time())
        except psutil.Error:
            return []
        return servers if who == "server" else forked

    def _cut(self, run_dir: Path) -> Rows:
        """Cut the row files as a power failure may: what came last is missing, a part of a line stays."""
        for path in run_dir.glob("*/*.jsonl"):
            if (size := path.stat().st_size) and path.name != "scores.jsonl":
                os.truncate(path, size - self.rng.randint(1, min(size, 200)))
        return rows(run_dir)

    def _alive(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                ours = process.environ().get("NBHELPERS_OUTPUTS") == str(self.outputs)
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def _check_ended(self, run_dir: Path) -> None:
        until = time.monotonic() + ENDS_S
        while (left := self._alive()) and time.monotonic() < until:
            time.sleep(0.1)
        self.tally.orphans += len(left)
        for process in left:
            print(f"orphan: {process} {process.cmdline()}", file=sys.stderr, flush=True)
            _quietly(process.kill)
        for path in [*run_dir.glob("*.json"), *run_dir.glob("*/*.json")]:
            try:
                json.loads(path.read_bytes())
            except ValueError:
                self.tally.half_written += 1

    def _verify(self, run_dir: Path, seen: Rows) -> None:
        final = rows(run_dir)
        lines = [
            (p.name, p.parent.name, line) for p in row_files(run_dir) for line in p.read_bytes().splitlines()
        ]
        self.tally.repeated += len(lines) - len(final)
        self.tally.lost += len((seen.keys() | self.reference.keys()) - final.keys())
        self.tally.changed += sum(final[key] != text for key, text in self.reference.items() if key in final)


def rows(run_dir: Path) -> Rows:
    """The whole rows of a run's files of generations."""
    found = {}
    for path in row_files(run_dir):
        for line in path.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                row = json.loads(line)
                found[f"{path.parent.name}/{path.name}", row["key"]] = row["text"]
    return found


def row_files(run_dir: Path) -> list[Path]:
    return [*run_dir.glob("*/samples.jsonl"), *run_dir.glob("*/latency.jsonl")]


def _quietly(act: Callable[[], object]) -> None:
    try:
        act()
    except psutil.Error:
        return


def short_checkout(folder: Path) -> None:
    """The package and its data, with notebooks that only make the files."""
    for name in ("nbhelpers", "data"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "corpus*"))
    (folder / "notebooks").mkdir()
    for name, code in NOTEBOOKS.items():
        comparing = name.startswith("07")
        given = nbformat.v4.new_code_cell('run_dir = ""' if comparing else PARAMETERS)
        given.metadata["tags"] = ["parameters"]
        body = nbformat.v4.new_code_cell(code if comparing else OPEN + code)
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        nbformat.write(
            nbformat.v4.new_notebook(cells=[given, body], metadata=kernel),
            folder / "notebooks" / f"{name}.ipynb",
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos") as folder:
        tally = Chaos(Path(folder), given.seed, MODELS).run(given.kills)
    print(tally.line())
    sys.exit(tally.harm() > 0)


if __name__ == "__main__":
    main()
