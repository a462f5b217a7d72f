"""What a hundred thousand rows cost, and quick formulas that equal the slow ones."""

import json
import subprocess
import sys
import time
from dataclasses import asdict, replace
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_runs import make_sample

from nbhelpers import store
from nbhelpers.scoring import rubric, texts

MOST_S, MOST_MB = 60, 800  # for 100,000 rows and their scores, on a busy core
SCRIPT = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from nbhelpers import store
from nbhelpers.devices import machine
from nbhelpers.generation import generate
from nbhelpers.scoring import rubric
from nbhelpers.tracking import metrics
from nbhelpers.records import Sample, Score
folder, count = Path(sys.argv[1]), int(sys.argv[2])
sample = json.loads(sys.argv[3])
score = asdict(Score("k", "p", 0, "short_post", False, 2, dict.fromkeys(rubric.LOWEST, 5.0)))
for name, row in (("samples", sample), ("scores", score)):
    with (folder / f"{name}.jsonl").open("w") as out:
        for i in range(count):
            row |= {"key": f"{i:032d}", "prompt_id": f"p{i // 100}", "repeat": i % 100}
            out.write(json.dumps(row) + "\\n")
samples = list(store.read_rows(folder / "samples.jsonl", Sample))
scores = list(store.read_rows(folder / "scores.jsonl", Score))
failed, quality = metrics.quality_estimates(scores)
generate.throughput(samples)
positions = len(list(rubric.score_samples(samples[:200])))
peak = machine.peak_memory("cpu") / 2**20
print(json.dumps([len(samples), failed, quality["lab_v2"].n, positions, peak]))
"""


def measured(folder, count: int) -> list:
    folder.mkdir()
    row = json.dumps(asdict(make_sample("m", "p", 0)))
    command = [sys.executable, "-c", SCRIPT, str(folder), str(count), row]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_a_hundred_thousand_rows_are_read_and_summed_in_seconds(tmp_path):
    began = time.monotonic()
    *found, peak = measured(tmp_path / "many", 100_000)
    assert time.monotonic() - began < MOST_S
    assert found == [100_000, 0, 1_000, 200]
    assert peak < MOST_MB


WORDS = st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=12).map(" ".join)


@settings(deadline=None, max_examples=50, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from("pq"), WORDS, st.booleans()), max_size=10))
def test_diversity_by_counting_is_diversity_pair_by_pair(rows):
    samples = [
        replace(make_sample("m", prompt, i), text=text, error="broken" if failed else None)
        for i, (prompt, text, failed) in enumerate(sorted(rows))
    ]
    for sample, score in zip(samples, rubric.score_samples(samples), strict=True):
        if "diversity" in score.values:
            own = trigrams(sample.text)
            others = [
                trigrams(s.text)
                for s in samples
                if s.prompt_id == sample.prompt_id and s.error is None and s is not sample
            ]
            lacking = [len(own - other) / len(own) for other in others if own and not sample.error]
            assert score.values["diversity"] == pytest.approx(10 * fmean(lacking) if lacking else 0)


def trigrams(text: str) -> set[tuple[str, ...]]:
    return set(texts.trigrams(texts.words(text)))


def test_notebooks_after_the_third_start_without_torch():
    """All their imports in one process, which is free of heavy libraries only if each of them is."""
    code, names = "import sys\n", []
    for path in sorted((store.project_root() / "notebooks").glob("0[4-7]*.ipynb")):
        cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        heavy = "sorted({'torch', 'transformers', 'mlflow'} & set(sys.modules))"
        code += "".join(cells[0]["source"]) + f"\nprint('imported', {path.stem!r}, {heavy})\n"
        names.append(path.stem)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = [line for line in done.stdout.splitlines() if line.startswith("imported ")]
    assert len(names) >= 5 and found == [f"imported {name} []" for name in names]
