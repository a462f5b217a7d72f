"""A run as one HTML page that opens from a mail, and the page that lists every run.

Pictures are SVG inside the page, styles and the one script are inline, and nothing is fetched: the page's
policy names the script by its hash, and all can be read without it. Foreign text is escaped by jinja2.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from decimal import Decimal
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from nbhelpers import store, tasks
from nbhelpers.comparison import compare, plots, rating_sheet, ratings
from nbhelpers.comparison.comparable import comparable
from nbhelpers.comparison.speed import speed_sentence
from nbhelpers.errors import some
from nbhelpers.logs.compare import LogsReport
from nbhelpers.logs.formats import Log
from nbhelpers.logs.gate import check_sentence
from nbhelpers.records import LAB_SCALE, Estimate, LabError, Result, RunInfo, Scale
from nbhelpers.redact import printable
from nbhelpers.report import texts
from nbhelpers.stats.estimate import mean_score
from nbhelpers.tracking import result as tracking
from nbhelpers.tracking.metrics import FOREIGN

if TYPE_CHECKING:
    from jinja2 import Environment

MOST_TEXTS = 600  # in the report itself, so that it stays a page to mail; all of them lie beside it
TEMPLATES = Path(__file__).parent / "templates"
MARK = "nbhelpers report"  # in each page's generator tag: a page without it is not ours to overwrite
RatingsSummary = tuple[dict[str, ratings.By], Sequence[Estimate] | str]


def read_ratings(run_dir: Path) -> RatingsSummary:
    """What everybody gave to a run's texts, by rater; and how far they agree, or why that is not known."""
    try:
        results = comparable(run_dir)[0]
        read = ratings.gather_ratings(run_dir, results)
        return read.given, rating_sheet.agreement(read, results[0].primary) if results else ()
    except LabError as error:
        return {}, str(error)


def write_report(run_dir: Path, rated: RatingsSummary | None = None) -> Path:
    """Write <run_dir>/index.html from run.json, comparison.json and the models' files, and say what lacks.

    rated: ``read_ratings`` of the run. LabError for a folder without a run, or a run.json it cannot read.
    """
    run_dir = run_dir.resolve()
    info = tracking.read_info(run_dir)
    results, note = tracking.read_results(run_dir)[0], ""
    try:
        report = store.read_json(run_dir / "comparison.json", compare.ComparisonReport)
    except LabError as error:
        note = f"This report made the comparison itself: {error}"
        report = compare.assemble(run_dir)
    given, raters = rated or read_ratings(run_dir)
    order = {model: rank for rank, model in enumerate((*report.ranking, *report.excluded))}
    results.sort(key=lambda r: order.get(r.model, len(order)))
    ranking = {model: on_scale(mean, report.scale) for model, mean in report.ranking.items()}
    readers = {model: on_scale(mean, LAB_SCALE) for model, mean in report.readers.items()}
    report = replace(report, ranking=ranking, readers=readers)
    real = [r for r in results if r.quality_applies or FOREIGN in r.metrics]
    drawn = plots.drawn(real, len(real))
    rows, broken = tracking.read_all_scored(run_dir, {r.slug for r in drawn})
    failed = [(r.model, broken[r.slug], 0) for r in results if r.slug in broken]
    errors = Counter((r.model, s.error) for r in results for s, _ in rows.get(r.slug, ()) if s.error)
    failed += [(model, error, count) for (model, error), count in errors.most_common()]
    rows_of_drawn = [(r, rows.get(r.slug, [])) for r in drawn]
    items = texts.items_by_gap(rows_of_drawn, _by_people(given), list(info.prompts) if info else ())
    shown = _first(items)
    values: dict[str, Any] = {"run": run_dir.name, "info": info, "report": report, "results": results}
    values |= {"note": note, "raters": raters, "failed_samples": failed, "items": shown}
    values |= {"failure_kinds": tracking.count_failures(info, rows.values()), "item_count": len(items)}
    values |= {"model_count": len(real), "text_count": sum(len(of_model) for _, of_model in rows_of_drawn)}
    values |= {"notebooks": _notebooks(run_dir, info, results), "pictures": _pictures(results, report)}
    values["settings"] = next((vars(source.settings) for source in (info, *results) if source), {})
    values |= _explored(items, [r.model for r in drawn]) | _marks(results, report.primary)
    values["slices"] = _slices(items, drawn, report)
    if len(shown) < len(items):
        _write(run_dir / "texts.html", "all_texts.html", **values | {"items": items})
    return _write(run_dir / "index.html", "report.html", **values)


def outcome(run_dir: Path, info: RunInfo) -> str:
    """What a run says on the terminal at its end: verdicts, failures, places. LabError for broken files."""
    path = run_dir / "comparison.json"
    report = store.read_json(path, compare.ComparisonReport) if path.exists() else None
    results = {result.model: result for result in tracking.read_results(run_dir)[0]}
    kinds = tracking.count_failures(info, tracking.read_all_scored(run_dir)[0].values())
    return rendered("outcome.txt", run_dir=run_dir, info=info, report=report, results=results, kinds=kinds)


def rendered(template: str, **values: Any) -> str:
    """A text from a template, for a terminal or a file of another tool; only XML is escaped."""
    environment = pages(Path()).overlay(autoescape=template.endswith("xml"), finalize=None)
    return printable(environment.get_template(template).render(values))


def on_scale(mean: Estimate, scale: Scale) -> Estimate:
    """The mean with its interval cut at the ends of the scale: no score lies beyond them."""
    if mean.low is None or mean.high is None:
        return mean
    return replace(mean, low=max(mean.low, scale.low), high=min(mean.high, scale.high))


def _by_people(given: Mapping[str, ratings.By]) -> dict[str, float]:
    """Sample key -> mean rating by people: the run's own raters, else the readers whose ratings ship."""
    people = [by for rater, by in given.items() if rater.startswith(ratings.PERSON)]
    people = people or [given.get("readers", {})]
    return {key: fmean(by[key] for by in people if key in by) for key in {key for by in people for key in by}}


def _marks(results: Sequence[Result], primary: str) -> dict[str, Any]:
    """``marked`` puts a text into pieces by what its score rests on; ``meaning`` says what those are."""
    scorer = tasks.Scorer(primary, "", {})
    with suppress(LabError, StopIteration):  # a task's file may be gone
        task = next(result.settings.task for result in results if result.primary == primary)
        scorer = next(scorer for scorer in tasks.load_task(task).scorers if scorer.name == primary)
    kinds = texts.MARKS[scorer.kind][1] if scorer.kind in texts.MARKS else ()

    def marked(text: str, answer: texts.ScoredText, item: texts.Item) -> list[tuple[str, str]]:
        return texts.marked(text, item, scorer, answer.score)

    return {"marked": marked, "meaning": {kind: texts.MEANING[kind] for kind in kinds}}


def _first(items: Sequence[texts.Item]) -> list[texts.Item]:
    """The items that the report itself shows."""
    texts_up_to = accumulate(sum(map(len, item.answers.values())) for item in items)
    return [item for item, n in zip(items, texts_up_to, strict=True) if item is items[0] or n <= MOST_TEXTS]


def _explored(items: Sequence[texts.Item], models: Sequence[str]) -> dict[str, list[str]]:
    """What the form of a page's texts offers."""
    return {"models": [*models], "groups": [*dict.fromkeys(group for item in items for group in item.groups)]}


def _slices(
    items: Sequence[texts.Item], results: Sequence[Result], report: compare.ComparisonReport
) -> dict[str, dict[str, Estimate]]:
    """Of a task with several tags: tag -> model -> its mean score on the items of that tag."""
    slices = dict[str, dict[str, Estimate]]()
    for tag in dict.fromkeys(tag for item in items for tag in item.groups[bool(item.kind) :]):
        ids = [item.id for item in items if tag in item.groups]
        for result in (result for result in results if result.model in report.ranking):
            scores = [result.per_prompt[id] for id in ids if id in result.per_prompt]
            slices.setdefault(tag, {})[result.model] = mean_score(scores, tag, report.scale)
    return slices


def write_logs(folder: Path, report: LogsReport, logs: Sequence[Log]) -> Path:
    """Write <folder>/index.html of compared logs and the texts of runs. LabError for a page not ours."""
    shown = [(each, _pictures((), each).get("pairs")) for each in report.comparisons]
    drawn = {model for each in report.comparisons for model in plots.drawn(each.ranking, len(each.ranking))}
    items = texts.side_by_side(logs, drawn)
    models = list(dict.fromkeys(model for item in items for model in item.answers))
    values = {"shown": shown, "notes": report.notes, "items": _first(items), "item_count": len(items)}
    return _write(folder / "index.html", "logs.html", **values, **_explored(items, models))


def write_runs_index(outputs: Path) -> Path:
    """Write <outputs>/index.html: every folder with a run.json, newest first; unreadable ones are named.

    A picture follows each model over the runs of the same task, score and prompts. A run says so where its
    pick differs from that of the last such run of the same models.
    """
    infos, unreadable = list[tuple[Path, RunInfo]](), dict[str, str]()
    for path in outputs.glob("*/run.json"):
        try:
            infos.append((path.parent, store.read_json(path, RunInfo)))
        except LabError as error:
            unreadable[path.parent.name] = str(error).replace(f"{path}", path.name)
    runs = list[tuple[Any, ...]]()
    means, picks = dict[Any, dict[str, dict[str, Estimate]]](), dict[Any, str | None]()
    for folder, info in sorted(infos, key=lambda run: (run[1].started, run[0])):
        verdict, changed = "No comparison.", ""
        with suppress(LabError):
            report = store.read_json(folder / "comparison.json", compare.ComparisonReport)
            score = f"{report.primary} of {Path(info.settings.task).stem}".removesuffix(" of ")
            series, verdict = (info.task, score, report.prompts), report.pick_reason
            choice = (series, frozenset(report.ranking))
            if picks.setdefault(choice, report.pick) != report.pick:
                changed = f"Changed: the run before it picked {picks[choice] or 'no model'}."
            picks[choice] = report.pick
            for model, mean in report.ranking.items():
                means.setdefault(series, {}).setdefault(model, {})[folder.name] = on_scale(mean, report.scale)
        href = f"{quote(folder.name)}/index.html" if (folder / "index.html").exists() else None
        runs.insert(0, (folder.name, info, verdict, changed, href))
    names = [name for name, *_ in reversed(runs)]
    followed = [series for series, models in means.items() if max(map(len, models.values())) > 1]
    pictures = _addresses({series: plots.history(series[1], names, means[series]) for series in followed})
    values = {"runs": runs, "unreadable": dict(sorted(unreadable.items())), "pictures": pictures}
    return _write(outputs / "index.html", "runs.html", **values)


def _pictures(results: Sequence[Result], report: compare.ComparisonReport) -> dict[str, str]:
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
    executed = info.notebooks if info else ()
    statuses = {(tracking.spec_of(status.model, info).alias, status.notebook): status for status in executed}
    specs = [tracking.spec_of(model, info) for model in info.models] if info else []
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
    if path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace")[:2000]:
        raise LabError(f"The page {path} was not written by the laboratory: move it away, then try again.")
    return store.write_text(path, [pages(path.parent.resolve()).get_template(template).render(values)])


def pages(folder: Path) -> Environment:
    """The templates of pages that lie in this folder."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    def clean(value: Any) -> Any:
        """What can be printed, without the run's place on this machine; a macro's own output as it is."""
        if not isinstance(value, str) or isinstance(value, Markup):
            return value
        return printable(value.replace(f"{folder}/", "").replace(f"{folder}", folder.name))

    def plain(number: float, form: str) -> str:
        """A number as the form has it, but never in scientific notation."""
        return f"{Decimal(format(number, form)):f}"

    files = FileSystemLoader(TEMPLATES)
    environment = Environment(loader=files, autoescape=True, finalize=clean, undefined=StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    filters: list[Any] = [plain, some, tracking.spec_of, plots.question, plots.drawn]
    filters += [compare.verdict_sentence, speed_sentence, check_sentence]
    environment.filters |= {function.__name__: function for function in filters}
    script = (TEMPLATES / "explore.js").read_text(encoding="utf-8")
    policy = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.globals |= {"mark": MARK, "script": Markup(script), "policy": policy}
    return environment
