from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_runs import make_result, make_sample, planted, prompt_ids, write_info, write_model
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex
from scipy.stats import binomtest

from nbhelpers import store
from nbhelpers.comparison import compare, plots
from nbhelpers.comparison.comparable import comparable
from nbhelpers.comparison.compare import ComparisonReport
from nbhelpers.records import LAB_SCALE, LabError, ModelSpec, Result, Scale
from nbhelpers.stats import paired, sequential
from nbhelpers.stats.paired import Comparison
from nbhelpers.tracking.metrics import FOREIGN
from nbhelpers.tracking.result import spec_of


@pytest.fixture(autouse=True)
def close_figures():
    from matplotlib import pyplot

    pyplot.switch_backend("agg")
    yield
    pyplot.close("all")


# ---- planted truths ------------------------------------------------------------------------------------


def test_a_model_two_points_better_is_picked():
    results = [make_result("weak", planted(5, seed=1)), make_result("strong", planted(7, seed=2))]
    report = compare.compare_results(results, {})
    assert list(report.ranking) == ["strong", "weak"]
    assert report.pick == "strong"
    (pair,) = report.pairs
    assert (pair.a, pair.b, pair.verdict) == ("strong", "weak", "better")
    assert pair.difference == pytest.approx(2.0)  # planted
    assert "strong writes better than every other model here: ahead of the next one, weak, by +2.00" in (
        report.pick_reason
    )
    assert compare.verdict_sentence(pair).startswith("strong writes better than weak: +2.00 points [")


def test_models_of_the_same_quality_are_tied_and_the_faster_one_is_picked():
    results = [
        make_result("slow", planted(6.01, seed=1), words_per_s=40.0),
        make_result("fast", planted(6.00, seed=2), words_per_s=90.0),
        make_result("weak", planted(3.00, seed=3), words_per_s=900.0),
    ]
    report = compare.compare_results(results, {})
    assert [pair.verdict for pair in report.pairs] == ["tied", "better", "better"]
    assert report.pick == "fast"
    assert report.pick_reason.startswith("No mean is higher than that of slow. Within 0.5 points it is tied")
    assert report.pick_reason.endswith("tied with fast, and of these fast writes the most words per second.")
    assert compare.verdict_sentence(report.pairs[0]).startswith("slow and fast are tied within 0.5 points")


def test_noise_cannot_be_told_apart_and_the_number_of_prompts_says_what_would():
    results = [
        make_result("a", planted(6.0, seed=1, noise=2.0)),
        make_result("b", planted(5.5, seed=2, noise=2.0)),
    ]
    report = compare.compare_results(results, {})
    (pair,) = report.pairs
    assert pair.verdict == "cannot tell"
    assert pair.prompts_needed is not None and pair.prompts_needed > 15
    assert f"about {pair.prompts_needed:,} prompts would be needed" in report.pick_reason
    assert f"about {pair.prompts_needed:,} prompts" in compare.verdict_sentence(pair)
    assert report.pick == "a"
    assert "cannot be told from chance" in report.pick_reason


def test_unclear_and_tied_rivals_are_both_named():
    results = [
        make_result("lead", planted(6.0, seed=1), words_per_s=10.0),
        make_result("twin", planted(5.99, seed=2), words_per_s=20.0),
        make_result("wild", planted(5.5, seed=3, noise=3.0), words_per_s=99.0),
    ]
    report = compare.compare_results(results, {})
    assert [pair.verdict for pair in report.pairs[:2]] == ["tied", "cannot tell"]
    assert "but its lead over wild cannot be told from chance (wild: +0.50 points [" in report.pick_reason
    assert report.pick_reason.endswith("tied with twin, and of these twin writes the most words per second.")
    assert report.pick == "twin"


def test_the_same_scores_are_never_a_victory():
    scores = planted(6, seed=1)
    report = compare.compare_results([make_result("a", scores), make_result("b", scores)], {})
    assert report.pairs[0].verdict in ("tied", "cannot tell")
    assert report.pairs[0].difference == 0
    assert "writes better" not in report.pick_reason


@pytest.mark.parametrize(
    ("levels", "n", "verdict", "said"),
    [
        ((10.0, 0.0), 15, "better", "a writes better than b: +10.00 points, the same on each of 15 prompts."),
        (
            (4.0, 4.0),
            15,
            "tied",
            "a and b are tied within 0.5 points: +0.00 points, the same on each of 15 prompts.",
        ),
        ((9.0, 1.0), 3, "cannot tell", "a and b: cannot tell: +8.00 points, the same on each of 3 prompts; "),
        ((9.0, 1.0), 1, "cannot tell", "a and b: cannot tell: n = 1: no interval."),
    ],
)
def test_a_difference_that_is_the_same_everywhere_is_said_without_an_interval(levels, n, verdict, said):
    hard = [i % 3 / 4 for i in range(n)]  # more than two values: no binary outcome
    results = [
        make_result(m, [x - h for h in hard], 10**6 * i) for m, x, i in zip("ab", levels, (2, 1), strict=True)
    ]
    report = compare.compare_results(results, {})
    assert report.pairs[0].verdict == verdict
    assert compare.verdict_sentence(report.pairs[0]).startswith(said)
    assert "stays open" in report.size_hypothesis


def test_the_size_slope_is_the_mean_of_the_least_squares_slopes():
    rng = np.random.default_rng(7)
    sizes = [500_000, 1_000_000, 2_000_000, 5_000_000]
    results = [
        make_result(
            f"m-{size}", [3 + 0.8 * np.log2(size / 500_000) + e for e in rng.normal(0, 0.5, 15)], size
        )
        for size in sizes
    ]
    slope, sentence = compare.size_slope(results), compare.size_effect(results, LAB_SCALE)
    matrix = np.array([list(result.per_prompt.values()) for result in results])  # models x prompts
    expected = np.polyfit(np.log2(sizes), matrix, 1)[0]
    assert slope.n == 15
    assert slope.mean == pytest.approx(expected.mean(), abs=1e-9)
    assert slope.sd == pytest.approx(expected.std(ddof=1), abs=1e-9)
    assert slope.low < 0.8 < slope.high  # the planted truth
    assert "the larger models here write better" in sentence


def test_a_falling_and_a_flat_slope_are_said_as_such():
    falling = [make_result("x-a", planted(7, 1), 10**6), make_result("x-b", planted(5, 2), 4 * 10**6)]
    report = compare.compare_results(falling, {})
    assert "the larger ones write worse: -1.00 points per doubling" in report.size_hypothesis
    assert report.size_hypothesis.endswith("for these 2 models only.")
    flat = [make_result("x-a", planted(5, 1), 10**6), make_result("y-b", planted(5, 2), 4 * 10**6)]
    sentence = compare.compare_results(flat, {}).size_hypothesis
    assert sentence.startswith("These data do not show")


# ---- edges ---------------------------------------------------------------------------------------------


def test_one_model_is_reported_without_a_rival():
    report = compare.compare_results([make_result("only", planted(6, 1))], {})
    assert (report.pick, report.pairs) == ("only", ())
    assert "the only model" in report.pick_reason
    assert "it needs two sizes" in report.size_hypothesis


def test_nothing_comparable_picks_nothing():
    report = compare.compare_results([], {"shape:x": "random weights"})
    assert (report.pick, report.ranking, report.prompts) == (None, {}, ())
    assert report.pick_reason == "No model could be compared on quality."


def test_one_prompt_gives_no_interval_and_no_winner():
    report = compare.compare_results([make_result("a", [7.0]), make_result("b", [4.0])], {})
    assert report.ranking["a"].low is None and report.pairs[0].verdict == "cannot tell"
    assert "n = 1" in report.pick_reason


def test_models_are_compared_on_the_prompts_they_share(tmp_path: Path):
    long, short = make_result("long", planted(6, 1)), make_result("short", planted(6, 2)[:5])
    for result in (long, short):
        write_model(tmp_path, result)
    report = compare.assemble(tmp_path)
    assert report.prompts == ("b01", "b02", "b03", "b04", "b05")
    assert report.ranking["long"].n == report.pairs[0].n == 5
    assert report.ranking["long"].mean == pytest.approx(np.mean(list(long.per_prompt.values())[:5]))


def test_models_without_a_shared_prompt_are_not_compared(tmp_path: Path):
    other = replace(make_result("other", [5.0, 6.0]), per_prompt={"x1": 5.0, "x2": 6.0})
    for result in (make_result("one", [5.0, 6.0]), other):
        write_model(tmp_path, result)
    report = compare.assemble(tmp_path)
    assert report.pick is None
    assert report.excluded == dict.fromkeys(("one", "other"), "it shares no prompt with the others")


@settings(max_examples=40)
@given(st.data())
def test_any_models_and_scores_give_a_report_that_survives_json(tmp_path_factory, data):
    n = data.draw(st.integers(1, 6))
    score = st.floats(0, 10)
    sizes = st.integers(1, 10**12)
    results = [
        make_result(f"m{i}", data.draw(st.lists(score, min_size=n, max_size=n)), data.draw(sizes))
        for i in range(data.draw(st.integers(0, 4)))
    ]
    report = compare.compare_results(results, {})
    path = store.write_json(tmp_path_factory.mktemp("c") / "comparison.json", report)
    assert store.read_json(path, ComparisonReport) == report
    means = [estimate.mean for estimate in report.ranking.values()]
    assert means == sorted(means, reverse=True)
    assert len(report.pairs) == len(results) * (len(results) - 1) // 2
    assert (report.pick in report.ranking) == bool(results)
    assert all(compare.verdict_sentence(pair).endswith(".") for pair in report.pairs)


def test_a_hopeless_difference_is_said_to_be_one():
    pair = Comparison("a", "b", 15, 1e-9, -0.9, 0.9, 0.9, 0.9, "cannot tell", 0.5, None, "wide")
    assert "more than 100,000 prompts would be needed" in compare.verdict_sentence(pair)


# ---- the files of a run --------------------------------------------------------------------------------


def test_models_that_take_no_part_are_named_with_the_reason(tmp_path: Path):
    models = ["good", "better", "shape:x", "dead", "broken", "org/gone", "/models/mine"]
    write_model(tmp_path, make_result("good", planted(5, 1)))
    write_model(tmp_path, make_result("better", planted(7, 2)))
    write_model(tmp_path, make_result("shape:x", planted(1, 3), quality_applies=False))
    write_model(tmp_path, make_result("dead", [0.0] * 15, finished=0, failed=30))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "result.json").write_text("{")
    write_info(tmp_path, models, {"org/gone": "the Hub cannot be reached", "/models/mine": "no weights"})
    report = compare.compare_run(tmp_path)
    assert report == store.read_json(tmp_path / "comparison.json", ComparisonReport)
    assert list(report.ranking) == ["better", "good"]
    assert report.pick == "better"
    reasons = report.excluded
    assert set(reasons) == {"shape:x", "dead", "broken", "org/gone", "mine"}
    assert "random weights" in reasons["shape:x"]
    assert reasons["dead"] == "all 30 generations failed"
    assert "not JSON" in reasons["broken"] and str(tmp_path) not in reasons["broken"]
    assert reasons["org/gone"] == "02_loading: the Hub cannot be reached"
    assert reasons["mine"] == "02_loading: no weights"


def test_a_local_folder_goes_by_its_name(tmp_path: Path):
    write_model(tmp_path, make_result("/models/mine", planted(5, 1), slug="mine"))
    write_info(tmp_path, ["/models/mine"])
    report = compare.assemble(tmp_path)
    assert list(report.ranking) == ["mine"] and report.excluded == {}
    assert not (tmp_path / "comparison.json").exists()


@pytest.mark.parametrize(
    ("name", "shown"),
    [("/a/b/", "b"), ("../x/y", "y"), ("~/m", "m"), (".", "."), ("org/name", "org/name"), ("gpt2", "gpt2")],
)
def test_names_show_no_paths(name, shown):
    assert spec_of(name).alias == shown


def test_a_name_means_what_the_run_says(tmp_path):
    spec = ModelSpec("lab-gpt2", "data/models/lab-gpt2", "embedded")
    info = replace(write_info(tmp_path, ["data/models/lab-gpt2", "/a/b"]), specs=(spec,))
    assert spec_of("data/models/lab-gpt2", info) == spec
    assert spec_of("/a/b", info).slug == "b"  # a run that is older than specs


def test_results_made_under_other_conditions_are_left_out(tmp_path: Path):
    write_model(tmp_path, make_result("a", planted(5, 1)))
    write_model(tmp_path, make_result("b", planted(6, 2), settings={"repeats": 1, "seed": 3}))
    write_model(tmp_path, make_result("c", planted(9, 3), settings={"max_new_tokens": 60}))
    write_model(tmp_path, make_result("d", planted(9, 4), settings={"prompts": "/home/me/mine.jsonl"}))
    report = compare.assemble(tmp_path)
    assert list(report.ranking) == ["b", "a"]
    assert report.excluded == {
        "c": "made under other conditions than most of the models: max_new_tokens",
        "d": "made under other conditions than most of the models: prompts",
    }


# ---- prompts that are not what they seem ---------------------------------------------------------------


def asked(model: str, texts: dict[str, str]) -> list:
    """One sample for each prompt, with what it asked."""
    return [(make_sample(model, prompt, 0, prompt=text), 1.0) for prompt, text in texts.items()]


def test_one_id_with_two_texts_is_compared_with_nothing(tmp_path: Path):
    """Somebody edited two prompts between the models; the ids and the path of the file stayed."""
    old = {prompt: f"Write about {prompt}." for prompt in prompt_ids()}
    new = old | {"b03": "Write about something else.", "b07": "Write about nothing."}
    for model, texts in (("a", new), ("b", old), ("c", old | {"gone": "An id of an earlier file."})):
        write_model(tmp_path, make_result(model, planted(5, ord(model))), asked(model, texts))
    for model in "def":  # without samples nothing speaks against them
        write_model(tmp_path, make_result(model, planted(5, ord(model))))
    report = compare.assemble(tmp_path)
    assert set(report.ranking) == {"b", "c", "d", "e", "f"} and report.notes == ()
    assert report.excluded == {"a": "its prompts have other texts than those of most models: b03, b07"}


def test_prompts_with_one_text_are_one_unit(tmp_path: Path):
    ids = prompt_ids(6)
    texts = dict(
        zip(
            ids, ("Write one.", " write ONE.", "Write two.", "Write two.", "Write two.", "Last."), strict=True
        )
    )
    for model, scores in (("a", [1, 3, 4, 5, 6, 9]), ("b", [0, 0, 1, 1, 1, 5])):
        write_model(tmp_path, make_result(model, scores), asked(model, texts))
    report = compare.assemble(tmp_path)
    assert report.prompts == ("b01", "b03", "b06")
    assert report.ranking["a"].mean == (2 + 5 + 9) / 3 and report.pairs[0].n == 3
    assert report.notes == ("6 prompts have 3 different texts: each text counts once.",)


def test_repeating_every_prompt_does_not_raise_the_false_alarms(tmp_path: Path):
    """Two equal models, 8 texts under 24 ids. A text suits one of them by chance, under all its ids alike."""
    rng, alarms, naive, rounds = np.random.default_rng(0), 0, 0, 100
    texts = {prompt: f"Write about subject {i % 8}." for i, prompt in enumerate(prompt_ids(24))}
    samples = asked("a", texts)
    write_model(tmp_path, make_result("a", [0.0] * 24), samples)
    for _ in range(rounds):
        scores = [list(np.tile(rng.normal(5, 1, 8), 3) + rng.normal(0, 0.3, 24)) for _ in "ab"]
        a, b = (make_result(model, own) for model, own in zip("ab", scores, strict=True))
        naive += paired.compare_two(a.per_prompt, b.per_prompt, margin=0.1).verdict in ("better", "worse")
        write_model(tmp_path, a)
        write_model(tmp_path, b)
        found = compare.assemble(tmp_path, margin=0.1).pairs[0]
        assert found.n == 8
        alarms += found.verdict in ("better", "worse")
    assert naive / rounds > 0.2
    assert binomtest(alarms, rounds, 0.05).pvalue > 0.01


def test_models_without_scores_for_most_prompts_are_left_out_and_counted(tmp_path: Path):
    scores = planted(5, 1)
    few = dict(list(zip(prompt_ids(), scores, strict=True))[:5])
    write_model(tmp_path, make_result("a", scores))
    write_model(tmp_path, make_result("b", scores, per_prompt=few, metrics={FOREIGN: 20.0}))
    one = {prompt: score for prompt, score in zip(prompt_ids(), scores, strict=True) if prompt != "b04"}
    write_model(
        tmp_path,
        make_result("c", scores, per_prompt=one, metrics={FOREIGN: 2.0, f"{FOREIGN}/judge": 9.0}),
    )
    report = compare.assemble(tmp_path)
    assert set(report.ranking) == {"a", "c"} and len(report.prompts) == 14
    assert report.excluded == {"b": "the rubric reads English, and most of its prompts or answers are not"}
    assert report.notes == (
        "b: 20 of 30 texts have no score, because the prompt or the answer is not English.",
        "c: 2 of 30 texts have no score, because the prompt or the answer is not English.",
        "c: 9 of 30 texts have no score judge, because the prompt or the answer is not English.",
        "Left out, because some model has no score there: b04.",
    )


def test_a_run_in_another_language_has_no_verdict_and_is_no_failure(tmp_path: Path):
    for model in "ab":
        foreign = {
            "per_prompt": {},
            "quality": {},
            "quality_applies": False,
            "metrics": {FOREIGN: 30.0},
        }
        write_model(tmp_path, make_result(model, planted(5, 1), **foreign))
    report = compare.assemble(tmp_path)
    assert report.pick is None and set(report.excluded) == {"a", "b"} and len(report.notes) == 2


def test_an_empty_run_is_refused(tmp_path: Path):
    with pytest.raises(LabError, match=r"The run .* has no result"):
        compare.compare_run(tmp_path)


# ---- pictures ------------------------------------------------------------------------------------------


def report_of(count: int) -> tuple[list, ComparisonReport]:
    results = [
        make_result(f"org/model-{i}-$x$", planted(3 + i / 2, i), 10**6 * 2**i, words_per_s=500 / (i + 1))
        for i in range(count)
    ]
    return results, compare.compare_results(results, {})


@pytest.mark.parametrize("count", [0, 1, 6, 12])
def test_every_picture_draws_for_any_number_of_models(count, tmp_path):
    results, report = report_of(count)
    figures = [
        plots.ranking(report),
        plots.pair_differences(report),
        plots.quality_speed_memory(results, report),
    ]
    for number, figure in enumerate(figures):
        figure.savefig(tmp_path / f"{number}.png", dpi=40)  # a "$" in a name must not be read as a formula
        assert figure.get_size_inches()[0] == plots.WIDTH


def test_the_ranking_picture_shows_the_intervals_and_the_pick():
    _, report = report_of(3)
    axes = plots.ranking(report).axes[0]
    labels = [text.get_text() for text in axes.texts[::2]]  # each before its note
    assert labels == [r"model-2-\$x\$", r"model-1-\$x\$", r"model-0-\$x\$"]
    for line, estimate in zip(axes.collections, report.ranking.values(), strict=True):
        assert list(line.get_segments()[0][:, 0]) == [estimate.low, estimate.high]
    colours = [to_hex(line.get_color()[0]) for line in axes.collections]
    assert colours == [plots.ORANGE, plots.BLUE, plots.BLUE]


@pytest.fixture(scope="module")
def many() -> tuple[list[Result], ComparisonReport]:
    """60 models on two levels, 3 points apart: the higher one has seven."""
    results = [
        make_result(f"model-{i:02d}", planted(8 - 3 * (i >= 7) + i / 200, i, 40), words_per_s=100 + i)
        for i in range(60)
    ]
    return results, compare.compare_results(results, {})


def test_very_many_models_come_in_groups_that_cannot_be_told_apart(many, tmp_path):
    _, report = many
    order = list(report.ranking)
    first = [f"model-{i:02d}" for i in range(6, -1, -1)]
    assert order[:7] == first
    assert [name for name, group in report.groups.items() if group == 1] == first
    assert list(report.groups) == order and set(report.groups.values()) == {1, 2}
    assert report.pick == "model-06" and "model-00" in report.pick_reason
    assert store.read_json(store.write_json(tmp_path / "c.json", report), ComparisonReport) == report


def test_groups_of_few_models_rest_on_every_pair():
    results = [make_result(name, planted(mean, mean)) for name, mean in (("a", 8), ("b", 8), ("c", 4))]
    report = compare.compare_results(results, {})
    assert report.groups == {"a": 1, "b": 1, "c": 2}


def test_a_sentence_about_very_many_models_counts_them():
    results = [make_result(f"m{i:02d}", planted(5, i, 6, noise=1.0)) for i in range(60)]
    reason = compare.compare_results(results, {}).pick_reason
    assert "its lead over 58 models cannot be told from chance" in reason and len(reason) < 400


def test_pictures_of_very_many_models_show_the_first_and_say_so(many):
    results, report = many
    axes = plots.ranking(report).axes[0]
    assert [text.get_text() for text in axes.texts[::2]] == list(report.ranking)[:30]
    figures = [plots.pair_differences(report), plots.quality_speed_memory(results, report)]
    for drawn in (axes, figures[1].axes[0]):
        assert "(the first 30 of 60)" in drawn.get_title()
    assert len(figures[0].axes[0].texts) == 2 * 30 and len(figures[1].legends[0].get_texts()) == 30


def test_areas_are_in_proportion_to_memory():
    sizes = {"one": 1.0, "four": 4.0, "server": 0.0}
    results = [make_result(name, planted(5, 1)) for name in sizes]
    for result, mib in zip(results, sizes.values(), strict=True):
        result.metrics["memory/parameters_mib"] = mib
    drawn = plots.quality_speed_memory(results, compare.compare_results(results, {})).axes[0].collections
    areas = [dots.get_sizes()[0] for dots in drawn if isinstance(dots, PathCollection)]
    assert areas[1] == 4 * areas[0] > 0 == areas[2]


def test_labels_of_near_points_do_not_cover_each_other():
    results = [make_result(f"model-{i}", planted(5 + i / 100, i), 10**6 + i) for i in range(8)]
    figure = plots.quality_speed_memory(results, compare.compare_results(results, {}))
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.legends[0].get_texts()]
    assert len(boxes) == 8
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_two_folders_of_one_name_are_two_models(tmp_path: Path) -> None:
    paths = ("/models/run-a/checkpoint-500", "/models/run-b/checkpoint-500")
    specs = tuple(ModelSpec(path.removeprefix("/models/"), path, "local") for path in paths)
    for spec, scores in zip(specs, ([9.0, 8.0, 9.0], [1.0, 2.0, 1.0]), strict=True):
        write_model(tmp_path, make_result(spec.source, scores, slug=spec.slug))
    info = write_info(tmp_path, paths)
    store.write_json(tmp_path / "run.json", replace(info, specs=specs))
    report = compare.assemble(tmp_path)
    assert list(report.ranking) == ["run-a/checkpoint-500", "run-b/checkpoint-500"]


def test_a_run_with_looks_is_judged_by_the_always_valid_test():
    """Verdicts, intervals and the sentence come from it; without looks nothing changes."""
    results = [make_result("far", planted(7, 1, 40)), make_result("near", planted(6, 2, 40))]
    order = [prompt_ids(60)[start : start + 6] for start in range(0, 60, 6)]  # 40 of 60 were asked
    fixed, report = compare.compare_results(results, {}), compare.compare_results(results, {}, looks=order)
    assert (fixed.planned, report.planned) == (None, 60)
    per_model = {result.model: result.per_prompt for result in results}
    assert report.pairs == paired.judged(sequential.always_valid_pairs(per_model, 0.5, order, 60))
    assert report.pairs[0].high - report.pairs[0].low > fixed.pairs[0].high - fixed.pairs[0].low
    assert report.basis == "by the rubric, by an always-valid test after 40 of 60 prompts"
    assert fixed.basis == "by the rubric"


def task_result(model: str, scores: list[float], **changes: Any) -> Result:
    """A result of a task of the user's, from 0 to 1 by exact match unless said otherwise."""
    task = {"primary": "exact", "scale": Scale(0.0, 1.0, 0.1, unit="exact"), "settings": {"task": "t.toml"}}
    return make_result(model, scores, **(task | changes))


def test_right_and_wrong_answers_are_compared_on_their_own_scale_by_the_exact_test():
    good, bad = [1.0] * 50 + [0.0] * 10, [1.0] * 25 + [0.0] * 35
    report = compare.compare_results([task_result("bad", bad), task_result("good", good)], {})
    (pair,) = report.pairs
    assert (pair.a, pair.verdict, pair.margin, pair.unit) == ("good", "better", 0.1, "exact")
    assert pair.p == paired.mcnemar_p(25, 0, 60)
    assert report.basis == "by exact" and report.scale.high == 1
    best = report.ranking["good"]
    wilson = binomtest(50, 60).proportion_ci(method="wilson")
    assert (best.low, best.high, best.method) == (wilson.low, wilson.high, "wilson")
    assert "good does better than bad: +0.42 exact" in compare.verdict_sentence(pair)


def test_where_less_is_better_the_lowest_leads():
    lower = Scale(0.0, 9.0, 0.1, higher_is_better=False, unit="bits")
    low, high = [1.0 + 0.1 * n for n in range(12)], [2.5 + 0.11 * n for n in range(12)]
    results = [task_result(m, s, primary="bits", scale=lower) for m, s in (("high", high), ("low", low))]
    report = compare.compare_results(results, {})
    (pair,) = report.pairs
    assert list(report.ranking) == ["low", "high"] and report.pick == "low"
    assert (pair.a, pair.verdict) == ("low", "better") and pair.difference < 0 and pair.high < 0


def test_items_of_a_cluster_count_once(tmp_path):
    clusters = {"b02": "b01", "b01": "b01"}
    for model, scores in (("x", [1.0, 0.0, 1.0, 0.0]), ("y", [0.0, 0.0, 1.0, 1.0])):
        result = task_result(model, scores, clusters=clusters)
        rows = [(make_sample(model, prompt, 0), 5.0) for prompt in prompt_ids(4)]
        write_model(tmp_path, result, rows)
    results, _, notes = comparable(tmp_path)
    assert results[0].per_prompt == {"b01": 0.5, "b03": 1.0, "b04": 0.0}
    assert notes == ["2 items in 1 cluster: each cluster counts once."]
