"""What many models cost: over the nodes of a cluster, in the comparison, and in rows to be read.

    python -m tools.bench_cluster spread [--models 40] [--nodes 1 --nodes 2 --nodes 4] [--share 0.2]
    python -m tools.bench_cluster split [--nodes 1 --nodes 2] [--share 0.2]
    python -m tools.bench_cluster compare [--models 1000] [--prompts 100]
    python -m tools.bench_cluster rows [--models 100] [--rows 10000]

``spread`` starts Ray nodes on loopback and runs copies of one small model on them, ``split`` one large model
with random weights, whose texts the nodes share. Linux holds each node to a
share of a core of its own, so that nodes, head and command do not slow each other down; that takes root, and
cgroups of version 1. Efficiency is the seconds of one node by those of n, n times. The others make a
synthetic run and measure each step in a process of its own; ``rows`` leaves out the report.
Prints a JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from nbhelpers import registry, store
from nbhelpers.comparison import compare
from nbhelpers.devices import machine
from nbhelpers.loading import load
from nbhelpers.records import ModelSpec, Result, RunInfo, Sample, Score, Settings
from nbhelpers.report import html
from nbhelpers.scoring import rubric
from nbhelpers.stats.estimate import estimate
from nbhelpers.tracking.metrics import latency_estimates, quality_estimates

MODEL = "lab-gpt2"
SMALL = ("--limit", "4", "--repeats", "2", "--max-new-tokens", "32")
LARGE = "shape:distilgpt2"
MANY = ("--limit", "4", "--repeats", "200", "--max-new-tokens", "64")
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
CGROUPS = "/sys/fs/cgroup"
TEXT = "A team that measures first spends less. " * 15  # 600 bytes


class Fence:
    """A control group of Linux, version 1, for what is started inside ``with``."""

    def __init__(self, name: str) -> None:
        self.groups = [Path(CGROUPS, kind, f"{name}-{os.getpid()}") for kind in ("cpu", "cpuacct")]
        for group in self.groups:
            group.mkdir()

    def __enter__(self) -> Fence:
        self._enter(self.groups)
        return self

    def __exit__(self, *_: object) -> None:
        self._enter(group.parent for group in self.groups)

    def _enter(self, groups: Iterable[Path]) -> None:
        for group in groups:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    def limit(self, share: float) -> None:
        """From now on all inside has so much of one core, in turns of a tenth of a second."""
        (self.groups[0] / "cpu.cfs_quota_us").write_text(str(int(share * 100_000)))

    def cpu_s(self) -> float:
        """Of the processor, for all that was ever inside."""
        return int((self.groups[1] / "cpuacct.usage").read_text()) / 1e9

    def remove(self) -> None:
        """With what is left inside."""
        for group in self.groups:
            while left := (group / "cgroup.procs").read_text().split():
                for pid in map(int, left):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                time.sleep(0.1)
            group.rmdir()


def spread(models: int, nodes: int, share: float) -> dict[str, Any]:
    """Of a run of so many copies (or of one large model) over so many nodes, each with a share of a core: the
    seconds of the command, the cluster being there before, and those of the processor in head, nodes and
    command."""
    os.environ.update(QUIET)
    from ray.cluster_utils import Cluster

    small: dict[str, Any] = {"object_store_memory": 80_000_000}
    head = {"num_cpus": 0, "node_ip_address": "127.0.0.2", "include_dashboard": False}
    fences = {name: Fence(name) for name in ("head", *(f"node {n + 1}" for n in range(nodes)), "command")}
    with ExitStack() as at_end:
        for fence in fences.values():
            at_end.callback(fence.remove)
        with fences["head"]:
            cluster = Cluster(initialize_head=True, head_node_args=head | small)
        at_end.callback(cluster.shutdown)
        for number in range(nodes):
            with fences[f"node {number + 1}"] as fence:
                cluster.add_node(num_cpus=1, node_ip_address=f"127.0.0.{3 + number}", **small)
            fence.limit(share)
        folder = at_end.enter_context(tempfile.TemporaryDirectory())
        asked = [LARGE, *MANY]
        if models > 1:
            source = load.fetch(registry.resolve(MODEL))
            copies = [shutil.copytree(source, Path(folder) / f"copy{i:02d}") for i in range(models)]
            asked = [*map(str, copies), *SMALL]
        command = [sys.executable, "-m", "nbhelpers.cli", "run", *asked]
        command += ["--out", f"{folder}/run", "--cluster", cluster.address]
        environment = {**os.environ, "NBHELPERS_OUTPUTS": folder, "HF_HUB_OFFLINE": "1"}
        before, began = {name: fence.cpu_s() for name, fence in fences.items()}, time.perf_counter()
        with fences["command"]:
            process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        if code := process.wait():
            sys.exit(f"The run over {nodes} nodes failed with exit code {code}.")
        took = round(time.perf_counter() - began, 1)
        used = {name: round(fence.cpu_s() - before[name], 1) for name, fence in fences.items()}
        return {"seconds": took, "cpu_s": used}


def make_run(folder: Path, models: int, prompts: int, rows: int) -> None:
    """A run as the notebooks leave it: models of different quality, ``rows`` texts each (0: no files of
    them). A prompt is hard or easy for all models alike."""
    draw, now = np.random.default_rng(0), datetime.now(UTC).isoformat(timespec="seconds")
    ids = [f"p{number:05d}" for number in range(prompts)]
    names = [f"model-{number:04d}" for number in range(models)]
    hard, good = draw.normal(0, 1, prompts), draw.normal(5.5, 1, models)
    specs = tuple(ModelSpec(name, f"org/{name}", "hub") for name in names)
    info = RunInfo(folder.name, tuple(names), Settings(""), now, 1.0, machine.versions(), "", None)
    store.write_json(folder / "run.json", RunInfo(**{**vars(info), "specs": specs}))
    for name, quality in zip(names, good, strict=True):
        own = np.clip(quality + hard + draw.normal(0, 0.7, prompts), 1, 10).tolist()
        counts = {"attempted": max(rows, prompts), "finished": max(rows, prompts), "failed": 0}
        speed = {f"latency/words_per_s/{part}": float(200 * quality) for part in ("mean", "low", "high")}
        result = Result(
            **{"model": name, "slug": name, "revision": "r", "family": "gpt2", "parameters": 10**6},
            **{"device": "cpu", "dtype": "float32", "primary": rubric.PRIMARY, "quality_applies": True},
            **counts,
            quality={rubric.PRIMARY: estimate(own, rubric.PRIMARY)},
            metrics=speed,
            per_prompt=dict(zip(ids, own, strict=True)),
            settings=Settings(name),
        )
        store.write_json(folder / name / "result.json", result)
        if rows:
            _write_rows(folder / name, ids, own, rows)


def _write_rows(folder: Path, ids: list[str], means: list[float], rows: int) -> None:
    timed = {"latency_s": 1.0, "ttft_s": 0.01, "tpot_s": 0.005, "share_s": 0.1}
    row = asdict(
        Sample("", folder.name, "r", "", "short_post", 0, 0, "Ask", TEXT, 5, 100, 600, "eos", None, 8)
    )
    score = asdict(Score("", "", 0, "short_post", False, 100, dict.fromkeys(rubric.LOWEST, 5.0)))
    optional = ("failure", "reasoning", "estimated", "logprobs", "reason", "target", "tags")
    row, score = ({n: v for n, v in one.items() if n not in optional} for one in (row | timed, score))
    with (folder / "samples.jsonl").open("w") as samples, (folder / "scores.jsonl").open("w") as scores:
        for number in range(rows):
            place = number % len(ids)
            own = {
                "key": f"{folder.name}-{number:021d}",
                "prompt_id": ids[place],
                "repeat": number // len(ids),
            }
            score["values"] = score["values"] | {rubric.PRIMARY: means[place]}
            samples.write(json.dumps(row | own | {"prompt": f"Ask {ids[place]}"}) + "\n")
            scores.write(json.dumps(score | own) + "\n")


def aggregated(folder: Path) -> None:
    """What 04 to 06 read and add up of each model in turn, without the rubric's own work on a text."""
    for path in sorted(folder.glob("*/samples.jsonl")):
        scores = list(store.read_rows(path.with_name("scores.jsonl"), Score))
        samples = list(store.read_rows(path, Sample))
        quality_estimates(scores)
        latency_estimates(samples[:16])


def measured(step: Callable[[Path], object], folder: Path) -> dict[str, float]:
    """Seconds, those of the processor, and peak memory (GB) of a step in a process of its own."""
    context = multiprocessing.get_context("spawn")
    mine, other = context.Pipe()
    process = context.Process(target=_measure, args=(step, folder, other))
    process.start()
    other.close()
    found: dict[str, float] = mine.recv()
    process.join()
    return found


def _measure(step: Callable[[Path], object], folder: Path, answer: Any) -> None:
    machine.reset_peak("cpu")
    began, busy = time.perf_counter(), time.process_time()
    step(folder)
    took = {"seconds": time.perf_counter() - began, "cpu_s": time.process_time() - busy}
    took["peak_gb"] = (machine.peak_memory("cpu") or 0) / 1e9
    answer.send({name: round(value, 3) for name, value in took.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("spread", "split", "compare", "rows"))
    parser.add_argument("--models", type=int)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--rows", type=int, default=10_000, help="of a model")
    parser.add_argument("--share", type=float, default=0.2, help="of a core, for each node")
    parser.add_argument("--nodes", type=int, action="append", help="default: 1, 2 and 4, of split 1 and 2")
    given = parser.parse_args()
    models = given.models or {"spread": 40, "split": 1, "compare": 1000, "rows": 100}[given.part]
    found: dict[str, Any] = {"models": models}
    if given.part in ("spread", "split"):
        nodes = given.nodes or ([1, 2, 4] if given.part == "spread" else [1, 2])
        if not os.access(Path(CGROUPS, "cpu"), os.W_OK):
            sys.exit(f"A share of a core needs {CGROUPS}/cpu (cgroups, version 1), writable: run it as root.")
        found["share"] = given.share
        found["nodes"] = {count: spread(models, count, given.share) for count in nodes}
        one, *more = ((count, count * of["seconds"]) for count, of in found["nodes"].items())
        found["efficiency"] = {count: round(one[1] / product, 3) for count, product in more}
    else:
        rows = given.rows if given.part == "rows" else 0
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "run"
            make_run(folder, models, given.prompts, rows)
            found |= {"prompts": given.prompts, "rows": rows}
            if rows:
                found["04 to 06"] = measured(aggregated, folder)
            found["07"] = measured(compare.compare_run, folder)
            if not rows:
                found["report"] = measured(html.write_report, folder)
                found["page_mb"] = round((folder / "index.html").stat().st_size / 1e6, 2)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
