"""Real kernels on tiny notebooks: what counts as success, what a failure says, and what the HTML holds."""

import html.parser
import json
import os
import re
import sys
from pathlib import Path

import nbformat
import pytest

from nbhelpers.records import Failure
from nbhelpers.runner import kernels
from nbhelpers.runner.notebook import notebook_error, run_notebook, to_html

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="

DEFAULTS = 'name = "a"\ncount = 1\nrate = 0.5\nquick = False\nlimit = None\nitems = [1]'


def write(folder: Path, *sources: str, parameters: str | None = DEFAULTS, stem: str = "01_tiny") -> Path:
    cells = [nbformat.v4.new_markdown_cell("# Tiny")]
    if parameters is not None:
        cells.append(nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    cells += [nbformat.v4.new_code_cell(source) for source in sources]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    path = folder / f"{stem}.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


def run(folder: Path, *sources: str, parameters: dict | None = None, timeout: float = 60):
    output = folder / "out" / "01_tiny.ipynb"
    return run_notebook(write(folder, *sources), output, parameters or {}, timeout, "m"), output


def texts(path: Path) -> str:
    cells = nbformat.read(path, as_version=4).cells
    return "".join(o.get("text", "") for c in cells if c.cell_type == "code" for o in c.outputs)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """One notebook that passes and prints everything a page could choke on, with its HTML."""
    folder = tmp_path_factory.mktemp("page")
    status, output = run(
        folder,
        "print((name, count, rate, quick, limit, items))",
        "print('<script>alert(1)</script> https://example.org/x.js')\n'<img src=x onerror=alert(2)>'",
        "import os, sys; print(os.environ['TQDM_DISABLE'], sys.executable)",
        "from IPython.display import HTML, Markdown, display\n"
        "display(HTML('<script>alert(3)</script>'), Markdown('<script>alert(4)</script>'))",
        f"import base64; from IPython.display import Image; Image(base64.b64decode({PIXEL!r}))",
        parameters={"name": "</script><script>alert(5)", "count": 2, "rate": 1, "quick": True, "limit": 5},
    )
    return status, output, to_html(output)


def test_a_notebook_that_runs_through_passes_with_its_parameters(page):
    status, output, _ = page
    assert (status.notebook, status.model, status.status, status.error) == ("01_tiny", "m", "passed", None)
    assert status.seconds > 0
    assert texts(output).startswith("('</script><script>alert(5)', 2, 1, True, 5, [1])\n")
    assert "1 " in texts(output)
    assert notebook_error(output) is None
    assert output.with_suffix(".html").exists()


def test_a_notebook_is_written_at_its_start_and_end_and_not_between(tmp_path):
    look = f"import os; print('seen', os.stat({str(tmp_path / 'out' / '01_tiny.ipynb')!r}).st_mtime_ns)"
    status, output = run(tmp_path, look, look, look)
    assert status.status == "passed"
    seen = re.findall(r"seen (\d+)", texts(output))
    assert len(seen) == 3 and len(set(seen)) == 1
    assert output.stat().st_mtime_ns > int(seen[0])


def test_stderr_of_the_kernel_is_quiet(page):
    cells = nbformat.read(page[1], as_version=4).cells
    assert not [o for c in cells if c.cell_type == "code" for o in c.outputs if o.get("name") == "stderr"]


class Page(html.parser.HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.addresses, self.policy = set(), [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        values = dict(attributes)
        self.addresses += [values[name] for name in ("src", "href", "data", "srcset") if name in values]
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policy = values["content"]


def test_the_html_runs_no_script_and_fetches_nothing(page):
    text = page[2].read_text(encoding="utf-8")
    parsed = Page(text)
    assert "script" not in parsed.tags
    assert all(address.startswith(("data:", "#")) for address in parsed.addresses), parsed.addresses
    assert not re.search(r"@import|url\((?!['\"]?data:)", text)
    assert "img" in parsed.tags  # the picture is inside the page
    # What a notebook displays as HTML on purpose is held back by the browser.
    assert "default-src 'none'" in parsed.policy
    assert "script-src" not in parsed.policy


def test_texts_of_a_model_are_escaped(page):
    text = page[2].read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    for number in range(1, 6):
        assert f"<script>alert({number})" not in text
    assert "<img src=x" not in text


@pytest.mark.parametrize(
    "source, error, kind",
    [
        ("1 / 0", "ZeroDivisionError: division by zero", Failure.OTHER),
        ("raise MemoryError('no room')", "MemoryError: no room", Failure.OUT_OF_MEMORY),
        (
            "from nbhelpers.records import Failure, LabError\n"
            "raise LabError('One clear sentence.', Failure.DOWNLOAD)",
            "One clear sentence.",
            Failure.DOWNLOAD,
        ),
        ("import sys; sys.exit(0)", "SystemExit: 0", Failure.OTHER),
        ("import os; os._exit(1)", "DeadKernelError: Kernel died", Failure.DEAD_KERNEL),
    ],
    ids=["exception", "memory", "LabError", "sys.exit", "os._exit"],
)
def test_a_failing_cell_is_a_status_with_one_line_and_a_kind(tmp_path, source, error, kind):
    status, output = run(tmp_path, "x = 1", source, "y = 2")
    assert (status.status, status.error, status.failure) == ("failed", error, kind)
    assert notebook_error(output) is not None
    assert to_html(output).stat().st_size > 1000


def test_a_cell_that_passes_its_limit_is_stopped(tmp_path):
    status, _ = run(tmp_path, "while True: pass", "y = 2", timeout=1)
    assert (status.status, status.error) == (
        "failed",
        "CellTimeoutError: A cell timed out while it was being executed, after 1 seconds.",
    )
    assert status.failure is Failure.TIMEOUT
    assert status.seconds < 30


def test_a_kernel_that_cannot_start_is_the_reason_given(tmp_path, monkeypatch):
    """What an earlier run left in the output folder must not speak for this one."""

    def start(*arguments, **more):
        raise FileNotFoundError("no-such-python")

    monkeypatch.setattr(kernels, "start", start)
    output = tmp_path / "out" / "01_tiny.ipynb"
    output.parent.mkdir()
    old = [nbformat.v4.new_code_cell("1 / 0", outputs=[nbformat.v4.new_output("error", ename="Old")])]
    nbformat.write(nbformat.v4.new_notebook(cells=old), output)
    output.with_suffix(".html").write_text("old")
    status, _ = run(tmp_path, "x = 1")
    assert status.status == "failed"
    assert "FileNotFoundError" in status.error and "no-such-python" in status.error
    assert output.with_suffix(".html").read_text() != "old"


def test_a_kernel_is_of_the_runner_s_python_whatever_is_installed_under_its_name(tmp_path, monkeypatch):
    kernel = tmp_path / "kernels" / "python3" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    argv = [str(tmp_path / "no-such-python"), "{connection_file}"]
    kernel.write_text(json.dumps({"argv": argv, "display_name": "Python 3", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    status, output = run(tmp_path, "import sys; print(sys.executable)")
    assert status.status == "passed"
    assert texts(output) == f"{sys.executable}\n"


@pytest.mark.skipif(os.name != "posix", reason="socket paths")
def test_a_long_path_of_temporary_files_does_not_stop_the_kernel(tmp_path, monkeypatch):
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    deep.mkdir(parents=True)
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    status, _ = run(tmp_path, "x = 1")
    assert status.error is None


@pytest.mark.parametrize("defaults", [DEFAULTS, None])
def test_an_unknown_parameter_is_refused_before_anything_runs(tmp_path, defaults):
    output, notebook = tmp_path / "out.ipynb", write(tmp_path, "1", parameters=defaults)
    status = run_notebook(notebook, output, {"nmae": "x"}, 60)
    assert (status.error, status.failure) == ("01_tiny.ipynb has no parameter nmae.", Failure.USAGE)
    assert not output.exists()


@pytest.mark.parametrize("content", [None, "", "{}", "not json"])
def test_a_file_that_is_no_notebook_is_a_failure_not_a_crash(tmp_path, content):
    path = tmp_path / "01_tiny.ipynb"
    if content is not None:
        path.write_text(content)
    assert run_notebook(path, tmp_path / "out.ipynb", {}, 60).status == "failed"


def test_a_run_leaves_out_what_is_there_to_learn_from_and_its_page_folded_code(tmp_path):
    path = write(tmp_path)
    notebook = nbformat.read(path, as_version=4)
    notebook.cells += [
        nbformat.v4.new_code_cell(f"print('seen', {n}); secret_of_{tag} = 1", metadata={"tags": [tag]})
        for n, tag in enumerate(("folded", "exercise", "solution", "alone"))
    ]
    notebook.cells.append(nbformat.v4.new_markdown_cell("secret_of_text", metadata={"tags": ["alone"]}))
    nbformat.write(notebook, path)
    output = tmp_path / "out.ipynb"
    assert run_notebook(path, output, {}, 60).status == "passed"
    assert texts(output) == "seen 0\n"
    page = output.with_suffix(".html").read_text()
    assert "seen 0" in page and "secret_of_" not in page


def test_a_picture_is_described_by_its_plots_title(tmp_path):
    picture = nbformat.v4.new_output("display_data", data={"image/png": PIXEL})
    sources = ('ax.set(title="Which is <faster>?")', "plots.ranking(report)")
    said = nbformat.v4.new_output("stream", text="No description has been provided for this image")
    cells = [nbformat.v4.new_code_cell("print(text)", outputs=[said])]
    cells += [nbformat.v4.new_code_cell(source, outputs=[picture]) for source in sources]
    path = tmp_path / "page.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    page = to_html(path).read_text()
    assert page.count("No description has been provided for this image</pre>") == 1  # a text that says so
    assert re.findall(r'alt="(.*?)"', page) == [
        "Plot: Which is &lt;faster&gt;?",
        "Plot: see the text around it",
    ]


def test_formulas_are_shown_without_a_script_and_money_and_code_stay(tmp_path):
    text = "The mean $\\bar x$ costs $5 or $6, as `$PWD` says:\n\n$$\\frac{s}{\\sqrt{n}}$$\n\nand $$\\nope{$$"
    path = tmp_path / "page.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)]), path)
    page = to_html(path).read_text()
    body = page[page.index("<body") :]
    assert body.count("<math") == 2 and 'display="block"' in body and "<mfrac>" in body
    assert "costs $5 or $6" in body and "<code>$PWD</code>" in body
