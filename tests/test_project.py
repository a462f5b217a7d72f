"""The project's own promises: one list of packages, light start, imports that point down."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import nbhelpers

ROOT = Path(__file__).resolve().parent.parent
# From the ground up, as the package's docstring lists them.
HOUSE = re.findall(r"^    (\w+) ", nbhelpers.__doc__, re.MULTILINE)


def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_conda_and_pip_users_get_the_same_packages():
    lines = (ROOT / "environment.yml").read_text().splitlines()
    listed = [line.strip()[2:] for line in lines if line.startswith("      - ")]
    assert listed[:2] == ["-c constraints.txt", "-e .[dev,concepts]"]
    assert listed[2:] == pyproject()["project"]["dependencies"]
    python = pyproject()["project"]["requires-python"]
    assert f"  - python{python}" in lines


def test_every_dependency_is_pinned_and_the_pin_is_in_range():
    from packaging.requirements import Requirement

    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    project = pyproject()["project"]
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + extras["dev"] + extras["concepts"]
    for requirement in map(Requirement, wanted):
        assert requirement.name in pins, f"{requirement.name} has no pin"
        assert pins[requirement.name] in requirement.specifier


def test_top_level_holds_the_agreed_names():
    names = {path.name for path in ROOT.iterdir()}
    agreed = {"notebooks", "nbhelpers", "data", "outputs", "environment.yml", "pyproject.toml", "README.md"}
    assert agreed <= names


@pytest.mark.parametrize("module", ["cli", "batch", "scoring", "costs", "stats", "comparison", "registry"])
def test_light_modules_start_without_heavy_libraries(module):
    heavy = ("torch", "transformers", "mlflow", "papermill", "matplotlib", "pandas")
    code = f"import nbhelpers.{module}, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "nbhelpers":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nbhelpers."):
            found.add(node.module.split(".")[1])
    return found


def test_imports_point_down():
    modules = sorted((ROOT / "nbhelpers").glob("[!_]*.py"))
    assert sorted(HOUSE) == [path.stem for path in modules], "give every module its place in the house"
    for path in modules:
        below = HOUSE[: HOUSE.index(path.stem)]
        for imported in imports_of(path):
            assert imported in below, f"{path.name} imports {imported}, which is not below it"


def code_lines(path: Path) -> int:
    """Lines of code: neither blank, nor comment, nor docstring."""
    source = path.read_text()
    prose = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            prose |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = enumerate(source.splitlines(), 1)
    return sum(bool(line.strip()) and line.strip()[0] != "#" and i not in prose for i, line in lines)


def test_the_package_stays_thin():
    files = list((ROOT / "nbhelpers").glob("*.py"))
    assert sum(map(code_lines, files)) <= 7150
    longest = max(files, key=lambda path: len(path.read_text().splitlines()))
    assert len(longest.read_text().splitlines()) <= 350, longest.name


def test_no_file_names_a_path_of_the_machine_it_was_made_on():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    private = re.compile(r"/home/(?!me/)\w+/|/Users/\w+/|/roo[t]/|/wor[k]/|ipykernel_\d+")
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.is_file() and path.suffix in {
            ".py",
            ".md",
            ".toml",
            ".yml",
            ".ipynb",
            ".json",
            ".txt",
            ".jsonl",
        }:
            text = path.read_text(encoding="utf-8")
            assert not private.search(text), name
