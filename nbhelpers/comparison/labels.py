"""Ratings by people: a blind sheet of a run's texts goes out, filled-in sheets come back, agreement follows.

Everybody rates from 1 to 10, and so does the rubric.
"""

from __future__ import annotations

import csv
import io
import math
import random
import re
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import fmean, median

from nbhelpers import store
from nbhelpers.comparison import compare as comparison
from nbhelpers.comparison import ratings
from nbhelpers.comparison.ratings import KEY, LABELS, PERSON, Design, LabelKey, Labels
from nbhelpers.loading import load as loading
from nbhelpers.records import Estimate, LabError, Result, Sample
from nbhelpers.scoring import judge
from nbhelpers.scoring.rubric import PRIMARY
from nbhelpers.stats import corrected
from nbhelpers.stats.estimate import krippendorff, mean_sd, sorted_array

SHEET = "labels.csv"
ASSUMED = 0.6  # correlation of score and readers over prompts, for planning; nobody has measured yours
_RATING = re.compile(r"\d+(?:[.,]\d+)?", re.ASCII)
FORMULA = tuple("=+-@\t\r\n＝＋－＠")  # a spreadsheet may run a cell that begins so (OWASP, CSV injection)


def write_sheet(run_dir: Path, count: int = 40, seed: int = 0) -> Path:
    """Write a sheet of at least ``count`` texts, if there are, without model or score; and the key file.

    Whole prompts in the random order that the key records, each with a text of every model of the comparison,
    the repeat drawn too. LabError for a run without texts or with a sheet already.
    """
    name = run_dir.name
    if (run_dir / KEY).exists() or (run_dir / SHEET).exists():
        raise LabError(f"The run {name} has {SHEET} already: read it with --read, or move it and {KEY} away.")
    texts = ratings.read_texts(run_dir, results := compared(run_dir))
    groups: dict[str, dict[str, list[str]]] = {}
    for key, text in sorted(texts.items()):
        groups.setdefault(text.prompt, {}).setdefault(text.model, []).append(key)
    if not groups or any(len(of) < len(results) for of in groups.values()):
        raise LabError(f"The run {name} has no texts of the same prompts: run its models to the end.")
    rng, strata = random.Random(seed), ratings.strata_of(texts.values())
    order = corrected.random_order(strata, seed)
    drawn = order[: math.ceil(count / len(results))]
    mixed = (rng.sample([*groups[prompt].values()], len(results)) for prompt in drawn)
    samples = [texts[rng.choice(keys)].sample for of_prompt in mixed for keys in of_prompt]
    failed = tuple(sample.key for sample in samples if sample.error is not None)
    items = {str(n): sample for n, sample in enumerate((s for s in samples if s.error is None), 1)}
    design = Design(seed, tuple(order), len(drawn), corrected.chances(strata, drawn), failed)
    keys = {number: sample.key for number, sample in items.items()}
    store.write_json(run_dir / KEY, LabelKey(keys, design))
    # The byte order mark tells spreadsheet programs that it is UTF-8.
    with (run_dir / SHEET).open("w", encoding="utf-8-sig", errors="replace", newline="") as file:
        rows = ((number, harmless(s.prompt), harmless(s.text), "") for number, s in items.items())
        csv.writer(file).writerows((("item", "prompt", "text", "score"), *rows))
    return run_dir / SHEET


def compared(run_dir: Path) -> list[Result]:
    """The results that the run compares, on the prompts that all of them have."""
    results = comparison.comparable(run_dir)[0]
    shared = set[str].intersection(*(set(r.per_prompt) for r in results)) if results else set[str]()
    return [replace(r, per_prompt={p: r.per_prompt[p] for p in sorted(shared)}) for r in results]


def planned_widths(run_dir: Path) -> tuple[float, dict[int, float]]:
    """What ratings will buy: number of ratings -> half the interval to expect of a difference of two models.

    The first value is the readers' deviation, taken from the score's (median over pairs); their correlation
    is ``ASSUMED``. {} for fewer than two models or too few prompts.
    """
    results = compared(run_dir)
    columns = [
        sorted_array(a.per_prompt[p] - b.per_prompt[p] for p in a.per_prompt)
        for a, b in combinations(results, 2)
    ]
    n = len(columns[0]) if columns else 0
    if n < corrected.LEAST:
        return 0.0, {}
    sd = median(mean_sd(x)[1] or 0.0 for x in columns)
    steps = [*(step for step in (6, 10, 20, 40, 80, 160, 320) if step < n), n]
    return sd, {k * len(results): corrected.half_width(sd, k, n, ASSUMED) for k in steps}


def harmless(cell: str) -> str:
    """The cell with an apostrophe in front if a spreadsheet could take it for a formula."""
    return f"'{cell}" if cell.startswith(FORMULA) else cell


def read_sheet(run_dir: Path, path: Path) -> Labels:
    """Add a filled-in sheet to labels.json; the file's name without its ending is the rater.

    Commas or semicolons separate its cells. A rater who is read again is replaced. LabError with the line for
    an unknown or repeated item and a bad score.
    """
    items, found, line = ratings.read_key(run_dir).items, dict[str, float](), 1
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
    items = ratings.read_key(run_dir).items
    samples = {row.key: row for p in run_dir.glob("*/samples.jsonl") for row in store.read_rows(p, Sample)}
    loaded = loading.load(model)
    try:
        texts = {number: samples[key] for number, key in items.items() if key in samples}
        scores = {n: judge.judge(loaded, sample.prompt, sample.text).score for n, sample in texts.items()}
    finally:
        loading.unload(loaded)
    return _add(run_dir, f"judge {loaded.spec.alias}", {n: s for n, s in scores.items() if s is not None})


def agreement(run_dir: Path) -> tuple[Estimate, ...]:
    """Krippendorff's alpha between people, and between their mean, the rubric and each judge, pair by pair.

    "readers" are those whose ratings ship with the default run's texts. ``n`` counts the texts that both have
    rated. () without labels.
    """
    rated = ratings.read_ratings(run_dir)
    texts = ratings.read_texts(run_dir, compared(run_dir))
    readers = ratings.shipped(texts)[0]
    if not rated and not readers:
        return ()
    people = [by for rater, by in rated.items() if rater.startswith(PERSON)]
    keys = dict.fromkeys(key for by in (*rated.values(), readers) for key in by)
    each = {key: [by[key] for by in people if key in by] for key in keys}
    raters = {"people": {key: fmean(found) for key, found in each.items() if found}} if people else {}
    raters |= {"readers": readers} if readers else {}
    raters[PRIMARY] = {key: texts[key].score for key in keys if key in texts}
    raters |= {rater: by for rater, by in rated.items() if not rater.startswith(PERSON)}
    found = [krippendorff(each.values(), "people")] if len(people) > 1 else []
    for (one, first), (other, second) in combinations(raters.items(), 2):
        found.append(krippendorff([(first.get(k), second.get(k)) for k in keys], f"{one} and {other}"))
    return tuple(found)


def _add(run_dir: Path, rater: str, rated: dict[str, float]) -> Labels:
    path = run_dir / LABELS
    old = store.read_json(path, Labels).ratings if path.exists() else {}
    store.write_json(path, labels := Labels({**old, rater: rated}))
    return labels
