"""One model in numbers: stats.json, and the flat metrics of result.json and MLflow by their names."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from types import MappingProxyType
from typing import Any

from nbhelpers import store, tasks
from nbhelpers.generation import generate
from nbhelpers.loading import load
from nbhelpers.records import LAB_SCALE, SCHEMA_VERSION, Estimate, Lenient, ModelRun, Sample, Scale, Score
from nbhelpers.scoring import rubric
from nbhelpers.stats import estimate

FOREIGN = "samples/not_applicable"  # texts without a score, because a rubric reads English
MEMORY = ("rss_before", "rss_after_load", "rss_after_forward", "device_peak")  # of loading.json
AMOUNTS: dict[str, Callable[[Sample], int]] = {  # what a sample counts for
    "tokens": lambda row: row.new_tokens,
    "bytes": lambda row: row.bytes,
    "words": lambda row: len(row.text.split()),
}


@dataclass(frozen=True)
class StatsReport(Lenient):
    """stats.json of one model: estimates over prompts, one for each score and each latency."""

    model: str
    attempted: int
    finished: int
    failed: int
    quality: dict[str, Estimate]
    latency: dict[str, Estimate]  # "ttft_s/p50" is the median: seconds, in ``mean``
    schema_version: int = SCHEMA_VERSION


def make_stats(run: ModelRun) -> StatsReport:
    """Estimates over prompts of every score and latency, from their files; writes stats.json."""
    scores, task = rubric.read_scores(run), tasks.load_task(run.settings.task)
    failed, quality = quality_estimates(scores, task.scale, tasks.clusters(run.settings))
    times = latency_estimates(generate.read_samples(run, "latency"))
    report = StatsReport(run.settings.model, len(scores), len(scores) - failed, failed, quality, times)
    store.write_json(run.folder / "stats.json", report)
    return report


def quality_estimates(
    scores: Sequence[Score], scale: Scale = LAB_SCALE, clusters: Mapping[str, str] = MappingProxyType({})
) -> tuple[int, dict[str, Estimate]]:
    """How many samples failed, and the estimates of every score over prompts, or over their clusters."""
    quality = dict[str, Estimate]()
    for name in dict.fromkeys(name for score in scores for name in score.values):
        means = estimate.by_unit(estimate.by_prompt(scores, name), clusters).values()
        quality[name] = estimate.mean_score(means, name, scale)
    return sum(score.failed for score in scores), quality


def latency_estimates(rows: Iterable[Sample]) -> dict[str, Estimate]:
    """Times at batch 1, their medians, and speeds, over prompts: the mean of their rounds.

    Times are skewed: bootstrap-t, which covers them best (notebook 05); speeds, their inverses, have t.
    """
    finished = (row for row in rows if row.error is None and row.latency_s)
    by_prompt, estimates = estimate.grouped((row.prompt_id, row) for row in finished), dict[str, Estimate]()
    for name in ("latency_s", "ttft_s", "tpot_s"):
        rounds = ([getattr(row, name) for row in timed] for timed in by_prompt.values())
        measured = ([t for t in times if t is not None] for times in rounds)
        means = [fmean(times) for times in measured if times]
        estimates[name] = estimate.estimate(means, name, method="bootstrap-t")
        estimates[f"{name}/p50"] = estimate.median_estimate(means, f"{name}/p50")
    for name, amount in AMOUNTS.items():
        speeds = [fmean(amount(row) / (row.latency_s or 1) for row in timed) for timed in by_prompt.values()]
        estimates[f"{name}_per_s"] = estimate.estimate(speeds, f"{name}_per_s")
    return {name: replace(e, low=e.low and max(0.0, e.low)) for name, e in estimates.items()}


def flat_metrics(
    report: StatsReport, loaded: load.LoadingReport, samples: Sequence[Sample], money: dict[str, float]
) -> dict[str, float]:
    """Metrics under grouped names: ``quality/…``, ``latency/…``, ``memory/…``, ``cost/…``, ``samples/…``.

    A figure that was not measured or does not apply (the quality of random weights) is absent, never zero.
    """
    finished = [sample for sample in samples if sample.error is None]
    totals = {name: sum(map(amount, finished)) for name, amount in AMOUNTS.items()}
    sizes = {"parameters": loaded.parameter_bytes} | {name: vars(loaded)[f"{name}_bytes"] for name in MEMORY}
    sizes["generation_peak"] = max((sample.peak_memory_bytes or 0 for sample in samples), default=0) or None
    counts = {"attempted": len(samples), "finished": len(finished), "failed": len(samples) - len(finished)}
    counts["truncated_prompts"] = sum(sample.prompt_truncated for sample in samples)
    counts["new_tokens_total"] = sum(sample.new_tokens for sample in samples)
    ratios = {  # numerator, denominator
        "success_rate": (len(finished), len(samples)),
        "ended_by_itself_rate": (sum(sample.finish_reason == "eos" for sample in samples), len(samples)),
        "new_tokens_mean": (totals["tokens"], len(finished)),
        "words_mean": (totals["words"], len(finished)),
        "bytes_per_token": (totals["bytes"], totals["tokens"]),
    }
    groups: dict[str, dict[str, Any]] = {
        "quality": _fields(report.quality if loaded.quality_applies else {}),
        "latency": _fields(report.latency) | {name: vars(loaded)[name] for name in ("fetch_s", "load_s")},
        "memory": {f"{name}_mib": size and size / 2**20 for name, size in sizes.items()},
        "samples": counts | {name: above / below for name, (above, below) in ratios.items() if below},
        "model": {name: vars(loaded)[name] for name in ("parameters", "context", "vocabulary")},
        "cost": money,
    }
    groups["latency"]["batch_tokens_per_s"] = generate.throughput(finished)
    flat = {f"{group}/{name}": value for group, values in groups.items() for name, value in values.items()}
    return {name: float(value) for name, value in flat.items() if value is not None}


def _fields(estimates: Mapping[str, Estimate]) -> dict[str, Any]:
    fields = ("n", "mean", "sd", "low", "high")
    return {f"{name}/{field}": vars(e)[field] for name, e in estimates.items() for field in fields}
