"""Tasks: what a file may say, what is asked of a model, and what is refused, with the place."""

import json
import operator
import re
from dataclasses import replace

import pytest

from nbhelpers import registry, tasks
from nbhelpers.loading.tokenization import plain
from nbhelpers.records import LAB_SCALE, LabError, Prompt, RunInfo, Settings

ITEMS = [
    {"id": "a", "text": "2 + 3 =", "target": 5, "tags": ["sum"]},
    {"id": "b", "text": "2 + 4 =", "target": "6", "tags": "sum", "cluster": "two"},
    {"id": "c", "text": "9 - 4 =", "target": ["5", "5.0"], "cluster": "two"},
]


def write(folder, toml: str, items=ITEMS, name: str = "items.jsonl") -> Settings:
    (folder / name).write_text("\n".join(map(json.dumps, items)))
    (folder / "my.toml").write_text(toml)
    return Settings(task=str(folder / "my.toml"))


NUMBER = 'prompts = "items.jsonl"\n[scorers.number]\n'
JUDGE = 'prompts = "items.jsonl"\n[scorers.judge]\nmodel = "m"\nrubric = "Is it true?"\n'


def test_the_posts_are_the_default_and_are_asked_as_ever():
    assert tasks.load_task() is tasks.load_task("posts") is tasks.POSTS
    assert tasks.POSTS.scale == LAB_SCALE
    assert tasks.prompts_of(Settings()) == registry.load_prompts()
    assert tasks.clusters(Settings(limit=2)) == {}


def test_a_small_file_is_a_task(tmp_path):
    settings = write(tmp_path, NUMBER)
    task = tasks.load_task(settings.task)
    assert (task.name, task.primary, task.scale) == (
        "my",
        "number",
        replace(tasks.RIGHT, unit="number"),
    )
    asked = tasks.prompts_of(settings)
    assert [item.target for item in asked] == [("5",), ("6",), ("5", "5.0")]
    assert asked[0] == Prompt("a", "2 + 3 =", target=("5",), tags=("sum",))
    assert tasks.clusters(settings) == {"b": "b", "c": "b"}
    assert [item.id for item in tasks.prompts_of(replace(settings, limit=2))] == ["a", "b"]


def test_a_table_of_a_spreadsheet_gives_the_same_items(tmp_path):
    settings = write(tmp_path, NUMBER.replace("jsonl", "csv"))
    lines = ["\ufeffid,text,target,tags,cluster,mine", "a,2 + 3 =,5,sum,,", 'b,"2 + 4 =",6,sum,two,']
    body = "\n".join((*lines, "c,9 - 4 =,5|5.0,,two,", ""))
    (tmp_path / "items.csv").write_text(body, encoding="utf-8")
    other = tmp_path / "other"
    other.mkdir()
    assert tasks.items(settings) == tasks.items(write(other, NUMBER))
    (tmp_path / "items.csv").write_text(body.replace("sum,,", "sum,,x"), encoding="utf-8")
    with pytest.raises(LabError, match="line 2: the field 'mine' is not known"):
        tasks.items(settings)


def test_a_conversation_ends_with_what_is_asked(tmp_path):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    turns += [{"role": "user", "content": "1 + 1 ="}]
    (item,) = tasks.items(write(tmp_path, NUMBER, [{"id": "m", "messages": turns, "target": 2}]))
    assert (item.text, item.before) == ("1 + 1 =", (("user", "Hi"), ("assistant", "Hello")))
    assert plain(item.text, item.before) == "Hi Hello\n\n1 + 1 ="


def test_examples_are_drawn_by_their_seed_and_are_never_the_item_itself(tmp_path):
    items = [{"id": f"{n:02}", "text": f"{n} + 1 =", "target": n + 1} for n in range(12)]
    toml = 'prompts = "items.jsonl"\nsystem = "Add."\n[examples]\ncount = 3\nseed = {}\n[scorers.number]\n'
    drawn = {}
    for seed in (0, 0, 1):
        asked = tasks.prompts_of(write(tmp_path, toml.format(seed), items))
        for item in asked:
            assert item.before[0] == ("system", "Add.") and len(item.before) == 7
            assert ("user", item.text) not in item.before
            answers = [int(said) for role, said in item.before if role == "assistant"]
            assert answers == [int(said.split()[0]) + 1 for role, said in item.before if role == "user"]
        assert drawn.setdefault(seed, asked) == asked
    assert drawn[0] != drawn[1]
    # Too few are refused, not made up for; what there is is shown as a plain model reads it.
    with pytest.raises(LabError, match="asks for 3 examples, and there are 1 besides the item '00'"):
        tasks.prompts_of(write(tmp_path, toml.format(0), items[:2]))
    shown = tasks.prompts_of(write(tmp_path, toml.format(0).replace("= 3", "= 1"), items[:2]))
    assert plain(shown[0].text, shown[0].before) == "Add.\n\n1 + 1 = 2\n\n0 + 1 ="


def test_a_letter_is_chosen_from_choices_that_the_prompt_lists(tmp_path):
    item = {"id": "q", "text": "Which is a fruit?", "choices": ["stone", "pear"], "target": "pear"}
    toml = 'prompts = "items.jsonl"\n[examples]\ncount = 1\nfile = "shots.jsonl"\n[scorers.letter]\n'
    shot = {"id": "s", "text": "Which is a tool?", "choices": ["hammer", "pear"], "target": "A"}
    settings = write(tmp_path, toml, [item])
    (tmp_path / "shots.jsonl").write_text(json.dumps(shot))
    (asked,) = tasks.prompts_of(settings)
    assert asked.text == "Which is a fruit?\nA. stone\nB. pear\nAnswer:"
    assert asked.before[1] == ("assistant", "A") and tasks.right_choices(asked) == [1]


def test_an_example_of_choices_by_likelihood_shows_the_choice_and_not_its_letter(tmp_path):
    items = [
        {"id": f"{n}", "text": f"Is {n} odd?", "choices": ["no", "yes"], "target": "AB"[n]} for n in (0, 1)
    ]
    toml = 'prompts = "items.jsonl"\n[examples]\ncount = 1\n[scorers.loglikelihood]\n'
    assert tasks.prompts_of(write(tmp_path, toml, items))[0].before[1] == ("assistant", "yes")


def test_ids_may_be_numbers_and_a_file_one_list_and_case_can_tell_texts_apart(tmp_path):
    items = [{"id": 7, "text": "Say us", "target": "1"}, {"id": "8", "text": "Say US", "target": 0.5}]
    settings = write(tmp_path, NUMBER, items)
    (tmp_path / "items.jsonl").write_text(json.dumps(items, indent=1))
    assert [(item.id, item.target) for item in tasks.items(settings)] == [("7", ("1",)), ("8", ("0.5",))]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('id,text,target\na,2,"2\nb,3,3\n', "quotation marks that do not close"),
        ('id,"text,target\na,2,2\n', "line 1: it has .* quotation marks that do not close"),
        ("id,text,target,\na,2,2,lost\n", "line 2: the field '' is not known"),
        ('id,text,target\na,2,"0,5"\n', "line 2: the target '0,5' is no number"),
    ],
)
def test_a_table_that_would_lose_something_is_refused(tmp_path, body, said):
    settings = write(tmp_path, NUMBER.replace("jsonl", "csv"))
    (tmp_path / "items.csv").write_text(body)
    with pytest.raises(LabError, match=said):
        tasks.items(settings)
    (tmp_path / "items.csv").write_text('id, text, target\na, "2, or 3?", 2\n')
    assert [(item.text, item.target) for item in tasks.items(settings)] == [("2, or 3?", ("2",))]


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        ("[scorers.number]\n", "the field 'prompts' is missing"),
        ('prompts = "items.jsonl"\n', "there is no scorer"),
        (
            'prompts = "items.jsonl"\n[scorers.numbr]\n',
            "the scorer 'numbr' is unknown: did you mean 'number'",
        ),
        ('prompt = "items.jsonl"\n[scorers.number]\n', "'prompt' is not known: did you mean 'prompts'"),
        (
            NUMBER + "tolerence = 1\n",
            r"\[scorers.number\]: the field 'tolerence' is not known: .*'tolerance'",
        ),
        (NUMBER + 'tolerance = "1"\n', "tolerance is '1': Input should be a valid number"),
        ("margin = 0\n" + NUMBER, "and the margin above 0"),
        ("margin = true\n" + NUMBER, "margin is True: Input should be a valid number"),
        ("low = -inf\n" + NUMBER, "should be a finite number"),
        ("high = inf\n" + NUMBER, "should be a finite number"),
        (NUMBER + "tolerance = nan\n", "should be a finite number"),
        (NUMBER + "relative = -1\n", "numbers from 0 on"),
        ('primary = "exact"\n' + NUMBER, "the primary score 'exact' has no scorer"),
        ('stop = [""]\n' + NUMBER, "should have at least 1 character"),
        ('prompts = "items.jsonl"\n[scorers.regex]\npattern = "(a"\n', r"'\(a' does not compile"),
        ('prompts = "items.jsonl"\n[scorers.regex]\n', "the field 'pattern' is missing"),
        (
            'prompts = "items.jsonl"\n[examples]\ncount = 0\n[scorers.number]\n',
            "count is 0: Input should be greater than or equal to 1",
        ),
        ("pass_at = -1\n" + NUMBER, "pass_at is -1: Input should be greater than or equal to 0"),
        ("pass_at = true\n" + NUMBER, "Input should be a valid integer"),
        ('prompts = "items.jsonl"\n[scorers.judge]\nmodel = "m"\n', "the field 'rubric' is missing"),
        ('prompts = "items.jsonl"\n[scorers.judge]\nrubric = "Is it true?"\n', "field 'model' is missing"),
        (JUDGE + "scale = [5, 1]\n", r"scale is \[5, 1\]: give two whole numbers, as \[1, 5\]"),
        (JUDGE + "scale = [1, 2.5]\n", "give two whole numbers"),
        (JUDGE + "scale = [1]\n", "give two whole numbers"),
        ("prompts = \n", "cannot be read as TOML .*line 1"),
        ('prompts = "none.jsonl"\n[scorers.number]\n', "none.jsonl cannot be read"),
    ],
)
def test_a_task_that_cannot_be_used_is_refused_with_the_place(tmp_path, toml, said):
    settings = write(tmp_path, toml)
    with pytest.raises(LabError, match=said):
        tasks.prompts_of(settings)


@pytest.mark.parametrize(
    ("scorer", "item", "said"),
    [
        ("exact", {"id": "x", "text": "?"}, "line 2: the field 'target' is missing, which the scorer exact"),
        ("exact", {"id": "x", "text": "?", "tarqet": "a"}, "'tarqet' is not known: did you mean 'target'"),
        ("number", {"id": "x", "text": "?", "target": "many"}, "line 2: the target 'many' is no number"),
        ("letter", {"id": "x", "text": "?", "target": "A"}, "line 2: the field 'choices' is missing"),
        (
            "letter",
            {"id": "x", "text": "?", "target": "C", "choices": ["p", "q"]},
            "'C' is none of the choices",
        ),
        ("letter", {"id": "x", "text": "?", "target": "p", "choices": ["p"]}, "none of the choices"),
        ("letter", {"id": "x", "text": "?", "target": "AB", "choices": ["p", "q"]}, "none of the choices"),
        ("letter", {"id": "x", "text": "?", "target": "A B", "choices": ["p", "q"]}, "none of the choices"),
        (
            "letter",
            {"id": "x", "text": "?", "target": ["p", "C"], "choices": ["p", "q"]},
            "'C' is none of the choices",
        ),
        (
            "exact",
            {"id": "x", "messages": [{"role": "assistant", "content": "a"}], "target": "a"},
            "messages end with the user's",
        ),
        (
            "exact",
            {"id": "x", "text": "?", "messages": [{"role": "user", "content": "a"}], "target": "a"},
            "no other one stands beside them",
        ),
        ("number", {"id": "x", "text": "?", "target": float("nan")}, "no finite number"),
        (
            "exact",
            {"id": "x", "text": "?", "target": "a", "before": ["abc"]},
            "field 'before' is no list",
        ),
        ("exact", {"id": "x", "text": "?", "target": "a", "before": 5}, "field 'before' is no list"),
        ("exact", {"id": "x", "target": "a"}, "line 2: the field 'text' is missing"),
        ("exact", {"id": "x", "messages": "hello", "target": "a"}, "line 2: messages are no list"),
        ("exact", {"id": "first", "text": "?", "target": "a"}, "line 2: the id 'first' was used before"),
    ],
)
def test_an_item_that_a_scorer_cannot_use_is_refused_with_its_line(tmp_path, scorer, item, said):
    first = {"id": "first", "text": "1 + 1 =", "target": "2", "choices": ["2", "3"]}
    settings = write(tmp_path, f'prompts = "items.jsonl"\n[scorers.{scorer}]\n', [first, item])
    with pytest.raises(LabError, match=said):
        tasks.prompts_of(settings)


def test_the_home_of_an_unknown_user_is_a_file_that_is_not_there():
    for read in (tasks.load_task, registry.load_prompts):
        with pytest.raises(LabError, match="~nobody-of-this-name"):
            read("~nobody-of-this-name/x.toml")


def test_a_name_that_is_no_task_is_answered_with_the_nearest():
    with pytest.raises(LabError, match="no task 'arithmetc': did you mean 'arithmetic'"):
        tasks.load_task("arithmetc")


def test_a_run_goes_on_only_with_the_task_that_it_began_with(tmp_path):
    settings = write(tmp_path, NUMBER)
    digest = tasks.load_task(settings.task).digest
    prompts = registry.digests(tasks.prompts_of(settings))
    info = RunInfo("r", (), settings, "", None, {}, "", None, prompts=prompts, task=digest)
    tasks.check_unchanged(info, settings)
    write(tmp_path, NUMBER, [ITEMS[0] | {"target": 7}, *ITEMS[1:]])
    with pytest.raises(LabError, match=r"The prompts of r have changed .*a"):
        tasks.check_unchanged(info, settings)
    write(tmp_path, "margin = 0.2\n" + NUMBER)
    with pytest.raises(LabError, match="The task of r has changed"):
        tasks.check_unchanged(info, settings)


def test_the_shipped_questions_have_the_answers_that_they_say():
    """Every sum is computed here from the question's own words."""
    asked = tasks.prompts_of(Settings(task="arithmetic"))
    assert len(asked) == 60 and set(tasks.shipped()) >= {"arithmetic"}
    signs = {"+": operator.add, "-": operator.sub, "x": operator.mul}
    sums = [re.search(r"What is (\d+) ([-+x]) (\d+)\?", item.text) for item in asked]
    for item, found in zip(asked, sums, strict=True):
        if found:
            assert item.target == (str(signs[found[2]](int(found[1]), int(found[3]))),)
    assert sum(found is not None for found in sums) == 30
    assert all(len(item.before) == 7 and item.text.endswith("Answer:") for item in asked)
