"""A run as one HTML page that opens from a mail, and the page that lists every run.

Pictures are SVG inside the page, styles are inline, there is no script and nothing is fetched. Everything
that comes from models, prompts or errors is escaped by jinja2's autoescape.
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import quote

from nbhelpers import store
from nbhelpers.comparison import compare as comparison
from nbhelpers.comparison import labels, plots
from nbhelpers.comparison.compare import ComparisonReport
from nbhelpers.logs.compare import LogsReport
from nbhelpers.records import Estimate, LabError, Result, RunInfo, Sample, Score
from nbhelpers.scoring.texts import printable
from nbhelpers.stats.estimate import mean_score
from nbhelpers.stats.paired import Comparison
from nbhelpers.tracking import result as tracking

MOST_PAIRS = 6  # whose deciding items are shown
MARK = "nbhelpers report"  # in each page's generator tag: a page without it is not ours to overwrite


def write_report(run_dir: Path) -> Path:
    """Write <run_dir>/index.html from run.json, comparison.json and the models' files; it names what lacks.

    LabError for a folder that holds no run, and for a run.json that cannot be read.
    """
    run_dir = run_dir.resolve()
    info, results, note = comparison.read_info(run_dir), comparison.read_results(run_dir)[0], ""
    try:
        report = store.read_json(run_dir / "comparison.json", ComparisonReport)
    except LabError as error:
        note = f"This report made the comparison itself: {error}"
        report = comparison.assemble(run_dir)
    raters: Sequence[Estimate] | str
    try:
        raters = labels.agreement(run_dir, comparison.comparable(run_dir)[0])
    except LabError as error:
        raters = str(error)
    order = {model: place for place, model in enumerate((*report.ranking, *report.excluded))}
    results.sort(key=lambda r: order.get(r.model, len(order)))
    values: dict[str, Any] = {"run": run_dir.name, "info": info, "report": report, "note": note}
    values |= {"results": results, "notebooks": _notebooks(run_dir, info, results)}
    values["pictures"] = _pictures(results, report)
    values["failed_samples"] = [row for r in results for row in _failed_samples(r.model, run_dir / r.slug)]
    values["failure_kinds"] = tracking.count_failures(run_dir, info)
    real = [r for r in results if r.quality_applies or comparison.FOREIGN in r.metrics]
    values["texts"] = {r.model: excerpts(run_dir / r.slug, r.primary) for r in real}
    values |= _task_parts(run_dir, real, report)
    values["settings"] = next((vars(made.settings) for made in (info, *results) if made), {})
    return _write(run_dir / "index.html", "report.html", raters=raters, **values)


def write_logs(folder: Path, found: LogsReport) -> Path:
    """Write <folder>/index.html of a comparison of logs. LabError for a page there that is not ours."""
    shown = [(one, _pictures((), one.report).get("pairs")) for one in found.comparisons]
    return _write(folder / "index.html", "logs.html", shown=shown, notes=found.notes)


def write_runs_index(outputs: Path) -> Path:
    """Write <outputs>/index.html: every folder with a run.json, newest first; unreadable ones are named."""
    runs, unreadable = [], {}
    for path in sorted(outputs.glob("*/run.json")):
        folder, verdict = path.parent, "No comparison."
        try:
            info = store.read_json(path, RunInfo)
        except LabError as error:
            unreadable[folder.name] = str(error).replace(f"{path}", path.name)
            continue
        with suppress(LabError):
            verdict = store.read_json(folder / "comparison.json", ComparisonReport).pick_reason
        href = f"{quote(folder.name)}/index.html" if (folder / "index.html").exists() else None
        runs.append((folder.name, info, verdict, href))
    runs.sort(key=lambda run: run[1].started, reverse=True)
    return _write(outputs / "index.html", "runs.html", runs=runs, unreadable=unreadable)


def excerpts(folder: Path, primary: str) -> dict[str, tuple[float | None, Sample]]:
    """A model's best and median finished text by its primary score; the first text where none is scored."""
    try:
        samples = [s for s in store.read_rows(folder / "samples.jsonl", Sample) if s.error is None]
        scores = {s.key: s.values.get(primary) for s in store.read_rows(folder / "scores.jsonl", Score)}
    except LabError:
        return {}
    scored = [(score, s) for s in samples if (score := scores.get(s.key)) is not None]
    if not scored:
        return {"first": (None, samples[0])} if samples else {}
    scored.sort(key=lambda pair: -pair[0])  # stable: of equal scores the first generated
    if {score for score, _ in scored} == {0.0, 1.0}:  # right or wrong has no middle
        return {"best": scored[0], "worst": scored[-1]}
    middle = {"median": scored[len(scored) // 2]} if len(scored) > 1 else {}
    return {"best": scored[0], **middle}


def _task_parts(run_dir: Path, results: Sequence[Result], report: ComparisonReport) -> dict[str, Any]:
    """Of a task with right answers or tags: targets by item, scores by tag, and the items that decide."""
    targets, tags = dict[str, Sequence[str]](), dict[str, list[str]]()
    answers = dict[str, dict[str, Sample]]()
    for result in results if any(r.settings.task for r in results) else ():
        with suppress(LabError):
            folder = run_dir / result.slug
            answers[result.model] = {
                row.prompt_id: row
                for row in store.read_rows(folder / "samples.jsonl", Sample)
                if not row.repeat
            }
            for score in store.read_rows(folder / "scores.jsonl", Score):
                targets[score.prompt_id] = score.target or ()
                for tag in score.tags or ():
                    if score.prompt_id not in tags.setdefault(tag, []):
                        tags[tag].append(score.prompt_id)
    own = {result.model: result.per_prompt for result in results if result.model in report.ranking}
    slices = {
        tag: {
            model: mean_score([scores[id] for id in ids if id in scores], tag, report.scale)
            for model, scores in own.items()
        }
        for tag, ids in tags.items()
    }
    pairs = [pair for pair in report.verdicts if {pair.a, pair.b} <= own.keys() & answers.keys()]
    deciding = [(pair, _deciding(pair, own, answers)) for pair in pairs[:MOST_PAIRS] if targets]
    return {"targets": targets, "slices": slices, "deciding": [found for found in deciding if found[1]]}


def _deciding(
    pair: Comparison, own: dict[str, dict[str, float]], answers: dict[str, dict[str, Sample]]
) -> list[Any]:
    """The items on which two models lie furthest apart, up to three each way."""
    gaps = {id: own[pair.a][id] - own[pair.b][id] for id in own[pair.a].keys() & own[pair.b].keys()}
    order = sorted((id for id, gap in gaps.items() if gap), key=lambda id: (-gaps[id], id))
    found = []
    for id in dict.fromkeys(
        [*[id for id in order if gaps[id] > 0][:3], *[id for id in order if gaps[id] < 0][-3:]]
    ):
        both = [
            (answers[model][id].text, own[model][id]) for model in (pair.a, pair.b) if id in answers[model]
        ]
        found.append({"id": id, "prompt": answers[pair.a][id].prompt, "answers": both})
    return found


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

    figures, addresses = dict[str, Any](), {}
    if results and report.ranking:
        figures = {"ranking": plots.ranking(report), "speed": plots.quality_speed_memory(results, report)}
    if any(pair.difference is not None for pair in report.verdicts):
        figures["pairs"] = plots.pair_differences(report)
    for name, figure in figures.items():
        data = io.BytesIO()
        figure.savefig(data, format="svg", metadata={"Date": None})
        pyplot.close(figure)
        addresses[name] = f"data:image/svg+xml;base64,{base64.b64encode(data.getvalue()).decode()}"
    return addresses


def _notebooks(run_dir: Path, info: RunInfo | None, results: Sequence[Result]) -> dict[str, Any]:
    """Statuses by model and notebook, folders by model, the executed pages, and the notebooks' names."""
    notebooks, models = (info.notebooks, info.models) if info else ((), ())
    statuses = {(comparison.spec_of(s.model, info).alias, s.notebook): s for s in notebooks}
    specs = [comparison.spec_of(model, info) for model in models]
    pages = [page.relative_to(run_dir) for page in run_dir.glob("**/[0-9]*.html")]
    names = {(len(page.parts) > 1, page.stem) for page in pages} | {(bool(m), name) for m, name in statuses}
    return {
        "statuses": statuses,
        "folders": {r.model: r.slug for r in results} | {spec.alias: spec.slug for spec in specs},
        "pages": [page.as_posix() for page in pages],
        "names": [sorted(name for of_model, name in names if of_model is wanted) for wanted in (False, True)],
    }


def _write(path: Path, template: str, **values: Any) -> Path:
    """Write a page from a template, unless there is a file that is not ours."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    if path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace")[:2000]:
        raise LabError(f"The page {path} was not written by the laboratory: move it away, then try again.")
    folder = path.parent.resolve()

    def clean(value: Any) -> Any:
        """What can be printed, without the run's place on this machine; a macro's own output as it is."""
        if not isinstance(value, str) or isinstance(value, Markup):
            return value
        return printable(value.replace(f"{folder}/", "").replace(f"{folder}", folder.name))

    files = FileSystemLoader(Path(__file__).parent / "templates")
    pages = Environment(loader=files, autoescape=True, finalize=clean, undefined=StrictUndefined)
    pages.trim_blocks = pages.lstrip_blocks = True
    for function in (counted, comparison.spec_of, comparison.verdict_sentence, plots.question):
        pages.filters[function.__name__] = function
    page = pages.get_template(template).render(values, mark=MARK, three=three, dollars=dollars)
    return store.write_text(path, [page])


def counted(number: float) -> str:
    """A count in three digits: 495k, 4.98M, 1.1B."""
    for factor, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * factor:
            return f"{number / factor:.3g}{letter}"
    return f"{number:.3g}"


def three(number: float | None) -> str:
    """Three significant digits, never in scientific notation; a dash for what was not measured."""
    if not number:
        return "–" if number is None else "0"
    return f"{number:,.0f}" if abs(number) >= 100 else f"{Decimal(f'{number:#.3g}'):f}"


def dollars(usd: float | None) -> str:
    """US dollars with two significant digits below one dollar."""
    return "–" if usd is None else f"${usd:,.2f}" if usd >= 1 else f"${Decimal(f'{usd:.2g}'):f}"
