"""How time grows with prompts, repeats, tokens and models, over 16-fold ranges.

    python -m tools.bench_growth [--rounds 3] [--base 8] [--copies 1,4,16] [prompts repeats tokens | models]

Generation and scoring in this process; models by `nbhelpers run --jobs 1` with so many copies of one model
and the least work that shows how a run grows: most of it is what the notebooks cost anyway. Prints, as
JSON, the seconds of every round and the exponent of the fastest (disturbances only slow) with its interval.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from nbhelpers import registry
from nbhelpers.generation import generate
from nbhelpers.loading.load import Loaded, fetch
from nbhelpers.records import Prompt, Settings
from nbhelpers.scoring import rubric
from tools.bench import exponent
from tools.bench_texts import endless

MODEL = "lab-gpt2"
FACTORS = (1, 2, 4, 8, 16)
SMALL = ("--limit", "2", "--repeats", "1", "--max-new-tokens", "8", "--jobs", "1")


def prompts(count: int) -> list[Prompt]:
    """Different texts, so that none shares another's prefill."""
    return [
        replace(one, id=f"g{i:04d}", text=f"{i}. {one.text}")
        for i, one in zip(range(count), itertools.cycle(registry.load_prompts()), strict=False)
    ]


def written(loaded: Loaded, count: int, repeats: int, tokens: int) -> float:
    """Seconds to generate and score; the batch is the same for every size, so that only the work grows."""
    started = time.perf_counter()
    settings = Settings(MODEL, repeats=repeats, max_new_tokens=tokens)
    rows = generate.generate_samples(loaded, prompts(count), settings, batch_size=16)
    list(rubric.score_samples(rows))
    return time.perf_counter() - started


def ran(models: int) -> float:
    """Seconds of a small run over that many copies of the model."""
    with tempfile.TemporaryDirectory() as folder:
        source = fetch(registry.resolve(MODEL))
        copies = [shutil.copytree(source, Path(folder) / f"copy{i:02d}") for i in range(models)]
        out = ["--out", str(Path(folder) / "run")]
        command = [sys.executable, "-m", "nbhelpers.cli", "run", *map(str, copies), *SMALL, *out]
        environment = {**os.environ, "NBHELPERS_OUTPUTS": folder, "HF_HUB_OFFLINE": "1"}
        started = time.perf_counter()
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--base", type=int, default=8, help="prompts of the smallest size; the rest in proportion"
    )
    parser.add_argument("--copies", default="1,4,16", help="numbers of models, at least three")
    parser.add_argument("names", nargs="*", default=["prompts", "repeats", "tokens"])
    given = parser.parse_args()
    base, result = given.base, {}
    loaded = endless(MODEL, "float32", "cpu")
    written(loaded, base, 1, 8)  # warm-up
    sweeps = {
        "prompts": (FACTORS, lambda factor: written(loaded, base * factor, 2, 4 * base)),
        "repeats": (FACTORS, lambda factor: written(loaded, base, 2 * factor, 4 * base)),
        "tokens": (FACTORS, lambda factor: written(loaded, 2 * base, 1, 2 * base * factor)),
        "models": (tuple(map(int, given.copies.split(","))), ran),
    }
    for name in given.names:
        factors, measure = sweeps[name]
        turns = [[measure(f) for f in factors] for _ in range(given.rounds)]
        slope, low, high = exponent(factors, [min(each) for each in zip(*turns, strict=True)])
        result[name] = {"factors": factors, "seconds": turns, "exponent": slope, "low": low, "high": high}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
