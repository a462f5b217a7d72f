from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from made_runs import (
    METRICS,
    PIPELINE,
    make_result,
    make_sample,
    make_score,
    planted,
    prompt_ids,
    write_info,
    write_model,
)

from nbhelpers import store
from nbhelpers.comparison import compare
from nbhelpers.generation.latency import LatencyPass
from nbhelpers.records import LabError, Sample, Scale
from nbhelpers.report import texts
from nbhelpers.report.html import on_scale, outcome, pages, write_report, write_runs_index
from nbhelpers.tracking.metrics import FOREIGN
from nbhelpers.tracking.result import read_scored

VOID = {"meta", "img", "wbr", "br", "link", "input"}
EVIL = "<script>alert(1)</script>"


class Page(HTMLParser):
    """A page taken apart; it also checks that every tag is closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.marked = False  # a mark stands between: no space that the text does not have
        self.html = path.read_text(encoding="utf-8")
        self.feed(self.html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.marked |= tag == "mark"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        self.marked |= tag == "mark"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            glued = self.words.pop() if self.marked and self.words else ""
            self.words.append(glued + data)
            self.marked = False

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(autouse=True)
def no_window():
    from matplotlib import pyplot

    pyplot.switch_backend("agg")
    yield
    assert pyplot.get_fignums() == []  # the report closes its figures


def samples_of(model: str, count: int = 5, **changes) -> list[tuple[Sample, float]]:
    """Samples of the prompts b01, b02, … with the scores 1, 2, …"""
    return [(make_sample(model, f"b{i:02d}", 0, **changes), float(i)) for i in range(1, count + 1)]


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Path:
    """Two compared models, a shape, a model that failed while loading, and one failed generation."""
    run_dir = tmp_path_factory.mktemp("outputs") / "full run"
    failed = (make_sample("lab-gpt2", "b09", 1, error="out of memory", text=""), 0.0)
    write_model(run_dir, make_result("lab-gpt2", planted(4, 1), 494_976), [*samples_of("lab-gpt2"), failed])
    write_model(
        run_dir,
        make_result("lab-llama", planted(6, 2), 4_983_552, finished=29, failed=1),
        samples_of("lab-llama"),
    )
    write_model(run_dir, make_result("shape:bloom-560m", planted(1, 3), 559_214_592, quality_applies=False))
    for slug in ("lab-gpt2", "lab-llama"):
        for name in PIPELINE:
            (run_dir / slug / f"{name}.html").write_text("executed")
    (run_dir / "07_comparison.html").write_text("executed")
    models = ["lab-gpt2", "lab-llama", "shape:bloom-560m", "org/gone"]
    write_info(run_dir, models, {"org/gone": "the Hub cannot be reached"})
    compare.compare_run(run_dir)
    from matplotlib import pyplot

    pyplot.switch_backend("agg")
    write_report(run_dir)
    return run_dir


@pytest.fixture
def page(full: Path) -> Page:
    return Page(full / "index.html")


def test_every_cost_says_whether_its_energy_was_measured(tmp_path: Path):
    for name, flag in (("metered", 1.0), ("guessed", 0.0)):
        result = make_result(name, planted(4, 1))
        write_model(tmp_path, replace(result, metrics=METRICS | {"cost/energy_measured": flag}))
    write_report(tmp_path)
    html = (tmp_path / "index.html").read_text()
    table = html[html.index("Quality, speed, memory, cost") :]
    rows = re.findall(r'<th scope="row">(\w+) <span.*?\$17\.10 <span class="unit">(\w+)</span>', table, re.S)
    assert dict(rows) == {"metered": "measured", "guessed": "assumed"}


def test_a_run_in_another_language_shows_its_texts_and_no_score(tmp_path: Path):
    ask, rows = "Schreibe über die Kosten", samples_of("lab-gpt2", prompt="Schreibe über die Kosten")
    no_score = {"per_prompt": {}, "quality": {}, "quality_applies": False}
    result = make_result("lab-gpt2", planted(5, 1), metrics=METRICS | {FOREIGN: 30.0}, **no_score)
    folder = write_model(tmp_path, result, rows)
    score = replace(
        make_score(rows[0][0], 1.0), values={}, reason="not applicable: the prompt is not English"
    )
    store.write_rows(folder / "scores.jsonl", [replace(score, key=sample.key) for sample, _ in rows])
    text = Page(write_report(tmp_path)).text
    assert "No model could be compared on quality" in text and "not applicable" in text
    assert "lab-gpt2: 30 of 30 texts have no score, because the prompt or the answer is not English" in text
    assert ask in text and "random weights" not in text
    compare.compare_run(tmp_path)
    said = outcome(tmp_path, write_info(tmp_path, {"lab-gpt2": []}))
    assert "No model could be compared on quality" in said and "over 0" not in said and "tokens/s" not in said


def test_a_difference_without_an_interval_shows_its_p(tmp_path: Path):
    for name, level in (("a", 10.0), ("b", 0.0)):
        write_model(tmp_path, make_result(name, [level] * 15))
    write_report(tmp_path)
    text = Page(tmp_path / "index.html").text
    assert (
        "a b better +10.00 on every prompt < 0.001 –" in text and "a writes better than every other" in text
    )


# ---- a full run ----------------------------------------------------------------------------------------


def test_the_verdict_comes_first(page: Page, full: Path):
    verdict = compare.assemble(full).pick_reason
    assert verdict.startswith("lab-llama writes better than every other model here")
    assert page.text.index(verdict) < page.text.index("Ranking", 80)


def test_the_page_needs_nothing_but_itself(page: Page):
    names = {name for name, _ in page.tags}
    assert not names & {"link", "iframe", "object", "embed"}
    script = re.findall(r"<script>(.*?)</script>", page.html, re.S)
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    hashes = [base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in script]
    assert len(script) == len(page.all("script")) == 1
    assert (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{hashes[0]}'"
        in policy
    )
    assert "http:" not in page.html and "https:" not in page.html
    assert "url(" not in page.html and "@import" not in page.html
    sources = [image["src"] or "" for image in page.all("img")]
    assert len(sources) == 3
    for source in sources:
        head, _, data = source.partition(",")
        assert head == "data:image/svg+xml;base64" and b"</svg>" in base64.b64decode(data)


def test_the_table_gives_every_figure_with_its_unit(page: Page):
    row = page.text[page.text.index("lab-llama 4.98M parameters") :][:200]
    assert row.startswith("lab-llama 4.98M parameters noise not recorded 6.00 [")  # 6 is the planted mean
    # words/s, tokens/s, TTFT ms, TPOT ms, MiB, cost, finished: from METRICS, by hand
    assert "150 [140, 160] 200 [190, 210] 12.3 5.00 10.0 $17.10 assumed 29 of 30 97%, 1 failed" in row
    assert "shape:bloom-560m 559M parameters noise not recorded not applicable 150" in page.text
    for unit in ("words/s", "tokens/s", "ms", "weights MiB", "per million requests", "1 to 10"):
        assert unit in page.text


def test_models_that_were_timed_in_turn_have_verdicts_on_their_speed(tmp_path: Path):
    keys = list[str]()
    for model, seconds in (("fast", 0.5), ("slow", 1.0)):
        rows = [
            make_sample(model, prompt, n, latency_s=seconds * (1 + 0.1 * n))
            for prompt in prompt_ids()
            for n in range(2)
        ]
        folder = write_model(tmp_path, make_result(model, planted(4, 1)), [(row, 4.0) for row in rows])
        store.write_rows(folder / "latency.jsonl", rows[:16])
        keys += [row.key for row in rows[:16]]
    compare.compare_run(tmp_path)
    assert "Which is faster?" not in Page(write_report(tmp_path)).text
    store.write_json(tmp_path / "latency.json", LatencyPass(tuple(keys), True))
    [pair] = compare.compare_run(tmp_path).speed
    assert (pair.a, pair.b, pair.n, pair.verdict) == ("fast", "slow", 8, "better")
    assert "fast is 2.00 times as fast" in Page(write_report(tmp_path)).text


def test_every_pair_has_a_verdict(page: Page):
    assert "lab-llama lab-gpt2 better +2.00 [" in page.text
    assert "How to read a verdict" in page.text


def test_failures_and_exclusions_carry_their_reason(page: Page):
    text = page.text[page.text.index("Failures and exclusions") :]
    assert "org/gone 02_loading: the Hub cannot be reached" in text
    assert "shape:bloom-560m random weights" in text
    assert "org/gone 02_loading the Hub cannot be reached" in text
    assert "lab-gpt2 1 out of memory" in text
    assert "1 notebook failed, 2 models are not in the comparison" in page.text


def test_links_are_relative_and_lead_to_notebooks_that_exist(page: Page, full: Path):
    links = [a["href"] or "" for a in page.all("a")]
    notebooks = [link for link in links if link[0] != "#" and not link.endswith(".json") and ".." not in link]
    assert sorted(notebooks) == sorted(
        [f"{slug}/{name}.html" for slug in ("lab-gpt2", "lab-llama") for name in PIPELINE]
        + ["07_comparison.html"]
    )
    assert all((full / link).exists() for link in notebooks)
    assert "02 failed" in page.text and "03 skipped" in page.text


def test_every_text_stands_beside_the_other_models_texts_for_its_prompt(page: Page):
    shown = page.text[page.text.index("What they wrote") : page.text.index("Failures and exclusions")]
    for n in range(1, 6):
        both = shown[shown.index(f"Write about b{n:02d}:") :]
        assert (
            both.index(f"Text 0 of lab-llama for b{n:02d}.")
            < both.index(f"Text 0 of lab-gpt2 for b{n:02d}.")
            < 700
        )
    assert "5.00" in shown and "out of memory" in shown
    assert "shape:bloom-560m" not in shown  # random weights write noise
    ids = [attrs["id"] for attrs in page.all("article")]
    assert sorted(ids) == [f"item-b{n:02d}" for n in (1, 2, 3, 4, 5, 9)]


def test_items_carry_what_the_script_searches_and_sorts_by(page: Page):
    item = next(attrs for attrs in page.all("article") if attrs["id"] == "item-b03")
    assert (item["data-place"], item["data-gap"], item["data-low"]) == ("2", "0.0", "3.0")
    answers = [attrs for tag, attrs in page.tags if tag == "div" and attrs.get("class") == "answer"]
    assert {answer["data-model"] for answer in answers} == {"lab-gpt2", "lab-llama"}
    assert sum("data-failed" in answer for answer in answers) == 1


def test_settings_versions_and_commit_are_there_and_no_place_on_this_machine(page: Page, full: Path):
    for shown in ("max new tokens 256", "repeats 2", "torch 2.13.0", "Linux x86_64", "0123456789abcdef"):
        assert shown in page.text
    assert str(full) not in page.html and "2026-07-01 10:00 UTC" in page.text


def test_the_page_is_accessible(page: Page):
    levels = [int(name[1]) for name, _ in page.tags if name in ("h1", "h2", "h3")]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in pairwise(levels))
    assert all(len(image["alt"] or "") > 20 for image in page.all("img"))
    assert all(attrs.get("scope") for attrs in page.all("th"))
    assert page.all("html")[0]["lang"] == "en" and any(m.get("name") == "viewport" for m in page.all("meta"))


# ---- very many models ----------------------------------------------------------------------------------


def test_very_many_models_make_a_page_with_groups_and_a_row_a_model(tmp_path: Path):
    for i in range(60):
        name = f"model-{i:02d}{EVIL * (i == 1)}"
        result = make_result(name, planted(8 - 3 * (i >= 7) + i / 200, i, 40), slug=f"m{i:02d}")
        write_model(tmp_path, result, [(make_sample(name, "b01", 0), 5.0)])
    found = compare.compare_run(tmp_path)
    page = Page(write_report(tmp_path))
    assert len(found.pairs) < 1770
    assert f"{len(found.pairs)} of 1,770 pairs" in page.text and "p, corrected for all 1,770" in page.text
    start, end = page.text.index("Groups that cannot be told apart"), page.text.index("How to read a verdict")
    board = page.text[start:end]
    assert "7 models: model-06 , model-05" in board and "53 models: model-59, model-58" in board
    for place, name in enumerate(found.ranking, 1):  # found by the table's search, all of them
        assert f" {place} {name} {found.ranking[name].mean:.2f} [" in board
    pair = found.pairs[9]
    row = board[board.index(f" 11 {pair.b} ") :][:200]
    assert f"2 worse {-pair.difference:+.2f} [{-pair.high:+.2f}, {-pair.low:+.2f}]" in row
    answers = [attrs for tag, attrs in page.tags if tag == "div" and attrs.get("class") == "answer"]
    assert [a["data-model"] for a in answers] == list(found.ranking)[:30]
    assert "the first 30 of 60 models" in page.text and len(page.all("script")) == 1
    said = outcome(tmp_path, write_info(tmp_path, []))
    assert "p counts for all 1,770 pairs" in said and said.count(" writes better than ") < 40
    assert not (tmp_path / "texts.html").exists()


# ---- what may be missing -------------------------------------------------------------------------------


def test_a_missing_comparison_is_made_and_said(tmp_path: Path):
    write_model(tmp_path, make_result("a", planted(4, 1)))
    write_model(tmp_path, make_result("b", planted(6, 2)))
    write_info(tmp_path, ["a", "b"], {"": "CellTimeoutError: a cell passed the limit"})
    page = Page(write_report(tmp_path))
    assert "b writes better than every other model here" in page.text
    assert "This report made the comparison itself: comparison.json cannot be read" in page.text
    assert "all models 07_comparison CellTimeoutError" in page.text
    assert not (tmp_path / "comparison.json").exists()
    (tmp_path / "comparison.json").write_text('{"schema_version": 99}')
    assert "schema version 99 is unknown" in Page(write_report(tmp_path)).text


def test_all_models_failed(tmp_path: Path):
    write_info(
        tmp_path, ["org/gone", "/models/mine"], {"org/gone": "no network", "/models/mine": "no weights"}
    )
    page = Page(write_report(tmp_path))
    assert "No model could be compared on quality." in page.text
    assert "org/gone 02_loading: no network" in page.text and "mine 02_loading: no weights" in page.text
    assert "/models" not in page.text and page.all("img") == []


@pytest.mark.parametrize("count", [0, 1, 2])
def test_one_model_with_few_texts_and_no_run_json(tmp_path: Path, count: int):
    write_model(tmp_path, make_result("only", planted(6, 1)), samples_of("only", count))
    page = Page(write_report(tmp_path))
    assert "only is the only model with comparable results" in page.text
    assert "Pairwise verdicts" not in page.text
    assert ("No text to show" in page.text) == (count == 0)
    assert len(page.all("article")) == count


def test_only_random_weights(tmp_path: Path):
    write_model(tmp_path, make_result("shape:x", planted(1, 1), quality_applies=False, metrics={}))
    page = Page(write_report(tmp_path))
    assert "not applicable" in page.text and "What they wrote" not in page.text


def test_every_generation_failed(tmp_path: Path):
    dead = make_result("dead", [0.0] * 5, finished=0, failed=10)
    write_model(tmp_path, dead, samples_of("dead", error="no memory"))
    page = Page(write_report(tmp_path))
    assert "dead all 10 generations failed" in page.text and "dead 5 no memory" in page.text


def test_unscored_and_unreadable_texts(tmp_path: Path):
    folder = write_model(tmp_path, make_result("m", planted(6, 1)), samples_of("m"))
    (folder / "scores.jsonl").unlink()
    assert "no score" in Page(write_report(tmp_path)).text
    (folder / "samples.jsonl").write_text("not json\n")
    assert "not JSON" in Page(write_report(tmp_path)).text


def test_a_folder_without_a_run_is_refused(tmp_path: Path):
    with pytest.raises(LabError, match=r"no result\.json"):
        write_report(tmp_path)


# ---- hostile text --------------------------------------------------------------------------------------


def test_what_models_prompts_and_errors_say_is_escaped(tmp_path: Path):
    bad = f'{EVIL}"><img src=x onerror=alert(2)> & {{{{ 7 * 7 }}}}'
    result = make_result(f"evil{EVIL}", planted(6, 1), slug="evil")
    result = replace(result, revision=EVIL, device=EVIL, dtype=EVIL)
    texts = [
        (make_sample("evil", "b01", 0, text=bad, prompt=bad), 5.0),
        (make_sample("e", "b2", 0, error=bad), 0.0),
    ]
    write_model(tmp_path, result, texts)
    write_model(tmp_path, make_result(f"rival{EVIL}", planted(4, 2), slug="rival"))
    write_info(tmp_path, [f"evil{EVIL}", f"rival{EVIL}", f"gone{EVIL}"], {f"gone{EVIL}": bad, "": bad})
    page = Page(write_report(tmp_path))
    assert len(page.all("script")) == 1 and page.html.count("<script") == 1
    assert all((image["src"] or "").startswith("data:image/svg+xml") for image in page.all("img"))
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert bad in page.text  # shown as it is, not executed
    index = Page(write_runs_index(tmp_path.parent))
    assert len(index.all("script")) == 1 and f"evil{EVIL}" in index.text


def test_control_characters_become_visible(tmp_path: Path):
    text = "a\x00b\x1b[31m\u202ec\u2028d\r\ne"
    write_model(tmp_path, make_result("m", planted(6, 1)), [(make_sample("m", "b01", 0, text=text), 5.0)])
    html = Page(write_report(tmp_path)).html
    assert "a\ufffdb\ufffd[31m\ufffdc\u2028d" in html


def test_long_texts_are_cut_and_said_to_be(tmp_path: Path):
    text = "word " * 2000
    write_model(tmp_path, make_result("m", planted(6, 1)), [(make_sample("m", "b01", 0, text=text), 5.0)])
    page = Page(write_report(tmp_path))
    assert "samples.jsonl holds all of it" in page.text and "2000 words" in page.text
    assert page.html.count("word ") < 1100


def test_what_the_report_cannot_hold_lies_beside_it(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("nbhelpers.report.html.MOST_TEXTS", 4)
    for name, level in (("a", 3), ("b", 6)):
        rows = [
            (sample, score + (level if sample.prompt_id == "b04" else 0))
            for sample, score in samples_of(name)
        ]
        write_model(tmp_path, make_result(name, planted(level, 1)), rows)
    page, beside = Page(write_report(tmp_path)), Page(tmp_path / "texts.html")
    assert [item["id"] for item in page.all("article")] == ["item-b04", "item-b01"]  # the largest gap first
    assert "Shown are 2 of 5 prompts" in page.text and "all 10 texts" in page.text
    assert len(beside.all("article")) == 5 and "index.html" in [a["href"] for a in beside.all("a")]


def test_intervals_end_where_the_scale_does(tmp_path: Path):
    write_model(tmp_path, make_result("wide", [1.0] * 4 + [10.0] * 2))
    write_model(tmp_path, make_result("other", [5.0, 6.0] * 3))
    ranking = compare.assemble(tmp_path).ranking["wide"]
    assert ranking.low < 1
    assert on_scale(ranking, Scale()).low == 1
    assert f"{ranking.low:.2f}" not in Page(write_report(tmp_path)).text


def test_errors_do_not_give_the_place_of_the_run_away(tmp_path: Path):
    write_info(tmp_path, ["m"], {"m": f"{tmp_path}/m/loading.json cannot be read"})
    page = Page(write_report(tmp_path))
    assert str(tmp_path) not in page.html and "m/loading.json cannot be read" in page.text


# ---- the index of runs ---------------------------------------------------------------------------------


def test_the_index_lists_every_run_newest_first(tmp_path: Path):
    for name, day in (("one", "01"), ("two", "03"), ("three", "02")):
        write_model(tmp_path / name, make_result("a", planted(6, 1)))
        write_info(tmp_path / name, ["a", "/models/mine"], started=f"2026-07-{day}T00:00:00+00:00")
    compare.compare_run(tmp_path / "two")
    write_report(tmp_path / "two")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    (tmp_path / "standalone").mkdir()
    page = Page(write_runs_index(tmp_path))
    positions = [page.text.index(name) for name in ("two", "three", "one", "Unreadable runs", "broken")]
    assert positions == sorted(positions)
    assert "a is the only model with comparable results" in page.text
    assert "a, mine" in page.text and "2026-07-03 00:00 UTC" in page.text
    assert [a["href"] for a in page.all("a")] == ["two/index.html"]
    assert "run.json: not JSON" in page.text and str(tmp_path) not in page.html


def test_an_empty_outputs_folder_has_an_index(tmp_path: Path):
    assert "no run yet" in Page(write_runs_index(tmp_path)).text


def test_a_page_that_is_not_ours_is_not_overwritten(tmp_path: Path):
    (tmp_path / "index.html").write_text("my home page")
    with pytest.raises(LabError, match="was not written by the laboratory"):
        write_runs_index(tmp_path)
    assert (tmp_path / "index.html").read_text() == "my home page"


# ---- figures as text -----------------------------------------------------------------------------------


def test_figures_are_short_and_never_in_scientific_notation(tmp_path: Path):
    shown = pages(tmp_path).get_template("figures.html").module
    counts = {0.2: "0.2", 7: "7", 494_976: "495k", 999_900: "1M", 4_983_552: "4.98M", 1.1e9: "1.1B"}
    assert {number: shown.counted(number).strip() for number in counts} == counts
    digits = {None: "–", 0.0: "0", 0.00123: "0.00123", 5.0: "5.00", 12.34: "12.3", 1234.5: "1,234"}
    digits |= {1e-9: "0.00000000100"}
    assert {number: shown.three(number).strip() for number in digits} == digits
    prices = {None: "–", 0.0000171: "$0.000017", 0.4: "$0.40", 0.0: "$0", 1234.5: "$1,234.50"}
    assert {usd: shown.dollars(usd).strip() for usd in prices} == prices


def test_a_task_s_page_shows_what_is_right_its_slices_and_the_items_that_decide(tmp_path):
    scale = Scale(0.0, 1.0, 0.1, unit="exact")
    for model, right in (("lab-gpt2", 2), ("lab-llama", 10)):
        values = [float(n < right) for n in range(12)]
        task = {"primary": "exact", "scale": scale, "settings": {"task": "sums.toml"}}
        result = make_result(model, values, **task)
        folder = tmp_path / result.slug
        store.write_json(folder / "result.json", result)
        for n, (prompt, value) in enumerate(zip(prompt_ids(12), values, strict=True)):
            sample = make_sample(
                model, prompt, 0, text=f"{model} says {value:g} of {prompt}", content_type=""
            )
            tags = ("odd",) if n % 2 else ("even",)
            score = make_score(sample, 0.0)
            score = replace(score, values={"exact": value}, target=(f"target of {prompt}",), tags=tags)
            store.append_row(folder / "samples.jsonl", sample)
            store.append_row(folder / "scores.jsonl", score)
    text = unescape(write_report(tmp_path).read_text())
    assert "Which model does the task best?" in text and "Which model writes best?" not in text
    assert "exact, 0 to 1" in text and "points" not in text.split("What they wrote")[0].split("<main>")[-1]
    for shown in (
        "target of b03",
        "lab-llama says 1 of b03",
        "lab-gpt2 says 0 of b03",
    ):
        assert shown in text
    first = text.split("What they wrote")[1].split("</article>")[0]
    assert "says 1" in first and "says 0" in first  # the two differ
    slices = text.split("<h2>Slices</h2>")[1].split("</section>")[0]
    assert "even" in slices and "odd" in slices and "6 items" in slices
    assert "<dd>sums.toml</dd>" in text


def test_the_index_follows_models_over_runs_and_marks_another_pick(tmp_path: Path):
    for name, levels, day in (("one", (7, 4), "01"), ("two", (7, 4), "02"), ("three", (4, 7), "03")):
        for model, level in zip(("a", "b"), levels, strict=True):
            write_model(tmp_path / name, make_result(model, planted(level, 1)))
        write_info(tmp_path / name, ["a", "b"], started=f"2026-07-{day}T00:00:00+00:00")
        compare.compare_run(tmp_path / name)
    page = Page(write_runs_index(tmp_path))
    assert [image["alt"] for image in page.all("img")] == [
        "lab_v2 of every model from run to run, with 95% intervals, on 15 prompts"
    ]
    assert page.text.count("Changed: the run before it picked a.") == 1
    assert page.text.index("three") < page.text.index("Changed:") < page.text.index("two")


def test_runs_of_other_prompts_or_another_task_are_no_history(tmp_path: Path):
    for day, (name, count, task) in enumerate((("few", 5, ""), ("all", 15, ""), ("own", 15, "sums.toml")), 1):
        for model, level in zip(("a", "b"), (7, 4) if name == "few" else (4, 7), strict=True):
            write_model(tmp_path / name, make_result(model, planted(level, 1, count)))
        info = write_info(tmp_path / name, ["a", "b"], started=f"2026-07-0{day}T00:00:00+00:00")
        info = replace(info, task=task and "digest", settings=replace(info.settings, task=task))
        store.write_json(tmp_path / name / "run.json", info)
        compare.compare_run(tmp_path / name)
    page = Page(write_runs_index(tmp_path))
    assert page.all("img") == [] and "Changed:" not in page.text


def test_items_have_the_place_in_which_they_were_asked(tmp_path: Path):
    rows = samples_of("m", 3)
    result = make_result("m", planted(5, 1))
    write_model(tmp_path, result, rows[::-1])  # rows are written as they end
    found = texts.items_by_gap([(result, read_scored(tmp_path / result.slug))], {}, ["b02", "b01", "b03"])
    assert {item.id: item.place for item in found} == {"b01": 1, "b02": 0, "b03": 2}
