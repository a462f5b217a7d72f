"""Logs and runs side by side: the verdicts of a run on anyone's scores.

The unit is the item, after its repeats are averaged, or the cluster of items; items of one text are one.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from nbhelpers.comparison.comparable import units_of
from nbhelpers.comparison.compare import ComparisonReport, Table
from nbhelpers.logs.formats import KNOWN, Log, Row, rows_of, run_rows
from nbhelpers.options import Choice
from nbhelpers.records import LAB_SCALE, SCHEMA_VERSION, LabError, Record, Scale
from nbhelpers.stats import paired
from nbhelpers.stats.estimate import HUGE, by_unit, grouped
from nbhelpers.tasks import RIGHT
from nbhelpers.tracking.result import results_in

MEASURED = ("latency", "ttft", "tpot", "tokens", "energy", "time", "cost")  # for budgets, never compared
SUFFIXES = (".csv", ".eval", ".json", ".jsonl")  # of what is read in a folder
FEW = 5  # items that a sentence names; the JSON has all


@dataclass(frozen=True)
class LogsReport(Record):
    """comparison.json of `nbhelpers compare --out`; p is corrected over the pairs of all comparisons."""

    comparisons: tuple[ComparisonReport, ...]  # a task and metric each
    notes: tuple[str, ...]
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True, kw_only=True)
class Group(Table):
    """Logs of one task and metric on what they share."""

    logs: Sequence[Log]
    lacking: dict[str, dict[str, str]]
    notes: list[str]


def read_logs(path: Path, model: str = "", choice: Choice | None = None) -> list[Log]:
    """Every model, task and metric of a log, a run's or model's folder, or a folder of logs.

    LabError for what is not a log, is broken or newer than this release, and where it lacks ``model``.
    """
    choice = choice or Choice()
    if not path.exists():
        raise LabError(f"There is no log {path}.")
    runs = results_in(path)
    files = [file for file in sorted(path.rglob("*")) if file.suffix in SUFFIXES and file.is_file()]
    latest = dict[tuple[str, str, str], Log]()  # of a folder's files the last counts, as dates are names
    for file in runs or (files if path.is_dir() else [path]):
        try:
            rows = run_rows(file, *runs[file]) if runs else rows_of(file, choice)
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


def compare_logs(logs: Sequence[Log], choice: Choice) -> LogsReport:
    """Every task and metric of the choice that at least two logs have. LabError where there is none."""
    comparable, notes = groups(named(logs), choice)
    tests = sum(math.comb(len(group.scores), 2) for group in comparable)
    measured = [group.means_and_pairs(tests) for group in comparable]
    verdicts = iter(paired.judged([pair for _, pairs in measured for pair in pairs], tests))
    reports = []
    for group, (ranking, pairs) in zip(comparable, measured, strict=True):
        better = "higher" if group.scale.higher_is_better else "lower"
        by = f"{group.primary} ({better} is better), margin {group.scale.margin:g}"
        report = group.report(ranking, tuple(next(verdicts) for _ in pairs), by, {})
        basis = report.basis + (f", p corrected over {tests} comparisons" if tests > 1 else "")
        report = replace(report, basis=basis, notes=tuple(group.notes))
        reports.append(replace(report, task=group.logs[0].task, lacking=group.lacking))
    return LogsReport(tuple(reports), tuple(notes))


def groups(logs: Sequence[Log], choice: Choice) -> tuple[list[Group], list[str]]:
    """What is compared, and what a reader must know of the rest."""
    notes = list(dict.fromkeys(note for log in logs for note in log.notes))
    scored = [log for log in logs if log.metric not in MEASURED or log.metric == choice.metric]
    settings = dict[str, dict[str, None]]()
    for name, value in (setting for log in scored for setting in log.settings):
        settings.setdefault(name, {})[value] = None
    mixed = [f"{name} ({' and '.join(values)})" for name, values in settings.items() if len(values) > 1]
    if mixed:
        notes.append(f"The runs differ in {', '.join(mixed)}: what is compared is a model with its settings.")
    tasks = dict[str, dict[str, list[Log]]]()
    for log in pooled(scored) if choice.pool else scored:
        rivals = tasks.setdefault(log.task, {}).setdefault(log.metric, [])
        if log.model in [rival.model for rival in rivals]:
            raise LabError(f"{log.model} stands twice among these logs: give each once.")
        rivals.append(log)
    comparable = []
    for task, metrics in tasks.items():
        if choice.task not in ("", task):
            continue
        chosen = metrics if choice.metric == "all" else [choice.metric or next(iter(metrics))]
        others = [name for name in metrics if name not in chosen]
        if others and not choice.metric:
            notes.append(f"Other metrics{of_task(task)}, by --metric: {', '.join(others)}.")
        for metric in chosen:
            rivals = metrics.get(metric, [])
            if len(rivals) > 1:
                comparable.append(_group(rivals, choice))
            elif rivals:
                notes.append(f"{metric}{of_task(task)} is only in {rivals[0].source}: not compared.")
    if not comparable:
        have = "; ".join(dict.fromkeys(f"{log.metric}{of_task(log.task)} by {log.model}" for log in logs))
        raise LabError(f"No two logs have the same task and metric that you ask for: they have {have}.")
    return comparable, notes


def of_task(task: str) -> str:
    return f" of {task}" if task else ""


def _group(logs: Sequence[Log], choice: Choice) -> Group:
    """LabError for logs whose items have other texts, that share none, or whose margin nobody can guess."""
    _check_texts(logs, choice)
    first, of = logs[0], of_task(logs[0].task)
    shared = [item for item in first.scores if all(item in log.scores for log in logs)]
    if not shared:
        dropped = ((log.model, why) for log in logs if not log.scores for why in log.dropped.values())
        reason = next((f": {model} has no score ({why})" for model, why in dropped), "")
        names = " and ".join(log.model for log in logs)
        raise LabError(f"The logs of {names} have no item{of} in common{reason}.")
    items = dict.fromkeys(item for log in logs for item in (*log.scores, *log.dropped))
    lacking, notes = dict[str, dict[str, str]](), list[str]()
    for log in logs:
        missing = {item: log.dropped.get(item, "not in its log") for item in items if item not in log.scores}
        lacking[log.model] = missing
        if missing:
            listed = "; ".join(f"{item} ({why})" for item, why in [*missing.items()][:FEW])
            more = f" and {len(missing) - FEW} more" if len(missing) > FEW else ""
            notes.append(f"Left out, because {log.model} has no score there{of}: {listed}{more}.")
    clusters = dict[str, str]()
    for item, cluster in (pair for log in logs for pair in log.clusters.items()):
        if (other := clusters.setdefault(item, cluster)) != cluster:
            raise LabError(f"The item {item} stands in two clusters{of}: {other}, {cluster}.")
    counted = "prompts" if first.unit == LAB_SCALE.unit else "items"
    texts = {item: first.asked[item][0] or item for item in shared}
    named_clusters = {item: f"cluster {name}" for item, name in clusters.items()}  # none is an item's id
    units, unit_notes = units_of(texts, named_clusters, counted)
    counted = "clusters" if len(set(units.values())) < len(set(texts.values())) else counted
    return Group(
        primary=first.metric,
        scores={log.model: by_unit({i: log.scores[i] for i in shared}, units) for log in logs},
        scale=_scale(logs, choice),
        items=counted,
        looks=next((log.looks for log in logs if log.looks), ()),
        logs=logs,
        lacking=lacking,
        notes=notes + unit_notes,
    )


def _check_texts(logs: Sequence[Log], choice: Choice) -> None:
    asked = dict[str, tuple[Log, tuple[str, str]]]()  # item -> the first log that has it, its digests
    for log in logs:
        for item, digests in log.asked.items():
            other, expected = asked.setdefault(item, (log, digests))
            kinds = zip(("text", "prompt"), expected, digests, strict=True)
            differs = [kind for kind, a, b in kinds if a and b and a != b]
            if differs and not (differs == ["prompt"] and choice.any_prompt):
                hint = "" if "text" in differs else " (--any-prompt, if only their chat templates differ)"
                where = f"{log.model} has another {differs[0]} than {other.model} for the item {item}"
                raise LabError(f"These logs cannot be paired: {where}{of_task(log.task)}{hint}.")


def _scale(logs: Sequence[Log], choice: Choice) -> Scale:
    metric, unit = logs[0].metric, logs[0].unit
    margins = sorted({log.margin for log in logs if log.margin}) if choice.margin is None else [choice.margin]
    if len(margins) > 1:
        listed = " and ".join(f"{margin:g}" for margin in margins)
        raise LabError(f"The runs' own margins of {metric} are {listed}: choose one by --margin.")
    points = unit == LAB_SCALE.unit
    shares = all(0 <= score <= 1 for log in logs for score in log.scores.values())
    if not (margins or points or shares):
        raise LabError(f"{metric} is not a number from 0 to 1: say which difference matters by --margin.")
    scale = RIGHT if shares and not points else LAB_SCALE
    margin = margins[0] if margins else scale.margin
    if not 0 < margin < math.inf:
        raise LabError(f"The margin is {margin:g}: it must be more than 0.")
    return replace(scale, margin=margin, unit=unit, higher_is_better=logs[0].higher)
