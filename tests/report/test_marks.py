"""The words that decide a score: where they stand, and what a reader sees of them."""

from __future__ import annotations

import pytest

from nbhelpers.report import texts
from nbhelpers.tasks import POSTS, Scorer


def marked(text: str, prompt: str, scorer: Scorer, score: float, targets=()) -> list[tuple[str, str]]:
    item = texts.Item("b01", 0, prompt, "", (), tuple(targets), {})
    found = texts.marked(text, item, scorer, score)
    assert "".join(piece for piece, _ in found) == text  # nothing is lost or moved
    return [(piece, what) for piece, what in found if what]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("It grows. It grows.", [("It grows.", "again")]),
        ("A strategic plan for data.", [("strategic", "topic"), ("data", "topic")]),
        ("We blorfed the plan.", [("blorfed", "unknown")]),
        ("It pays well.\n\nIt pays well.", [("It pays well.", "again")]),
        ("", []),
    ],
)
def test_the_rubric_s_words(text, wanted):
    assert marked(text, "Write a post about data strategy:", POSTS.scorers[0], 5.0) == wanted


def test_an_echo_of_the_prompt_is_struck_out_and_its_words_count_for_nothing():
    prompt = "Write a post about data strategy and people:"
    text = "A post about data strategy and people. Then people matter here."
    assert marked(text, prompt, POSTS.scorers[0], 5.0) == [
        ("A post about data strategy and people.", "again"),
        ("people", "topic"),
    ]


@pytest.mark.parametrize(
    ("kind", "options", "text", "targets", "score", "wanted"),
    [
        ("exact", {"strict": False}, "The Answer.", ["answer"], 1.0, ["The Answer."]),
        ("exact", {"strict": False}, "No, the answer.", ["answer"], 0.0, []),
        ("contains", {"strict": False}, "It is The New,  York!", ["new york"], 1.0, ["New,  York"]),
        ("contains", {"strict": False}, "Ann is in Annex.", ["ann"], 1.0, ["Ann"]),
        ("contains", {"strict": True}, "cat Cat.", ["Cat"], 1.0, ["Cat"]),
        ("contains", {"strict": False}, "grade: A+", ["+"], 1.0, ["+"]),
        ("regex", {"pattern": r"\d+ (\w+)"}, "About 30 days.", [], 1.0, ["30 days"]),
        ("regex", {"pattern": r"(a+)+$"}, "a" * 40 + "!", [], 0.0, []),
        ("f1", {}, "any", ["any"], 1.0, []),
    ],
)
def test_what_an_answer_was_found_right_by(kind, options, text, targets, score, wanted):
    found = marked(text, "", Scorer(kind, kind, options), score, targets)
    assert found == [(piece, "match") for piece in wanted]
