"""Routing on runs whose truth is planted: who writes what best, who is tied, who may not take part."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_runs import METRICS, make_result, make_sample, planted, prompt_ids, write_info, write_model

from nbhelpers import store
from nbhelpers.comparison import routing
from nbhelpers.comparison.routing import RoutingReport
from nbhelpers.records import CONTENT_TYPES, LabError
from nbhelpers.stats import paired

EACH = 12  # prompts of a type
NOTE = "business_note"


def result_of(model, by_type, usd=None, **changes):
    """A result with the scores of each type in turn; prompts b01… are dealt out type after type."""
    scores = [score for values in by_type.values() for score in values]
    metrics = METRICS if usd is None else METRICS | {"cost/usd_per_request": usd}
    return make_result(model, scores, metrics=metrics, **changes)


def write_run(run_dir, by_model, **changes):
    """Write models with scores {type: [score of each prompt]}; changes: {model: arguments of result_of}."""
    for model, by_type in by_model.items():
        result = result_of(model, by_type, **changes.get(model, {}))
        types = [kind for kind, values in by_type.items() for _ in values]
        rows = zip(result.per_prompt.items(), types, strict=True)
        samples = [
            (make_sample(model, prompt, 0, content_type=kind), score) for (prompt, score), kind in rows
        ]
        write_model(run_dir, result, samples)
    return run_dir


def choices(report):
    return {route.content_type: (route.model, route.basis) for route in report.routes}


# ---- planted truths ------------------------------------------------------------------------------------


def test_the_best_model_of_each_type_is_found(tmp_path):
    """Each of four models is two points better at one type; on all prompts together they are alike."""
    by_model = {
        f"writer-of-{best}": {
            kind: planted(7.0 if kind == best else 5.0, seed=10 * row + column, n=EACH)
            for column, kind in enumerate(CONTENT_TYPES)
        }
        for row, best in enumerate(CONTENT_TYPES)
    }
    report = routing.route_run(write_run(tmp_path, by_model))
    assert choices(report) == {kind: (f"writer-of-{kind}", "better") for kind in CONTENT_TYPES}
    assert all(route.prompts == EACH for route in report.routes)
    assert report.routes[0].reason.startswith(
        "short_post: writer-of-short_post is expected to write best; writer-of-short_post writes better than"
    )
    assert "+2.00 points [" in report.routes[0].reason
    assert "Within 0.5 points it is tied with" in report.default_reason
    assert store.read_json(tmp_path / "routing.json", RoutingReport) == report


def test_of_tied_models_the_cheapest_is_taken(tmp_path):
    by_model = {
        "leader": {NOTE: planted(6.05, seed=1, n=EACH)},
        "cheap": {NOTE: planted(6.0, seed=2, n=EACH)},
        "cheapest-but-worse": {NOTE: planted(3.0, seed=3, n=EACH)},
    }
    costs = {"leader": {"usd": 3e-6}, "cheap": {"usd": 2e-6}, "cheapest-but-worse": {"usd": 1e-6}}
    route = routing.assemble(write_run(tmp_path, by_model, **costs)).routes[-1]
    assert (route.model, route.basis) == ("cheap", "tied")
    assert list(route.quality) == list(by_model)
    assert "; leader and cheap are tied within 0.5 points: +0.05 points" in route.reason
    assert route.reason.endswith("; of leader, cheap, tied here or overall, the cheapest is cheap.")


def test_without_a_cost_the_fastest_of_the_tied_is_taken():
    metrics = {name: value for name, value in METRICS.items() if not name.startswith("cost/")}
    speed = "latency/words_per_s/mean"
    results = [
        make_result("slow", planted(6.05, seed=1), metrics=metrics | {speed: 40.0}),
        make_result("fast", planted(6.0, seed=2), metrics=metrics | {speed: 90.0}),
    ]
    route = routing.route(NOTE, prompt_ids(), results)
    assert (route.model, route.basis) == ("fast", "tied")


def test_cost_does_not_decide_where_nothing_is_tied():
    """Two points of lead in five prompts: Holm over six pairs cannot call that better, and still it leads."""
    results = [
        result_of("strong", {NOTE: planted(7, seed=1, n=5)}, usd=4e-6),
        *(result_of(f"weak-{n}", {NOTE: planted(5, seed=n, n=5)}, usd=n * 1e-6) for n in (2, 3, 5)),
    ]
    route = routing.route(NOTE, prompt_ids(5), results)
    assert (route.basis, route.model) == ("cannot tell", "strong")
    assert "cannot tell: +2.00 points" in route.reason
    assert route.reason.startswith("business_note: strong is expected to write best; strong and weak-2")
    more = [
        result_of(r.model, {NOTE: planted(7 if n == 0 else 5, seed=n, n=9)}) for n, r in enumerate(results)
    ]
    assert routing.route(NOTE, prompt_ids(9), more).basis == "better"


def test_few_prompts_of_a_type_do_not_overrule_all_types(tmp_path):
    """One model is better on 3 x 12 prompts; on five of the last type chance puts the other ahead."""
    types = list(CONTENT_TYPES)
    rng = np.random.default_rng(1)
    good, other = ({kind: list(rng.normal(m, 1, 12)) for kind in types[:3]} for m in (7, 5.5))
    good |= {types[3]: [5.9, 5.2, 6.4, 5.5, 6.0]}
    other |= {types[3]: [6.3, 5.6, 5.9, 6.2, 6.2]}
    run = write_run(tmp_path, {"good": good, "other": other}, good={"usd": 9e-6}, other={"usd": 1e-6})
    report = routing.assemble(run)
    assert report.default == "good" and {route.model for route in report.routes} == {"good"}
    last = report.routes[3]
    assert next(iter(last.quality)) == "other" and last.basis == "cannot tell"


def test_models_tied_overall_share_the_types_that_cannot_tell():
    results = [
        make_result("dear", planted(6.3, seed=1, n=5), metrics=METRICS | {routing.COST: 2.0}),
        make_result("cheap", planted(6.0, seed=2, n=5, noise=2.0), metrics=METRICS | {routing.COST: 1.0}),
    ]
    alone = routing.route(NOTE, prompt_ids(5), results)
    assert (alone.model, alone.basis) == ("dear", "cannot tell")
    both = routing.route(NOTE, prompt_ids(5), results, tied=[{"cheap", "dear"}])
    assert (both.model, both.basis) == ("cheap", "tied")


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
    found = routing.shrunk_means(scores, types)
    for kind, mine in zip("abc", own, strict=True):
        assert found[kind][0] - found[kind][1] == pytest.approx(gaps.mean() + weight * mine)
        at = [i for i, name in enumerate(types) if name == kind]
        assert np.mean(found[kind]) == pytest.approx(scores[:, at].mean())
    assert 0.5 < weight < 1
    one = routing.shrunk_means(scores, ["a"] * 12)["a"]
    assert one == pytest.approx(list(scores.mean(axis=1)))
    noise = np.array([[1.0, 2, 3, 4], [2.0, 1, 4, 3]])
    assert routing.shrunk_means(noise, ["a", "a", "b", "b"]) == {"a": [1.5, 1.5], "b": [3.5, 3.5]}


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
        shrunk = np.array(list(routing.shrunk_means(x, list(types)).values())).T
        raw = np.array([x[:, types == kind].mean(axis=1) for kind in "abcd"]).T
        one = np.full(4, x.mean(axis=1).argmax())
        for i, chosen in enumerate((shrunk.argmax(axis=0), raw.argmax(axis=0), one)):
            lost[i] += np.mean(skill.max(axis=0) - skill[chosen, range(4)]) / 150
    assert lost[0] <= lost[1] + 0.03 and lost[0] <= lost[2] + 0.06
    assert lost[0] < lost[1 if apart == 0 else 2]


@given(
    tables=st.lists(st.lists(st.integers(0, 10), min_size=6, max_size=6), min_size=1, max_size=4),
    costs=st.lists(st.integers(1, 3), min_size=4, max_size=4),
    count=st.integers(0, 6),
)
@settings(max_examples=60, deadline=None)
def test_the_choice_follows_from_the_verdicts_and_the_costs(tables, costs, count):
    results = [
        make_result(f"m{n}", list(map(float, row)), metrics=METRICS | {routing.COST: float(costs[n])})
        for n, row in enumerate(tables)
    ]
    prompts = prompt_ids(6)[:count]
    route = routing.route(NOTE, prompts, results)
    if count < 2:
        assert (route.model, route.basis) == (None, "no data")
        return
    scores = {r.model: {prompt: r.per_prompt[prompt] for prompt in prompts} for r in results}
    order = sorted(scores, key=lambda model: -np.mean(list(scores[model].values())))
    pairs = paired.compare_all({model: scores[model] for model in order}, margin=0.5)
    equal = [pair.b for pair in pairs if pair.a == order[0] and pair.verdict == "tied"]
    assert list(route.quality) == order
    assert route.model == min([order[0], *equal], key=lambda model: costs[int(model[1])])
    assert route.reason.startswith(NOTE) and route.reason.endswith(".") and "\n" not in route.reason


# ---- who takes no part, and what is missing ------------------------------------------------------------


def test_failed_random_and_differently_made_models_take_no_part(tmp_path):
    good = {NOTE: planted(5, seed=1, n=EACH)}
    best = {NOTE: planted(9, seed=2, n=EACH)}
    by_model = {"good": good, "also-good": good, "random": best, "all-failed": best, "longer": best}
    changes = {
        "random": {"quality_applies": False},
        "all-failed": {"finished": 0},
        "longer": {"settings": {"max_new_tokens": 999}},
    }
    write_run(tmp_path, by_model, **changes)
    write_info(tmp_path, [*by_model, "crashed"], {"crashed": "out of memory"})
    report = routing.assemble(tmp_path)
    assert set(report.excluded) == {"random", "all-failed", "longer", "crashed"}
    assert set(report.routes[-1].quality) == {"good", "also-good"}


def test_types_without_enough_prompts_say_so(tmp_path):
    scores = {"short_post": [5.0], NOTE: planted(5, seed=1, n=EACH)}
    write_run(tmp_path, {"a": scores, "b": scores | {NOTE: planted(7, seed=2, n=EACH)}})
    report = routing.assemble(tmp_path)
    assert choices(report) == {
        "short_post": (None, "no data"),
        "linkedin_post": (None, "no data"),
        "technical_article": (None, "no data"),
        NOTE: ("b", "better"),
    }
    for route, count in zip(report.routes, (1, 0), strict=False):
        needs = "a difference needs at least 2 prompts, the run has"
        assert route.reason == f"{route.content_type}: {needs} {count} of this type."
    assert report.default == "b"


def test_a_single_model_is_taken_and_called_the_only_one(tmp_path):
    route = routing.assemble(write_run(tmp_path, {"a": {NOTE: planted(5, seed=1, n=EACH)}})).routes[-1]
    assert (route.model, route.basis) == ("a", "only model")
    assert route.reason.startswith("business_note: a is the only model")


def test_a_run_whose_models_all_failed_routes_nothing(tmp_path):
    write_run(tmp_path, {"a": {NOTE: planted(5, seed=1, n=EACH)}}, a={"finished": 0})
    report = routing.assemble(tmp_path)
    assert report.default is None and {route.model for route in report.routes} == {None}
    assert report.routes[0].reason.startswith(
        "short_post: no model could be compared on quality, the run has"
    )


def test_results_without_their_scores_are_one_sentence(tmp_path):
    write_model(tmp_path, make_result("a", planted(5, seed=1)))
    with pytest.raises(LabError, match=r"b01 is in no scores\.jsonl of .*: run notebook 04"):
        routing.assemble(tmp_path)
    with pytest.raises(LabError, match="run the notebooks 01 to 06 first"):
        routing.assemble(tmp_path / "empty")


def test_the_command_prints_a_line_for_each_type(tmp_path, capsys, monkeypatch):
    from nbhelpers import cli

    run_dir = write_run(tmp_path / "run", {name: {NOTE: planted(5, seed=1, n=EACH)} for name in ("a", "b")})
    write_info(run_dir, ["a", "b"])
    monkeypatch.setattr("sys.argv", ["nbhelpers", "route", str(run_dir)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0 and len(lines) == len(CONTENT_TYPES) + 1
    assert lines[0].startswith("no model ") and lines[3].startswith("a ")
    assert (run_dir / "routing.json").is_file()
