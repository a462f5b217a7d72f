"""The site's sources hold the whole series, and their links lead somewhere; `make site` builds it."""

import json
import re
import tomllib
from pathlib import Path

import pytest

from tools import make_site

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    make_site.sources(place := tmp_path_factory.mktemp("site"))
    return place


def outputs(cell: dict) -> list[dict]:
    """What a cell shows, with links to notebooks as links to their pages."""
    found = [dict(output) for output in cell.get("outputs", ())]
    for output in found:
        if html := output.get("data", {}).get("text/html"):
            output["data"] = output["data"] | {"text/html": "".join(html).replace(".ipynb", ".html")}
    return found


def test_every_notebook_question_and_module_has_its_place(folder):
    listed = set((folder / "index.md").read_text().split("Notebooks\n", 1)[1].splitlines())
    for path in (ROOT / "notebooks").glob("[0-9]*.ipynb"):
        assert f"notebooks/{path.stem}" in listed
        cells, own = (
            json.loads((at / "notebooks" / path.name).read_text())["cells"] for at in (folder, ROOT)
        )
        assert list(map(outputs, cells)) == list(map(outputs, own))
        assert not any(re.search(r"href=.[\w/]+\.ipynb", str(cell.get("outputs"))) for cell in cells)
    pages = {str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.md")}
    assert pages - {"index"} <= listed
    asked = "".join(path.read_text() for path in (folder / "questions").glob("*.md"))
    for question in tomllib.loads((ROOT / "data" / "questions.toml").read_text())["question"]:
        assert f"## {question['question']}\n" in asked
    api = "".join(path.read_text() for path in (folder / "api").glob("*.rst"))
    for path in (ROOT / "nbhelpers").rglob("[a-z]*.py"):
        assert f"automodule:: {'.'.join(path.relative_to(ROOT).with_suffix('').parts)}\n" in api


def test_every_link_leads_somewhere(folder):
    for page in [*folder.rglob("*.md"), *folder.rglob("*.ipynb")]:
        text = page.read_text()
        if page.suffix == ".ipynb":
            cells = json.loads(text)["cells"]
            text = "".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
        for target in re.findall(r"\]\(([^)#:\s]+)\)", text):
            assert (page.parent / target).exists(), f"{page.relative_to(folder)}: {target}"
