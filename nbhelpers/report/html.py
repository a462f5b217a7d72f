"""A run as one HTML page that opens from a mail, and the page that lists every run.

Pictures are SVG inside the page, styles and the one script are inline, and nothing is fetched: the page's
policy names the script by its hash. All can be read without it. Everything that comes from models, prompts or
errors is escaped by jinja2's autoescape.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from statistics import fmean
from typing import Any
from urllib.parse import quote

from nbhelpers import store, tasks
from nbhelpers.comparison import compare as comparison
from nbhelpers.comparison import labels, plots, ratings
from nbhelpers.comparison.compare import ComparisonReport
from nbhelpers.comparison.speed import speed_sentence
from nbhelpers.logs.compare import LogsReport
from nbhelpers.logs.read import Log
from nbhelpers.records import LAB_SCALE, Estimate, LabError, Result, RunInfo, Sample, Scale
from nbhelpers.report import marks
from nbhelpers.report.texts import Answer, Item, items, side_by_side
from nbhelpers.scoring.texts import printable
from nbhelpers.stats.estimate import mean_score
from nbhelpers.tracking import result as tracking

MOST_TEXTS = 600  # in the report itself, so that it stays a page to mail; all of them lie beside it
TEMPLATES = Path(__file__).parent / "templates"
Asked = tuple[str, str, tuple[str, ...]]  # a task's digest, a score, prompts: runs of one can be compared
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
    raters, readings = _ratings(run_dir)
    order = {model: place for place, model in enumerate((*report.ranking, *report.excluded))}
    results.sort(key=lambda r: order.get(r.model, len(order)))
    report = replace(
        report,
        ranking={model: on_scale(mean, report.scale) for model, mean in report.ranking.items()},
        readers={model: on_scale(mean, LAB_SCALE) for model, mean in report.readers.items()},
    )
    values: dict[str, Any] = {"run": run_dir.name, "info": info, "report": report, "note": note}
    values |= {"results": results, "notebooks": _notebooks(run_dir, info, results)}
    values["pictures"] = _pictures(results, report)
    values["failed_samples"] = [row for r in results for row in _failed_samples(r.model, run_dir / r.slug)]
    values["failure_kinds"] = tracking.count_failures(run_dir, info)
    real = [r for r in results if r.quality_applies or comparison.FOREIGN in r.metrics]
    found = items(run_dir, real, readings, list(info.prompts) if info else ())
    groups = list(dict.fromkeys(group for item in found for group in item.groups))
    values |= {"models": [r.model for r in real], "groups": groups, "slices": _slices(found, real, report)}
    values["settings"] = next((vars(made.settings) for made in (info, *results) if made), {})
    shown, every = _first(found), sum(len(own) for item in found for own in item.answers.values())
    if len(shown) < len(found):
        _write(run_dir / "texts.html", "all_texts.html", **values, items=found)
    values |= {"raters": raters, "every": every, "most": len(found), **_marks(results, report.primary)}
    return _write(run_dir / "index.html", "report.html", **values, items=shown)


def on_scale(mean: Estimate, scale: Scale) -> Estimate:
    """The mean with its interval cut at the ends of the scale: no score lies beyond them."""
    if mean.low is None or mean.high is None:
        return mean
    return replace(mean, low=max(mean.low, scale.low), high=min(mean.high, scale.high))


def _ratings(run_dir: Path) -> tuple[Sequence[Estimate] | str, dict[str, float]]:
    """How far raters agree, or why that is not known; and what people gave: sample key -> mean rating."""
    try:
        results = comparison.comparable(run_dir)[0]
        known = ratings.read_ratings(run_dir, results)
        agreement = labels.agreement(known, results[0].primary) if results else ()
    except LabError as error:
        return str(error), {}
    people = list(known.people.values()) or [known.readers]
    keys = dict.fromkeys(key for by in people for key in by)
    return agreement, {key: fmean(by[key] for by in people if key in by) for key in keys}


def _marks(results: Sequence[Result], primary: str) -> dict[str, Any]:
    """``marked`` puts a text into pieces by what its score rests on; ``meaning`` says what those are."""
    settings, scorer = next((result.settings for result in results if result.primary == primary), None), None
    with suppress(LabError):  # a task's file may be gone
        task = tasks.load_task(settings.task) if settings else tasks.POSTS
        scorer = next((scorer for scorer in task.scorers if scorer.name == primary), None)
    kinds = ["topic", "unknown", "again"] if scorer and scorer.kind == "rubric" else ["match"]

    def marked(text: str, answer: Answer, item: Item) -> list[tuple[str, str]]:
        if scorer is None or answer.score is None:
            return [(text, "")] if text else []
        by_word = scorer.kind == "rubric"
        spans = (
            marks.rubric(text, item.prompt)
            if by_word
            else marks.target(text, item.target, scorer, answer.score)
        )
        return marks.pieces(text, spans)

    known = scorer and scorer.kind in ("rubric", "exact", "contains", "regex")
    return {"marked": marked, "meaning": {kind: marks.MEANING[kind] for kind in kinds} if known else {}}


def _first(found: Sequence[Item]) -> list[Item]:
    """The items that the report itself shows."""
    shown, count = list[Item](), 0
    for item in found:
        count += sum(map(len, item.answers.values()))
        if shown and count > MOST_TEXTS:
            break
        shown.append(item)
    return shown


def _slices(
    found: Sequence[Item], results: Sequence[Result], report: ComparisonReport
) -> dict[str, dict[str, Estimate]]:
    """Of a task with several tags: tag -> model -> its mean score on the items of that tag."""
    own = {result.model: result.per_prompt for result in results if result.model in report.ranking}
    tags = dict.fromkeys(tag for item in found for tag in item.groups[bool(item.kind) :])
    ids = {tag: [item.id for item in found if tag in item.groups] for tag in tags}
    return {
        tag: {
            model: mean_score([scores[id] for id in ids[tag] if id in scores], tag, report.scale)
            for model, scores in own.items()
        }
        for tag in tags
    }


def write_logs(folder: Path, found: LogsReport, logs: Sequence[Log]) -> Path:
    """Write <folder>/index.html of a comparison of logs, with the texts of those that are runs.

    LabError for a page there that is not ours.
    """
    shown = [(one, _pictures((), one.report).get("pairs")) for one in found.comparisons]
    both = side_by_side(logs)
    values: dict[str, Any] = {"shown": shown, "notes": found.notes, "items": _first(both), "most": len(both)}
    values["models"] = list(dict.fromkeys(model for item in both for model in item.answers))
    values["groups"] = list(dict.fromkeys(group for item in both for group in item.groups))
    return _write(folder / "index.html", "logs.html", **values)


def write_runs_index(outputs: Path) -> Path:
    """Write <outputs>/index.html: every folder with a run.json, newest first; unreadable ones are named.

    A picture follows each model over the runs of one task, score and set of prompts; a run whose pick is
    another than that of such a run before it, of the same models, says so.
    """
    runs, known, unreadable = list[tuple[Any, ...]](), list[tuple[Path, RunInfo]](), dict[str, str]()
    means = dict[Asked, dict[str, dict[str, Estimate]]]()  # -> model -> run
    for path in sorted(outputs.glob("*/run.json")):
        try:
            known.append((path.parent, store.read_json(path, RunInfo)))
        except LabError as error:
            unreadable[path.parent.name] = str(error).replace(f"{path}", path.name)
    picks = dict[tuple[Asked, frozenset[str]], str | None]()
    known.sort(key=lambda run: run[1].started)
    for folder, info in known:
        verdict, changed = "No comparison.", ""
        with suppress(LabError):
            report = store.read_json(folder / "comparison.json", ComparisonReport)
            of = f" of {Path(info.settings.task).stem}" if info.settings.task else ""
            asked, verdict = (info.task, f"{report.primary}{of}", report.prompts), report.pick_reason
            if picks.setdefault(same := (asked, frozenset(report.ranking)), report.pick) != report.pick:
                changed = f"Changed: the run before it picked {picks[same] or 'no model'}."
            picks[same] = report.pick
            for model, mean in report.ranking.items():
                by_run = means.setdefault(asked, {}).setdefault(model, {})
                by_run[folder.name] = on_scale(mean, report.scale)
        href = f"{quote(folder.name)}/index.html" if (folder / "index.html").exists() else None
        runs.insert(0, (folder.name, info, verdict, changed, href))
    names = [folder.name for folder, _ in known]
    followed = {asked: of for asked, of in means.items() if max(map(len, of.values()), default=0) > 1}
    figures = {asked: plots.history(asked[1], names, of) for asked, of in followed.items()}
    values = {"runs": runs, "unreadable": unreadable, "pictures": _addresses(figures)}
    return _write(outputs / "index.html", "runs.html", **values)


def _failed_samples(model: str, folder: Path) -> list[tuple[str, str, int]]:
    """(model, error, count) for each error among a model's generations."""
    try:
        errors = Counter(s.error for s in store.read_rows(folder / "samples.jsonl", Sample) if s.error)
    except LabError as error:
        return [(model, str(error), 0)]
    return [(model, message, count) for message, count in errors.most_common()]


def _pictures(results: Sequence[Result], report: ComparisonReport) -> dict[str, str]:
    """The figures that this comparison has, as data: addresses of SVGs."""
    figures = dict[str, Any]()
    if results and report.ranking:
        figures = {"ranking": plots.ranking(report), "speed": plots.quality_speed_memory(results, report)}
    if any(pair.difference is not None for pair in report.verdicts):
        figures["pairs"] = plots.pair_differences(report)
    return _addresses(figures)


def _addresses(figures: dict[Any, Any]) -> dict[Any, str]:
    """The figures as addresses of SVGs that hold them; they are closed."""
    from matplotlib import pyplot

    addresses = {}
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

    files = FileSystemLoader(TEMPLATES)
    pages = Environment(loader=files, autoescape=True, finalize=clean, undefined=StrictUndefined)
    pages.trim_blocks = pages.lstrip_blocks = True
    for function in (
        counted,
        comparison.spec_of,
        comparison.verdict_sentence,
        speed_sentence,
        plots.question,
    ):
        pages.filters[function.__name__] = function
    script = (TEMPLATES / "explore.js").read_text(encoding="utf-8")
    values["policy"] = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    values |= {"mark": MARK, "script": Markup(script), "three": three, "dollars": dollars}
    page = pages.get_template(template).render(values)
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
