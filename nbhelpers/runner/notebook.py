"""One notebook, executed by papermill, checked, and turned into HTML.

A dead kernel, a cell timeout and ``sys.exit(0)`` all leave an output notebook whose metadata says that
every cell completed. So success is read off the cells: each non-empty code cell has an execution count,
and no cell holds an error output.
"""

import functools
import html
import logging
import re
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from nbhelpers import store
from nbhelpers.errors import FAILURES, failure_of
from nbhelpers.records import Failure, LabError, NotebookStatus
from nbhelpers.redact import redacted
from nbhelpers.runner import kernels

# Tags of cells that a run leaves out: what does not depend on the model, and what is there to learn from.
LEARNERS = {"alone", "exercise", "solution"}
PAGE = Path(__file__).parents[1] / "report" / "templates" / "notebook.html"
GRAMMAR = "rfc3987_syntax"  # of addresses in any script: jsonschema would compile it for 1.5 s, unasked
Problem = tuple[str, Failure]  # a sentence and its kind
_exporting = threading.Lock()  # an exporter makes one page at a time


def run_notebook(
    notebook: Path, output: Path, parameters: dict[str, Any], timeout_s: float, model: str = ""
) -> NotebookStatus:
    """Execute a notebook into ``output``, a page beside it; a failure is a status. timeout_s: of a cell."""
    started = time.monotonic()
    try:
        problem = _execute(notebook, output, parameters, timeout_s)
    except LabError as error:
        problem = str(error), error.kind
    except Exception as error:  # papermill, nbclient, kernels and disks have no common base
        first = "".join(str(error).strip().splitlines()[:1])
        problem = redacted(f"{type(error).__name__}: {first}".removesuffix(": ")), failure_of(error)
    status, seconds = "failed" if problem else "passed", round(time.monotonic() - started, 3)
    return NotebookStatus(notebook.stem, model, status, seconds, *(problem or ()))  # type: ignore[arg-type]


def _execute(notebook: Path, output: Path, parameters: dict[str, Any], timeout_s: float) -> Problem | None:
    options = {"engine_name": engine(), "kernel_name": "python3", "progress_bar": False}
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
    options["execution_timeout"] = max(1, int(timeout_s))
    try:
        log = output.with_name(kernels.LOG)
        with kernels.kernel_config(log) as config, suppress(PapermillExecutionError):  # a cell holds it
            papermill.execute_notebook(source, target, parameters, config=config, **options)
    finally:
        if output.exists():
            to_html(output)
    return notebook_error(output)


@functools.cache
def engine() -> str:
    """papermill's engine without the cells for learners. It saves a notebook at its start and, without
    secrets, at its end, however it ends; papermill's own saves it twice a cell."""
    grammar = sys.modules.setdefault(GRAMMAR, None)  # type: ignore[arg-type]
    from papermill.engines import NBClientEngine, papermill_engines

    if grammar is None:  # whoever needs it can import it again
        del sys.modules[GRAMMAR]

    class SavedOnce(NBClientEngine):
        @classmethod
        def execute_managed_notebook(cls, notebook: Any, *args: Any, **kwargs: Any) -> None:
            save, notebook.save = notebook.save, lambda **_: None
            cells = notebook.nb.cells
            notebook.nb.cells = [c for c in cells if not LEARNERS & set(c.metadata.get("tags", ()))]
            try:
                super().execute_managed_notebook(notebook, *args, **kwargs)
            finally:
                notebook.save, notebook.nb.cells = save, redacted(notebook.nb.cells)

    papermill_engines.register(SavedOnce.__name__, SavedOnce)
    return SavedOnce.__name__


def notebook_error(path: Path) -> Problem | None:
    """Why an executed notebook does not count as a success, and the kind of failure; None when it does."""
    import nbformat

    cells = nbformat.read(path, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code" and cell.source.strip()]
    for output in (output for cell in code for output in cell.outputs if output.output_type == "error"):
        value = next(iter(output.evalue.strip().splitlines()), "")
        if output.ename == "LabError":
            return value, Failure(output.traceback[-1])  # see LabError._render_traceback_
        return f"{output.ename}: {value}", FAILURES.get(output.ename, Failure.OTHER)
    if missing := sum(cell.execution_count is None for cell in code):
        early = f"the kernel stopped early: {missing} of {len(code)} code cells never ran"
        return early, Failure.DEAD_KERNEL
    return None


def to_html(path: Path) -> Path:
    """Write an executed notebook as one HTML file beside it, readable without a network.

    The template's scripts, which would fetch libraries from public servers, are cut out; the page's policy
    has the browser refuse whatever script or address a cell's own output may hold.
    """
    with _exporting:
        body, _ = exporter().from_filename(str(path))
    body = re.sub(r"<script\b.*?</script>", "", body, flags=re.DOTALL | re.IGNORECASE)
    return store.write_text(path.with_suffix(".html"), [body])


@functools.cache
def exporter() -> Any:
    """nbconvert's, by our template: plots have their titles, formulas are MathML, folded code is left out."""
    from latex2mathml.converter import convert
    from nbconvert import HTMLExporter
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
    from nbconvert.preprocessors import TagRemovePreprocessor

    class Renderer(IPythonRenderer):
        def block_math(self, body: str, mark: str = "$$") -> str:
            if mark == "$$" or not re.search(r"^\s|\s$|`", body):  # amounts of money, and code
                with suppress(Exception):  # whatever convert raises for what it cannot read
                    formula = str(convert(body, display="block" if mark == "$$" else "inline"))
                    return f'<span class="formula" tabindex="0">{formula}</span>' if mark == "$$" else formula
            return html.escape(f"{mark}{body}{mark}")

        def inline_math(self, body: str) -> str:
            return self.block_math(body, "$")

    def markdown(source: str) -> str:
        return str(MarkdownWithMath(Renderer(escape=False, exclude_anchor_links=True)).render(source))

    def title_of(source: str) -> str:
        return "".join(re.findall(r"""title[=(]\s*f?["'](.+?)["']""", source)[:1])

    html_exporter = HTMLExporter(raw_template=PAGE.read_text(encoding="utf-8"))
    html_exporter.register_preprocessor(TagRemovePreprocessor(remove_input_tags={"folded"}), enabled=True)
    html_exporter.register_filter("markdown2html", markdown)
    html_exporter.register_filter("title_of", title_of)
    return html_exporter
