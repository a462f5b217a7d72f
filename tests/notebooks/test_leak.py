"""The leak test of notebook 02: against planted leaks, and its slope against every pair."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from statistics import median

import numpy as np
import pytest
from definitions import definitions
from hypothesis import given
from hypothesis import strategies as st

NOTEBOOK = definitions("02_loading", "definitions")
PLANTED = 102_400
LEAKS = f"""
import json, sys
sys.path.insert(0, "tests")
from definitions import definitions
from tiny_models import tiny
from nbhelpers.generation import generate
from nbhelpers.records import Prompt, Settings
notebook = definitions("02_loading", "definitions")
loaded, kept = tiny(), []
prompt, few = Prompt("p", "Tell me of ships:", "short_post"), Settings(repeats=1, max_new_tokens=4)
def clean():
    generate.generate_samples(loaded, [prompt], few)
def leaky():
    clean()
    kept.append(bytearray(b"x" * {PLANTED}))
print(json.dumps([notebook.leak(notebook.held_after_each(call, "cpu")) for call in (clean, leaky)]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counters of Linux")
def test_a_planted_leak_is_found_and_a_clean_model_is_not_accused() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LEAKS], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr
    clean, leaky = json.loads(done.stdout.splitlines()[-1])
    slope, low, high, verdict = leaky
    assert clean[3] != "leaks" and clean[0] < NOTEBOOK.PAGE
    assert verdict == "leaks" and slope == pytest.approx(PLANTED, rel=0.05)
    assert low > 0.9 * PLANTED and high < 1.1 * PLANTED


@given(st.lists(st.integers(0, 10**9), min_size=10, max_size=20))
def test_the_slope_is_the_median_of_all_pairs_of_a_half(readings: list[int]) -> None:
    slope, low, high, _ = NOTEBOOK.leak(readings)
    middle = len(readings) // 2
    halves = [
        median((b - a) / (j - i) for (i, a), (j, b) in combinations(enumerate(half), 2))
        for half in (readings[:middle], readings[middle:])
    ]
    assert any(slope == pytest.approx(half) for half in halves) and low <= slope <= high


def test_the_interval_covers_a_planted_slope() -> None:
    noise = np.random.default_rng(0).normal(0, 50_000, (300, 50))
    found = [NOTEBOOK.leak([int(5000 * i + e) for i, e in enumerate(row)]) for row in noise]
    assert 0.92 <= np.mean([low <= 5000 <= high for _, low, high, _ in found]) <= 0.98


def test_a_verdict_needs_the_whole_interval_on_one_side_of_the_floor() -> None:
    base = [1_000_000 + (4096 if i % 3 else 0) for i in range(50)]
    assert NOTEBOOK.leak(base)[3] == "no leak found"
    assert NOTEBOOK.leak([b + 100_000 * i for i, b in enumerate(base)])[3] == "leaks"
    for place in range(1, 50):  # one growth is no leak, wherever it lies
        jump = [b + (8_000_000 if i >= place else 0) for i, b in enumerate(base)]
        assert NOTEBOOK.leak(jump)[3] == "no leak found", place
