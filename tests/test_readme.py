"""Every command of the README and the pages beside it works: run here, or shown to be what make runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nbhelpers import store
from tools import bench

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = [
    line
    for page in PAGES
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    for line in block.splitlines()
    if line
]
EXTRAS = '-c constraints.txt -e ".[dev,concepts,applications,text,pages]"'
# These install, or run this very test; make runs them, and CI runs make.
BY_MAKE = {
    "make lint": "lint: install",
    "make test": "pytest --nbval tests notebooks",
    "python3 -m venv .venv && . .venv/bin/activate": "-m venv .venv",
    f"pip install {EXTRAS}": EXTRAS,
    "pytest --nbval tests notebooks": "pytest --nbval tests notebooks",
}
# tests/runner/test_run.py runs this one; without its options it takes minutes.
RUN = next(line for line in COMMANDS if line.startswith("nbhelpers run lab-"))


def shell(command: str) -> subprocess.CompletedProcess:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path}
    return subprocess.run(command, shell=True, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def test_the_two_commands_come_first():
    assert COMMANDS[:2] == ["make run", "make test"]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c in BY_MAKE])
def test_make_runs_the_same(command):
    assert BY_MAKE[command] in (ROOT / "Makefile").read_text()


def test_every_other_command_works_in_the_order_given():
    commands = [c for c in COMMANDS if c not in BY_MAKE]
    assert {"make run", "nbhelpers run"} <= set(commands)
    for command in commands:
        if command == "make run":  # what it runs is the next command; -n says so without installing
            done = shell("make -n run")
            assert "nbhelpers run" in done.stdout
        elif "execute_notebooks.py" in command:  # it writes into the checkout: nbval has executed it
            assert (ROOT / command.split()[-1]).exists()
        elif command in ("nbhelpers run", RUN):
            continue
        else:
            done = shell(command)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def test_the_python_example_works():
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "usage.md").read_text(), re.S)
    done = subprocess.run([sys.executable, "-c", example], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\[\d+\.\d(, \d+\.\d){3}\]", done.stdout.strip())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_exist(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


def test_the_table_of_speeds_is_that_of_the_bench():
    report = store.read_json(ROOT / "docs" / "bench.json", bench.BenchReport)
    speed = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    table = speed[speed.index("| times as fast as |") :].split("\n\n")[0].splitlines()
    models = [cell.strip() for cell in table[0].split("|")[2:-1]]
    found = {(r.model, r.name): f"{r.median:.2f} [{r.low:.2f}, {r.high:.2f}]" for r in report.ratios}
    for line in table[2:]:
        name, *cells = (cell.strip() for cell in line.split("|")[1:-1])
        assert name in {name for _, name in found}
        assert cells == [found.get((model, name), "not run") for model in models]
    assert len(table) == 10


def test_the_task_shown_is_the_one_that_ships():
    shown = dict(re.findall(r"```(toml|csv)\n(.*?)```", README, re.S))
    folder = ROOT / "data" / "tasks"
    assert (folder / "tickets.toml").read_text() == shown["toml"]
    assert (folder / "tickets.csv").read_text().startswith(shown["csv"])
