"""A run that is killed and resumed ends as if nobody had disturbed it; `make chaos` does it 50 times."""

import json
from pathlib import Path

import pytest

from nbhelpers.runner import kernels
from tools import chaos


@pytest.mark.skipif(not kernels.FORKS, reason="the targets are found below a fork server")
def test_nothing_is_lost_repeated_or_left_behind(tmp_path: Path) -> None:
    tally = chaos.Chaos(tmp_path, seed=0, models=("lab-gpt2",)).run(3, ("runner KILL", "kernel", "power"))
    assert dict(tally.kills) == {"runner KILL": 1, "kernel": 1, "power": 1}
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
