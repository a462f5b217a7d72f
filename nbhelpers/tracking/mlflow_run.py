"""One MLflow run per model, holding all of it: settings, metrics, samples, dataset, figures and notebooks."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbhelpers import registry, store
from nbhelpers.devices import device
from nbhelpers.generation import generate
from nbhelpers.records import SCHEMA_VERSION, LabError, ModelRun, Prompt, Record, Result
from nbhelpers.scoring import rubric

if TYPE_CHECKING:
    from types import ModuleType

    from matplotlib.figure import Figure
    from mlflow import MlflowClient

EXPERIMENT = "local-model-evaluation"
MOST_METRICS = 1000  # metrics MLflow takes in one log_batch
LATE_NOTEBOOKS = ("06_tracking", "07_comparison")  # still being executed while a run is logged
SAMPLE_COLUMNS = (
    "prompt_id",
    "content_type",
    "repeat",
    "prompt",
    "text",
    "new_tokens",
    "finish_reason",
    "error",
)


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
    """The mlflow module, without its log lines, run links and progress bars, and without the usage
    statistics it would send to its makers. Whatever the user set in the environment wins.
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

    store.outputs_dir().mkdir(parents=True, exist_ok=True)
    with FileLock(store.outputs_dir() / ".mlflow.lock"), _one_sentence():
        place = store.outputs_dir() / "mlflow.db"
        if tracking_uri() == f"sqlite:///{place}" and not place.exists():
            unfinished = place.with_name(".mlflow.db")
            unfinished.unlink(missing_ok=True)
            quiet_mlflow().MlflowClient(f"sqlite:///{unfinished}").search_experiments(max_results=1)
            unfinished.replace(place)
        client = open_client()
        found = client.get_experiment_by_name(EXPERIMENT)
        if found is None:  # files go below outputs/; a tracking server has a place of its own
            served = tracking_uri().startswith(("http:", "https:", "databricks"))
            files = None if served else (store.outputs_dir() / "mlartifacts").as_uri()
            return str(client.create_experiment(EXPERIMENT, artifact_location=files))
        if found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)


def log_run(run: ModelRun, figures: Mapping[str, Figure] | None = None) -> TrackingReport:
    """Log a model's files as one MLflow run: parameters, tags, metrics, samples, prompts, figures, notebooks.

    ``figures``: file name -> figure. One model of one run folder has one MLflow run: when the new one is
    complete, those of earlier executions go to MLflow's trash (restorable; `mlflow gc` frees their space).
    Writes tracking.json. Raises LabError where the tracking store cannot be used.
    """
    result = store.read_json(run.folder / "result.json", Result)
    # Names the folder a run came from, without telling a shared server where that is.
    folder = hashlib.sha256(str(run.folder).encode("utf-8", "surrogatepass")).hexdigest()[:16]
    tags = {
        "run": run.folder.parent.name,
        "folder": folder,
        "family": result.family,
        "quality_applies": str(result.quality_applies).lower(),
        **{f"version.{name}": version for name, version in device.versions().items()},
    }
    experiment = init_database()
    with _one_sentence():
        client = open_client()
        name = f"{run.folder.parent.name}/{result.slug}"
        run_id = client.create_run(experiment, tags=tags, run_name=name).info.run_id
        try:
            _log_numbers(client, run_id, run, result)
            _log_samples(client, run_id, run)
            _log_prompts(client, run_id, run)
            for file, figure in (figures or {}).items():
                client.log_figure(run_id, figure, f"plots/{file}")
            notebooks = [p for p in sorted(run.folder.glob("*.ipynb")) if p.stem not in LATE_NOTEBOOKS]
            files = [p for p in sorted(run.folder.glob("*.json*")) if p.name != "tracking.json"]
            _log_files(client, run_id, [*notebooks, *files])
        except BaseException:
            client.set_terminated(run_id, "FAILED")
            raise
        client.set_terminated(run_id)
        for found in client.search_runs([experiment], f"tags.folder = '{folder}'"):
            if found.info.run_id != run_id:
                client.delete_run(found.info.run_id)
        artifacts = [
            item.path
            for top in client.list_artifacts(run_id)
            for item in (client.list_artifacts(run_id, top.path) if top.is_dir else [top])
        ]
        metrics = len(client.get_run(run_id).data.metrics)
    place = _without_password(tracking_uri())
    report = TrackingReport(place, EXPERIMENT, run_id, metrics, tuple(artifacts))
    store.write_json(run.folder / "tracking.json", report)
    return report


def attach(run_dir: Path) -> None:
    """Add what was finished after the runs were logged: each 06 notebook, and the comparison."""
    if not (tracked := sorted(run_dir.glob("*/tracking.json"))):
        return
    with _one_sentence():
        client = open_client()
        for path in tracked:
            run_id = store.read_json(path, TrackingReport).run_id
            late = [path.parent / f"{LATE_NOTEBOOKS[0]}.ipynb", run_dir / f"{LATE_NOTEBOOKS[1]}.ipynb"]
            _log_files(client, run_id, [*late, run_dir / "comparison.json"])


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
        first = _without_password(next(iter(str(error).splitlines()), type(error).__name__))
        raise LabError(f"MLflow at {_without_password(tracking_uri())} refused: {first}") from None


def _without_password(address: str) -> str:
    return re.sub(r"//[^/@\s]+@", "//***@", address)


def _log_numbers(client: MlflowClient, run_id: str, run: ModelRun, result: Result) -> None:
    """Parameters, then metrics in as few log_batch calls as they fit; a loop of log_metric is far slower."""
    from mlflow.entities import Metric, Param

    params = dataclasses.asdict(result.settings)
    params |= {"model": Path(result.model).name if run.spec.kind in ("embedded", "local") else result.model}
    for name in ("revision", "family", "parameters", "device", "dtype", "primary"):
        params[name] = getattr(result, name)
    client.log_batch(run_id, params=[Param(name, str(value)) for name, value in params.items()])
    now = int(time.time() * 1000)
    metrics = [Metric(name, value, now, 0) for name, value in result.metrics.items()]
    for start in range(0, len(metrics), MOST_METRICS):
        client.log_batch(run_id, metrics=metrics[start : start + MOST_METRICS])


def _log_samples(client: MlflowClient, run_id: str, run: ModelRun) -> None:
    """Every generation with its score, as the table the MLflow page shows."""
    scores = {score.key: score.values.get(rubric.PRIMARY) for score in rubric.read_scores(run)}
    samples = generate.read_samples(run)
    table: dict[str, Any] = {name: [getattr(s, name) for s in samples] for name in SAMPLE_COLUMNS}
    table[rubric.PRIMARY] = [scores.get(s.key) for s in samples]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # log_table itself calls pandas in a way that pandas deprecates
        client.log_table(run_id, table, "samples.json")


def _log_prompts(client: MlflowClient, run_id: str, run: ModelRun) -> None:
    """The prompts as the run's dataset: their number, and a digest that changes with any word of them."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    file, prompts = run.settings.prompts, registry.load_prompts(run.settings.prompts, run.settings.limit)
    dataset = Dataset(
        name=Path(file).stem if file else "benchmark-15",
        digest=prompts_digest(prompts),
        source_type="local",
        source=json.dumps({"file": Path(file or "prompts.jsonl").name}),
        profile=json.dumps({"num_prompts": len(prompts)}),
    )
    client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "evaluation")])])


def _log_files(client: MlflowClient, run_id: str, paths: Iterable[Path]) -> None:
    for path in paths:
        if path.exists():
            client.log_artifact(run_id, str(path), "notebooks" if path.suffix == ".ipynb" else "files")
