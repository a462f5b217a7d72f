"""The routing of notebook 08 on planted truths: who writes a type best, who is tied, what shrinking gains."""

import numpy as np
import pytest
from definitions import definitions
from hypothesis import given, settings
from hypothesis import strategies as st
from made_runs import planted

from nbhelpers.stats import paired

ROUTING = definitions("08_routing", "routing")
EACH = 12  # prompts of a type


def choose(by_model, expected=None, usd=None, tied=()):
    """The notebook's route for {model: scores}, by their own means unless others are expected."""
    scores = {model: {f"b{i:02}": x for i, x in enumerate(values)} for model, values in by_model.items()}
    means = {model: float(np.mean(values)) for model, values in by_model.items()}
    return ROUTING.route(scores, expected or means, usd or dict.fromkeys(scores, 1.0), tied)


def test_the_best_model_is_found():
    model, basis, why = choose({"good": planted(7, seed=1, n=EACH), "other": planted(5, seed=2, n=EACH)})
    assert (model, basis) == ("good", "better")
    assert why.startswith("good is expected to write best; good writes better than other: +2.00 points [")


def test_of_tied_models_the_cheapest_is_taken():
    by_model = {
        "leader": planted(6.05, seed=1, n=EACH),
        "cheap": planted(6.0, seed=2, n=EACH),
        "cheapest-but-worse": planted(3.0, seed=3, n=EACH),
    }
    model, basis, why = choose(by_model, usd={"leader": 3, "cheap": 2, "cheapest-but-worse": 1})
    assert (model, basis) == ("cheap", "tied")
    assert "; leader and cheap are tied within 0.5 points: +0.05 points" in why
    assert why.endswith("; of the tied cheap is the cheapest.")


def test_cost_does_not_decide_where_nothing_is_tied():
    """Two points of lead in five prompts: Holm over six pairs cannot call that better, and still it leads."""
    names = ("strong", "weak-2", "weak-3", "weak-5")
    few, more = (
        {name: planted(5 if i else 7, seed=i + 1, n=n) for i, name in enumerate(names)} for n in (5, 9)
    )
    usd = {name: 4 - i for i, name in enumerate(names)}
    model, basis, why = choose(few, usd=usd)
    assert (model, basis) == ("strong", "cannot tell") and "cannot tell: +2.00 points" in why
    assert choose(more, usd=usd)[1] == "better"


def test_few_prompts_of_a_type_do_not_overrule_all_types():
    """One model is better on 3 x 12 prompts; on five of the last type chance puts the other ahead."""
    rng = np.random.default_rng(1)
    types = np.repeat(list("abcd"), [12, 12, 12, 5])
    good, other = [5.9, 5.2, 6.4, 5.5, 6.0], [6.3, 5.6, 5.9, 6.2, 6.2]
    table = np.array([[*rng.normal(7, 1, 36), *good], [*rng.normal(5.5, 1, 36), *other]])
    means = ROUTING.shrunk_means(table, list(types))["d"]
    expected = dict(zip(("good", "other"), means, strict=True))
    model, basis, _ = choose({"good": good, "other": other}, expected, {"good": 9, "other": 1})
    assert (model, basis) == ("good", "cannot tell") and np.mean(other) > np.mean(good)


def test_models_tied_overall_share_the_types_that_cannot_tell():
    by_model = {"dear": planted(6.3, seed=1, n=5), "cheap": planted(6.0, seed=2, n=5, noise=2.0)}
    usd = {"dear": 2, "cheap": 1}
    assert choose(by_model, usd=usd)[:2] == ("dear", "cannot tell")
    assert choose(by_model, usd=usd, tied=[{"cheap", "dear"}])[:2] == ("cheap", "tied")


def test_a_single_model_is_taken():
    assert choose({"a": planted(5, seed=1, n=EACH)}) == ("a", "better", "a is expected to write best.")


def test_shrunk_means_are_those_of_a_balanced_analysis_of_variance():
    """Two models, types of four prompts: the formulas of Efron and Morris, written out for the difference."""
    rng = np.random.default_rng(3)
    types = [kind for kind in "abc" for _ in range(4)]
    effect = np.repeat([1.5, 0.0, -1.5], 4)
    scores = np.array([6 + effect, np.full(12, 5.0)]) + rng.normal(0, 0.7, (2, 12))
    gaps = (scores[0] - scores[1]).reshape(3, 4)
    own = gaps.mean(axis=1) - gaps.mean()
    within, between = gaps.var(axis=1, ddof=1).mean(), 4 * own.var(ddof=1)
    weight = max(0.0, 1 - within / between)
    found = ROUTING.shrunk_means(scores, types)
    for kind, mine in zip("abc", own, strict=True):
        assert found[kind][0] - found[kind][1] == pytest.approx(gaps.mean() + weight * mine)
        at = [i for i, name in enumerate(types) if name == kind]
        assert np.mean(found[kind]) == pytest.approx(scores[:, at].mean())
    assert 0.5 < weight < 1
    assert ROUTING.shrunk_means(scores, ["a"] * 12)["a"] == pytest.approx(list(scores.mean(axis=1)))
    noise = ROUTING.shrunk_means(np.array([[1.0, 2, 3, 4], [2.0, 1, 4, 3]]), ["a", "a", "b", "b"])
    assert {kind: list(means) for kind, means in noise.items()} == {"a": [1.5, 1.5], "b": [3.5, 3.5]}


@pytest.mark.parametrize(("apart", "n"), [(0.0, 5), (0.5, 5), (0.5, 20), (2.0, 5)])
def test_shrinking_never_loses_much_and_gains_where_types_differ(apart, n):
    """Four types, four models, the best ahead overall: points lost against the best of each type."""
    rng = np.random.default_rng(0)
    types, lost = np.repeat(list("abcd"), n), np.zeros(3)
    for _ in range(150):
        skill = (
            np.array([0, 0, 0, 0.5])[:, None] + rng.normal(0, apart, (4, 4)) if apart else np.zeros((4, 4))
        )
        skill[3] += 0.5 * (apart == 0)
        x = np.repeat(skill, n, axis=1) + rng.normal(0, 1.5, 4 * n) + rng.normal(0, 1, (4, 4 * n))
        shrunk = np.array(list(ROUTING.shrunk_means(x, list(types)).values())).T
        raw = np.array([x[:, types == kind].mean(axis=1) for kind in "abcd"]).T
        one = np.full(4, x.mean(axis=1).argmax())
        for i, chosen in enumerate((shrunk.argmax(axis=0), raw.argmax(axis=0), one)):
            lost[i] += np.mean(skill.max(axis=0) - skill[chosen, range(4)]) / 150
    assert lost[0] <= lost[1] + 0.03 and lost[0] <= lost[2] + 0.06
    assert lost[0] < lost[1 if apart == 0 else 2]


@given(
    tables=st.lists(st.lists(st.integers(0, 10), min_size=6, max_size=6), min_size=1, max_size=4),
    costs=st.lists(st.integers(1, 3), min_size=4, max_size=4),
    count=st.integers(2, 6),
)
@settings(max_examples=60, deadline=None)
def test_the_choice_follows_from_the_verdicts_and_the_costs(tables, costs, count):
    by_model = {f"m{n}": list(map(float, row[:count])) for n, row in enumerate(tables)}
    order = sorted(by_model, key=lambda model: -np.mean(by_model[model]))
    scores = {m: {f"b{i:02}": x for i, x in enumerate(by_model[m])} for m in order}
    pairs = paired.compare_all(scores, margin=0.5)
    equal = [pair.b for pair in pairs if pair.a == order[0] and pair.verdict == "tied"]
    model, _, why = choose(by_model, usd={name: costs[int(name[1])] for name in by_model})
    assert model == min([order[0], *equal], key=lambda name: costs[int(name[1])])
    assert why.endswith(".") and "\n" not in why
