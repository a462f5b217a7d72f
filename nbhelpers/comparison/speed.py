"""Which model is faster, and how sure are we? Ratios of speeds that were measured in turn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import combinations
from pathlib import Path

from scipy import special

from nbhelpers import store
from nbhelpers.generation.latency import FILE, LatencyPass
from nbhelpers.records import LabError, Result, Sample
from nbhelpers.stats.estimate import by_unit, estimate
from nbhelpers.stats.paired import Comparison, judged, sign_flip_p

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
            folder, own = run_dir / result.slug, dict[tuple[str, int], float]()
            written = dict[str, tuple[int, int]]()  # bytes and tokens
            for row in store.read_rows(folder / "samples.jsonl", Sample):
                if row.error is None and row.bytes:
                    bytes_, tokens = written.get(row.prompt_id, (0, 0))
                    written[row.prompt_id] = bytes_ + row.bytes, tokens + row.new_tokens
            for row in store.read_rows(folder / "latency.jsonl", Sample):
                if row.key in keys and row.latency_s and row.new_tokens and row.prompt_id in written:
                    bytes_, tokens = written[row.prompt_id]
                    speed = row.new_tokens / row.latency_s * bytes_ / tokens
                    own[row.prompt_id, row.repeat] = math.log(speed)
            speeds |= {result.model: own} if own else {}
            clusters |= result.clusters
    return in_pairs(speeds, clusters)


def in_pairs(speeds: Mapping[str, Speeds], clusters: Mapping[str, str]) -> tuple[Comparison, ...]:
    """``Comparison`` of log speeds for every pair, the faster model first; "better" is faster. Pure.

    Differences within a prompt and round lose what the machine did at that time. The unit is the prompt, or
    its cluster. Student's t gives interval and p: sign flips of a few prompts never tell many pairs apart.
    """
    found = list[Comparison]()
    ranked = sorted(speeds, key=lambda model: -sum(speeds[model].values()) / len(speeds[model]))
    for one, other in combinations(ranked, 2):
        ratios = dict[str, list[float]]()
        for cell in sorted(speeds[one].keys() & speeds[other].keys()):
            ratios.setdefault(cell[0], []).append(speeds[one][cell] - speeds[other][cell])
        x = list(by_unit({prompt: sum(own) / len(own) for prompt, own in ratios.items()}, clusters).values())
        e = estimate(x)
        pair = Comparison(one, other, e.n, e.mean, e.low, e.high, margin=MARGIN, reason=e.reason)
        if e.sd and e.mean is not None:
            pair = replace(pair, p=2 * float(special.stdtr(e.n - 1, -abs(e.mean) / e.sd * math.sqrt(e.n))))
        elif e.n > 1:  # all differences are equal
            pair = replace(pair, p=sign_flip_p(x))
        found.append(replace(pair, unit="log ratio"))
    return judged(found)


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
