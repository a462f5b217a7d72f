"""A run that is killed and resumed ends as if nobody had disturbed it; `make chaos` does it 50 times.

Here is the moment that can cost most: everything dies at once while answers are written, with the last bytes
cut off. Kernels, runners and servers that die alone: ``tests/runner/test_kernels.py``,
``test_until_decided.py`` beside it, and `make chaos`.
"""

import json
import subprocess
import time
from pathlib import Path

import pytest

from nbhelpers.runner import kernels
from tools import chaos


class WhileItWrites(chaos.Chaos):
    def _wait(self, process: subprocess.Popen[bytes], run_dir: Path) -> bool:
        enough = len(chaos.rows(run_dir)) + 2
        while process.poll() is None:
            if len(chaos.rows(run_dir)) >= enough:
                return True
            time.sleep(0.05)
        return False


@pytest.mark.skipif(not kernels.FORKS, reason="the targets are found below a fork server")
def test_nothing_is_lost_repeated_or_left_behind(tmp_path: Path) -> None:
    tally = WhileItWrites(tmp_path, seed=0, models=("lab-gpt2",)).run(1, ("power",))
    assert dict(tally.kills) == {"power": 1} and tally.rows_at_kills >= 2
    assert tally.harm() == 0, tally
    assert json.loads(tally.line())["kills"] == dict(tally.kills)


def test_the_check_notices_what_it_is_there_for(tmp_path: Path) -> None:
    made = chaos.Chaos.__new__(chaos.Chaos)
    made.tally = chaos.Tally()
    made.reference = {("m/samples.jsonl", "a"): "text", ("m/samples.jsonl", "b"): "more"}
    path = tmp_path / "m" / "samples.jsonl"
    path.parent.mkdir()
    path.write_text('{"key": "a", "text": "other"}\n{"key": "a", "text": "other"}\n{"key": "b", "te')
    made._verify(tmp_path, {})
    assert (made.tally.lost, made.tally.repeated, made.tally.changed) == (1, 2, 1)
