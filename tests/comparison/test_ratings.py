"""Ratings that correct a comparison, those that must not, and those that ship."""

from __future__ import annotations

import csv
import random
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import stdev

import pytest
from made_runs import make_result, make_sample, prompt_ids, write_info, write_model
from typer.testing import CliRunner

from nbhelpers import cli, store
from nbhelpers.comparison import compare, rating_sheet, ratings
from nbhelpers.comparison.comparable import comparable
from nbhelpers.comparison.compare import ComparisonReport
from nbhelpers.report import html

MODELS, PROMPTS = ("lab-gpt2", "lab-llama"), prompt_ids(14)
TYPES = dict(zip(PROMPTS, ["short_post", "business_note"] * 7, strict=True))


def quality(model: str, prompt: str) -> float:
    """What a careful reader thinks: lab-llama is two points better, on every other prompt a little more."""
    number = int(prompt[1:])
    return 2 + number / 4 + (2 + 0.3 * (-1) ** number) * (model == "lab-llama")


def score(model: str, prompt: str) -> float:
    """The rubric favours lab-gpt2 by four points, and follows the reader otherwise."""
    return quality(model, prompt) + 4 * (model == "lab-gpt2") - 1 + 0.2 * (int(prompt[1:]) % 3)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    write_info(folder, MODELS)
    for model in MODELS:
        samples = [
            (make_sample(model, p, repeat, content_type=TYPES[p]), score(model, p))
            for p in PROMPTS
            for repeat in (0, 1)
        ]
        write_model(folder, make_result(model, [score(model, p) for p in PROMPTS]), samples)
    return folder


def compared(run: Path) -> list:
    return comparable(run)[0]


def agreement(run: Path) -> tuple:
    found = compared(run)
    return rating_sheet.agreement(ratings.gather_ratings(run, found), found[0].primary)


def draw(run: Path, count: int = 20) -> ratings.LabelKey:
    rating_sheet.write_sheet(run, compared(run), count)
    return store.read_json(run / "labels_key.json", ratings.LabelKey)


def about(key: str) -> tuple[str, str]:
    model, prompt, _ = key.rsplit("-", 2)
    return model, prompt


def rate(run: Path, name: str, items: range, shift: float = 0.0) -> None:
    """A careful reader's ratings of some items, by way of a sheet."""
    key = store.read_json(run / "labels_key.json", ratings.LabelKey).items
    path = run.parent / f"{name}.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = ((n, min(10.0, max(1.0, quality(*about(key[str(n)])) + shift))) for n in items)
        csv.writer(file).writerows([("item", "score"), *rows])
    rating_sheet.read_sheet(run, path)


def test_ratings_turn_a_verdict_that_the_rubric_got_wrong(run: Path) -> None:
    before = compare.compare_run(run)
    assert (before.pick, before.basis, before.verdicts) == ("lab-gpt2", "by the rubric", before.pairs)
    assert len(draw(run).items) == 20
    rate(run, "anna", range(1, 21))
    found = compare.compare_run(run)
    assert (found.pick, found.basis) == ("lab-llama", "corrected by 20 ratings")
    (pair,) = found.corrected
    assert (pair.a, pair.verdict, pair.n, pair.rated) == ("lab-llama", "better", 14, 10)
    assert pair.low < 2 < pair.high and pair.high - pair.low < 1
    assert found.pairs == before.pairs and list(found.readers) == ["lab-llama", "lab-gpt2"]
    truth = sum(quality("lab-llama", p) for p in PROMPTS) / 14
    assert found.readers["lab-llama"].low < truth < found.readers["lab-llama"].high
    assert "14 prompts, 10 of them rated" in compare.verdict_sentence(pair)
    assert store.read_json(run / "comparison.json", ComparisonReport) == found


def test_report_and_command_say_what_the_verdict_rests_on(run: Path) -> None:
    compare.compare_run(run)
    assert "Decided by the rubric." in html.write_report(run).read_text()
    written = CliRunner().invoke(cli.app, ["label", str(run), "--count", "20"])
    assert "correlation 0.6" in written.output and "20 to ±" in written.output and "28 to ±" in written.output
    rate(run, "anna", range(1, 21))
    sheet = str(run.parent / "anna.csv")
    told = CliRunner().invoke(cli.app, ["label", str(run), "--read", sheet]).output
    assert "Verdicts corrected by 20 ratings" in told and "lab-llama writes better than lab-gpt2" in told
    page = " ".join(html.write_report(run).read_text().split())
    assert "Decided by scores corrected by 20 ratings." in page and "Rubric against readers" in page
    assert "By the rubric alone</summary> <ul><li>lab-gpt2 writes better than lab-llama" in page


def test_planned_widths_shrink_with_the_ratings(run: Path) -> None:
    sd, widths = rating_sheet.planned_widths(compared(run))
    by_score = [score("lab-gpt2", p) - score("lab-llama", p) for p in PROMPTS]
    assert list(widths) == [12, 20, 28] and sd == pytest.approx(stdev(by_score))
    assert list(widths.values()) == sorted(widths.values(), reverse=True)
    assert widths[20] == pytest.approx(ratings.ppi.half_width(sd, 10, 14, 0.6))


def test_prompts_that_a_model_lacks_are_not_drawn(run: Path) -> None:
    extra = make_sample("lab-llama", "b15", 0)
    write_model(
        run, make_result("lab-llama", [score("lab-llama", p) for p in PROMPTS] + [5.0]), [(extra, 5.0)]
    )
    key = draw(run, 99)
    assert set(key.design.order) == set(PROMPTS) and len(key.items) == 28
    rate(run, "anna", range(1, 21))
    assert compare.assemble(run).basis == "corrected by 20 ratings"


def test_the_first_prompts_are_enough_and_several_raters_are_averaged(run: Path) -> None:
    draw(run)
    rate(run, "anna", range(1, 14))  # six prompts and half of the seventh
    rate(run, "bo", range(1, 9), shift=1.5)
    found = compare.assemble(run)
    assert found.basis == "corrected by 20 ratings" and found.corrected[0].rated == 6
    rate(run, "bo", range(1, 9), shift=-0.5)
    assert compare.assemble(run).corrected[0].difference == pytest.approx(found.corrected[0].difference)


def test_a_rater_of_half_a_prompt_does_not_count_there(run: Path) -> None:
    """A severe rater of one text only would make its model look worse."""
    draw(run)
    rate(run, "anna", range(1, 21))
    alone = compare.assemble(run)
    rate(run, "severe", range(1, 2), shift=-9)
    assert compare.assemble(run) == alone


@pytest.mark.parametrize(
    "kind", ["a gap", "split prompts", "too few", "no design", "another order", "others"]
)
def test_what_is_no_random_sample_is_refused_in_a_sentence(run: Path, kind: str) -> None:
    key = draw(run)
    if kind == "a gap":
        rate(run, "anna", range(1, 9))
        rate(run, "bo", range(11, 21))
        said = "every text of the prompt "
    elif kind == "split prompts":
        rate(run, "anna", range(1, 21, 2))
        rate(run, "bo", range(2, 21, 2))
        said = "every text of the prompt "
    elif kind == "too few":
        rate(run, "anna", range(1, 11))
        said = "on 5 prompts every model's text is rated, and at least 6"
    else:
        rate(run, "anna", range(1, 21))
        design = None
        said = "records no random draw"
        if kind == "another order":
            order = list(key.design.order)
            random.Random(3).shuffle(order)
            design, said = replace(key.design, order=tuple(order)), "was not drawn at random from the prompts"
        elif kind == "others":
            design, said = replace(key.design, order=key.design.order[:-1]), "was not drawn at random"
        store.write_json(run / "labels_key.json", replace(key, design=design))
    found = compare.assemble(run)
    assert found.basis == "by the rubric" and not found.corrected and found.pick == "lab-gpt2"
    (note,) = found.notes
    assert note.startswith("Not corrected by the ratings: ") and said in note


def test_a_drawn_text_that_failed_counts_as_the_worst_and_is_not_shown(run: Path) -> None:
    path = run / "lab-llama" / "samples.jsonl"
    rows = list(store.read_rows(path, ratings.Sample))
    store.write_rows(path, [replace(r, text="", error="no") if r.prompt_id == "b03" else r for r in rows])
    key = draw(run, 28)
    (failed,) = key.design.failed
    assert about(failed) == ("lab-llama", "b03") and len(key.items) == 27
    rate(run, "anna", range(1, 28))
    found = compare.assemble(run)
    assert found.basis == "corrected by 27 ratings" and found.corrected[0].rated == 14
    (pair,) = found.corrected
    lost = quality("lab-llama", "b03") - 1
    mean = sum(quality("lab-llama", p) - quality("lab-gpt2", p) for p in PROMPTS) / 14
    assert pair.difference == pytest.approx(mean - lost / 14, abs=1e-6)


# ---- ratings that ship ---------------------------------------------------------------------------------


def ship(data: Path, run: Path, prompts: list[str]) -> None:
    """The ratings of the first texts of both models for these prompts, which were read in this order."""
    rows = []
    for place, prompt in enumerate(prompts, 1):
        for model in MODELS:
            sample = make_sample(model, prompt, 0, content_type=TYPES[prompt])
            said = sample.prompt, sample.text
            given = 1.0, 1.0, quality(model, prompt)
            rows.append(ratings.Reading(place, prompt, model, TYPES[prompt], *said, *given))
    store.write_rows(data / "readers" / "default_run.jsonl", rows)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "data").mkdir()
    for name in ("words.toml", "coherence.npz"):  # whichever test comes first reads them
        shutil.copy(ratings.store.data_dir() / name, tmp_path / "data")
    monkeypatch.setattr(ratings.store, "data_dir", lambda: tmp_path / "data")
    return tmp_path / "data"


def test_texts_that_ship_with_ratings_are_found_by_their_words(run: Path, data: Path) -> None:
    order = ratings.ppi.random_order(TYPES, 0)
    ship(data, run, order[:8])
    found = compare.assemble(run)
    assert (found.basis, found.pick) == ("corrected by 16 ratings", "lab-llama")
    assert found.corrected[0].rated == 8
    (alpha,) = agreement(run)
    assert (alpha.name, alpha.n) == ("lab_v2 and readers", 16)
    compare.compare_run(run)
    page = " ".join(html.write_report(run).read_text().split())
    assert "Rubric against readers" in page and "Decided by scores corrected by 16 ratings." in page


def test_only_the_beginning_whose_texts_are_found_counts(run: Path, data: Path) -> None:
    order = ratings.ppi.random_order(TYPES, 0)
    ship(data, run, order)
    path = run / "lab-gpt2" / "samples.jsonl"
    rows = list(store.read_rows(path, ratings.Sample))
    store.write_rows(path, [replace(r, text="Another.") if r.prompt_id == order[9] else r for r in rows])
    assert compare.assemble(run).corrected[0].rated == 9
    store.write_rows(path, [replace(r, text="Another.") if r.prompt_id == order[5] else r for r in rows])
    assert compare.assemble(run).basis == "by the rubric"


def test_a_sheet_of_the_run_goes_before_what_ships(run: Path, data: Path) -> None:
    ship(data, run, ratings.ppi.random_order(TYPES, 0))
    draw(run)
    rate(run, "anna", range(1, 13))
    assert compare.assemble(run).basis == "corrected by 12 ratings"
    names = [alpha.name for alpha in agreement(run)]
    assert names == ["people and lab_v2", "people and readers", "lab_v2 and readers"]


def test_a_sheet_that_corrects_nothing_leaves_what_ships(run: Path, data: Path) -> None:
    ship(data, run, ratings.ppi.random_order(TYPES, 0)[:8])
    draw(run)
    rate(run, "anna", range(1, 5))
    found = compare.assemble(run)
    assert found.basis == "corrected by 16 ratings"
    assert any("at least 6 are needed" in note for note in found.notes)


# ---- a judge -------------------------------------------------------------------------------------------


def judge_run(run: Path, name: str = "m", silent: tuple[str, ...] = (), shift: float = 0.0) -> None:
    """A judge's ratings of every text: as a careful reader's, but for what it is silent about."""
    keys = (make_sample(m, p, repeat).key for m in MODELS for p in PROMPTS for repeat in (0, 1))
    given = {key: None if key in silent else quality(*about(key)) + shift for key in keys}
    known = ratings.read_judged(run)
    store.write_json(run / "judged.json", ratings.Judged(known | {name: given}))


def test_a_judge_takes_the_place_of_the_rubric(run: Path) -> None:
    judge_run(run)
    found = compare.compare_run(run)
    assert (found.basis, found.primary, found.pick) == ("by the judge m", "judge m", "lab-llama")
    assert found.verdicts == found.pairs and found.pairs[0].difference == pytest.approx(2.0)
    assert found.prompts == tuple(PROMPTS) and not found.notes
    page = " ".join(html.write_report(run).read_text().split())
    assert "Decided by the judge m." in page and "lab_v2 and judge m" in page
    judge_run(run, "later", shift=-1.0)
    assert compare.assemble(run).basis == "by the judge later"


def test_what_a_judge_does_not_rate_is_missing(run: Path) -> None:
    judge_run(run, silent=("lab-gpt2-b01-0", "lab-llama-b02-0", "lab-llama-b02-1"))
    found = compare.assemble(run)
    assert found.prompts == tuple(prompt for prompt in PROMPTS if prompt != "b02")
    assert found.notes == ("13 of 14 prompts count: the judge m rated no text of some model on others.",)
    failed = [make_sample("lab-llama", p, repeat).key for p in PROMPTS[5:] for repeat in (0, 1)]
    judge_run(run, silent=tuple(failed))
    few = compare.assemble(run)
    assert few.basis == "by the rubric" and len(few.prompts) == 14
    assert few.notes == ("Not by the judge m: it rated texts of every model on 5 prompts, of 6.",)


def test_a_text_that_was_never_written_has_the_lowest_rating_of_a_judge(run: Path) -> None:
    path = run / "lab-llama" / "samples.jsonl"
    rows = list(store.read_rows(path, ratings.Sample))
    store.write_rows(path, [replace(r, text="", error="no") if r.prompt_id == "b03" else r for r in rows])
    judge_run(run)
    lost = (quality("lab-llama", "b03") - 1) / 14
    assert compare.assemble(run).pairs[0].difference == pytest.approx(2.0 - lost)


def test_readers_correct_a_judge(run: Path) -> None:
    key = draw(run, 20)
    rate(run, "anna", range(1, 21))
    prompts = list(key.design.order)
    judge_run(run, silent=(key.items["1"], *(f"lab-llama-{prompts[11]}-{repeat}" for repeat in (0, 1))))
    found = compare.assemble(run)
    assert (found.basis, found.pick) == ("corrected by 18 ratings", "lab-llama")
    assert found.corrected[0].rated == 9 and found.corrected[0].n == 13
    assert found.primary == "judge m" and len(found.notes) == 1
