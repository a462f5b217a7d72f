"""The quiz as a learner meets it: the real command with piped answers, and a planted date."""

from __future__ import annotations

import csv
import html
import io
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbhelpers import store
from nbhelpers.comparison import rating_sheet
from nbhelpers.records import LabError
from tools import quiz

QUIZ = [sys.executable, Path(quiz.__file__)]
COST = quiz.select("cost")
DAY = date(2026, 1, 1)


def call(typed: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    command = [*QUIZ, *map(str, arguments)]
    env = {**os.environ, "COLUMNS": "200", **environment}
    return subprocess.run(command, input=typed, capture_output=True, text=True, env=env, timeout=60)


def sit(path: Path, typed: str, *arguments: object, day: date = DAY) -> str:
    done = call(typed, "--topic", "cost", "--progress", path, "--today", day, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def cards(path: Path) -> dict:
    return json.loads(path.read_text())["cards"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "quiz.json"


# ---- a session ------------------------------------------------------------------------------------------


def test_shows_question_answer_follow_up_wrong_answer_and_evidence(path):
    said = " ".join(sit(path, "\n3\n", "--count", 1).split())
    asked = COST[0]
    for text in (asked.question, " ".join(asked.answer.split()), asked.follow_up, asked.wrong):
        assert text in said
    assert f"notebooks/{asked.evidence['notebook']}.ipynb, cell q-{asked.id}" in said
    assert said.index(asked.question) < said.index(asked.follow_up)


def test_what_was_not_known_comes_back_tomorrow_and_what_was_known_stays_away(path):
    sit(path, "\n3\n\n0\n", "--count", 2)
    known, unknown, *rest = COST
    sit(path, "\n3\n", "--count", 1, day=DAY + timedelta(days=1))  # both are due: the first comes first
    said = sit(path, "\n2\n", "--count", 1, day=DAY + timedelta(days=1))
    assert f"[{unknown.id}," in said
    assert cards(path)[known.id]["due"] == "2026-01-08"  # 6 days after the second time
    assert cards(path)[unknown.id] == {"due": "2026-01-03", "interval": 1, "ease": 2.5, "repetitions": 1}
    assert f"[{rest[0].id}," in sit(path, "q\n", day=DAY + timedelta(days=1))  # then a new one


def test_stops_at_q_and_at_the_end_of_the_input_and_keeps_what_was_answered(path):
    assert "1 asked" in sit(path, "\n1\nq\n")
    assert "0 asked" in sit(path, "\nq\n")
    assert "1 asked" in sit(path, "\n1\n")
    assert "0 asked" in sit(path, "")
    assert len(cards(path)) == 2


def test_asks_again_for_a_mark_that_is_none(path):
    assert sit(path, "\n7\n\nwell\n2\n", "--count", 1).count("Type 0, 1, 2, 3 or q.") == 3
    assert len(cards(path)) == 1


def test_says_when_the_next_is_due(path):
    count = len(COST)
    assert "2 more wait today" in sit(path, "\n3\n" * (count - 2) + "q\n")
    assert "next due: 2026-01-02" in sit(path, "\n3\n" * count)
    assert "0 asked; next due: 2026-01-02" in sit(path, "")


def test_keeps_progress_in_the_user_s_folder_by_default(tmp_path):
    home = {name: str(tmp_path) for name in ("HOME", "XDG_CONFIG_HOME", "APPDATA")}
    assert call("\n3\n", "--count", 1, **home).returncode == 0
    (found,) = tmp_path.rglob("quiz.json")
    assert len(cards(found)) == 1


# ---- wrong use ------------------------------------------------------------------------------------------


def sentence(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("quiz: "), done.stderr
    return lines[0]


CARD = {"due": "2026-01-01", "interval": 1, "ease": 2.5, "repetitions": 0}


@pytest.mark.parametrize(
    "body",
    [
        "{",
        "[]",
        "\x00",
        json.dumps({"cards": {}, "schema_version": 99}),
        json.dumps({"cards": {"002-Q5": {**CARD, "due": "soon"}}, "schema_version": 1}),
        json.dumps({"cards": {"002-Q5": {**CARD, "ease": 0.5}}, "schema_version": 1}),
        json.dumps({"cards": {"002-Q5": {**CARD, "interval": 10**12}}, "schema_version": 1}),
        json.dumps({"cards": {"002-Q5": {**CARD, "due": None}}, "schema_version": 1}),
    ],
)
def test_a_broken_progress_file_is_named_and_not_overwritten(tmp_path, monkeypatch, body):
    broken = tmp_path / "quiz.json"
    broken.write_text(body)
    monkeypatch.setattr("builtins.input", lambda _: "3")
    with pytest.raises(LabError, match=r"quiz\.json"):
        quiz.command(progress=broken)
    assert broken.read_text() == body


def test_wrong_use_is_told_in_one_sentence(tmp_path):
    (tmp_path / "file").write_text("{")
    assert "file" in sentence(call("\n3\n", "--progress", tmp_path / "file"))
    assert "choose one of evaluation" in sentence(call("", "--topic", "cooking"))
    assert "cannot be written" in sentence(call("", "--export", tmp_path / "file" / "anki.csv"))
    assert call("", "--level", 4).returncode == 2
    assert call("", "--count", 0).returncode == 2
    assert call("", "--today", "tomorrow").returncode == 2


# ---- spaced repetition ----------------------------------------------------------------------------------


def sm2(grades: list[int]) -> tuple[int, float]:
    """Interval and ease after grades 0 to 5, as the thesis writes it down: a loop over its rules."""
    ease, intervals = 2.5, []
    for grade in grades:
        if grade < 3:
            intervals = []
            continue
        intervals.append([1, 6][len(intervals)] if len(intervals) < 2 else math.ceil(intervals[-1] * ease))
        ease = round(max(1.3, ease + (0.1 - (5 - grade) * (0.08 + (5 - grade) * 0.02))), 2)
    return (intervals or [1])[-1], ease


@given(st.lists(st.sampled_from("0123"), min_size=1, max_size=9))
def test_follows_sm_2(marks):
    card = None
    for mark in marks:
        card = quiz.review(card, mark, DAY)
    interval, ease = sm2([quiz.GRADES[mark] for mark in marks])
    assert card.interval == min(interval, quiz.LONGEST)
    assert card.ease == pytest.approx(ease)
    assert date.fromisoformat(card.due) == DAY + timedelta(days=card.interval)


def test_a_perfect_memory_reaches_years_and_never_the_end_of_the_calendar():
    card, seen = None, []
    for _ in range(60):
        card = quiz.review(card, "3", DAY)
        seen.append(card.interval)
    assert seen[:3] == [1, 6, 17]  # 6 x 2.7, rounded up
    assert seen[-1] == quiz.LONGEST
    store.from_plain(vars(card), quiz.Card, "what was written can be read")


@given(st.dictionaries(st.sampled_from(["001-answer-4", "001-theme-5", "001-theme-8"]), st.integers(-9, 9)))
def test_overdue_comes_first_then_new_and_nothing_early(offsets):
    known = {name: quiz.Card((DAY + timedelta(days=days)).isoformat()) for name, days in offsets.items()}
    order = [q.id for q in quiz.waiting(COST, quiz.Progress(known), DAY)]
    late = sorted((days, name) for name, days in offsets.items() if days <= 0)
    assert [offsets[name] for name in order[: len(late)]] == [days for days, _ in late]
    assert not set(order[len(late) :]) & set(known)
    assert len(order) == len(COST) - len(known) + len(late)


# ---- topics, levels, cards for Anki ---------------------------------------------------------------------


def test_topics_and_levels_split_the_bank():
    every = quiz.select()
    assert len(every) == 73
    assert sum(len(quiz.select(level=level)) for level in (1, 2, 3)) == 73
    assert sum(len(quiz.select(topic)) for topic in {q.topic for q in every}) == 73
    assert [q.level for q in every] == sorted(q.level for q in every)


def read_cards(text: str) -> list[list[str]]:
    *headers, body = text.split("\n", 4)
    assert headers == ["#separator:Comma", "#html:true", "#columns:Front,Back,Tags", "#tags column:3"]
    return list(csv.reader(io.StringIO(body, newline=""), strict=True))


def test_exports_every_card(tmp_path):
    done = call("", "--export", tmp_path / "anki.csv")
    assert done.returncode == 0 and "73 cards" in done.stdout
    rows = read_cards((tmp_path / "anki.csv").read_text(encoding="utf-8"))
    assert [html.unescape(front) for front, _, _ in rows] == [q.question for q in quiz.select()]
    for (_, back, tags), q in zip(rows, quiz.select(), strict=True):
        assert html.unescape(back).split("<br><br>")[0] == " ".join(q.answer.split())
        assert tags.split() == [q.topic, f"level-{q.level}", q.id]


@given(st.text(), st.text())
def test_no_text_of_a_card_becomes_markup_or_a_formula(question, answer):
    hostile = replace(COST[0], question=question, answer=answer)
    ((front, back, _),) = read_cards(quiz.anki([hostile]))
    for cell in (front, back):
        assert not cell.startswith(rating_sheet.FORMULA)
        assert "<" not in cell.replace("<br><br>", "")


@pytest.mark.parametrize("text", ["=1+1", "<script>x</script>", '"a", b', "@SUM(A1)"])
def test_hostile_cards_survive(text):
    ((front, _, _),) = read_cards(quiz.anki([replace(COST[0], question=text)]))
    assert html.unescape(front).removeprefix("'") == text
