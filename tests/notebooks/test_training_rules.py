"""What the notebooks that train or judge models of the corpus keep: DESIGN's rules for such experiments.

Each has one folded cell, tagged ``rule``, that looks at its own objects: no judged text shares a passage with
a training text, and three seeds stand behind a comparison of trainings. Here: that the cell is there and ran,
that no loop over seeds is shorter, and that what the prose reads off an interval is asserted on the interval.
"""

import ast
import json
from pathlib import Path

import pytest

NOTEBOOKS = {
    path.stem: json.loads(path.read_text(encoding="utf-8"))["cells"]
    for path in sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("[0-9]*.ipynb"))
}
ENDS = {"low", "high", "verdict"}  # "tied" says that the whole interval lies inside the margin
POINTS = {"difference", "mean"}  # of ``Comparison`` and ``Estimate``


def tags(cell) -> set:
    return set(cell["metadata"].get("tags", ()))


def source(cell) -> str:
    return "".join(cell["source"])


def code(cells) -> list:
    return [cell for cell in cells if cell["cell_type"] == "code"]


def trains(cells) -> bool:
    text = "\n".join(source(cell) for cell in code(cells))
    return "optimizer.step()" in text or "train_from_iterator(" in text


def judges(cells) -> bool:
    """Whether models are compared on texts of the corpus: on passages that were read, or were not."""
    text = "\n".join(source(cell) for cell in code(cells))
    return "paired.compare_two(" in text and "corpus.unseen_passage_texts(" in text


JUDGING = [name for name, cells in NOTEBOOKS.items() if judges(cells)]


def asserted(cell) -> list[ast.expr]:
    return [node.test for node in ast.walk(ast.parse(source(cell))) if isinstance(node, ast.Assert)]


def calls(node: ast.AST) -> set:
    return {getattr(n.func, "id", "") for n in ast.walk(node) if isinstance(n, ast.Call)}


def names(node: ast.AST) -> set:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def constants(node: ast.AST) -> set:
    return {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}


# ---- passages and seeds ---------------------------------------------------------------------------------


def test_the_notebooks_that_train_and_judge_are_found():
    assert {name[:2] for name in JUDGING} >= {"10", "11", "12", "14", "15"}
    assert {name[:2] for name in JUDGING if trains(NOTEBOOKS[name])} == {"10", "11", "12", "15"}


@pytest.mark.parametrize("name", JUDGING)
def test_a_folded_cell_holds_passages_apart_and_counts_seeds(name):
    (rule,) = [cell for cell in code(NOTEBOOKS[name]) if "rule" in tags(cell)]
    assert "folded" in tags(rule)
    assert source(rule).startswith("# ")  # what is on purpose otherwise is said there
    assert rule["execution_count"] and not rule["outputs"]
    checks = asserted(rule)
    apart = [check for check in checks if "passages_of" in calls(check) and "not " in ast.unparse(check)]
    assert apart, "nothing says that judged passages are not those of the training"
    if trains(NOTEBOOKS[name]):
        assert any(3 in constants(check) and "len" in names(check) for check in checks)


def seeds_of(tree: ast.AST) -> list[int]:
    """How many seeds each loop over ``seed`` has, where its length can be read."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.For | ast.comprehension) and getattr(node.target, "id", "") == "seed":
            its = node.iter
            if isinstance(its, ast.Tuple | ast.List):
                found.append(len(its.elts))
            elif isinstance(its, ast.Call) and getattr(its.func, "id", "") == "range":
                found.append(len(range(*map(ast.literal_eval, its.args))))
    return found


@pytest.mark.parametrize("name", JUDGING)
def test_no_loop_over_seeds_is_shorter_than_three(name):
    assert all(count >= 3 for cell in code(NOTEBOOKS[name]) for count in seeds_of(ast.parse(source(cell))))


# ---- conclusions ----------------------------------------------------------------------------------------


def attributes(node: ast.AST) -> set:
    """Names that are read as attributes, not called: ``c.mean`` but not ``x.mean()``."""
    called = {id(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)}
    return {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute) and id(n) not in called}


def on_a_point(cell) -> list[str]:
    """Comparisons in assertions that read the middle of an interval.

    ``difference == 0`` is let through: it is exact, and says that every text gave the same.
    """
    found = []
    for check in asserted(cell):
        for node in ast.walk(check):
            if isinstance(node, ast.Compare) and attributes(node) & POINTS:
                exact = isinstance(node.ops[0], ast.Eq) and ast.unparse(node.comparators[0]) == "0"
                if not exact:
                    found.append(ast.unparse(node))
    return found


def writers(cells) -> set:
    """Functions of a notebook that print or write an interval, straight or by another of them."""
    found: set[str] = set()
    functions = {}
    for cell in code(cells):
        for node in ast.walk(ast.parse(source(cell))):
            if isinstance(node, ast.FunctionDef):
                functions[node.name] = node
            elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
                functions[ast.unparse(node.targets[0])] = node.value
    while more := {n for n, body in functions.items() if _writes(body) or calls(body) & found} - found:
        found |= more
    return found


def _writes(node: ast.AST) -> bool:
    values = [n for n in ast.walk(node) if isinstance(n, ast.FormattedValue)]
    return any("low" in attributes(value.value) for value in values) or any(
        isinstance(text, str) and "{0.low" in text for text in constants(node)
    )


def shows(cell, known: set) -> bool:
    """Whether the cell, when it runs, shows an interval; defining a function that would is not showing."""
    body = [node for node in ast.parse(source(cell)).body if not isinstance(node, ast.FunctionDef)]
    body = [n for n in body if not (isinstance(n, ast.Assign) and isinstance(n.value, ast.Lambda))]
    return any(_writes(node) or calls(node) & known for node in body)


def unasserted(cells) -> list[str]:
    """Stretches of code between two texts that show an interval and assert nothing on its ends."""
    known, stretches = writers(cells), [[]]
    for cell in cells:
        if cell["cell_type"] == "markdown":
            stretches.append([])
        elif not tags(cell) & {"exercise", "solution"}:
            stretches[-1].append(cell)
    return [
        "\n\n".join(map(source, stretch))
        for stretch in stretches
        if any(shows(cell, known) for cell in stretch)
        and not any(attributes(check) & ENDS for cell in stretch for check in asserted(cell))
    ]


@pytest.mark.parametrize("name", JUDGING)
def test_no_assertion_stands_on_the_middle_of_an_interval(name):
    assert [line for cell in code(NOTEBOOKS[name]) for line in on_a_point(cell)] == []


@pytest.mark.parametrize("name", JUDGING)
def test_an_interval_is_asserted_before_the_prose_reads_it(name):
    assert unasserted(NOTEBOOKS[name]) == []


# ---- the checks themselves can fail ---------------------------------------------------------------------


def cell_of(text: str, kind: str = "code") -> dict:
    return {"cell_type": kind, "metadata": {}, "source": [text]}


@pytest.mark.parametrize(
    ("line", "fails"),
    [
        ("assert gap.difference > 0.1", True),
        ("assert abs(a.difference - b.difference) < 0.05", True),
        ("assert a.high < b.difference", True),
        ("assert e.mean > 0.5 and e.low > 0", True),
        ("assert gap.low > 0.1", False),
        ("assert x.mean() > 1", False),
        ("assert gap.difference == 0", False),
    ],
)
def test_the_middle_of_an_interval_is_found(line, fails):
    assert bool(on_a_point(cell_of(line))) == fails


@pytest.mark.parametrize(
    ("check", "fails"),
    [
        ("assert gap.difference > 0", True),
        ("assert gap.low > 0", False),
        ("assert gap.verdict == 'tied'", False),
    ],
)
def test_an_interval_without_an_assertion_is_found(check, fails):
    tell = cell_of("def tell(c):\n    print(f'{c.difference} [{c.low}, {c.high}]')\n    return c")
    cells = [tell, cell_of("text", "markdown"), cell_of("gap = tell(compare())"), cell_of(check)]
    cells += [cell_of("It is better.", "markdown"), cell_of("assert other.low > 0")]
    assert bool(unasserted(cells)) == fails


@pytest.mark.parametrize(
    ("loop", "counts"),
    [
        ("for seed in range(2): pass", [2]),
        ("[f(seed) for seed in (1, 2, 3)]", [3]),
        ("for seed in range(1, 5): pass", [4]),
    ],
)
def test_seeds_are_counted(loop, counts):
    assert seeds_of(ast.parse(loop)) == counts
