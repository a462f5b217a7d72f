"""The project's own promises: one list of packages, light start, imports that point down."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "nbhelpers"
# From the ground up; a name is a file of the package or one of its folders.
FLOORS = (
    *(
        "redact",
        "errors",
        "exercises",
        "records",
        "store",
        "options",
        "registry",
        "tasks",
        "phases",
        "stats",
        "devices",
        "loading",
    ),
    *(
        "generation",
        "scoring",
        "tracking",
        "pipeline",
        "comparison",
        "logs",
        "report",
        "runner",
        "options",
        "cli_logs",
        "cli",
    ),
)
# What it has now, to be lowered with every cut: the aim is 5,500 lines and 3,900 of code.
MOST_LINES, MOST_CODE_LINES, MOST_FILES, LONGEST_FILE = 10_754, 7_717, 61, 300


PINNED = ("dev", "concepts", "applications", "text", "pages", "logs", "cluster")  # these extras are pinned


def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_conda_and_pip_users_get_the_same_packages():
    lines = (ROOT / "environment.yml").read_text().splitlines()
    listed = [line.strip()[2:] for line in lines if line.startswith("      - ")]
    assert listed[:2] == ["-c constraints.txt", "-e .[dev,concepts,applications,text,pages]"]
    assert listed[2:] == pyproject()["project"]["dependencies"]
    python = pyproject()["project"]["requires-python"]
    assert any(line.startswith(f"  - python{python},<") for line in lines)  # above it packages lack wheels


def test_binder_installs_the_pinned_packages_by_the_command_that_it_runs():
    install = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--no-build-isolation", "-q"]
    done = subprocess.run(
        [*install, "-r", ".binder/requirements.txt"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "-c ../constraints.txt\n" in (ROOT / ".binder" / "requirements.txt").read_text()


def test_every_dependency_is_pinned_and_the_pin_is_in_range():
    from packaging.requirements import Requirement

    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    project = pyproject()["project"]
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + [r for name in PINNED for r in extras[name]]
    for requirement in map(Requirement, wanted):
        assert requirement.name in pins, f"{requirement.name} has no pin"
        assert pins[requirement.name] in requirement.specifier


def test_top_level_holds_the_agreed_names():
    names = {path.name for path in ROOT.iterdir()}
    agreed = {"notebooks", "nbhelpers", "data", "outputs", "environment.yml", "pyproject.toml", "README.md"}
    assert agreed <= names


LIGHT = (
    "cli",
    "pipeline",
    "runner.run",
    "scoring.rubric",
    "scoring.costs",
    "stats.paired",
    "comparison.compare",
)


def test_the_command_line_starts_without_scientific_libraries():
    code = "import nbhelpers.cli, sys; print([m for m in ('numpy', 'scipy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_start_without_heavy_libraries(module):
    heavy = ("torch", "transformers", "mlflow", "papermill", "matplotlib", "pandas")
    code = f"import nbhelpers.{module}, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def sources(folder: Path) -> dict[str, Path]:
    """Dotted name below the repository -> file."""
    found = (path for path in folder.rglob("*.py") if path.name != "__init__.py")
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in found}


def imports_of(path: Path, known: set[str]) -> set[str]:
    """The files of ``known`` that a file imports, anywhere in it."""
    named = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            named |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return named & known


def test_imports_point_down():
    files = sources(PACKAGE)
    floor = {name: FLOORS.index(name.split(".")[1]) for name in files}
    for name, path in files.items():
        for imported in imports_of(path, set(files)):
            assert floor[imported] <= floor[name], f"{name} imports {imported}, which stands above it"


def test_no_file_imports_in_a_circle():
    files = sources(PACKAGE) | sources(ROOT / "tools")
    left = {name: imports_of(path, set(files)) for name, path in files.items()}
    while left:
        free = {name for name, needs in left.items() if not needs & set(left)}
        assert free, f"these import each other: {sorted(left)}"
        left = {name: needs for name, needs in left.items() if name not in free}


def test_the_package_does_not_need_the_tools():
    for name, path in sources(PACKAGE).items():
        assert not imports_of(path, set(sources(ROOT / "tools"))), name
        assert not re.search(r"^from .*\n?.*noqa: F401", path.read_text(), re.MULTILINE), f"{name} re-exports"


def test_a_public_name_means_one_thing_in_the_package():
    homes = dict[str, set[str]]()
    for module, path in sources(PACKAGE).items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, set()).add(module)
    assert {name: modules for name, modules in homes.items() if len(modules) > 1} == {}


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
    files = list(PACKAGE.rglob("*.py"))
    lengths = {path: len(path.read_text().splitlines()) for path in files}
    assert sum(lengths.values()) <= MOST_LINES
    assert sum(map(code_lines, files)) <= MOST_CODE_LINES
    assert len(files) <= MOST_FILES
    assert max(lengths.values()) <= LONGEST_FILE, max(lengths, key=lambda path: lengths[path])


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


def test_every_file_imports_where_there_are_no_posix_names():
    """As on Windows: these modules are missing, and so are these names; the libraries care for themselves.

    Only a fork server, which is Linux's, imports the file that is left out.
    """
    code = f"""
import importlib, os, signal, sys
import filelock, jupyter_client, multiprocessing.forkserver, numpy, psutil, scipy.stats
for module in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[module] = None
for name in ("SIGKILL", "SIGHUP", "SIGALRM"):
    delattr(signal, name)
for name in ("setsid", "fork", "getuid", "killpg"):
    delattr(os, name)
for name in {sorted(sources(PACKAGE).keys() - {"nbhelpers.runner.preload"})}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
