"""A run that asks prompts until every pair is decided: its order, its looks, where it stops and goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
from made_runs import PIPELINE
from test_run import planned, statuses, steps  # noqa: F401  # a fixture

from nbhelpers import pipeline, registry, store
from nbhelpers.comparison.compare import ComparisonReport
from nbhelpers.records import LabError, Result, RunInfo, Settings
from nbhelpers.runner import kernels
from nbhelpers.runner.plan import Plan, plan_resume, plan_run
from nbhelpers.runner.run import run_models
from tools import chaos

MODELS = ("lab-gpt2", "lab-opt")


def test_the_prompts_are_asked_in_a_random_order_that_the_run_keeps(tmp_path):
    def plan(name: str, **changes):
        return plan_run(MODELS, Settings(**changes), str(tmp_path / name), until_decided=True)

    first, again, other = plan("a"), plan("b"), plan("c", seed=1)
    benchmark = registry.load_prompts()
    order = registry.load_prompts(first.info.settings.prompts)
    assert order != benchmark and sorted(order, key=lambda p: p.id) == benchmark
    assert list(first.info.prompts) == [p.id for p in order] == list(again.info.prompts)
    assert list(other.info.prompts) != list(first.info.prompts)
    assert first.info.looks == (2, 3, 5, 6, 8, 9, 11, 12, 14, 15)
    store.write_json(first.run_dir / "run.json", first.info)
    assert plan_resume(str(first.run_dir)).info == first.info
    assert plan("d", limit=4).info.looks == (1, 2, 3, 4)
    assert plan_run(MODELS, Settings(), str(tmp_path / "e")).info.looks == ()


def test_one_model_has_nothing_to_be_decided(tmp_path):
    with pytest.raises(LabError, match="--until-decided compares models: name at least two"):
        plan_run(MODELS[:1], Settings(), str(tmp_path / "run"), until_decided=True)
    assert list(tmp_path.iterdir()) == []


class Looks:
    """Stands in for the models' answers and the test at each look."""

    def __init__(self, steps) -> None:  # noqa: F811
        self.steps, self.asked, self.compared, self.enough, self.broken = steps, [], [], 6, ""

    def start(self, log, target, *arguments):
        if target is not pipeline.make:
            return self.steps.start(log, target, *arguments)
        run, through = arguments
        assert (through, log) == ("scores", run.folder / kernels.LOG)
        self.asked.append((run.settings.model, run.settings.limit))
        failed = int(run.settings.model == self.broken)
        return SimpleNamespace(exitcode=failed)

    def settled(self, info, runs) -> bool:
        self.compared.append([run.settings.model for run in runs])
        return self.asked[-1][1] >= self.enough


@pytest.fixture
def looks(steps, monkeypatch):  # noqa: F811
    made = Looks(steps)
    monkeypatch.setattr(kernels, "start", made.start)
    monkeypatch.setattr("nbhelpers.comparison.compare.settled", made.settled)
    return made


def with_looks(steps, *models):  # noqa: F811
    plan = planned(steps, *models)
    return replace(plan, info=replace(plan.info, looks=(2, 4, 6, 8)))


def test_all_models_answer_look_by_look_and_the_rest_is_done_once(steps, looks):  # noqa: F811
    info = run_models(with_looks(steps, *MODELS))
    assert looks.asked == [(model, prompts) for prompts in (2, 4, 6) for model in MODELS]
    limits = {name: {steps.parameters[model, name]["limit"] for model in MODELS} for name in PIPELINE}
    assert list(limits.values()) == [{None}] * 2 + [{6}] * 4
    assert {s.status for s in info.notebooks} == {"passed"}


def test_without_a_decision_all_prompts_are_asked(steps, looks):  # noqa: F811
    looks.enough = 99
    run_models(with_looks(steps, *MODELS))
    assert looks.asked[-1] == ("lab-opt", 8) and len(looks.compared) == 4


def test_a_model_that_fails_is_left_out_of_the_looks(steps, looks):  # noqa: F811
    """One before any prompt, one while it answers: its notebook 03 runs, to say why."""
    models = ("lab-gpt2", "lab-opt", "lab-bloom", "lab-llama")
    looks.broken = "lab-opt"
    dead = ("no such file", None)
    steps.do = lambda model, name: dead if (model, name) == ("lab-bloom", PIPELINE[1]) else None
    info = run_models(with_looks(steps, *models))
    assert looks.compared == [["lab-gpt2", "lab-llama"]] * 3
    assert Counter(model for model, _ in looks.asked) == {"lab-gpt2": 3, "lab-opt": 1, "lab-llama": 3}
    assert statuses(info, "lab-bloom")[1:] == [("failed", dead[0]), *[("skipped", "02_loading failed")] * 4]
    assert ("lab-opt", PIPELINE[2]) in steps.parameters


def test_a_resumed_run_makes_again_what_may_show_fewer_prompts(steps, looks):  # noqa: F811
    plan = with_looks(steps, *MODELS)
    run_models(plan)
    steps.parameters.clear()
    info = run_models(Plan(plan.run_dir, store.read_json(plan.run_dir / "run.json", RunInfo)))
    assert set(steps.parameters) == {("", "07_comparison"), *product(MODELS, PIPELINE[2:])}
    assert {s.status for s in info.notebooks} == {"passed"}


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    """The command itself, killed while it answers: the same order, each row once, and the report says it.

    Its notebooks are short ones: whole ones are executed in other tests.
    """
    chaos.short_checkout(place := tmp_path / "checkout")
    prompts = [
        {"id": f"q{i}", "text": f"Write about rain, note {i}:", "content_type": "short_post"}
        for i in range(4)
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    env = {**os.environ, "NBHELPERS_OUTPUTS": str(tmp_path), "PYTHONPATH": str(place)}
    program, folder = [sys.executable, "-m", "nbhelpers.cli", "run"], tmp_path / "run"
    asked = ["--prompts", str(tmp_path / "p.jsonl"), "--repeats", "1", "--max-new-tokens", "8"]
    command = [*program, *MODELS, *asked, "--until-decided", "--jobs", "2", "--out", str(folder)]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=env, cwd=place, **silent) as first:
        rows = folder / MODELS[0] / "samples.jsonl"
        while not rows.exists() or rows.read_bytes().count(b"\n") < 2:
            assert first.poll() is None
            time.sleep(0.05)
        first.send_signal(signal.SIGKILL)
    before = store.read_json(folder / "run.json", RunInfo)
    resume = [*program, "--resume", str(folder)]
    done = subprocess.run(resume, env=env, cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    info = store.read_json(folder / "run.json", RunInfo)
    assert (info.looks, info.prompts, info.started) == (before.looks, before.prompts, before.started)
    report = store.read_json(folder / "comparison.json", ComparisonReport)
    used = len(report.prompts)
    assert report.planned == 4 and used in info.looks
    assert sorted(list(info.prompts)[:used]) == list(report.prompts)
    for model in MODELS:
        keys = [
            json.loads(line)["key"] for line in (folder / model / "samples.jsonl").read_text().splitlines()
        ]
        assert len(set(keys)) == len(keys) == used
        assert store.read_json(folder / model / "result.json", Result).settings.limit == used
    said = f"always-valid test after {used} of 4 prompts"
    assert said in done.stdout and said in Path(folder / "index.html").read_text()
