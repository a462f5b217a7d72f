"""The runner: what it refuses, what it executes, what it survives, and one real run from end to end."""

import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import made_runs
import psutil
import pytest
from test_readme import COMMANDS

from nbhelpers import registry, store
from nbhelpers.comparison.compare import ComparisonReport
from nbhelpers.devices import device as devices
from nbhelpers.records import LabError, Result, RunInfo, Settings
from nbhelpers.runner import forked, processes
from nbhelpers.runner import run as batch
from nbhelpers.runner.limits import Limits
from nbhelpers.runner.worker import COMPARISON, PIPELINE
from nbhelpers.tracking.mlflow_run import TrackingReport

# What a worker is to the runner, without notebooks: argv is RUN_DIR TIMEOUT [MODEL], or RUN_DIR "report".
STAND_IN = """
import json, os, subprocess, sys, time
from pathlib import Path
run_dir, timeout, model = Path(sys.argv[1]), sys.argv[2], (sys.argv[3:] or [""])[0]
names = %r if model else [%r]

def say(**event):
    print(json.dumps(event), flush=True)

def passed(name):
    say(start=name)
    say(notebook=name, model=model, status="passed", seconds=0.1, error=None)

def sleeper():
    # A grandchild in a session of its own, as kernels are.
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    (run_dir / f"pid-{child.pid}").touch()

if timeout == "report":
    sys.exit((run_dir / "no-report").exists())
"""


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """Replace the worker by the given script; returns a plan over the given models."""

    def plan(script: str, *models: str) -> batch.Plan:
        body = STAND_IN % (list(PIPELINE), COMPARISON) + script
        monkeypatch.setattr(batch, "WORKER", ("-c", body))
        monkeypatch.setattr(batch, "DATABASE", ("-c", ""))
        specs = tuple(registry.resolve(model) for model in models)
        info = RunInfo("run", models, Settings(), "2026-01-01T00:00:00+00:00", None, {}, "here", None)
        return batch.Plan(tmp_path / "run", specs, info, 1)

    return plan


def statuses(info: RunInfo, model: str) -> list[tuple[str, str | None]]:
    found = {s.notebook: (s.status, s.error) for s in info.notebooks if s.model == model}
    return [found[name] for name in (PIPELINE if model else (COMPARISON,))]


def grandchildren(run_dir: Path) -> list[int]:
    return [int(path.name.removeprefix("pid-")) for path in run_dir.glob("pid-*")]


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


PASS_ALL = "for name in names: passed(name)"


def test_every_notebook_of_every_model_then_the_comparison(stand_in):
    events = []
    plan = stand_in(PASS_ALL, "lab-gpt2", "lab-opt")
    info = batch.run(plan, watch=events.append)
    for model in ("lab-gpt2", "lab-opt", ""):
        assert set(statuses(info, model)) == {("passed", None)}
    wanted = [(m, n) for m in ("lab-gpt2", "lab-opt") for n in PIPELINE] + [("", COMPARISON)]
    assert [(e.model, e.notebook) for e in events if e.status is None] == wanted
    assert [(e.model, e.notebook) for e in events if e.status is not None] == wanted
    assert store.read_json(plan.run_dir / "run.json", RunInfo) == info
    assert info.seconds > 0 and info.jobs == 1
    assert info.threads == processes.Children(devices.usable_cores()).environment["OMP_NUM_THREADS"]


def test_a_worker_that_dies_fails_its_notebook_and_not_the_others(stand_in):
    script = 'passed(names[0])\nif model == "lab-gpt2":\n    say(start=names[1]); os._exit(3)\n'
    script += "for name in names[1:]: passed(name)"
    info = batch.run(stand_in(script, "lab-gpt2", "lab-opt"))
    died = ("failed", "the worker process died; see lab-gpt2/worker.log")
    skipped = ("skipped", "02_loading failed")
    assert statuses(info, "lab-gpt2") == [("passed", None), died, *[skipped] * 4]
    assert set(statuses(info, "lab-opt")) == {("passed", None)}
    assert statuses(info, "") == [("passed", None)]


def test_a_worker_that_cannot_go_on_says_why(stand_in):
    script = 'say(problem="the folder is gone.") if model else passed(names[0])'
    info = batch.run(stand_in(script, "lab-gpt2"))
    assert statuses(info, "lab-gpt2")[0] == ("failed", "the folder is gone.")
    assert statuses(info, "lab-gpt2")[5] == ("skipped", "01_device_detection failed")


def test_what_a_worker_writes_is_kept_in_its_log(stand_in):
    plan = stand_in('print("a library says", file=sys.stderr)\n' + PASS_ALL, "lab-gpt2")
    batch.run(plan)
    assert "a library says" in (plan.run_dir / "lab-gpt2" / "worker.log").read_text()
    assert "a library says" in (plan.run_dir / "worker.log").read_text()


HANG = "passed(names[0])\nif model:\n    say(start=names[1]); sleeper(); time.sleep(600)"


def test_a_worker_that_hangs_is_killed_with_its_descendants(stand_in, monkeypatch):
    monkeypatch.setattr(batch, "GRACE_S", 1.0)
    plan = stand_in(HANG, "lab-gpt2")
    info = batch.run(plan, limits=Limits(cell_s=2.0))
    assert statuses(info, "lab-gpt2")[:2] == [("passed", None), ("failed", "stopped by the runner after 3 s")]
    assert statuses(info, "") == [("passed", None)]
    [pid] = grandchildren(plan.run_dir)
    assert gone(pid)


def test_a_model_that_lost_a_row_is_executed_again(stand_in, capsys):
    plan = stand_in(PASS_ALL, "lab-gpt2", "lab-opt")
    batch.run(plan)
    whole = '{"whole": 1}\n'
    (plan.run_dir / "lab-gpt2" / "samples.jsonl").write_text(whole + '{"to')
    (plan.run_dir / "lab-opt" / "samples.jsonl").write_text(whole)
    kept = batch._mended(batch.plan_resume(str(plan.run_dir))).notebooks
    assert {status.model for status in kept} == {"lab-opt", ""}
    assert (plan.run_dir / "lab-gpt2" / "samples.jsonl").read_text() == whole
    assert "the last line of lab-gpt2/samples.jsonl was cut off" in capsys.readouterr().err
    assert len(batch._mended(batch.plan_resume(str(plan.run_dir))).notebooks) == 2 * len(PIPELINE) + 1


def test_a_model_whose_samples_failed_is_executed_again(stand_in):
    plan = stand_in(PASS_ALL, "lab-gpt2", "lab-opt")
    batch.run(plan)
    for name, failed in (("lab-gpt2", 1), ("lab-opt", 0)):
        result = made_runs.make_result(name, made_runs.planted(4, 1))
        store.write_json(plan.run_dir / name / "result.json", replace(result, failed=failed))
    kept = batch._mended(batch.plan_resume(str(plan.run_dir))).notebooks
    assert {status.model for status in kept} == {"lab-opt", ""}


def test_a_model_has_a_limit_for_all_its_notebooks(stand_in):
    script = "for name in names:\n    if model: time.sleep(1)\n    passed(name)"
    info = batch.run(stand_in(script, "lab-gpt2"), limits=Limits(model_s=2.5))
    said = [status for status, _ in statuses(info, "lab-gpt2")]
    number = said.index("failed")
    assert number < 3 and said == ["passed"] * number + ["failed"] + ["skipped"] * (5 - number)
    assert statuses(info, "lab-gpt2")[number][1] == "stopped by the runner after 2 s for a model"
    assert statuses(info, "") == [("passed", None)]


FAIL = """
for name in names:
    if model and name == names[2]:
        say(start=name); say(notebook=name, model=model, status="failed", seconds=0.1, error=%r)
    elif not model or name < names[2]:
        passed(name)
"""


@pytest.mark.parametrize(
    ("error", "policy", "goes_on"),
    [
        ("ValueError: a fault", 0.0, True),
        ("ValueError: a fault", 5.0, True),
        ("ValueError: a fault", 1.0, False),
        ("The run was stopped by --fail-on-error: 5 of 9 samples failed, the last with a fault", 5.0, False),
    ],
)
def test_a_failure_policy_stops_the_run_and_the_run_can_go_on(stand_in, error, policy, goes_on):
    plan = stand_in(FAIL % error, "lab-gpt2", "lab-opt")
    info = batch.run(plan, limits=Limits(fail_on_error=policy))
    assert statuses(info, "lab-gpt2")[2] == ("failed", error)
    second = statuses(info, "lab-opt")
    assert second[0] == (("passed", None) if goes_on else ("skipped", "stopped by --fail-on-error"))
    assert statuses(info, "") == [("passed", None)]
    stand_in(PASS_ALL)
    again = batch.run(batch.plan_resume(str(plan.run_dir)))
    assert {s.status for s in again.notebooks} == {"passed"}


@pytest.fixture
def interruptible():
    """A test run in the background may have been started with interrupts ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_stops_everything_at_once_and_the_run_can_go_on(stand_in):
    plan = stand_in(HANG, "lab-gpt2", "lab-opt")
    started = time.monotonic()

    def interrupt(event: batch.Event) -> None:
        if event.notebook == PIPELINE[1] and event.status is None:
            threading.Thread(target=interrupt_when_there_is_a_grandchild, args=(plan.run_dir,)).start()

    with pytest.raises(KeyboardInterrupt):
        batch.run(plan, watch=interrupt)
    assert time.monotonic() - started < 60  # the worker itself would sleep 600 s
    [pid] = grandchildren(plan.run_dir)  # the second model never started
    assert gone(pid)
    saved = store.read_json(plan.run_dir / "run.json", RunInfo)
    assert [(s.model, s.notebook, s.status) for s in saved.notebooks] == [("lab-gpt2", PIPELINE[0], "passed")]
    stand_in(PASS_ALL)
    again = batch.run(batch.plan_resume(str(plan.run_dir)))
    assert {s.status for s in again.notebooks} == {"passed"}
    assert again.seconds > saved.seconds


def interrupt_when_there_is_a_grandchild(run_dir: Path) -> None:
    while not grandchildren(run_dir):
        time.sleep(0.01)
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


def test_models_run_side_by_side_with_their_share_of_the_cores(stand_in, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    meet = """
if model:
    (run_dir / f"threads-{model}").write_text(os.environ["OMP_NUM_THREADS"])
    limit = time.monotonic() + 60
    while len(list(run_dir.glob("threads-*"))) < 2:  # passes only if the other one runs at the same time
        if time.monotonic() > limit: sys.exit(1)
        time.sleep(0.01)
"""
    plan = stand_in(meet + PASS_ALL, "lab-gpt2", "lab-opt")
    info = batch.run(plan, jobs=2)
    assert {s.status for s in info.notebooks} == {"passed"}
    threads = str(max(1, devices.usable_cores() // 2))
    assert {path.read_text() for path in plan.run_dir.glob("threads-*")} == {threads}


def test_the_user_s_own_number_of_threads_is_kept(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert processes.Children(threads=1).environment["OMP_NUM_THREADS"] == "7"


def test_a_report_that_cannot_be_written_is_a_failure_until_it_is(stand_in):
    plan = stand_in(PASS_ALL, "lab-gpt2")
    plan.run_dir.mkdir()
    (plan.run_dir / "no-report").touch()
    info = batch.run(plan)
    last = info.notebooks[-1]
    assert (last.notebook, last.status, last.error) == (
        "report", "failed", "the report was not written; see worker.log",
    )  # fmt: skip
    (plan.run_dir / "no-report").unlink()
    again = batch.run(batch.plan_resume(str(plan.run_dir)))
    assert {s.status for s in again.notebooks} == {"passed"}


GENERATIONS = """
import subprocess, sys, time
left = int(sys.argv[1])
if left:
    subprocess.Popen([sys.executable, "-c", sys.argv[2], str(left - 1), sys.argv[2]], start_new_session=True)
else:
    print("ready", flush=True)
time.sleep(600)
"""


def test_kill_tree_reaches_every_generation():
    command = [sys.executable, "-c", GENERATIONS, "2", GENERATIONS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as root:
        assert root.stdout.readline() == "ready\n"
        family = [root.pid, *(p.pid for p in psutil.Process(root.pid).children(recursive=True))]
        assert len(family) == 3
        processes.kill_tree(root.pid)
    assert all(gone(pid) for pid in family)
    processes.kill_tree(root.pid)  # a process that is no more


def test_the_runner_itself_stays_light():
    heavy = ("torch", "transformers", "papermill", "mlflow", "matplotlib", "pandas", "numpy")
    code = f"import nbhelpers.runner.run, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("models", "changes", "message"),
    [
        (["lab-lama"], {}, "lab-llama"),
        (["lab-gpt2", "lab-gpt2"], {}, "same folder 'lab-gpt2': name each model once"),
        (["lab-gpt2"], {"limit": 0}, "limit is 0"),
        (["lab-gpt2"], {"limit": -1}, "limit is -1"),
        (["lab-gpt2"], {"repeats": 0}, "--repeats must be at least 1, not 0"),
        (["lab-gpt2"], {"max_new_tokens": 0}, "--max-new-tokens must be at least 1"),
        (["lab-gpt2"], {"device": "tpu"}, "unknown device 'tpu': choose one of auto, cpu"),
        (["lab-gpt2"], {"dtype": "int3"}, "unknown dtype 'int3': choose one of auto, float32"),
        (["lab-gpt2"], {"prompts": "no/such.jsonl"}, r"no/such\.jsonl cannot be read"),
    ],
)
def test_a_wrong_plan_is_refused_and_makes_nothing(models, changes, message, tmp_path):
    with pytest.raises(LabError, match=message):
        batch.plan_run(models, Settings(**changes), str(tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(LabError, match=r"cannot write to .*below .*choose another folder with --out"):
        batch.plan_run(["lab-gpt2"], Settings(), str(tmp_path / "file" / "below"))


def test_a_run_folder_is_used_once(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(LabError, match="already holds a run: continue it with --resume"):
        batch.plan_run(["lab-gpt2"], Settings(), str(tmp_path))


def test_a_plan_holds_what_was_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompt = {"id": "a", "text": "Write:", "content_type": "short_post"}
    Path("my.jsonl").write_text(json.dumps(prompt))
    plan = batch.plan_run([], Settings(prompts="my.jsonl", repeats=3), ".")
    assert plan.info.models == tuple(registry.embedded_models())
    assert [spec.alias for spec in plan.specs] == list(plan.info.models)
    assert plan.info.settings.prompts == str(tmp_path / "my.jsonl")
    assert plan.samples_per_model == 3
    assert (plan.info.run, plan.run_dir) == (tmp_path.name, tmp_path)
    assert plan.info.versions["torch"]


def test_a_folder_is_kept_by_its_full_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(store.data_dir() / "models" / "lab-gpt2", "mine")
    plan = batch.plan_run(["lab-opt", "./mine"], Settings(), "run")
    assert plan.info.models == ("lab-opt", str(tmp_path / "mine"))
    store.write_json(plan.run_dir / "run.json", plan.info)
    monkeypatch.chdir(plan.run_dir)
    assert [spec.alias for spec in batch.plan_resume(str(plan.run_dir)).specs] == ["lab-opt", "mine"]


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
    monkeypatch.setattr(devices, "usable_cores", lambda: cores)
    plan = batch.plan_run(models, Settings(device=device), str(tmp_path / "run"))
    assert batch.default_jobs(plan) == jobs


def test_finding_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv("NBHELPERS_OUTPUTS", str(tmp_path))
    with pytest.raises(LabError, match=r"no run 'latest': .* none yet"):
        batch.find_run("latest")
    for name, started in (("old", "2026-01-01T00:00:00+00:00"), ("new", "2026-01-02T00:00:00+00:00")):
        info = RunInfo(name, ("lab-gpt2",), Settings(), started, None, {}, "", None)
        store.write_json(tmp_path / name / "run.json", info)
    (tmp_path / "zz").mkdir()
    (tmp_path / "zz" / "run.json").write_text("broken")
    assert batch.find_run("latest") == batch.find_run("new") == tmp_path / "new"
    assert batch.find_run(str(tmp_path / "old")) == tmp_path / "old"
    with pytest.raises(LabError, match=r"no run 'other': .* new, old"):
        batch.find_run("other")


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
    [line] = [line for line in COMMANDS if line.startswith("nbhelpers run ")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NBHELPERS_OUTPUTS", str(outputs))
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setenv("HUGGING_FACE_HUB_TOKEN", TOKEN)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        run_dir = outputs / PLACE
        more = (broken, "--jobs", "2", "--timeout", "300", "--out", str(run_dir))
        yield run_dir, broken, command(line, *more)


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
    assert info.kernels == ("forked" if forked.possible() else "plain: this system cannot fork safely")
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


def test_mlflow_holds_the_run_with_its_late_notebooks(real_run):
    run_dir, _, _ = real_run
    report = store.read_json(run_dir / "lab-gpt2" / "tracking.json", TrackingReport)
    assert report.metrics_logged >= 50
    folder = run_dir.parent / "mlartifacts" / report.run_id / "artifacts"
    names = sorted(path.name for path in (folder / "notebooks").iterdir())
    assert names == sorted([*(f"{name}.ipynb" for name in PIPELINE), f"{COMPARISON}.ipynb"])
    late = (folder / "notebooks" / "06_tracking.ipynb").read_bytes()
    assert late == (run_dir / "lab-gpt2" / "06_tracking.ipynb").read_bytes()
    assert (folder / "files" / "comparison.json").exists()
    assert "Traceback" not in (run_dir / "worker.log").read_text()


def test_a_token_is_in_nothing_that_a_run_writes(real_run):
    run_dir, _, _ = real_run
    files = [path for path in run_dir.parent.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"run.json", "worker.log", "06_tracking.ipynb", "mlflow.db", "index.html"} <= names
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
    files = [path for path in (run_dir / "lab-gpt2").iterdir() if path.name != "worker.log"]
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
    assert tracking_runs(run_dir) == [("run/lab-gpt2", "FINISHED")]
