"""Every published claim has a verdict, and every verdict an executed notebook cell that proves it.

The link from data/claims.toml is a comment at the end of an assertion, `assert … == 6.66  # claim-01a`. The
assertion must hold the corrected value, and the cell must have been executed and show what the entry says.
"""

import ast
import contextlib
import copy
import functools
import io
import re
import tokenize
import tomllib
from collections import Counter
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
DATA = tomllib.loads((ROOT / "data" / "claims.toml").read_text(encoding="utf-8"))
PAGE = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")
CELLS = {
    path.stem: [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
}
VERDICTS = ("holds", "wrong", "partly", "outdated", "contradictory", "unverifiable")
FIELDS = {"id", "claim", "where", "verdict", "corrected", "value", "notebook", "shows"}
MARKER = r"claim-\d{2,3}[a-z]?"


@functools.cache
def assertions(source: str) -> dict[str, ast.Assert]:
    """The assertion of each claim id that is named in a comment on it."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string for t in tokens if t.type == tokenize.COMMENT}
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assert):
            lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            for name in re.findall(MARKER, " ".join(comments.get(line, "") for line in lines)):
                found[name] = node
    return found


def literals(node: ast.AST) -> list:
    """Every number and text written out in an expression, with its sign."""
    found = []
    for part in ast.walk(node):
        with contextlib.suppress(ValueError):
            found.append(ast.literal_eval(part))
    return found


def shown(cell) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


def faults(claim: dict, cells: dict) -> list[str]:
    """What is wrong with the evidence of one claim; empty if it stands."""
    found = [
        (cell, checks[claim["id"]])
        for cell in cells.get(claim["notebook"], [])
        if claim["id"] in (checks := assertions(cell.source))
    ]
    if len(found) != 1:
        return [f"{len(found)} cells of {claim['notebook']} assert it"]
    cell, check = found[0]
    problems = []
    if not any(isinstance(part, ast.Name) for part in ast.walk(check.test)):
        problems.append("the assertion looks at nothing")
    missing = [value for value in claim["value"] if value not in literals(check)]
    if missing:
        problems.append(f"the assertion does not hold {missing}")
    if cell.execution_count is None or any(o.output_type == "error" for o in cell.outputs):
        problems.append("the cell was not executed, or failed")
    if claim["shows"] not in shown(cell):
        problems.append(f"the output does not show {claim['shows']!r}")
    return problems


@pytest.mark.parametrize("claim", DATA["claim"], ids=lambda claim: claim["id"])
def test_the_evidence_stands(claim):
    assert faults(claim, CELLS) == []


@pytest.mark.parametrize("claim", DATA["claim"], ids=lambda claim: claim["id"])
def test_the_entry_is_complete(claim):
    assert set(claim) == FIELDS
    assert re.fullmatch(MARKER, claim["id"])
    assert claim["verdict"] in VERDICTS
    assert all(claim[field] for field in FIELDS)
    for place in claim["where"]:
        document, first, last = re.fullmatch(r"(\d{3}):(\d+)(?:-(\d+))?", place).groups()
        assert 1 <= int(first) <= int(last or first) <= DATA["documents"][document]["lines"]


def test_ids_are_unique():
    assert max(Counter(claim["id"] for claim in DATA["claim"]).values()) == 1


def test_every_item_of_the_first_three_sections_is_there():
    numbers = {int(re.findall(r"\d+", claim["id"])[0]) for claim in DATA["claim"]}
    assert set(range(1, 38)) <= numbers


def test_every_marker_in_a_notebook_belongs_to_a_claim_that_names_it():
    home = {claim["id"]: claim["notebook"] for claim in DATA["claim"]}
    for name, cells in CELLS.items():
        for cell in cells:
            for marker in assertions(cell.source):
                assert home.get(marker) == name, f"{marker} in {name}"


def test_the_readme_counts_what_the_data_hold():
    table = dict(re.findall(rf"^\| ({'|'.join(VERDICTS)}) \| (\d+) \|", PAGE, re.M))
    assert {verdict: int(count) for verdict, count in table.items()} == Counter(
        claim["verdict"] for claim in DATA["claim"]
    )
    assert f"{len(DATA['claim'])} claims" in PAGE


# ---- the checker itself: each way of losing the evidence is noticed -------------------------------------

CLAIM = DATA["claim"][0]


def lost(change) -> list[str]:
    """The faults of the first claim after ``change(cell)`` on a copy of its evidence."""
    cells = copy.deepcopy(CELLS)
    (cell,) = [cell for cell in cells[CLAIM["notebook"]] if CLAIM["id"] in assertions(cell.source)]
    change(cell, cells[CLAIM["notebook"]])
    return faults(CLAIM, cells)


def line_of(cell) -> str:
    (line,) = [line for line in cell.source.splitlines() if re.search(rf"# .*{CLAIM['id']}\b", line)]
    return line


def swap(text: str, number_only: bool = False):
    def change(cell, _):
        old = line_of(cell)
        new = old.replace(str(CLAIM["value"][0]), text) if number_only else text
        assert new != old
        cell.source = cell.source.replace(old, new)

    return change


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda cell, cells: cells.remove(cell), "0 cells"),
        (lambda cell, cells: cells.append(cell), "2 cells"),
        (swap(""), "0 cells"),
        (swap(f"# {CLAIM['id']}: {CLAIM['value'][0]}"), "0 cells"),
        (swap(f"print('assert 1  # {CLAIM['id']}')"), "0 cells"),
        (swap(f"assert True  # {CLAIM['id']}"), "looks at nothing"),
        (swap(f"assert 6.66 == 6.66  # {CLAIM['id']}"), "looks at nothing"),
        (swap("6.65", number_only=True), "does not hold [6.66]"),
        (lambda cell, _: cell.update(execution_count=None), "not executed"),
        (lambda cell, _: cell.update(outputs=[]), "does not show"),
        (lambda cell, _: cell.outputs[0].update(text="6.65 ± 0.58"), "does not show"),
        (
            lambda cell, _: cell.outputs.append(nbformat.v4.new_output("error", ename="AssertionError")),
            "or failed",
        ),
    ],
)
def test_lost_evidence_is_noticed(change, fault):
    assert lost(lambda *_: None) == []
    assert any(fault in problem for problem in lost(change)), lost(change)


def test_the_evidence_stops_at_another_figure():
    """The corrected value is computed by the cell, not only written down in it."""
    (source,) = [cell.source for cell in CELLS[CLAIM["notebook"]] if CLAIM["id"] in assertions(cell.source)]
    before = next(c.source for c in CELLS[CLAIM["notebook"]] if c.source.startswith("published = "))
    space: dict = {}
    exec(f"import numpy as np\n{before}\n{source}", space)
    with pytest.raises(AssertionError):
        exec(source.replace("6.66", "6.65"), space)
