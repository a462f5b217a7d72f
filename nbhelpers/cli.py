"""The commands ``nbhelpers run | models | doctor | memory | report | route | label | ui``.

Exit codes: 0 all is well, 1 a model failed (the others are reported) or the run was stopped, 2 wrong usage.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from nbhelpers.records import FailOnError, Failure, LabError, Limits, Settings
from nbhelpers.scoring.texts import printable

if TYPE_CHECKING:
    from nbhelpers.records import RunInfo

app = typer.Typer(
    help="Judge local language models: quality with error bars, speed, memory and cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
SETTINGS = {field.name: field for field in dataclasses.fields(Settings) if "help" in field.metadata}
LIMITS = {  # option -> the field of Limits, its least value, help
    "timeout": ("cell_s", 1, "Seconds a notebook's cell may take."),
    "model_timeout": ("model_s", 1, "Seconds for a model's notebooks."),
    "batch_timeout": ("generation_s", 0, "Seconds a generation may take."),
    "download_timeout": ("download_s", 1, "Seconds for a download."),
    "wait_for_memory": ("memory_wait_s", 0, "Seconds to wait for free memory."),
}
Run = Annotated[str, typer.Argument(help="A run's folder or name, or 'latest'.")]


def _with_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for each of SETTINGS and LIMITS in place of its ``**options``."""

    def option(name: str, kind: Any, default: Any, info: Any) -> inspect.Parameter:
        place = inspect.Parameter.KEYWORD_ONLY
        return inspect.Parameter(name, place, default=default, annotation=Annotated[kind, info])

    types, given = get_type_hints(Settings), inspect.signature(command, eval_str=True)
    parameters = list(given.parameters.values())[:-1]
    for name, setting in SETTINGS.items():
        info = typer.Option(help=setting.metadata["help"])
        parameters.append(option(name, types[name], setting.default, info))
    for name, (field, least, text) in LIMITS.items():
        parameters.append(option(name, float, getattr(Limits, field), typer.Option(min=least, help=text)))
    command.__signature__ = given.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


@app.command()
@_with_options
def run(
    context: typer.Context,
    models: Annotated[list[str] | None, typer.Argument(help="Alias, org/name, folder, shape:alias.")] = None,
    jobs: Annotated[int, typer.Option(min=0, help="Models at a time; 0: two small ones on a CPU.")] = 0,
    out: Annotated[str, typer.Option(help="Folder of this run; default: outputs/<date-time>.")] = "",
    resume: Annotated[str, typer.Option(help="Continue a run: its folder, its name, or 'latest'.")] = "",
    fail_on_error: Annotated[
        str, typer.Option(help="Failed samples that stop a run: true, a share, a count.")
    ] = "false",
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")] = False,
    **options: Any,
) -> None:
    """Evaluate models (default: the embedded ones) and write the report."""
    from nbhelpers.runner import plan as plans
    from nbhelpers.runner import progress, run

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    allowed = {field: options[name] for name, (field, _, _) in LIMITS.items()}
    limits = Limits(**allowed, fail_on_error=_tolerated(fail_on_error))
    if resume:
        _refuse_with_resume(context)
        plan = plans.plan_resume(resume)
    else:
        settings = Settings(**{name: options[name] for name in SETTINGS})
        plan = plans.plan_run(models or [], settings, out)
    try:
        with progress.watching(plan, quiet=as_json) as watch:
            info = run.run(plan, jobs or plans.default_jobs(plan), limits, watch)
    except KeyboardInterrupt:
        kept = "The run was stopped; what was finished is kept. Continue with: nbhelpers run --resume"
        raise LabError(f"{kept} {plan.run_dir}", Failure.STOPPED) from None
    _print_outcome(plan.run_dir, info, as_json)
    if any(status.status == "failed" for status in info.notebooks):
        raise typer.Exit(1)


def _refuse_with_resume(context: typer.Context) -> None:
    """A resumed run keeps its own settings: a changed one would mix two experiments."""
    for name in ("models", "out", *SETTINGS):
        if (source := context.get_parameter_source(name)) and source.name == "COMMANDLINE":
            flag = name if name == "models" else f"--{name.replace('_', '-')}"
            raise LabError(f"The option --resume keeps a run's own settings: leave out {flag} or start anew.")


def _tolerated(text: str) -> FailOnError:
    """--fail-on-error: true is the first failure, false none, a number below 1 a share. Raises LabError."""
    number = {"true": "1", "false": "0"}.get(text.lower(), text)
    if not re.fullmatch(r"[0-9]+(\.[0-9]*)?", number):
        raise LabError(f"The option --fail-on-error is {text!r}: give true, false, a share or a count (5).")
    value = float(number)
    return FailOnError(count=math.ceil(value)) if value >= 1 else FailOnError(share=value or None)


def _print_outcome(run_dir: Path, info: RunInfo, as_json: bool = False) -> None:
    """The comparison with its verdicts, what failed, and where the report is."""
    from nbhelpers import store
    from nbhelpers.comparison import compare

    path = run_dir / "comparison.json"
    comparison = store.read_json(path, compare.ComparisonReport) if path.exists() else None
    if as_json:
        print(json.dumps(comparison and dataclasses.asdict(comparison), indent=2))
        return
    lines = []
    if comparison:
        by_model = {result.model: result for result in compare.read_results(run_dir)[0]}
        lines.append(f"{comparison.primary}, 0 to 10, over {len(comparison.prompts)} prompts")
        lines.append(f"{'model':24} quality  95% interval  tokens/s  TTFT ms  weights MiB  finished  timing")
        for model, estimate in comparison.ranking.items():
            r, low, high = by_model[model], estimate.low, estimate.high
            interval = f"[{low:.2f}, {high:.2f}]" if low is not None else estimate.reason
            speed = r.metrics.get("latency/tokens_per_s/mean", math.nan)
            ttft_ms = 1000 * r.metrics.get("latency/ttft_s/mean", math.nan)
            lines.append(
                f"{model:24} {estimate.mean:7.2f}  {interval:>12}  {speed:8,.0f}  {ttft_ms:7,.1f}  "
                f"{r.metrics['memory/parameters_mib']:11,.1f}  {r.finished:>4}/{r.attempted:<3}  {r.noise}"
            )
        lines += [f"  {compare.verdict_sentence(pair)}" for pair in comparison.pairs]
        lines += ["", comparison.pick_reason, comparison.size_hypothesis]
        lines += [f"not compared: {model}: {reason}" for model, reason in comparison.excluded.items()]
    failed = [status for status in info.notebooks if status.status == "failed"]
    lines += [f"failed: {s.model or 'comparison'}, {s.notebook}: {s.error}" for s in failed]
    if kinds := compare.count_failures(run_dir, info):
        lines.append(f"failures: {', '.join(f'{count} {kind}' for kind, count in kinds.items())}")
    for line in (*lines, "", f"report  {run_dir / 'index.html'}", f"runs    {run_dir.parent / 'index.html'}"):
        print(printable(line))


@app.command()
def models() -> None:
    """List the registry: what can be evaluated by name."""
    from rich.console import Console
    from rich.table import Table

    from nbhelpers import registry

    table = Table("model", "kind", "family", "parameters", "context", "format", "licence", "gated", box=None)
    for s in registry.load_registry().values():
        size, context = f"{s.parameters / 1e6:,.1f} M" if s.parameters else "?", str(s.context or "?")
        gated = "yes" if s.gated else ""
        table.add_row(s.alias, s.kind, s.family, size, context, s.prompt_format, s.licence, gated)
    Console().print(table)
    print("Any other Hub repository (org/name), local folder or shape:<alias> works too.")


@app.command()
def doctor() -> None:
    """Show what this machine is, which dtype suits it, and whether the laboratory can run here."""
    from nbhelpers import registry, store
    from nbhelpers.devices import device
    from nbhelpers.loading import load
    from nbhelpers.runner import notebook

    report, gib = device.detect(), 2**30
    print(f"device    {report.device} ({report.name}), {report.cores} cores")
    print(f"memory    {report.memory_free_bytes / gib:.1f} of {report.memory_total_bytes / gib:.1f} GiB free")
    print(f"dtype     {report.dtype}: {report.dtype_reason}")
    print(f"versions  {', '.join(f'{name} {version}' for name, version in report.versions.items())}")
    print(f"outputs   {store.outputs_dir()}")
    paths = [notebook.notebook_path(name) for name in (*notebook.PIPELINE, notebook.COMPARISON)]
    problems = [f"notebooks/{path.name} is missing" for path in paths if not path.is_file()]
    for alias in registry.embedded_models():
        try:
            load.fetch(registry.resolve(alias))
        except LabError as error:
            problems.append(str(error))
    for problem in problems:
        print(f"problem   {problem}")
    print(f"{len(problems)} problems" if problems else "ready")
    raise typer.Exit(1 if problems else 0)


@app.command()
def memory(
    model: str,
    batch: Annotated[int, typer.Option(help="Rows at a time.")] = 1,
    tokens: Annotated[int, typer.Option(help="Tokens of a row.")] = 512,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Say what a model needs to generate, and whether it fits, before any download."""
    from nbhelpers import registry
    from nbhelpers.devices import fit
    from nbhelpers.loading.folder import inspect

    print(fit.summary(inspect(registry.resolve(model)), dtype, batch, tokens))


@app.command()
def report(run: Run = "latest") -> None:
    """Write a run's HTML report again, and the index of all runs."""
    from nbhelpers.report import html
    from nbhelpers.runner.plan import find_run

    folder = find_run(run)
    print(html.write_report(folder))
    print(html.write_runs_index(folder.parent))


@app.command()
def route(run: Run = "latest") -> None:
    """Choose a model for each content type of a finished run, and say why."""
    from nbhelpers.comparison import routing
    from nbhelpers.runner.plan import find_run

    found = routing.route_run(find_run(run))
    for row in found.routes:
        print(f"{row.model or 'no model':24} {row.reason}")
    print(f"{found.default or 'no model':24} everything else: {found.default_reason}")


@app.command()
def label(
    run: Run = "latest",
    read: Annotated[
        list[Path] | None, typer.Option(help="A filled-in sheet, named after its rater; may be repeated.")
    ] = None,
    judge: Annotated[str, typer.Option(help="Let this model rate the sheet's texts too.")] = "",
    count: Annotated[int, typer.Option(min=1, help="Texts on the sheet.")] = 40,
    seed: Annotated[int, typer.Option(help="Seed of the choice and order of the texts.")] = 0,
) -> None:
    """Have people rate a run's texts: write a blind sheet, read it back, tell how far raters agree."""
    from nbhelpers.comparison import labels
    from nbhelpers.runner.plan import find_run

    folder = find_run(run)
    try:
        if not read and not judge:
            print(labels.write_sheet(folder, count, seed))
            print(f"Give each rater a copy, named after them and without {labels.KEY}, to rate from 1 to 10.")
            print(f"Then: nbhelpers label {run} --read RATER.csv")
            return
        for sheet in read or []:
            labels.read_sheet(folder, sheet)
        if judge:
            labels.add_judge(folder, judge)
    except OSError as error:
        raise LabError(f"{error.filename or folder} cannot be written ({error.strerror}).") from None
    print("Krippendorff's alpha (1 is full agreement, 0 as by chance)")
    for found in labels.agreement(folder):
        interval = f"[{found.low:.2f}, {found.high:.2f}]" if found.low is not None else f"({found.reason})"
        mean = "" if found.mean is None else f"{found.mean:.2f} "
        print(f"  {found.name}: {mean}{interval} over {found.n} texts")


@app.command()
def ui(
    port: Annotated[int, typer.Option(min=1, max=65535)] = 5001,
    host: Annotated[str, typer.Option(help="Address to listen on; default: this machine.")] = "127.0.0.1",
) -> None:
    """Open the MLflow page over the laboratory's database."""
    import subprocess

    from nbhelpers.tracking import mlflow_run as tracking

    tracking.init_database()
    print(f"MLflow on http://{host}:{port} (Ctrl-C stops it)")
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", tracking.tracking_uri()]
    raise typer.Exit(subprocess.call([*command, "--host", host, "--port", str(port)]))


def main() -> None:
    """Entry point: a LabError becomes one sentence and exit code 2 (1 after an interrupt)."""
    try:
        app()
    except LabError as error:
        print(f"nbhelpers: {printable(str(error))}", file=sys.stderr)
        sys.exit(1 if error.kind is Failure.STOPPED else 2)


if __name__ == "__main__":
    main()
