"""The commands ``nbhelpers compare | gate``: anyone's logs, and whether a candidate may pass."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from nbhelpers.records import LabError
from nbhelpers.scoring.texts import printable

LOG = "A log, a folder of logs, or a run; LOG#MODEL takes one model of several."
Metric = Annotated[str, typer.Option(help="Metric, or all; default: the first of each task.")]
Task = Annotated[str, typer.Option(help="Only this task.")]
Margin = Annotated[
    float | None, typer.Option(help="Difference that matters; default: 0.5 points, 0.05 of a 0..1 metric.")
]
Lower = Annotated[list[str] | None, typer.Option(help="A metric of which less is better; may be repeated.")]
Cluster = Annotated[str, typer.Option(help="Field of an item that names its cluster (a passage, say).")]
Pool = Annotated[bool, typer.Option(help="Take all tasks as one, each a cluster of its items.")]
Filter = Annotated[str, typer.Option(help="Filter of lm-evaluation-harness; default: the first.")]
AnyPrompt = Annotated[bool, typer.Option(help="Pair items whose prompts differ, as by chat templates.")]
Json = Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")]


def compare(
    files: Annotated[list[str], typer.Argument(metavar="LOG...", help=LOG)],
    metric: Metric = "",
    task: Task = "",
    margin: Margin = None,
    lower_is_better: Lower = None,
    cluster: Cluster = "",
    pool: Pool = False,
    filter: Filter = "",
    any_prompt: AnyPrompt = False,
    out: Annotated[Path | None, typer.Option(help="Write comparison.json and index.html here.")] = None,
    export: Annotated[Path | None, typer.Option(help="Write a run's samples here, as lm-eval does.")] = None,
    as_json: Json = False,
) -> None:
    """Compare results made elsewhere: lm-evaluation-harness, Inspect, promptfoo, CSV or JSONL, runs."""
    from nbhelpers import store
    from nbhelpers.comparison import imports, logs

    if export:
        from nbhelpers.tracking import result

        print(*(result.export_samples(_log(file)[0], export) for file in files), sep="\n")
        return
    lower = tuple(lower_is_better or ())
    choice = logs.Choice(task, metric, margin, filter, cluster, pool, lower, any_prompt)
    found = logs.compare_logs([log for file in files for log in imports.read(*_log(file), choice)], choice)
    said = logs.lines(found)
    if out:
        from nbhelpers.report import html

        store.write_json(out / "comparison.json", found)
        said.append(f"report  {html.write_logs(out, found)}")
    print(store.as_json(found) if as_json else printable("\n".join(said)) + "\n", end="")


def gate(
    baseline: Annotated[str, typer.Argument(help=LOG)],
    candidate: Annotated[str, typer.Argument(help="What must not be worse.")],
    metric: Metric = "",
    task: Task = "",
    margin: Margin = None,
    lower_is_better: Lower = None,
    cluster: Cluster = "",
    pool: Pool = False,
    filter: Filter = "",
    any_prompt: AnyPrompt = False,
    budget: Annotated[
        list[str] | None, typer.Option(help="latency=1.2: at most 1.2 times the baseline's; or cost, ttft.")
    ] = None,
    allow_missing: Annotated[bool, typer.Option(help="Let a candidate pass that lacks items.")] = False,
    junit: Annotated[Path | None, typer.Option(help="Write the checks as JUnit XML.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write a comment for a pull request.")] = None,
    as_json: Json = False,
) -> None:
    """May the candidate pass? Exit code 0: not worse by the margin, 1: worse, 3: cannot tell, 2: usage."""
    from nbhelpers import store
    from nbhelpers.comparison import gate, imports, logs

    lower = tuple(lower_is_better or ())
    choice = logs.Choice(task, metric, margin, filter, cluster, pool, lower, any_prompt)
    old, new = (imports.read(*_log(file), choice) for file in (baseline, candidate))
    found = gate.gate(old, new, choice, dict(map(_budget, budget or [])), allow_missing)
    if junit:
        store.write_text(junit, [gate.junit(found)])
    if markdown:
        store.write_text(markdown, [gate.markdown(found)])
    print(store.as_json(found) if as_json else printable(gate.text(found)), end="")
    raise typer.Exit(gate.EXIT_CODES[found.outcome])


def _log(text: str) -> tuple[Path, str]:
    """The log or run that is meant, and its model, "" for all. LabError where there is none."""
    from nbhelpers.runner.plan import find_run

    name, _, model = (text, "", "") if Path(text).exists() else text.partition("#")
    if not Path(name).exists() and Path(name).suffix:
        raise LabError(f"There is no log {name}.")
    return Path(name) if Path(name).exists() else find_run(name), model


def _budget(text: str) -> tuple[str, float]:
    """latency=1.2 as a name and a factor. LabError for anything else."""
    name, _, factor = text.partition("=")
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", factor) or not float(factor):
        raise LabError(f"The budget {text!r} is not a name and a factor, as latency=1.2.")
    return name, float(factor)
