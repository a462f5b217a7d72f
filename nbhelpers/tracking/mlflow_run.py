"""One MLflow run per model, holding all of it: settings, metrics, samples, dataset, figures and notebooks.

The models of one run of the laboratory are the children of one MLflow run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shlex
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from nbhelpers import redact, registry, store, tasks
from nbhelpers.devices import machine
from nbhelpers.errors import some
from nbhelpers.generation import generate
from nbhelpers.phases import COMPARISON
from nbhelpers.records import SCHEMA_VERSION, Failure, LabError, Lenient, ModelRun, Prompt, Result
from nbhelpers.scoring import rubric
from nbhelpers.tracking import mlflow_pages
from nbhelpers.tracking.result import read_info, spec_of

if TYPE_CHECKING:
    from filelock import FileLock
    from mlflow import MlflowClient

EXPERIMENT = "local-model-evaluation"
FOLDERS = {".json": "files", ".jsonl": "files", ".png": "plots"}  # in an MLflow run
FOLDERS |= {".ipynb": "notebooks", ".html": "notebooks"}
UNFINISHED = ("06_tracking.ipynb", "06_tracking.html")  # being executed while a run is logged
PARAMETERS = ("revision", "family", "parameters", "device", "dtype", "primary", "quality_applies")
# Read once, while mlflow is imported. A server that is down is given up within 20 s: 9 s, a pause, 9 s.
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}
QUIET |= {"MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false", "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false"}
QUIET |= {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
QUIET |= dict.fromkeys(("MLFLOW_HTTP_REQUEST_TIMEOUT", "PGCONNECT_TIMEOUT"), "9")
RUN_FILES = (f"{COMPARISON}.ipynb", f"{COMPARISON}.html", "comparison.json", "index.html", "latency.json")
PARENT = "mlflow.parentRunId"
LOGGED = ("prompt_id", "content_type", "repeat", "prompt", "text", "new_tokens", "finish_reason", "error")


@dataclass(frozen=True)
class TrackingReport(Lenient):
    run_id: str
    metrics_logged: int
    artifacts: tuple[str, ...]
    schema_version: int = SCHEMA_VERSION


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI where the user set it, else the database in the outputs folder. Holds passwords."""
    uri = store.address("MLflow", "MLFLOW_TRACKING_URI", Failure.TRACKING)
    return uri or _sqlite_uri(store.outputs_dir() / "mlflow.db")


def shown_uri() -> str:
    """The tracking address as it may be printed."""
    credentials = redact.credentials(uri := tracking_uri())
    return uri.replace(credentials and f"{credentials}@", "", 1).partition("?")[0]


def _sqlite_uri(database: Path) -> str:
    """A database file's address; without a driver in it MLflow would make a folder of the quoted path."""
    from sqlalchemy import URL

    return URL.create("sqlite+pysqlite", database=str(database)).render_as_string()


def quiet_mlflow() -> ModuleType:
    """mlflow without its log lines, links, progress bars and usage statistics, unless the user wants them."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import mlflow

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return mlflow


def open_client(uri: str = "") -> MlflowClient:
    """A client of the laboratory's tracking store; mlflow's own global address stays as it is."""
    mlflow = quiet_mlflow()
    from mlflow.store.db import utils

    utils.MAX_RETRY_COUNT = 2  # a database is tried for 100 s otherwise
    return mlflow.MlflowClient(uri or tracking_uri())


def init_database() -> str:
    """Create the database and the experiment, once, and return the experiment's id.

    Holds a lock, because processes that open a fresh SQLite database together break each other's migration.
    LabError where the tracking store cannot be used, or is a database of another MLflow release.
    """
    from sqlalchemy import make_url

    uri = tracking_uri()
    with _mlflow_errors(), _locked():
        if uri.startswith("sqlite") and (database := make_url(uri).database):
            _make_sqlite(Path(database))
        client = open_client()
        if experiment := client.get_experiment_by_name(EXPERIMENT):
            return str(experiment.experiment_id)
        served = uri.startswith(("http:", "https:", "databricks"))  # has a place for files
        artifacts = None if served else (store.outputs_dir() / "mlartifacts").as_uri()
        return str(client.create_experiment(EXPERIMENT, artifact_location=artifacts))


def _locked() -> FileLock:
    from filelock import FileLock

    store.outputs_dir().mkdir(parents=True, exist_ok=True)
    return FileLock(store.outputs_dir() / ".mlflow.lock", timeout=store.LOCK_S)


def _make_sqlite(path: Path) -> None:
    """Make a fresh database under another name and rename it, so that a kill does not leave half of one.

    LabError for one of another MLflow release, which MLflow would migrate without asking.
    """
    from mlflow.store.db import utils

    unfinished = path.with_name(f".{path.name}")
    if not path.exists() or not path.stat().st_size:
        unfinished.unlink(missing_ok=True)
        open_client(_sqlite_uri(unfinished)).search_experiments(max_results=1)
        unfinished.replace(path)
    with closing(sqlite3.connect(path)) as database:
        [revision] = database.execute("select version_num from alembic_version").fetchone()
    if revision != utils._get_latest_schema_revision():
        command = shlex.join(["mlflow", "db", "upgrade", _sqlite_uri(path)])
        why = f"{path} was made by another release of MLflow: copy it and run `{command}`"
        raise LabError(f"{why}, or upgrade MLflow.", Failure.TRACKING)


def log_run(run: ModelRun) -> TrackingReport:
    """Log a model's folder as one MLflow run: parameters, tags, metrics, samples, prompts, plots, notebooks.

    One model of one run folder has one MLflow run: when the new one is complete, earlier ones go to MLflow's
    trash. Writes tracking.json. LabError as ``init_database``.
    """
    experiment = init_database()
    from mlflow.entities import Dataset, DatasetInput, Metric, Param

    result, run_dir = store.read_json(run.folder / "result.json", Result), run.folder.parent
    tags = {"run": run_dir.name, "folder": _folder_digest(run.folder), **mlflow_pages.EVALUATION}
    tags |= {f"version.{name}": version for name, version in machine.versions().items()}
    values = vars(result.settings) | {name: getattr(result, name) for name in PARAMETERS}
    params = [Param(name, str(value)) for name, value in (values | {"model": run.spec.alias}).items()]
    now = int(time.time() * 1000)
    metrics = [Metric(name, value, now, 0) for name, value in result.metrics.items()]
    file = Path(run.settings.prompts or tasks.load_task(run.settings.task).prompts or "benchmark-15.jsonl")
    source = json.dumps({"file": file.name})  # without its folder
    dataset = Dataset(file.stem, prompts_digest(tasks.prompts_of(run.settings)), "local", source)
    with _mlflow_errors():
        client, uri = open_client(), tracking_uri()
        tags |= _parent(client, experiment, run_dir)
        began = int((run.folder / "loading.json").stat().st_mtime * 1000)  # of its work, not of the logging
        run_id = client.create_run(experiment, began, tags, f"{run_dir.name}/{result.slug}").info.run_id
        status = "FAILED"
        try:
            client.log_batch(run_id, metrics, params)  # a loop of log_metric is far slower
            client.log_inputs(run_id, [DatasetInput(dataset)])
            samples, scores = generate.read_samples(run), {s.key: s for s in rubric.read_scores(run)}
            table = {name: [getattr(sample, name) for sample in samples] for name in LOGGED}
            in_order = (scores.get(sample.key) for sample in samples)
            table[result.primary] = [score and score.values.get(result.primary) for score in in_order]
            client.log_table(run_id, table, "samples.json")
            note = mlflow_pages.log_traces(uri, experiment, run_id, run.spec.alias, samples, scores)
            client.set_tag(run_id, "mlflow.note.content", note)
            paths = [path for path in run.folder.iterdir() if path.name not in ("tracking.json", *UNFINISHED)]
            files = _log_files(client, run_id, paths)
            status = "FINISHED"
        finally:
            client.set_terminated(run_id, status)
        _delete_earlier(client, experiment, tags["folder"], run_id)
    report = TrackingReport(run_id, len(metrics), (*files, "samples.json"))
    store.write_json(run.folder / "tracking.json", report)
    return report


def _delete_earlier(client: MlflowClient, experiment: str, folder: str, newest: str) -> None:
    """Put the other MLflow runs of a model's folder into the trash, with their traces."""
    for other in client.search_runs([experiment], f"tags.folder = '{folder}'"):
        if (run_id := other.info.run_id) != newest:
            traces = mlflow_pages.traces_of(tracking_uri(), experiment, run_id)
            if ids := [trace.info.trace_id for trace in traces]:
                client.delete_traces(experiment, trace_ids=ids)
            client.delete_run(run_id)


def _folder_digest(folder: Path) -> str:
    """A name of a run's folder that does not tell a shared server where it is."""
    return hashlib.sha256(str(folder).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _parent(client: MlflowClient, experiment: str, run_dir: Path) -> dict[str, str]:
    """The tags of a child of this run's MLflow run, which the first model makes; {} for a notebook alone."""
    if not (info := read_info(run_dir)):
        return {}
    with _locked():
        if parents := client.search_runs([experiment], f"tags.whole = '{_folder_digest(run_dir)}'"):
            return {PARENT: parents[0].info.run_id}
        note = ", ".join(spec_of(model, info).alias for model in info.models)  # without folders or hosts
        note += f" on {some(len(info.prompts), 'prompts')}, {some(info.settings.repeats, 'texts')} each"
        tags = {"whole": _folder_digest(run_dir), "mlflow.note.content": note}
        tags |= {"mlflow.source.name": "nbhelpers run", "mlflow.source.git.commit": info.git_commit or ""}
        began = int(datetime.fromisoformat(info.started).timestamp() * 1000)
        return {PARENT: client.create_run(experiment, began, tags, run_dir.name).info.run_id}


def attach(run_dir: Path, ratings: Mapping[str, Mapping[str, float]] | None = None) -> None:
    """Add what was finished after the models were logged: each 06 notebook, the whole run's comparison, and
    who rated which texts: "readers", "person NAME" or "judge MODEL" -> sample key -> rating."""
    if not (reports := sorted(run_dir.glob("*/tracking.json"))):
        return
    comparison, experiment = run_dir / "comparison.json", init_database()
    with _mlflow_errors():
        client, parents = open_client(), set[str]()
        for path in reports:
            run_id = store.read_json(path, TrackingReport).run_id
            _log_files(client, run_id, [path.with_name(name) for name in UNFINISHED])
            mlflow_pages.log_ratings(tracking_uri(), experiment, run_id, ratings or {})
            parents.add(client.get_run(run_id).data.tags.get(PARENT, run_id))
        for run_id in parents:
            _log_files(client, run_id, [run_dir / name for name in RUN_FILES])
            if comparison.exists() and (verdict := json.loads(comparison.read_text()).get("pick_reason")):
                client.set_tag(run_id, "verdict", verdict)
            client.set_terminated(run_id)


def prompts_digest(prompts: Iterable[Prompt]) -> str:
    """Eight hexadecimal digits that change with any word, id or the order of the prompts."""
    return store.row_key(prompts=[registry.prompt_fields(prompt) for prompt in prompts])[:8]


@contextmanager
def _mlflow_errors() -> Iterator[None]:
    """MLflow's errors, and those of the database, driver, network or disk below it, as a LabError."""
    from sqlalchemy.exc import SQLAlchemyError

    libraries = quiet_mlflow().exceptions.MlflowException, SQLAlchemyError, sqlite3.Error
    try:
        yield
    except (*libraries, ImportError, OSError, ValueError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        why = f"MLflow at {shown_uri()} refused (the results stand; run again when it answers): {first}"
        raise LabError(why, Failure.TRACKING) from None


def _log_files(client: MlflowClient, run_id: str, paths: Iterable[Path]) -> list[str]:
    """Log those of the paths that exist and have a place in an MLflow run; their names there."""
    artifacts = [path for path in paths if path.suffix in FOLDERS and path.exists()]
    for path in artifacts:
        client.log_artifact(run_id, str(path), FOLDERS[path.suffix])
    return sorted(f"{FOLDERS[path.suffix]}/{path.name}" for path in artifacts)
