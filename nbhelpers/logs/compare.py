"""Logs and runs side by side: the verdicts of a run on anyone's scores.

The unit is the item, or the cluster where a log names clusters: repeats are averaged within an item, items
within a cluster; items of one text are one. What one log lacks is listed, with the reason.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from nbhelpers.comparison.comparable import units_of
from nbhelpers.comparison.compare import ComparisonReport, Table
from nbhelpers.logs.formats import Log
from nbhelpers.logs.read import named, pooled
from nbhelpers.options import Choice
from nbhelpers.records import LAB_SCALE, SCHEMA_VERSION, LabError, Record
from nbhelpers.stats import estimate, paired
from nbhelpers.tasks import RIGHT

MEASURED = ("latency", "ttft", "tpot", "tokens", "energy", "time", "cost")  # for budgets, never compared
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


def compare_logs(logs: Sequence[Log], choice: Choice) -> LogsReport:
    """Every task and metric of the choice that at least two logs have. LabError where there is none."""
    found, notes = groups(named(logs), choice)
    tests = sum(math.comb(len(group.scores), 2) for group in found)
    numbers = [group.measured(tests) for group in found]
    judged, reports = iter(paired.judged([pair for _, own in numbers for pair in own], tests)), []
    for group, (ranking, own) in zip(found, numbers, strict=True):
        better = "higher" if group.scale.higher_is_better else "lower"
        by = f"{group.primary} ({better} is better), margin {group.scale.margin:g}"
        report = group.report(ranking, tuple(next(judged) for _ in own), by, {})
        basis = report.basis + (f", p corrected over {tests} comparisons" if tests > 1 else "")
        report = replace(report, basis=basis, notes=tuple(group.notes))
        reports.append(replace(report, task=group.logs[0].task, lacking=group.lacking))
    return LogsReport(tuple(reports), tuple(notes))


def groups(logs: Sequence[Log], choice: Choice) -> tuple[list[Group], list[str]]:
    """What is compared, and what a reader must know of the rest."""
    notes = list(dict.fromkeys(note for log in logs for note in log.notes))
    given, logs = logs, [log for log in logs if log.metric not in MEASURED or log.metric == choice.metric]
    settings = dict[str, dict[str, None]]()
    for name, said in (one for log in logs for one in log.settings):
        settings.setdefault(name, {})[said] = None
    if differ := [f"{name} ({' and '.join(said)})" for name, said in settings.items() if len(said) > 1]:
        notes.append(
            f"The runs differ in {', '.join(differ)}: what is compared is a model with its settings."
        )
    logs, tasks = pooled(logs) if choice.pool else logs, dict[str, dict[str, list[Log]]]()
    for log in logs:
        own = tasks.setdefault(log.task, {}).setdefault(log.metric, [])
        if log.model in [other.model for other in own]:
            raise LabError(f"{log.model} stands twice among these logs: give each once.")
        own.append(log)
    found = []
    for task, metrics in tasks.items():
        chosen = metrics if choice.metric == "all" else [choice.metric or next(iter(metrics))]
        others = [name for name in metrics if name not in chosen]
        if choice.task not in ("", task):
            continue
        if others and not choice.metric:
            notes.append(f"Other metrics{of(task)}, by --metric: {', '.join(others)}.")
        for metric in chosen:
            own = metrics.get(metric, [])
            if len(own) > 1:
                found.append(_group(own, choice))
            elif own:
                notes.append(f"{metric}{of(task)} is only in {own[0].source}: not compared.")
    if not found:
        have = dict.fromkeys(f"{log.metric}{of(log.task)} by {log.model}" for log in given)
        raise LabError(
            f"No two logs have the same task and metric that you ask for: they have {'; '.join(have)}."
        )
    return found, notes


def of(task: str) -> str:
    return f" of {task}" if task else ""


def _group(logs: Sequence[Log], choice: Choice) -> Group:
    """LabError for logs whose items have other texts, that share none, or whose margin nobody can guess."""
    first, asked = logs[0], dict[str, tuple[Log, tuple[str, str]]]()
    for log in logs:
        for item, digests in log.asked.items():
            other, known = asked.setdefault(item, (log, digests))
            pairs = zip(("text", "prompt"), known, digests, strict=True)
            differs = [what for what, one, two in pairs if one and two and one != two]
            if differs and not (differs == ["prompt"] and choice.any_prompt):
                hint = "" if "text" in differs else " (--any-prompt, if only their chat templates differ)"
                where = f"{log.model} has another {differs[0]} than {other.model} for the item {item}"
                raise LabError(f"These logs cannot be paired: {where}{of(log.task)}{hint}.")
    shared = [item for item in first.scores if all(item in log.scores for log in logs)]
    every = dict.fromkeys(item for log in logs for item in (*log.scores, *log.dropped))
    if not shared:
        why = [f": {g.model} has no score ({w})" for g in logs if not g.scores for w in g.dropped.values()]
        names = " and ".join(log.model for log in logs)
        raise LabError(f"The logs of {names} have no item{of(first.task)} in common{''.join(why[:1])}.")
    lacking = {
        g.model: {i: g.dropped.get(i, "not in its log") for i in every if i not in g.scores} for g in logs
    }
    notes = list[str]()
    for model, items in lacking.items():
        named = "; ".join(f"{item} ({why})" for item, why in [*items.items()][:FEW])
        more = f" and {len(items) - FEW} more" if len(items) > FEW else ""
        if items:
            notes.append(f"Left out, because {model} has no score there{of(first.task)}: {named}{more}.")
    clusters = dict[str, str]()
    for item, cluster in (one for log in logs for one in log.clusters.items()):
        if clusters.setdefault(item, f"cluster {cluster}") != f"cluster {cluster}":
            raise LabError(
                f"The item {item} stands in two clusters{of(first.task)}: {clusters[item][8:]}, {cluster}."
            )
    counted = "prompts" if first.unit == LAB_SCALE.unit else "items"
    texts = {item: first.asked[item][0] or item for item in shared}
    units, counts = units_of(texts, clusters, counted)
    counted = "clusters" if len(set(units.values())) < len(set(texts.values())) else counted
    notes += counts
    scores = {g.model: estimate.by_unit({i: g.scores[i] for i in shared}, units) for g in logs}
    own = sorted({g.margin for g in logs if g.margin}) if choice.margin is None else [choice.margin]
    if len(own) > 1:
        said = " and ".join(f"{one:g}" for one in own)
        raise LabError(f"The runs' own margins of {first.metric} are {said}: choose one by --margin.")
    points, inside = first.unit == LAB_SCALE.unit, all(0 <= x <= 1 for g in logs for x in g.scores.values())
    if not (own or points or inside):
        raise LabError(
            f"{first.metric} is not a number from 0 to 1: say which difference matters by --margin."
        )
    scale = RIGHT if inside and not points else LAB_SCALE
    margin = own[0] if own else scale.margin
    if not 0 < margin < math.inf:
        raise LabError(f"The margin is {margin:g}: it must be more than 0.")
    scale = replace(scale, margin=margin, unit=first.unit, higher_is_better=first.higher)
    looks = next((log.looks for log in logs if log.looks), ())
    table: dict[str, Any] = {"primary": first.metric, "scores": scores, "scale": scale, "items": counted}
    return Group(**table, looks=looks, logs=logs, lacking=lacking, notes=notes)
