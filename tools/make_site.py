"""The series as a site: notebooks with their committed outputs, pages, the question bank, and the docstrings.

`make site` writes outputs/site/html/index.html, without a network: Sphinx's own search, formulas as MathML.

From the repository, with the extra `site`: python tools/make_site.py
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

from nbhelpers import store
from tools import quiz

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\]\(([^)#:\s]+)(#[^)]*)?\)")
SHOWN = re.compile(r"(<a href=['\"][\w/]+)\.ipynb")  # in what a cell displays, where Sphinx changes no link
HIDDEN = {"folded": "hide-input", "solution": "hide-cell"}  # our tags, MyST's
HEAD = "```{toctree}\n:hidden:\n:maxdepth: 1\n:caption: "


def sources(folder: Path) -> None:
    """Write what Sphinx reads. Raises LabError for a question bank that cannot be read."""
    notebooks = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
    cards = [path for path in (ROOT / "data").rglob("README.md") if "cache" not in path.parts]
    pages = [
        ROOT / "CONTRIBUTING.md",
        ROOT / "CHANGELOG.md",
        *sorted((ROOT / "docs").glob("*.md")),
        *sorted(cards),
    ]
    for path in notebooks:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            tags = cell["metadata"].get("tags", [])
            cell["metadata"]["tags"] = [*tags, *(HIDDEN[tag] for tag in tags if tag in HIDDEN)]
            for data in (output.get("data", {}) for output in cell.get("outputs", ())):
                if "text/html" in data:
                    data["text/html"] = SHOWN.sub(r"\1.html", "".join(data["text/html"]))
            if cell["cell_type"] == "markdown":
                _linked("".join(cell["source"]), path, folder)
        store.write_text(folder / path.relative_to(ROOT), [json.dumps(notebook)])
    for path in pages:
        text = path.read_text(encoding="utf-8")
        store.write_text(folder / path.relative_to(ROOT), [_linked(text, path, folder)])
    questions, api = list[str](), list[str]()
    for topic in sorted({one.topic for one in quiz.select()}):
        questions.append(f"questions/{topic.replace(' ', '-')}")
        rows = [_question(one) for one in quiz.select(topic)]
        store.write_text(folder / f"{questions[-1]}.md", [f"# {topic.capitalize()}\n\n", *rows])
    for room in sorted({path.parent for path in (ROOT / "nbhelpers").rglob("*.py")}):
        name = ".".join(room.relative_to(ROOT).parts)
        modules = sorted(path.stem for path in room.glob("[a-z]*.py"))
        api.append(f"api/{name}")
        rows = [f".. automodule:: {name}.{module}\n   :members:\n\n" for module in modules]
        title = f"{name}\n{'=' * len(name)}\n\n"
        store.write_text(folder / f"{api[-1]}.rst", [title, *rows])
    page = ROOT / "README.md"
    parts = {
        "Notebooks": [path.relative_to(ROOT).with_suffix("") for path in notebooks],
        "Pages": [path.relative_to(ROOT).with_suffix("") for path in pages],
        "Interview questions": questions,
        "Package": api,
    }
    trees = [f"\n{HEAD}{name}\n\n" + "\n".join(map(str, rows)) + "\n```\n" for name, rows in parts.items()]
    readme = _linked(page.read_text(encoding="utf-8"), page, folder)
    store.write_text(folder / "index.md", [readme, *trees])


def _linked(text: str, page: Path, folder: Path) -> str:
    """The text, once the files that it links to lie in the folder as they lie in the repository."""
    for target, _ in LINK.findall(text):
        found = (page.parent / target).resolve()
        if found.is_file() and found.suffix not in (".md", ".ipynb") and found.is_relative_to(ROOT):
            (place := folder / found.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(found, place)
    return text


def _question(one: quiz.Question) -> str:
    """A question with its answer folded, and its evidence as a link."""
    link = "Evidence: [{notebook}](../notebooks/{notebook}.ipynb), cell {tag}"
    answer = "\n\n".join([*one.back[:3], link.format(**one.evidence) if one.evidence else one.back[3]])
    return f"## {one.question}\n\n<details><summary>Answer</summary>\n\n{answer}\n\n</details>\n\n"


def main() -> None:
    folder = ROOT / "outputs" / "site"
    shutil.rmtree(folder, ignore_errors=True)
    sources(folder / "source")
    config, source = str(ROOT / "docs"), str(folder / "source")
    build = [sys.executable, "-m", "sphinx", "-q", "-c", config, source, str(folder / "html"), *sys.argv[1:]]
    sys.exit(subprocess.run(build).returncode)


if __name__ == "__main__":
    main()
