"""The runner: what it refuses, what it executes, what it survives, and one real run from end to end."""

import dataclasses
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import made_runs
import pytest
from made_runs import PIPELINE, SERVED
from test_readme import COMMANDS, RUN

from nbhelpers import registry, store, tasks
from nbhelpers.comparison.compare import ComparisonReport
from nbhelpers.devices import machine
from nbhelpers.generation import latency
from nbhelpers.loading.checkpoint import inspect
from nbhelpers.loading.load import LoadingReport
from nbhelpers.phases import COMPARISON
from nbhelpers.records import (
    FailOnError,
    Failure,
    LabError,
    Limits,
    NotebookStatus,
    Result,
    RunInfo,
    Settings,
)
from nbhelpers.report import html
from nbhelpers.runner import kernels
from nbhelpers.runner.plan import Plan, default_jobs, find_run, plan_resume, plan_run, still_valid
from nbhelpers.runner.run import Run, run_models, write_pages
from nbhelpers.tracking.mlflow_run import TrackingReport
from nbhelpers.tracking.result import read_scored


class Steps:
    """Stands in for notebooks, kernels and the steps beside them; what a notebook does is set by a test."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.killed, self.parameters = run_dir, threading.Event(), {}
        self.report_status, self.do, self.timed = 0, lambda model, name: None, []
        self.timing_status = 0

    def run_notebook(self, notebook, output, parameters, timeout_s, model=""):
        self.parameters[model, output.stem] = parameters
        output.parent.mkdir(parents=True, exist_ok=True)
        output.touch()
        problem = self.do(model, output.stem)
        if problem is None:
            return NotebookStatus(output.stem, model, "passed", 0.1)
        return NotebookStatus(output.stem, model, "failed", 0.1, *problem)

    def hang(self):
        """Until the runner kills the kernel, which papermill reports then."""
        assert self.killed.wait(60)
        return "DeadKernelError: Kernel died", Failure.DEAD_KERNEL

    def start(self, log, target, *arguments):
        status = self.report_status if target is write_pages else 0
        if target is latency.measure_in_turn:
            status = self.timing_status
            self.timed.append([run.settings.model for run in arguments[0]])
        return SimpleNamespace(exitcode=status, join=lambda timeout=None: None)


@pytest.fixture
def steps(monkeypatch, tmp_path):
    made = Steps(tmp_path / "run")
    monkeypatch.setattr("nbhelpers.runner.notebook.run_notebook", made.run_notebook)
    monkeypatch.setattr(kernels, "serve", lambda log: None)
    monkeypatch.setattr(kernels, "start", made.start)
    monkeypatch.setattr(kernels, "exit_code", lambda process, most_s: process.exitcode)
    monkeypatch.setattr(kernels, "kill", lambda where: made.killed.set())
    return made


def planned(steps: Steps, *models: str) -> Plan:
    specs = tuple(inspect(registry.resolve(model)) for model in models)
    started = "2026-01-01T00:00:00+00:00"
    info = RunInfo("run", models, Settings(), started, None, {}, "here", None, specs=specs)
    return Plan(steps.run_dir, info)


def statuses(info: RunInfo, model: str) -> list[tuple[str, str | None]]:
    found = {s.notebook: (s.status, s.error) for s in info.notebooks if s.model == model}
    return [found[name] for name in (PIPELINE if model else (COMPARISON,))]


def test_every_notebook_of_every_model_then_the_comparison(steps):
    events = []
    plan = planned(steps, "lab-gpt2", "lab-opt")
    info = run_models(plan, watch=events.append)
    for model in ("lab-gpt2", "lab-opt", ""):
        assert set(statuses(info, model)) == {("passed", None)}
    done = [(status.model, status.notebook) for status in events]
    phases = (PIPELINE[:2], PIPELINE[2:3])  # between them all models are timed in turn
    wanted = [(m, n) for names in phases for m in ("lab-gpt2", "lab-opt") for n in names]
    assert steps.timed == [["lab-gpt2", "lab-opt"]]
    assert done[: len(wanted)] == wanted
    for model in ("lab-gpt2", "lab-opt"):  # no clock runs any more: two at a time
        assert [name for of, name in done[len(wanted) :] if of == model] == list(PIPELINE[3:])
    assert done[-1] == ("", COMPARISON)
    assert store.read_json(plan.run_dir / "run.json", RunInfo) == info
    assert info.seconds >= 0 and info.jobs == 1 and info.limits == Limits()
    assert info.threads == os.environ.get("OMP_NUM_THREADS", str(machine.usable_cores()))


def test_many_statuses_are_written_in_a_twentieth_of_the_time(steps, monkeypatch):
    """A notebook takes 1 s of a planted clock, a write 2: one in 40 s, for each failure, and at the end."""
    steps.run_dir.mkdir()
    plan, now, written = planned(steps, "lab-gpt2"), [0.0], list[int]()
    monkeypatch.setattr("nbhelpers.runner.run.time", SimpleNamespace(monotonic=lambda: now[0]))

    def write(path: Path, info: RunInfo) -> None:
        now[0] += 2
        written.append(len(info.notebooks))

    monkeypatch.setattr(store, "write_json", write)
    run = Run(plan, plan.info, lambda status: None)
    for number in range(1, 202):
        now[0] += 1
        outcome = "failed" if number in (100, 101) else "passed"
        run.save(NotebookStatus(PIPELINE[0], "lab-gpt2", outcome, 1.0))
    run.save()
    assert written == [1, 39, 77, 100, 101, 139, 177, 201]


def test_a_model_behind_a_server_has_its_own_notebook_in_place_of_two(steps):
    plan = planned(steps, "lab-gpt2")
    served = registry.resolve("server:http://127.0.0.1:9/v1#tiny")
    names = ("lab-gpt2", "server:http://127.0.0.1:9/v1#tiny")
    info = run_models(replace(plan, info=replace(plan.info, models=names, specs=(*plan.info.specs, served))))
    assert [s.notebook for s in info.notebooks if s.model == names[0]] == list(PIPELINE)
    assert [s.notebook for s in info.notebooks if s.model == names[1]] == list(SERVED)
    assert (steps.run_dir / "server--tiny" / "03_server.ipynb").exists()


def test_a_notebook_gets_every_setting(steps):
    plan = planned(steps, "lab-gpt2")
    run_models(replace(plan, info=replace(plan.info, settings=Settings(temperature=0.5, top_k=3))))
    given = steps.parameters["lab-gpt2", PIPELINE[2]]
    assert list(given) == [field.name for field in dataclasses.fields(Settings)]
    assert (given["model"], given["run_dir"], given["temperature"], given["top_k"]) == (
        "lab-gpt2", str(plan.run_dir), 0.5, 3,
    )  # fmt: skip
    assert steps.parameters["", COMPARISON] == {"run_dir": str(plan.run_dir)}


def test_a_notebook_that_fails_costs_its_model_the_rest_and_the_others_nothing(steps):
    dead = ("DeadKernelError: Kernel died", Failure.DEAD_KERNEL)
    steps.do = lambda model, name: dead if (model, name) == ("lab-gpt2", PIPELINE[1]) else None
    info = run_models(planned(steps, "lab-gpt2", "lab-opt"))
    skipped = ("skipped", "02_loading failed")
    assert statuses(info, "lab-gpt2") == [("passed", None), ("failed", dead[0]), *[skipped] * 4]
    assert {s.failure for s in info.notebooks if s.status == "failed"} == {Failure.DEAD_KERNEL}
    assert set(statuses(info, "lab-opt")) == {("passed", None)}
    assert statuses(info, "") == [("passed", None)]


def test_a_kernel_that_hangs_is_killed(steps, monkeypatch):
    monkeypatch.setattr("nbhelpers.runner.run.GRACE_S", 0.3)
    steps.do = lambda model, name: steps.hang() if model and name == PIPELINE[1] else None
    info = run_models(planned(steps, "lab-gpt2"), limits=Limits(cell_s=1))
    failed = ("failed", "stopped by the runner after 1 s")
    assert statuses(info, "lab-gpt2")[:2] == [("passed", None), failed]
    assert info.notebooks[1].failure is Failure.TIMEOUT
    assert statuses(info, "") == [("passed", None)]


def test_a_model_that_lost_a_row_is_executed_again(steps, capsys):
    plan = planned(steps, "lab-gpt2", "lab-opt")
    run_models(plan)
    whole = '{"whole": 1}\n'
    (plan.run_dir / "lab-gpt2" / "samples.jsonl").write_text(whole + '{"to')
    (plan.run_dir / "lab-opt" / "samples.jsonl").write_text(whole)
    kept = still_valid(plan_resume(str(plan.run_dir)))
    assert {status.model for status in kept} == {"lab-opt"}
    assert (plan.run_dir / "lab-gpt2" / "samples.jsonl").read_text() == whole
    assert "lab-gpt2/samples.jsonl was cut off" in capsys.readouterr().err
    assert len(still_valid(plan_resume(str(plan.run_dir)))) == 2 * len(PIPELINE)


def test_a_folder_in_place_of_a_model_s_rows_costs_that_model_alone(steps):
    plan = planned(steps, "lab-gpt2", "lab-opt")
    run_models(plan)
    for name in plan.info.models:
        result = made_runs.make_result(name, made_runs.planted(4, 1))
        made_runs.write_model(plan.run_dir, result, [(made_runs.make_sample(name, "b01", 0), 5.0)])
    (plan.run_dir / "lab-gpt2" / "scores.jsonl").unlink()
    (plan.run_dir / "lab-gpt2" / "scores.jsonl").mkdir()
    unreadable = ("scores.jsonl cannot be written (Is a directory)", Failure.USAGE)
    steps.do = lambda model, name: unreadable if (model, name) == ("lab-gpt2", PIPELINE[3]) else None
    info = run_models(plan_resume(str(plan.run_dir)))
    assert statuses(info, "lab-gpt2")[3] == ("failed", unreadable[0])
    assert statuses(info, "lab-opt") == [("passed", None)] * len(PIPELINE)
    assert "failed: lab-gpt2, 04_scoring" in html.outcome(plan.run_dir, info)
    with pytest.raises(LabError, match=r"scores\.jsonl cannot be read \(Is a directory\)"):
        read_scored(plan.run_dir / "lab-gpt2")


def test_another_scorer_file_has_scores_made_anew_and_answers_kept(steps, tmp_path):
    (tmp_path / "mine.py").write_text("def score(answer, item):\n    return 1.0\n")
    (tmp_path / "items.csv").write_text("id,text\na,One?\n")
    task = tmp_path / "mine.toml"
    task.write_text('prompts = "items.csv"\n[scorers.python]\nfunction = "mine.score"\n')
    plan = planned(steps, "lab-gpt2", "lab-opt")
    info = replace(plan.info, settings=Settings(task=str(task)), task=tasks.load_task(str(task)).digest)
    run_models(replace(plan, info=info))
    now = time.time()
    for model, made in (("lab-gpt2", now - 60), ("lab-opt", now + 60)):
        (plan.run_dir / model / "scores.jsonl").write_text("")
        os.utime(plan.run_dir / model / "scores.jsonl", (made, made))
    os.utime(tmp_path / "mine.py", (now, now))
    kept = [(s.model, s.notebook) for s in still_valid(plan_resume(str(plan.run_dir)))]
    of = {model: [name for one, name in kept if one == model] for model in plan.info.models}
    assert of["lab-gpt2"] == [name for name in of["lab-opt"] if name < "04"] != of["lab-opt"]


def test_a_model_whose_samples_failed_is_executed_again(steps):
    plan = planned(steps, "lab-gpt2", "lab-opt")
    run_models(plan)
    for name, failed in (("lab-gpt2", 1), ("lab-opt", 0)):
        result = made_runs.make_result(name, made_runs.planted(4, 1))
        store.write_json(plan.run_dir / name / "result.json", replace(result, failed=failed))
    kept = still_valid(plan_resume(str(plan.run_dir)))
    assert {status.model for status in kept} == {"lab-opt"}


@pytest.mark.parametrize(
    ("failure", "policy", "goes_on"),
    [
        (Failure.OTHER, FailOnError(), True),
        (Failure.OTHER, FailOnError(count=5), True),
        (Failure.OTHER, FailOnError(count=1), False),
        (Failure.STOPPED, FailOnError(count=5), False),
    ],
)
def test_a_failure_policy_stops_the_run_and_the_run_can_go_on(steps, failure, policy, goes_on):
    fault = ("a fault", failure)
    steps.do = lambda model, name: fault if (model, name) == ("lab-gpt2", PIPELINE[2]) else None
    plan = planned(steps, "lab-gpt2", "lab-opt")
    info = run_models(plan, limits=Limits(fail_on_error=policy))
    assert statuses(info, "lab-gpt2")[2] == ("failed", "a fault")
    second = statuses(info, "lab-opt")
    assert second[2] == (("passed", None) if goes_on else ("skipped", "stopped by --fail-on-error"))
    assert statuses(info, "") == [("passed", None)]
    assert store.read_json(plan.run_dir / "run.json", RunInfo).limits.fail_on_error == policy
    steps.do = lambda model, name: None
    again = run_models(plan_resume(str(plan.run_dir)))
    assert {s.status for s in again.notebooks} == {"passed"}


@pytest.fixture
def interruptible():
    """A test run in the background may have been started with interrupts ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_stops_everything_at_once_and_the_run_can_go_on(steps):
    plan = planned(steps, "lab-gpt2", "lab-opt")

    def interrupted(model: str, name: str):
        if name == PIPELINE[1]:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            return steps.hang()
        return None

    steps.do = interrupted
    with pytest.raises(KeyboardInterrupt):
        run_models(plan)
    saved = store.read_json(plan.run_dir / "run.json", RunInfo)
    assert [(s.model, s.notebook, s.status) for s in saved.notebooks] == [("lab-gpt2", PIPELINE[0], "passed")]
    steps.do = lambda model, name: None
    again = run_models(plan_resume(str(plan.run_dir)))
    assert {s.status for s in again.notebooks} == {"passed"}
    assert again.seconds >= saved.seconds


def test_models_run_side_by_side_with_their_share_of_the_cores(steps, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    together, threads = threading.Barrier(2, timeout=60), set()

    def meet(model: str, name: str) -> None:
        threads.add(os.environ["OMP_NUM_THREADS"])
        if model:
            together.wait()  # passes only if the other one runs at the same time

    steps.do = meet
    info = run_models(planned(steps, "lab-gpt2", "lab-opt"), jobs=2)
    assert {s.status for s in info.notebooks} == {"passed"}
    assert threads == {str(max(1, machine.usable_cores() // 2))} == {info.threads}
    assert "OMP_NUM_THREADS" not in os.environ


def test_the_user_s_own_number_of_threads_is_kept(steps, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert run_models(planned(steps, "lab-gpt2"), jobs=2).threads == "7"


def test_a_report_that_cannot_be_written_is_a_failure_until_it_is(steps):
    plan = planned(steps, "lab-gpt2")
    steps.report_status = 1
    last = run_models(plan).notebooks[-1]
    assert (last.notebook, last.status, last.error) == (
        "report", "failed", "the report was not written; see run.log",
    )  # fmt: skip
    steps.report_status = 0
    again = run_models(plan_resume(str(plan.run_dir)))
    assert {s.status for s in again.notebooks} == {"passed"}


def test_one_model_is_timed_by_its_own_notebook(steps):
    run_models(planned(steps, "lab-gpt2"))
    assert steps.timed == []


def test_models_that_cannot_be_timed_in_turn_go_on_alone_and_the_run_says_so(steps):
    plan = planned(steps, "lab-gpt2", "lab-opt")
    steps.timing_status = 1
    info = run_models(plan)
    failed = [(s.notebook, s.model, s.error) for s in info.notebooks if s.status == "failed"]
    assert failed == [("timing", "", "no timing in turn; see run.log")]
    assert len(info.notebooks) == 2 * len(PIPELINE) + 2  # also the comparison
    steps.timing_status = 0
    again = run_models(plan_resume(str(plan.run_dir)))
    assert {s.status for s in again.notebooks} == {"passed"} and len(steps.timed) == 2


def test_the_runner_itself_stays_light():
    heavy = ("torch", "transformers", "papermill", "mlflow", "matplotlib", "pandas", "numpy")
    code = f"import nbhelpers.runner.run, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_second_runner_of_a_folder_is_refused_and_a_dead_one_is_not_in_the_way(steps):
    folder = steps.run_dir
    folder.mkdir()
    code = (
        "import sys, time\nfrom filelock import FileLock\n"
        "with FileLock(sys.argv[1]):\n    print('in', flush=True)\n    time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(folder / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "in\n"
        with pytest.raises(LabError, match="is being executed by another process: wait"):
            run_models(planned(steps, "lab-gpt2"))
        first.kill()
    assert run_models(planned(steps, "lab-gpt2")).notebooks


@pytest.mark.parametrize(
    ("models", "changes", "message"),
    [
        (["lab-lama"], {}, "lab-llama"),
        (["lab-gpt2", "lab-gpt2"], {}, "same folder 'lab-gpt2': name each model once"),
        (["lab-gpt2"], {"limit": 0}, "limit is 0"),
        (["lab-gpt2"], {"limit": -1}, "limit is -1"),
        (["lab-gpt2"], {"repeats": 0}, "repeats is 0: it must be at least 1"),
        (["lab-gpt2"], {"max_new_tokens": 0}, "max_new_tokens is 0: it must be"),
        (["lab-gpt2"], {"device": "tpu"}, "device is 'tpu': choose one of auto, c"),
        (["lab-gpt2"], {"dtype": "int3"}, "dtype is 'int3': choose one of auto, float32"),
        (["lab-gpt2"], {"prompts": "no/such.jsonl"}, r"no/such\.jsonl cannot be read"),
    ],
)
def test_a_wrong_plan_is_refused_and_makes_nothing(models, changes, message, tmp_path):
    with pytest.raises(LabError, match=message):
        plan_run(models, Settings(**changes), str(tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []


def test_a_run_folder_is_used_once(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(LabError, match="already holds a run: continue it with --resume"):
        plan_run(["lab-gpt2"], Settings(), str(tmp_path))


def test_a_plan_holds_what_was_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompt = {"id": "a", "text": "Write:", "content_type": "short_post"}
    Path("my.jsonl").write_text(json.dumps(prompt))
    plan = plan_run([], Settings(prompts="my.jsonl", repeats=3), ".")
    assert plan.info.models == tuple(registry.embedded_models())
    assert [spec.alias for spec in plan.info.specs] == list(plan.info.models)
    assert plan.info.settings.prompts == str(tmp_path / "my.jsonl")
    assert len(plan.info.prompts) * plan.info.settings.repeats == 3
    assert (plan.info.run, plan.run_dir) == (tmp_path.name, tmp_path)
    assert plan.info.versions["torch"]


def test_a_folder_is_kept_by_its_full_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(store.data_dir() / "models" / "lab-gpt2", "mine")
    plan = plan_run(["lab-opt", "./mine"], Settings(), "run")
    assert plan.info.models == ("lab-opt", str(tmp_path / "mine"))
    store.write_json(plan.run_dir / "run.json", plan.info)
    monkeypatch.chdir(plan.run_dir)
    assert [spec.alias for spec in plan_resume(str(plan.run_dir)).info.specs] == ["lab-opt", "mine"]


def prompts_file(path: Path, **texts: str) -> str:
    rows = ({"id": id, "text": text, "content_type": "short_post"} for id, text in texts.items())
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.mark.parametrize(
    ("now", "changed"),
    [
        ({"a": "Tea:", "b": "Rain!"}, "b"),
        ({"a": "Rain:", "b": "Tea:"}, "a, b"),
        ({"a": "Tea:"}, "b"),
        ({"a": "Tea:", "b": "Rain:", "c": "Sun:"}, "c"),
    ],
)
def test_a_run_is_not_resumed_with_other_prompts(tmp_path, now, changed):
    path = tmp_path / "prompts.jsonl"
    asked = Settings(prompts=prompts_file(path, a="Tea:", b="Rain:"))
    plan = plan_run(["lab-gpt2"], asked, str(tmp_path / "run"))
    store.write_json(plan.run_dir / "run.json", plan.info)
    prompts_file(path, b="Rain:", a="Tea:")  # another order is no other prompt
    assert plan_resume(str(plan.run_dir)).info == plan.info
    prompts_file(path, **now)
    with pytest.raises(LabError, match=rf"prompts of run have changed since it began \({changed}\)"):
        plan_resume(str(plan.run_dir))


def test_another_content_type_is_another_prompt(tmp_path):
    path = tmp_path / "prompts.jsonl"
    plan = plan_run(["lab-gpt2"], Settings(prompts=prompts_file(path, a="Tea:")), str(tmp_path / "run"))
    store.write_json(plan.run_dir / "run.json", plan.info)
    path.write_text(path.read_text().replace("short_post", "business_note"))
    with pytest.raises(LabError, match=r"changed since it began \(a\)"):
        plan_resume(str(plan.run_dir))


def test_a_run_of_a_release_without_digests_is_resumed_and_has_them_then(tmp_path):
    plan = plan_run(["lab-gpt2"], Settings(limit=2), str(tmp_path / "run"))
    path = store.write_json(plan.run_dir / "run.json", plan.info)
    old = {name: value for name, value in json.loads(path.read_text()).items() if name != "prompts"}
    path.write_text(json.dumps(old))
    again = plan_resume(str(plan.run_dir)).info
    assert again == plan.info and list(again.prompts) == ["b01", "b02"]


@pytest.mark.parametrize(
    ("models", "device", "cores", "jobs"),
    [
        (["lab-gpt2", "lab-opt"], "cpu", 2, 2),
        (["lab-gpt2", "lab-opt"], "cpu", 1, 1),
        (["lab-gpt2", "lab-opt"], "cuda", 2, 1),
        (["lab-gpt2"], "cpu", 2, 1),
        (["lab-gpt2", "distilgpt2"], "cpu", 2, 1),  # one of them is not small
        (["lab-gpt2", "some/model"], "cpu", 2, 1),  # its size is not known
    ],
)
def test_two_models_at_a_time_only_where_both_are_small(tmp_path, monkeypatch, models, device, cores, jobs):
    monkeypatch.setattr(machine, "usable_cores", lambda: cores)
    plan = plan_run(models, Settings(device=device), str(tmp_path / "run"))
    assert default_jobs(plan) == jobs


def test_finding_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv("NBHELPERS_OUTPUTS", str(tmp_path))
    with pytest.raises(LabError, match=r"no run 'latest': .* none yet"):
        find_run("latest")
    for number, name in enumerate(("old", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").touch()
        os.utime(tmp_path / name / "run.json", (number, number))
    assert find_run("latest") == find_run("new") == tmp_path / "new"
    assert find_run(str(tmp_path / "old")) == tmp_path / "old"
    with pytest.raises(LabError, match=r"no run 'other': .* old, new"):
        find_run("other")


# One real run, shared by the tests below: one model that works and one whose weights do not fit its config.

PLACE = Path("run")
TOKEN = "hf_plantedSecret0123456789abcdef"


def broken_model(folder: Path) -> Path:
    shutil.copytree(store.data_dir() / "models" / "lab-gpt2", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_embd": 2 * config["n_embd"]}))
    return folder


def command(line: str, *more: str) -> subprocess.CompletedProcess:
    """A command of the README, with more arguments at its end."""
    program, *arguments = line.split()
    whole = [Path(sys.executable).with_name(program), *arguments, *more]
    return subprocess.run(whole, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def commanded(tmp_path_factory):
    """The README's run, with a broken model beside: its folder, that model's, and how the command ended."""
    outputs = tmp_path_factory.mktemp("outputs")
    broken = str(broken_model(tmp_path_factory.mktemp("models") / "broken"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NBHELPERS_OUTPUTS", str(outputs))
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setenv("HUGGING_FACE_HUB_TOKEN", TOKEN)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        run_dir = outputs / PLACE
        more = (broken, "--jobs", "2", "--timeout", "300", "--out", str(run_dir))
        yield run_dir, broken, command(RUN, *more)


@pytest.fixture(scope="module")
def real_run(commanded):
    run_dir, broken, _ = commanded
    return run_dir, broken, store.read_json(run_dir / "run.json", RunInfo)


def test_the_commands_of_the_readme_report_both_models_and_exit_1_for_the_broken_one(commanded):
    run_dir, broken, done = commanded
    assert done.returncode == 1, done.stderr
    assert "\nlab-gpt2 " in done.stdout and "\nnot compared: broken: " in done.stdout
    assert f"\nfailed: {broken}, 02_loading: " in done.stdout
    reports = [line for line in COMMANDS if line.startswith("nbhelpers report")]
    for again in (done, *map(command, reports)):
        assert again.stdout.count("index.html") == 2 and str(run_dir / "index.html") in again.stdout
    assert reports and again.returncode == 0


def test_the_working_model_passes_every_notebook(real_run):
    run_dir, _, info = real_run
    assert info.kernels == ("forked" if kernels.FORKS else "plain")
    assert statuses(info, "lab-gpt2") == [("passed", None)] * 6
    assert statuses(info, "") == [("passed", None)]
    assert {s.notebook for s in info.notebooks if s.model == ""} == {COMPARISON}
    assert store.read_json(run_dir / "run.json", RunInfo) == info
    result = store.read_json(run_dir / "lab-gpt2" / "result.json", Result)
    assert (result.attempted, result.finished, result.settings.limit) == (2, 2, 2)
    assert not list(run_dir.glob("**/.*.json.*"))


def test_the_broken_model_is_reported_and_stops_nobody(real_run):
    run_dir, broken, info = real_run
    first, second, *rest = statuses(info, broken)
    assert first == ("passed", None)
    assert second[0] == "failed" and "broken" in second[1] and "\n" not in second[1]
    assert rest == [("skipped", "02_loading failed")] * 4
    comparison = store.read_json(run_dir / "comparison.json", ComparisonReport)
    assert list(comparison.ranking) == ["lab-gpt2"]
    assert "02_loading" in comparison.excluded["broken"]


def test_every_executed_notebook_has_its_page_and_the_run_its_report(real_run):
    run_dir, _, _ = real_run
    executed = [*run_dir.glob("*.ipynb"), *run_dir.glob("*/*.ipynb")]
    assert len(executed) == 6 + 2 + 1
    assert all(path.with_suffix(".html").stat().st_size > 10_000 for path in executed)
    page = (run_dir / "index.html").read_text()
    assert "lab-gpt2" in page and "broken" in page
    assert run_dir.name in (run_dir.parent / "index.html").read_text()


def test_no_notebook_after_the_answers_loads_the_model_again(real_run):
    run_dir, _, _ = real_run
    for name in PIPELINE[3:]:
        assert "making lab-gpt2/loading.json" not in (run_dir / "lab-gpt2" / f"{name}.ipynb").read_text()
    made = store.read_json(run_dir / "lab-gpt2" / "loading.json", LoadingReport)
    assert made.engine == "loop" and made.ids_digests


def test_mlflow_holds_the_run_with_its_late_notebooks(real_run):
    run_dir, _, _ = real_run
    report = store.read_json(run_dir / "lab-gpt2" / "tracking.json", TrackingReport)
    assert report.metrics_logged >= 50
    folder = run_dir.parent / "mlartifacts" / report.run_id / "artifacts"
    names = sorted(path.name for path in (folder / "notebooks").iterdir())
    assert names == sorted(f"{name}.{kind}" for name in PIPELINE for kind in ("ipynb", "html"))
    late = (folder / "notebooks" / "06_tracking.ipynb").read_bytes()
    assert late == (run_dir / "lab-gpt2" / "06_tracking.ipynb").read_bytes()
    with sqlite3.connect(run_dir.parent / "mlflow.db") as database:  # the whole run, above its models
        query = "select value from tags where run_uuid = ? and key = 'mlflow.parentRunId'"
        [whole] = database.execute(query, [report.run_id]).fetchone()
    held = {path.name for path in (run_dir.parent / "mlartifacts" / whole / "artifacts").rglob("*.*")}
    files = {"comparison.json", "index.html"}
    assert held == {f"{COMPARISON}.ipynb", f"{COMPARISON}.html", *files}
    said = (run_dir / "run.log").read_text()
    assert "Traceback" not in said and "torchao" not in said


def test_a_token_is_in_nothing_that_a_run_writes(real_run):
    run_dir, _, _ = real_run
    files = [path for path in run_dir.parent.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"run.json", "run.log", "06_tracking.ipynb", "mlflow.db", "index.html"} <= names
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]


def tracking_runs(run_dir: Path) -> list[tuple[str, str]]:
    """Name and status of what MLflow's page would list."""
    with sqlite3.connect(run_dir.parent / "mlflow.db") as database:
        return database.execute("select name, status from runs where lifecycle_stage = 'active'").fetchall()


def executed(run_dir: Path) -> dict[str, int]:
    """When each notebook was written."""
    return {str(p.relative_to(run_dir)): p.stat().st_mtime_ns for p in run_dir.glob("**/*.ipynb")}


def test_a_resumed_run_executes_only_what_has_not_passed(real_run):
    run_dir, broken, info = real_run
    files = [path for path in (run_dir / "lab-gpt2").iterdir() if path.name != "run.log"]
    kept = {path: path.read_bytes() for path in files}
    before = executed(run_dir)
    done = command("nbhelpers run --resume latest --json")
    assert done.returncode == 1 and list(json.loads(done.stdout)["ranking"]) == ["lab-gpt2"], done.stderr
    again, after = store.read_json(run_dir / "run.json", RunInfo), executed(run_dir)
    assert {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)} == {
        "broken/02_loading.ipynb",
        f"{COMPARISON}.ipynb",
    }
    assert {path: path.read_bytes() for path in files} == kept
    assert statuses(again, "lab-gpt2") == statuses(info, "lab-gpt2")
    assert statuses(again, broken)[1][0] == "failed"
    assert again.started == info.started and again.seconds > info.seconds
    assert sorted(tracking_runs(run_dir)) == [("run", "FINISHED"), ("run/lab-gpt2", "FINISHED")]
