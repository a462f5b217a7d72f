"""What an exercise cell says before, with a wrong and with a right answer."""

import pytest

from nbhelpers.exercises import check


def test_an_open_exercise_neither_fails_nor_passes(capsys):
    check(..., 3, "count again")
    assert capsys.readouterr().out == "not answered yet\n"


@pytest.mark.parametrize(
    ("answer", "right", "within"),
    [
        (3, 3, 0),
        ("left", "left", 0),
        (1.02, 1.0, 0.05),
        (1300, 1269, 50),
        ([1, 2], lambda given: sum(given) == 3, 0),
    ],
)
def test_a_right_answer_is_said_to_be_right(capsys, answer, right, within):
    check(answer, right, "count again", within)
    assert capsys.readouterr().out == f"right: {answer}\n"


@pytest.mark.parametrize(
    ("answer", "right", "within"),
    [
        (4, 3, 0),
        (1.06, 1.0, 0.05),
        (float("nan"), 1.0, 0.05),
        (2, lambda _: False, 0),
        ("1", 1.0, 1),
        (2, lambda given: len(given) == 2, 0),
        ("2", lambda given: given > 1, 0),
        ([], lambda given: given[0] == 2, 0),
    ],
)
def test_a_wrong_answer_fails_with_the_hint(answer, right, within):
    with pytest.raises(AssertionError, match="count again"):
        check(answer, right, "count again", within)
