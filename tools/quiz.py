"""The question bank in the terminal: asked, answered, and asked again when it is about to be forgotten.

When a question comes back is decided by SM-2 (Wozniak, Optimization of Learning, 1990), with four marks in
place of its six grades, and without its second round on the same day.
"""

from __future__ import annotations

import csv
import html
import io
import math
import sys
import textwrap
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from nbhelpers import store
from nbhelpers.records import SCHEMA_VERSION, LabError, Record

GRADES = {"0": 0, "1": 3, "2": 4, "3": 5}  # our mark -> quality of SM-2
LONGEST = 36_500  # days; calendars end
MARKS = "How did it go? 0 not known, 1 with effort, 2 after a pause, 3 at once, q to stop: "
HEADERS = "#separator:Comma\n#html:true\n#columns:Front,Back,Tags\n#tags column:3\n"  # for Anki's import


@dataclass(frozen=True)
class Question(Record):
    """An entry of data/questions.toml; its fields are explained in data/README.md."""

    id: str
    where: tuple[str, ...]
    topic: str
    level: int
    question: str
    answer: str
    follow_up: str
    wrong: str
    evidence: dict[str, str] = field(default_factory=dict)  # notebook, tag
    also: tuple[str, ...] = ()
    open: str = ""

    @property
    def back(self) -> list[str]:
        """The paragraphs of the answer's side of the card."""
        link = "notebooks/{notebook}.ipynb, cell {tag}".format(**self.evidence) if self.evidence else ""
        answer, evidence = " ".join(self.answer.split()), link or f"none. {self.open}"
        return [answer, f"Asked next: {self.follow_up}", f"Often said: {self.wrong}", f"Evidence: {evidence}"]


@dataclass(frozen=True)
class Bank(Record):
    topics: tuple[str, ...]
    question: tuple[Question, ...]  # of the documents
    added: tuple[Question, ...] = ()  # our own


@dataclass(frozen=True)
class Card(Record):
    """When one question is asked again."""

    due: str  # ISO date
    interval: int = 1  # days
    ease: float = 2.5
    repetitions: int = 0  # known in a row

    def __post_init__(self) -> None:
        date.fromisoformat(self.due)
        if not (1 <= self.interval <= LONGEST and 1.3 <= self.ease <= 1000 and self.repetitions >= 0):
            raise ValueError("interval, ease or repetitions out of range")


@dataclass(frozen=True)
class Progress(Record):
    """The progress file: question id -> card."""

    cards: dict[str, Card] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION


def select(topic: str = "", level: int | None = None) -> list[Question]:
    """The questions of a topic and a level, easier ones first.

    Raises LabError for an unknown topic and for a broken data/questions.toml.
    """

    def build(data: dict[str, Any]) -> Bank:
        return store.from_plain(
            {key: data[key] for key in ("topics", "question", "added") if key in data}, Bank, "questions"
        )

    bank = store.read_table("questions.toml", build)
    if topic and topic not in bank.topics:
        raise LabError(f"There is no topic {topic!r}: choose one of {', '.join(bank.topics)}.")
    found = [q for q in (*bank.question, *bank.added) if topic in ("", q.topic) and level in (None, q.level)]
    return sorted(found, key=lambda q: q.level)


def review(card: Card | None, mark: str, today: date) -> Card:
    """The card after a mark from "0" to "3"; SM-2 leaves the ease of what was not known."""
    old, grade = card or Card(today.isoformat()), GRADES[mark]
    interval, ease, repetitions = 1, old.ease, 0
    if grade >= 3:
        step = {0: 1, 1: 6}.get(old.repetitions)
        interval = min(step or math.ceil(old.interval * old.ease), LONGEST)
        ease = max(1.3, old.ease + 0.1 - (5 - grade) * (0.08 + (5 - grade) * 0.02))
        repetitions = old.repetitions + 1
    return Card((today + timedelta(days=interval)).isoformat(), interval, round(ease, 2), repetitions)


def waiting(questions: Sequence[Question], progress: Progress, today: date) -> list[Question]:
    """What to ask today: cards that are due, the longest overdue first, then questions never asked."""
    cards = progress.cards
    old = [q for q in questions if q.id in cards and cards[q.id].due <= today.isoformat()]
    return [*sorted(old, key=lambda q: cards[q.id].due), *(q for q in questions if q.id not in cards)]


def anki(questions: Sequence[Question]) -> str:
    """Comma-separated front, back (HTML) and tags, with the file headers that Anki's import reads."""
    from nbhelpers.comparison.rating_sheet import harmless

    out = io.StringIO()
    sheet = csv.writer(out, lineterminator="\n", quoting=csv.QUOTE_ALL)
    for q in questions:
        front, back = html.escape(q.question), "<br><br>".join(map(html.escape, q.back))
        sheet.writerow([harmless(front), harmless(back), f"{q.topic} level-{q.level} {q.id}"])
    return HEADERS + out.getvalue()


def _sit(questions: Sequence[Question], path: Path, count: int, today: date) -> None:
    """Ask up to ``count`` questions; progress is on disk after each."""
    known, asked = store.read_json(path, Progress) if path.exists() else Progress(), 0
    with suppress(EOFError):  # the end of the input stops as "q" does
        for q in waiting(questions, known, today)[:count]:
            print(f"\n[{q.id}, {q.topic}, level {q.level}]\n{textwrap.fill(q.question, 100)}")
            if input("Say your answer, then press Enter (q stops): ").strip().lower() == "q":
                break
            print(*(f"\n{textwrap.fill(line, 100)}" for line in q.back), sep="\n")
            while (mark := input(f"\n{MARKS}").strip().lower()) not in (*GRADES, "q"):
                print("Type 0, 1, 2, 3 or q.")
            if mark == "q":
                break
            known = Progress({**known.cards, q.id: review(known.cards.get(q.id), mark, today)})
            store.write_json(path, known)
            asked += 1
    left = len(waiting(questions, known, today))
    due = min((known.cards[q.id].due for q in questions if q.id in known.cards), default="none")
    print(f"\n{asked} asked; " + (f"{left} more wait today." if left else f"next due: {due}."))


def command(
    topic: Annotated[str, typer.Option(help="Only questions of this topic.")] = "",
    level: Annotated[int | None, typer.Option(min=1, max=3, help="Only this level.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Questions at most.")] = 10,
    progress: Annotated[Path | None, typer.Option(help="File of progress; default: yours.")] = None,
    export: Annotated[Path | None, typer.Option(help="Write cards for Anki here instead.")] = None,
    today: Annotated[datetime | None, typer.Option(formats=["%Y-%m-%d"], help="Another date.")] = None,
) -> None:
    """Ask interview questions, show answers and their evidence, and repeat what was not known."""
    questions = select(topic, level)
    path = export or progress or Path(typer.get_app_dir("nbhelpers"), "quiz.json")
    try:
        if export:
            store.write_text(path, [anki(questions)])
            print(f"{len(questions)} cards written to {path}")
        else:
            _sit(questions, path, count, (today or datetime.now()).date())
    except OSError as error:
        raise LabError(
            f"The file {path} cannot be written ({error.strerror}): choose another path."
        ) from None


def main() -> None:
    """A LabError becomes one sentence and exit code 2, as in ``nbhelpers``."""
    try:
        typer.run(command)
    except LabError as error:
        print(f"quiz: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
