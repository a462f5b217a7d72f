"""The blind sheet out, the filled-in sheet back, and the agreement of people, rubric and judge."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
from made_runs import make_result, make_sample, make_score, write_info, write_model
from typer.testing import CliRunner

from nbhelpers import cli, store
from nbhelpers.comparison import rating_sheet, ratings
from nbhelpers.comparison.comparable import comparable
from nbhelpers.records import LabError
from nbhelpers.report import html
from nbhelpers.scoring.judge import JudgeScore
from nbhelpers.stats.estimate import krippendorff

MODELS = ("lab-gpt2", "lab-llama")
HOSTILE = ('=HYPERLINK("x")', "+1", "-1 idea", "@SUM(A1)", "\t=1", "＝1")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two models with six texts, one failed; a third with random weights. Scores are prompt numbers."""
    folder = tmp_path / "run"
    write_info(folder, MODELS)
    for model in MODELS:
        samples = [(make_sample(model, f"b{i:02d}", 0, text=text(model, i)), float(i)) for i in range(1, 7)]
        failed = (make_sample(model, "b07", 0, text="", error="no", finish_reason="error"), 0.0)
        write_model(folder, make_result(model, [1.0] * 6), [*samples, failed])
    noise = make_sample("shape:x", "b01", 0, text="random")
    write_model(folder, make_result("shape:x", [1.0], quality_applies=False), [(noise, 1.0)])
    return folder


def text(model: str, i: int) -> str:
    return (
        HOSTILE[i - 1] if model == MODELS[0] else f"Über {i}, said she; \"quoted\"\n\nand 'lines'\u2028here."
    )


def compared(run: Path) -> list:
    return comparable(run)[0]


def agreement(run: Path) -> tuple:
    found = compared(run)
    return rating_sheet.agreement(ratings.gather_ratings(run, found), found[0].primary)


def sheet(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def fill(run: Path, name: str, scores: dict[str, str], delimiter: str = ",") -> Path:
    """The run's sheet with scores by item, as a spreadsheet would save it."""
    rows = [{**row, "score": scores.get(row["item"], "")} for row in sheet(run / "labels.csv")]
    path = run.parent / f"{name}.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def truth(run: Path) -> dict[str, int]:
    """Item -> number of its prompt, through the key file."""
    items = json.loads((run / "labels_key.json").read_text())["items"]
    return {item: int(key.rsplit("-", 2)[1][1:]) for item, key in items.items()}


# ---- the sheet -----------------------------------------------------------------------------------------


def test_the_sheet_is_blind_and_shuffled(run: Path) -> None:
    path = rating_sheet.write_sheet(run, compared(run))
    rows = sheet(path)
    assert [row["item"] for row in rows] == [str(n) for n in range(1, 13)]
    assert set(rows[0]) == {"item", "prompt", "text", "score"} and not any(row["score"] for row in rows)
    content = path.read_text(encoding="utf-8-sig")
    for secret in (*MODELS, "lab_v2", "random", *(key for key in truth_keys(run))):
        assert secret not in content
    order = list(truth_keys(run))
    assert order != sorted(order) and len(set(order)) == 12
    assert {row["text"] for row in rows} >= {text(MODELS[1], i) for i in range(1, 7)}


def truth_keys(run: Path) -> list[str]:
    return list(json.loads((run / "labels_key.json").read_text())["items"].values())


def test_no_cell_can_be_taken_for_a_formula(run: Path) -> None:
    rows = sheet(rating_sheet.write_sheet(run, compared(run)))
    assert sum(row["text"] in {f"'{hostile}" for hostile in HOSTILE} for row in rows) == len(HOSTILE)
    assert not any(cell and cell[0] in "=+-@\t\r\n＝＋－＠" for row in rows for cell in row.values())


def test_whole_prompts_are_drawn_in_an_order_that_the_key_records(run: Path) -> None:
    def chosen(count: int, seed: int) -> ratings.LabelKey:
        for name in ("labels.csv", "labels_key.json"):
            (run / name).unlink(missing_ok=True)
        rating_sheet.write_sheet(run, compared(run), count, seed)
        return store.read_json(run / "labels_key.json", ratings.LabelKey)

    assert chosen(12, 1) == chosen(12, 1) != chosen(12, 2)
    key, whole = chosen(5, 1), chosen(99, 1)
    assert len(key.items) == 6 and list(key.items.values()) == list(whole.items.values())[:6]
    prompts = [sample.split("-")[-2] for sample in whole.items.values()]
    assert prompts[::2] == prompts[1::2] == list(whole.design.order) and len(set(prompts)) == 6
    assert (whole.design.drawn, key.design.drawn) == (6, 3)
    assert len({sample.rsplit("-", 2)[0] for sample in list(whole.items.values())[::2]}) == 2  # either first


def test_a_sheet_is_never_overwritten_and_a_run_without_texts_has_none(run: Path, tmp_path: Path) -> None:
    rating_sheet.write_sheet(run, compared(run))
    before = (run / "labels.csv").read_bytes()
    with pytest.raises(LabError, match=r"has labels\.csv already"):
        rating_sheet.write_sheet(run, compared(run), seed=1)
    assert (run / "labels.csv").read_bytes() == before
    write_info(tmp_path / "empty", ())
    with pytest.raises(LabError, match="no texts of the same prompts"):
        rating_sheet.write_sheet(tmp_path / "empty", compared(tmp_path / "empty"))


# ---- reading it back -----------------------------------------------------------------------------------


def test_filled_in_sheets_are_kept_by_rater(run: Path) -> None:
    rating_sheet.write_sheet(run, compared(run))
    rating_sheet.read_sheet(run, fill(run, "anna", {"1": "7", "3": " 2.5 "}))
    rating_sheet.read_sheet(run, fill(run, "bo", {"2": "7,5"}, delimiter=";"))
    found = rating_sheet.read_sheet(run, fill(run, "anna", {"1": "8"}))
    assert found.ratings == {"person anna": {"1": 8.0}, "person bo": {"2": 7.5}}
    assert store.read_json(run / "labels.json", ratings.Labels) == found


@pytest.mark.parametrize("wrong", ["0", "11", "ten", "nan", "-3", "1e1", "5/10", "0.99"])
def test_a_wrong_score_is_refused_with_its_line(run: Path, wrong: str) -> None:
    rating_sheet.write_sheet(run, compared(run))
    last = str(len(sheet(run / "labels.csv")))
    path = fill(run, "anna", {"1": "5", last: wrong})
    lines = path.read_bytes().decode().split("\n")
    # The line on which the last item begins: the texts before it run over several lines.
    line = 1 + max(i for i, content in enumerate(lines) if content.startswith(f"{last},"))
    with pytest.raises(LabError, match=rf"anna\.csv, line {line}: the score '{wrong}' of item {last}"):
        rating_sheet.read_sheet(run, path)
    assert not (run / "labels.json").exists() and line > int(last) + 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("item,prompt,text,score\n1,p,t,5\n99,p,t,5\n", r"line 3: item '99' is not in"),
        ("item,score\n2,5\n2,5\n", r"line 3: item '2' .* is there twice"),
        ('item,text,score\n1,"a\nb",5\n2,"c\n\nd",99\n', r"line 4: the score '99'"),
        ("number,rating\n1,5\n", r"line 2: the columns item and score are missing"),
        ("", r"holds no scores: fill in the columns"),
        ("item,score\n1,\n2,\n\n,\n", r"holds no scores"),
        ("item,score\n1,5\n2\n", r"line 3: it has more or fewer cells than the header"),
        ("item,score\n,5\n", r"line 2: item ''"),
        (b"item,score\n1,\xff\n", r"cannot be read .* CSV in UTF-8"),
        (b"PK\x03\x04\x00\x00", r"holds no scores"),
    ],
)
def test_a_broken_sheet_is_refused_in_one_sentence(run: Path, content: str | bytes, message: str) -> None:
    rating_sheet.write_sheet(run, compared(run))
    path = run / "mine.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(LabError, match=message):
        rating_sheet.read_sheet(run, path)


def test_reading_needs_a_sheet_of_this_run_and_a_file(run: Path) -> None:
    with pytest.raises(LabError, match="write the sheet first"):
        rating_sheet.read_sheet(run, run / "labels.csv")
    rating_sheet.write_sheet(run, compared(run))
    with pytest.raises(LabError, match=r"nowhere\.csv cannot be read"):
        rating_sheet.read_sheet(run, run / "nowhere.csv")


# ---- agreement -----------------------------------------------------------------------------------------


def test_no_labels_no_agreement(run: Path) -> None:
    assert agreement(run) == ()
    rating_sheet.write_sheet(run, compared(run))
    assert agreement(run) == ()


def test_a_person_who_rates_as_the_rubric_agrees_with_it_fully(run: Path) -> None:
    rating_sheet.write_sheet(run, compared(run))
    rating_sheet.read_sheet(run, fill(run, "anna", {item: str(float(n)) for item, n in truth(run).items()}))
    (found,) = agreement(run)
    assert (found.name, found.n) == ("people and lab_v2", 12) and found.mean == pytest.approx(1.0)


def test_agreement_between_people_and_with_the_rubric_pair_by_pair(run: Path) -> None:
    rating_sheet.write_sheet(run, compared(run))
    numbers = truth(run)
    anna = {item: n + (3.0 if int(item) % 2 else 0.0) for item, n in numbers.items()}
    bo = {item: float(n) for item, n in numbers.items() if int(item) > 4}
    for name, given in (("anna", anna), ("bo", bo)):
        rating_sheet.read_sheet(run, fill(run, name, {item: str(value) for item, value in given.items()}))
    judged = {item: 5.0 + (int(item) % 3) for item in list(numbers)[:8]}
    store.write_json(
        run / "labels.json", ratings.Labels({**read(run).ratings, "judge m": judged, "judge n": {}})
    )
    found = {estimate.name: estimate for estimate in agreement(run)}
    assert list(found) == [
        "people",
        "people and lab_v2",
        "people and judge m",
        "people and judge n",
        "lab_v2 and judge m",
        "lab_v2 and judge n",
        "judge m and judge n",
    ]
    mean = {item: (anna[item] + bo[item]) / 2 if item in bo else anna[item] for item in anna}
    rubric = {item: float(n) for item, n in numbers.items()}
    for name, one, other in (
        ("people", anna, bo),
        ("people and lab_v2", mean, rubric),
        ("lab_v2 and judge m", rubric, judged),
    ):
        expected = krippendorff([(one[item], other[item]) for item in one if item in other])
        assert found[name].mean == pytest.approx(expected.mean) and found[name].n == expected.n, name
    assert found["people and judge n"].mean is None and found["people and judge n"].reason == "no data"


def read(run: Path) -> ratings.Labels:
    return store.read_json(run / "labels.json", ratings.Labels)


def test_the_report_shows_the_agreement_or_why_not(run: Path) -> None:
    assert "Rubric against readers" not in html.write_report(run).read_text()
    rating_sheet.write_sheet(run, compared(run))
    rated = fill(run, "anna", {i: str(n + int(i) % 2) for i, n in truth(run).items()})
    rating_sheet.read_sheet(run, rated)
    (found,) = agreement(run)
    page = " ".join(html.write_report(run).read_text().split())
    assert f"{found.mean:.2f} [{found.low:.2f}, {found.high:.2f}]" in page
    assert "people and lab_v2" in page and "Rubric against readers" in page
    (run / "labels.json").write_text("{")
    assert "The labels cannot be used: labels.json: not JSON" in html.write_report(run).read_text()


# ---- the command ---------------------------------------------------------------------------------------


def call(*arguments: str):  # type: ignore[no-untyped-def]
    return CliRunner().invoke(cli.app, ["label", *arguments])


def test_the_command_writes_reads_and_tells(run: Path) -> None:
    written = call(str(run), "--count", "8")
    assert written.exit_code == 0 and str(run / "labels.csv") in written.output
    assert len(sheet(run / "labels.csv")) == 8
    paths = [fill(run, n, {i: str(v + v % 2) for i, v in truth(run).items()}) for n in ("anna", "bo")]
    told = call(str(run), "--read", str(paths[0]), "--read", str(paths[1]))
    assert told.exit_code == 0, told.output
    assert "people: 1.00 (at its limit or degenerate: no interval) over 8 texts" in told.output
    assert re.search(r"people and lab_v2: 0\.\d\d \[0\.\d\d, 0\.\d\d\] over 8 texts", told.output)


def test_the_command_refuses_in_one_sentence(run: Path) -> None:
    again = (call(str(run)), call(str(run)))[1]
    assert isinstance(again.exception, LabError)
    assert isinstance(call("no-such-run").exception, LabError)
    assert call(str(run), "--count", "0").exit_code == 2


def test_a_judge_rates_every_text_once_and_needs_no_sheet(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def given(loaded: object, prompt: str, text: str) -> JudgeScore:
        asked.append(text)
        return JudgeScore(None if "4" in text else 5.0, 5.0, 1.0)

    asked = list[str]()
    monkeypatch.setattr(rating_sheet.judge, "judge", given)
    told = call(str(run), "--judge", "lab-gpt2")
    assert told.exit_code == 0, told.output
    ratings = json.loads((run / "judged.json").read_text())["ratings"]["lab-gpt2"]
    assert len(asked) == len(ratings) == 12 and not (run / "labels_key.json").exists()
    assert ratings["lab-llama-b04-0"] is None and ratings["lab-llama-b05-0"] == 5.0
    assert "Not by the judge lab-gpt2: it rated texts of every model on 5 prompts, of 6." in told.output
    assert "lab_v2 and judge lab-gpt2" in told.output
    (run / "lab-llama" / "samples.jsonl").open("a").write(
        json.dumps(vars(make_sample("lab-llama", "b04", 1, text="new"))) + "\n"
    )
    store.append_row(run / "lab-llama" / "scores.jsonl", make_score(make_sample("lab-llama", "b04", 1), 3.0))
    assert call(str(run), "--judge", "lab-gpt2").exit_code == 0 and asked[12:] == ["new"]


def test_what_a_judge_has_rated_is_kept_and_a_judge_that_is_none_leaves_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(call(str(run), "--judge", "no such model").exception, LabError)
    assert not (run / "judged.json").exists()
    answers = iter([JudgeScore(7.0, 7.0, 1.0)] * 3)
    monkeypatch.setattr(rating_sheet.judge, "judge", lambda *_: next(answers))  # then it stops
    assert isinstance(call(str(run), "--judge", "lab-gpt2").exception, StopIteration)
    ratings = json.loads((run / "judged.json").read_text())["ratings"]["lab-gpt2"]
    assert list(ratings.values()) == [7.0] * 3


def test_a_small_model_does_not_rate(run: Path) -> None:
    assert call(str(run), "--judge", "lab-gpt2").exit_code == 0
    ratings = json.loads((run / "judged.json").read_text())["ratings"]["lab-gpt2"]
    assert len(ratings) == 12 and all(r is None or 1 <= r <= 10 for r in ratings.values())
