"""The report's script in a real browser: what a reader searches, filters, orders and sorts."""

from __future__ import annotations

import base64
import json
import re
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from browser import CHROMIUM, browser
from made_runs import make_result, make_sample, planted, write_info, write_model
from typer.testing import CliRunner

from nbhelpers import cli
from nbhelpers.comparison import compare
from nbhelpers.report import html
from nbhelpers.runner import notebook

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine")
EVIL = '<script>window.ran=1</script><img src=x onerror="window.ran=1">'
SHOWN = "[...document.querySelectorAll('article.item:not([hidden])')].map((item) => item.id.slice(5))"


def tell(name: str, value: str) -> str:
    """What a reader's change of a field of the form does."""
    part = "checked = true" if value == "checked" else f"value = '{value}'"
    return f"{{ const f = document.forms.explore; f.{name}.{part}; f.dispatchEvent(new Event('input')) }}"


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """Two models on six prompts; the last text of the second failed, one text is hostile."""
    run_dir = tmp_path_factory.mktemp("outputs") / "run"
    kinds = ("short_post", "business_note")
    for name, levels in (("first", (5, 5, 9, 5, 5, 5)), ("second", (4, 2, 1, 5, 3, 1))):
        rows = []
        for n, level in enumerate(levels, 1):
            text = f"a word and number-{n} of {name}" + (EVIL if n == 4 else "") + "\na word" * 40 * (n == 5)
            sample = make_sample(name, f"b{n:02d}", 0, text=text, content_type=kinds[n % 2])
            if level == 1 and n == 6:
                sample = replace(sample, text="", error="out of memory", finish_reason="error")
            rows.append((sample, float(level)))
        rows.append(
            (make_sample(name, "b01", 1, text=f"a second text of {name}", content_type=kinds[1]), 5.0)
        )
        write_model(run_dir, make_result(name, planted(5, 1)), rows)
    write_info(run_dir, ["first", "second"])
    return html.write_report(run_dir)


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture
def opened(tab, page):
    tab.open(page)
    return tab


def test_the_prompts_that_differ_most_come_first_and_can_be_ordered_otherwise(opened):
    assert opened.run(SHOWN) == ["b03", "b06", "b02", "b05", "b01", "b04"]
    opened.run(tell("order", "place"))
    assert opened.run(SHOWN) == ["b01", "b02", "b03", "b04", "b05", "b06"]
    opened.run(tell("order", "low"))
    assert opened.run(SHOWN)[:2] == ["b03", "b06"]


@pytest.mark.parametrize(
    ("name", "value", "left"),
    [
        ("find", "Second number-2", ["b02"]),
        ("group", "short_post", ["b06", "b02", "b04"]),
        ("failed", "checked", ["b06"]),
        ("to", "1", ["b03", "b06"]),
        ("from", "9", ["b03"]),
    ],
)
def test_a_filter_leaves_what_it_asks_for_and_says_how_much(opened, name, value, left):
    opened.run(tell(name, value))
    assert opened.run(SHOWN) == left
    assert opened.run("document.querySelector('#explore output').textContent") == f"{len(left)} of 6 prompts"


def test_one_model_alone(opened):
    opened.run(tell("model", "second"))
    shown = opened.run("[...document.querySelectorAll('.answer:not([hidden])')].map((a) => a.dataset.model)")
    assert shown == ["second"] * 6


def test_marks_show_where_they_are_asked_for_and_say_what_they_are(opened):
    opened.run("{ const m = document.querySelector('.items mark.unknown'); window.first = m; }")
    line = "getComputedStyle(window.first).textDecorationLine"
    assert (opened.run("window.first.textContent"), opened.run(line)) == ("img", "none")
    colour = "getComputedStyle(window.first{}).color"
    assert opened.run(colour.format("")) == opened.run(colour.format(".parentNode"))
    opened.run("document.getElementById('marks').click()")
    assert (opened.run(line), opened.run("window.first.title")) == (
        "underline",
        "a word that the score does not know",
    )
    assert opened.run("window.ran === undefined")


def test_two_runs_stand_side_by_side_what_changed_first(tab, tmp_path):
    for run, texts, levels in (("old", "abc", (5, 4, 6)), ("new", "xbz", (5.5, 4, 1))):
        name, rows = "same-model", []
        for n, (text, level) in enumerate(zip(texts, levels, strict=True), 1):
            said = f"{run if text != 'b' else ''} answer {EVIL}"
            rows.append((make_sample(name, f"b{n:02d}", 0, text=said), float(level)))
        write_model(tmp_path / run, make_result(name, [float(level) for level in levels]), rows)
        write_info(tmp_path / run, [name])
    asked = ["compare", str(tmp_path / "old"), str(tmp_path / "new"), "--out", str(tmp_path / "both")]
    done = CliRunner().invoke(cli.app, asked)
    assert done.exit_code == 0, done.stdout
    tab.open(tmp_path / "both" / "index.html")
    assert tab.run(SHOWN) == ["b03", "b01", "b02"]
    heads = tab.run("[...document.querySelectorAll('.item h3')].map((h) => h.textContent)")
    assert ["means 5.00 apart" in heads[0], "0.50 apart" in heads[1], "the same texts" in heads[2]] == [
        True
    ] * 3
    names = tab.run("[...document.querySelectorAll('#item-b03 h4')].map((h) => h.textContent.trim())")
    assert names == ["same-model (old)", "same-model (new)"]
    assert tab.run("window.ran === undefined") and tab.log == []


def test_a_heading_sorts_its_table_both_ways(opened):
    table = "document.querySelector('#measured table')"
    rows = f"[...{table}.tBodies[0].rows].map((row) => row.cells[0].firstChild.textContent.trim())"
    before = opened.run(rows)
    click = f"{table}.tHead.rows[0].cells[0].firstChild.click()"
    opened.run(click)
    assert opened.run(rows) == sorted(before)
    opened.run(click)
    assert opened.run(rows) == sorted(before, reverse=True)


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """A page about 60 models."""
    folder = tmp_path_factory.mktemp("many")
    for i in range(60):
        write_model(folder, make_result(f"model-{i:02d}", planted(8 - i / 10, i)))
    return html.write_report(folder)


def test_a_long_table_shows_its_first_rows_and_a_search_finds_the_others(tab, many):
    tab.open(many)
    board = "document.querySelector('[aria-label=\"Every model, the best first\"]')"
    shown = f"[...{board}.querySelectorAll('tbody tr:not([hidden]) th')].map((cell) => cell.textContent)"
    said = f"{board}.previousElementSibling.querySelector('output').textContent"
    assert (len(tab.run(shown)), tab.run(said)) == (50, "50 of 60 rows")
    field = f"{{ const f = {board}.previousElementSibling; %s; f.dispatchEvent(new Event('input')) }}"
    tab.run(field % "f.find.value = 'MODEL-57'")
    assert (tab.run(shown), tab.run(said)) == (["model-57"], "1 of 60 rows")
    tab.run(field % "f.find.value = ''; f.all.checked = true")
    assert (len(tab.run(shown)), tab.run(said)) == (60, "60 of 60 rows")
    tab.run(field % "f.all.checked = false")
    tab.run(f"{board}.querySelector('thead button').click()")  # by place, the last first
    assert len(tab.run(shown)) == 50 and "model-59" in tab.run(shown)


def test_a_link_leads_to_one_item(opened, page):
    opened.call("Page.navigate", url=f"{page.as_uri()}#item-b04")
    assert opened.run("document.querySelector(':target').id") == "item-b04"


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_screen_and_nothing_hostile_runs(tab, page, width, dark):
    tab.open(page, width, dark)
    assert tab.run("document.documentElement.scrollWidth") <= width
    assert tab.run("window.ran === undefined")
    assert tab.log == []  # the policy had nothing to refuse


@pytest.fixture(scope="module")
def charts(tmp_path_factory) -> Path:
    """Two runs, their index and their comparison, with names as long as the Hub's and speeds far apart."""
    folder = tmp_path_factory.mktemp("charts")
    names = ["lab-llama", "HuggingFaceTB/SmolLM2-360M-Instruct", "Qwen/Qwen2.5-0.5B-Instruct"]
    for run in ("run", "later"):
        for n, name in enumerate(names):
            row = make_sample(name, "b01", 0), float(n)
            write_model(folder / run, make_result(name, planted(4 + n, n), words_per_s=2.0 * 10**n), [row])
        write_info(folder / run, names)
        compare.compare_run(folder / run)
        html.write_report(folder / run)
    html.write_runs_index(folder)
    asked = ["compare", str(folder / "run"), "--out", str(folder / "logs")]
    assert CliRunner().invoke(cli.app, asked).exit_code == 0
    return folder


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("place", ["run/index.html", "index.html", "logs/index.html"])
def test_every_chart_is_whole_on_a_telephone_with_text_of_11_pixels(tab, charts, place, dark):
    tab.open(charts / place, 390, dark)
    shown = tab.run("""[...document.querySelectorAll('figure img')].map((img) =>
        [img.src, img.x, img.width, 2 * parseFloat(getComputedStyle(img).padding)])""")
    assert shown
    for address, left, width, padding in shown:
        svg = base64.b64decode(address.partition(",")[2]).decode()
        points = float(re.search(r'viewBox="0 0 ([\d.]+)', svg)[1])
        letters = [100 * float(scale) for scale in re.findall(r"scale\(([\d.]+) -", svg)]
        assert left >= 0 and left + width <= 390
        assert min(letters) * (width - padding) / points >= 11


def test_the_policy_refuses_a_script_that_is_not_ours(opened):
    opened.run(
        "{ const s = document.createElement('script'); s.textContent = 'window.ran = 1'; "
        "document.body.append(s) }"
    )
    assert opened.run("window.ran === undefined")
    assert "Content Security Policy" in " ".join(opened.log)


def test_without_its_script_the_page_shows_every_text(tab, page, tmp_path):
    bare = tmp_path / "index.html"
    bare.write_text(page.read_text().partition("<script>(")[0] + "</body></html>")
    tab.open(bare)
    assert tab.run("document.querySelectorAll('article.item').length") == 6
    assert tab.run("getComputedStyle(document.getElementById('explore')).display") == "none"


def test_a_table_is_saved_as_a_file_that_no_spreadsheet_runs(opened):
    names = ["=1+2", "+1+cmd|' /C calc'!A0", "@sum(1)", "-2+3+cmd", "plain", "+1.77 [+0.47, +3.07]"]
    cells = "document.querySelectorAll('#measured table tbody th, #measured table tbody td')"
    opened.run(f"{json.dumps(names)}.forEach((name, n) => {{ {cells}[n].textContent = name }})")
    opened.run("{ URL.createObjectURL = (blob) => ((window.saved = blob.text()), '#') }")
    opened.run("document.querySelector('#measured .csv').click()")
    row = opened.run("window.saved").splitlines()[1]
    assert row.startswith(
        '"\'=1+2","\'+1+cmd|\' /C calc\'!A0","\'@sum(1)","\'-2+3+cmd","plain","+1.77 [+0.47, +3.07]"'
    )


def test_the_keyboard_reaches_search_filters_texts_and_headings_and_escape_closes(opened):
    reached, at = [], "(({tagName, name, className}) => [tagName, name ?? className])(document.activeElement)"
    for _ in range(150):
        opened.press("Tab")
        reached.append(tuple(opened.run(at)))
        if opened.run("document.activeElement.textContent") == "1 more text":
            break
    assert {("INPUT", "find"), ("SELECT", "model"), ("SELECT", "order"), ("INPUT", "from")} <= set(reached)
    assert {("DIV", "text"), ("BUTTON", "")} <= set(reached)  # a text; a heading that sorts
    opened.press("Enter")
    assert opened.run("document.activeElement.parentNode.open")
    opened.press("Tab")
    assert opened.run("document.activeElement.className") == "text"
    opened.press("Escape")
    assert opened.run("document.activeElement.tagName") == "SUMMARY"
    assert opened.run("document.querySelectorAll('details[open]').length") == 0


def test_a_heading_sorts_by_the_keyboard(opened):
    button = "document.querySelector('#measured table').tHead.rows[0].cells[0].firstChild"
    opened.run(f"{button}.focus()")
    opened.press("Enter")
    assert opened.run(f"{button}.parentNode.getAttribute('aria-sort')") == "ascending"


def test_print_shows_every_text_on_white_and_cuts_no_table(tab, page):
    tab.open(page, width=718)  # A4 without margins of 1 cm, at 96 dpi
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    tab.call("Emulation.setEmulatedMedia", media="print", features=dark)
    assert tab.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    texts = "[...document.querySelectorAll('.answer .text')]"
    assert tab.run(f"{texts}.filter((t) => t.checkVisibility()).length") == 13  # one failed
    assert tab.run(f"{texts}.filter((t) => t.scrollHeight > t.clientHeight + 1).length") == 0
    cut = "(t) => t.getBoundingClientRect().right > innerWidth"
    assert tab.run(f"[...document.querySelectorAll('table, figure img')].filter({cut}).length") == 0
    assert tab.run("getComputedStyle(document.querySelector('#explore')).display") == "none"
    tab.call("Emulation.setEmulatedMedia", media="")


AXE = find_spec("axe_playwright_python")
axed = pytest.mark.skipif(not AXE, reason="axe comes with the extra pages")
READ = ("00_start_here", "09_claims_audit", "17_distributed")  # with pictures, formulas, tables and code
VIOLATIONS = """axe.run({resultTypes: ["violations"]}).then((found) =>
    found.violations.flatMap((v) => v.nodes.map((node) => `${v.id}: ${node.html.slice(0, 200)}`)))"""


def violations(tab) -> list[str]:
    """What axe finds in the opened page once all that a click opens is open and what is far off is drawn."""
    tab.run(Path(AXE.origin).with_name("axe.min.js").read_text(encoding="utf-8"))
    tab.run(
        "{ const s = new CSSStyleSheet(); s.replaceSync('.item { content-visibility: visible !important }'); "
        "document.adoptedStyleSheets = [s]; "
        "document.querySelectorAll('details').forEach((closed) => { closed.open = true }) }"
    )
    return tab.run(VIOLATIONS)


@pytest.fixture(scope="module")
def looked_at(tmp_path_factory, page, charts, many) -> list[Path]:
    """The report, one about many models, the index, comparisons, and executed notebooks."""
    folder = tmp_path_factory.mktemp("notebooks")
    asked = ["compare", str(charts / "run"), str(charts / "later"), "--out", str(folder / "both")]
    assert CliRunner().invoke(cli.app, asked).exit_code == 0
    notebooks = [Path(__file__).parents[2] / "notebooks" / f"{name}.ipynb" for name in READ]
    read = [notebook.to_html(Path(shutil.copy(path, folder))) for path in notebooks]
    reports = [
        page,
        many,
        charts / "run" / "index.html",
        charts / "index.html",
        charts / "logs" / "index.html",
    ]
    return [*reports, folder / "both" / "index.html", *read]


@axed
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_axe_finds_nothing(tab, looked_at, width, dark):
    found = {}
    # Pages of notebooks are light whatever is asked for.
    for path in looked_at[: None if dark == (width == 1280) else -len(READ)]:
        tab.open(path, width, dark)
        found[f"{path.parent.name}/{path.name}"] = violations(tab)
    assert found == {key: [] for key in found}


@axed
@pytest.mark.parametrize(
    ("rule", "planted"),
    [
        ("image-alt", "<img src='data:,'>"),
        ("label", "<input>"),
        ("color-contrast", "<p style='color: #888; background: #999'>pale</p>"),
    ],
)
def test_axe_finds_what_is_planted(opened, rule, planted):
    opened.run(f"document.querySelector('main').insertAdjacentHTML('beforeend', {json.dumps(planted)})")
    assert [line.partition(":")[0] for line in violations(opened)] == [rule]
