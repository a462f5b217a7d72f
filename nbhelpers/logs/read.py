"""Logs and runs as scores by item."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from nbhelpers.logs.formats import KNOWN, Log, Row, rows_of, run_rows
from nbhelpers.options import Choice
from nbhelpers.records import LabError
from nbhelpers.stats.estimate import HUGE, grouped
from nbhelpers.tracking.result import read_info

SUFFIXES = (".csv", ".eval", ".json", ".jsonl")  # of what is read in a folder


def read(path: Path, model: str = "", choice: Choice | None = None) -> list[Log]:
    """Every model, task and metric of a log, a run's or model's folder, or a folder of logs.

    LabError for what is not a log, is broken or newer than this release, and where it lacks ``model``.
    """
    choice = choice or Choice()
    if not path.exists():
        raise LabError(f"There is no log {path}.")
    runs = sorted(file.parent for file in (*path.glob("result.json"), *path.glob("*/result.json")))
    infos = {run: read_info(run) for run in {file.parent for file in runs}}
    files = [file for file in sorted(path.rglob("*")) if file.suffix in SUFFIXES and file.is_file()]
    latest = dict[tuple[str, str, str], Log]()  # of a folder's files the last counts, as dates are names
    for file in runs or (files if path.is_dir() else [path]):
        try:
            rows = run_rows(file, infos[file.parent]) if runs else rows_of(file, choice)
            if rows is None and file == path:
                raise LabError(f"{path} is not a log of {KNOWN}.")
            logs = list(_logs(rows or (), path, choice))
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise LabError(f"{file} is not a log as its tool writes it: {error!r}.") from None
        for log in logs:
            key = (log.model, log.task, log.metric)
            twice = f"{path.name} holds {log.model} on {log.task or 'its task'} twice: {file.name} counts."
            latest[key] = replace(log, notes=(*log.notes, twice)) if key in latest else log
    models = list(dict.fromkeys(log.model for log in latest.values()))
    if not latest:
        raise LabError(f"{path} holds no scores that could be compared.")
    if model not in ("", *models):
        raise LabError(f"{path} has no model {model!r}: it has {', '.join(models)}.")
    if choice.cluster and not runs and not any(log.clusters for log in latest.values()):
        raise LabError(f"{path} has no items with a field {choice.cluster!r}.")
    return [log for log in latest.values() if model in ("", log.model)]


def _logs(rows: Iterable[Row], path: Path, choice: Choice) -> Iterator[Log]:
    for log_rows in grouped(((row.log.model, row.log.task, row.log.metric), row) for row in rows).values():
        log = log_rows[0].log
        scores, dropped = dict[str, list[float]](), dict[str, str]()
        asked, seen = dict[str, tuple[str, str]](), set[tuple[str, str]]()
        for row in log_rows:
            if asked.setdefault(row.item, (row.text, row.prompt)) != (row.text, row.prompt):
                raise LabError(f"{path}: the item {row.item} of {log.model} stands there with two texts.")
            if row.repeat and (row.item, row.repeat) in seen:
                repeat = f"repeat {row.repeat} of the item {row.item} of {log.model}"
                raise LabError(f"{path}: {repeat} stands twice.")
            seen.add((row.item, row.repeat))
            if row.score is None:
                dropped[row.item] = row.why.partition("\n")[0][:200]
            elif abs(row.score) < HUGE:
                scores.setdefault(row.item, []).append(row.score)
            else:
                dropped[row.item] = "its score is not a number"
        yield replace(
            log,
            source=str(path),
            higher=log.higher and not choice.lower_is_better,
            unit=log.unit or log.metric,
            scores={item: fmean(sorted(repeats)) for item, repeats in scores.items()},
            clusters={row.item: row.cluster for row in log_rows if row.cluster},
            asked=asked,
            dropped={item: why for item, why in dropped.items() if item not in scores},
        )


def named(logs: Sequence[Log]) -> list[Log]:
    """The logs, with a label of the source added to the names of models that several sources have."""
    sources = Counter(model for model, _ in {(log.model, log.source) for log in logs})
    paths = [Path(source) for source in dict.fromkeys(log.source for log in logs)]
    labels = [(path.stem, path.parent.name, f"{path}") for path in paths]
    most_distinct = max(zip(*labels, strict=True), key=lambda names: len(set(names)))
    label = dict(zip(map(str, paths), most_distinct, strict=True))
    return [
        replace(log, model=f"{log.model} ({label[log.source]})") if sources[log.model] > 1 else log
        for log in logs
    ]


def pooled(logs: Sequence[Log]) -> list[Log]:
    """All tasks of a model and metric as one, each task a cluster of its items."""
    pools = dict[tuple[str, str], Log]()
    for log in logs:
        empty = replace(log, task="all tasks", scores={}, clusters={}, asked={}, dropped={})
        pool = pools.setdefault((log.model, log.metric), empty)
        pool.clusters.update({f"{log.task}/{item}": log.task for item in log.asked})
        for name in ("scores", "asked", "dropped"):
            vars(pool)[name].update((f"{log.task}/{item}", value) for item, value in vars(log)[name].items())
    return list(pools.values())
