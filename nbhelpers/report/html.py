"""A run as one HTML page that opens from a mail, and the page that lists every run.

Pictures are SVG inside the page, styles are inline, there is no script and nothing is fetched. Everything
that comes from models, prompts or errors is escaped by jinja2's autoescape.
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from nbhelpers import store
from nbhelpers.comparison import compare as comparison
from nbhelpers.comparison import labels, plots
from nbhelpers.comparison.compare import ComparisonReport
from nbhelpers.records import Estimate, LabError, Result, RunInfo, Sample, Score
from nbhelpers.scoring.texts import printable

if TYPE_CHECKING:
    from jinja2 import Environment
    from matplotlib.figure import Figure

MARK = "nbhelpers report"  # in each page's generator tag: a page without it is not ours to overwrite


@dataclass(frozen=True)
class Excerpt:
    """One sample text shown in the report."""

    role: str  # "best", "median" or "first"
    score: float | None
    sample: Sample


def write_report(run_dir: Path) -> Path:
    """Write <run_dir>/index.html from run.json, the models' files and comparison.json, and return its path.

    Models, files or the comparison may be missing: the page says so. Raises LabError for a folder that
    holds no run, and for a run.json that cannot be read.
    """
    run_dir = run_dir.resolve()
    info = store.read_json(run_dir / "run.json", RunInfo) if (run_dir / "run.json").exists() else None
    results, broken = comparison.read_results(run_dir)
    if info is None and not results and not broken:
        raise LabError(
            f"The folder {run_dir.name} holds neither a run.json nor a result.json: it is not a run."
        )
    note = ""
    try:
        report = store.read_json(run_dir / "comparison.json", ComparisonReport)
    except LabError as error:
        missing = not (run_dir / "comparison.json").exists()
        note = f"comparison.json {'is missing' if missing else f'cannot be used ({error})'}; "
        note += "this report made the comparison itself."
        report = comparison.assemble(run_dir)
    order = [*report.ranking, *report.excluded]
    results.sort(key=lambda r: order.index(r.model) if r.model in order else len(order))
    raters: Sequence[Estimate] | str
    try:
        raters = labels.agreement(run_dir)
    except LabError as error:
        raters = str(error)
    template = _environment(run_dir).get_template("report.html")
    page = template.render(
        run=run_dir.name,
        info=info,
        report=report,
        note=note,
        results=results,
        pictures=_pictures(results, report),
        failures=[s for s in (info.notebooks if info else ()) if s.status == "failed"],
        failed_samples=[row for r in results for row in _failed_samples(r.model, run_dir / r.slug)],
        failure_kinds=comparison.count_failures(run_dir, info),
        raters=raters,
        texts={r.model: excerpts(run_dir / r.slug, r.primary) for r in results if r.quality_applies},
        notebooks=_notebooks(run_dir, info, results),
        settings=asdict(info.settings if info else results[0].settings) if info or results else {},
    )
    return _write(run_dir / "index.html", page)


def write_runs_index(outputs: Path) -> Path:
    """Write <outputs>/index.html: every folder with a run.json, newest first; unreadable ones are named.

    Raises LabError when there is an index.html that this function did not write.
    """
    runs, unreadable = [], {}
    for path in sorted(outputs.glob("*/run.json")):
        folder = path.parent
        try:
            info = store.read_json(path, RunInfo)
        except LabError as error:
            unreadable[folder.name] = str(error).replace(f"{path}", path.name)
            continue
        try:
            verdict = store.read_json(folder / "comparison.json", ComparisonReport).pick_reason
        except LabError:
            verdict = "No comparison."
        href = f"{quote(folder.name)}/index.html" if (folder / "index.html").exists() else None
        runs.append((folder.name, info, verdict, href))
    runs.sort(key=lambda run: run[1].started, reverse=True)
    template = _environment(outputs.resolve()).get_template("runs.html")
    return _write(outputs / "index.html", template.render(runs=runs, unreadable=unreadable))


def excerpts(folder: Path, primary: str) -> list[Excerpt]:
    """The best and the median finished text of a model by its primary score; the first one without scores."""
    try:
        samples = [s for s in store.read_rows(folder / "samples.jsonl", Sample) if s.error is None]
        scores = {s.key: s.values.get(primary) for s in store.read_rows(folder / "scores.jsonl", Score)}
    except LabError:
        return []
    scored = [(score, s) for s in samples if (score := scores.get(s.key)) is not None]
    if not scored:
        return [Excerpt("first", None, sample) for sample in samples[:1]]
    scored.sort(key=lambda pair: -pair[0])  # stable: of equal scores the first generated
    chosen = {"best": scored[0], "median": scored[len(scored) // 2]}
    return [Excerpt(role, *chosen[role]) for role in ("best", "median")[: len(scored)]]


def _failed_samples(model: str, folder: Path) -> list[tuple[str, str, int]]:
    """(model, error, count) for each error among a model's generations."""
    try:
        errors = Counter(s.error for s in store.read_rows(folder / "samples.jsonl", Sample) if s.error)
    except LabError as error:
        return [(model, str(error), 0)]
    return [(model, message, count) for message, count in errors.most_common()]


def _pictures(results: Sequence[Result], report: ComparisonReport) -> dict[str, str]:
    """The figures that this comparison has, as data: addresses of SVGs."""
    from matplotlib import pyplot

    figures: dict[str, Figure] = {}
    if report.ranking:
        figures["ranking"] = plots.ranking(report)
        figures["speed"] = plots.quality_speed_memory(results, report)
    if any(pair.difference is not None for pair in report.pairs):
        figures["pairs"] = plots.pair_differences(report)
    if report.size_slope is not None:
        figures["size"] = plots.size_quality(results, report)
    addresses = {}
    for name, figure in figures.items():
        data = io.BytesIO()
        figure.savefig(data, format="svg", metadata={"Date": None})
        pyplot.close(figure)
        addresses[name] = f"data:image/svg+xml;base64,{base64.b64encode(data.getvalue()).decode()}"
    return addresses


def _notebooks(run_dir: Path, info: RunInfo | None, results: Sequence[Result]) -> dict[str, Any]:
    """Statuses by model and notebook, folders by model, the executed pages, and the notebooks' names."""
    notebooks = info.notebooks if info else ()
    statuses = {(comparison.spec_of(s.model, info).alias, s.notebook): s for s in notebooks}
    folders = {result.model: result.slug for result in results}
    for model in info.models if info else ():
        spec = comparison.spec_of(model, info)
        folders.setdefault(spec.alias, spec.slug)
    of_models = {p.stem for p in run_dir.glob("*/[0-9]*.html")} | {n for model, n in statuses if model}
    of_run = {p.stem for p in run_dir.glob("[0-9]*.html")} | {n for model, n in statuses if not model}
    pages = [path.relative_to(run_dir).as_posix() for path in run_dir.glob("**/[0-9]*.html")]
    return {
        "statuses": statuses,
        "folders": folders,
        "pages": pages,
        "of_models": sorted(of_models),
        "of_run": sorted(of_run),
    }


def _environment(folder: Path) -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    def clean(value: Any) -> Any:
        """What can be printed, without the run's place on this machine."""
        if not isinstance(value, str) or isinstance(value, Markup):  # Markup: a macro's own output
            return value
        return printable(value.replace(f"{folder}/", "").replace(f"{folder}", folder.name))

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        finalize=clean,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"mark": MARK, "three": three, "dollars": dollars}
    filters = (interval, duration, plots.counted, comparison.spec_of, comparison.verdict_sentence)
    environment.filters |= {f.__name__: f for f in filters}
    return environment


def interval(estimate: Estimate | None) -> str:
    """A mean with its interval, or with the reason why there is none."""
    if estimate is None or estimate.mean is None:
        return "–"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.mean:.2f} ({estimate.reason})"
    return f"{estimate.mean:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"


def three(number: float | None) -> str:
    """Three significant digits, never in scientific notation; a dash for what was not measured."""
    if not number:
        return "–" if number is None else "0"
    return f"{number:,.0f}" if abs(number) >= 100 else f"{Decimal(f'{number:#.3g}'):f}"


def dollars(usd: float | None) -> str:
    """US dollars with two significant digits below one dollar."""
    if usd is None:
        return "–"
    return f"${usd:,.2f}" if usd >= 1 else f"${Decimal(f'{usd:.2g}'):f}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def _write(path: Path, page: str) -> Path:
    if path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace")[:2000]:
        raise LabError(f"The page {path} was not written by the laboratory: move it away, then try again.")
    return store.write_text(path, [page])
