"""Logs of other tools, and this laboratory's runs, as scores by item.

What a log is, its content says. The formats, as their makers write them: lm-evaluation-harness 0.4.13
(``--log_samples``; lm_eval/result_schema.py, ``SampleResult``), Inspect (by its own reader), promptfoo
(``OutputFile`` and ``EvaluateResult`` in src/types/index.ts), and tables with the columns of ``_table_rows``.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from nbhelpers import store
from nbhelpers.comparison import compare
from nbhelpers.comparison.logs import POINTS, Choice, Log, Row
from nbhelpers.records import LabError, Result, Sample, Score


def read(path: Path, model: str = "", choice: Choice | None = None) -> list[Log]:
    """Every model, task and metric of a log, a run's or model's folder, or a folder of logs.

    LabError for what is not a log, is broken or newer than this release, and where it lacks ``model``.
    """
    choice, found = choice or Choice(), dict[tuple[str, str, str], Log]()
    runs = sorted(file.parent for file in (*path.glob("result.json"), *path.glob("*/result.json")))
    for one in runs or (sorted(path.rglob("*")) if path.is_dir() else [path]):
        rows = _run_rows(one) if runs else _rows(one, choice, named=not path.is_dir())
        try:
            logs = list(_logs(rows, path, choice))
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise LabError(f"{one} is not a log as its tool writes it: {error!r}.") from None
        for log in logs:  # of the same in one folder the last counts, as dates are names
            twice = found.get((log.model, log.task, log.metric))
            note = (f"{path.name} holds {log.model} on {log.task or 'its task'} twice: {one.name} counts.",)
            found[log.model, log.task, log.metric] = replace(log, notes=log.notes + note) if twice else log
    models = list(dict.fromkeys(log.model for log in found.values()))
    if model and model not in models:
        raise LabError(f"{path} has no model {model!r}: it has {', '.join(models)}.")
    if not found:
        raise LabError(f"{path} holds no scores that could be compared.")
    return [log for log in found.values() if model in ("", log.model)]


def _logs(rows: Iterable[Row], path: Path, choice: Choice) -> Iterator[Log]:
    groups = dict[tuple[str, str, str], list[Row]]()
    for row in rows:
        groups.setdefault((row.model, row.task, row.metric), []).append(row)
    for (model, task, metric), own in groups.items():
        scores, dropped = dict[str, list[float]](), dict[str, str]()
        asked, seen = dict[str, tuple[str, str]](), set[tuple[str, str]]()
        for row in own:
            if asked.setdefault(row.item, (row.text, row.prompt)) != (row.text, row.prompt):
                raise LabError(f"{path}: the item {row.item} of {model} stands there with two texts.")
            if row.repeat and (row.item, row.repeat) in seen:
                raise LabError(f"{path}: repeat {row.repeat} of the item {row.item} of {model} stands twice.")
            seen.add((row.item, row.repeat))
            if row.score is None or not math.isfinite(row.score):
                dropped[row.item] = row.why or "its score is not a number"
            else:
                scores.setdefault(row.item, []).append(row.score)
        means = {item: fmean(sorted(values)) for item, values in scores.items()}
        yield Log(
            *(f"{path}", model, task, metric, means),
            clusters={row.item: row.cluster for row in own if row.cluster},
            asked=asked,
            dropped={item: why for item, why in dropped.items() if item not in means},
            binary=all(value in (0, 1) for values in scores.values() for value in values),
            higher=own[0].higher and metric not in choice.lower_is_better,
            unit=own[0].unit or metric,
            notes=tuple(dict.fromkeys(row.why for row in own if row.score is not None and row.why)),
        )


def _rows(path: Path, choice: Choice, named: bool) -> Iterator[Row]:
    """The rows of a file by what it holds; of a file that is no log none, unless it was named."""
    if path.is_dir():
        return
    if not path.is_file():
        raise LabError(f"There is no log {path}.")
    body = path.read_bytes()
    if body[:2] == b"PK":
        yield from _inspect_rows(path, "eval", choice)
        return
    try:
        text = body.decode("utf-8-sig")
        found = _parsed(text, path)
    except (UnicodeDecodeError, LabError) as error:
        if not named:
            return
        raise (
            error if isinstance(error, LabError) else LabError(f"{path} is not text, nor an Inspect log.")
        ) from None
    first = next(iter(found), None) if isinstance(found, list) else found
    keys = first.keys() if isinstance(first, dict) else set[str]()
    results = found.get("results") if isinstance(found, dict) else found if "testIdx" in keys else None
    if {"eval", "status"} <= keys:
        yield from _inspect_rows(path, "json", choice)
    elif {"doc_id", "metrics"} <= keys:
        yield from _harness_rows(path, found if isinstance(found, list) else [found], choice)
    elif isinstance(results, list) or (isinstance(results, dict) and "results" in results):
        yield from _promptfoo_rows(path, results, choice)
    elif {"id", "model", "score"} <= keys:
        yield from _table_rows(path, found if isinstance(found, list) else [found], choice)
    elif named:
        known = (
            "lm-evaluation-harness (samples_….jsonl), Inspect, promptfoo, or a table with id, model, score"
        )
        raise LabError(f"{path} is not a log of {known}.")


def _parsed(text: str, path: Path) -> Any:
    """A JSON document, or the rows of JSON lines or of a table."""
    if text.lstrip()[:1] not in ("{", "["):
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
        if any(None in row.values() for row in rows):
            raise LabError(f"{path}: a line has fewer cells than the header.")
        return rows
    try:
        return json.loads(text)
    except ValueError:
        lines = enumerate(text.splitlines(), 1)
    rows = []
    for number, line in lines:
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise LabError(f"{path}, line {number}: not JSON ({error}).") from None
        if not isinstance(rows[-1], dict):
            raise LabError(f"{path}, line {number}: not an object.")
    return rows


def _digest(value: Any) -> str:
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _number(value: Any) -> float | None:
    """A score as a number, or None."""
    words = {"true": 1.0, "false": 0.0}
    try:
        return float(words.get(str(value).strip().lower(), value))
    except (TypeError, ValueError):
        return None


def _harness_rows(path: Path, found: list[dict[str, Any]], choice: Choice) -> Iterator[Row]:
    """A line a document and filter; the model's name is in the results_….json beside it."""
    stamp = path.stem.rsplit("_", 1)[-1]
    beside = sorted(path.parent.glob("results_*.json"), key=lambda file: (stamp in file.name, file.name))
    about = _parsed(beside[-1].read_text(encoding="utf-8"), beside[-1]) if beside else {}
    model = compare.spec_of(str(about.get("model_name") or path.parent.resolve().name)).alias
    task = path.stem.removeprefix("samples_").rsplit("_", 1)[0] if path.name.startswith("samples_") else ""
    higher = about.get("higher_is_better", {}).get(task, {})
    filters = list(dict.fromkeys(str(row.get("filter", "none")) for row in found))
    used = choice.filter if choice.filter in filters else filters[0]
    if choice.filter and used != choice.filter and len(filters) > 1:
        raise LabError(f"{path} has no filter {choice.filter!r}: it has {', '.join(filters)}.")
    note = f"{task}: of the filters {', '.join(filters)} {used} is taken." if len(filters) > 1 else ""
    for row in found:
        doc, digests = row.get("doc"), (str(row.get("doc_hash", "")), str(row.get("prompt_hash", "")))
        cluster = str(doc.get(choice.cluster, "")) if isinstance(doc, dict) else ""
        if str(row.get("filter", "none")) == used:
            for metric in row["metrics"]:
                score = _number(row.get(metric))
                why = note if score is not None else f"its {metric} is not one number"
                better = bool(higher.get(metric, True))
                yield Row(model, task, metric, str(row["doc_id"]), score, *digests, cluster, "", why, better)


def _inspect_rows(path: Path, kind: Any, choice: Choice) -> Iterator[Row]:
    """A line a sample, epoch and scorer; clusters as the scorer's stderr names them."""
    try:
        from inspect_ai.log import read_eval_log, read_eval_log_sample_summaries
        from inspect_ai.scorer import value_to_float
    except ImportError:
        why = "which its own package reads: pip install 'nbhelpers[logs]'"
        raise LabError(f"{path} is a log of Inspect, {why}.") from None
    try:
        head = read_eval_log(path, header_only=True, format=kind)
        samples = read_eval_log_sample_summaries(path, format=kind)
    except Exception as error:  # of its zip, JSON and pydantic
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise LabError(f"{path} is not a log that this release of Inspect can read ({lines[0]}).") from None
    clusters = dict[str, str]()
    for scorer in head.eval.scorers or ():
        metrics = scorer.metrics if isinstance(scorer.metrics, list) else []
        options = [getattr(metric, "options", None) or {} for metric in metrics]
        clusters[scorer.name] = next((o["cluster"] for o in options if o.get("cluster")), "")
    letters, to_float = ("C", "I", "P", "N", "yes", "no"), value_to_float()
    note = "" if head.status == "success" else f"{path.name}: Inspect says of this log: {head.status}."
    for sample in samples:
        asked = sample.input
        said = asked if isinstance(asked, str) else [(message.role, message.text) for message in asked]
        item = (head.eval.model, head.eval.task)
        text, failed = _digest([said, sample.target, sample.choices]), sample.error or sample.limit
        values = {name: score.value for name, score in (sample.scores or {}).items()}
        for name, value in (values or dict.fromkeys(clusters)).items():
            parts = value.items() if isinstance(value, dict) else [("", value)]
            cluster = sample.metadata.get(choice.cluster or clusters.get(name, ""), "")
            for part, one in parts:
                known = one in letters if isinstance(one, str) else False
                number = to_float(one) if known else _number(one)
                why = note if number is not None else str(failed or f"its {name} is {one!r}, not a number")
                metric = f"{name}/{part}" if part else name
                row = Row(
                    *item, metric, str(sample.id), number, text, "", str(cluster), str(sample.epoch), why
                )
                yield row


def _promptfoo_rows(path: Path, results: Any, choice: Choice) -> Iterator[Row]:
    """A cell of the grid is a test by a provider and prompt. A repeated test is another row with its vars."""
    if isinstance(results, dict):
        if results.get("version", 3) not in (1, 2, 3):
            raise LabError(
                f"{path}: promptfoo results of version {results['version']} are unknown to this release."
            )
        results = results["results"]
    labels = [str((row.get("prompt") or {}).get("label", "")) for row in results]
    for row, label in zip(results, labels, strict=True):
        provider, given = row.get("provider") or {}, row.get("vars") or {}
        name = provider if isinstance(provider, str) else provider.get("label") or provider.get("id")
        name = f"{name}, {label}" if len(set(labels)) > 1 else f"{name}"
        said = json.dumps(given, sort_keys=True, ensure_ascii=False)
        item = said if len(said) <= 80 else f"{said[:70]}… {_digest(given)[:8]}"
        fields = given | ((row.get("testCase") or {}).get("metadata") or {})
        cluster = str(fields.get(choice.cluster, ""))
        failed = f"error: {row.get('error')}" if row.get("failureReason") == 2 else ""
        values = {"score": row.get("score"), "pass": row.get("success"), **(row.get("namedScores") or {})}
        for metric, value in values.items():
            score = None if failed else _number(value)
            yield Row(name, "", metric, item, score, _digest(given), "", cluster, "", failed)
        for metric, value in (("latency", row.get("latencyMs")), ("cost", row.get("cost"))):
            yield Row(name, "", metric, item, _number(value), _digest(given), why=failed, higher=False)


def _table_rows(path: Path, rows: list[dict[str, Any]], choice: Choice) -> Iterator[Row]:
    """Columns id, model, score; if there: task, metric, repeat, cluster, text (what was asked)."""
    for number, row in enumerate(rows, 1):
        lacking = [name for name in ("id", "model", "score") if name not in row or row["id"] in (None, "")]
        score = None if lacking else _number(row["score"])
        if lacking or (score is None and row["score"] not in (None, "")):
            what = f"{row.get('score')!r} is not a score" if not lacking else f"{lacking[0]} is missing"
            raise LabError(f"{path}, row {number}: {what}.")
        names = (str(row["model"]), str(row.get("task") or ""), str(row.get("metric") or "score"))
        text = _digest(row["text"]) if row.get("text") else ""
        cluster, repeat = (str(row.get(name, "")) for name in (choice.cluster or "cluster", "repeat"))
        yield Row(
            *names, str(row["id"]), score, text, "", cluster, repeat, "" if score is not None else "no score"
        )


def _run_rows(folder: Path) -> Iterator[Row]:
    """A model of a run: its scores, the speed of its timed rows, and what its samples took."""
    result = store.read_json(folder / "result.json", Result)
    if not result.quality_applies or not result.finished:
        return
    model, unit = compare.spec_of(result.model, compare.read_info(folder.parent)).alias, POINTS
    samples = list(store.read_rows(folder / "samples.jsonl", Sample))
    texts = {row.prompt_id: _digest(row.prompt) for row in samples}
    for item, mean in result.per_prompt.items():
        yield Row(model, "", result.primary, item, mean, texts.get(item, ""), unit=unit)
    for score in store.read_rows(folder / "scores.jsonl", Score):
        for name, value in score.values.items():
            if name != result.primary:
                yield Row(model, "", name, score.prompt_id, value, texts.get(score.prompt_id, ""), unit=unit)
    note = "" if result.noise in ("quiet", "not recorded") else f"The timings of {model} are {result.noise}."
    for row in store.read_rows(folder / "latency.jsonl", Sample):
        for name in ("latency", "ttft", "tpot"):
            yield Row(
                model, "", name, row.prompt_id, vars(row)[f"{name}_s"], why=row.error or note, higher=False
            )
    energy = all(row.energy_j is not None for row in samples)  # cost is in proportion to it, or to time
    for row in samples:
        taken = {
            "tokens": row.new_tokens,
            "energy" if energy else "time": row.energy_j if energy else row.share_s,
        }
        for name, much in taken.items():
            yield Row(model, "", name, row.prompt_id, much, why=row.error or "", higher=False)
