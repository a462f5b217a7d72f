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
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from nbhelpers import store
from nbhelpers.comparison import compare as comparison
from nbhelpers.comparison import labels, plots
from nbhelpers.comparison.compare import ComparisonReport
from nbhelpers.generation import failures
from nbhelpers.records import Estimate, LabError, Result, RunInfo, Sample, Score
from nbhelpers.report.formats import basis, dollars, duration, interval, moment, points, three
from nbhelpers.scoring.texts import printable

if TYPE_CHECKING:
    from jinja2 import Environment
    from matplotlib.figure import Figure

TEMPLATES = Path(__file__).parent / "templates"
MARK = "nbhelpers report"  # in each page's generator tag: a page without it is not ours to overwrite
LONGEST_TEXT = 4000  # characters of a sample text that are shown
ENDINGS = {"eos": "ended by itself", "length": "cut at the token limit", "time": "cut at the time limit"}


@dataclass(frozen=True)
class Picture:
    alt: str  # the picture's content in words
    source: str  # data: address


@dataclass(frozen=True)
class Excerpt:
    """One sample text shown in the report."""

    role: str  # "best" or "median"
    score: float | None
    sample: Sample


@dataclass(frozen=True)
class NotebookLink:
    name: str
    status: str  # passed, failed, skipped or unknown
    seconds: float | None
    href: str | None  # relative; None where there is no HTML


def write_report(run_dir: Path) -> Path:
    """Write <run_dir>/index.html from run.json, the models' files and comparison.json, and return its path.

    Models, files or the comparison may be missing: the page says so. Raises LabError for a folder that
    holds no run, and for a run.json that cannot be read.
    """
    run_dir = run_dir.resolve()
    info = store.read_json(run_dir / "run.json", RunInfo) if (run_dir / "run.json").exists() else None
    results, broken = comparison.read_results(run_dir)
    if info is None and not results and not broken:
        raise LabError(f"{run_dir.name} holds neither a run.json nor a result.json: it is not a run.")
    report, note = _comparison(run_dir)
    order = [*report.ranking, *report.excluded]
    results.sort(key=lambda r: order.index(r.model) if r.model in order else len(order))
    page = (
        _environment(run_dir)
        .get_template("report.html")
        .render(
            run=run_dir.name,
            info=info,
            report=report,
            note=note,
            results=results,
            pictures=_pictures(results, report),
            failures=[s for s in (info.notebooks if info else ()) if s.status == "failed"],
            failed_samples=[row for r in results for row in _failed_samples(r.model, run_dir / r.slug)],
            failure_kinds=failures.of_run(run_dir, info),
            raters=_raters(run_dir),
            texts={r.model: excerpts(run_dir / r.slug, r.primary) for r in results if r.quality_applies},
            notebooks=_notebooks(run_dir, info, results),
            settings=_settings(info, results),
        )
    )
    return _write(run_dir / "index.html", page)


def write_runs_index(outputs: Path) -> Path:
    """Write <outputs>/index.html: every folder with a run.json, newest first; unreadable ones are named.

    Raises LabError when there is an index.html that this function did not write.
    """
    runs, unreadable = [], {}
    for path in sorted(outputs.glob("*/run.json")):
        try:
            info = store.read_json(path, RunInfo)
            page = path.parent / "index.html"
            href = f"{quote(path.parent.name)}/index.html" if page.exists() else None
            runs.append((path.parent.name, info, _verdict(path.parent), href))
        except LabError as error:
            unreadable[path.parent.name] = str(error).replace(f"{path}", path.name)
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
    """(model, error, count) for each kind of failure among a model's generations."""
    try:
        errors = Counter(s.error for s in store.read_rows(folder / "samples.jsonl", Sample) if s.error)
    except LabError as error:
        return [(model, str(error), 0)]
    return [(model, message, count) for message, count in errors.most_common()]


def _comparison(run_dir: Path) -> tuple[ComparisonReport, str]:
    """The run's comparison and a remark: made here when comparison.json is missing or cannot be read."""
    path = run_dir / "comparison.json"
    try:
        return store.read_json(path, ComparisonReport), ""
    except LabError as error:
        missing = "is missing" if not path.exists() else f"cannot be used ({error})"
    try:
        return comparison.assemble(
            run_dir
        ), f"comparison.json {missing}; this report made the comparison itself."
    except LabError as error:
        return comparison.compare(
            [], {}
        ), f"comparison.json {missing}, and there is nothing to compare: {error}"


def _raters(run_dir: Path) -> Sequence[Estimate] | str:
    """How far people, rubric and judge agree, or why labels.json cannot be used."""
    try:
        return labels.agreement(run_dir)
    except LabError as error:
        return str(error)


def _verdict(run_dir: Path) -> str:
    try:
        return store.read_json(run_dir / "comparison.json", ComparisonReport).pick_reason
    except LabError:
        return "No comparison."


def _pictures(results: Sequence[Result], report: ComparisonReport) -> dict[str, Picture]:
    found = {}
    if report.ranking:
        means = "; ".join(f"{name} {interval(e)}" for name, e in report.ranking.items())
        found["ranking"] = _picture(plots.ranking(report), f"Mean {report.primary} by model: {means}")
        speeds = "; ".join(f"{r.model} {three(comparison.words_per_s(r))}" for r in results)
        figure = plots.quality_speed_memory(results, report)
        found["speed"] = _picture(figure, f"Quality against speed. Words per second: {speeds}")
    if any(pair.difference is not None for pair in report.pairs):
        verdicts = " ".join(comparison.verdict_sentence(pair) for pair in report.pairs)
        found["pairs"] = _picture(plots.pair_differences(report), f"Paired differences. {verdicts}")
    if report.size_slope is not None:
        found["size"] = _picture(plots.size_quality(results, report), report.size_hypothesis)
    return found


def _picture(figure: Figure, alt: str) -> Picture:
    from matplotlib import pyplot

    data = io.BytesIO()
    figure.savefig(data, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return Picture(alt, f"data:image/svg+xml;base64,{base64.b64encode(data.getvalue()).decode()}")


def _notebooks(
    run_dir: Path, info: RunInfo | None, results: Sequence[Result]
) -> dict[str, dict[str, NotebookLink]]:
    """Model ("" for the comparison) -> notebook name -> link and status; every model has the same names."""
    statuses = {(comparison.label(s.model), s.notebook): s for s in info.notebooks} if info else {}
    folders = {result.model: result.slug for result in results}
    for model in map(comparison.label, info.models if info else ()):
        folders.setdefault(model, comparison.folder_name(model))

    def names(belongs: bool, pattern: str) -> list[str]:
        said = {notebook for model, notebook in statuses if bool(model) is belongs}
        return sorted(said | {page.stem for page in run_dir.glob(pattern)})

    def link(model: str, folder: str, name: str) -> NotebookLink:
        status = statuses.get((model, name))
        page = Path(folder) / f"{name}.html"
        href = quote(page.as_posix()) if (run_dir / page).exists() else None
        known = status.status if status else "unknown"
        return NotebookLink(name, known, status.seconds if status else None, href)

    each = names(True, "*/[0-9]*.html")
    table = {model: {name: link(model, folder, name) for name in each} for model, folder in folders.items()}
    return {**table, "": {name: link("", ".", name) for name in names(False, "[0-9]*.html")}}


def _settings(info: RunInfo | None, results: Sequence[Result]) -> dict[str, object]:
    given = info.settings if info else results[0].settings if results else None
    if given is None:
        return {}
    shown = {name: value for name, value in asdict(given).items() if name not in ("model", "run_dir")}
    shown["prompts"] = Path(given.prompts).name or "the 15 benchmark prompts"
    shown["limit"] = given.limit or "all prompts"
    return shown


def _environment(folder: Path) -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    def clean(value: Any) -> Any:
        """What can be printed, without the run's place on this machine."""
        if not isinstance(value, str) or isinstance(value, Markup):  # Markup: a macro's own output
            return value
        return printable(value.replace(f"{folder}/", "").replace(f"{folder}", folder.name))

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=clean,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {
        "mark": MARK,
        "cut": LONGEST_TEXT,
        "endings": ENDINGS,
        "three": three,
        "points": points,
        "dollars": dollars,
    }
    filters = (basis, interval, moment, duration, comparison.label, comparison.verdict_sentence)
    environment.filters |= {f.__name__: f for f in filters} | {"counted": plots.counted}
    return environment


def _write(path: Path, page: str) -> Path:
    if path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace")[:2000]:
        raise LabError(
            f"{path} was not written by the laboratory: move it away, then write the report again."
        )
    return store.write_text(path, [page])
