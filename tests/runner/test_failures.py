"""Limits and failures: a late row, a model given up, a run that stops, memory that really runs out."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from made_runs import make_result, make_sample, prompt_ids, write_info, write_model
from tiny_models import FEW, PROMPTS, texts, tiny, watch

from nbhelpers import store
from nbhelpers.devices import machine
from nbhelpers.errors import failure_of
from nbhelpers.generation import generate
from nbhelpers.loading import load
from nbhelpers.records import FailOnError, Failure, LabError, Limits, Sample, Settings
from nbhelpers.report import html
from nbhelpers.tracking.result import count_failures, read_scored

JOBS = len(PROMPTS) * FEW.repeats


def fail_when(model: Any, fails: Any) -> Any:
    def check(module: Any, args: Any, kwargs: Any) -> None:
        if fails(kwargs["input_ids"]):
            raise ValueError("a planted fault")

    return model.register_forward_pre_hook(check, with_kwargs=True)


# Limits


def test_a_row_past_its_limit_keeps_its_text_and_counts_as_failed(tmp_path: Path) -> None:
    loaded, path = tiny("gpt2"), tmp_path / "samples.jsonl"
    whole = generate.generate_samples(loaded, PROMPTS, FEW)
    at_once = Limits(generation_s=0.0)  # every row is late after its first token
    late = generate.generate_samples(loaded, PROMPTS, FEW, path, limits=at_once)
    assert {(s.finish_reason, s.new_tokens, s.error, s.failure) for s in late} == {
        ("time", 1, "TimeoutError: the limit of 0 s passed", Failure.TIMEOUT)
    }
    assert all(w.text.startswith(s.text.rstrip("\ufffd")) for w, s in zip(whole, late, strict=True))
    assert texts(generate.generate_samples(loaded, PROMPTS, FEW, path)) == texts(whole)  # tried again


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory", lambda device: (2**30, 10**6))
    with pytest.raises(LabError, match=r"does not fit: .* cache of one row .* free on cpu: choose .*half"):
        load.load("lab-gpt2", "cpu", "float32")


SCARCE = """
import os, resource, sys
import psutil
from nbhelpers.generation import generate
from nbhelpers.loading import load
from nbhelpers.records import Prompt, Settings
loaded = load.load("lab-gpt2", "cpu", "float32")
prompt = [Prompt("p", "Write a post about rain:", "short_post")]
def make(rows):
    settings = Settings(repeats=rows, max_new_tokens=4)
    return generate.generate_samples(loaded, prompt, settings, batch_size=rows)
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


# Failed samples


def test_a_model_that_always_fails_has_every_row_counted(tmp_path: Path) -> None:
    loaded = tiny("gpt2")
    sizes = watch(loaded.model)
    fail_when(loaded.model, lambda ids: True)
    samples = generate.generate_samples(loaded, PROMPTS, FEW, tmp_path / "samples.jsonl", batch_size=3)
    assert {(s.error, s.failure) for s in samples} == {("ValueError: a planted fault", Failure.OTHER)}
    assert len(sizes) == JOBS / 3
    assert len(list(store.read_rows(tmp_path / "samples.jsonl", Sample))) == JOBS


def test_a_device_that_fails_before_a_pass_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(device: str) -> None:
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(machine, "synchronize", lost)
    samples = generate.generate_samples(tiny("gpt2"), PROMPTS, FEW)
    assert [s.error for s in samples] == ["RuntimeError: the device is lost"] * JOBS


@pytest.mark.parametrize(
    ("policy", "rows"), [(FailOnError(1), 1), (FailOnError(share=0.5), 5), (FailOnError(5), 5)]
)
def test_failed_samples_stop_the_run_at_the_policy(tmp_path: Path, policy: FailOnError, rows: int) -> None:
    loaded, path = tiny("gpt2"), tmp_path / "samples.jsonl"
    fail_when(loaded.model, lambda ids: True)
    with pytest.raises(
        LabError, match=f"stopped by --fail-on-error: {rows} of 9 samples failed, the last with"
    ):
        generate.generate_samples(
            loaded, PROMPTS, FEW, path, batch_size=1, limits=Limits(fail_on_error=policy)
        )
    assert len(list(store.read_rows(path, Sample))) == rows


# Kinds


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA: what it says does not matter"), Failure.OUT_OF_MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), Failure.OUT_OF_MEMORY),
        (RuntimeError("MPS backend out of memory"), Failure.OUT_OF_MEMORY),
        (ValueError("a text about out of memory"), Failure.OTHER),
        (MemoryError(), Failure.OUT_OF_MEMORY),
        (TimeoutError("the limit of 300 s passed"), Failure.TIMEOUT),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "y"), Failure.BAD_OUTPUT),
        (LabError("The model is gated.", Failure.REFUSED), Failure.REFUSED),
        (ValueError("a planted fault"), Failure.OTHER),
    ],
)
def test_failures_have_kinds_by_their_type(error: Exception, kind: Failure) -> None:
    assert failure_of(error) == kind


def test_the_report_counts_failures_by_kind(tmp_path: Path) -> None:
    result = make_result("lab-gpt2", [5.0, 6.0])
    rows = [make_sample("lab-gpt2", name, 0) for name in prompt_ids(2)]
    write_info(tmp_path, [result.model])
    folder = write_model(tmp_path, result, [(row, 5.0) for row in rows])
    late = [replace(row, error="TimeoutError: it took too long", failure=Failure.TIMEOUT) for row in rows]
    for row in (*late, rows[1]):  # the second one was tried again and succeeded
        store.append_row(folder / "samples.jsonl", row)
    assert count_failures(None, [read_scored(folder)]) == {"timeout": 1}
    page = html.write_report(tmp_path).read_text()
    assert "By kind: 1 timeout." in page and page.count('<article class="item"') == 2


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
    first = generate.generate_samples(loaded, PROMPTS, FEW, path)
    for changes in ({"seed": 1}, {"temperature": 0.5}, {"max_new_tokens": 11}, {"top_k": 3}):
        other = generate.generate_samples(loaded, PROMPTS, replace(FEW, **changes), path)
        assert not {s.key for s in first} & {s.key for s in other}
    assert len(path.read_text().splitlines()) == 5 * JOBS
