"""Count the rated texts of data/readers into data/rubric.csv, and say how well lab_v2 holds.

    python tools/fit_rubric.py

The score itself is fitted by ``rubric.fit`` when it is first used. Here it is fitted to some of the texts and
judged on the others: those on other prompts, and those of a kind of source that was left out altogether.
The planted answers are few among the rated texts, so each counts three times; those written for the upper end
of the scale are by one hand each, so they count half or a quarter.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from scipy import stats as sps

from nbhelpers import store
from nbhelpers.scoring import rubric
from nbhelpers.stats.estimate import Array

# How much a text of such a source counts.
WEIGHTS = {"planted": 3.0, "damaged": 3.0, "written": 0.5, "by hand": 0.25}
WEIGHTS |= dict.fromkeys(("pieces", "words in sentences", "words left out", "figures"), 0.6)
KINDS = {  # sources that are of one kind: left out together
    "damaged": "exchanged",
    "planted:shuffled words": "shuffled",
    "words in sentences": "shuffled",
    "shuffled by threes": "pieces",
    "planted:cut in half": "cut in half",
    "written:cut": "cut in half",
    "planted:wrong length": "wrong length",
    "written:wrong length": "wrong length",
    "too short": "wrong length",
    "planted:off topic": "off topic",
    "written:other topic": "off topic",
    "authored off topic": "off topic",
    "planted:strong": "strong",
    "written:excellent": "strong",
    "by hand:good": "strong",
    "planted:weak": "weak",
    "written:generic": "weak",
    "by hand:so-so": "weak",
    "by hand:figures appended": "figures",
}


@dataclass(frozen=True)
class Text:
    """A rated text, with the mean of its readings."""

    id: str
    source: str
    prompt: str
    content_type: str
    text: str
    reading: dict[str, float]

    @property
    def kind(self) -> str:
        bare = self.source.partition("@")[0]
        bare = bare if bare.startswith(("planted", "written", "by hand")) else bare.partition(":")[0]
        return KINDS.get(bare, bare)

    @property
    def weight(self) -> float:
        return WEIGHTS.get(self.source.partition(":")[0], 1.0)

    @property
    def by_model(self) -> bool:
        return "@" in self.source


def texts() -> list[Text]:
    """The rated texts, without those rated again and those of today's models, which are the test."""
    found, readers = list[Text](), store.data_dir() / "readers"
    for file, other in (("rated.jsonl", "again:"), ("models.jsonl", "lab-")):
        for line in (readers / file).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            ratings = row.pop("ratings").values()
            reading = {name: fmean(rating[name] for rating in ratings) for name in rubric.READINGS}
            if not row["source"].startswith(other):
                found.append(Text(**row, reading=reading))
    return found


def asked(row: Text) -> tuple[str, str, str]:
    """What a rubric takes: the text, its prompt and its content type."""
    return row.text, row.prompt, row.content_type


def counted(rows: Sequence[Text]) -> rubric.RatedTexts:
    """The rated texts as ``rubric.fit`` takes them."""
    measures = [rubric.measures(*asked(row)) for row in rows]
    return rubric.RatedTexts(
        tuple(row.id for row in rows),
        tuple(measures[0]),
        np.array([list(found.values()) for found in measures]),
        np.array([list(row.reading.values()) for row in rows]),
        np.array([row.weight for row in rows]),
    )


def part(rated: rubric.RatedTexts, chosen: Sequence[int]) -> rubric.RatedTexts:
    ids, rows = tuple(rated.ids[i] for i in chosen), np.array(chosen)
    columns = (values[rows] for values in (rated.measures, rated.readings, rated.weights))
    return rubric.RatedTexts(ids, rated.names, *columns)


def folds(groups: Sequence[str], count: int = 10) -> list[list[int]]:
    """The rows of each of ``count`` parts at random; those of one group stand in one."""
    names = sorted(set(groups))
    places = dict(zip(names, np.random.default_rng(0).permutation(len(names)) % count, strict=True))
    return [[i for i, group in enumerate(groups) if places[group] == fold] for fold in range(count)]


def left_out(rated: rubric.RatedTexts, parts: Sequence[Sequence[int]]) -> Array:
    """[texts, readings]: what each text gets from a fit without the part that it is in."""
    found = np.empty_like(rated.readings)
    for rows in parts:
        others = part(rated, [i for i in range(len(found)) if i not in set(rows)])
        found[list(rows)] = rubric.fit(others).readings(rated.measures[list(rows)])
    return found


def by_prompt(rows: Sequence[Text], rated: rubric.RatedTexts) -> Array:
    return left_out(rated, folds([row.prompt for row in rows]))


def by_kind(rows: Sequence[Text], rated: rubric.RatedTexts) -> Array:
    return left_out(rated, folds([row.kind for row in rows], len({row.kind for row in rows})))


def agreement(rows: Sequence[Text], scores: Array) -> dict[str, float]:
    """Kendall's tau with the readers, over all texts and over the models' own; the mean error of overall."""
    models, found = np.array([row.by_model for row in rows]), dict[str, float]()
    readings = np.array([list(row.reading.values()) for row in rows])
    for column, name in enumerate(rubric.READINGS):
        for which, chosen in (("all", models | True), ("models", models)):
            pair = scores[chosen, column], readings[chosen, column]
            found[f"{name}, {which}"] = float(sps.kendalltau(*pair).statistic)
    found["mean error"] = float(np.abs(scores - readings)[:, -1].mean())
    found["broken above 4"] = float((scores[readings[:, 0] <= 2, -1] > 4).sum())
    return found


def main() -> None:
    rows = texts()
    rated = counted(rows)
    table = io.StringIO()
    lines = csv.writer(table, lineterminator="\n")
    lines.writerow(["text", *rated.names, *rubric.READINGS, "weight"])
    for row in zip(rated.ids, rated.measures, rated.readings, rated.weights, strict=True):
        values = (*row[1], *row[2], row[3])
        lines.writerow([row[0], *(f"{value:.5g}" for value in values)])
    store.write_text(store.data_dir() / "rubric.csv", [table.getvalue()])
    for label, scores in (("other prompts", by_prompt(rows, rated)), ("other kinds", by_kind(rows, rated))):
        print(f"{label:14s}", *(f"{name} {value:.2f};" for name, value in agreement(rows, scores).items()))


if __name__ == "__main__":
    main()
