"""Ours beside its peers and the machine's limit: interleaved rounds, medians and ratios with their spread.

    python tools/bench.py [--only engine,peers,run,growth,models] [--device cuda] [--dtype bfloat16]
        [--quick] [--out docs] [MODEL …]

The parts are tools that print JSON: bench_engines.py (engines with one model take turns, each in its own
process), run_vs_papermill.py and bench_growth.py (of a process, and of a run by its models). A rate is tokens
per second of one round; a ratio is taken within a round, so that a machine that slows down slows both of its
sides.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nbhelpers import store
from nbhelpers.devices.machine import available_devices, detect
from nbhelpers.errors import some
from nbhelpers.records import SCHEMA_VERSION, LabError, Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = ("engine", "peers", "run", "growth", "models")
TRIAL = "from tools.bench_worker import registry; registry.load_registry(); import torch, transformers"
MODELS = ("lab-gpt2", "lab-llama", "shape:bloom-560m")  # of the engines
ROOT = Path(__file__).resolve().parent.parent
# Of the parts that are tools of their own: the tool, its flags, and those of a quick try.
OTHER = {
    "run": (
        "run_vs_papermill",
        "--limit 5 --repeats 2 --max-new-tokens 64 lab-gpt2 lab-llama",
        "--rounds 1 --limit 2 --repeats 1 --max-new-tokens 8 lab-gpt2",
    ),
    "growth": ("bench_growth", "--rounds 2", "--rounds 1 --base 1"),
    "models": ("bench_growth", "--rounds 1 --copies 1,2,4,8,16 models", "--rounds 1 --copies 1,2,3 models"),
}


@dataclass(frozen=True)
class Timing(Record):
    model: str
    way: str
    rows: int
    tokens: int  # of each row
    tokens_per_s: tuple[float, ...]  # one for each round
    bound: float | None = None  # tokens per second that the machine's memory and arithmetic allow; ours only


@dataclass(frozen=True)
class Ratio(Record):
    model: str
    name: str
    goal: float | None  # None: none was set
    median: float
    low: float  # of the rounds
    high: float


@dataclass(frozen=True)
class BenchReport(Record):
    """docs/bench.json."""

    machine: str
    cores: int
    versions: dict[str, str]
    device: str = "cpu"  # of the engines
    dtype: str = "float32"
    timings: tuple[Timing, ...] = ()
    ratios: tuple[Ratio, ...] = ()
    start_s: dict[str, float] = field(default_factory=dict)  # "model, engine" -> imports and load
    compile_s: dict[str, float] = field(default_factory=dict)  # "model, threads" -> compiling, in no rate
    same_text: dict[str, float] = field(default_factory=dict)  # greedy texts equal to ours, share
    not_run: dict[str, str] = field(default_factory=dict)  # what, and why
    run: dict[str, Any] | None = None  # tools/run_vs_papermill.py
    growth: dict[str, Any] | None = None  # tools/bench_growth.py
    seconds: dict[str, float] = field(default_factory=dict)  # of each part
    dates: dict[str, str] = field(default_factory=dict)  # of each part
    loads: dict[str, tuple[float, ...]] = field(default_factory=dict)  # load average before and after each
    quick: bool = False
    schema_version: int = SCHEMA_VERSION


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float, float]:
    """Slope of log(seconds) over log(size) by least squares, and its 95% interval (Student t, n - 2)."""
    from scipy import stats

    fit = stats.linregress([math.log(x) for x in sizes], [math.log(y) for y in seconds])
    half = stats.t.ppf(0.975, len(sizes) - 2) * fit.stderr
    return float(fit.slope), float(fit.slope - half), float(fit.slope + half)


def run(
    parts: Sequence[str] = PARTS,
    models: Sequence[str] = MODELS,
    python: str = sys.executable,
    quick: bool = False,
    folder: Path | None = None,
    device: str = "cpu",
    dtype: str = "float32",
) -> BenchReport:
    """Run the chosen parts, about an hour on two quiet cores; progress goes to stderr.

    models, device, dtype: of the engines. python: the interpreter that has the peers. quick: tiny work, to
    try it. folder: each part is saved there when it ends, in place of the same part of a bench.json of this
    machine, device and dtype. Raises LabError for an unknown part, model, device or dtype, for a quick one
    over a full one, and when a part fails.
    """
    for kind, known, asked in (("part", PARTS, parts), ("model", MODELS, models)):
        if unknown := set(asked) - set(known):
            raise LabError(f"There is no {kind} {sorted(unknown)[0]!r} of the bench: use {', '.join(known)}.")
    if python != sys.executable and "peers" in parts:
        _check_python(python)
    report = _start(folder, quick, device, dtype)
    engines = ",".join(part for part in parts if part in ("engine", "peers"))
    flags = ["--only", engines, "--python", python, "--device", report.device, "--dtype", dtype]
    flags += ["--quick"] if quick else []
    steps = [(model, "bench_engines", [model, *flags]) for model in models if engines]
    for part, (tool, full, small) in OTHER.items():
        steps += [(part, tool, (small if quick else full).split())] if part in parts else []
    for part, tool, flags in steps:
        started, before = time.perf_counter(), os.getloadavg()[0]
        found = _tool(tool, flags)
        report = _add(report, part, found, time.perf_counter() - started, (before, os.getloadavg()[0]))
        if folder:
            write(report, folder)
    return report


def _check_python(python: str) -> None:
    """Raise LabError, before an hour of rounds, for a Python that cannot run an engine's process.

    It needs more than the peers: our package and what that stands on, which reads models and prompts.
    """
    try:
        done = subprocess.run([python, "-c", TRIAL], capture_output=True, text=True, cwd=ROOT)
    except OSError as error:
        raise LabError(f"The Python {python} cannot be started ({error.strerror}).") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        way_out = f"install this package there too ({python} -m pip install -e {ROOT})"
        raise LabError(f"The Python {python} cannot run an engine ({last}): {way_out}.")


def _start(folder: Path | None, quick: bool, device: str, dtype: str) -> BenchReport:
    """The report that the parts join: the folder's, if it is of this machine, or an empty one."""
    here = detect(device, dtype)
    without = {} if "cuda" in available_devices() else {"CUDA": "no CUDA on this machine"}
    new = BenchReport(here.name, here.cores, here.versions, here.device, dtype, not_run=without, quick=quick)
    path = folder / "bench.json" if folder else None
    if not path or not path.exists():
        return new
    old = store.read_json(path, BenchReport)
    if quick and not old.quick:
        raise LabError(f"{path} holds a full bench, which a quick one would spoil: choose another --out.")
    same = ("machine", "cores", "device", "dtype", "quick")
    joins = all(getattr(old, name) == getattr(new, name) for name in same)
    return replace(old, versions=old.versions | here.versions) if joins else new


def _add(
    report: BenchReport, part: str, found: dict[str, Any], seconds: float, load: tuple[float, float]
) -> BenchReport:
    """The report with this part (a model of the engines, or a part of its own) in place of the one it had."""
    report = replace(
        report,
        dates=report.dates | {part: time.strftime("%Y-%m-%d")},
        seconds=report.seconds | {part: seconds},
        loads=report.loads | {part: load},
    )
    if part == "run":
        return replace(report, run=found)
    if part not in MODELS:  # growth, and its models
        return replace(report, growth=(report.growth or {}) | found)
    news = [Timing(**t | {"tokens_per_s": tuple(t["tokens_per_s"])}) for t in found["timings"]]
    timings = [*(t for t in report.timings if t.model != part), *news]
    ratios = [*(r for r in report.ratios if r.model != part), *(Ratio(**r) for r in found["ratios"])]
    tables: dict[str, Any] = {}
    for name in ("start_s", "compile_s", "same_text", "not_run"):
        others = {k: v for k, v in getattr(report, name).items() if not k.startswith(f"{part}, ")}
        tables[name] = others | found[name]
    return replace(
        report,
        versions=report.versions | found["versions"],
        timings=tuple(sorted(timings, key=lambda t: MODELS.index(t.model))),
        ratios=tuple(sorted(ratios, key=lambda r: MODELS.index(r.model))),
        **tables,
    )


def command(
    models: Annotated[list[str] | None, typer.Argument(help="Of its models; default: all three.")] = None,
    only: Annotated[str, typer.Option(help="Parts, with commas.")] = ",".join(PARTS),
    python: Annotated[str, typer.Option(help="The Python that has the peers, if not this one.")] = "",
    device: Annotated[str, typer.Option(help="Of the engines: cpu, cuda …")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Of the engines: float32, bfloat16 …")] = "float32",
    out: Annotated[Path, typer.Option(help="Folder for bench.json and bench.png.")] = Path("docs"),
    quick: Annotated[bool, typer.Option("--quick", help="Tiny work, to see that it works.")] = False,
) -> None:
    """Time ours beside its peers and this machine's limit: about an hour on a quiet machine, or in parts."""
    where = quick, out, device, dtype
    for line in summary(run(only.split(","), models or MODELS, python or sys.executable, *where)):
        print(line)
    print(out / "bench.json")


def write(report: BenchReport, folder: Path) -> None:
    """Write bench.json, and bench.png if engines were timed."""
    store.write_json(folder / "bench.json", report)
    if report.timings:
        picture(report).savefig(folder / "bench.png", dpi=110)


def summary(report: BenchReport) -> list[str]:
    """The report as lines of text."""
    lines = [f"{report.machine}, {some(report.cores, 'cores')}, {report.dtype}"]
    lines += [f"load average before {part}: {load[0]:.1f}" for part, load in report.loads.items()]
    for t in report.timings:
        bound = f", {median(t.tokens_per_s) / t.bound:.0%} of the bound" if t.bound else ""
        lines.append(f"{t.model:18} {t.way:32} {median(t.tokens_per_s):9,.1f} tokens/s{bound}")
    for r in report.ratios:
        goal = f", goal {r.goal:.2f}: {'met' if r.median >= r.goal else 'missed'}" if r.goal else ""
        lines.append(f"{r.model:18} against {r.name}: {r.median:.2f} [{r.low:.2f}, {r.high:.2f}]{goal}")
    lines += [f"same greedy text as ours, {name}: {share:.0%}" for name, share in report.same_text.items()]
    lines += [f"start, {name}: {seconds:.1f} s" for name, seconds in report.start_s.items()]
    lines += [f"compiling, {name}: {seconds:.1f} s, in no rate" for name, seconds in report.compile_s.items()]
    if report.run:
        run, jobs = report.run["wall_ratio"], report.run["jobs_1_to_2"]
        lines.append(
            f"run: {run:.2f} times as fast as papermill in a loop, --jobs 2 {jobs:.2f} times as --jobs 1"
        )
    for name, fit in (report.growth or {}).items():
        lines.append(
            f"growth with {name}: exponent {fit['exponent']:.2f} [{fit['low']:.2f}, {fit['high']:.2f}]"
        )
    return [*lines, *(f"not run: {name}: {why}" for name, why in report.not_run.items())]


def picture(report: BenchReport) -> Figure:
    """How many tokens per second does each way write? Log scale; medians, slowest and fastest round."""
    from matplotlib import pyplot, ticker

    models = list(dict.fromkeys(t.model for t in report.timings))
    figure, panels = pyplot.subplots(1, len(models), figsize=(5.2 * len(models), 4), squeeze=False)
    for axes, model in zip(panels[0], models, strict=True):
        rows = sorted((t for t in report.timings if t.model == model), key=lambda t: median(t.tokens_per_s))
        places, middle = range(len(rows)), [median(t.tokens_per_s) for t in rows]
        below = [m - min(t.tokens_per_s) for m, t in zip(middle, rows, strict=True)]
        above = [max(t.tokens_per_s) - m for m, t in zip(middle, rows, strict=True)]
        axes.errorbar(middle, places, xerr=[below, above], fmt="none", ecolor="#718096")
        axes.scatter(middle, places, c=["#c05621" if t.way.startswith("ours") else "#718096" for t in rows])
        bounds = {place: t.bound for place, t in enumerate(rows) if t.bound}
        axes.scatter(list(bounds.values()), list(bounds), marker="|", s=250, color="black")
        axes.set(title=model, xlabel="tokens per second", xscale="log", yticks=places)
        axes.set_yticklabels([t.way for t in rows])
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 3)))
        axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
        axes.xaxis.set_minor_formatter(ticker.NullFormatter())
        axes.grid(axis="x", alpha=0.3)
    machine = f"{report.machine}, {some(report.cores, 'cores')}, {report.dtype}"
    figure.suptitle(f"{machine}: median, slowest and fastest round; bar: the most this machine allows ours")
    figure.tight_layout()
    return figure


def _tool(name: str, flags: Sequence[str]) -> dict[str, Any]:
    """What a tool prints as JSON on its last line."""
    command = [sys.executable, "-m", f"tools.{name}", *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    if done.returncode:
        raise LabError(f"tools/{name}.py failed: its last lines above say why.")
    return dict(json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    try:
        typer.run(command)
    except LabError as error:
        sys.exit(f"bench: {error}")
