"""A model's run in MLflow: all of it, once, where it belongs, and without a word on the terminal."""

import dataclasses
import http.server
import json
import os
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from statistics import mean

import pytest
from made_runs import make_sample, make_score, write_info
from matplotlib import pyplot

from nbhelpers import pipeline, registry, store
from nbhelpers.comparison import plots
from nbhelpers.generation import generate
from nbhelpers.loading.load import LoadingReport
from nbhelpers.records import (
    Estimate,
    Failure,
    LabError,
    ModelRun,
    ModelSpec,
    Prompt,
    Result,
    Sample,
    Score,
    Settings,
)
from nbhelpers.scoring import rubric
from nbhelpers.tracking import mlflow_pages, mlflow_run
from nbhelpers.tracking.metrics import StatsReport, flat_metrics
from nbhelpers.tracking.mlflow_run import TrackingReport

SETTINGS = Settings(model="lab-gpt2", limit=2, repeats=2, max_new_tokens=16)
GROUPS = {"quality", "latency", "memory", "cost", "samples", "model", "noise"}


def made(settings: Settings) -> tuple[ModelRun, Result]:
    """A model's part of a run with every file up to result.json."""
    run = pipeline.open_run(settings)
    pipeline.make(run, "result")
    return run, store.read_json(run.folder / "result.json", Result)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """One model generated, summarised and logged; outputs folder with a space in its name, cwd elsewhere."""
    outputs, elsewhere = tmp_path_factory.mktemp("my outputs"), tmp_path_factory.mktemp("cwd")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NBHELPERS_OUTPUTS", str(outputs))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.chdir(elsewhere)
        folder = outputs / "standalone" / "lab-gpt2"
        folder.mkdir(parents=True)
        for name in ("01_device_detection", "06_tracking"):
            (folder / f"{name}.ipynb").write_text("{}")
        run, result = made(SETTINGS)
        shown = {
            "dimensions.png": plots.dimensions(result.quality),
        }
        for name, figure in shown.items():
            figure.savefig(run.folder / name)
        report = mlflow_run.log_run(run)
        pyplot.close("all")
        yield outputs, result, report
        assert list(elsewhere.iterdir()) == []


def rows(database: Path, query: str, *values: object) -> list:
    """Read MLflow's database without MLflow."""
    with sqlite3.connect(database) as connection:
        return connection.execute(query, values).fetchall()


def artifact(lab, name: str) -> Path:
    return lab[0] / "mlartifacts" / lab[2].run_id / "artifacts" / name


def test_every_metric_of_result_json_is_in_the_database(lab):
    outputs, result, report = lab
    query = "select key, value from latest_metrics where run_uuid = ?"
    logged = dict(rows(outputs / "mlflow.db", query, report.run_id))
    assert logged == pytest.approx(result.metrics)
    assert report.metrics_logged == len(logged) >= 50
    stored = store.read_json(outputs / "standalone" / "lab-gpt2" / "result.json", Result)
    assert stored == result


def test_metrics_are_grouped_and_named_consistently(lab):
    names = list(lab[1].metrics)
    assert {name.split("/")[0] for name in names} == GROUPS
    assert all(re.fullmatch(r"[a-z_]+(/[a-z0-9_]+)+", name) for name in names)
    for name in names:
        if name.endswith("/mean"):
            assert lab[1].metrics[name.replace("/mean", "/n")] >= 1


def test_one_prompt_and_one_repeat_give_metrics_without_intervals(lab):
    settings = dataclasses.replace(SETTINGS, limit=1, repeats=1, run_dir=str(lab[0] / "one"))
    metrics = made(settings)[1].metrics
    assert len(metrics) > 40
    assert metrics["quality/lab_v2/n"] == 1
    assert "quality/lab_v2/low" not in metrics


def test_parameters_and_tags_say_what_was_run(lab):
    run = mlflow_run.open_client().get_run(lab[2].run_id)
    assert (run.info.run_name, run.info.status) == ("standalone/lab-gpt2", "FINISHED")
    wanted = {"model": "lab-gpt2", "limit": "2", "repeats": "2", "max_new_tokens": "16", "seed": "0"}
    assert wanted.items() <= run.data.params.items()
    assert run.data.params["revision"] == lab[1].revision
    assert run.data.tags["run"] == "standalone"
    assert {"version.torch", "version.transformers", "version.python"} <= set(run.data.tags)
    assert not any(str(lab[0]) in value for value in [*run.data.tags.values(), *run.data.params.values()])


def test_a_model_folder_is_named_without_the_way_to_it(lab, tmp_path):
    source, run = str(lab[0] / "models" / "mine"), pipeline.open_run(SETTINGS)
    folder = shutil.copytree(run.folder, tmp_path / "local" / "mine")
    store.write_json(folder / "result.json", dataclasses.replace(lab[1], model=source))
    local = dataclasses.replace(run, spec=ModelSpec("mine", source, "local"), folder=folder)
    run_id = mlflow_run.log_run(local).run_id
    assert mlflow_run.open_client().get_run(run_id).data.params["model"] == "mine"


def test_the_samples_table_holds_every_generation_with_its_score(lab):
    table = json.loads(artifact(lab, "samples.json").read_text())
    assert table["columns"] == [*mlflow_run.LOGGED, rubric.PRIMARY]
    run = pipeline.open_run(SETTINGS)
    samples, scores = generate.read_samples(run), rubric.read_scores(run)
    assert len(table["data"]) == len(samples) == 4
    found = [row[table["columns"].index("text")] for row in table["data"]]
    assert found == [sample.text for sample in samples]
    values = {score.key: score.values[rubric.PRIMARY] for score in scores}
    assert [row[-1] for row in table["data"]] == pytest.approx([values[s.key] for s in samples])


def test_the_first_text_of_each_prompt_is_a_trace_with_its_scores(lab):
    experiment, uri = mlflow_run.init_database(), mlflow_run.tracking_uri()
    found = {
        trace.info.client_request_id: trace.info
        for trace in mlflow_pages.traces_of(uri, experiment, lab[2].run_id)
    }
    run = pipeline.open_run(SETTINGS)
    scores = {score.key: score for score in rubric.read_scores(run)}
    first = [sample for sample in generate.read_samples(run) if sample.repeat == 0]
    assert found.keys() == {sample.key for sample in first} and len(first) == 2
    for sample in first:
        info = found[sample.key]
        assert (info.request_preview, info.tags["mlflow.traceName"]) == (sample.prompt, sample.prompt_id)
        given = {a.name: (a.feedback.value, a.source.source_type) for a in info.assessments}
        assert given == {name: (value, "CODE") for name, value in scores[sample.key].values.items()}
        [span] = mlflow_run.open_client().get_trace(info.trace_id).data.spans
        assert (span.inputs, span.outputs) == ({"prompt": sample.prompt}, sample.text)
        assert span.end_time_ns - span.start_time_ns == int(1e9 * sample.latency_s)
    tags = mlflow_run.open_client().get_run(lab[2].run_id).data.tags
    assert tags["mlflow.runType"] == "genai_evaluate"
    assert tags["mlflow.note.content"] == "Traces: the first text of 2 prompts. All 4 texts: samples.json."


def test_a_trace_holds_what_cannot_be_printed_an_error_and_what_is_right(lab):
    experiment, uri = mlflow_run.init_database(), mlflow_run.tracking_uri()
    run_id = mlflow_run.open_client().create_run(experiment, tags={"run": "odd"}).info.run_id
    good = make_sample("m", "b01", 0, text="half \ud800 of a pair")
    bad = dataclasses.replace(make_sample("m", "b02", 0, text=""), error="out of memory")
    target = dataclasses.replace(make_score(good, 1.0), target=("yes",))
    mlflow_pages.log_traces(uri, experiment, run_id, "m", [good, bad], {good.key: target})
    found = {
        trace.info.client_request_id: trace.info for trace in mlflow_pages.traces_of(uri, experiment, run_id)
    }
    assert found[good.key].response_preview == "half \ufffd of a pair"
    expected = [a.expectation.value for a in found[good.key].assessments if a.expectation]
    assert expected == [["yes"]]
    assert (found[bad.key].state, found[bad.key].response_preview) == ("ERROR", "out of memory")
    assert found[bad.key].assessments == []


def test_ratings_are_feedback_by_whom_they_are_and_once(lab):
    experiment, uri = mlflow_run.init_database(), mlflow_run.tracking_uri()
    [first, second] = [
        trace.info.client_request_id for trace in mlflow_pages.traces_of(uri, experiment, lab[2].run_id)
    ]
    given = {"person ann": {first: 7.0}, "judge some/model": {first: 5.0, "no such": 1.0}}
    for _ in range(2):
        mlflow_run.attach(lab[0] / "standalone", given)
    found = {
        trace.info.client_request_id: trace.info
        for trace in mlflow_pages.traces_of(uri, experiment, lab[2].run_id)
    }
    rated = {
        key: {
            (a.source.source_id, a.source.source_type, a.feedback.value)
            for a in info.assessments
            if a.name == "rating"
        }
        for key, info in found.items()
    }
    assert rated == {
        first: {("person ann", "HUMAN", 7.0), ("judge some/model", "LLM_JUDGE", 5.0)},
        second: set(),
    }
    assert sum(a.name == "rating" for a in found[first].assessments) == 2


def test_plots_files_and_finished_notebooks_are_artifacts_below_the_outputs_folder(lab):
    assert artifact(lab, "plots/dimensions.png").read_bytes().startswith(b"\x89PNG")
    names = set(lab[2].artifacts)
    assert {"files/result.json", "files/samples.jsonl", "samples.json"} <= names
    assert "notebooks/01_device_detection.ipynb" in names
    assert "notebooks/06_tracking.ipynb" not in names  # still running while it logs
    assert all(artifact(lab, name).is_file() for name in names)


def test_the_prompts_are_the_dataset(lab):
    [entry] = mlflow_run.open_client().get_run(lab[2].run_id).inputs.dataset_inputs
    prompts = registry.load_prompts(limit=2)
    assert entry.dataset.name == "benchmark-15"
    assert entry.dataset.digest == mlflow_run.prompts_digest(prompts)
    changed = [prompts[0], Prompt(prompts[1].id, prompts[1].text + " ", prompts[1].content_type)]
    assert len({mlflow_run.prompts_digest(p) for p in (prompts, changed, prompts[::-1], prompts[:1])}) == 4


def test_what_finishes_late_is_attached(lab):
    outputs = lab[0]
    run_dir = outputs / "standalone"
    (run_dir / "07_comparison.ipynb").write_text('{"late": 7}')
    (run_dir / "comparison.json").write_text("{}")
    (run_dir / "lab-gpt2" / "06_tracking.ipynb").write_text('{"late": 6}')
    mlflow_run.attach(run_dir)
    assert artifact(lab, "notebooks/06_tracking.ipynb").read_text() == '{"late": 6}'
    assert artifact(lab, "notebooks/07_comparison.ipynb").read_text() == '{"late": 7}'
    assert artifact(lab, "files/comparison.json").read_text() == "{}"
    mlflow_run.attach(outputs / "a run without models")


def runs(lab, view: int = 1) -> dict[str, str]:
    experiment = mlflow_run.init_database()
    found = mlflow_run.open_client().search_runs([experiment], run_view_type=view)
    return {run.info.run_id: run.info.status for run in found if run.data.tags["run"] == "again"}


def test_logging_again_leaves_one_run_and_the_earlier_one_in_the_trash(lab):
    outputs = lab[0]
    settings = dataclasses.replace(SETTINGS, run_dir=str(outputs / "again"))
    shutil.copytree(outputs / "standalone" / "lab-gpt2", outputs / "again" / "lab-gpt2")
    run = pipeline.open_run(settings)
    first = mlflow_run.log_run(run)
    shorter, _ = made(dataclasses.replace(settings, limit=1))  # MLflow would refuse to change parameters
    second = mlflow_run.log_run(shorter)
    assert runs(lab) == {second.run_id: "FINISHED"}
    assert set(runs(lab, view=2)) == {first.run_id}
    experiment, uri = mlflow_run.init_database(), mlflow_run.tracking_uri()
    kept = [len(mlflow_pages.traces_of(uri, experiment, report.run_id)) for report in (first, second)]
    assert kept == [0, 1]
    table = outputs / "mlartifacts" / second.run_id / "artifacts" / "samples.json"
    assert len(json.loads(table.read_text())["data"]) == 2
    on_disk = store.read_json(outputs / "again" / "lab-gpt2" / "tracking.json", TrackingReport)
    assert on_disk == second
    # One that breaks half-way is marked, and does not push the complete one out.
    with (outputs / "again" / "lab-gpt2" / "samples.jsonl").open("a") as lines:
        lines.write("not a row\n")
    with pytest.raises(LabError, match="not JSON"):
        mlflow_run.log_run(shorter)
    assert sorted(runs(lab).values()) == ["FAILED", "FINISHED"]
    assert runs(lab)[second.run_id] == "FINISHED"


def test_the_models_of_one_run_are_the_children_of_one(lab):
    outputs = lab[0]
    run_dir = outputs / "family"
    for slug in ("lab-gpt2", "lab-opt"):
        shutil.copytree(outputs / "standalone" / "lab-gpt2", run_dir / slug)
    info = write_info(run_dir, ["lab-gpt2", "lab-opt", "/home/me/models/mine"])
    ids = []
    for spec in map(registry.resolve, info.models[:2]):
        settings = dataclasses.replace(SETTINGS, model=spec.alias, run_dir=str(run_dir))
        ids.append(mlflow_run.log_run(ModelRun(settings, spec, run_dir / spec.slug)).run_id)
    (run_dir / "comparison.json").write_text('{"pick_reason": "lab-opt writes better."}')
    mlflow_run.attach(run_dir)
    client = mlflow_run.open_client()
    children = [client.get_run(id) for id in ids]
    [parent] = {child.data.tags["mlflow.parentRunId"] for child in children}
    whole = client.get_run(parent)
    assert whole.info.run_name == "family" and whole.info.status == "FINISHED"
    assert whole.data.tags["verdict"] == "lab-opt writes better."
    assert whole.data.tags["mlflow.source.git.commit"] == info.git_commit
    assert whole.data.tags["mlflow.note.content"].startswith("lab-gpt2, lab-opt, mine on ")
    assert all(child.info.start_time < child.info.end_time for child in children)


def test_the_user_s_tracking_address_is_honoured(lab, tmp_path, monkeypatch):
    outputs = lab[0]
    before = rows(outputs / "mlflow.db", "select count(*) from runs")
    shutil.copy(outputs / "mlflow.db", tmp_path / "mine.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mine.db'}")
    report = mlflow_run.log_run(pipeline.open_run(SETTINGS))
    found = rows(tmp_path / "mine.db", "select status from runs where run_uuid = ?", report.run_id)
    assert found == [("FINISHED",)]
    assert rows(outputs / "mlflow.db", "select count(*) from runs") == before


@pytest.mark.parametrize(
    "address",
    [
        "file:mlruns",
        "nowhere://user:secret@host/db",
        "postgresql://user:secret@127.0.0.1:1/db",
        "http://user:secret@127.0.0.1:1",
        "postgresql://user:S3cr/secret@127.0.0.1:1/db",
        "postgresql://user:p@secret@127.0.0.1:1/db",
        "nowhere://user:secret is mine@host/db",
        "http://user:S3cr/secret@127.0.0.1:1",
        "http://user:p@secret@127.0.0.1:1",
        "sqlite:///{tmp}/broken.db",
        "sqlite:///{tmp}/broken.db/below.db",
    ],
)
def test_a_store_that_cannot_be_used_is_one_sentence_without_passwords(tmp_path, monkeypatch, address):
    (tmp_path / "broken.db").write_text("this is no database, only a text that is long enough" * 50)
    monkeypatch.setenv("NBHELPERS_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address.format(tmp=tmp_path))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(LabError, match=r"MLflow at .* refused") as caught:
        mlflow_run.init_database()
    assert caught.value.kind is Failure.TRACKING
    assert not re.search("secret|S3cr", str(caught.value))
    assert "\n" not in str(caught.value)


FRESH = """
import os
from nbhelpers.tracking import mlflow_pages
from nbhelpers.tracking import mlflow_run
experiment = mlflow_run.init_database()
client = mlflow_run.open_client()
run_id = client.create_run(experiment, run_name=str(os.getpid())).info.run_id
client.log_metric(run_id, "quality/x", 1.0)
client.set_terminated(run_id)
from mlflow.telemetry import get_telemetry_client
assert get_telemetry_client() is None, "usage statistics are on"
"""


def test_three_processes_start_on_a_fresh_database_at_once_in_silence(tmp_path):
    hidden = {
        "PYTEST_CURRENT_TEST",
        "CI",
        "GITHUB_ACTIONS",
        "MLFLOW_TRACKING_URI",
        "MLFLOW_DISABLE_TELEMETRY",
    }
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment["NBHELPERS_OUTPUTS"] = str(tmp_path / "outputs")
    (tmp_path / "cwd").mkdir()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", FRESH],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            cwd=tmp_path / "cwd",
        )
        for _ in range(3)
    ]
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert said == ["", "", ""]
    assert [process.returncode for process in processes] == [0, 0, 0]
    database = tmp_path / "outputs" / "mlflow.db"
    assert rows(database, "select count(*) from runs where status = 'FINISHED'") == [(3,)]
    query = "select count(*) from experiments where name = ?"
    assert rows(database, query, mlflow_run.EXPERIMENT) == [(1,)]
    assert list((tmp_path / "cwd").iterdir()) == []


KILLED = """
import os, signal
from sqlalchemy import Engine, event
from nbhelpers.tracking.mlflow_run import init_database
tables = []
@event.listens_for(Engine, "after_cursor_execute")
def count(connection, cursor, statement, *_):
    tables.extend(["one"] * ("CREATE TABLE" in statement))
    if len(tables) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
init_database()
"""


def test_a_kill_while_the_database_is_made_spoils_nothing(tmp_path):
    environment = {**os.environ, "NBHELPERS_OUTPUTS": str(tmp_path)}
    environment.pop("MLFLOW_TRACKING_URI", None)
    killed = subprocess.run([sys.executable, "-c", KILLED], env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (tmp_path / ".mlflow.db").exists() and not (tmp_path / "mlflow.db").exists()
    again = "from nbhelpers.tracking.mlflow_run import init_database; init_database()"
    done = subprocess.run([sys.executable, "-c", again], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    query = "select count(*) from experiments where name = ?"
    assert rows(tmp_path / "mlflow.db", query, mlflow_run.EXPERIMENT) == [(1,)]
    assert not (tmp_path / ".mlflow.db").exists()


OTHER_RELEASE = """
import sys
from alembic import command
from alembic.script import ScriptDirectory
from mlflow.store.db import utils
from mlflow.store.tracking.dbmodels.initial_models import Base
engine = utils.create_sqlalchemy_engine(sys.argv[1])
Base.metadata.create_all(engine)
config = utils._get_alembic_config(sys.argv[1])
revisions = [script.revision for script in ScriptDirectory.from_config(config).walk_revisions()]
with engine.begin() as connection:
    config.attributes["connection"] = connection
    command.upgrade(config, revisions[{"newer": 0, "older": 8}[sys.argv[2]]])
    if sys.argv[2] == "newer":
        connection.exec_driver_sql("update alembic_version set version_num = 'from2099'")
"""


@pytest.mark.parametrize("release", ["older", "newer"])
def test_a_database_of_another_release_is_kept_as_it_is_and_the_way_out_works(tmp_path, monkeypatch, release):
    monkeypatch.setenv("NBHELPERS_OUTPUTS", str(tmp_path / "my outputs"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    place = tmp_path / "my outputs" / "mlflow.db"
    place.parent.mkdir()
    subprocess.run([sys.executable, "-c", OTHER_RELEASE, mlflow_run.tracking_uri(), release], check=True)
    before = rows(place, "select name, sql from sqlite_master order by name")
    with pytest.raises(LabError, match=f"{re.escape(str(place))} was made by another release") as caught:
        mlflow_run.init_database()
    assert caught.value.kind is Failure.TRACKING
    assert rows(place, "select name, sql from sqlite_master order by name") == before
    [command] = re.findall("`(mlflow db upgrade .*)`", str(caught.value))
    if release == "older":
        subprocess.run([sys.executable, "-m", *shlex.split(command)], check=True, capture_output=True)
        assert mlflow_run.init_database() == "1"


@pytest.mark.parametrize("name", ["q?x#y percent%41", 'a&b=c it\'s "q" [1] a@b:c+é'])
def test_any_outputs_path_holds_the_database_and_nothing_stands_beside_it(tmp_path, monkeypatch, name):
    monkeypatch.setenv("NBHELPERS_OUTPUTS", str(tmp_path / name))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    experiment, client = mlflow_run.init_database(), mlflow_run.open_client()
    run_id = client.create_run(experiment).info.run_id
    client.log_text(run_id, "text", "files/a.txt")
    assert (tmp_path / name / "mlartifacts" / run_id / "artifacts" / "files" / "a.txt").read_text() == "text"
    assert rows(tmp_path / name / "mlflow.db", "select run_uuid from runs") == [(run_id,)]
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("server", ["refuses", "is silent", "is busy"])
def test_a_server_that_is_down_is_given_up_within_twenty_seconds(tmp_path, monkeypatch, server):
    class Busy(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(503)
            self.send_header("Retry-After", "100")
            self.end_headers()

        def log_message(self, *_):
            pass

    for name in mlflow_run.QUIET:
        monkeypatch.delenv(name, raising=False)
    questions, shipped, here = 1 + int(mlflow_run.QUIET["MLFLOW_HTTP_REQUEST_MAX_RETRIES"]), 9, 3
    assert mlflow_run.QUIET["MLFLOW_HTTP_REQUEST_TIMEOUT"] == str(shipped)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", str(here))  # the rest of the wait is known
    monkeypatch.setenv("NBHELPERS_OUTPUTS", str(tmp_path))
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        http.server.HTTPServer(("127.0.0.1", 0), Busy) as busy,
    ):
        threading.Thread(target=busy.serve_forever, daemon=True).start()
        ports = {"refuses": 1, "is silent": silent.getsockname()[1], "is busy": busy.server_port}
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{ports[server]}")
        began = time.monotonic()
        with pytest.raises(LabError, match="the results stand") as caught:
            mlflow_run.init_database()
        busy.shutdown()
    longer = questions * (shipped - here) if server == "is silent" else 0
    assert time.monotonic() - began + longer < 20 and caught.value.kind is Failure.TRACKING


def test_what_prepares_the_database_ends_with_a_run_that_is_stopped(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        places = {"MLFLOW_TRACKING_URI": address, "NBHELPERS_OUTPUTS": str(tmp_path)}
        command = [sys.executable, "-m", "nbhelpers.cli", "run", "lab-gpt2", "--limit", "2", "--repeats", "1"]
        run = subprocess.Popen(command, env=os.environ | places, start_new_session=True)
        silent.settimeout(120)
        asking, _ = silent.accept()
        run.send_signal(signal.SIGINT)
        assert run.wait(60) == 130
        asking.settimeout(5)
        while asking.recv(4096):  # its question, and then the end of the connection
            pass
        asking.close()


LOADED = LoadingReport(
    model="m",
    slug="m",
    revision="r",
    source="s",
    family="gpt2",
    parameters=1000,
    context=512,
    vocabulary=4096,
    device="cpu",
    dtype="float32",
    fetch_s=0.5,
    load_s=1.5,
    parameter_bytes=3 * 2**20,
    rss_before_bytes=10 * 2**20,
    rss_after_load_bytes=11 * 2**20,
    rss_after_forward_bytes=14 * 2**20,
    device_peak_bytes=None,
)


def planted(repeat: int, **changes) -> Sample:
    values = {
        "key": str(repeat),
        "model": "m",
        "revision": "r",
        "prompt_id": "b01",
        "content_type": "short_post",
        "repeat": repeat,
        "seed": 0,
        "prompt": "Say:",
        "text": "two words",
        "prompt_tokens": 3,
        "new_tokens": 4,
        "bytes": 9,
        "finish_reason": "eos",
        "error": None,
        "batch_size": 1,
        "latency_s": 2.0,
        "ttft_s": 0.5,
        "tpot_s": 0.5,
        "peak_memory_bytes": 2**20,
        "energy_j": None,
        "share_s": 2.0,
    }
    return Sample(**(values | changes))


SAMPLES = [
    planted(0),
    planted(1, finish_reason="length", new_tokens=8, latency_s=4.0, share_s=4.0, peak_memory_bytes=5 * 2**20),
    planted(2, finish_reason="error", error="OutOfMemoryError: no", text="", new_tokens=0, bytes=0,
            latency_s=None, ttft_s=None, tpot_s=None, share_s=None, peak_memory_bytes=None),
]  # fmt: skip
REPORT = StatsReport("m", 3, 2, 1, {"lab_v2": Estimate("lab_v2", 1, 4.0, None, None, None)}, {})


def test_flat_metrics_by_hand():
    metrics = flat_metrics(REPORT, LOADED, SAMPLES, {"usd_per_request": 0.25})
    wanted = {
        "quality/lab_v2/n": 1,
        "quality/lab_v2/mean": 4.0,
        "latency/batch_tokens_per_s": (4 + 8) / (2.0 + 4.0),
        "latency/fetch_s": 0.5,
        "latency/load_s": 1.5,
        "memory/parameters_mib": 3,
        "memory/rss_before_mib": 10,
        "memory/rss_after_load_mib": 11,
        "memory/rss_after_forward_mib": 14,
        "memory/generation_peak_mib": 5,
        "samples/attempted": 3,
        "samples/finished": 2,
        "samples/failed": 1,
        "samples/success_rate": 2 / 3,
        "samples/ended_by_itself_rate": 1 / 3,
        "samples/truncated_prompts": 0,
        "samples/new_tokens_total": 12,
        "samples/new_tokens_mean": 6,
        "samples/words_mean": 2,
        "samples/bytes_per_token": 18 / 12,
        "model/parameters": 1000,
        "model/context": 512,
        "model/vocabulary": 4096,
        "cost/usd_per_request": 0.25,
    }
    assert metrics == pytest.approx(wanted)
    assert all(type(value) is float for value in metrics.values())


def test_what_was_not_measured_is_absent_and_random_weights_have_no_quality():
    nothing = flat_metrics(REPORT, LOADED, [], {})
    assert not {"samples/success_rate", "memory/generation_peak_mib", "memory/device_peak_mib"} & set(nothing)
    random = dataclasses.replace(LOADED, quality_applies=False, device_peak_bytes=2**21)
    metrics = flat_metrics(REPORT, random, SAMPLES, {})
    assert not [name for name in metrics if name.startswith("quality/")]
    assert metrics["memory/device_peak_mib"] == 2


def test_estimates_are_over_prompts_with_repeats_averaged_first(lab):
    report = store.read_json(lab[0] / "standalone" / "lab-gpt2" / "stats.json", StatsReport)
    scores = list(store.read_rows(lab[0] / "standalone" / "lab-gpt2" / "scores.jsonl", Score))
    by_prompt = {
        prompt: mean(s.values["lab_v2"] for s in scores if s.prompt_id == prompt)
        for prompt in {s.prompt_id for s in scores}
    }
    estimate = report.quality["lab_v2"]
    assert (estimate.n, estimate.mean) == (2, pytest.approx(mean(by_prompt.values())))
    assert (report.attempted, report.finished, report.failed) == (4, 4, 0)
    assert report.latency["tokens_per_s"].n == 2
    assert lab[1].per_prompt.keys() == by_prompt.keys()
