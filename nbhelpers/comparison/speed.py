"""Which model is faster, and how sure are we? Ratios of speeds that were measured in turn."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from scipy import stats as sps

from nbhelpers import store
from nbhelpers.generation.latency import FILE, LatencyPass
from nbhelpers.records import LabError, Result, Sample
from nbhelpers.stats.estimate import by_unit, grouped
from nbhelpers.stats.paired import Comparison, Scores, judged, measured

MARGIN = math.log(1.05)  # a smaller ratio of speeds does not matter to us (a choice)
Speeds = Mapping[tuple[str, int], float]  # (prompt, round) -> log of a speed


def compare_speeds(run_dir: Path, results: Sequence[Result]) -> tuple[Comparison, ...]:
    """Every pair of the models that one pass timed in turn; empty where there is no such pass.

    The speed is bytes of text per second, for tokenizers differ: tokens per second of the timed rows, times
    the bytes per token of the model's own answers to that prompt.
    """
    speeds, clusters = dict[str, Speeds](), dict[str, str]()
    with suppress(LabError):  # an older run, or files that the report names elsewhere
        keys = set(store.read_json(run_dir / FILE, LatencyPass).keys)
        for result in results:
            folder = run_dir / result.slug
            done = (s for s in store.read_rows(folder / "samples.jsonl", Sample) if s.bytes and not s.error)
            written = grouped((s.prompt_id, (s.bytes, s.new_tokens)) for s in done)
            log_speeds = dict[tuple[str, int], float]()
            for row in store.read_rows(folder / "latency.jsonl", Sample):
                if row.key in keys and row.latency_s and row.new_tokens and row.prompt_id in written:
                    bytes_, tokens = map(sum, zip(*written[row.prompt_id], strict=True))
                    speed = row.new_tokens / row.latency_s * bytes_ / tokens
                    log_speeds[row.prompt_id, row.repeat] = math.log(speed)
            if log_speeds:
                speeds[result.model] = log_speeds
            clusters |= result.clusters
    return in_pairs(speeds, clusters)


def in_pairs(speeds: Mapping[str, Speeds], clusters: Mapping[str, str]) -> tuple[Comparison, ...]:
    """``Comparison`` of log speeds, the faster model first; "better" is faster. Pure.

    Only what all models have counts, prompt and round: what the machine did at the time then cancels. The
    unit is the prompt or its cluster. Student's t: sign flips of few prompts never tell many pairs apart.
    """
    per_model = dict[str, Scores]()
    shared = sorted(set[tuple[str, int]].intersection(*map(set, speeds.values()))) if speeds else []
    for model, log_speeds in speeds.items():
        rounds = grouped((prompt, log_speeds[prompt, number]) for prompt, number in shared)
        per_model[model] = by_unit({prompt: fmean(values) for prompt, values in rounds.items()}, clusters)
    fastest_first = dict(sorted(per_model.items(), key=lambda item: -sum(item[1].values())))
    pairs = measured(fastest_first, MARGIN, p_of=lambda x: float(sps.ttest_1samp(x, 0).pvalue))
    return judged([replace(pair, unit="log ratio") for pair in pairs], math.comb(len(per_model), 2))


def speed_sentence(pair: Comparison) -> str:
    """One comparison of speeds as a sentence with its figures."""
    if pair.difference is None:
        return f"{pair.a} and {pair.b}: {pair.reason}."
    ratio = f"{math.exp(pair.difference):.2f} times as fast"
    if pair.low is not None and pair.high is not None:
        ratio += f" [{math.exp(pair.low):.2f}, {math.exp(pair.high):.2f}]"
    if pair.verdict == "tied":
        return f"{pair.a} and {pair.b} are equally fast within {math.expm1(pair.margin):.0%}: {ratio}."
    if pair.verdict == "cannot tell":
        return f"{pair.a} and {pair.b}: cannot tell which is faster: {ratio}."
    return f"{pair.a} is {ratio} as {pair.b}."
