"""The commands ``nbhelpers compare | gate``: anyone's logs, and whether a candidate may pass."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from nbhelpers import store
from nbhelpers.options import Choice, with_options
from nbhelpers.records import LabError

LOG_HELP = "A log, a folder of logs, or a run; LOG#MODEL takes one model of several."
Json = Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")]


@with_options(Choice)
def compare(
    files: Annotated[list[str], typer.Argument(metavar="LOG...", help=LOG_HELP)],
    out: Annotated[Path | None, typer.Option(help="Write comparison.json and index.html here.")] = None,
    export: Annotated[Path | None, typer.Option(help="Write a run's samples here, as lm-eval does.")] = None,
    dataset: Annotated[
        Path | None, typer.Option(help="Write a run's samples here, as a Hugging Face dataset.")
    ] = None,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Compare results made elsewhere: lm-evaluation-harness, Inspect, promptfoo, CSV or JSONL, runs."""
    from nbhelpers.logs import compare
    from nbhelpers.report import html

    if export or dataset:
        from nbhelpers.tracking import result

        if len(files) > 1:
            raise LabError("The options --export and --dataset write one run at a time: name one.")
        for folder, write in ((export, result.export_samples), (dataset, result.export_dataset)):
            if folder:
                print(write(_log(files[0])[0], folder))
        return
    choice = Choice(**options)
    logs = [log for file in files for log in compare.read_logs(*_log(file), choice)]
    report = compare.compare_logs(logs, choice)
    page = out and html.write_logs(out, report, logs)
    if out:
        store.write_json(out / "comparison.json", report)
    print(store.as_json(report).rstrip() if as_json else html.rendered("logs.txt", found=report, page=page))


@with_options(Choice)
def gate(
    baseline: Annotated[str, typer.Argument(help=LOG_HELP)],
    candidate: Annotated[str, typer.Argument(help="What must not be worse.")],
    budget: Annotated[
        list[str] | None, typer.Option(help="latency=1.2: at most 1.2 times the baseline's; or cost, ttft.")
    ] = None,
    junit: Annotated[Path | None, typer.Option(help="Write the checks as JUnit XML.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write a comment for a pull request.")] = None,
    as_json: Json = False,
    **options: Any,
) -> None:
    """May the candidate pass? Exit code 0: not worse by the margin, 1: worse, 3: cannot tell, 2: usage."""
    from nbhelpers.logs import compare, gate
    from nbhelpers.report import html

    choice = Choice(**options)
    old, new = (compare.read_logs(*_log(file), choice) for file in (baseline, candidate))
    report = gate.gate_logs(old, new, choice, dict(map(_budget, budget or [])))
    for path, template in ((junit, "gate.xml"), (markdown, "gate.md")):
        if path:
            store.write_text(path, [html.rendered(template, found=report)])
    print(store.as_json(report).rstrip() if as_json else html.rendered("gate.txt", found=report))
    raise typer.Exit(gate.EXIT_CODES[report.outcome])


def _log(text: str) -> tuple[Path, str]:
    """LOG#MODEL as the path of a log or run, and the model, "" for all. LabError where there is none."""
    from nbhelpers.runner.plan import find_run

    name, _, model = (text, "", "") if Path(text).exists() else text.partition("#")
    if not Path(name).exists() and Path(name).suffix:
        raise LabError(f"There is no log {name}.")
    return Path(name) if Path(name).exists() else find_run(name), model


def _budget(text: str) -> tuple[str, float]:
    """latency=1.2 as a metric and a factor. LabError for anything else."""
    metric, _, factor = text.partition("=")
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", factor) or not float(factor):
        raise LabError(f"The budget {text!r} is not a name and a factor, as latency=1.2.")
    return metric, float(factor)
