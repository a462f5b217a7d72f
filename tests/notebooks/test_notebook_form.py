"""What every notebook promises its reader, checked on the committed files."""

import ast
import builtins
import json
import re
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from statistics import median

import pytest
from ipykernel.ipkernel import IPythonKernel
from jupyter_client.kernelspec import get_kernel_spec
from nbconvert import ScriptExporter

from nbhelpers import phases
from nbhelpers.phases import COMPARISON
from nbhelpers.records import Settings
from nbhelpers.runner.notebook import LEARNERS, exporter

OF_A_RUN = sorted(phases.NOTEBOOKS.keys() - {COMPARISON})

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("[0-9]*.ipynb"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def cells(request):
    return json.loads(request.param.read_text(encoding="utf-8"))["cells"]


def tags(cell) -> set:
    return set(cell["metadata"].get("tags", ()))


def lines(text: str) -> int:
    return sum(bool(line.strip()) for line in text.splitlines())


def words(cell) -> int:
    return len(re.sub(r"<[^>]+>|[|#*`]|\$\$.*?\$\$|\(https?:[^)]*\)", " ", source(cell), flags=re.S).split())


def source(cell) -> str:
    return "".join(cell["source"])


def code(cells) -> list:
    return [cell for cell in cells if cell["cell_type"] == "code"]


def prose(cells) -> str:
    return "\n".join(source(cell) for cell in cells if cell["cell_type"] == "markdown")


def test_the_series_is_complete():
    assert {path.stem for path in NOTEBOOKS} >= {*OF_A_RUN, COMPARISON}


def test_executed_in_order_without_errors(cells):
    assert [cell["execution_count"] for cell in code(cells)] == list(range(1, len(code(cells)) + 1))
    assert all(output["output_type"] != "error" for cell in code(cells) for output in cell["outputs"])


def test_opens_with_goal_prerequisites_run_time_and_versions(cells):
    opening = source(cells[0])
    for word in ("# ", "Goal", "Prerequisites", "Run time", "ardware"):
        assert word in opening
    assert "print_versions" in source(code(cells)[0])


def test_every_formula_can_be_shown_without_a_script(cells):
    for cell in cells:
        if cell["cell_type"] == "markdown":
            page = exporter().environment.filters["markdown2html"](source(cell))
            formulas = re.findall(r"<math.*?</math>", page, re.S)
            assert len(re.findall(r'display="block"', page)) == source(cell).count("$$") / 2
            assert "\\" not in re.sub("<[^>]+>", "", "".join(formulas))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_jupyterlab_changes_nothing_by_opening_it_and_nbconvert_writes_a_python_file(path):
    kept, spec = json.loads(path.read_text(encoding="utf-8"))["metadata"], get_kernel_spec("python3")
    written = {"display_name": spec.display_name, "language": spec.language, "name": "python3"}
    assert kept["kernelspec"] == written
    assert kept["language_info"] | {"version": ""} == IPythonKernel.language_info | {"version": ""}
    assert ScriptExporter().from_filename(str(path))[1]["output_extension"] == ".py"


def test_shows_a_plot(cells):
    outputs = [output for cell in code(cells) for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_normalised(request, cells):
    for cell in cells:
        assert set(cell["metadata"]) <= {"tags", "jupyter"}
        folded = bool(tags(cell) & {"folded", "solution"})
        assert bool(cell["metadata"].get("jupyter", {}).get("source_hidden")) == folded
    assert all(output.get("name") != "stderr" for cell in code(cells) for output in cell["outputs"])


@pytest.mark.parametrize("name", OF_A_RUN)
def test_pipeline_notebooks_take_all_settings_as_parameters(name):
    import papermill

    path = next(path for path in NOTEBOOKS if path.stem == name)
    assert list(papermill.inspect_notebook(str(path))) == [field.name for field in fields(Settings)]


@pytest.mark.parametrize("name", OF_A_RUN)
def test_every_parameter_reaches_the_settings_as_it_was_given(name):
    path = next(path for path in NOTEBOOKS if path.stem == name)
    cells = code(json.loads(path.read_text(encoding="utf-8"))["cells"])
    given = next(n for n, cell in enumerate(cells) if "parameters" in cell["metadata"].get("tags", ()))
    names = {field.name for field in fields(Settings)}
    made = next(n for n, cell in enumerate(cells) if n > given and "Settings(" in source(cell))
    nodes = [node for cell in cells[given + 1 : made + 1] for node in ast.walk(ast.parse(source(cell)))]
    stores = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    assert not stores & names, "a parameter is assigned to before it is used"
    calls = [n for n in nodes if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "Settings"]
    passed = {word.arg: getattr(word.value, "id", None) for word in calls[0].keywords}
    assert passed == {name: name for name in names}


def names(node: ast.AST, place: type) -> set:
    """The names that are read (ast.Load) or made (ast.Store) in a piece of code."""
    made = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, place)}
    if place is ast.Store:
        defined = (ast.FunctionDef, ast.ClassDef, ast.ExceptHandler)
        made |= {n.name for n in ast.walk(node) if isinstance(n, defined) and n.name}
        made |= {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
        made |= {(n.asname or n.name).split(".")[0] for n in ast.walk(node) if isinstance(n, ast.alias)}
    return made


@pytest.mark.parametrize("name", [*OF_A_RUN, COMPARISON])
def test_what_a_run_executes_needs_nothing_of_what_it_leaves_out(name):
    """A name that a kept cell reads was made by a kept cell, and none that is left out made it anew."""
    path = next(path for path in NOTEBOOKS if path.stem == name)
    known, anew = set(dir(builtins)), set[str]()
    for cell in code(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        tree = ast.parse(source(cell))
        made, read = names(tree, ast.Store), names(tree, ast.Load)
        if tags(cell) & LEARNERS:
            anew |= made
        else:
            assert not read - made - known, "made only in cells that are left out"
            assert not (read - made) & anew, "made anew in cells that are left out"
            known, anew = known | made, anew - made


def test_text_cells_are_short(cells):
    texts = [cell for cell in cells if cell["cell_type"] == "markdown"]
    end = next(n for n, cell in enumerate(texts) if "## What to remember" in source(cell))
    assert median(map(words, texts)) <= 45
    assert max(map(words, texts[1:end])) <= 80


def test_code_cells_hold_one_idea_and_outputs_fit_a_screen(cells):
    """Folded cells (plumbing, drawings, assertions) are not read; exercises are counted by themselves."""
    read = [cell for cell in code(cells) if not tags(cell) & {"folded", "exercise", "solution"}]
    assert len(read) <= 30
    assert median(lines(source(cell)) for cell in read[1:]) <= 6  # the first has the imports
    for cell in read:
        printed = "".join("".join(output.get("text", "")) for output in cell["outputs"])
        assert lines(printed) <= 25


def test_code_cells_fit_a_screen(cells):
    """Imports and blank lines counted, folded cells and exercises too: what is opened is read."""
    assert max(len(source(cell).splitlines()) for cell in code(cells)) <= 20


def test_shows_formulas_and_links_its_sources(cells):
    assert "$$" in prose(cells)
    assert len(re.findall(r"\]\(https?://", prose(cells))) >= 2


def test_ends_in_the_agreed_order(cells):
    text = prose(cells)
    titles = ("## What to remember", "## Interview corner", "## Exercises", "## Questionnaire")
    positions = [text.index(title) for title in titles]
    assert positions == sorted(positions)
    assert text[positions[3] :].count("?") >= 5


def test_interview_answers_have_a_headline_follow_ups_and_a_weak_answer(cells):
    text = prose(cells)
    corner = text[text.index("## Interview corner") : text.index("## Exercises")]
    answers = re.findall(r"<details><summary>(.*?)</details>", corner, re.S)
    assert len(answers) >= 3
    for answer in answers:
        for part in ("**Headline.**", "**Then they ask.**", "**A weak answer.**"):
            assert part in answer
        spoken = answer[answer.index("</summary>") : answer.index("**Then they ask.**")]
        assert len(spoken.split()) <= 130  # 45 seconds
        asked = answer[answer.index("**Then they ask.**") : answer.index("**A weak answer.**")]
        assert asked.count("?") >= 2


def test_exercises_check_themselves_and_have_a_hint_and_a_solution(cells):
    """An open exercise (``answer = ...``) and its folded solution go through the same check."""
    exercises = [n for n, cell in enumerate(cells) if "exercise" in tags(cell)]
    assert len(exercises) >= 3
    for n in exercises:
        assert "<summary>Hint" in source(cells[n - 1])
        solution = next(cell for cell in cells[n + 1 :] if cell["cell_type"] == "code")
        assert "solution" in tags(solution)
        for cell, said in ((cells[n], "not answered yet"), (solution, "right: ")):
            assert "check(" in source(cell)
            assert said in "".join(cell["outputs"][0]["text"])


def test_an_open_exercise_does_not_answer_itself(cells):
    """What it is checked against stands in a folded cell; only a prediction may be run before the eyes."""
    for n, cell in enumerate(cells):
        if "exercise" not in tags(cell) or "**Predict" in re.sub(r"\d\. ", "", source(cells[n - 1])):
            continue
        tree = ast.parse(source(cell))
        (call,) = [c for c in ast.walk(tree) if isinstance(c, ast.Call) and ast.unparse(c.func) == "check"]
        right = call.args[1]
        made = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        assert isinstance(right, ast.Lambda) or (isinstance(right, ast.Name) and right.id not in made)


def test_each_notebook_leads_to_the_one_before_and_the_one_after():
    second = ("03_server", "04_own_task")  # beside the notebook of their number, which comes first
    order = sorted(NOTEBOOKS, key=lambda path: (path.stem[:2], path.stem in second))
    for before, after in pairwise(order):
        opening, closing = (
            json.loads(path.read_text(encoding="utf-8"))["cells"][0] for path in (before, after)
        )
        assert f"→]({after.name})" in source(opening)
        assert f"]({before.name})" in source(closing)
