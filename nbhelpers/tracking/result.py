"""One model's run, gathered from its files: stats.json, and result.json, which every other tool reads."""

from __future__ import annotations

import dataclasses
import itertools
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import fmean

from nbhelpers import registry, store
from nbhelpers.devices import device as devices
from nbhelpers.devices import meters
from nbhelpers.generation import generate as generation
from nbhelpers.generation import latency as speed
from nbhelpers.loading import load as loading
from nbhelpers.loading.load import LoadingReport
from nbhelpers.records import Estimate, Result, Sample, Score, Settings, StatsReport
from nbhelpers.scoring import costs
from nbhelpers.scoring import rubric as scoring
from nbhelpers.stats.estimate import by_prompt, estimate, percentile_estimate

LATENCY_FIELDS = ("latency_s", "ttft_s", "tpot_s")
# A bootstrap interval holds its promise for the median; in the tail only order statistics do (notebook 05).
PERCENTILES = {50: "bootstrap", 95: "order", 99: "order"}
MIB = 2**20


def stats_for(settings: Settings) -> StatsReport:
    """Estimates over prompts of every score and latency; writes stats.json beside the model's files."""
    scores = scoring.scores_for(settings)
    failed, quality = _quality(scores)
    timed = generation.latency_for(settings)
    report = StatsReport(
        model=settings.model,
        attempted=len(scores),
        finished=len(scores) - failed,
        failed=failed,
        quality=quality,
        latency=_latency(timed),
        percentiles=_percentiles(timed),
    )
    store.write_json(registry.model_dir(settings) / "stats.json", report)
    return report


def _quality(scores: Iterable[Score]) -> tuple[int, dict[str, Estimate]]:
    """How many samples failed, and the estimates of every score over prompts; reads the rows once."""
    failed = 0
    columns: dict[str, dict[str, array[float]]] = {}
    for score in scores:
        failed += score.failed
        for name, value in score.values.items():
            columns.setdefault(name, {}).setdefault(score.prompt_id, array("d")).append(value)
    means = {name: [fmean(sorted(v)) for v in by_id.values()] for name, by_id in columns.items()}
    return failed, {name: estimate(values, name) for name, values in means.items()}


def summarise(settings: Settings) -> Result:
    """Everything about one model in one record; writes result.json, the file other tools read."""
    loaded = loading.report_for(settings)
    device = devices.device_for(settings)
    samples = generation.samples_for(settings)
    report = stats_for(settings)
    scores = store.all_rows(registry.model_dir(settings) / "scores.jsonl", Score)
    money = costs.cost_summary(samples, device)
    rows = itertools.chain(samples, generation.latency_for(settings))
    passes = meters.passes(registry.model_dir(settings), (row.key for row in rows))
    differ, compared = speed.batch_variants(samples, generation.latency_for(settings))
    variants = {"samples/batch_variant_rate": differ / compared} if compared else {}
    result = Result(
        model=settings.model,
        slug=registry.resolve(settings.model).slug,
        revision=loaded.revision,
        family=loaded.family,
        parameters=loaded.parameters,
        device=loaded.device,
        dtype=loaded.dtype,
        attempted=report.attempted,
        finished=report.finished,
        failed=report.failed,
        primary=scoring.PRIMARY,
        quality_applies=loaded.quality_applies,
        quality=report.quality,
        metrics=flat_metrics(report, loaded, samples, money) | meters.metrics(passes) | variants,
        per_prompt=by_prompt(scores, scoring.PRIMARY),
        settings=dataclasses.replace(settings, run_dir=""),
        noise=meters.verdict(passes),
    )
    store.write_json(registry.model_dir(settings) / "result.json", result)
    return result


def flat_metrics(
    report: StatsReport, loaded: LoadingReport, samples: Sequence[Sample], money: dict[str, float]
) -> dict[str, float]:
    """Metrics under grouped names: ``quality/…``, ``latency/…``, ``memory/…``, ``cost/…``, ``samples/…``.

    Units are in the names. A figure that could not be measured or does not apply (the quality of random
    weights) is absent, never zero.
    """
    metrics: dict[str, float] = {}
    quality = report.quality if loaded.quality_applies else {}
    for group, estimates in (("quality", quality), ("latency", report.latency)):
        for name, found in estimates.items():
            _put_estimate(metrics, f"{group}/{name}", found)
    for name, found in report.percentiles.items():
        ends = {"": found.mean, "_low": found.low, "_high": found.high}
        metrics |= {f"latency/{name}{end}": value for end, value in ends.items() if value is not None}
    total = Counter[str]()
    for sample in samples:
        total["peak"] = max(total["peak"], sample.peak_memory_bytes or 0)
        total["eos"] += sample.finish_reason == "eos"
        total["truncated"] += sample.prompt_truncated
        total["tokens"] += sample.new_tokens
        if sample.error is None:
            total["finished tokens"] += sample.new_tokens
            total["bytes"] += sample.bytes
            total["words"] += len(sample.text.split())
    written = {
        "latency/batch_tokens_per_s": speed.throughput(s for s in samples if s.error is None),
        "latency/fetch_s": loaded.fetch_s,
        "latency/load_s": loaded.load_s,
        "memory/parameters_mib": loaded.parameter_bytes / MIB,
        "memory/rss_before_mib": loaded.rss_before_bytes / MIB,
        "memory/rss_after_load_mib": loaded.rss_after_load_bytes / MIB,
        "memory/rss_after_forward_mib": loaded.rss_after_forward_bytes / MIB,
        "memory/device_peak_mib": _ratio(loaded.device_peak_bytes, MIB),
        "memory/generation_peak_mib": total["peak"] / MIB if total["peak"] else None,
        "samples/attempted": len(samples),
        "samples/finished": report.finished,
        "samples/failed": report.failed,
        "samples/success_rate": _ratio(report.finished, len(samples)),
        "samples/ended_by_itself_rate": _ratio(total["eos"], len(samples)),
        "samples/truncated_prompts": total["truncated"],
        "samples/new_tokens_total": total["tokens"],
        "samples/new_tokens_mean": _ratio(total["finished tokens"], report.finished),
        "samples/words_mean": _ratio(total["words"], report.finished),
        "samples/bytes_per_token": _ratio(total["bytes"], total["finished tokens"]),
        "model/parameters": loaded.parameters,
        "model/context": loaded.context,
        "model/vocabulary": loaded.vocabulary,
    }
    metrics.update({name: float(value) for name, value in written.items() if value is not None})
    metrics.update({f"cost/{name}": float(value) for name, value in money.items()})
    return metrics


def _latency(rows: Iterable[Sample]) -> dict[str, Estimate]:
    """Batch-1 latencies; each row is another prompt, so rows are the units of analysis.

    Times are skewed: bootstrap-t, which covers them best (notebook 05). Speeds, their inverses, have t:
    of five rows with one unlike the rest, bootstrap-t puts an end far out of reach. No end is below 0.
    """
    timed = [(row, row.latency_s) for row in rows if row.error is None and row.latency_s]
    speeds = {
        "tokens_per_s": [row.new_tokens / seconds for row, seconds in timed],
        "bytes_per_s": [row.bytes / seconds for row, seconds in timed],
        "words_per_s": [len(row.text.split()) / seconds for row, seconds in timed],
    }
    found = {name: estimate(v, name, method="bootstrap-t") for name, v in _columns(rows).items()}
    found |= {name: estimate(values, name) for name, values in speeds.items()}
    return {
        n: dataclasses.replace(e, low=None if e.low is None else max(0.0, e.low)) for n, e in found.items()
    }


def _percentiles(rows: Iterable[Sample]) -> dict[str, Estimate]:
    """p50, p95 and p99 of each time at batch 1; what the rows do not support says why."""
    return {
        f"{name}/p{q}": percentile_estimate(values, q, name=name, method=method)
        for name, values in _columns(rows).items()
        for q, method in PERCENTILES.items()
    }


def _columns(rows: Iterable[Sample]) -> dict[str, list[float]]:
    """The times of the rows that finished; a row of one token has no time per further token."""
    good = [row for row in rows if row.error is None]
    columns = {name: [getattr(row, name) for row in good] for name in LATENCY_FIELDS}
    return {name: [value for value in values if value is not None] for name, values in columns.items()}


def _put_estimate(metrics: dict[str, float], name: str, estimate: Estimate) -> None:
    for part in ("n", "mean", "sd", "low", "high"):
        value = getattr(estimate, part)
        if value is not None:
            metrics[f"{name}/{part}"] = float(value)


def _ratio(top: float | None, bottom: float) -> float | None:
    return None if top is None or not bottom else top / bottom
