"""One notebook, executed by papermill, checked, and turned into HTML.

A dead kernel, a cell timeout and ``sys.exit(0)`` all leave an output notebook whose metadata says that
every cell completed. So success is read off the cells: each non-empty code cell has an execution count,
and no cell holds an error output.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nbhelpers import store
from nbhelpers.records import LabError, NotebookStatus

KERNEL_ENVIRONMENT = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore"}
SOCKET_PATH_LIMIT = 100  # characters; Linux allows 107, macOS 103
HTML_POLICY = "default-src 'none'; img-src data:; font-src data:; style-src 'unsafe-inline'"


def check_parameters(notebook: Path, parameters: Mapping[str, Any]) -> None:
    """Raise LabError for a parameter the notebook does not have, or a value that is not plain JSON.

    papermill itself only warns about an unknown name, and turns tuples into strings.
    """
    import papermill

    known = papermill.inspect_notebook(str(notebook))
    if not known:
        raise LabError(f"{notebook.name} has no cell tagged 'parameters': tag the cell with its defaults.")
    for name, value in parameters.items():
        if name not in known:
            raise LabError(f"{notebook.name} has no parameter {name!r}; it has {', '.join(known)}.")
        if not _is_json(value):
            kind = type(value).__name__
            raise LabError(f"parameter {name!r} of {notebook.name} is a {kind}: pass a plain JSON value.")
        default = _default(known[name]["default"])
        if default is not None and value is not None and not _same_kind(value, default):
            kind, wanted = type(value).__name__, type(default).__name__
            raise LabError(
                f"parameter {name!r} of {notebook.name} must be a {wanted}, not a {kind}: {value!r}."
            )


def run_notebook(
    notebook: Path, output: Path, parameters: Mapping[str, Any], timeout: float, model: str = ""
) -> NotebookStatus:
    """Execute one notebook into `output`; every failure of its cells is a status, not an exception.

    timeout: seconds one cell may take. Raises LabError for wrong parameters, before anything runs.
    """
    import papermill

    from nbhelpers.runner.provisioner import use_fork_server

    check_parameters(notebook, parameters)
    output.parent.mkdir(parents=True, exist_ok=True)
    for stale in (output, output.with_suffix(".html")):
        stale.unlink(missing_ok=True)
    os.environ.update(KERNEL_ENVIRONMENT)
    use_fork_server()
    started = time.monotonic()
    problem = None
    with tempfile.TemporaryDirectory(prefix="nb") as sockets:
        try:
            papermill.execute_notebook(
                str(notebook),
                str(output),
                parameters=dict(parameters),
                kernel_name="python3",
                progress_bar=False,
                execution_timeout=max(1, int(timeout)),
                **_kernel_config(f"{sockets}/k"),
            )
        except Exception as raised:  # papermill, nbclient and kernel errors have no common base
            problem = raised
    error = _verdict(output, problem, timeout)
    if output.exists():
        with output.open("rb+") as written:  # a notebook that counts as passed is on the disk
            os.fsync(written.fileno())
    seconds = round(time.monotonic() - started, 3)
    return NotebookStatus(notebook.stem, model, "failed" if error else "passed", seconds, error)


def notebook_error(path: Path) -> str | None:
    """Why an executed notebook does not count as a success, in one line; None when it does."""
    try:
        code = _code_cells(path)
    except Exception as problem:  # nbformat's errors have no common base
        return f"{path.name} could not be read: {_first_line(problem)}"
    if error := _cell_error(code):
        return error
    missing = sum(cell.execution_count is None for cell in code)
    if missing:
        return f"the kernel stopped early: {missing} of {len(code)} code cells never ran"
    return None


def to_html(path: Path) -> Path:
    """Write an executed notebook as one HTML file beside it, readable without a network.

    The template's scripts, which would fetch libraries from public servers, are cut out; the page's policy
    has the browser refuse whatever script or address a cell's own output may hold.
    """
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(embed_images=True, exclude_anchor_links=True)
    body, _ = exporter.from_filename(str(path))
    body = re.sub(r"<script\b.*?</script>", "", body, flags=re.DOTALL | re.IGNORECASE)
    policy = f'<meta http-equiv="Content-Security-Policy" content="{HTML_POLICY}"/>'
    body = body.replace("<head>", f"<head>{policy}", 1)
    target = path.with_suffix(".html")
    return store.write_text(target, [body])


def _kernel_config(sockets: str) -> dict[str, Any]:
    """TCP ports of kernels that start together collide; sockets in a folder of their own cannot."""
    from traitlets.config import Config

    if os.name != "posix" or len(sockets) > SOCKET_PATH_LIMIT:
        return {}
    return {"config": Config({"KernelManager": {"transport": "ipc", "ip": sockets}})}


def _verdict(output: Path, problem: Exception | None, timeout: float) -> str | None:
    """What went wrong, most telling first: the limit, the cell's own error, what papermill raised."""
    if problem is None:
        return notebook_error(output)
    if type(problem).__name__ == "CellTimeoutError":
        return f"a cell passed the limit of {timeout:g} s"
    return (output.exists() and _cell_error(_code_cells(output))) or _first_line(problem)


def _code_cells(path: Path) -> list[Any]:
    import nbformat

    cells = nbformat.read(path, as_version=4).cells
    return [cell for cell in cells if cell.cell_type == "code" and cell.source.strip()]


def _cell_error(code: list[Any]) -> str | None:
    """The first error output as one line; a LabError's sentence stands for itself."""
    for output in (output for cell in code for output in cell.outputs):
        if output.output_type == "error":
            value = next(iter(output.evalue.strip().splitlines()), "")
            return value if output.ename == "LabError" else f"{output.ename}: {value}"
    return None


def _is_json(value: Any) -> bool:
    """Whether a value comes back from JSON as it was: no tuple, path, numpy scalar or NaN."""
    try:
        back = json.loads(json.dumps(value))
    except (TypeError, ValueError):
        return False
    return type(back) is type(value) and back == value


def _default(source: str) -> Any:
    import ast

    try:
        return ast.literal_eval(source)
    except (ValueError, SyntaxError):
        return None


def _same_kind(value: Any, default: Any) -> bool:
    if isinstance(value, bool) or isinstance(default, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    numbers = (int, float)
    return isinstance(value, type(default)) or (isinstance(value, numbers) and isinstance(default, float))


def _first_line(problem: BaseException) -> str:
    text = str(problem).strip().splitlines()
    return f"{type(problem).__name__}: {text[0]}" if text else type(problem).__name__
