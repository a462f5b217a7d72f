"""Limits and failures: a late row, a model given up, a run that stops, memory that really runs out."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_runs import make_result, make_sample, prompt_ids, write_info, write_model
from test_generation import FEW, PROMPTS, texts
from tiny_models import tiny, watch

from nbhelpers import registry, store
from nbhelpers.comparison import compare as comparison
from nbhelpers.devices import device as devices
from nbhelpers.generation import failures
from nbhelpers.generation import generate as generation
from nbhelpers.loading import load as loading
from nbhelpers.records import Failure, LabError, Sample, Settings
from nbhelpers.report import html as report
from nbhelpers.runner import limits

JOBS = len(PROMPTS) * FEW.repeats


@pytest.fixture
def allow(monkeypatch: pytest.MonkeyPatch) -> Any:
    def tell(**changes: float) -> None:
        for name, value in limits.Limits(**changes).environment().items():
            monkeypatch.setenv(name, value)

    return tell


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(failures.Breaker.__init__, "__defaults__", (3, 0.0, time.sleep))
    yield


def fail_when(model: Any, fails: Any) -> Any:
    def check(module: Any, args: Any, kwargs: Any) -> None:
        if fails(kwargs["input_ids"]):
            raise ValueError("a planted fault")

    return model.register_forward_pre_hook(check, with_kwargs=True)


# Limits


def test_a_row_past_its_limit_keeps_its_text_and_counts_as_failed(tmp_path: Path, allow: Any) -> None:
    loaded, path = tiny("gpt2"), tmp_path / "samples.jsonl"
    whole = generation.generate_samples(loaded, PROMPTS, FEW)
    allow(batch_s=0.0)  # every row is late after its first token
    late = generation.generate_samples(loaded, PROMPTS, FEW, path)
    assert {(s.finish_reason, s.new_tokens, s.error) for s in late} == {
        ("time", 1, "TimeoutError: the limit of 0 s passed")
    }
    assert all(w.text.startswith(s.text.rstrip("\ufffd")) for w, s in zip(whole, late, strict=True))
    allow()
    assert texts(generation.generate_samples(loaded, PROMPTS, FEW, path)) == texts(whole)  # tried again


def test_loading_waits_for_memory_as_long_as_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "MEMORY_LOOK_S", 0.0)
    spec = replace(registry.resolve("lab-gpt2"), parameters=10**6)
    place = replace(devices.detect("cpu", "float32"), memory_free_bytes=4 * 10**6)
    with pytest.raises(LabError, match=r"does not fit: .* cache of one row .* free on cpu may .*--wait-for"):
        loading._wait_for_room(spec, place)
    free = iter([2**20, 2**20, 2**40])
    monkeypatch.setattr(devices, "free_memory", lambda device: next(free))
    loading._wait_for_room(spec, place, 60.0)
    assert list(free) == []


SCARCE = """
import os, resource, sys
import psutil
from nbhelpers.generation import generate as generation
from nbhelpers.loading import load as loading
from nbhelpers.records import Prompt, Settings
loaded = loading.load("lab-gpt2", "cpu", "float32")
prompt = [Prompt("p", "Write a post about rain:", "short_post")]
def make(rows):
    settings = Settings(repeats=rows, max_new_tokens=4)
    return generation.generate_samples(loaded, prompt, settings, batch_size=rows)
make(4)
room = psutil.Process().memory_info().vms + (24 << 20)
resource.setrlimit(resource.RLIMIT_AS, (room, room))
rows = make(600)
print(sum(row.error is None for row in rows), max(row.batch_size for row in rows))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux holds a process to its address space")
def test_a_process_that_really_runs_out_of_memory_goes_on_with_less() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SCARCE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    finished, size = map(int, done.stdout.split())
    assert finished == 600 and 1 <= size < 600


# The breaker


def test_the_breaker_opens_lets_one_through_and_closes_or_gives_up() -> None:
    slept: list[float] = []
    breaker = failures.Breaker(3, 7.0, slept.append)
    for passed in (False, False, True, False, False):
        breaker.record(passed)
        assert (breaker.state, breaker.on_trial()) == ("closed", False)
    breaker.record(False)
    assert breaker.state == "open" and slept == []
    assert breaker.on_trial() and breaker.on_trial() and slept == [7.0]
    breaker.record(True)
    assert (breaker.state, breaker.given_up) == ("closed", False)
    for _ in range(3):
        breaker.record(False)
    assert breaker.on_trial() and not breaker.given_up
    breaker.record(False)
    assert breaker.given_up


def test_a_model_that_always_fails_is_given_up_and_every_row_is_counted(tmp_path: Path) -> None:
    loaded = tiny("gpt2")
    sizes = watch(loaded.model)
    fail_when(loaded.model, lambda ids: True)
    samples = generation.generate_samples(loaded, PROMPTS, FEW, tmp_path / "samples.jsonl", batch_size=3)
    errors = [s.error for s in samples]
    assert errors.count("ValueError: a planted fault") == 3 + 1  # a batch of three, then one on trial
    assert sum("was given up after 4 failures in a row" in str(error) for error in errors) == JOBS - 4
    assert len(sizes) == 2
    assert len(list(store.read_rows(tmp_path / "samples.jsonl", Sample))) == JOBS


def test_a_model_that_recovers_on_trial_goes_on() -> None:
    loaded = tiny("gpt2")
    expected = texts(generation.generate_samples(loaded, PROMPTS, FEW))
    passes = itertools.count()
    fail_when(loaded.model, lambda ids: next(passes) == 0)
    samples = generation.generate_samples(loaded, PROMPTS, FEW, batch_size=3)
    assert sum(s.error is not None for s in samples) == 3
    assert all(one in expected for one, s in zip(texts(samples), samples, strict=True) if not s.error)


@pytest.mark.parametrize(("policy", "rows"), [(1, 1), (0.5, 5), (5, 5)])
def test_failed_samples_stop_the_run_at_the_policy(
    tmp_path: Path, allow: Any, policy: float, rows: int
) -> None:
    loaded, path = tiny("gpt2"), tmp_path / "samples.jsonl"
    fail_when(loaded.model, lambda ids: True)
    allow(fail_on_error=policy)
    with pytest.raises(
        LabError, match=f"stopped by --fail-on-error: {rows} of 9 samples failed, the last with"
    ):
        generation.generate_samples(loaded, PROMPTS, FEW, path, batch_size=1)
    assert len(list(store.read_rows(path, Sample))) == rows


# Kinds


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ("OutOfMemoryError: CUDA out of memory. Tried to allocate", "out of memory"),
        ("The weights of x take 15.0 GiB in float32, ... has 3.1 GiB free: choose", "out of memory"),
        ("TimeoutError: the limit of 300 s passed", "timeout"),
        ("a cell passed the limit of 1800 s", "timeout"),
        ("stopped by the runner after 1890 s", "timeout"),
        ("DeadKernelError: Kernel died", "dead kernel"),
        ("the kernel stopped early: 3 of 9 code cells never ran", "dead kernel"),
        ("the worker process died; see lab-gpt2/worker.log", "dead kernel"),
        ("The download of 'org/name' was stopped after 1800 s: check the network", "download"),
        ("GivenUp: lab-gpt2 was given up after 4 failures in a row", "refused"),
        ("The model 'x' asks to run Python code from its own repository (auto_map), which the laboratory "
         "never does: choose", "refused"),
        ("ValueError: logits hold NaN", "bad output"),
        ("ValueError: a planted fault", "other"),
    ],
)  # fmt: skip
def test_failures_have_kinds(error: str, kind: str) -> None:
    assert failures.kind(error) == kind


def test_the_report_counts_failures_by_kind(tmp_path: Path) -> None:
    result = make_result("lab-gpt2", [5.0, 6.0])
    rows = [make_sample("lab-gpt2", name, 0) for name in prompt_ids(2)]
    write_info(tmp_path, [result.model])
    folder = write_model(tmp_path, result, [(row, 5.0) for row in rows])
    late = [replace(row, error="TimeoutError: it took too long", failure=Failure.TIMEOUT) for row in rows]
    for row in (*late, rows[1]):  # the second one was tried again and succeeded
        store.append_row(folder / "samples.jsonl", row)
    assert comparison.count_failures(tmp_path, None) == {"timeout": 1}
    assert "By kind: 1 timeout." in report.write_report(tmp_path).read_text()


# Rows on the disk


HOLD = """
import sys, time
from pathlib import Path
from nbhelpers import store
from nbhelpers.records import Settings
with store.appending(Path(sys.argv[1])) as append:
    for n in range(3):
        append(Settings(seed=n))
    print("ready", flush=True)
    time.sleep(600)
"""


def test_rows_of_a_killed_writer_are_kept_and_nobody_writes_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE) as writer:
        assert writer.stdout and writer.stdout.readline() == b"ready\n"
        monkeypatch.setattr(store, "LOCK_S", 0.1)
        with pytest.raises(LabError, match="is being written by another process"), store.appending(path):
            pass
        writer.send_signal(signal.SIGKILL)
    assert [row.seed for row in store.read_rows(path, Settings)] == [0, 1, 2]
    path.write_bytes(path.read_bytes()[:-5])
    with store.appending(path) as append:
        append(Settings(seed=9))
    assert [row.seed for row in store.read_rows(path, Settings)] == [0, 1, 9]
    assert "warning: the last line of" in capsys.readouterr().err


def test_settings_that_differ_are_another_row(tmp_path: Path) -> None:
    loaded, path = tiny("gpt2"), tmp_path / "samples.jsonl"
    first = generation.generate_samples(loaded, PROMPTS, FEW, path)
    for changes in ({"seed": 1}, {"temperature": 0.5}, {"max_new_tokens": 11}, {"top_k": 3}):
        other = generation.generate_samples(loaded, PROMPTS, replace(FEW, **changes), path)
        assert not {s.key for s in first} & {s.key for s in other}
    assert len(path.read_text().splitlines()) == 5 * JOBS
