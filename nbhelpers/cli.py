"""The commands ``nbhelpers run | models | doctor | memory | report | route | label | quiz | ui``.

Exit codes: 0 all is well, 1 some model failed (the others are reported), 2 wrong usage.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nbhelpers import quiz
from nbhelpers.records import LabError, Settings
from nbhelpers.scoring.texts import printable

if TYPE_CHECKING:
    from nbhelpers.comparison.compare import ComparisonReport
    from nbhelpers.records import Result, RunInfo
    from nbhelpers.runner.run import Plan

app = typer.Typer(
    help="Judge local language models: quality with error bars, speed, memory and cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("quiz")(quiz.command)
RUN_SETTINGS = ("prompts", "limit", "repeats", "max_new_tokens", "seed", "device", "dtype")


@app.command()
def run(
    context: typer.Context,
    models: Annotated[
        list[str] | None, typer.Argument(help="Alias, org/name, folder or shape:alias.")
    ] = None,
    prompts: Annotated[str, typer.Option(help="JSONL file of prompts; default: 15 benchmark prompts.")] = "",
    limit: Annotated[int | None, typer.Option(help="Only the first N prompts.")] = None,
    repeats: Annotated[int, typer.Option(help="Generations per prompt.")] = 4,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
    seed: Annotated[int, typer.Option(help="Seed of all sampling.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps or xpu.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto",
    jobs: Annotated[int, typer.Option(min=0, help="Models at a time; 0: two small ones on a CPU.")] = 0,
    out: Annotated[str, typer.Option(help="Folder of this run; default: outputs/<date-time>.")] = "",
    resume: Annotated[str, typer.Option(help="Continue a run: its folder, its name, or 'latest'.")] = "",
    timeout: Annotated[float, typer.Option(min=1, help="Seconds a notebook's cell may take.")] = 1800,
    model_timeout: Annotated[float, typer.Option(min=1, help="Seconds for a model's notebooks.")] = 21600,
    batch_timeout: Annotated[float, typer.Option(min=0, help="Seconds a generation may take.")] = 300,
    download_timeout: Annotated[float, typer.Option(min=1, help="Seconds for a download.")] = 1800,
    wait_for_memory: Annotated[float, typer.Option(min=0, help="Seconds to wait for free memory.")] = 0,
    fail_on_error: Annotated[
        str, typer.Option(help="Stop at failed samples of a model: true, a share, a count or false.")
    ] = "false",
    json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")] = False,
) -> None:
    """Evaluate models (default: the embedded ones) and write the report."""
    from nbhelpers.runner import limits, progress
    from nbhelpers.runner import run as batch

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    tolerated = limits.fail_on_error(fail_on_error)
    allowed = limits.Limits(
        timeout, model_timeout, batch_timeout, download_timeout, wait_for_memory, tolerated
    )
    if resume:
        _refuse_with_resume(context)
        plan = batch.plan_resume(resume)
    else:
        settings = Settings(**{name: context.params[name] for name in RUN_SETTINGS})
        plan = batch.plan_run(models or [], settings, out)
    try:
        with progress.watching(plan, quiet=json) as watch:
            info = batch.run(plan, jobs or batch.default_jobs(plan), allowed, watch)
    except KeyboardInterrupt:
        raise LabError(
            f"stopped; what was finished is kept. Continue with: nbhelpers run --resume {plan.run_dir}"
        ) from None
    comparison = _comparison(plan)
    if json:
        print(_json(comparison))
    else:
        _print_outcome(plan, info, comparison)
    if any(status.status == "failed" for status in info.notebooks):
        raise typer.Exit(1)


@app.command()
def models() -> None:
    """List the registry: what can be evaluated by name."""
    from rich.table import Table

    from nbhelpers import registry

    table = Table("model", "kind", "family", "parameters", "context", "format", "licence", "gated", box=None)
    for spec in registry.load_registry().values():
        size = f"{spec.parameters / 1e6:,.1f} M" if spec.parameters else "?"
        context, gated = str(spec.context or "?"), "yes" if spec.gated else ""
        table.add_row(
            spec.alias, spec.kind, spec.family, size, context, spec.prompt_format, spec.licence, gated
        )
    _console().print(table)
    print("Any other Hub repository (org/name), local folder or shape:<alias> works too.")


@app.command()
def doctor() -> None:
    """Show what this machine is, which dtype suits it, and whether the laboratory can run here."""
    from nbhelpers import registry, store
    from nbhelpers.devices import device as devices

    report = devices.detect()
    gib = 2**30
    print(f"device    {report.device} ({report.name}), {report.cores} cores")
    print(f"memory    {report.memory_free_bytes / gib:.1f} of {report.memory_total_bytes / gib:.1f} GiB free")
    print(f"dtype     {report.dtype}: {report.dtype_reason}")
    print(f"versions  {', '.join(f'{name} {version}' for name, version in report.versions.items())}")
    print(f"outputs   {store.outputs_dir()}")
    problems = list(_problems(registry.embedded_models()))
    for problem in problems:
        print(f"problem   {problem}")
    print("ready" if not problems else f"{len(problems)} problems")
    if problems:
        raise typer.Exit(1)


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
def report(
    run: Annotated[str, typer.Argument(help="A run's folder or name, or 'latest'.")] = "latest",
) -> None:
    """Write a run's HTML report again, and the index of all runs."""
    from nbhelpers.report import html as reports
    from nbhelpers.runner import run as batch

    folder = batch.find_run(run)
    print(reports.write_report(folder))
    print(reports.write_runs_index(folder.parent))


@app.command()
def route(
    run: Annotated[str, typer.Argument(help="A run's folder or name, or 'latest'.")] = "latest",
) -> None:
    """Choose a model for each content type of a finished run, and say why."""
    from nbhelpers.comparison import routing
    from nbhelpers.runner import run as batch

    found = routing.route_run(batch.find_run(run))
    for row in found.routes:
        print(f"{row.model or 'no model':24} {row.reason}")
    print(f"{found.default or 'no model':24} everything else: {found.default_reason}")


@app.command()
def label(
    run: Annotated[str, typer.Argument(help="A run's folder or name, or 'latest'.")] = "latest",
    read: Annotated[
        list[Path] | None, typer.Option(help="A filled-in sheet, named after its rater; may be repeated.")
    ] = None,
    judge: Annotated[str, typer.Option(help="Let this model rate the sheet's texts too.")] = "",
    count: Annotated[int, typer.Option(min=1, help="Texts on the sheet.")] = 40,
    seed: Annotated[int, typer.Option(help="Seed of the choice and order of the texts.")] = 0,
) -> None:
    """Have people rate a run's texts: write a blind sheet, read it back, tell how far raters agree."""
    from nbhelpers.comparison import labels
    from nbhelpers.runner import run as batch

    folder = batch.find_run(run)
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
    host: Annotated[
        str, typer.Option(help="Address to listen on; this machine only by default.")
    ] = "127.0.0.1",
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
        sys.exit(1 if str(error).startswith("stopped;") else 2)


def _refuse_with_resume(context: typer.Context) -> None:
    """A resumed run keeps its own settings: a changed one would mix two experiments."""
    given = [
        name
        for name in ("models", "out", *RUN_SETTINGS)
        if (source := context.get_parameter_source(name)) and source.name == "COMMANDLINE"
    ]
    if given:
        flag = given[0] if given[0] == "models" else f"--{given[0].replace('_', '-')}"
        raise LabError(
            f"--resume continues a run with its own settings: leave out {flag}, or start a new run."
        )


def _comparison(plan: Plan) -> ComparisonReport | None:
    from nbhelpers import store
    from nbhelpers.comparison.compare import ComparisonReport

    path = plan.run_dir / "comparison.json"
    return store.read_json(path, ComparisonReport) if path.exists() else None


def _json(comparison: ComparisonReport | None) -> str:
    import dataclasses
    import json

    return json.dumps(dataclasses.asdict(comparison) if comparison else None, indent=2)


def _print_outcome(plan: Plan, info: RunInfo, comparison: ComparisonReport | None) -> None:
    from nbhelpers.comparison import compare as verdicts

    console = _console()
    if comparison:
        if comparison.ranking:
            results = verdicts.read_results(plan.run_dir)[0]
            console.print(_ranking_table(results, comparison))
            for result in results:
                if result.noise != "quiet":
                    print(printable(f"  timings of {result.model}: {result.noise}"))
        for pair in comparison.pairs:
            print(f"  {printable(verdicts.verdict_sentence(pair))}")
        print(printable(f"\n{comparison.pick_reason}\n{comparison.size_hypothesis}"))
        for model, reason in comparison.excluded.items():
            print(printable(f"not compared: {model}: {reason}"))
    for status in info.notebooks:
        if status.status == "failed":
            print(printable(f"failed: {status.model or 'comparison'}, {status.notebook}: {status.error}"))
    if kinds := verdicts.count_failures(plan.run_dir, info):
        print(printable(f"failures: {', '.join(f'{count} {kind}' for kind, count in kinds.items())}"))
    print(f"\nreport  {plan.run_dir / 'index.html'}\nruns    {plan.run_dir.parent / 'index.html'}")


def _ranking_table(results: list[Result], comparison: ComparisonReport):  # type: ignore[no-untyped-def]
    from rich.markup import escape
    from rich.table import Table

    by_model = {result.model: result for result in results}
    table = Table(
        "model", box=None, title=f"{comparison.primary}, 0 to 10, over {len(comparison.prompts)} prompts"
    )
    for column in ("quality", "95% interval", "tokens/s", "TTFT ms", "weights MiB", "finished"):
        table.add_column(column, justify="right")
    table.add_column("timing")
    for model, estimate in comparison.ranking.items():
        result = by_model[model]
        interval = (
            f"[{estimate.low:.2f}, {estimate.high:.2f}]" if estimate.low is not None else estimate.reason
        )
        table.add_row(
            escape(printable(model)),
            f"{estimate.mean:.2f}",
            (interval or "").replace("[", r"\["),
            f"{result.metrics.get('latency/tokens_per_s/mean', float('nan')):,.0f}",
            f"{1000 * result.metrics.get('latency/ttft_s/mean', float('nan')):,.1f}",
            f"{result.metrics['memory/parameters_mib']:,.1f}",
            f"{result.finished}/{result.attempted}",
            result.noise.partition(":")[0],
        )
    return table


def _problems(embedded: list[str]):  # type: ignore[no-untyped-def]
    from nbhelpers import registry
    from nbhelpers.loading import load as loading
    from nbhelpers.runner.worker import COMPARISON, PIPELINE, notebook_path

    for alias in embedded:
        try:
            loading.fetch(registry.resolve(alias))
        except LabError as error:
            yield str(error)
    for name in (*PIPELINE, COMPARISON):
        if not notebook_path(name).is_file():
            yield f"notebooks/{name}.ipynb is missing"


def _console():  # type: ignore[no-untyped-def]
    from rich.console import Console

    return Console()


if __name__ == "__main__":
    main()
