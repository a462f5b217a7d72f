"""One notebook, executed by papermill, checked, and turned into HTML.

A dead kernel, a cell timeout and ``sys.exit(0)`` all leave an output notebook whose metadata says that
every cell completed. So success is read off the cells: each non-empty code cell has an execution count,
and no cell holds an error output.
"""

from __future__ import annotations

import html
import logging
import re
import time
import uuid
from pathlib import Path
from typing import Any

from nbhelpers import store, tasks
from nbhelpers.records import Failure, LabError, ModelSpec, NotebookStatus
from nbhelpers.redact import redacted
from nbhelpers.runner import kernels

PIPELINE: tuple[str, ...] = (
    *("01_device_detection", "02_loading", "03_generation"),
    *("04_scoring", "05_statistics", "06_tracking"),
)
SERVED: tuple[str, ...] = (PIPELINE[0], "03_server", *PIPELINE[3:])  # of a model whose weights are not here
OWN_TASK = "04_own_task"  # in place of 04_scoring where the task is not the posts
COMPARISON = "07_comparison"
# Tags of cells that a run leaves out: what does not depend on the model, and what is there to learn from.
LEARNERS = {"alone", "exercise", "solution"}
NO_ALT = 'alt="No description has been provided for this image"'  # nbconvert's
# Colours of the template whose contrast with their background is below 4.5 (WCAG 2.2), made darker.
READABLE = (
    ":root{--jp-mirror-editor-operator-color:#7a1fc4;--jp-mirror-editor-number-color:#006400;"
    "--jp-mirror-editor-comment-color:#2f6060}.jp-InputPrompt,.jp-OutputPrompt{opacity:1!important;"
    "color:#595959!important}.jp-RenderedHTMLCommon a{text-decoration:underline!important}"
)
# $$…$$ and $…$ in a text, as JupyterLab has them; code is left alone, and so are amounts of money.
MATH = re.compile(
    r"```.*?```|`[^`]*`|\$\$(.+?)\$\$|(?<![\\\w$])\$(?!\s)([^$`\n]+?)(?<!\s)\$(?!\w)", re.DOTALL
)
HTML_POLICY = "default-src 'none'; img-src data:; font-src data:; style-src 'unsafe-inline'"
KINDS = {
    "CellTimeoutError": Failure.TIMEOUT,
    "TimeoutError": Failure.TIMEOUT,
    "DeadKernelError": Failure.DEAD_KERNEL,
    "MemoryError": Failure.OUT_OF_MEMORY,
    "OutOfMemoryError": Failure.OUT_OF_MEMORY,
}
Problem = tuple[str, Failure]  # a sentence and its kind


def pipeline_of(spec: ModelSpec, task: str = "") -> tuple[str, ...]:
    """The notebooks that a run executes for a model."""
    own = {} if tasks.load_task(task) is tasks.POSTS else {"04_scoring": OWN_TASK}
    return tuple(own.get(name, name) for name in (SERVED if spec.kind == "server" else PIPELINE))


def notebook_path(name: str) -> Path:
    return store.project_root() / "notebooks" / f"{name}.ipynb"


def run_notebook(
    notebook: Path, output: Path, parameters: dict[str, Any], timeout_s: float, model: str = ""
) -> NotebookStatus:
    """Execute one notebook into ``output``, with a page beside it; whatever fails is a status.

    timeout_s: for one cell.
    """
    started = time.monotonic()
    try:
        found = _execute(notebook, output, parameters, timeout_s)
    except Exception as problem:  # papermill, nbclient, kernels and disks have no common base
        found = describe(problem)
    status, seconds = "failed" if found else "passed", round(time.monotonic() - started, 3)
    return NotebookStatus(notebook.stem, model, status, seconds, *(found or ()))  # type: ignore[arg-type]


def _execute(notebook: Path, output: Path, parameters: dict[str, Any], timeout_s: float) -> Problem | None:
    import papermill
    from papermill.exceptions import PapermillExecutionError

    logging.getLogger("papermill").setLevel(logging.CRITICAL)  # what it reports is in the status
    # papermill formats paths with the parameters: these come out unchanged.
    source, target = (str(path).replace("{", "{{").replace("}", "}}") for path in (notebook, output))
    if unknown := parameters.keys() - papermill.inspect_notebook(source).keys():  # papermill only warns
        raise LabError(f"{notebook.name} has no parameter {', '.join(sorted(unknown))}.")
    output.parent.mkdir(parents=True, exist_ok=True)
    for stale in (output, output.with_suffix(".html")):
        stale.unlink(missing_ok=True)
    how = {"engine_name": _engine(), "kernel_name": "python3", "progress_bar": False}
    how["execution_timeout"] = max(1, int(timeout_s))
    try:
        with kernels.kernel_config(output.with_name(kernels.LOG)) as config:
            papermill.execute_notebook(source, target, parameters, config=config, **how)
    except PapermillExecutionError:
        pass  # a cell says it
    finally:
        if output.exists():
            to_html(output)
    return notebook_error(output)


def _engine() -> str:
    """papermill's engine without the cells for learners, and without saving the notebook twice a cell.

    It is saved at its start and, without secrets, at its end, however it ends.
    """
    from papermill.engines import NBClientEngine, papermill_engines

    class SavedOnce(NBClientEngine):
        @classmethod
        def execute_managed_notebook(cls, notebook: Any, *args: Any, **kwargs: Any) -> None:
            save, notebook.save = notebook.save, lambda **_: None
            left = [cell for cell in notebook.nb.cells if not LEARNERS & set(cell.metadata.get("tags", ()))]
            notebook.nb.cells = left
            try:
                super().execute_managed_notebook(notebook, *args, **kwargs)
            finally:
                notebook.save, notebook.nb.cells = save, redacted(notebook.nb.cells)

    papermill_engines.register(SavedOnce.__name__, SavedOnce)
    return SavedOnce.__name__


def notebook_error(path: Path) -> Problem | None:
    """Why an executed notebook does not count as a success, and the kind of failure; None when it does.

    A LabError's sentence stands for itself; its traceback ends with its kind.
    """
    import nbformat

    cells = nbformat.read(path, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code" and cell.source.strip()]
    for output in (output for cell in code for output in cell.outputs if output.output_type == "error"):
        value = next(iter(output.evalue.strip().splitlines()), "")
        if output.ename == "LabError":
            return value, Failure(output.traceback[-1])
        return f"{output.ename}: {value}", KINDS.get(output.ename, Failure.OTHER)
    if missing := sum(cell.execution_count is None for cell in code):
        early = f"the kernel stopped early: {missing} of {len(code)} code cells never ran"
        return early, Failure.DEAD_KERNEL
    return None


def describe(problem: Exception) -> Problem:
    """An exception in one line, and its kind."""
    if isinstance(problem, LabError):
        return str(problem), problem.kind
    name, text = type(problem).__name__, str(problem).strip().splitlines()
    return redacted(f"{name}: {text[0]}") if text else name, KINDS.get(name, Failure.OTHER)


def to_html(path: Path) -> Path:
    """Write an executed notebook as one HTML file beside it, readable without a network.

    The template's scripts, which would fetch libraries from public servers, are cut out; the page's policy
    has the browser refuse whatever script or address a cell's own output may hold. Folded code is left out.
    """
    import nbformat
    from nbconvert import HTMLExporter
    from nbconvert.preprocessors import TagRemovePreprocessor

    exporter = HTMLExporter(embed_images=True, exclude_anchor_links=True)
    hidden = TagRemovePreprocessor(remove_input_tags={"folded"}, enabled=True)
    exporter.register_preprocessor(hidden, enabled=True)
    notebook, formulas, titles = nbformat.read(path, as_version=4), dict[str, str](), list[str]()
    for cell in notebook.cells:
        pictures = [o for o in cell.get("outputs", ()) if "image/png" in o.get("data", {})]
        title = re.search(r"""title[=(]\s*f?["'](.+?)["']""", cell.source)  # what a reader hears of a plot
        titles += [title[1] if title else "see the text around it"] * len(pictures)
        if cell.cell_type == "markdown":
            cell.source = MATH.sub(lambda found: _formula(found, formulas), cell.source)
    body, _ = exporter.from_notebook_node(
        notebook, {"metadata": {"name": path.stem, "path": str(path.parent)}}
    )
    for mark, formula in formulas.items():
        body = body.replace(mark, formula)
    alt = (f'alt="Plot: {html.escape(title)}"' for title in titles)
    body = re.sub(NO_ALT, lambda _: next(alt, 'alt="Plot"'), body)
    body = re.sub(r"<script\b.*?</script>", "", body, flags=re.DOTALL | re.IGNORECASE)
    policy = f'<meta http-equiv="Content-Security-Policy" content="{HTML_POLICY}"/>'
    body = body.replace("<head>", f"<head>{policy}", 1).replace(
        "</head>", f"<style>{READABLE}</style></head>", 1
    )
    return store.write_text(path.with_suffix(".html"), [body])


def _formula(found: re.Match[str], formulas: dict[str, str]) -> str:
    """A mark for a formula; ``formulas`` gets its MathML, which browsers show without a script."""
    from latex2mathml.converter import convert

    block, inline = found.groups()
    if not (block or inline):
        return found[0]
    mark = uuid.uuid4().hex  # no text of a model holds it
    try:
        formulas[mark] = convert(block or inline, display="block" if block else "inline")
    except Exception:  # whatever it raises for what it cannot read: shown as it is written
        return found[0]
    return mark
