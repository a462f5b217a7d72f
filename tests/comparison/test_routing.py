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
    assert all(route.prompts == EACH and route.candidates == (route.model,) for route in report.routes)
    assert report.routes[0].reason.startswith(
        "short_post: writer-of-short_post writes better than every other model here: ahead of the next one"
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
    assert (route.model, route.basis, route.candidates) == ("cheap", "tied", ("leader", "cheap"))
    assert list(route.quality) == list(by_model) and route.prompts_needed is None
    assert route.reason.startswith("business_note: leader and cheap are tied within 0.5 points: +0.05 points")
    assert route.reason.endswith("; of leader, cheap the cheapest is cheap, 2e-06 USD a request.")


def test_without_a_cost_the_fastest_of_the_tied_is_taken():
    metrics = {name: value for name, value in METRICS.items() if not name.startswith("cost/")}
    speed = "latency/words_per_s/mean"
    results = [
        make_result("slow", planted(6.05, seed=1), metrics=metrics | {speed: 40.0, routing.COST: 1.0}),
        make_result("fast", planted(6.0, seed=2), metrics=metrics | {speed: 90.0}),
    ]
    route = routing.route(NOTE, prompt_ids(), results)
    assert (route.model, route.basis) == ("fast", "tied")
    assert route.reason.endswith("the fastest is fast, 90 words a second, a cost is missing.")


def test_a_lead_that_few_prompts_cannot_show_is_not_taken_for_one():
    """Two points of difference in five prompts: Holm over six pairs cannot call that better."""
    results = [
        result_of("strong", {NOTE: planted(7, seed=1, n=5)}, usd=4e-6),
        *(result_of(f"weak-{n}", {NOTE: planted(5, seed=n, n=5)}, usd=n * 1e-6) for n in (2, 3, 5)),
    ]
    route = routing.route(NOTE, prompt_ids(5), results)
    assert (route.basis, route.model, route.candidates[0]) == ("cannot tell", "weak-2", "strong")
    assert route.prompts_needed == 8  # 2 / 2^n below 0.05 / 6 needs eight
    assert "cannot tell: +2.00 points" in route.reason and "about 8 prompts would be needed" in route.reason
    more = [
        result_of(r.model, {NOTE: planted(7 if n == 0 else 5, seed=n, n=9)}) for n, r in enumerate(results)
    ]
    assert routing.route(NOTE, prompt_ids(9), more).basis == "better"


@given(
    tables=st.lists(st.lists(st.integers(0, 10), min_size=6, max_size=6), min_size=1, max_size=4),
    costs=st.lists(st.integers(1, 3), min_size=4, max_size=4),
    count=st.integers(0, 6),
)
@settings(max_examples=60)
def test_the_choice_follows_from_the_verdicts_and_the_costs(tables, costs, count):
    results = [
        make_result(f"m{n}", list(map(float, row)), metrics=METRICS | {routing.COST: float(costs[n])})
        for n, row in enumerate(tables)
    ]
    prompts = prompt_ids(6)[:count]
    route = routing.route(NOTE, prompts, results)
    if count < 2:
        assert (route.model, route.basis, route.candidates) == (None, "no data", ())
        return
    scores = {r.model: {prompt: r.per_prompt[prompt] for prompt in prompts} for r in results}
    order = sorted(scores, key=lambda model: -np.mean(list(scores[model].values())))
    pairs = paired.compare_all({model: scores[model] for model in order}, margin=0.5)
    beaten = {pair.b for pair in pairs if pair.a == order[0] and pair.verdict == "better"}
    candidates = [model for model in order if model not in beaten]
    assert (list(route.quality), list(route.candidates)) == (order, candidates)
    assert route.model == min(candidates, key=lambda model: costs[int(model[1])])
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
