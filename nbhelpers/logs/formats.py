"""A file of results, whose content tells its format, as rows: one score of one item.

lm-evaluation-harness 0.4.13 (``--log_samples``; lm_eval/result_schema.py, ``SampleResult``), Inspect (by its
own reader), promptfoo (``OutputFile`` in src/types/index.ts), and tables with the columns of ``_table``.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from nbhelpers import store
from nbhelpers.options import Choice
from nbhelpers.records import LAB_SCALE, LabError, Result, RunInfo, Sample, Score
from nbhelpers.stats import sequential
from nbhelpers.tracking.result import lower_is_better, spec_of

KNOWN = "lm-evaluation-harness (samples_….jsonl), Inspect, promptfoo, or a table with id, model, score"
LINE = "\nline"  # of a row in its file: no column is named so
COLUMNS = ("id", "model", "score")
GENERATION = ("max_new_tokens", "temperature", "top_k", "top_p", "maker_settings")
RawRows = list[dict[str, Any]]


@dataclass(frozen=True)
class Log:
    """What a log says of one model on one task by one metric."""

    model: str
    task: str
    metric: str
    higher: bool = True  # is better
    unit: str = ""  # of a difference
    notes: tuple[str, ...] = ()  # what a reader must know
    margin: float | None = None  # of a run's primary score
    settings: tuple[tuple[str, str], ...] = ()  # how a run made what it scored
    looks: tuple[tuple[str, ...], ...] = ()  # the prompts that each look of --until-decided added
    source: str = ""
    scores: dict[str, float] = field(default_factory=dict)  # item -> mean over its repeats
    clusters: dict[str, str] = field(default_factory=dict)  # item -> cluster, where there are any
    asked: dict[str, tuple[str, str]] = field(default_factory=dict)  # item -> ``Row.text`` and ``prompt``
    dropped: dict[str, str] = field(default_factory=dict)  # item -> why it has no score


class Row(NamedTuple):
    """One score of one item; repeats of an item are several rows."""

    log: Log  # whose it is, as yet without scores
    item: str
    score: float | None  # None: ``why`` says why there is none
    text: str = ""  # digest of the item, "" where the log does not say it
    prompt: str = ""  # digest of what the model was asked
    cluster: str = ""
    repeat: str = ""
    why: str = ""


def rows_of(path: Path, choice: Choice) -> Iterator[Row] | None:
    """The rows of a file, None for one that is no log. LabError for a broken one."""
    body = path.read_bytes()
    if body.startswith(b"PK"):
        return _inspect(path, "eval", choice)
    rows = _parsed(body, path)
    keys = set(rows[0]) if rows else set[str]()
    if {"eval", "status"} <= keys:
        return _inspect(path, "json", choice)
    reader = next((reader for telling, reader in READERS.items() if keys.issuperset(telling)), None)
    return reader(path, rows, choice) if reader else None


def _parsed(body: bytes, path: Path) -> RawRows:
    """The objects of a JSON document or of JSON lines, or the rows of a table."""
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise LabError(f"{path} is not text in UTF-8, nor an Inspect log.") from None
    if text.lstrip()[:1] not in ("{", "["):
        return _csv(text, path)
    return [row | {LINE: number} for number, row in store.objects(text, str(path))]


def _csv(text: str, path: Path) -> RawRows:
    rows: RawRows = [row | {LINE: number} for number, row in store.table(text, str(path))]
    header = [name for name in (rows[0] if rows else ()) if name != LINE]
    lacking = [name for name in COLUMNS if name not in header]
    if len(lacking) == 1:
        raise LabError(f"{path}, line 1: the column {lacking[0]!r} is missing (it has {', '.join(header)}).")
    if ";" in text.partition("\n")[0] and "score" in header:  # as spreadsheets write where 0,5 is 0.5
        for row in rows:
            row["score"] = row["score"].replace(",", ".")
    return rows


def _digest(value: Any) -> str:
    return store.row_key(value=value)[:16]


def _number(value: Any) -> float | None:
    text = str(value).strip().lower().replace("_", "?")  # 1_0 is 10 to Python alone
    try:
        return float({"true": 1, "false": 0}.get(text, text if isinstance(value, str) else value))
    except (TypeError, ValueError, OverflowError):
        return None


def _text(row: Any, field: str) -> str:
    """A field as text, "" where there is none."""
    value = row.get(field) if isinstance(row, dict) else None
    return "" if value is None else str(value).strip()


def _harness(path: Path, rows: RawRows, choice: Choice) -> Iterator[Row]:
    """A line a document and filter; the model's name is in the results_….json beside it."""
    stamp = path.stem.rsplit("_", 1)[-1]
    beside = sorted(path.parent.glob("results_*.json"), key=lambda file: (stamp in file.name, file.name))
    results = _parsed(beside[-1].read_bytes(), beside[-1])[0] if beside else {}
    model = spec_of(str(results.get("model_name") or path.parent.resolve().name)).alias
    task = path.stem.removeprefix("samples_").rsplit("_", 1)[0] if path.name.startswith("samples_") else ""
    higher = results.get("higher_is_better", {}).get(task, {})
    filters = list(dict.fromkeys(str(row.get("filter", "none")) for row in rows))
    used = choice.filter if choice.filter in filters else filters[0]
    if len(filters) > 1 and choice.filter not in ("", used):
        raise LabError(f"{path} has no filter {choice.filter!r}: it has {', '.join(filters)}.")
    notes = (f"{task}: of the filters {', '.join(filters)} {used} is taken.",) if len(filters) > 1 else ()
    for row in (row for row in rows if str(row.get("filter", "none")) == used):
        digests = _text(row, "doc_hash"), _text(row, "prompt_hash")
        cluster, repeat = _text(row.get("doc"), choice.cluster), "1"  # its own repeats are in resps
        for metric in row["metrics"]:
            log = Log(model, task, metric, bool(higher.get(metric, True)), notes=notes)
            score, why = _number(row.get(metric)), f"its {metric} is not one number"
            yield Row(log, str(row["doc_id"]), score, *digests, cluster, repeat, why)


def _inspect(path: Path, kind: Any, choice: Choice) -> Iterator[Row]:
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
    notes = () if head.status == "success" else (f"{path.name}: Inspect says of this log: {head.status}.",)
    for sample in samples:
        chat = sample.input
        asked = chat if isinstance(chat, str) else [(message.role, message.text) for message in chat]
        digest, failure = _digest([asked, sample.target, sample.choices]), sample.error or sample.limit
        values = {name: score.value for name, score in (sample.scores or {}).items()}
        for name, value in (values or dict.fromkeys(clusters)).items():
            cluster = _text(sample.metadata, choice.cluster or clusters.get(name, ""))
            for key, grade in value.items() if isinstance(value, dict) else [("", value)]:
                score = to_float(grade) if isinstance(grade, str) and grade in letters else _number(grade)
                log = Log(head.eval.model, head.eval.task, f"{name}/{key}" if key else name, notes=notes)
                why = str(failure or f"its {name} is {grade!r}, not a number")
                yield Row(log, str(sample.id), score, digest, "", cluster, str(sample.epoch), why)


def _promptfoo(path: Path, rows: RawRows, choice: Choice) -> Iterator[Row]:
    """A cell of the grid is a test by a provider and prompt. A repeated test is another row with its vars."""
    if (version := rows[0]["results"]["version"]) != 3:
        raise LabError(f"{path}: promptfoo results of version {version} are unknown to this release.")
    results = rows[0]["results"]["results"]
    labels = {row["prompt"]["label"] for row in results}
    for row in results:
        provider, variables, prompt = row["provider"], row.get("vars") or {}, row["prompt"]["label"]
        model = f"{provider.get('label') or provider['id']}" + f", {prompt}" * (len(labels) > 1)
        digest, item = _digest(variables), json.dumps(variables, sort_keys=True, ensure_ascii=False)
        item = item if len(item) <= 80 else f"{item[:70]}… {digest[:8]}"
        cluster = _text(variables | ((row.get("testCase") or {}).get("metadata") or {}), choice.cluster)
        failed, why = row.get("failureReason") == 2, f"error: {row.get('error')}"
        values = {"score": row.get("score"), "pass": row.get("success"), **(row.get("namedScores") or {})}
        values |= {"latency": row.get("latencyMs"), "cost": row.get("cost")}
        for metric, value in values.items():
            log = Log(model, "", metric, metric not in ("latency", "cost"))
            yield Row(log, item, None if failed else _number(value), digest, cluster=cluster, why=why)


def _table(path: Path, rows: RawRows, choice: Choice) -> Iterator[Row]:
    """Columns id, model, score; if there: task, metric, repeat, cluster, text (what was asked)."""
    for row in rows:
        where = f"{path}, line {row[LINE]}, column"
        if lacking := [name for name in ("id", "model") if not _text(row, name)]:
            raise LabError(f"{where} {lacking[0]}: it is empty.")
        score = _number(row.get("score"))
        if score is None and _text(row, "score"):
            raise LabError(f"{where} score: {row['score']!r} is not a number.")
        log = Log(_text(row, "model"), _text(row, "task"), _text(row, "metric") or "score")
        digest = _digest(row["text"]) if _text(row, "text") else ""
        cluster, repeat = _text(row, choice.cluster or "cluster"), _text(row, "repeat")
        yield Row(log, _text(row, "id"), score, digest, "", cluster, repeat, "no score")


READERS = {("doc_id", "metrics"): _harness, ("evalId", "results"): _promptfoo, COLUMNS: _table}


def run_rows(folder: Path, result: Result, info: RunInfo | None) -> Iterator[Row]:
    """A model of a run: its scores, the speed of its timed rows, and what its samples took."""
    if not result.quality_applies or not result.finished:
        return
    model, samples = result.model, list(store.read_rows(folder / "samples.jsonl", Sample))
    yield from _run_scores(folder, result, info, samples)
    timed = list(store.read_rows(folder / "latency.jsonl", Sample))
    quiet = result.noise in ("quiet", "not recorded")
    notes = () if quiet else (f"The timings of {model} are {result.noise}.",)
    energy = all(row.energy_j is not None for row in samples)  # cost is in proportion to it, or to time
    spent = ("energy", "energy_j") if energy else ("time", "share_s")
    measured = [(timed, name, f"{name}_s") for name in ("latency", "ttft", "tpot")]
    for rows, metric, field_name in (*measured, (samples, "tokens", "new_tokens"), (samples, *spent)):
        log = Log(model, "", metric, higher=False, notes=notes)
        for row in rows:
            yield Row(log, row.prompt_id, vars(row)[field_name], why=row.error or "not measured")


def _run_scores(folder: Path, result: Result, info: RunInfo | None, samples: list[Sample]) -> Iterator[Row]:
    model, primary = result.model, result.primary
    generation = {name: str(vars(result.settings)[name]) for name in GENERATION} | {"dtype": result.dtype}
    generation |= {"task file": info.task} if info and info.task else {}
    settings = tuple((name, value) for name, value in generation.items() if value != "unknown")
    looks = tuple(map(tuple, sequential.looks_of(info) if info else ()))
    unit = result.scale.unit if result.scale == LAB_SCALE else ""  # a task's scores are their own
    run_log, lower = Log(model, "", "", unit=unit, settings=settings, looks=looks), lower_is_better(result)
    texts = {row.prompt_id: _digest(row.prompt) for row in samples}
    scores = [(primary, item, mean) for item, mean in result.per_prompt.items()]
    for row in store.read_rows(folder / "scores.jsonl", Score):
        scores += [(name, row.prompt_id, value) for name, value in row.values.items() if name != primary]
    for metric, item, score in scores:
        margin = result.scale.margin if metric == primary else None
        log = replace(run_log, metric=metric, higher=metric not in lower, margin=margin)
        yield Row(log, item, score, texts.get(item, ""), cluster=result.clusters.get(item, ""))
