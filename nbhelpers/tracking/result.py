"""One model's run in one record, result.json, which every other tool reads; and what is read of a run."""

import dataclasses
import json
from collections import Counter
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import Any

from nbhelpers import store, tasks
from nbhelpers.devices import machine, meters
from nbhelpers.generation import generate
from nbhelpers.loading import load
from nbhelpers.records import LabError, ModelRun, ModelSpec, Result, RunInfo, Sample, Score
from nbhelpers.scoring import costs, rubric
from nbhelpers.stats.estimate import by_prompt, grouped
from nbhelpers.tracking.metrics import FOREIGN, StatsReport, flat_metrics

Scored = list[tuple[Sample, Score | None]]


def make_result(run: ModelRun) -> Result:
    """Everything about one model in one record, from its files; writes result.json."""
    loaded, report = load.read_report(run), store.read_json(run.folder / "stats.json", StatsReport)
    samples, timed = generate.read_samples(run), generate.read_samples(run, "latency")
    scores, task = rubric.read_scores(run), tasks.load_task(run.settings.task)
    # A server's own work would be noise.
    passes = meters.passes(run.folder, [row.key for row in timed if row.engine != "server"])
    money = costs.cost_summary(samples, machine.read_device(run))
    metrics = flat_metrics(report, loaded, samples, money) | meters.metrics(passes)
    per_prompt = by_prompt(scores, task.primary)
    others = {s.name for s in task.scorers} - {task.primary, task.primary.partition("/")[0]}
    for name in (task.primary, *sorted(others)):
        if lacking := sum(name not in score.values for score in scores):
            metrics[FOREIGN + ("" if name == task.primary else f"/{name}")] = lacking
    fields = {field.name for field in dataclasses.fields(Result)} - {"schema_version"}
    values = vars(loaded) | vars(report) | {"quality_applies": loaded.quality_applies and bool(per_prompt)}
    result = Result(
        **{name: value for name, value in values.items() if name in fields},
        primary=task.primary,
        scale=task.scale,
        clusters=tasks.clusters(run.settings),
        metrics=metrics,
        per_prompt=per_prompt,
        settings=dataclasses.replace(run.settings, run_dir=""),
        noise=meters.verdict(passes),
    )
    store.write_json(run.folder / "result.json", result)
    return result


def read_info(run_dir: Path) -> RunInfo | None:
    """run.json, or None for a folder without one."""
    return store.read_json(run_dir / "run.json", RunInfo) if (run_dir / "run.json").exists() else None


def read_results(run_dir: Path) -> tuple[list[Result], dict[str, str]]:
    """Every result.json of a run, and the model folders whose file cannot be used, with the reason."""
    results, broken, info = [], {}, None
    with suppress(LabError):  # a run.json that cannot be read is reported by itself
        info = read_info(run_dir)
    for path in sorted(run_dir.glob("*/result.json")):
        try:
            result = store.read_json(path, Result)
            if result.slug != path.parent.name:  # paths are made from it
                raise LabError(f"result.json is of the folder {result.slug!r}: run the model again.")
            results.append(dataclasses.replace(result, model=spec_of(result.model, info).alias))
        except LabError as error:
            broken[path.parent.name] = str(error).replace(f"{path}", path.name)
    return results, broken


def results_in(path: Path) -> dict[Path, tuple[Result, RunInfo | None]]:
    """Folder -> its result, under the model's alias, and its run: of a run, or of a model's folder alone."""
    folders = sorted(file.parent for file in (*path.glob("result.json"), *path.glob("*/result.json")))
    infos = {run: read_info(run) for run in {folder.parent for folder in folders}}
    found = {f: (store.read_json(f / "result.json", Result), infos[f.parent]) for f in folders}
    return {f: (dataclasses.replace(r, model=spec_of(r.model, i).alias), i) for f, (r, i) in found.items()}


def read_scored(folder: Path) -> Scored:
    """A model's samples with their scores; of one tried again the last. LabError for broken files."""
    scores = {score.key: score for score in store.read_rows(folder / "scores.jsonl", Score)}
    samples = {row.key: row for row in store.read_rows(folder / "samples.jsonl", Sample)}
    return [(row, scores.get(key)) for key, row in samples.items()]


def read_all_scored(run_dir: Path, whole: Collection[str] = ()) -> tuple[dict[str, Scored], dict[str, str]]:
    """``read_scored`` by folder, of those not in ``whole`` the failed ones; and why some cannot be read."""
    by_model, broken = dict[str, Scored](), dict[str, str]()
    for folder in (path.parent for path in sorted(run_dir.glob("*/samples.jsonl"))):
        try:
            rows = read_scored(folder)
            by_model[folder.name] = rows if folder.name in whole else [row for row in rows if row[0].error]
        except LabError as error:
            broken[folder.name] = str(error)
    return by_model, broken


def spec_of(model: str, info: RunInfo | None = None) -> ModelSpec:
    """What a name of a run means, as run.json says: people read its alias, its files lie in its slug."""
    if info and model in info.models[: len(info.specs)]:
        return info.specs[info.models.index(model)]
    is_path = Path(model).is_absolute() or model.startswith((".", "~"))  # no report shows where it is
    return ModelSpec((Path(model).name if is_path else model) or model, "", "local")


def count_failures(info: RunInfo | None, rows: Iterable[Scored]) -> dict[str, int]:
    """How often each kind of failure happened to a run's notebooks and samples, the most frequent first."""
    kinds = [status.failure for status in (info.notebooks if info else ()) if status.status == "failed"]
    kinds += [sample.failure for of_model in rows for sample, _ in of_model if sample.error]
    return dict(Counter(str(kind or "other") for kind in kinds).most_common())


def lower_is_better(result: Result) -> set[str]:
    """The scores of which less is better; by their kinds where the task is gone."""
    scales = {name: kind.scale for name, kind in tasks.KINDS.items()}
    with suppress(LabError):
        scales |= {scorer.name: scorer.scale for scorer in tasks.load_task(result.settings.task).scorers}
    scales |= {result.primary: result.scale}
    return {name for name, scale in scales.items() if not scale.higher_is_better}


def export_samples(run_dir: Path, out: Path) -> Path:
    """A run's samples as lm-evaluation-harness writes them (``SampleResult`` of 0.4.13): a folder a model, a
    line a prompt, its repeats in ``resps``, scores averaged over them. Returns ``out``. LabError without any.
    """
    for result, rows in _scored(run_dir):
        lines = list[str]()
        for id, repeats in grouped((row[0].prompt_id, row) for row in rows).items():
            samples, scores = zip(*repeats, strict=True)
            values = [score.values for score in scores if score.values]
            means = {name: fmean(sorted(each[name] for each in values)) for name in (values or [{}])[0]}
            prompt, texts = samples[0].prompt, [sample.text for sample in samples]
            doc = {"id": id, "text": prompt, "content_type": samples[0].content_type}
            line: dict[str, Any] = {"doc_id": id, "doc": doc, "target": "", "resps": [texts]}
            line |= {"arguments": {"gen_args_0": {"arg_0": prompt, "arg_1": {}}}, "filtered_resps": texts}
            hashed = {"doc": doc, "prompt": prompt, "target": ""}
            line |= {f"{name}_hash": store.row_key(value=value) for name, value in hashed.items()} | means
            lines.append(json.dumps(line | {"filter": "none", "metrics": [*means]}) + "\n")
        lower = lower_is_better(result)
        higher = {name: name not in lower for _, score in rows for name in score.values}
        summary = json.dumps({"model_name": result.model, "higher_is_better": {"prompts": higher}})
        store.write_text(out / result.slug / "results_run.json", [summary + "\n"])
        store.write_text(out / result.slug / "samples_prompts_run.jsonl", lines)
    return out


def export_dataset(run_dir: Path, out: Path) -> Path:
    """A run's samples and scores as a dataset of the Hugging Face Hub: a typed Parquet file and a card.
    Returns ``out``. LabError without any."""
    import pyarrow
    from pyarrow import parquet

    scored, card = _scored(run_dir), out / "README.md"
    if card.exists() and "tags: [nbhelpers]" not in card.read_text(encoding="utf-8", errors="replace"):
        raise LabError(f"The file {card} is no card of ours: move it away, or name another folder.")
    number, text = pyarrow.float64(), pyarrow.string()
    types = {"str": text, "int": pyarrow.int64(), "float": number, "FinishReason": text}
    columns = {f.name: types.get(str(f.type).partition(" ")[0]) for f in dataclasses.fields(Sample)}
    columns["target"] = pyarrow.list_(text)
    pairs = [pair for _, of_model in scored for pair in of_model]
    if names := dict.fromkeys(name for _, score in pairs for name in score.values):
        columns["scores"] = pyarrow.struct([(name, number) for name in names])
    rows = [vars(row) | {"target": score.target, "scores": score.values} for row, score in pairs]
    schema = pyarrow.schema([(name, kind) for name, kind in columns.items() if kind])
    out.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema), out / "test.parquet")
    models = ", ".join(f"`{spec_of(result.model).alias}` ({result.revision})" for result, _ in scored)
    about = f"{len(rows)} answers of {models}, each with its scores and what it took."
    about += f"\n\nVerdicts rest on `{scored[0][0].primary}`."
    store.write_text(card, [f"---\ntags: [nbhelpers]\n---\n# {run_dir.name}\n\n{about}\n"])
    return out


def _scored(run_dir: Path) -> list[tuple[Result, list[tuple[Sample, Score]]]]:
    """Every model of a run with its scored samples. LabError without any."""
    if not (paths := sorted(run_dir.glob("*/result.json"))):
        raise LabError(f"{run_dir} has no result.json: there is nothing to export.")
    models = [(store.read_json(path, Result), read_scored(path.parent)) for path in paths]
    return [(result, [(row, score) for row, score in rows if score]) for result, rows in models]
