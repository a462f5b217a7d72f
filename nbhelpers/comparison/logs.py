"""Logs and runs side by side: the verdicts of a run on anyone's scores.

The unit is the item, or the cluster where a log names clusters: repeats are averaged within an item, items
within a cluster. What one log lacks is listed, with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from nbhelpers.comparison import compare
from nbhelpers.comparison.compare import ComparisonReport
from nbhelpers.records import SCHEMA_VERSION, LabError, Record
from nbhelpers.stats import estimate, paired
from nbhelpers.stats.paired import Scores

POINTS = "points"  # the unit of this laboratory's own scores, from 1 to 10
MEASURED = ("latency", "ttft", "tpot", "tokens", "energy", "time", "cost")  # for budgets, never compared
RATE_MARGIN = 0.05  # of a metric from 0 to 1: differences below it do not matter to us (a choice)
FEW = 5  # items that a sentence names; the JSON has all


class Row(NamedTuple):
    """One score of one item; repeats of an item are several rows."""

    model: str
    task: str
    metric: str
    item: str
    score: float | None  # None: ``why`` says why there is none
    text: str = ""  # digest of the item, "" where the log does not say it
    prompt: str = ""  # digest of what the model was asked
    cluster: str = ""
    repeat: str = ""
    why: str = ""
    higher: bool = True  # is better
    unit: str = ""  # default: the metric


@dataclass(frozen=True)
class Log:
    """What a log says of one model on one task by one metric."""

    source: str
    model: str
    task: str
    metric: str
    scores: dict[str, float]  # item -> mean over its repeats
    clusters: dict[str, str]  # item -> cluster, where there are any
    asked: dict[str, tuple[str, str]]  # item -> digests of the item and of its prompt, "" unknown
    dropped: dict[str, str]  # item -> why it has no score
    binary: bool  # each score is 0 or 1
    higher: bool
    unit: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Choice:
    """What is read of logs, and how it is paired."""

    task: str = ""  # "": each
    metric: str = ""  # "": a task's first; "all"
    margin: float | None = None  # None: 0.5 points, 0.05 of a metric from 0 to 1
    filter: str = ""  # of lm-evaluation-harness; "": the first
    cluster: str = ""  # field of an item that names its cluster
    pool: bool = False  # all tasks as one, each a cluster: the subtasks of a benchmark
    lower_is_better: tuple[str, ...] = ()  # metrics
    any_prompt: bool = False  # pair items whose prompts differ, as chat templates make them


@dataclass(frozen=True)
class LogComparison(Record):
    """Models on one task by one metric."""

    task: str
    higher_is_better: bool
    report: ComparisonReport  # its ``primary`` is the metric, its ``prompts`` what is counted
    lacking: dict[str, dict[str, str]]  # model -> items that others have -> why it has no score


@dataclass(frozen=True)
class LogsReport(Record):
    """comparison.json of `nbhelpers compare --out`; p is corrected over the pairs of all comparisons."""

    comparisons: tuple[LogComparison, ...]
    notes: tuple[str, ...]
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class Group:
    """Logs of one task and metric on what they share."""

    logs: Sequence[Log]
    scores: dict[str, Scores]  # model -> item or cluster -> mean
    items: str  # what is counted: prompts, items or clusters
    margin: float
    lacking: dict[str, dict[str, str]]
    notes: list[str]


def compare_logs(logs: Sequence[Log], choice: Choice) -> LogsReport:
    """Every task and metric of the choice that at least two logs have. LabError where there is none."""
    found, notes = groups(named(logs), choice)
    tests = sum(math.comb(len(group.scores), 2) for group in found)
    numbers, comparisons = [], []
    for group in found:
        first, means = group.logs[0], {m: estimate.estimate(s.values(), m) for m, s in group.scores.items()}
        sign = -1 if first.higher else 1
        ranking = dict(sorted(means.items(), key=lambda pair: sign * (pair[1].mean or 0.0)))
        pairs = paired.measured({model: group.scores[model] for model in ranking}, group.margin, tests)
        numbers += [replace(pair, unit=first.unit, items=group.items) for pair in pairs]
        units, better = tuple(next(iter(group.scores.values()))), "higher" if first.higher else "lower"
        basis = f"by {first.metric} ({better} is better), margin {group.margin:g}"
        basis += f", p corrected over {tests} comparisons" if tests > 1 else ""
        report = ComparisonReport(first.metric, units, ranking, (), None, "", None, "", {}, basis=basis)
        report = replace(report, notes=tuple(group.notes))
        comparisons.append(LogComparison(first.task, first.higher, report, group.lacking))
    judged, done = iter(paired.judged(numbers)), []
    for one in comparisons:
        ranking = one.report.ranking
        own = tuple(next(judged) for _ in range(math.comb(len(ranking), 2)))
        if not one.higher_is_better:
            own = tuple(replace(p, verdict=compare.OPPOSITE.get(p.verdict, p.verdict)) for p in own)
        lead = own[: len(ranking) - 1]
        pick = next(iter(ranking)) if all(pair.verdict == "better" for pair in lead) else None
        said = " ".join(map(compare.verdict_sentence, lead))
        done.append(replace(one, report=replace(one.report, pairs=own, pick=pick, pick_reason=said)))
    return LogsReport(tuple(done), tuple(notes))


def named(logs: Sequence[Log]) -> list[Log]:
    """The logs with a name for each model of each source: the source's is added where models share theirs."""
    sources = {log.model: {other.source for other in logs if other.model == log.model} for log in logs}
    paths = [Path(source) for source in dict.fromkeys(log.source for log in logs)]
    labels = (
        [path.stem for path in paths],
        [path.parent.name for path in paths],
        [f"{path}" for path in paths],
    )
    telling = max(labels, key=lambda names: len(set(names)))
    label = dict(zip(map(str, paths), telling, strict=True))
    several = {model for model, known in sources.items() if len(known) > 1}
    return [
        replace(log, model=f"{log.model} ({label[log.source]})") if log.model in several else log
        for log in logs
    ]


def groups(logs: Sequence[Log], choice: Choice) -> tuple[list[Group], list[str]]:
    """What is compared, and what a reader must know of the rest."""
    notes = list(dict.fromkeys(note for log in logs for note in log.notes))
    logs = [log for log in logs if log.metric not in MEASURED]
    logs, tasks = _pooled(logs) if choice.pool else logs, dict[str, dict[str, list[Log]]]()
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
        have = dict.fromkeys(f"{log.metric}{of(log.task)} by {log.model}" for log in logs)
        raise LabError(
            f"No two logs have the same task and metric that you ask for: they have {'; '.join(have)}."
        )
    return found, notes


def of(task: str) -> str:
    return f" of {task}" if task else ""


def _pooled(logs: Sequence[Log]) -> list[Log]:
    """All tasks of a model and metric as one, each task a cluster of its items."""
    groups = dict[tuple[str, str], list[Log]]()
    for log in logs:
        groups.setdefault((log.model, log.metric), []).append(log)
    pooled = []
    for own in groups.values():
        clusters = {f"{log.task}/{item}": log.task for log in own for item in log.asked}
        pooled.append(
            replace(
                own[0],
                task="all tasks",
                scores={f"{g.task}/{item}": score for g in own for item, score in g.scores.items()},
                asked={f"{g.task}/{item}": digests for g in own for item, digests in g.asked.items()},
                dropped={f"{g.task}/{item}": why for g in own for item, why in g.dropped.items()},
                clusters=clusters,
            )
        )
    return pooled


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
        raise LabError(
            f"The logs of {' and '.join(log.model for log in logs)} have no item{of(first.task)} in common."
        )
    lacking = {
        g.model: {i: g.dropped.get(i, "not in its log") for i in every if i not in g.scores} for g in logs
    }
    notes = list[str]()
    for model, items in lacking.items():
        named = "; ".join(f"{item} ({why})" for item, why in [*items.items()][:FEW])
        more = f" and {len(items) - FEW} more" if len(items) > FEW else ""
        if items:
            notes.append(f"Left out, because {model} has no score there{of(first.task)}: {named}{more}.")
    clusters = {item: cluster for log in logs for item, cluster in log.clusters.items()}
    units = dict[str, list[str]]()
    for item in shared:
        units.setdefault(clusters.get(item, item), []).append(item)
    counted = "prompts" if first.unit == POINTS else "items"
    if len(units) < len(shared):
        notes.append(f"{len(shared)} {counted} in {len(units)} clusters: clusters are what is counted.")
        counted = "clusters"
    scores = {g.model: {u: fmean(g.scores[i] for i in own) for u, own in units.items()} for g in logs}
    margin = choice.margin
    if margin is None:
        margin = compare.MARGIN if first.unit == POINTS else RATE_MARGIN
        inside = all(0 <= score <= 1 for log in logs for score in log.scores.values())
        if first.unit != POINTS and not inside:
            raise LabError(
                f"{first.metric} is not a number from 0 to 1: say which difference matters by --margin."
            )
    if not 0 < margin < math.inf:
        raise LabError(f"The margin is {margin:g}: it must be more than 0.")
    return Group(logs, scores, counted, margin, lacking, notes)


def lines(found: LogsReport) -> list[str]:
    """The tables and verdicts as text."""
    said = list[str]()
    for one in found.comparisons:
        report = one.report
        said.append(f"{report.primary}{of(one.task)} over {len(report.prompts)} {report.pairs[0].items}")
        said.append(f"{'model':32} {'mean':>7}  95% interval")
        for model, e in report.ranking.items():
            interval = e.reason if e.low is None else f"[{e.low:.3f}, {e.high:.3f}]"
            said.append(f"{model:32} {e.mean:7.3f}  {interval}")
        said.append(f"verdicts {report.basis}:")
        said += [f"  {compare.verdict_sentence(pair)}" for pair in report.pairs]
        said += [*report.notes, ""]
    return [*said, *found.notes]
