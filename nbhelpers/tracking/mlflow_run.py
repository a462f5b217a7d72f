"""One MLflow run per model, holding all of it: settings, metrics, samples, dataset, plots and notebooks."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import re
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbhelpers import registry, store
from nbhelpers.comparison import compare as comparison
from nbhelpers.devices import device as devices
from nbhelpers.generation import generate as generation
from nbhelpers.records import SCHEMA_VERSION, LabError, Prompt, Record, Result, Settings
from nbhelpers.scoring import rubric as scoring
from nbhelpers.tracking.result import stats_for as stats_for
from nbhelpers.tracking.result import summarise

if TYPE_CHECKING:
    from types import ModuleType

    from mlflow import MlflowClient

EXPERIMENT = "local-model-evaluation"
BATCH_LIMIT = 1000  # metrics MLflow takes in one log_batch
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
        if found is None:
            return str(client.create_experiment(EXPERIMENT, artifact_location=_artifact_location()))
        if found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)


def log_run(settings: Settings, result: Result | None = None) -> TrackingReport:
    """Log a model as one MLflow run: parameters, tags, metrics, samples table, dataset, plots, notebooks.

    One model of one run folder has one MLflow run: when the new one is complete, those of earlier
    executions go to MLflow's trash (restorable; `mlflow gc` frees their space). Writes tracking.json.
    Raises LabError when the tracking store cannot be used; result.json is there by then.
    """
    result = result or summarise(settings)
    folder = registry.model_dir(settings)
    experiment = init_database()
    with _one_sentence():
        client = open_client()
        name = f"{folder.parent.name}/{result.slug}"
        run_id = client.create_run(experiment, tags=_tags(result, folder), run_name=name).info.run_id
        try:
            _log_numbers(client, run_id, result)
            _log_samples(client, run_id, settings)
            _log_dataset(client, run_id, settings)
            _log_figures(client, run_id, result, settings)
            _log_files(client, run_id, folder)
        except BaseException:
            client.set_terminated(run_id, "FAILED")
            raise
        client.set_terminated(run_id)
        _retire_earlier(client, experiment, run_id, folder)
        report = TrackingReport(
            tracking_uri=_without_password(tracking_uri()),
            experiment=EXPERIMENT,
            run_id=run_id,
            metrics_logged=len(client.get_run(run_id).data.metrics),
            artifacts=tuple(_artifacts(client, run_id)),
        )
    store.write_json(folder / "tracking.json", report)
    return report


def attach(run_dir: Path) -> None:
    """Add what was finished after the runs were logged: each 06 notebook, and the comparison."""
    tracked = sorted(run_dir.glob("*/tracking.json"))
    if not tracked:
        return
    with _one_sentence():
        client = open_client()
        for path in tracked:
            run_id = store.read_json(path, TrackingReport).run_id
            late = [path.parent / f"{LATE_NOTEBOOKS[0]}.ipynb", run_dir / f"{LATE_NOTEBOOKS[1]}.ipynb"]
            _log_paths(client, run_id, [*late, run_dir / "comparison.json"])


def prompts_digest(prompts: Iterable[Prompt]) -> str:
    """Eight hexadecimal digits that change with any word, id or the order of the prompts."""
    return store.row_key(prompts=[dataclasses.asdict(prompt) for prompt in prompts])[:8]


def _artifact_location() -> str | None:
    """Below outputs/, whatever the working directory; a tracking server has a place of its own."""
    served = tracking_uri().startswith(("http:", "https:", "databricks"))
    return None if served else (store.outputs_dir() / "mlartifacts").as_uri()


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


def _tags(result: Result, folder: Path) -> dict[str, str]:
    return {
        "run": folder.parent.name,
        "folder": _folder_tag(folder),
        "family": result.family,
        "quality_applies": str(result.quality_applies).lower(),
        **{f"version.{name}": version for name, version in devices.versions().items()},
    }


def _folder_tag(folder: Path) -> str:
    """Names the folder a run came from, without telling a shared server where that is."""
    return hashlib.sha256(str(folder).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _params(result: Result) -> dict[str, object]:
    settings = {name: value for name, value in dataclasses.asdict(result.settings).items() if name != "model"}
    known = ("revision", "family", "parameters", "device", "dtype", "primary")
    described = {name: getattr(result, name) for name in known}
    return {**settings, **described, "model": comparison.spec_of(result.model).alias}


def _log_numbers(client: MlflowClient, run_id: str, result: Result) -> None:
    """Parameters, then metrics in as few log_batch calls as they fit; a loop of log_metric is far slower."""
    from mlflow.entities import Metric, Param

    client.log_batch(run_id, params=[Param(name, str(value)) for name, value in _params(result).items()])
    now = int(time.time() * 1000)
    metrics = [Metric(name, value, now, 0) for name, value in result.metrics.items()]
    for start in range(0, len(metrics), BATCH_LIMIT):
        client.log_batch(run_id, metrics=metrics[start : start + BATCH_LIMIT])


def _log_samples(client: MlflowClient, run_id: str, settings: Settings) -> None:
    """Every generation with its score, as the table the MLflow page shows."""
    primary = {score.key: score.values.get(scoring.PRIMARY) for score in scoring.scores_for(settings)}
    samples = generation.samples_for(settings)
    table: dict[str, Any] = {name: [getattr(s, name) for s in samples] for name in SAMPLE_COLUMNS}
    table[scoring.PRIMARY] = [primary.get(s.key) for s in samples]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # log_table itself calls pandas in a way that pandas deprecates
        client.log_table(run_id, table, "samples.json")


def _log_dataset(client: MlflowClient, run_id: str, settings: Settings) -> None:
    """The prompts as the run's dataset: their number, and a digest that changes with any word of them."""
    import json

    from mlflow.entities import Dataset, DatasetInput, InputTag

    prompts = registry.load_prompts(settings.prompts, settings.limit)
    name = Path(settings.prompts).stem if settings.prompts else "benchmark-15"
    dataset = Dataset(
        name=name,
        digest=prompts_digest(prompts),
        source_type="local",
        source=json.dumps({"file": Path(settings.prompts or "prompts.jsonl").name}),
        profile=json.dumps({"num_prompts": len(prompts)}),
    )
    client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "evaluation")])])


def _log_figures(client: MlflowClient, run_id: str, result: Result, settings: Settings) -> None:
    from matplotlib import pyplot

    from nbhelpers.comparison import plots

    figures = {
        "scores_by_prompt.png": plots.scores_by_prompt(scoring.scores_for(settings), result.primary),
        "dimensions.png": plots.dimensions(result.quality),
    }
    for name, figure in figures.items():
        client.log_figure(run_id, figure, f"plots/{name}")
        pyplot.close(figure)


def _log_files(client: MlflowClient, run_id: str, folder: Path) -> None:
    finished = [path for path in sorted(folder.glob("*.ipynb")) if path.stem not in LATE_NOTEBOOKS]
    files = [path for path in sorted(folder.glob("*.json*")) if path.name != "tracking.json"]
    _log_paths(client, run_id, [*finished, *files])


def _log_paths(client: MlflowClient, run_id: str, paths: Iterable[Path]) -> None:
    for path in paths:
        if path.exists():
            client.log_artifact(run_id, str(path), "notebooks" if path.suffix == ".ipynb" else "files")


def _retire_earlier(client: MlflowClient, experiment: str, run_id: str, folder: Path) -> None:
    for run in client.search_runs([experiment], f"tags.folder = '{_folder_tag(folder)}'"):
        if run.info.run_id != run_id:
            client.delete_run(run.info.run_id)


def _artifacts(client: MlflowClient, run_id: str, folder: str | None = None) -> Iterator[str]:
    for item in client.list_artifacts(run_id, folder):
        if item.is_dir:
            yield from _artifacts(client, run_id, item.path)
        else:
            yield item.path
