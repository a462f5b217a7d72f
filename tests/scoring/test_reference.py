"""Scorers against answers whose worth nobody disputes, and against independent code."""

import random
import re
import time

import pytest

from nbhelpers import tasks
from nbhelpers.records import Prompt
from nbhelpers.scoring import reference

ITEM = Prompt("i", "Which city?", target=("The Hague", "Den Haag"))
LOOSE, STRICT = {"strict": False}, {"strict": True}


@pytest.mark.parametrize(
    ("text", "loose", "strict"),
    [
        ("The Hague", 1, 1),
        (" Den Haag\n", 1, 1),
        ("hague", 1, 0),
        ("the  HAGUE!", 1, 0),
        ("It is The Hague", 0, 0),
        ("", 0, 0),
    ],
)
def test_exact_match_with_the_usual_normalisation_or_without(text, loose, strict):
    assert reference.exact(text, ITEM, LOOSE) == loose
    assert reference.exact(text, ITEM, STRICT) == strict


def test_contains_counts_whole_words():
    cat = Prompt("i", "?", target=("cat",))
    assert reference.contains("A cat, I think.", cat, LOOSE) == 1
    assert reference.contains("A category", cat, LOOSE) == 0
    assert reference.contains("A category", cat, STRICT) == 1
    assert reference.contains("A Cat", cat, STRICT) == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("12", 12),
        ("So it is 1,234.5.", 1234.5),
        ("3 + 4 = 7", 7),
        ("−5", -5),
        ("between 10-12", 12),
        ("$1.50 each", 1.5),
        ("5%", 5),
        ("room B12", None),
        ("none", None),
        ("1e3", 1000),
    ],
)
def test_the_last_number_of_an_answer_is_what_it_says(text, said):
    options = {"tolerance": 0.0, "relative": 0.0}
    for wanted in (said, 99):
        item = Prompt("i", "?", target=(str(wanted),))
        if wanted is not None:
            assert reference.number(text, item, options) == (said is not None and wanted == said)


def test_numbers_are_right_within_their_tolerance():
    item = Prompt("i", "?", target=("200",))
    for said, options, right in [
        ("201", {"tolerance": 1.0, "relative": 0.0}, 1),
        ("202", {"tolerance": 1.0, "relative": 0.0}, 0),
        ("209", {"tolerance": 1.0, "relative": 0.05}, 1),
        ("211", {"tolerance": 1.0, "relative": 0.05}, 0),
    ]:
        assert reference.number(said, item, options) == right


def test_a_pattern_is_found_or_takes_the_answer_out():
    item = Prompt("i", "?", target=("blue",))
    taken = {"pattern": r"colou?r is (\w+)"}
    assert reference.pattern("The color is Blue.", item, taken) == 1
    assert reference.pattern("The colour is red, not blue.", item, taken) == 0
    assert reference.pattern("blue", item, taken) == 0
    assert reference.pattern("It is 2024-05-01.", Prompt("i", "?"), {"pattern": r"\d{4}-\d\d-\d\d"}) == 1


def test_a_pattern_that_runs_away_is_stopped_and_gives_no_score():
    began = time.monotonic()
    with pytest.raises(reference.NoScore, match="longer than 1 s"):
        reference.pattern("a" * 40 + "b", Prompt("i", "?"), {"pattern": "(a|aa)+$"})
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("B", "B"),
        ("(c)", None),
        ("C.", "C"),
        ("The answer is B.", "B"),
        ("A good question; the answer is (D).", "D"),
        ("A good question, so C", "C"),
        ("Answer: A", "A"),
        ("E", None),
        ("I think none", None),
    ],
)
def test_the_letter_that_an_answer_chooses(text, said):
    for letter in "ABCD":
        item = Prompt("i", "?", target=(letter,), choices=("w", "x", "y", "z"))
        assert reference.letter(text, item, {}) == (letter == said)


def squad_exact(text: str, target: str) -> bool:
    """The rules of SQuAD's evaluation script, in its order."""

    def form(s):
        s = "".join(c for c in s.lower() if c not in set("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"))
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", s).split())

    return form(text) == form(target)


def test_exact_match_is_that_of_squad_on_random_answers():
    rng, parts = random.Random(0), ["The", "a", "cat", "Cat!", "an", "dog", "-", "  ", "don't"]
    for _ in range(300):
        text, target = (" ".join(rng.choices(parts, k=rng.randint(1, 3))) for _ in range(2))
        found = reference.exact(text, Prompt("i", "?", target=(target,)), LOOSE)
        assert found == squad_exact(text, target), (text, target)


def test_the_reasoning_of_an_answer_is_not_scored():
    task = tasks.Task("t", (tasks.Scorer("exact", "exact", LOOSE),), "exact", tasks.RIGHT)
    text = "<think>Amsterdam? No.</think>\n\nThe Hague"
    assert reference.score_text(task, ITEM, text) == {"exact": 1.0}
