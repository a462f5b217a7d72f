"""One model's run in numbers: stats.json, and result.json, which every other tool reads."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import Any

from nbhelpers import store, tasks
from nbhelpers.devices import device, meters
from nbhelpers.generation import generate
from nbhelpers.loading import load
from nbhelpers.records import (
    LAB_SCALE,
    SCHEMA_VERSION,
    Estimate,
    LabError,
    ModelRun,
    ModelSpec,
    Record,
    Result,
    RunInfo,
    Sample,
    Scale,
    Score,
)
from nbhelpers.scoring import costs, rubric
from nbhelpers.stats import estimate as stats

MEMORY = ("rss_before", "rss_after_load", "rss_after_forward", "device_peak")  # of loading.json
AMOUNTS: dict[str, Callable[[Sample], int]] = {  # what a sample counts for
    "tokens": lambda row: row.new_tokens,
    "bytes": lambda row: row.bytes,
    "words": lambda row: len(row.text.split()),
}


@dataclass(frozen=True)
class StatsReport(Record):
    """stats.json of one model: estimates over prompts, one for each score."""

    model: str
    attempted: int
    finished: int
    failed: int
    quality: dict[str, Estimate]
    latency: dict[str, Estimate]
    percentiles: dict[str, Estimate] = field(default_factory=dict)  # "ttft_s/p50": seconds, in ``mean``
    schema_version: int = SCHEMA_VERSION


def make_stats(run: ModelRun) -> StatsReport:
    """Estimates over prompts of every score and latency, from their files; writes stats.json."""
    scores, task = rubric.read_scores(run), tasks.load_task(run.settings.task)
    failed, quality = quality_estimates(scores, task.scale, tasks.clusters(run.settings))
    times = latency_estimates(generate.read_samples(run, "latency"))
    report = StatsReport(run.settings.model, len(scores), len(scores) - failed, failed, quality, *times)
    store.write_json(run.folder / "stats.json", report)
    return report


def make_result(run: ModelRun) -> Result:
    """Everything about one model in one record, from its files; writes result.json."""
    loaded, report = load.read_report(run), store.read_json(run.folder / "stats.json", StatsReport)
    samples, timed = generate.read_samples(run), generate.read_samples(run, "latency")
    here = [row.key for row in timed if row.engine != "server"]  # a server's own work would be noise
    passes = meters.passes(run.folder, here)
    money = costs.cost_summary(samples, device.read_report(run))
    metrics = flat_metrics(report, loaded, samples, money) | meters.metrics(passes)
    scores, task = rubric.read_scores(run), tasks.load_task(run.settings.task)
    per_prompt = stats.by_prompt(scores, task.primary)
    others = {s.name for s in task.scorers} - {task.primary, task.primary.partition("/")[0]}
    for name in (task.primary, *sorted(others)):  # of the primary score without its name
        if lacking := sum(name not in score.values for score in scores):
            own = "" if name == task.primary else f"/{name}"
            metrics[f"samples/not_applicable{own}"] = lacking
    common = {field.name for field in dataclasses.fields(Result)} - {"schema_version"}
    known = vars(loaded) | vars(report) | {"quality_applies": loaded.quality_applies and bool(per_prompt)}
    result = Result(
        **{name: value for name, value in known.items() if name in common},
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


def quality_estimates(
    scores: Sequence[Score], scale: Scale = LAB_SCALE, clusters: Mapping[str, str] = MappingProxyType({})
) -> tuple[int, dict[str, Estimate]]:
    """How many samples failed, and the estimates of every score over prompts, or over their clusters."""
    quality = dict[str, Estimate]()
    for name in dict.fromkeys(name for score in scores for name in score.values):
        means = stats.by_unit(stats.by_prompt(scores, name), clusters).values()
        quality[name] = stats.mean_score(means, name, scale)
    return sum(score.failed for score in scores), quality


def latency_estimates(rows: Iterable[Sample]) -> tuple[dict[str, Estimate], dict[str, Estimate]]:
    """Times and speeds at batch 1, and the percentiles of the times, over prompts: the mean of their rounds.

    Times are skewed: bootstrap-t, which covers them best (notebook 05); speeds, their inverses, have t.
    """
    found, percentiles = dict[str, Estimate](), dict[str, Estimate]()
    prompts = dict[str, list[Sample]]()
    for row in rows:
        if row.error is None and row.latency_s:
            prompts.setdefault(row.prompt_id, []).append(row)
    for name in ("latency_s", "ttft_s", "tpot_s"):
        known = [[t for row in own if (t := getattr(row, name)) is not None] for own in prompts.values()]
        times = [fmean(own) for own in known if own]
        found[name] = stats.estimate(times, name, method="bootstrap-t")
        for q in (50, 95, 99):
            percentiles[f"{name}/p{q}"] = stats.percentile_estimate(times, q, name)
    for name, amount in AMOUNTS.items():
        speeds = [fmean(amount(row) / (row.latency_s or 1) for row in own) for own in prompts.values()]
        found[f"{name}_per_s"] = stats.estimate(speeds, f"{name}_per_s")
    clipped = {n: dataclasses.replace(e, low=e.low and max(0.0, e.low)) for n, e in found.items()}
    return clipped, percentiles


def flat_metrics(
    report: StatsReport, loaded: load.LoadingReport, samples: Sequence[Sample], money: dict[str, float]
) -> dict[str, float]:
    """Metrics under grouped names: ``quality/…``, ``latency/…``, ``memory/…``, ``cost/…``, ``samples/…``.

    A figure that was not measured or does not apply (the quality of random weights) is absent, never zero.
    """
    found: dict[str, float | None] = {}
    quality = report.quality if loaded.quality_applies else {}
    for group, estimates in (("quality", quality), ("latency", report.latency)):
        for name, e in estimates.items():
            found |= {f"{group}/{name}/{part}": vars(e)[part] for part in ("n", "mean", "sd", "low", "high")}
    for name, e in report.percentiles.items():
        found |= {f"latency/{name}": e.mean, f"latency/{name}_low": e.low, f"latency/{name}_high": e.high}
    good = [sample for sample in samples if sample.error is None]
    found["latency/batch_tokens_per_s"] = generate.throughput(good)
    peak = max((sample.peak_memory_bytes or 0 for sample in samples), default=0)
    sizes = {"parameters": loaded.parameter_bytes, "generation_peak": peak or None}
    sizes |= {name: vars(loaded)[f"{name}_bytes"] for name in MEMORY}
    found |= {f"memory/{name}_mib": size and size / 2**20 for name, size in sizes.items()}
    sums = {name: sum(map(amount, good)) for name, amount in AMOUNTS.items()}
    every, finished = len(samples), len(good)
    found |= {"samples/attempted": every, "samples/finished": finished, "samples/failed": every - finished}
    found["samples/truncated_prompts"] = sum(sample.prompt_truncated for sample in samples)
    found["samples/new_tokens_total"] = sum(sample.new_tokens for sample in samples)
    ratios = {
        "success_rate": (finished, every),
        "ended_by_itself_rate": (sum(sample.finish_reason == "eos" for sample in samples), every),
        "new_tokens_mean": (sums["tokens"], finished),
        "words_mean": (sums["words"], finished),
        "bytes_per_token": (sums["bytes"], sums["tokens"]),
    }
    found |= {f"samples/{name}": part / whole for name, (part, whole) in ratios.items() if whole}
    found |= {f"latency/{name}": vars(loaded)[name] for name in ("fetch_s", "load_s")}
    found |= {f"model/{name}": vars(loaded)[name] for name in ("parameters", "context", "vocabulary")}
    found |= {f"cost/{name}": value for name, value in money.items()}
    return {name: float(value) for name, value in found.items() if value is not None}


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


def spec_of(model: str, info: RunInfo | None = None) -> ModelSpec:
    """What a name of a run means, as run.json says: people read its alias, its files lie in its slug.

    Where that says nothing, a path goes by its last part: no report shows where models lie on this machine.
    """
    known = dict(zip(info.models, info.specs, strict=False)) if info else {}
    is_path = Path(model).is_absolute() or model.startswith((".", "~"))
    return known.get(model) or ModelSpec((Path(model).name if is_path else model) or model, "", "local")


def count_failures(run_dir: Path, info: RunInfo | None) -> dict[str, int]:
    """How often each kind of failure happened to a run's notebooks and samples, the most frequent first."""
    kinds = [status.failure for status in (info.notebooks if info else ()) if status.status == "failed"]
    for path in run_dir.glob("*/samples.jsonl"):
        with suppress(LabError):  # a file that cannot be read is reported by itself
            last = {row.key: row for row in store.read_rows(path, Sample)}
            kinds += [row.failure for row in last.values() if row.error]
    return dict(Counter(str(kind or "other") for kind in kinds).most_common())


def lower_is_better(result: Result) -> set[str]:
    """The scores of which less is better; by their kinds where the task is gone."""
    scales = {kind: known.scale for kind, known in tasks.KINDS.items()}
    with suppress(LabError):
        scales |= {scorer.name: scorer.scale for scorer in tasks.load_task(result.settings.task).scorers}
    scales |= {result.primary: result.scale}
    return {name for name, scale in scales.items() if not scale.higher_is_better}


Rows = list[tuple[Sample, Score]]


def export_samples(run_dir: Path, out: Path) -> Path:
    """A run's samples as lm-evaluation-harness writes them (``SampleResult`` of 0.4.13): a folder a model, a
    line a prompt, its repeats in ``resps``, scores averaged over them. Returns ``out``. LabError without any.
    """
    for result, found in _made(run_dir):
        prompts = dict[str, Rows]()
        for row in found:
            prompts.setdefault(row[0].prompt_id, []).append(row)
        lower = lower_is_better(result)
        higher = {name: name not in lower for _, score in found for name in score.values}
        about = json.dumps({"model_name": result.model, "higher_is_better": {"prompts": higher}})
        store.write_text(out / result.slug / "results_run.json", [about + "\n"])
        lines = (json.dumps(_harness_line(rows)) + "\n" for rows in prompts.values())
        store.write_text(out / result.slug / "samples_prompts_run.jsonl", lines)
    return out


def export_dataset(run_dir: Path, out: Path) -> Path:
    """A run's samples and scores as a dataset of the Hugging Face Hub: JSON lines, and a card whose head
    declares the columns, so that no reader guesses them. Returns ``out``. LabError without any.
    """
    kinds = {"str": "string", "int": "int64", "float": "float64", "FinishReason": "string"}
    columns = {f.name: kinds.get(str(f.type).partition(" ")[0]) for f in dataclasses.fields(Sample)}
    features: list[dict[str, Any]] = [{"name": n, "dtype": kind} for n, kind in columns.items() if kind]
    made, card = list(_made(run_dir)), out / "README.md"
    if card.exists() and "dataset_info" not in card.read_text(encoding="utf-8", errors="replace"):
        raise LabError(f"The file {card} is no card of ours: move it away, or name another folder.")
    pairs = [pair for _, rows in made for pair in rows]
    names = dict.fromkeys(name for _, score in pairs for name in score.values)
    features += [{"name": "target", "list": "string"}]
    features += [{"name": "scores", "struct": [{"name": name, "dtype": "float64"} for name in names]}]
    lines = list[str]()
    for row, score in pairs:
        said = {name: vars(row)[name] for name, kind in columns.items() if kind}
        said |= {"target": score.target or (), "scores": dict.fromkeys(names) | score.values}
        lines.append(json.dumps(said) + "\n")
    files = {"config_name": "default", "data_files": [{"split": "test", "path": "samples.jsonl"}]}
    head = {"pretty_name": run_dir.name, "configs": [files], "dataset_info": {"features": features}}
    store.write_text(out / "samples.jsonl", lines)
    of = ", ".join(f"`{spec_of(result.model).alias}` ({result.revision})" for result, _ in made)
    text = f"# {run_dir.name}\n\n{len(lines)} answers of {of}, each with its scores and what it took.\n"
    text += f"\nVerdicts rest on `{made[0][0].primary}`.\n"
    store.write_text(card, ["---\n", json.dumps(head, indent=1), "\n---\n", text])  # JSON is YAML
    return out


def _made(run_dir: Path) -> Iterator[tuple[Result, Rows]]:
    """Every model of a run with its scored samples. LabError without any."""
    if not (paths := sorted(run_dir.glob("*/result.json"))):
        raise LabError(f"{run_dir} has no result.json: there is nothing to export.")
    for path in paths:
        samples = {row.key: row for row in store.read_rows(path.with_name("samples.jsonl"), Sample)}
        scores = [*store.read_rows(path.with_name("scores.jsonl"), Score)]
        yield store.read_json(path, Result), [(samples[s.key], s) for s in scores if s.key in samples]


def _harness_line(found: Rows) -> dict[str, Any]:
    rows, scored = [row for row, _ in found], [score.values for _, score in found if score.values]
    prompt, texts = rows[0].prompt, [row.text for row in rows]
    means = {name: fmean(sorted(one[name] for one in scored)) for name in (scored[0] if scored else {})}
    doc = {"id": rows[0].prompt_id, "text": prompt, "content_type": rows[0].content_type}
    line: dict[str, Any] = {"doc_id": rows[0].prompt_id, "doc": doc, "target": ""}
    line |= {"arguments": {"gen_args_0": {"arg_0": prompt, "arg_1": {}}}, "resps": [texts]}
    line |= {"filtered_resps": texts, "filter": "none", "metrics": [*means]}
    hashed = (("doc", doc), ("prompt", prompt), ("target", ""))
    return line | {f"{name}_hash": store.row_key(value=value) for name, value in hashed} | means
