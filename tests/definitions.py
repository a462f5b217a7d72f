"""What a notebook defines, for tests: its functions run here without its models and plots."""

from __future__ import annotations

import ast
import functools
import json
from pathlib import Path
from types import SimpleNamespace

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
DEFINING = (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)


@functools.cache
def definitions(notebook: str, *tags: str) -> SimpleNamespace:
    """Functions, classes and CONSTANTS of the code cells with one of these tags, by name.

    Run in a fresh namespace, after the imports of the notebook's first code cell; other lines of the cells
    are not run. KeyError for a tag that no cell has.
    """
    cells = json.loads((NOTEBOOKS / f"{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    for tag in tags:
        if not any(tag in cell["metadata"].get("tags", ()) for cell in code):
            raise KeyError(f"no cell of {notebook} has the tag {tag}")
    namespace: dict[str, object] = {"__name__": notebook}
    for cell in code:
        if cell is code[0] or set(tags) & set(cell["metadata"].get("tags", ())):
            tree = ast.parse("".join(cell["source"]))
            tree.body = [line for line in tree.body if isinstance(line, DEFINING) or _is_constant(line)]
            exec(compile(tree, notebook, "exec", dont_inherit=True), namespace)
    return SimpleNamespace(**namespace)


def _is_constant(line: ast.stmt) -> bool:
    return isinstance(line, ast.Assign) and all(
        isinstance(name, ast.Name) and name.id.isupper() for name in line.targets
    )
