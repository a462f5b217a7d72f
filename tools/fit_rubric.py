"""Fit lab_v2 on the rated texts of data/readers, and write data/rubric.toml.

    python tools/fit_rubric.py

Texts that people would write are few among the rated ones and the models' many, so each hand-written one
counts three times, and answers of data/questions.toml, whole and damaged, are added with the coherence that
readers gave to such damage. Two steps. Coherence and on topic: a logistic curve over a few measures of the
text, by least squares with a penalty. Overall: the formula of ``rubric.overall``, with the components as they
are predicted for texts that were left out of their own fit, so that it learns how far they can be trusted.
Prints what cross-validation says of texts on other prompts, and of sources that were left out altogether.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean

import numpy as np
from scipy import optimize
from scipy import stats as sps
from scipy.special import expit

from nbhelpers import store
from nbhelpers.scoring import coherence, rubric

READINGS = ("coherence", "on_topic", "overall")
HAND_WRITTEN, MADE = 3.0, 0.5  # how much such a text counts
DAMAGE = {
    0.0: 5.0,
    0.06: 4.1,
    0.15: 3.1,
    0.4: 1.7,
    1.0: 1.0,
}  # share of words exchanged -> coherence, as rated
PENALTY = 0.3  # of a standardised weight, against squared errors
STARTS = {  # of the numbers of ``rubric.overall``, and their bounds
    "scale": (7.0, 1.0, 12.0),
    "power": (1.4, 0.3, 4.0),
    "off_topic": (0.4, 0.0, 1.0),
    "vague": (0.5, 0.0, 1.0),
    "misfit": (0.5, 0.0, 1.0),
    "cut": (0.3, 0.0, 1.0),
    "repeated": (0.9, 0.8, 1.0),  # by rule: few rated texts are loops, and these say little
}
KINDS = {  # sources that are of one kind: left out together
    "damaged": "exchanged",
    "planted:shuffled words": "shuffled",
    "shuffled by threes": "shuffled",
    "planted:cut in half": "cut in half",
    "planted:wrong length": "too short",
    "planted:off topic": "authored off topic",
    "planted:strong": "authored",
}


@dataclass(frozen=True)
class Rated:
    """A rated text: its measures, and the mean of its readings."""

    id: str
    source: str
    prompt: str
    text: str
    measures: dict[str, dict[str, float]]  # component -> measure -> value
    parts: dict[str, float]  # the parts of lab_v2 that need no fit
    lab_v1_parts: dict[str, float]
    reading: dict[str, float]

    @property
    def kind(self) -> str:
        bare = self.source.partition("@")[0]
        bare = bare if bare.startswith("planted") else bare.partition(":")[0]
        return KINDS.get(bare, bare)

    @property
    def lab_v1(self) -> float:
        return rubric.combine(self.lab_v1_parts)

    @property
    def weight(self) -> float:
        return HAND_WRITTEN if self.source.startswith(("planted", "damaged")) else 1.0

    @property
    def by_model(self) -> bool:
        return "@" in self.source


def rated_texts() -> list[Rated]:
    """The rated texts, without those that were rated again."""
    found = []
    for line in (store.data_dir() / "readers" / "rated.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["source"].startswith("again:"):
            continue
        text, prompt, kind = row["text"], row["prompt"], row["content_type"]
        measures = {"coherence": coherence.measures(text), "on_topic": rubric.topic_measures(text, prompt)}
        reading = {name: fmean(rating[name] for rating in row["ratings"].values()) for name in READINGS}
        old = rubric.lab_components(text, prompt, kind)
        parts = rubric.given_parts(text, prompt, kind)
        found.append(Rated(row["id"], row["source"], prompt, text, measures, parts, old, reading))
    return found


@cache
def made_texts() -> list[tuple[dict[str, float], float]]:
    """Measures and assumed coherence of answers of data/questions.toml, two in six of them whole."""
    questions = store.read_table("questions.toml", lambda data: data["question"])
    answers = [row["answer"].split() for row in questions if len(row["answer"].split()) >= 80][:150]
    words, chosen, found = [word for answer in answers for word in answer], random.Random(0), []
    for number, answer in enumerate(answers):
        share = (0.0, *DAMAGE)[number % 6]
        text = " ".join(chosen.choice(words) if chosen.random() < share else word for word in answer)
        found.append((coherence.measures(text), DAMAGE[share]))
    return found


def curve(rows: Sequence[Rated], name: str) -> dict[str, float]:
    """Weights of ``rubric.on_scale`` for one component."""
    names, made = tuple(rows[0].measures[name]), made_texts() if name == "coherence" else []
    every = [row.measures[name] for row in rows] + [measures for measures, _ in made]
    x = np.array([[measures[measure] for measure in names] for measures in every])
    mean, scale = x.mean(0), x.std(0) + 1e-9
    z, y = (x - mean) / scale, np.array([row.reading[name] for row in rows] + [level for _, level in made])
    counts = np.sqrt([row.weight for row in rows] + [MADE] * len(made))

    def errors(weights: np.ndarray) -> np.ndarray:
        return np.concatenate(
            [counts * (1 + 4 * expit(z @ weights[1:] + weights[0]) - y), PENALTY * weights[1:]]
        )

    def slopes(weights: np.ndarray) -> np.ndarray:
        rise = expit(z @ weights[1:] + weights[0])
        own = (counts * 4 * rise * (1 - rise))[:, None] * np.column_stack([np.ones(len(z)), z])
        return np.vstack([own, PENALTY * np.eye(len(names), len(weights), 1)])

    best = optimize.least_squares(errors, np.zeros(len(names) + 1), slopes).x
    weights = best[1:] / scale
    return {"constant": float(best[0] - weights @ mean), **dict(zip(names, map(float, weights), strict=True))}


def components(rows: Sequence[Rated], weights: Mapping[str, Mapping[str, float]]) -> list[dict[str, float]]:
    return [
        row.parts | {name: rubric.on_scale(row.measures[name], weights[name]) for name in READINGS[:2]}
        for row in rows
    ]


def numbers(parts: Sequence[Mapping[str, float]], rows: Sequence[Rated]) -> dict[str, float]:
    """The numbers of ``rubric.overall`` with the least squared errors."""

    readings, counts = np.array([[row.reading["overall"], row.weight**0.5] for row in rows]).T
    columns = {name: np.array([part[name] for part in parts]) for name in parts[0]}

    def errors(values: np.ndarray) -> np.ndarray:
        return counts * (rubric.overall(columns, dict(zip(STARTS, values, strict=True))) - readings)

    start, low, high = zip(*STARTS.values(), strict=True)
    best = optimize.least_squares(errors, start, bounds=(low, high)).x
    return dict(zip(STARTS, map(float, best), strict=True))


def fit(rows: Sequence[Rated]) -> dict[str, dict[str, float]]:
    """The tables of data/rubric.toml."""
    weights = {name: curve(rows, name) for name in READINGS[:2]}
    left_out: list[dict[str, float]] = [{} for _ in rows]
    for train, test in folds(rows, 5):
        own = {name: curve([rows[i] for i in train], name) for name in READINGS[:2]}
        for i, part in zip(test, components([rows[i] for i in test], own), strict=True):
            left_out[i] = part
    return weights | {"overall": numbers(left_out, rows)}


def folds(rows: Sequence[Rated], count: int) -> list[tuple[list[int], list[int]]]:
    """Rows to fit and rows to test; the texts of one prompt stand on one side."""
    prompts = sorted({row.prompt for row in rows})
    side = dict(zip(prompts, np.random.default_rng(0).permutation(len(prompts)) % count, strict=True))
    each = [side[row.prompt] for row in rows]
    return [
        ([i for i, s in enumerate(each) if s != k], [i for i, s in enumerate(each) if s == k])
        for k in range(count)
    ]


def predict(rows: Sequence[Rated], fitted: Mapping[str, Mapping[str, float]]) -> list[dict[str, float]]:
    """Coherence, on topic and overall of each text."""
    parts = components(rows, fitted)
    return [part | {"overall": float(rubric.overall(part, fitted["overall"]))} for part in parts]


def cross_validated(rows: Sequence[Rated], by: str = "prompt") -> list[dict[str, float]]:
    """What each text gets from a fit without the texts on its prompt, or without its "kind" of source."""
    if by == "kind":
        kinds = sorted({row.kind for row in rows})
        splits = [
            ([i for i, r in enumerate(rows) if r.kind != k], [i for i, r in enumerate(rows) if r.kind == k])
            for k in kinds
        ]
    else:
        splits = folds(rows, 10)
    found: list[dict[str, float]] = [{} for _ in rows]
    for train, test in splits:
        fitted = fit([rows[i] for i in train])
        for i, part in zip(test, predict([rows[i] for i in test], fitted), strict=True):
            found[i] = part
    return found


def agreement(rows: Sequence[Rated], scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Kendall's tau with the readers, over all texts and over the models' own; the mean error of overall."""
    every, models = range(len(rows)), [i for i, row in enumerate(rows) if row.by_model]
    found = {}
    for name in READINGS:
        for which, chosen in (("all", every), ("models", models)):
            pairs = [(scores[i][name], rows[i].reading[name]) for i in chosen]
            found[f"{name}, {which}"] = float(sps.kendalltau(*zip(*pairs, strict=True)).statistic)
    found["mean error"] = fmean(
        abs(s["overall"] - r.reading["overall"]) for s, r in zip(scores, rows, strict=True)
    )
    broken = [s["overall"] for s, r in zip(scores, rows, strict=True) if r.reading["coherence"] <= 2]
    found["broken above 4"] = float(sum(score > 4 for score in broken))
    return found


def main() -> None:
    rows = rated_texts()
    fitted = fit(rows)
    for label, scores in (
        ("as fitted", predict(rows, fitted)),
        ("other prompts", cross_validated(rows)),
        ("other kinds", cross_validated(rows, "kind")),
    ):
        print(f"{label:14s}", *(f"{name} {value:.2f};" for name, value in agreement(rows, scores).items()))
    lines = [
        "# Written by tools/fit_rubric.py from the rated texts of readers/; notebook 04 shows the fit.",
        "",
    ]
    for table, values in fitted.items():
        lines += [f"[{table}]", *(f"{name} = {value:.5g}" for name, value in values.items()), ""]
    store.write_text(store.data_dir() / "rubric.toml", ["\n".join(lines)])


if __name__ == "__main__":
    main()
