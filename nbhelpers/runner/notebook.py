"""One notebook, executed by papermill, checked, and turned into HTML.

A dead kernel, a cell timeout and ``sys.exit(0)`` all leave an output notebook whose metadata says that
every cell completed. So success is read off the cells: each non-empty code cell has an execution count,
and no cell holds an error output.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nbhelpers import store
from nbhelpers.records import Failure, LabError, NotebookStatus
from nbhelpers.redact import redacted
from nbhelpers.runner import kernels

PIPELINE = (
    *("01_device_detection", "02_loading", "03_generation"),
    *("04_scoring", "05_statistics", "06_tracking"),
)
COMPARISON = "07_comparison"
ENGINE = "saved once"
HTML_POLICY = "default-src 'none'; img-src data:; font-src data:; style-src 'unsafe-inline'"
KINDS = {
    "CellTimeoutError": Failure.TIMEOUT,
    "TimeoutError": Failure.TIMEOUT,
    "DeadKernelError": Failure.DEAD_KERNEL,
    "MemoryError": Failure.OUT_OF_MEMORY,
    "OutOfMemoryError": Failure.OUT_OF_MEMORY,
}
Problem = tuple[str, Failure]  # a sentence and its kind


def notebook_path(name: str) -> Path:
    return store.project_root() / "notebooks" / f"{name}.ipynb"


def _unformatted(path: Path) -> str:
    """A path for papermill, which formats it with the parameters, such that it comes out unchanged."""
    return str(path).replace("{", "{{").replace("}", "}}")


def run_notebook(
    notebook: Path, output: Path, parameters: Mapping[str, Any], timeout_s: float, model: str = ""
) -> NotebookStatus:
    """Execute one notebook into `output`; every failure of its cells is a status, not an exception.

    timeout_s: for one cell. Raises LabError for an unknown parameter, before anything runs.
    """
    import papermill

    _register_engine()
    known = papermill.inspect_notebook(_unformatted(notebook))
    if unknown := ", ".join(sorted(parameters.keys() - known.keys())):  # papermill itself only warns
        has = ", ".join(known) or "none: tag the cell with its defaults 'parameters'"
        raise LabError(f"{notebook.name} has no parameter {unknown!r}; it has {has}.")
    output.parent.mkdir(parents=True, exist_ok=True)
    for stale in (output, output.with_suffix(".html")):
        stale.unlink(missing_ok=True)
    started, raised = time.monotonic(), None
    with tempfile.TemporaryDirectory(prefix="nb") as sockets:
        try:
            papermill.execute_notebook(
                _unformatted(notebook),
                _unformatted(output),
                parameters=dict(parameters),
                kernel_name="python3",
                engine_name=ENGINE,
                progress_bar=False,
                execution_timeout=max(1, int(timeout_s)),
                config=kernels.kernel_config(output.with_name(kernels.LOG), sockets),
            )
        except Exception as problem:  # papermill, nbclient and kernel errors have no common base
            raised = problem
    found = notebook_error(output, raised)
    if type(raised).__name__ == "CellTimeoutError":
        found = f"a cell passed the limit of {timeout_s:g} s", Failure.TIMEOUT
    status, seconds = "failed" if found else "passed", round(time.monotonic() - started, 3)
    return NotebookStatus(notebook.stem, model, status, seconds, *(found or ()))  # type: ignore[arg-type]


def _register_engine() -> None:
    """papermill's engine but for saving: it writes the whole notebook twice a cell, 14 ms each time.

    Models run in threads of one process, which wait for each other meanwhile. What is left is the notebook
    at its start and at its end, however it ends.
    """
    from papermill.engines import NBClientEngine, papermill_engines

    class SavedOnce(NBClientEngine):
        @classmethod
        def execute_managed_notebook(cls, notebook: Any, *args: Any, **kwargs: Any) -> None:
            save, notebook.save = notebook.save, lambda **_: None
            try:
                super().execute_managed_notebook(notebook, *args, **kwargs)
            finally:
                notebook.save = save
                for cell in notebook.nb.cells:
                    if "outputs" in cell:
                        cell.outputs = redacted(cell.outputs)

    papermill_engines.register(ENGINE, SavedOnce)


def notebook_error(path: Path, raised: Exception | None = None) -> Problem | None:
    """Why an executed notebook does not count as a success, and the kind of failure; None when it does.

    raised: by papermill. A LabError's sentence stands for itself; its traceback ends with its kind.
    """
    import nbformat

    try:
        cells = nbformat.read(path, as_version=4).cells
    except Exception as problem:  # nbformat's errors have no common base
        unread = f"{path.name} could not be read: {describe(problem)[0]}"
        return describe(raised) if raised else (unread, Failure.OTHER)
    code = [cell for cell in cells if cell.cell_type == "code" and cell.source.strip()]
    for output in (output for cell in code for output in cell.outputs if output.output_type == "error"):
        value = next(iter(output.evalue.strip().splitlines()), "")
        if output.ename == "LabError":
            return value, Failure(output.traceback[-1])
        return f"{output.ename}: {value}", KINDS.get(output.ename, Failure.OTHER)
    missing = sum(cell.execution_count is None for cell in code)
    early = f"the kernel stopped early: {missing} of {len(code)} code cells never ran"
    return describe(raised) if raised else (early, Failure.DEAD_KERNEL) if missing else None


def describe(problem: Exception) -> Problem:
    """An exception in one line, and its kind."""
    if isinstance(problem, LabError):
        return str(problem), problem.kind
    name, text = type(problem).__name__, str(problem).strip().splitlines()
    return redacted(f"{name}: {text[0]}") if text else name, KINDS.get(name, Failure.OTHER)


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
    return store.write_text(path.with_suffix(".html"), [body.replace("<head>", f"<head>{policy}", 1)])
