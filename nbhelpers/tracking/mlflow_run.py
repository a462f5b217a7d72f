"""One MLflow run per model, holding all of it: settings, metrics, samples, dataset, figures and notebooks."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from nbhelpers import registry, store
from nbhelpers.devices import device
from nbhelpers.generation import generate
from nbhelpers.records import SCHEMA_VERSION, LabError, ModelRun, Prompt, Record, Result
from nbhelpers.scoring import rubric

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient

EXPERIMENT = "local-model-evaluation"
FOLDERS = {".json": "files", ".jsonl": "files", ".ipynb": "notebooks", ".png": "plots"}  # in an MLflow run
LATE_NOTEBOOK = "06_tracking"  # still being executed while a run is logged
PARAMETERS = ("revision", "family", "parameters", "device", "dtype", "primary")  # besides the settings
COLUMNS = ("prompt_id", "content_type", "repeat", "prompt", "text", "new_tokens", "finish_reason", "error")


@dataclass(frozen=True)
class TrackingReport(Record):
    tracking_uri: str
    experiment: str
    run_id: str
    metrics_logged: int
    artifacts: tuple[str, ...]
    schema_version: int = SCHEMA_VERSION


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI where the user set it; otherwise the database in the outputs folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{store.outputs_dir() / 'mlflow.db'}"


def quiet_mlflow() -> ModuleType:
    """The mlflow module without log lines, links, progress bars and the usage statistics it would send.

    Whatever the user set in the environment wins.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read once, while mlflow is imported
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import mlflow

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return mlflow


def open_client() -> MlflowClient:
    """A client of the laboratory's tracking store; mlflow's own global address stays as it is."""
    return quiet_mlflow().MlflowClient(tracking_uri())


def init_database() -> str:
    """Create or migrate the database and the experiment, once, and return the experiment's id.

    Processes that open a fresh SQLite database together break each other's migration, so this holds a lock.
    One that is killed would leave half a database, so a fresh one is made beside its place and renamed.
    """
    from filelock import FileLock

    place, unfinished = (store.outputs_dir() / name for name in ("mlflow.db", ".mlflow.db"))
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place.with_name(".mlflow.lock")), _one_sentence():
        if tracking_uri() == f"sqlite:///{place}" and not place.exists():
            unfinished.unlink(missing_ok=True)
            quiet_mlflow().MlflowClient(f"sqlite:///{unfinished}").search_experiments(max_results=1)
            unfinished.replace(place)
        client = open_client()
        if (found := client.get_experiment_by_name(EXPERIMENT)) is None:
            served = tracking_uri().startswith(("http:", "https:", "databricks"))  # has a place for files
            files = None if served else place.with_name("mlartifacts").as_uri()
            return str(client.create_experiment(EXPERIMENT, artifact_location=files))
        if found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)


def log_run(run: ModelRun, figures: Mapping[str, Figure] | None = None) -> TrackingReport:
    """Log a model's files as one MLflow run: parameters, tags, metrics, samples, prompts, figures, notebooks.

    ``figures``: file name, ending in .png -> figure. One model of one run folder has one MLflow run: when the
    new one is complete, earlier ones go to MLflow's trash (restorable; `mlflow gc` frees their space).
    Writes tracking.json. Raises LabError where the tracking store cannot be used.
    """
    from mlflow.entities import DatasetInput, InputTag, Metric, Param

    result = store.read_json(run.folder / "result.json", Result)
    # Names the folder a run came from, without telling a shared server where that is.
    folder = hashlib.sha256(str(run.folder).encode("utf-8", "surrogatepass")).hexdigest()[:16]
    tags = {"run": run.folder.parent.name, "folder": folder, "family": result.family}
    tags["quality_applies"] = str(result.quality_applies).lower()
    tags |= {f"version.{name}": version for name, version in device.versions().items()}
    values = dataclasses.asdict(result.settings) | {name: getattr(result, name) for name in PARAMETERS}
    local = run.spec.kind in ("embedded", "local")
    values["model"] = Path(result.model).name if local else result.model
    params, now = [Param(name, str(value)) for name, value in values.items()], int(time.time() * 1000)
    metrics = [Metric(name, value, now, 0) for name, value in result.metrics.items()]
    for file, figure in (figures or {}).items():
        figure.savefig(run.folder / file)
    experiment = init_database()
    with _one_sentence():
        client, name = open_client(), f"{run.folder.parent.name}/{result.slug}"
        run_id, status = client.create_run(experiment, tags=tags, run_name=name).info.run_id, "FAILED"
        try:
            client.log_batch(run_id, metrics, params)  # a loop of log_metric is far slower
            client.log_table(run_id, _table(run), "samples.json")
            context = InputTag("mlflow.data.context", "evaluation")
            client.log_inputs(run_id, [DatasetInput(_dataset(run), [context])])
            done = [p for p in run.folder.iterdir() if p.stem not in ("tracking", LATE_NOTEBOOK)]
            files, status = _log_files(client, run_id, done), "FINISHED"
        finally:
            client.set_terminated(run_id, status)
        for found in client.search_runs([experiment], f"tags.folder = '{folder}'"):
            if found.info.run_id != run_id:
                client.delete_run(found.info.run_id)
    uri, artifacts = _without_password(tracking_uri()), (*files, "samples.json")
    report = TrackingReport(uri, EXPERIMENT, run_id, len(metrics), artifacts)
    store.write_json(run.folder / "tracking.json", report)
    return report


def attach(run_dir: Path) -> None:
    """Add what was finished after the runs were logged: each 06 notebook, and the comparison."""
    for path in sorted(run_dir.glob("*/tracking.json")):
        late = path.with_name(f"{LATE_NOTEBOOK}.ipynb"), run_dir / "07_comparison.ipynb"
        with _one_sentence():
            run_id = store.read_json(path, TrackingReport).run_id
            _log_files(open_client(), run_id, [*late, run_dir / "comparison.json"])


def prompts_digest(prompts: Iterable[Prompt]) -> str:
    """Eight hexadecimal digits that change with any word, id or the order of the prompts."""
    return store.row_key(prompts=[dataclasses.asdict(prompt) for prompt in prompts])[:8]


@contextmanager
def _one_sentence() -> Iterator[None]:
    """MLflow's errors, and those of the database, driver, network or disk below it, as a LabError."""
    from sqlalchemy.exc import SQLAlchemyError

    errors = quiet_mlflow().exceptions
    try:
        yield
    except (errors.MlflowException, SQLAlchemyError, ImportError, OSError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise LabError(_without_password(f"MLflow at {tracking_uri()} refused: {first}")) from None


def _without_password(text: str) -> str:
    """The text without what stands before the @ of an address: a password may hold "/", "@" and blanks."""
    credentials = tracking_uri().partition("://")[2].rpartition("@")[0]
    return re.sub(r"(\w+://)?\S*@", r"\1***@", text.replace(f"{credentials}@", "@"))


def _table(run: ModelRun) -> dict[str, Any]:
    """Every generation with its score, column by column: the table that the MLflow page shows."""
    scores = {score.key: score.values.get(rubric.PRIMARY) for score in rubric.read_scores(run)}
    samples = generate.read_samples(run)
    table = {name: [getattr(sample, name) for sample in samples] for name in COLUMNS}
    return table | {rubric.PRIMARY: [scores.get(sample.key) for sample in samples]}


def _dataset(run: ModelRun) -> Any:
    """The prompts that were asked, without where their file lies."""
    from mlflow.entities import Dataset

    file, prompts = run.settings.prompts, registry.load_prompts(run.settings.prompts, run.settings.limit)
    name, source = Path(file).stem or "benchmark-15", json.dumps({"file": Path(file or "prompts.jsonl").name})
    profile = json.dumps({"num_prompts": len(prompts)})
    return Dataset(name, prompts_digest(prompts), "local", source, profile=profile)


def _log_files(client: MlflowClient, run_id: str, paths: Iterable[Path]) -> list[str]:
    """Log those of the paths that exist and have a place in an MLflow run; their names there."""
    places = {p: FOLDERS[p.suffix] for p in sorted(paths) if p.suffix in FOLDERS and p.exists()}
    for path, folder in places.items():
        client.log_artifact(run_id, str(path), folder)
    return sorted(f"{folder}/{path.name}" for path, folder in places.items())
