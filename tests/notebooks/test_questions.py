"""Every question has a complete entry and, where it is not open, an executed notebook cell as its evidence.

The link from data/questions.toml is a tag of the cell, ``q-`` and the question's id. Of several cells of the
notebook with this tag the last is the evidence: it must have been executed and show something.
"""

from __future__ import annotations

import copy
import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
DATA = tomllib.loads((ROOT / "data" / "questions.toml").read_text(encoding="utf-8"))
QUESTIONS = {question["id"]: question for question in [*DATA["question"], *DATA["added"]]}
CELLS = {
    path.stem: [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
}
# What the documents pose: so many of each kind.
POSED = {
    "000-": 3,
    "001-answer-": 7,
    "001-scenario-": 4,
    "001-theme-": 12,
    "002-Q": 25,
    "002-trap-": 7,
    "002-story-": 4,
    "004-Q": 9,
}
TEXTS = {"question": (5, 45), "answer": (90, 170), "follow_up": (5, 40), "wrong": (3, 45)}  # words
FIELDS = {"id", "where", "topic", "level", *TEXTS}


def tagged(cells: list, name: str) -> list:
    return [cell for cell in cells if f"q-{name}" in cell.metadata.get("tags", [])]


def faults(question: dict, cells: dict[str, list]) -> list[str]:
    """What is wrong with the link of one question; empty if it stands."""
    if "open" in question:
        return []
    link = question["evidence"]
    problems = []
    if link["tag"] != f"q-{question['id']}":
        problems.append(f"the tag {link['tag']} is of another question")
    for notebook in (link["notebook"], *question.get("also", [])):
        found = tagged(cells.get(notebook, []), question["id"])
        if not found:
            problems.append(f"no cell of {notebook} has the tag")
        elif found[-1].execution_count is None or any(o.output_type == "error" for o in found[-1].outputs):
            problems.append("the cell was not executed, or failed")
        elif not found[-1].outputs:
            problems.append("the cell shows nothing")
    return problems


@pytest.mark.parametrize("name", QUESTIONS)
def test_the_evidence_stands(name):
    assert faults(QUESTIONS[name], CELLS) == []


def test_every_question_of_the_documents_is_there_once():
    posed = [f"{kind}{n}" for kind, count in POSED.items() for n in range(1, count + 1)]
    assert [question["id"] for question in DATA["question"]] == posed
    assert len(posed) == 71


def test_questions_of_our_own_are_kept_apart_and_come_from_no_document():
    assert [(q["id"], q["where"]) for q in DATA["added"]] == [
        (f"lab-{n}", []) for n in range(1, len(DATA["added"]) + 1)
    ]


@pytest.mark.parametrize("name", QUESTIONS)
def test_the_entry_is_complete(name):
    question = QUESTIONS[name]
    assert FIELDS <= set(question) <= FIELDS | {"evidence", "also", "open"}
    assert ("evidence" in question) != ("open" in question)
    assert len(question.get("open", "a reason")) > 5
    assert set(question.get("evidence", {"notebook", "tag"})) == {"notebook", "tag"}
    assert question["topic"] in DATA["topics"]
    assert str(question["level"]) in DATA["levels"]
    for field, (least, most) in TEXTS.items():
        assert least <= len(question[field].split()) <= most, field
    for place in question["where"]:
        document, first, last = re.fullmatch(r"(\d{3}):(\d+)(?:-(\d+))?", place).groups()
        assert document == name[:3]
        assert 1 <= int(first) <= int(last or first) <= DATA["documents"][document]["lines"]


@pytest.mark.parametrize("name", [name for name, question in QUESTIONS.items() if "evidence" in question])
def test_decimals_in_an_answer_are_what_its_evidence_prints(name):
    question = QUESTIONS[name]
    printed = [
        out.get("text", "")
        for cell in tagged(CELLS[question["evidence"]["notebook"]], name)
        for out in cell.outputs
    ]
    for figure in re.findall(r"\d+\.\d+", question["answer"]):
        assert figure in " ".join(printed)


def test_topics_and_levels_are_used():
    assert {question["topic"] for question in QUESTIONS.values()} == set(DATA["topics"])
    assert {str(question["level"]) for question in QUESTIONS.values()} == set(DATA["levels"])


def strays(cells: dict[str, list]) -> list[str]:
    """Tags of questions that do not exist, or do not name the notebook as their evidence."""
    found = []
    for notebook, its in cells.items():
        for tag in {tag for cell in its for tag in cell.metadata.get("tags", []) if tag.startswith("q-")}:
            question = QUESTIONS.get(tag.removeprefix("q-"), {})
            places = (question.get("evidence", {}).get("notebook"), *question.get("also", []))
            if notebook not in places:
                found.append(f"{tag} in {notebook}")
    return found


def test_every_tag_belongs_to_a_question_that_names_the_notebook():
    assert strays(CELLS) == []


# ---- the checker itself: each way of losing the evidence is noticed -------------------------------------

QUESTION = QUESTIONS["002-Q5"]
HOME = QUESTION["evidence"]["notebook"]


def evidence_in(cells: dict[str, list]):
    return tagged(cells[HOME], QUESTION["id"])[-1]


def untag_all(cells: dict[str, list]) -> None:
    for cell in tagged(cells[HOME], QUESTION["id"]):
        cell.metadata.tags.remove("q-002-Q5")


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (untag_all, "no cell"),
        (lambda cells: cells.pop(HOME), "no cell"),
        (lambda cells: evidence_in(cells).update(execution_count=None), "not executed"),
        (lambda cells: evidence_in(cells).update(outputs=[]), "shows nothing"),
        (lambda cells: evidence_in(cells).outputs.append(nbformat.v4.new_output("error")), "or failed"),
    ],
)
def test_lost_evidence_is_noticed(change: Callable, fault: str):
    assert faults(QUESTION, CELLS) == []
    cells = copy.deepcopy(CELLS)
    change(cells)
    assert any(fault in problem for problem in faults(QUESTION, cells))


def test_a_wrong_link_is_noticed():
    wrong = {**QUESTION, "evidence": {"notebook": HOME, "tag": "q-002-story-3"}}
    assert faults(wrong, CELLS) == ["the tag q-002-story-3 is of another question"]
    assert faults({**QUESTION, "also": ["05_statistics"]}, CELLS) == ["no cell of 05_statistics has the tag"]


@pytest.mark.parametrize("tag", ["q-002-Q99", "q-000-3", "q-002-Q11"])
def test_a_stray_tag_is_noticed(tag: str):
    cells = copy.deepcopy(CELLS)
    cells[HOME][0].metadata["tags"] = [tag]
    assert f"{tag} in {HOME}" in strays(cells)
