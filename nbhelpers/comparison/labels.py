"""Ratings by people: a blind sheet of a run's texts goes out, filled-in sheets come back, agreement follows.

Everybody rates from 1 to 10. The rubric's 0 to 10 is brought to that scale by 1 + 0.9 x score.
"""

from __future__ import annotations

import csv
import io
import random
import re
from collections.abc import Container
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

from nbhelpers import store
from nbhelpers.comparison import compare as comparison
from nbhelpers.loading import load as loading
from nbhelpers.records import SCHEMA_VERSION, Estimate, LabError, Record, Sample, Score
from nbhelpers.scoring import judge
from nbhelpers.scoring.rubric import PRIMARY
from nbhelpers.stats.estimate import krippendorff

SHEET, KEY, LABELS = "labels.csv", "labels_key.json", "labels.json"
PERSON = "person "
_RATING = re.compile(r"\d+(?:[.,]\d+)?", re.ASCII)
FORMULA = tuple("=+-@\t\r\n＝＋－＠")  # a spreadsheet may run a cell that begins so (OWASP, CSV injection)


@dataclass(frozen=True)
class LabelKey(Record):
    """labels_key.json: item number, as text -> key of the sample, which names the model."""

    items: dict[str, str]
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class Labels(Record):
    """labels.json: "person NAME" or "judge MODEL" -> item number, as text -> rating 1 to 10, if given."""

    ratings: dict[str, dict[str, float]] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION


def write_sheet(run_dir: Path, count: int = 40, seed: int = 0) -> Path:
    """Write up to ``count`` finished texts of the run, shuffled, without model or score; and the key file.

    Models with random weights are left out. LabError for a run without texts or with a sheet already.
    """
    name = run_dir.name
    if (run_dir / KEY).exists() or (run_dir / SHEET).exists():
        raise LabError(f"The run {name} has {SHEET} already: read it with --read, or move it and {KEY} away.")
    results = comparison.read_results(run_dir)[0]
    real = {r.slug for r in results if r.quality_applies or comparison.FOREIGN in r.metrics}
    written = _by_key(run_dir, "samples.jsonl", Sample, real)
    samples = [sample for sample in written.values() if sample.error is None]
    if not samples:
        raise LabError(f"The run {name} has no finished texts to label: run the models first.")
    random.Random(seed).shuffle(samples)
    items = {str(number): sample for number, sample in enumerate(samples[:count], 1)}
    store.write_json(run_dir / KEY, LabelKey({number: sample.key for number, sample in items.items()}))
    # The byte order mark tells spreadsheet programs that it is UTF-8.
    with (run_dir / SHEET).open("w", encoding="utf-8-sig", errors="replace", newline="") as file:
        rows = ((number, harmless(s.prompt), harmless(s.text), "") for number, s in items.items())
        csv.writer(file).writerows((("item", "prompt", "text", "score"), *rows))
    return run_dir / SHEET


def harmless(cell: str) -> str:
    """The cell with an apostrophe in front if a spreadsheet could take it for a formula."""
    return f"'{cell}" if cell.startswith(FORMULA) else cell


def read_sheet(run_dir: Path, path: Path) -> Labels:
    """Add a filled-in sheet to labels.json; the file's name without its ending is the rater.

    Commas or semicolons separate its cells. A rater who is read again is replaced. LabError with the line for
    an unknown or repeated item and a bad score.
    """
    items, found, line = _items(run_dir), dict[str, float](), 1
    try:
        content = path.read_bytes().decode("utf-8-sig")
        heading = content.partition("\n")[0]
        delimiter = ";" if heading.count(";") > heading.count(",") else ","
        sheet = csv.DictReader(io.StringIO(content, newline=""), restval="", delimiter=delimiter)
        if not {"item", "score"} <= set(sheet.fieldnames or ()):
            raise LabError(f"{path.name}, line 1: the columns item and score are missing.")
        for row in sheet:
            item, score, where = row["item"].strip(), row["score"].strip(), f"{path.name}, line {line + 1}"
            line = sheet.line_num  # a text may run over several lines
            if score and (item not in items or item in found):
                raise LabError(f"{where}: item {item!r} is not in {KEY}, or is there twice.")
            if score and not (_RATING.fullmatch(score) and 1 <= float(score.replace(",", ".")) <= 10):
                raise LabError(f"{where}: the score {score!r} of item {item} is no number from 1 to 10.")
            if score:
                found[item] = float(score.replace(",", "."))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise LabError(f"The sheet {path.name} cannot be read ({error}): save it as CSV in UTF-8.") from None
    if not found:
        raise LabError(f"The sheet {path.name} holds no scores: fill in the column score.")
    return _add(run_dir, f"{PERSON}{path.stem}", found)


def add_judge(run_dir: Path, model: str) -> Labels:
    """Let a model rate the sheet's texts too; texts that it does not rate are absent from labels.json."""
    items, samples = _items(run_dir), _by_key(run_dir, "samples.jsonl", Sample)
    loaded = loading.load(model)
    try:
        texts = {number: samples[key] for number, key in items.items() if key in samples}
        scores = {n: judge.judge(loaded, sample.prompt, sample.text).score for n, sample in texts.items()}
    finally:
        loading.unload(loaded)
    return _add(run_dir, f"judge {loaded.spec.alias}", {n: s for n, s in scores.items() if s is not None})


def agreement(run_dir: Path) -> tuple[Estimate, ...]:
    """Krippendorff's alpha between people, and between their mean, the rubric and each judge, pair by pair.

    ``n`` counts the texts that both have rated. () without labels.
    """
    if not (ratings := _labels(run_dir).ratings):
        return ()
    items, scores = _items(run_dir), _by_key(run_dir, "scores.jsonl", Score)
    people = [rated for rater, rated in ratings.items() if rater.startswith(PERSON)]
    each = {n: [rated[n] for rated in people if n in rated] for n in items}
    raters = {"people": {n: fmean(found) for n, found in each.items() if found}} if people else {}
    raters[PRIMARY] = {
        n: 1 + 0.9 * scores[key].values[PRIMARY]
        for n, key in items.items()
        if key in scores and scores[key].reason is None
    }
    raters |= {rater: rated for rater, rated in ratings.items() if not rater.startswith(PERSON)}
    found = [krippendorff(each.values(), "people")] if len(people) > 1 else []
    for (one, first), (other, second) in combinations(raters.items(), 2):
        pairs = [(first.get(n), second.get(n)) for n in items]
        found.append(krippendorff(pairs, f"{one} and {other}"))
    return tuple(found)


def _by_key(run_dir: Path, name: str, kind: type[Any], slugs: Container[str] | None = None) -> dict[str, Any]:
    """Key -> sample or score, of all models or of those with these slugs."""
    paths = [p for p in sorted(run_dir.glob(f"*/{name}")) if slugs is None or p.parent.name in slugs]
    return {row.key: row for path in paths for row in store.read_rows(path, kind)}


def _add(run_dir: Path, rater: str, ratings: dict[str, float]) -> Labels:
    store.write_json(run_dir / LABELS, labels := Labels({**_labels(run_dir).ratings, rater: ratings}))
    return labels


def _labels(run_dir: Path) -> Labels:
    return store.read_json(run_dir / LABELS, Labels) if (run_dir / LABELS).exists() else Labels()


def _items(run_dir: Path) -> dict[str, str]:
    if not (run_dir / KEY).exists():
        raise LabError(f"The run {run_dir.name} has no {KEY}: write the sheet first with `nbhelpers label`.")
    return store.read_json(run_dir / KEY, LabelKey).items
