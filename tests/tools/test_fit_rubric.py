"""The fit of lab_v2: the file is what the tool makes, and it holds for texts that were left out."""

from __future__ import annotations

from functools import cache

import pytest

from nbhelpers.scoring import rubric
from tools import fit_rubric


@cache
def rated() -> list[fit_rubric.Rated]:
    return fit_rubric.rated_texts()


def test_the_file_holds_the_fit_to_the_rated_texts() -> None:
    found, stored = fit_rubric.fit(rated()), rubric.fitted()
    for table, values in found.items():
        assert values == pytest.approx(getattr(stored, table), rel=1e-2, abs=1e-2), table


@pytest.mark.parametrize("by", ["prompt", "kind"])
def test_it_agrees_with_readers_on_texts_that_were_left_out(by: str) -> None:
    found = fit_rubric.agreement(rated(), fit_rubric.cross_validated(rated(), by))
    assert found["overall, all"] > 0.62 and found["overall, models"] > 0.67
    assert found["coherence, all"] > 0.67 and found["coherence, models"] > 0.69
    assert found["mean error"] < 0.8 and found["broken above 4"] <= 1
    before = [{"coherence": 0, "on_topic": 0, "overall": 1 + 0.9 * row.lab_v1} for row in rated()]
    old = fit_rubric.agreement(rated(), before)
    assert old["overall, models"] < 0.5 and old["mean error"] > 2 and old["broken above 4"] > 50


def test_the_models_stand_in_the_order_of_the_readers() -> None:
    scores = fit_rubric.cross_validated(rated(), "kind")
    means: dict[str, list[tuple[float, float]]] = {}
    for row, score in zip(rated(), scores, strict=True):
        if row.source.endswith("@0.8"):
            means.setdefault(row.source, []).append((row.reading["overall"], score["overall"]))
    order = [
        sorted(means, key=lambda name, k=k: sum(pair[k] for pair in means[name]) / len(means[name]))
        for k in (0, 1)
    ]  # type: ignore[misc]
    assert len(means) == 4 and order[0] == order[1]


def test_no_text_of_a_fold_has_its_prompt_in_the_fit() -> None:
    for train, test in fit_rubric.folds(rated(), 10):
        assert not {rated()[i].prompt for i in train} & {rated()[i].prompt for i in test}
        assert len(train) + len(test) == len(rated())
