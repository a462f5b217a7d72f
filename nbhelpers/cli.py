"""The commands of ``nbhelpers``; compare and gate stand in ``cli_logs``.

Exit codes: 0 all is well, 1 a model failed (the others are reported), 2 wrong usage, 130 the run was stopped.
"""

import io
import math
import re
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from nbhelpers import __version__, cli_logs, registry, store
from nbhelpers.options import config_text, options_of, read_config, with_options
from nbhelpers.records import FailOnError, Failure, LabError, Limits, Settings
from nbhelpers.redact import printable

# Rich takes a quarter of the time of --help.
app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    """Judge local language models: quality with error bars, speed, memory and cost."""


RunName = Annotated[str, typer.Argument(help="A run's folder or name, or 'latest'.")]
SETTINGS, LIMITS = options_of(Settings), options_of(Limits)


def _config(context: typer.Context, path: Path | None) -> None:
    if path:
        read_config(context, path, run)


@app.command()
@with_options(Settings, Limits)
def run(
    context: typer.Context,
    models: Annotated[
        list[str] | None,
        typer.Argument(help="Alias, org/name, folder, shape:alias.", autocompletion=registry.load_registry),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(is_eager=True, callback=_config, help="TOML file of these options.")
    ] = None,
    server: Annotated[str, typer.Option(help="Address of an OpenAI-compatible server that has them.")] = "",
    jobs: Annotated[int, typer.Option(min=0, help="Models at a time; 0: two small ones on a CPU.")] = 0,
    cluster: Annotated[
        str, typer.Option(help="Ray cluster that runs the models: ray://HOST:PORT, or auto.")
    ] = "",
    out: Annotated[str, typer.Option(help="Folder of this run; default: outputs/<date-time>.")] = "",
    resume: Annotated[str, typer.Option(help="Continue a run: its folder, its name, or 'latest'.")] = "",
    until_decided: Annotated[bool, typer.Option(help="Ask prompts until every pair is decided.")] = False,
    fail_on_error: Annotated[str, typer.Option(help="What stops a run: true, a share, a count.")] = "false",
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")] = False,
    **options: Any,
) -> None:
    """Evaluate models (default: the embedded ones) and write the report."""
    from nbhelpers.runner.plan import absolute, default_jobs, plan_resume, plan_run
    from nbhelpers.runner.run import run_models, watching

    spread = None
    if cluster:
        from nbhelpers.runner.cluster import join_cluster

        spread = join_cluster(cluster)  # it sets a signal handler
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    limit_options = {field.name: options[name] for name, field in LIMITS.items()}
    limits = Limits(**limit_options, fail_on_error=_fail_on_error(fail_on_error))
    if resume:
        _refuse_changes(context)
        plan = plan_resume(resume)
    else:
        if server and not models:
            raise LabError("Name the server's models: `nbhelpers models --server ADDRESS` lists them.")
        prefix = f"{registry.SERVER}{server}#" if server else ""
        settings = absolute(Settings(**{name: options[name] for name in SETTINGS}))
        plan = plan_run([f"{prefix}{model}" for model in models or []], settings, out, until_decided)
        resolved = vars(settings) | {"models": plan.info.models, "server": "", "out": ""}
        plan.run_dir.mkdir(parents=True, exist_ok=True)
        store.write_text(plan.run_dir / "run.toml", [config_text(run, context.params | resolved)])
    try:
        with watching(plan, quiet=as_json) as watch:
            info = run_models(plan, jobs or default_jobs(plan), limits, watch, spread)
    except KeyboardInterrupt:
        hint = f"Continue with: nbhelpers run --resume {plan.run_dir}"
        raise LabError(f"The run was stopped; what was finished is kept. {hint}", Failure.STOPPED) from None
    if as_json:
        path = plan.run_dir / "comparison.json"
        print(path.read_text(encoding="utf-8") if path.exists() else "null\n", end="")
    else:
        from nbhelpers.report import html  # brings scipy, which a run can do without until here

        print(html.outcome(plan.run_dir, info))
    raise typer.Exit(any(status.status == "failed" for status in info.notebooks))


def _refuse_changes(context: typer.Context) -> None:
    """Refuse a setting beside --resume, which would mix experiments. Raises LabError."""
    for name in ("models", "server", "out", "until_decided", *SETTINGS):
        source = context.get_parameter_source(name)
        if source and source.name in ("COMMANDLINE", "DEFAULT_MAP"):
            raise LabError(f"--resume keeps a run's settings: leave out {name.replace('_', '-')}.")


@app.command()
def config() -> None:
    """Print a commented file for run --config: every option of a run with its default."""
    print(config_text(run), end="")


def _fail_on_error(text: str) -> FailOnError:
    """--fail-on-error: true is the first failure, false none, a number below 1 a share. Raises LabError."""
    number = {"true": "1", "false": "0"}.get(text.lower(), text)
    if not re.fullmatch(r"[0-9]+(\.[0-9]*)?", number):
        raise LabError(f"The option --fail-on-error is {text!r}: give true, false, a share or a count (5).")
    value = float(number)
    return FailOnError(count=math.ceil(value)) if value >= 1 else FailOnError(share=value or None)


@app.command()
def models(
    server: Annotated[str, typer.Option(help="List those of this OpenAI-compatible server.")] = "",
) -> None:
    """List the registry: what can be evaluated by name."""
    if server:
        from nbhelpers.loading import remote

        address = registry.server_address(server)
        names = (f"{registry.SERVER}{address}#{name}" for name in remote.list_models(address))
        print(printable("\n".join(names)))
        return
    row = "{:22} {:9} {:9} {:>10} {:>8} {:7} {:25} {}".format
    print(row("model", "kind", "family", "parameters", "context", "format", "licence", "gated").rstrip())
    for spec in registry.load_registry().values():
        size = f"{spec.parameters / 1e6:,.1f} M" if spec.parameters else "?"
        context, gated = spec.context or "?", "yes" if spec.gated else ""
        cells = (spec.alias, spec.kind, spec.family, size, context, spec.prompt_format, spec.licence, gated)
        print(row(*cells).rstrip())
    print("Any other Hub repository (org/name), folder, shape:<alias> or server:ADDRESS#MODEL works too.")


@app.command()
def lab(folder: Annotated[Path, typer.Argument(help="A folder that is not there yet.")]) -> None:
    """Copy notebooks, data and tools into a folder, to work through or to change."""
    store.copy_lab(folder)
    print(f"cd {folder} && PYTHONPATH=$PWD jupyter lab notebooks/00_start_here.ipynb")


@app.command()
def doctor() -> None:
    """Show what this machine is and whether the laboratory can run here."""
    from nbhelpers.devices import machine
    from nbhelpers.loading import load

    host, gib = machine.detect(), 2**30
    print(f"device    {host.device} ({host.name}), {host.cores} cores")
    print(f"memory    {host.memory_free_bytes / gib:.1f} of {host.memory_total_bytes / gib:.1f} GiB free")
    print(f"dtype     {host.dtype}: {host.dtype_reason}")
    print(f"outputs   {store.outputs_dir()}")
    problems = 0
    for alias in registry.embedded_models():
        try:
            load.fetch(registry.resolve(alias))
        except LabError as error:
            print(f"problem   {error}")
            problems += 1
    if problems:
        raise typer.Exit(1)
    print("ready")


@app.command()
def report(run: RunName = "latest") -> None:
    """Write a run's HTML report again, and the index of all runs."""
    from nbhelpers.report import html
    from nbhelpers.runner.plan import find_run

    folder = find_run(run)
    print(html.write_report(folder))
    print(html.write_runs_index(folder.parent))


@app.command()
def ui(port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the page.")] = 5000) -> None:
    """Show the runs in MLflow's page, on this machine alone, until Ctrl-C."""
    from nbhelpers.runner import kernels
    from nbhelpers.tracking import mlflow_pages, mlflow_run

    link = f"/#/experiments/{mlflow_run.init_database()}/runs"
    uri = mlflow_run.tracking_uri()
    if uri.startswith("http"):
        print(mlflow_run.shown_uri().rstrip("/") + link)
        return
    server = mlflow_pages.serve_ui(uri, store.outputs_dir(), port)
    try:
        print(f"http://127.0.0.1:{port}{link}", flush=True)
        raise typer.Exit(server.wait())
    except KeyboardInterrupt:
        pass
    finally:
        kernels.kill_tree(server.pid)


@app.command()
def label(
    run: RunName = "latest",
    read: Annotated[
        list[Path] | None, typer.Option(help="A filled-in sheet, named after its rater; may be repeated.")
    ] = None,
    judge: Annotated[str, typer.Option(help="Let this model rate every text: verdicts rest on it.")] = "",
    count: Annotated[int, typer.Option(min=1, help="Texts on the sheet, in whole prompts.")] = 40,
    seed: Annotated[int, typer.Option(help="Seed of the choice and order of the texts.")] = 0,
) -> None:
    """Have people rate a run's texts blindly, tell how far they agree, and correct the verdicts by them."""
    from nbhelpers.comparison import compare, rating_sheet, ratings
    from nbhelpers.comparison.comparable import comparable
    from nbhelpers.report import html
    from nbhelpers.runner.plan import find_run
    from nbhelpers.tracking import mlflow_run

    folder = find_run(run)
    results, _, _ = comparable(folder)
    if not read and not judge:
        sheet = rating_sheet.write_sheet(folder, results, count, seed)
        sd, widths = rating_sheet.planned_widths(results)
        plan = {"sd": sd, "widths": widths, "correlation": rating_sheet.ASSUMED}
        print(html.rendered("sheet.txt", sheet=sheet, run=run, key=ratings.KEY, **plan))
        return
    for sheet in read or []:
        rating_sheet.read_sheet(folder, sheet)
    if judge:
        rating_sheet.add_judge(folder, results, judge)
    comparison, rated = compare.compare_run(folder), ratings.gather_ratings(folder, results)
    alphas = rating_sheet.agreement(rated, results[0].primary)
    print(html.rendered("ratings.txt", report=comparison, run=run, alphas=alphas))
    mlflow_run.attach(folder, rated.given)


app.command()(cli_logs.compare)
app.command()(cli_logs.gate)


def main() -> None:
    """Entry point: an error that the user can act on becomes one sentence and an exit code."""
    for stream in (sys.stdout, sys.stderr):  # a terminal may lack letters of a model's name
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        store.address("The Hub", "HF_ENDPOINT")  # huggingface_hub prints a broken one while it is imported
        app()
    except (LabError, OSError) as error:
        if isinstance(error, OSError):
            where = error.filename or "The output"
            hint = "free space or choose another folder (--out or NBHELPERS_OUTPUTS)"
            error = LabError(f"{where} cannot be used ({error.strerror or error}): {hint}.")
        print(f"nbhelpers: {printable(str(error))}", file=sys.stderr)
        sys.exit(130 if error.kind is Failure.STOPPED else 2)  # 128 and the number of SIGINT, as of shells


if __name__ == "__main__":
    main()
