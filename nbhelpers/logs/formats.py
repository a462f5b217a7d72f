"""What stands in a file of results, whoever wrote it, as rows: one score of one item.

What a file is, its content says. The formats, as their makers write them: lm-evaluation-harness 0.4.13
(``--log_samples``; lm_eval/result_schema.py, ``SampleResult``), Inspect (by its own reader), promptfoo
(``OutputFile`` in src/types/index.ts), and tables with the columns of ``_table``.
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
MADE = ("max_new_tokens", "temperature", "top_k", "top_p", "maker_settings")
Rows = list[dict[str, Any]]


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
    # item -> digests of the item and of its prompt, "" unknown
    asked: dict[str, tuple[str, str]] = field(default_factory=dict)
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
    found = _parsed(body, path)
    keys = set(found[0]) if found else set[str]()
    if {"eval", "status"} <= keys:
        return _inspect(path, "json", choice)
    for wanted, reader in READERS.items():
        if keys.issuperset(wanted):
            return reader(path, found, choice)
    return None


def _parsed(body: bytes, path: Path) -> Rows:
    """The objects of a JSON document or of JSON lines, or the rows of a table."""
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise LabError(f"{path} is not text in UTF-8, nor an Inspect log.") from None
    if text.lstrip()[:1] not in ("{", "["):
        return _csv(text, path)
    return [row | {LINE: number} for number, row in store.objects(text, str(path))]


def _csv(text: str, path: Path) -> Rows:
    """Where semicolons part the cells, as spreadsheets do, 0,5 is 0.5."""
    rows: Rows = [row | {LINE: number} for number, row in store.table(text, str(path))]
    header = [name for name in (rows[0] if rows else ()) if name != LINE]
    if len(lacking := {*COLUMNS} - {*header}) == 1:
        has = f"(it has {', '.join(header)})"
        raise LabError(f"{path}, line 1: the column {lacking.pop()!r} is missing {has}.")
    for row in rows if ";" in text.partition("\n")[0] and "score" in header else ():
        row["score"] = row["score"].replace(",", ".")
    return rows


def _digest(value: Any) -> str:
    return store.row_key(value=value)[:16]


def _number(value: Any) -> float | None:
    """A score as a number, or None."""
    text = str(value).strip().lower().replace("_", "?")  # 1_0 is 10 to Python alone
    try:
        return float({"true": 1, "false": 0}.get(text, text if isinstance(value, str) else value))
    except (TypeError, ValueError, OverflowError):
        return None


def _named(fields: Any, name: str) -> str:
    """A field as text, "" where there is none."""
    value = fields.get(name) if isinstance(fields, dict) else None
    return "" if value is None else str(value).strip()


def _harness(path: Path, found: Rows, choice: Choice) -> Iterator[Row]:
    """A line a document and filter; the model's name is in the results_….json beside it."""
    stamp = path.stem.rsplit("_", 1)[-1]
    beside = sorted(path.parent.glob("results_*.json"), key=lambda file: (stamp in file.name, file.name))
    about = _parsed(beside[-1].read_bytes(), beside[-1])[0] if beside else {}
    model = spec_of(str(about.get("model_name") or path.parent.resolve().name)).alias
    task = path.stem.removeprefix("samples_").rsplit("_", 1)[0] if path.name.startswith("samples_") else ""
    higher = about.get("higher_is_better", {}).get(task, {})
    filters = list(dict.fromkeys(str(row.get("filter", "none")) for row in found))
    used, several = choice.filter if choice.filter in filters else filters[0], len(filters) > 1
    if several and choice.filter not in ("", used):
        raise LabError(f"{path} has no filter {choice.filter!r}: it has {', '.join(filters)}.")
    notes = (f"{task}: of the filters {', '.join(filters)} {used} is taken.",) if several else ()
    for row in (row for row in found if str(row.get("filter", "none")) == used):
        digests = _named(row, "doc_hash"), _named(row, "prompt_hash")
        cluster, repeat = _named(row.get("doc"), choice.cluster), "1"  # its own repeats are in resps
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
        asked = sample.input
        said = asked if isinstance(asked, str) else [(message.role, message.text) for message in asked]
        text, failed = _digest([said, sample.target, sample.choices]), sample.error or sample.limit
        values = {name: score.value for name, score in (sample.scores or {}).items()}
        for name, value in (values or dict.fromkeys(clusters)).items():
            for part, one in value.items() if isinstance(value, dict) else [("", value)]:
                known = isinstance(one, str) and one in letters
                metric, score = f"{name}/{part}" if part else name, to_float(one) if known else _number(one)
                log = Log(head.eval.model, head.eval.task, metric, notes=notes)
                cluster = _named(sample.metadata, choice.cluster or clusters.get(name, ""))
                why = str(failed or f"its {name} is {one!r}, not a number")
                yield Row(log, str(sample.id), score, text, "", cluster, str(sample.epoch), why)


def _promptfoo(path: Path, found: Rows, choice: Choice) -> Iterator[Row]:
    """A cell of the grid is a test by a provider and prompt. A repeated test is another row with its vars."""
    if (version := found[0]["results"]["version"]) != 3:
        raise LabError(f"{path}: promptfoo results of version {version} are unknown to this release.")
    results = found[0]["results"]["results"]
    labels = {row["prompt"]["label"] for row in results}
    for row in results:
        provider, given, prompt = row["provider"], row.get("vars") or {}, row["prompt"]["label"]
        name = f"{provider.get('label') or provider['id']}" + f", {prompt}" * (len(labels) > 1)
        said, text = json.dumps(given, sort_keys=True, ensure_ascii=False), _digest(given)
        item = said if len(said) <= 80 else f"{said[:70]}… {text[:8]}"
        cluster = _named(given | ((row.get("testCase") or {}).get("metadata") or {}), choice.cluster)
        failed = row.get("failureReason") == 2
        values = {"score": row.get("score"), "pass": row.get("success"), **(row.get("namedScores") or {})}
        values |= {"latency": row.get("latencyMs"), "cost": row.get("cost")}
        for metric, value in values.items():
            score, why = None if failed else _number(value), f"error: {row.get('error')}"
            log = Log(name, "", metric, metric not in ("latency", "cost"))
            yield Row(log, item, score, text, cluster=cluster, why=why)


def _table(path: Path, found: Rows, choice: Choice) -> Iterator[Row]:
    """Columns id, model, score; if there: task, metric, repeat, cluster, text (what was asked)."""
    for row in found:
        where, score = f"{path}, line {row[LINE]}, column", _number(row.get("score"))
        if lacking := [name for name in ("id", "model") if not _named(row, name)]:
            raise LabError(f"{where} {lacking[0]}: it is empty.")
        if score is None and _named(row, "score"):
            raise LabError(f"{where} score: {row['score']!r} is not a number.")
        log = Log(_named(row, "model"), _named(row, "task"), _named(row, "metric") or "score")
        text = _digest(row["text"]) if _named(row, "text") else ""
        cluster, repeat = (_named(row, name) for name in (choice.cluster or "cluster", "repeat"))
        yield Row(log, _named(row, "id"), score, text, "", cluster, repeat, "no score")


READERS = {("doc_id", "metrics"): _harness, ("evalId", "results"): _promptfoo, COLUMNS: _table}


def run_rows(folder: Path, info: RunInfo | None) -> Iterator[Row]:
    """A model of a run: its scores, the speed of its timed rows, and what its samples took."""
    result = store.read_json(folder / "result.json", Result)
    if not result.quality_applies or not result.finished:
        return
    settings, model = result.settings, spec_of(result.model, info).alias
    known = {name: str(vars(settings)[name]) for name in MADE} | {"dtype": result.dtype}
    known |= {"task file": info.task} if info and info.task else {}
    looks = tuple(map(tuple, sequential.looks_of(info) if info else ()))
    how = tuple((name, said) for name, said in known.items() if said != "unknown")
    made, lower = Log(model, "", "", settings=how, looks=looks), lower_is_better(result)
    samples = list(store.read_rows(folder / "samples.jsonl", Sample))
    texts = {row.prompt_id: _digest(row.prompt) for row in samples}
    scored = [(result.primary, item, mean) for item, mean in result.per_prompt.items()]
    for score in store.read_rows(folder / "scores.jsonl", Score):
        others = [name for name in score.values if name != result.primary]
        scored += [(name, score.prompt_id, score.values[name]) for name in others]
    unit = result.scale.unit if result.scale == LAB_SCALE else ""  # a task's scores are their own
    for metric, item, value in scored:
        margin = result.scale.margin if metric == result.primary else None
        log = replace(made, metric=metric, higher=metric not in lower, unit=unit, margin=margin)
        yield Row(log, item, value, texts.get(item, ""), cluster=result.clusters.get(item, ""))
    timed = list(store.read_rows(folder / "latency.jsonl", Sample))
    quiet = result.noise in ("quiet", "not recorded")
    notes = () if quiet else (f"The timings of {model} are {result.noise}.",)
    energy = all(row.energy_j is not None for row in samples)  # cost is in proportion to it, or to time
    spent = ("energy", "energy_j") if energy else ("time", "share_s")
    taken = [(timed, name, f"{name}_s") for name in ("latency", "ttft", "tpot")]
    for rows, metric, name in (*taken, (samples, "tokens", "new_tokens"), (samples, *spent)):
        log = Log(model, "", metric, higher=False, notes=notes)
        for row in rows:
            yield Row(log, row.prompt_id, vars(row)[name], why=row.error or "not measured")
