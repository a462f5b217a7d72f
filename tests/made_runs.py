"""Hand-made runs with planted truths, for the tests of the comparison and the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nbhelpers import store
from nbhelpers.phases import pipeline_of
from nbhelpers.records import ModelSpec, NotebookStatus, Result, RunInfo, Sample, Score, Settings
from nbhelpers.stats.estimate import estimate

PIPELINE, SERVED = (pipeline_of(ModelSpec("m", "m", kind)) for kind in ("local", "server"))
METRICS = {
    "latency/tokens_per_s/mean": 200.0,
    "latency/tokens_per_s/low": 190.0,
    "latency/tokens_per_s/high": 210.0,
    "latency/words_per_s/mean": 150.0,
    "latency/words_per_s/low": 140.0,
    "latency/words_per_s/high": 160.0,
    "latency/ttft_s/mean": 0.0123,
    "latency/tpot_s/mean": 0.005,
    "memory/parameters_mib": 10.0,
    "cost/usd_per_request": 0.0000171,
    "cost/energy_measured": 0.0,
}


def prompt_ids(count: int = 15) -> list[str]:
    return [f"b{number:02d}" for number in range(1, count + 1)]


def planted(mean: float, seed: int, n: int = 15, noise: float = 0.3) -> list[float]:
    """Scores of one model: prompts are hard or easy for every model alike, plus the model's own noise."""
    difficulty = np.random.default_rng(99).normal(0, 1.5, n)
    own = np.random.default_rng(seed).normal(0, noise, n)
    return [float(x) for x in mean + difficulty - difficulty.mean() + own - own.mean()]


def make_result(model: str, scores: Sequence[float], parameters: int = 1_000_000, **changes: Any) -> Result:
    """A Result whose primary scores are `scores`, one for each of the prompts b01, b02, …"""
    speed = changes.pop("words_per_s", 150.0)
    settings = Settings(model=model, **changes.pop("settings", {}))
    values: dict[str, Any] = {
        "model": model,
        "slug": ModelSpec(model, "", "hub", "").slug,
        "revision": "r1",
        "family": model.split("-")[0],
        "parameters": parameters,
        "device": "cpu",
        "dtype": "float32",
        "attempted": 2 * len(scores),
        "finished": 2 * len(scores),
        "failed": 0,
        "primary": "lab_v2",
        "quality_applies": True,
        "quality": {"lab_v2": estimate(scores, "lab_v2")},
        "metrics": METRICS | {"latency/words_per_s/mean": speed},
        "per_prompt": dict(zip(prompt_ids(len(scores)), scores, strict=True)),
        "settings": settings,
    }
    return Result(**{**values, **changes})


def make_sample(model: str, prompt_id: str, repeat: int, **changes: Any) -> Sample:
    text = changes.pop("text", f"Text {repeat} of {model} for {prompt_id}.")
    values: dict[str, Any] = {
        "key": f"{model}-{prompt_id}-{repeat}",
        "model": model,
        "revision": "r1",
        "prompt_id": prompt_id,
        "content_type": "linkedin_post",
        "repeat": repeat,
        "seed": repeat,
        "prompt": f"Write about {prompt_id}:",
        "text": text,
        "prompt_tokens": 5,
        "new_tokens": 20,
        "bytes": len(text.encode(errors="surrogatepass")),
        "finish_reason": "eos",
        "error": None,
        "batch_size": 4,
        "latency_s": 0.5,
        "ttft_s": 0.01,
        "tpot_s": 0.005,
        "peak_memory_bytes": None,
        "energy_j": None,
    }
    return Sample(**{**values, **changes})


def make_score(sample: Sample, value: float) -> Score:
    return Score(
        sample.key,
        sample.prompt_id,
        sample.repeat,
        sample.content_type,
        failed=sample.error is not None,
        words=len(sample.text.split()),
        values={"lab_v2": value},
    )


def write_model(run_dir: Path, result: Result, samples: Sequence[tuple[Sample, float]] = ()) -> Path:
    """result.json of a model, with samples.jsonl and scores.jsonl when samples are given."""
    folder = run_dir / result.slug
    store.write_json(folder / "result.json", result)
    for sample, value in samples:
        store.append_row(folder / "samples.jsonl", sample)
        store.append_row(folder / "scores.jsonl", make_score(sample, value))
    return folder


def write_info(
    run_dir: Path,
    models: Sequence[str],
    failures: dict[str, str] | None = None,
    started: str = "2026-07-01T10:00:00+00:00",
) -> RunInfo:
    """run.json: every notebook passed, except 02 of the models in `failures` (model "" is the comparison)."""
    failures = failures or {}
    statuses = []
    for model in models:
        failed = model in failures
        for number, name in enumerate(PIPELINE):
            status = "passed" if not failed or number < 1 else "failed" if number == 1 else "skipped"
            error = {"passed": None, "failed": failures.get(model), "skipped": "02_loading failed"}[status]
            statuses.append(NotebookStatus(name, model, status, 1.25, error))  # type: ignore[arg-type]
    last = "failed" if "" in failures else "passed"
    statuses.append(NotebookStatus("07_comparison", "", last, 2.0, failures.get("")))  # type: ignore[arg-type]
    info = RunInfo(
        run=run_dir.name,
        models=tuple(models),
        settings=Settings(model="", repeats=2),
        started=started,
        seconds=61.5,
        versions={"python": "3.11.2", "torch": "2.13.0"},
        machine="Linux x86_64, 2 cores",
        git_commit="0123456789abcdef",
        notebooks=tuple(statuses),
    )
    store.write_json(run_dir / "run.json", info)
    return info
