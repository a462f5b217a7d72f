"""Scorers against answers whose worth nobody disputes, and against independent code."""

import importlib.util
import json
import random
import re
from dataclasses import replace
from itertools import combinations, product

import jsonschema
import pytest
from made_runs import make_sample

from nbhelpers import tasks
from nbhelpers.errors import NoScore
from nbhelpers.records import LabError, Prompt, Settings
from nbhelpers.scoring import reference, texts
from nbhelpers.stats.estimate import by_prompt, estimate, mean_score, pass_at
from nbhelpers.tracking import metrics

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


@pytest.mark.parametrize(
    ("text", "target", "right"),
    [
        ("5", "-5", 0),
        ("−5", "-5", 1),
        ("(-5).", "-5", 1),
        ("15", "1.5", 0),
        ("12", "1/2", 0),
        ("123", "1,2,3", 0),
        ("1,234", "1234", 1),
        ("...5", "5", 1),
        ("COVID-19", "covid19", 1),
        ("café", "café", 1),
        ("“STRASSE”", "Straße", 1),
        ("don’t", "don't", 1),
    ],
)
def test_a_number_keeps_its_sign_and_a_letter_is_one_however_it_is_encoded(text, target, right):
    item = Prompt("i", "?", target=(target,))
    assert reference.exact(text, item, LOOSE) == reference.contains(f"so {text}", item, LOOSE) == right
    assert reference.f1(text, item, LOOSE) == right


def test_strict_scores_know_one_text_in_two_encodings():
    item = Prompt("i", "?", target=("café",))
    assert reference.exact("café", item, STRICT) == reference.contains("a café", item, STRICT) == 1


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
        ("a loss of -$5", -5),
        ("5%", 5),
        ("room B12", None),
        ("none", None),
        ("1e3", 1000),
        (".5", 0.5),
        ("-.5", -0.5),
        ("...5", 5),
        ("1,2,3", 3),
        ("1.2.3", 1.2),
    ],
)
def test_the_last_number_of_an_answer_is_what_it_says(text, said):
    options = {"tolerance": 0.0, "relative": 0.0}
    for wanted in (said, 99):
        item = Prompt("i", "?", target=(str(wanted),))
        if wanted is not None:
            assert reference.number(text, item, options) == (said is not None and wanted == said)


@pytest.mark.parametrize(
    ("text", "target", "tolerance", "right"),
    [
        ("12345678901234567891", "12345678901234567890", 0.0, 0),  # one number to a float
        ("12345678901234567890", "12345678901234567890", 0.0, 1),
        ("2e-12", "1e-12", 0.0, 0),
        ("0.30000000000000004", "0.3", 0.0, 1),
        ("0.3", "1", 0.7, 1),
        ("1e999999999999", "5", 0.0, 0),
        ("1e99999999999999999999", "5", 0.0, 0),
        ("9" * 5000, "5", 0.0, 0),
        ("1" + "0" * 400, "1" + "0" * 400, 0.0, 1),
    ],
)
def test_a_number_of_any_size_is_compared_exactly(text, target, tolerance, right):
    item = Prompt("i", "?", target=(target,))
    assert reference.number(text, item, {"tolerance": tolerance, "relative": 0.0}) == right


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


@pytest.fixture
def impatient(monkeypatch):
    """Patterns that take a moment too long: not stopped, those of these tests take years."""
    monkeypatch.setattr(texts, "PATTERN_S", 0.1)


def test_a_pattern_that_runs_away_is_stopped_and_gives_no_score(impatient):
    with pytest.raises(reference.NoScore, match=r"longer than 0\.1 s"):
        reference.pattern("a" * 100 + "b", Prompt("i", "?"), {"pattern": "(a|aa)+$"})


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
        ("Option A is wrong. The answer is C.", "C"),
    ],
)
def test_the_letter_that_an_answer_chooses(text, said):
    for letter in "ABCD":
        item = Prompt("i", "?", target=(letter,), choices=("w", "x", "y", "z"))
        assert reference.letter(text, item, {}) == (letter == said)


def test_of_several_right_choices_each_is_right():
    item = Prompt("i", "?", target=("y", "D"), choices=("w", "y", "x", "z", "y"))
    assert [reference.letter(letter, item, {}) for letter in "ABCDE"] == [0, 1, 0, 1, 1]
    likely = tasks.Scorer("loglikelihood", "loglikelihood", {})
    for best, right in enumerate((0, 1, 0, 1, 1)):
        sums = tuple(float(n == best) for n in range(5))
        found = reference.likely(likely, item, "", {"choices": sums})
        assert found["loglikelihood"] == found["loglikelihood/per_byte"] == right
        assert reference.likely(likely, item, item.choices[best], None)["loglikelihood"] == right


def test_words_in_common_with_the_target_are_f1():
    item = Prompt("i", "?", target=("the quick fox", "slow"))
    assert reference.f1("A quick fox!", item, {}) == 1
    assert reference.f1("quick brown", item, {}) == 0.5  # one word of two and of two
    assert reference.f1("dog", item, {}) == reference.f1("", item, {}) == 0


def test_chrf_and_rouge_are_their_libraries_or_are_refused_with_what_to_install():
    item = Prompt("i", "?", target=("the quick brown fox", "a dog"))
    for kind, name in reference.SCORER_LIBRARIES.items():
        task = tasks.Task("t", (tasks.Scorer(kind, kind, {}),), kind, tasks.RIGHT)
        if importlib.util.find_spec(name.partition(".")[0]) is None:
            with pytest.raises(LabError, match=r"is not installed: pip install .*\.\[text\]"):
                reference.check_scorers(task)
            continue
        reference.check_scorers(task)
        same, near, far = (reference.SCORERS[kind](t, item, {}) for t in ("a dog", "the quick fox", "zzz"))
        assert same == pytest.approx(1) and 0.4 < near < 1 and far == 0
    if importlib.util.find_spec("rouge_score"):  # 3 of 3 and of 4 words in order: 2 * 3 / 7
        assert reference.rouge("the quick fox", item, {}) == pytest.approx(6 / 7)


def test_json_is_right_where_its_schema_accepts_it(tmp_path):
    schema = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}
    (tmp_path / "s.json").write_text(json.dumps(schema))
    options, item = {"folder": tmp_path, "schema": "s.json"}, Prompt("i", "?")
    answers = {
        '{"n": 1}': 1,
        '{"n": "1"}': 0,
        "{}": 0,
        "n = 1": 0,
        '{"n": 1, "m": NaN}': 0,
        '```json\n{"n": 2}\n```': 1,
    }
    assert {text: reference.json_schema(text, item, options) for text in answers} == answers
    for body in ('{"type": "none"}', "{", "5", '{"$schema": 5}', None):
        bad = tmp_path / f"{len(body or '')}.json"
        if body is not None:
            bad.write_text(body)
        with pytest.raises(LabError, match=r"The schema \d+\.json cannot be used"):
            reference.validator(bad)


def test_a_target_of_which_the_rules_leave_nothing_is_not_met_by_an_empty_answer():
    for target, right in (("A", "a."), ("+", " +"), ("The", "the")):
        item = Prompt("i", "?", target=(target,))
        for scorer in (reference.exact, reference.contains, reference.f1):
            assert scorer(right, item, LOOSE) == 1, (scorer, target)
            assert [scorer(text, item, LOOSE) for text in ("", "-", "an")] == [0, 0, 0], (scorer, target)
    assert reference.contains("1 + 1", Prompt("i", "?", target=("+",)), LOOSE) == 1


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "^(a|a)*$"},
        {"type": "object", "patternProperties": {"^(a|a)*$": True}},
        {"properties": {"t": {"not": {"pattern": "^(a|a)*$"}}}},
        {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "properties": {"t": {"pattern": "^(a|a)*$"}, "own": {"$ref": "#"}},
        },
    ],
)
def test_a_pattern_of_a_schema_that_runs_away_gives_no_score(tmp_path, schema, impatient):
    (tmp_path / "s.json").write_text(json.dumps(schema))
    options, long = {"folder": tmp_path, "schema": "s.json"}, "a" * 100 + "!"
    value = long if schema.get("type") == "string" else {long: 1, "t": long}
    value = {"own": {"t": long}} if "$schema" in schema else value
    with pytest.raises(NoScore, match=r"the pattern took longer than 0\.1 s"):
        reference.json_schema(json.dumps(value), Prompt("i", "?"), options)


def test_patterns_of_a_schema_are_those_of_jsonschema(tmp_path):
    schema = {"type": "object", "patternProperties": {"^n": {"type": "integer"}, "t$": {"pattern": "^x\\d"}}}
    (tmp_path / "s.json").write_text(json.dumps(schema | {"additionalProperties": False}))
    options = {"folder": tmp_path, "schema": "s.json"}
    known = jsonschema.Draft202012Validator(schema | {"additionalProperties": False})
    values = [
        {"n": 1},
        {"n": "1"},
        {"at": "x1"},
        {"at": "y1"},
        {"nt": 1},
        {"nt": "x1"},
        {"other": 1},
        {},
        [1],
    ]
    found = [reference.json_schema(json.dumps(value), Prompt("i", "?"), options) for value in values]
    assert found == [float(known.is_valid(value)) for value in values] and 0 < sum(found) < len(values)
    (tmp_path / "bad.json").write_text('{"pattern": "("}')
    with pytest.raises(LabError, match=r"The schema bad.json cannot be used"):
        reference.validator(tmp_path / "bad.json")


def test_functions_of_one_name_are_each_their_tasks(tmp_path):
    for name, value in (("one", 1.0), ("two", 2.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "same_name.py").write_text(f"def score(answer, item):\n    return {value}\n")
        given = {"folder": tmp_path / name, "function": "same_name.score"}
        assert reference.own("?", Prompt("i", "?"), given) == value


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"$ref": "other.json"}, "other.json"),
        (
            {"$schema": "http://json-schema.org/draft-07/schema#", "items": {"$ref": "other.json#/n"}},
            "other.json#/n",
        ),
        ({"$ref": "http://127.0.0.1:9/none.json"}, "http://127.0.0.1:9/none.json"),
        ({"properties": {"n": {"anyOf": [{"$ref": "#/$defs/m"}]}}, "$defs": {"n": {}}}, "#/$defs/m"),
        ({"$ref": "#n"}, "#n"),
    ],
)
def test_a_schema_that_refers_to_what_is_not_in_it_is_refused_with_the_task(tmp_path, schema, named):
    (tmp_path / "other.json").write_text('{"n": {}}')
    (tmp_path / "s.json").write_text(json.dumps(schema))
    (tmp_path / "task.toml").write_text('prompts = "items.jsonl"\n[scorers.json]\nschema = "s.json"\n')
    said = f"The schema s.json refers to {named!r}, which is not in it: other files are not read."
    with pytest.raises(LabError, match=re.escape(said)):
        reference.check_scorers(tasks.load_task(str(tmp_path / "task.toml")))


def test_references_within_a_schema_are_followed_and_words_like_them_are_none(tmp_path):
    whole = {"type": "integer", "$anchor": "whole"}
    for n, schema in enumerate(
        (
            {"properties": {"n": {"$ref": "#/$defs/n"}}, "$defs": {"n": whole}},
            {"properties": {"n": {"$ref": "#whole"}}, "$defs": {"n": whole}},
            {
                "properties": {"n": {"$ref": "n.json"}},
                "$id": "http://x/s.json",
                "$defs": {"n": {"$id": "n.json"} | whole},
            },
            {"properties": {"n": whole, "$ref": {"const": {"$ref": "none.json"}}}},
        )
    ):
        (tmp_path / f"{n}.json").write_text(json.dumps(schema))
        options = {"folder": tmp_path, "schema": f"{n}.json"}
        found = [
            reference.json_schema(text, Prompt("i", "?"), options) for text in ('{"n": 1}', '{"n": "1"}')
        ]
        assert found == [1, 0], schema


def test_a_schema_that_leads_round_gives_no_score(tmp_path):
    (tmp_path / "s.json").write_text('{"$ref": "#"}')
    with pytest.raises(reference.NoScore, match=r"s\.json cannot be applied"):
        reference.json_schema("{}", Prompt("i", "?"), {"folder": tmp_path, "schema": "s.json"})


def test_a_function_of_the_users_that_fails_costs_its_own_score_alone(tmp_path):
    code = "def fails(text, item):\n    return {}[text]\ndef far(text, item):\n    return 10**400\n"
    (tmp_path / "fails_for_tests.py").write_text(code)
    for name, said in (("fails", "raised KeyError: 'x'"), ("far", "which is no number")):
        options = {"folder": tmp_path, "function": f"fails_for_tests.{name}"}
        with pytest.raises(reference.NoScore, match=said):
            reference.own("x", Prompt("i", "?"), options)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("return float('nan')", "returned nan, which is no number"),
        ("return '1'", "returned '1', which is no number"),
        ("return [1]", "no number"),
        ("raise SystemExit(0)", "raised SystemExit"),
        ("return type('T', (), {'__repr__': lambda self: 1 / 0})()", "raised ZeroDivisionError"),
        ("return True", 1),
        ("import numpy; return numpy.float32(0.5)", 0.5),
        ("import numpy; return numpy.True_", 1),
        ("from decimal import Decimal; return Decimal('0.5')", 0.5),
    ],
)
def test_what_a_users_function_returns_is_a_number_or_a_reason(tmp_path, code, said):
    (tmp_path / "returns.py").write_text(f"def score(text, item):\n    {code}\n")
    given = {"folder": tmp_path, "function": "returns.score"}
    if isinstance(said, str):
        with pytest.raises(NoScore, match=said):
            reference.own("?", Prompt("i", "?"), given)
    else:
        assert reference.own("?", Prompt("i", "?"), given) == said


@pytest.mark.parametrize(
    ("code", "said"), [("raise SystemExit(0)", "SystemExit"), ("score = 5", "no function")]
)
def test_a_module_that_leaves_or_has_no_function_is_refused(tmp_path, code, said):
    (tmp_path / "leaves.py").write_text(code)
    with pytest.raises(LabError, match=f"'leaves.score' cannot be imported .*{said}"):
        reference.own_function(tmp_path, "leaves.score")


@pytest.mark.parametrize(
    ("toml", "worst"),
    [("", 0.0), ("low = -1\nhigh = 1\n", -1.0), ("low = 0\nhigh = 9\nhigher_is_better = false\n", 9.0)],
)
def test_a_failed_generation_gets_the_worst_score_of_the_tasks_own_scale(tmp_path, toml, worst):
    (tmp_path / "items.jsonl").write_text('{"id": "a", "text": "Say a.", "target": "a"}\n')
    (tmp_path / "far.py").write_text("def score(text, item):\n    return 0.5\n")
    scorers = '[scorers.python]\nfunction = "far.score"\n[scorers.exact]\n'
    (tmp_path / "task.toml").write_text(f'prompts = "items.jsonl"\n{toml}{scorers}')
    settings = Settings(task=str(tmp_path / "task.toml"))
    (score,) = reference.scored(settings, [make_sample("m", "a", 0, error="broken")])
    assert score.failed and score.values == {"python": worst, "exact": 0.0}


def test_a_function_beside_the_task_scores_an_answer(tmp_path):
    code = "def long(text, item):\n    return len(text) / 10 if text else None\n"
    (tmp_path / "mine_for_tests.py").write_text(code)
    options = {"folder": tmp_path, "function": "mine_for_tests.long"}
    assert reference.own("12345", Prompt("i", "?"), options) == 0.5
    with pytest.raises(reference.NoScore, match="returned None"):
        reference.own("", Prompt("i", "?"), options)
    lost = tasks.Scorer("p", "python", options | {"function": "mine_for_tests.no"})
    task = tasks.Task("t", (lost,), "p", tasks.RIGHT)
    with pytest.raises(LabError, match=r"'mine_for_tests.no' cannot be imported \(AttributeError"):
        reference.check_scorers(task)


@pytest.mark.parametrize("share", [0, 10, 25, 50, 90, 100])
def test_an_answerer_that_is_right_on_a_share_of_the_shipped_items_scores_that_share(share):
    """A planted truth, through the scores of samples: 60 items, one of which also fails."""
    asked = Settings(task="arithmetic")
    items, right = tasks.items(asked), round(0.6 * share)
    said = [item.target[0] if n < right else "nobody knows" for n, item in enumerate(items)]
    broken = "it broke" if share == 0 else None
    samples = [
        make_sample("m", item.id, 0, text=text, prompt=item.text, error=None if n else broken)
        for n, (item, text) in enumerate(zip(items, said, strict=True))
    ]
    scores = list(reference.scored(asked, samples))
    means = by_prompt(scores, "exact")
    assert sum(means.values()) / 60 == right / 60
    found = mean_score(means.values(), "exact", tasks.load_task("arithmetic").scale)
    assert found.method == "wilson" and found.low <= right / 60 <= found.high


def squad_exact(text: str, target: str) -> bool:
    """The rules of SQuAD's evaluation script, in its order; a target that they leave nothing of as it is."""

    def form(s):
        s = "".join(c for c in s.lower() if c not in set("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"))
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", s).split())

    return form(text) == form(target) if form(target) else text.strip(" .").lower() == target.strip().lower()


def test_exact_match_is_that_of_squad_on_random_answers():
    rng, parts = random.Random(0), ["The", "a", "cat", "Cat!", "an", "dog", "-", "  ", "don't"]
    for _ in range(300):
        text, target = (" ".join(rng.choices(parts, k=rng.randint(1, 3))) for _ in range(2))
        found = reference.exact(text, Prompt("i", "?", target=(target,)), LOOSE)
        assert found == squad_exact(text, target), (text, target)


def test_the_reasoning_of_an_answer_is_not_scored():
    task = tasks.Task("t", (tasks.Scorer("exact", "exact", LOOSE),), "exact", tasks.RIGHT)
    text = "<think>Amsterdam? No.</think>\n\nThe Hague"
    assert reference.scores_of(task, ITEM, text)[0] == {"exact": 1.0}


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_pass_at_k_is_the_share_of_all_choices_of_k_answers(k):
    for right in product((0.0, 1.0), repeat=5):
        drawn = [max(chosen) for chosen in combinations(right, k)]
        assert pass_at(right, k) == pytest.approx(sum(drawn) / len(drawn))
    assert pass_at([1.0] * (k - 1), k) is None


def test_repeats_of_a_task_can_mean_pass_at_k(tmp_path, monkeypatch):
    texts = iter(("no",))

    def only_first(text, item, options):
        if next(texts, None) is None:
            raise reference.NoScore("only the first")
        return 0.0

    rows = [{"id": f"i{n}", "text": f"Say {n}.", "target": f"{n}", "cluster": f"c{n // 2}"} for n in range(8)]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    toml = 'prompts = "items.jsonl"\nprimary = "exact/pass_at_2"\npass_at = 2\n[scorers.exact]\n'
    (tmp_path / "task.toml").write_text(toml)
    settings = Settings(task=str(tmp_path / "task.toml"), repeats=4)
    made = [(row, repeat) for row in rows for repeat in range(4)]
    samples = [
        make_sample("m", row["id"], r, text=row["target"] if r < int(row["target"]) % 3 else "no")
        for row, r in made
    ]
    samples[0] = replace(samples[0], error="failed")
    scores = list(reference.scored(settings, samples))
    found = by_prompt(scores, "exact/pass_at_2")
    for n in range(8):
        assert found[f"i{n}"] == pytest.approx(pass_at([1.0] * (n % 3) + [0.0] * (4 - n % 3), 2))
    # its interval counts clusters, and it is what verdicts rest on
    _, quality = metrics.quality_estimates(scores, tasks.RIGHT, tasks.clusters(settings))
    halves = [(found[f"i{n}"] + found[f"i{n + 1}"]) / 2 for n in range(0, 8, 2)]
    want, got = estimate(halves, "exact/pass_at_2"), quality["exact/pass_at_2"]
    assert (got.n, got.mean, got.low, got.high) == pytest.approx((4, want.mean, want.low, want.high))
    # an answer without a score is no try, and with one try there is no pass@2
    monkeypatch.setitem(reference.SCORERS, "exact", only_first)
    few = reference.scored(settings, samples[1:4])
    assert {score.reason for score in few} == {
        "only the first",
        "fewer than 2 answers to its prompt have a score",
    }
    assert all("exact/pass_at_2" not in score.values for score in few)
    reference.check_scorers(tasks.load_task(settings.task))
    with pytest.raises(LabError, match="asks for pass@2: give --repeats 2"):
        tasks.items(replace(settings, repeats=1))
    (tmp_path / "task.toml").write_text(toml.replace("exact/pass_at_2", "exact/pass_at_3"))
    with pytest.raises(LabError, match="has no score 'exact/pass_at_3': did you mean 'exact/pass_at_2'"):
        reference.check_scorers(tasks.load_task(settings.task))


def test_a_scorer_that_gives_no_score_takes_no_other_ones_away(tmp_path):
    (tmp_path / "items.jsonl").write_text('{"id": "a", "text": "Say a.", "target": "a"}\n')
    (tmp_path / "mine.py").write_text("def score(text, item):\n    return None\n")
    toml = 'prompts = "items.jsonl"\n[scorers.exact]\n[scorers.python]\nfunction = "mine.score"\n'
    (tmp_path / "task.toml").write_text(toml)
    settings = Settings(task=str(tmp_path / "task.toml"))
    (score,) = reference.scored(settings, [make_sample("m", "a", 0, text="a")])
    assert score.values == {"exact": 1.0} and "returned None, which is no number" in score.reason
    assert (by_prompt([score], "exact"), by_prompt([score], "python")) == ({"a": 1.0}, {})
