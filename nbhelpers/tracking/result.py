"""One model's run in numbers: stats.json, and result.json, which every other tool reads."""

from __future__ import annotations

import dataclasses
import itertools
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import fmean

from nbhelpers import store
from nbhelpers.devices import device, meters
from nbhelpers.generation import generate, latency
from nbhelpers.loading import load
from nbhelpers.records import Estimate, ModelRun, Result, Sample, Score, StatsReport
from nbhelpers.scoring import costs, rubric
from nbhelpers.stats import estimate as stats

LATENCY_FIELDS = ("latency_s", "ttft_s", "tpot_s")
# A bootstrap interval holds its promise for the median; in the tail only order statistics do (notebook 05).
PERCENTILES = (50, 95, 99)
MIB = 2**20


def make_stats(run: ModelRun) -> StatsReport:
    """Estimates over prompts of every score and latency, read from their files; writes stats.json."""
    scores = rubric.read_scores(run)
    failed, quality = quality_estimates(scores)
    times, percentiles = latency_estimates(latency.read_latency(run))
    report = StatsReport(
        model=run.settings.model,
        attempted=len(scores),
        finished=len(scores) - failed,
        failed=failed,
        quality=quality,
        latency=times,
        percentiles=percentiles,
    )
    store.write_json(run.folder / "stats.json", report)
    return report


def make_result(run: ModelRun) -> Result:
    """Everything about one model in one record, from its files; writes result.json."""
    loaded = store.read_json(run.folder / "loading.json", load.LoadingReport)
    report = store.read_json(run.folder / "stats.json", StatsReport)
    samples, timed = generate.read_samples(run), latency.read_latency(run)
    metrics = flat_metrics(report, loaded, samples, costs.cost_summary(samples, device.read_report(run)))
    passes = meters.passes(run.folder, (row.key for row in itertools.chain(samples, timed)))
    metrics |= meters.metrics(passes)
    differ, compared = latency.batch_variants(samples, timed)
    if compared:
        metrics["samples/batch_variant_rate"] = differ / compared
    result = Result(
        model=run.settings.model,
        slug=run.spec.slug,
        revision=loaded.revision,
        family=loaded.family,
        parameters=loaded.parameters,
        device=loaded.device,
        dtype=loaded.dtype,
        attempted=report.attempted,
        finished=report.finished,
        failed=report.failed,
        primary=rubric.PRIMARY,
        quality_applies=loaded.quality_applies,
        quality=report.quality,
        metrics=metrics,
        per_prompt=stats.by_prompt(rubric.read_scores(run), rubric.PRIMARY),
        settings=dataclasses.replace(run.settings, run_dir=""),
        noise=meters.verdict(passes),
    )
    store.write_json(run.folder / "result.json", result)
    return result


def quality_estimates(scores: Iterable[Score]) -> tuple[int, dict[str, Estimate]]:
    """How many samples failed, and the estimates of every score over prompts; reads the rows once."""
    failed = 0
    columns: dict[str, dict[str, array[float]]] = {}
    for score in scores:
        failed += score.failed
        for name, value in score.values.items():
            columns.setdefault(name, {}).setdefault(score.prompt_id, array("d")).append(value)
    means = {name: [fmean(sorted(v)) for v in by_id.values()] for name, by_id in columns.items()}
    return failed, {name: stats.estimate(values, name) for name, values in means.items()}


def latency_estimates(rows: Iterable[Sample]) -> tuple[dict[str, Estimate], dict[str, Estimate]]:
    """Times and speeds at batch 1, and the percentiles of the times. Each row is another prompt: the unit.

    Times are skewed: bootstrap-t, which covers them best (notebook 05). Speeds, their inverses, have t:
    of five rows with one unlike the rest, bootstrap-t puts an end far out of reach. No end is below 0.
    """
    good = [row for row in rows if row.error is None]
    times = {f: [t for row in good if (t := getattr(row, f)) is not None] for f in LATENCY_FIELDS}
    found = {name: stats.estimate(values, name, method="bootstrap-t") for name, values in times.items()}
    timed = [(row, row.latency_s) for row in good if row.latency_s]
    for name, speeds in {
        "tokens_per_s": [row.new_tokens / seconds for row, seconds in timed],
        "bytes_per_s": [row.bytes / seconds for row, seconds in timed],
        "words_per_s": [len(row.text.split()) / seconds for row, seconds in timed],
    }.items():
        found[name] = stats.estimate(speeds, name)
    percentiles = {
        f"{name}/p{q}": stats.percentile_estimate(values, q, name)
        for name, values in times.items()
        for q in PERCENTILES
    }
    clipped = {n: dataclasses.replace(e, low=e.low and max(0.0, e.low)) for n, e in found.items()}
    return clipped, percentiles


def flat_metrics(
    report: StatsReport, loaded: load.LoadingReport, samples: Sequence[Sample], money: dict[str, float]
) -> dict[str, float]:
    """Metrics under grouped names: ``quality/…``, ``latency/…``, ``memory/…``, ``cost/…``, ``samples/…``.

    Units are in the names. A figure that could not be measured or does not apply (the quality of random
    weights) is absent, never zero.
    """
    found: dict[str, float | None] = {}
    quality = report.quality if loaded.quality_applies else {}
    for group, estimates in (("quality", quality), ("latency", report.latency)):
        for name, e in estimates.items():
            found |= {
                f"{group}/{name}/{part}": getattr(e, part) for part in ("n", "mean", "sd", "low", "high")
            }
    for name, e in report.percentiles.items():
        found |= {f"latency/{name}": e.mean, f"latency/{name}_low": e.low, f"latency/{name}_high": e.high}
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
    found |= {
        "latency/batch_tokens_per_s": latency.throughput(s for s in samples if s.error is None),
        "latency/fetch_s": loaded.fetch_s,
        "latency/load_s": loaded.load_s,
        "memory/parameters_mib": loaded.parameter_bytes / MIB,
        "memory/rss_before_mib": loaded.rss_before_bytes / MIB,
        "memory/rss_after_load_mib": loaded.rss_after_load_bytes / MIB,
        "memory/rss_after_forward_mib": loaded.rss_after_forward_bytes / MIB,
        "memory/device_peak_mib": _ratio(loaded.device_peak_bytes, MIB),
        "memory/generation_peak_mib": _ratio(total["peak"] or None, MIB),
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
    found |= {f"cost/{name}": value for name, value in money.items()}
    return {name: float(value) for name, value in found.items() if value is not None}


def _ratio(top: float | None, bottom: float) -> float | None:
    return None if top is None or not bottom else top / bottom
