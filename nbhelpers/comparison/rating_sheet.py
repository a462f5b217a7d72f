"""Ratings by people: a blind sheet of a run's texts goes out, filled-in sheets come back, agreement follows.

Or a judge, a model, rates every text. All rate from 1 to 10, as the rubric does. results: of ``comparable``.
"""

import csv
import math
import random
import re
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean, median, stdev

from nbhelpers import registry, store
from nbhelpers.comparison import ratings
from nbhelpers.comparison.ratings import KEY, LABELS, PERSON, Design, LabelKey, Labels, Ratings
from nbhelpers.generation import server
from nbhelpers.records import Estimate, LabError, Result
from nbhelpers.scoring import judge
from nbhelpers.stats import ppi
from nbhelpers.stats.estimate import krippendorff
from nbhelpers.stats.paired import EVERY_PAIR

SHEET = "labels.csv"
ASSUMED = 0.6  # correlation of score and readers over prompts, for planning; nobody has measured yours
FORMULA = tuple("=+-@\t\r\n＝＋－＠")  # a spreadsheet may run a cell that begins so (OWASP, CSV injection)
_RATING = re.compile(r"\d+(?:[.,]\d+)?", re.ASCII)


def write_sheet(run_dir: Path, results: Sequence[Result], count: int = 40, seed: int = 0) -> Path:
    """Write a blind sheet of at least ``count`` texts, if there are so many, and its key file.

    Whole prompts in the random order that the key records, each with a text of every model, the repeat drawn
    too. LabError for a run without texts or with a sheet already.
    """
    name = run_dir.name
    if (run_dir / KEY).exists() or (run_dir / SHEET).exists():
        raise LabError(f"The run {name} has {SHEET} already: read it with --read, or move it and {KEY} away.")
    texts = ratings.read_texts(run_dir, results)
    groups: dict[str, dict[str, list[str]]] = {}
    for key, text in sorted(texts.items()):
        groups.setdefault(text.prompt, {}).setdefault(text.model, []).append(key)
    if not groups or any(len(by_model) < len(results) for by_model in groups.values()):
        raise LabError(f"The run {name} has no texts of the same prompts: run its models to the end.")
    rng = random.Random(seed)
    order = ppi.random_order(ratings.strata_of(texts.values()), seed)
    drawn = order[: math.ceil(count / len(results))]
    shuffled = (rng.sample([*groups[prompt].values()], len(results)) for prompt in drawn)
    samples = [texts[rng.choice(repeats)].sample for by_model in shuffled for repeats in by_model]
    failed = tuple(sample.key for sample in samples if sample.error is not None)
    items = {str(n): sample for n, sample in enumerate((s for s in samples if s.error is None), 1)}
    design = Design(seed, tuple(order), len(drawn), failed)
    store.write_json(run_dir / KEY, LabelKey({number: s.key for number, s in items.items()}, design))
    # The byte order mark tells spreadsheet programs that it is UTF-8.
    with (run_dir / SHEET).open("w", encoding="utf-8-sig", errors="replace", newline="") as file:
        rows = ((number, harmless(s.prompt), harmless(s.text), "") for number, s in items.items())
        csv.writer(file).writerows((("item", "prompt", "text", "score"), *rows))
    return run_dir / SHEET


def harmless(cell: str) -> str:
    """The cell with an apostrophe in front if a spreadsheet could take it for a formula."""
    return f"'{cell}" if cell.startswith(FORMULA) else cell


def planned_widths(results: Sequence[Result]) -> tuple[float, dict[int, float]]:
    """What ratings will buy: number of ratings -> half the interval to expect of a difference of two models.

    The first value is the readers' deviation, taken from the score's (median over pairs); their correlation
    is ``ASSUMED``. {} for fewer than two models or too few prompts.
    """
    n = len(results[0].per_prompt) if len(results) > 1 else 0
    if n < ppi.LEAST:
        return 0.0, {}
    pairs = [(a.per_prompt, b.per_prompt) for a, b in combinations(results[:EVERY_PAIR], 2)]
    sd = median(stdev(a[prompt] - b[prompt] for prompt in a) for a, b in pairs)
    steps = [*(step for step in (6, 10, 20, 40, 80, 160, 320) if step < n), n]
    return sd, {k * len(results): ppi.half_width(sd, k, n, ASSUMED) for k in steps}


def read_sheet(run_dir: Path, path: Path) -> Labels:
    """Add a filled-in sheet to labels.json; the file's name without its ending is the rater.

    Commas or semicolons separate its cells. A rater who is read again is replaced. LabError with the line for
    an unknown or repeated item and a bad score.
    """
    items, scores = ratings.read_key(run_dir).items, dict[str, float]()
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise LabError(f"The sheet {path.name} cannot be read ({error}): save it as CSV in UTF-8.") from None
    for line, row in store.table(text, path.name):
        where = f"{path.name}, line {line}"
        if not {"item", "score"} <= row.keys():
            raise LabError(f"{where}: the columns item and score are missing.")
        item, score = row["item"].strip(), row["score"].strip()
        if score and (item not in items or item in scores):
            raise LabError(f"{where}: item {item!r} is not in {KEY}, or is there twice.")
        rating = float(score.replace(",", ".")) if _RATING.fullmatch(score) else 0.0
        if score and not 1 <= rating <= 10:
            raise LabError(f"{where}: the score {score!r} of item {item} is no number from 1 to 10.")
        if score:
            scores[item] = rating
    if not scores:
        raise LabError(f"The sheet {path.name} holds no scores: fill in the columns item and score.")
    file = run_dir / LABELS
    stored = store.read_json(file, Labels).ratings if file.exists() else {}
    store.write_json(file, labels := Labels({**stored, f"{PERSON}{path.stem}": scores}))
    return labels


def add_judge(run_dir: Path, results: Sequence[Result], model: str) -> None:
    """Let a model rate every text of these models that it has not rated: ``ratings.JUDGED``, by row."""
    spec, path = registry.resolve(model), run_dir / ratings.JUDGED
    by_model = ratings.read_judged(run_dir)
    given = by_model[spec.alias] = by_model.pop(spec.alias, {})  # last: it is the latest judge now
    samples = (text.sample for text in ratings.read_texts(run_dir, results).values())
    unrated = [sample for sample in samples if sample.key not in given and sample.error is None]
    if not unrated:
        store.write_json(path, ratings.Judged(by_model))
        return
    loaded = server.open_model(spec)
    try:
        for sample in unrated:
            given[sample.key] = judge.judge(loaded, sample.prompt, sample.text).score
    finally:  # what was rated is kept, also when it was stopped
        server.close(loaded)
        store.write_json(path, ratings.Judged(by_model))


def agreement(rated: Ratings, primary: str) -> tuple[Estimate, ...]:
    """Krippendorff's alpha between people, and between their mean, the rubric and each other rater, in pairs.

    "readers" are those whose ratings ship; ``n`` counts the texts that both have rated. () without ratings.
    """
    if not rated.given:
        return ()
    people = rated.people
    others = {rater: by for rater, by in rated.given.items() if not rater.startswith(PERSON)}
    keys = dict.fromkeys(key for by in (*people, *others.values()) for key in by)
    by_people = {key: [by[key] for by in people if key in by] for key in keys}
    raters = {"people": {key: fmean(given) for key, given in by_people.items() if given}} if people else {}
    raters |= {primary: rated.scores} | others
    alphas = [krippendorff(by_people.values(), "people")] if len(people) > 1 else []
    for (one, a), (other, b) in combinations(raters.items(), 2):
        alphas.append(krippendorff([(a.get(key), b.get(key)) for key in keys], f"{one} and {other}"))
    return tuple(alphas)
