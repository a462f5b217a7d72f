"""Committed notebooks were executed on a quiet machine: timings are of the models, not of neighbours."""

import json
import re
from pathlib import Path

import pytest

from nbhelpers.devices.meters import MOST_LOAD

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("[0-9]*.ipynb"))


def outputs(path: Path) -> str:
    """Everything that a notebook shows as text, tables and marked-up text included."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    found = [output for cell in cells for output in cell.get("outputs", ())]
    texts = [part for o in found for kind, part in o.get("data", {}).items() if kind.startswith("text/")]
    return "\n".join("".join(part) for part in [*(o.get("text", ()) for o in found), *texts])


def noise(text: str) -> list[str]:
    """What ``meters.verdict`` says of noisy passes, and loads by others above the limit that it draws."""
    loads = re.findall(r"other_load\W+(\d*\.\d+)", text)
    return re.findall(r"\bnoisy: .*", text) + [load for load in loads if float(load) > MOST_LOAD]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_output_was_measured_on_a_noisy_machine(path):
    assert noise(outputs(path)) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("meanwhile: noisy: 90% load by other processes", 1),
        ("noise/other_load = 0.8958", 1),
        ("noise/other_load = 0.0312, quiet", 0),
        ("gradients are noisier", 0),
    ],
)
def test_noise_is_found(text, found):
    assert len(noise(text)) == found
