"""Logs of other tools: what is read of each format, how logs are paired, and what is refused."""

import csv
import dataclasses
import json
import math
import time
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import yaml
from made_runs import make_result, make_sample, planted, write_info, write_model
from pyarrow import parquet
from scipy.stats import binomtest
from typer.testing import CliRunner

from nbhelpers import cli, store
from nbhelpers.comparison.compare import assemble
from nbhelpers.logs import compare
from nbhelpers.options import Choice
from nbhelpers.records import LabError, Result, Sample, Scale, Score, Settings
from nbhelpers.report.html import rendered
from nbhelpers.stats import paired
from nbhelpers.stats.estimate import bonett_price
from tools import make_schema

LOGS = Path(__file__).parent / "data"
HARNESS = [LOGS / "lm_eval" / model for model in ("lab-gpt2", "lab-llama")]
INSPECT = [LOGS / "inspect" / name for name in ("monday.eval", "tuesday.eval")]


def write_csv(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in row))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def harness(path: Path, scores: dict[str, float], **fields) -> Path:
    """A log as lm-evaluation-harness writes it; fields replace those of each line."""
    rows = []
    for number, (item, acc) in enumerate(scores.items()):
        row = {
            "doc_id": item,
            "doc": {"q": number, "passage": number % 4},
            "filter": "none",
            "metrics": ["acc"],
        }
        rows.append(row | {"acc": acc, "doc_hash": f"d{item}", "prompt_hash": f"p{item}"} | fields)
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_lines(path, rows)


def logs_of(*paths: Path, **choice) -> list[compare.Log]:
    return [log for path in paths for log in compare.read_logs(path, choice=Choice(**choice))]


def compared(*paths: Path, **choice) -> compare.LogsReport:
    return compare.compare_logs(logs_of(*paths, **choice), Choice(**choice))


def by_metric(found: list[compare.Log]) -> dict[tuple[str, str, str], compare.Log]:
    return {(log.model, log.task, log.metric): log for log in found}


def test_a_log_of_the_harness_gives_the_means_that_the_harness_printed():
    for folder in HARNESS:
        about = json.loads(next(folder.glob("results_*.json")).read_text())["results"]
        found = by_metric(logs_of(folder))
        assert {key[1:] for key in found} == {
            ("lab_endings", "acc"),
            ("lab_endings", "acc_norm"),
            ("lab_words", "exact_match"),
        }
        for (model, task, metric), log in found.items():
            assert model == folder.name and log.higher
            used = "first-word" if task == "lab_words" else "none"
            assert np.mean([*log.scores.values()]) == pytest.approx(about[task][f"{metric},{used}"])


def test_another_filter_can_be_chosen_and_the_choice_is_said():
    log = by_metric(logs_of(HARNESS[0], filter="last-word"))["lab-gpt2", "lab_words", "exact_match"]
    assert sum(log.scores.values()) == 1
    assert log.notes == ("lab_words: of the filters first-word, last-word last-word is taken.",)
    with pytest.raises(LabError, match=r"has no filter 'strict': it has first-word, last-word\."):
        logs_of(HARNESS[0], filter="strict")


def test_tasks_are_kept_apart_and_holm_covers_them_all():
    found = compared(*HARNESS)
    assert [(one.task, one.primary) for one in found.comparisons] == [
        ("lab_endings", "acc"),
        ("lab_words", "exact_match"),
    ]
    pairs = [one.pairs[0] for one in found.comparisons]
    assert [pair.p_holm for pair in pairs] == pytest.approx(paired.holm([pair.p for pair in pairs]))
    assert "Other metrics of lab_endings, by --metric: acc_norm." in found.notes
    every = compared(*HARNESS, metric="all")
    assert [one.primary for one in every.comparisons] == ["acc", "acc_norm", "exact_match"]


def test_binary_scores_get_the_binary_statistics():
    a, b = (by_metric(logs_of(folder))[folder.name, "lab_endings", "acc"].scores for folder in HARNESS)
    wins, losses = (sum(x[i] > y[i] for i in a) for x, y in ((b, a), (a, b)))
    pair = compared(*HARNESS, task="lab_endings").comparisons[0].pairs[0]
    assert (pair.a, pair.b, pair.n, pair.unit, pair.items) == ("lab-llama", "lab-gpt2", 40, "acc", "items")
    assert (pair.low, pair.high) == pytest.approx(bonett_price(wins, losses, 40))
    assert pair.p == pytest.approx(paired.mcnemar_p(wins, losses, 40))


def test_a_mean_has_the_interval_that_a_run_gives_it(tmp_path):
    """Wilson's of right and wrong answers; Student's of others, of points and of means over clusters."""
    run = task_run(tmp_path / "run", 0.1)
    (one,) = compared(run, metric="exact").comparisons
    own = assemble(run).ranking
    assert one.ranking == own
    rows = table({"all": [1] * 12, "half": [0, 1] * 6})
    (one,) = compared(write_csv(tmp_path / "log.csv", rows)).comparisons
    ends = binomtest(12, 12).proportion_ci(method="wilson")
    best = one.ranking["all"]
    assert (best.low, best.high, best.method) == (ends.low, ends.high, "wilson")
    assert f"[{ends.low:.3f}, 1.000]" in rendered("logs.txt", found=compared(tmp_path / "log.csv"), page=None)
    other = {"counts": (table({"a": [0, 1] * 6, "b": [0, 2] * 6}), {"margin": 0.5})}
    other["clusters"] = ([row | {"cluster": row["id"] // 4} for row in rows], {})
    for name, (rows, choice) in other.items():
        (one,) = compared(write_csv(tmp_path / f"{name}.csv", rows), **choice).comparisons
        assert one.ranking["a" if name == "counts" else "half"].method == "t", name


def test_inspect_logs_are_read_by_inspect():
    pytest.importorskip("inspect_ai", reason="inspect_ai is not installed (extra logs)")
    found = by_metric(logs_of(*INSPECT))
    for name, right in (("monday", 0.5833333333333334), ("tuesday", 0.85)):
        log = found[f"mockllm/{name}", "trees", "match"]
        assert len(log.scores) == 30 and np.mean([*log.scores.values()]) == pytest.approx(right)
        assert not log.clusters
        assert len(set(found[f"mockllm/{name}", "trees", "overlap"].clusters.values())) == 10
    (match,) = compared(*INSPECT).comparisons
    assert match.pairs[0].verdict == "better" and match.pick == "mockllm/tuesday"
    (overlap,) = compared(*INSPECT, metric="overlap").comparisons
    assert (overlap.pairs[0].n, overlap.pairs[0].items) == (10, "clusters")
    again = compared(INSPECT[1], INSPECT[1].with_suffix(".json")).comparisons[0].pairs[0]
    assert again.n == 30 and again.unit == "match"


def test_inspect_logs_without_inspect_are_refused_in_one_sentence(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "inspect_ai.log", None)
    for path in (INSPECT[0], INSPECT[1].with_suffix(".json")):
        with pytest.raises(LabError, match=r"its own package reads: pip install 'nbhelpers\[logs\]'\.$"):
            logs_of(path)


# The paired difference on these logs by errorbars 0.2.4, whose readers of both formats are its own:
# mean_diff, ci_low, ci_high and the clustered ends, made by tools of that package alone.
ERRORBARS = json.loads((LOGS / "errorbars.json").read_text())


@pytest.mark.parametrize("case", ERRORBARS, ids=lambda case: case["name"])
def test_differences_agree_with_an_independent_package(case):
    if "inspect" in case["files"][0]:
        pytest.importorskip("inspect_ai", reason="inspect_ai is not installed (extra logs)")
    choice = {"metric": case["metric"], "task": case["task"], "cluster": case["cluster"]}
    one = compared(*(LOGS / file for file in case["files"]), **choice).comparisons[0]
    pair = one.pairs[0]
    sign = 1 if pair.a == case["model_a"] else -1
    assert sign * pair.difference == pytest.approx(case["mean_diff"], abs=1e-9)
    found = logs_of(*(LOGS / file for file in case["files"]), **choice)
    scores = [log.scores for log in found if (log.metric, log.task) == (case["metric"], case["task"])]
    a, b = scores
    low, high = case["ci_low"], case["ci_high"]
    if case["cluster"]:
        low, high = case["ci_low_clustered"], case["ci_high_clustered"]
        assert (sign * pair.low, sign * pair.high)[::sign] == pytest.approx((low, high), abs=1e-9)
        return
    x = np.array([a[item] - b[item] for item in a])
    half = paired.t_interval(float(x.mean()), float(x.std(ddof=1)), len(x))
    assert half == pytest.approx((low, high), abs=1e-9)
    if {*a.values(), *b.values()} > {0, 1}:
        assert sorted((sign * pair.low, sign * pair.high)) == pytest.approx((low, high), abs=1e-9)


def promptfoo(results: list[dict], version: int = 3) -> dict:
    return {"evalId": "e", "results": {"version": version, "results": results}, "config": {}}


def cell(test: int, provider: str, q: str, score: float, **fields) -> dict:
    row = {"testIdx": test, "promptIdx": 0, "provider": {"id": provider}, "prompt": {"raw": q, "label": "p"}}
    row |= {"vars": {"q": q}, "score": score, "success": score > 0.5, "namedScores": {"tone": score / 2}}
    return row | {"failureReason": 0, "latencyMs": 10, "cost": 0.1} | fields


def test_promptfoo_cells_are_paired_by_their_vars_and_repeats_averaged(tmp_path):
    rows = [cell(i, m, f"q{i % 3}", s) for m, s in (("a", 1.0), ("b", 0.25)) for i in range(6)]
    rows[0] |= {"failureReason": 2, "error": "504", "score": 0}
    rows[3] |= {"failureReason": 2, "error": "504", "score": 0}
    path = tmp_path / "eval.json"
    path.write_text(json.dumps(promptfoo(rows), indent=2))
    found = by_metric(logs_of(path))
    a, b = found["a", "", "score"], found["b", "", "score"]
    assert b.scores == {'{"q": "q0"}': 0.25, '{"q": "q1"}': 0.25, '{"q": "q2"}': 0.25}
    assert a.dropped == {'{"q": "q0"}': "error: 504"} and len(a.scores) == 2
    assert {metric for _, _, metric in found} == {"score", "pass", "tone", "latency", "cost"}
    (one,) = compared(path).comparisons
    assert one.notes == ('Left out, because a has no score there: {"q": "q0"} (error: 504).',)
    path.write_text(json.dumps(promptfoo(rows, 9)))
    with pytest.raises(LabError, match="promptfoo results of version 9 are unknown to this release"):
        logs_of(path)


def test_columns_of_promptfoo_are_provider_and_prompt(tmp_path):
    rows = [
        cell(i, "a", f"q{i}", s) | {"prompt": {"label": p}} for p, s in (("x", 1), ("y", 0)) for i in (0, 1)
    ]
    path = tmp_path / "eval.json"
    path.write_text(json.dumps(promptfoo(rows)))
    assert {log.model for log in logs_of(path)} == {"a, x", "a, y"}


def table(scores: dict[str, list[float]], **fields) -> list[dict]:
    return [
        {"id": i, "model": m, "score": s} | fields for m, own in scores.items() for i, s in enumerate(own)
    ]


def test_tables_as_csv_and_as_lines_say_the_same(tmp_path):
    rows = table({"a": [0.1, 0.5, 0.9, 0.3], "b": [0.2, 0.8, 0.7, 0.9]})
    rows = [row | {"cluster": row["id"] // 2, "repeat": r} for row in rows for r in (0, 1)]
    one, other = (write(tmp_path / "log", rows) for write in (write_csv, write_csv))
    first = logs_of(one)
    other = logs_of(write_lines(tmp_path / "lines", rows))
    assert [dataclasses.replace(log, source="") for log in first] == [
        dataclasses.replace(log, source="") for log in other
    ]
    assert first[0].clusters == {"0": "0", "1": "0", "2": "1", "3": "1"}


def test_clusters_are_what_is_counted(tmp_path):
    rng = np.random.default_rng(0)
    scores = {m: rng.random(20) for m in "ab"}
    rows = [r | {"cluster": f"c{r['id'] // 2}"} for r in table({m: s.tolist() for m, s in scores.items()})]
    (one,) = compared(write_csv(tmp_path / "log.csv", rows)).comparisons
    pair = one.pairs[0]
    x = (scores[pair.a] - scores[pair.b]).reshape(10, 2).mean(axis=1)
    assert pair.n == 10 and pair.items == "clusters"
    assert (pair.low, pair.high) == pytest.approx(paired.t_interval(x.mean(), x.std(ddof=1), 10))
    assert one.notes == ("20 items in 10 clusters: each cluster counts once.",)


def test_tasks_can_be_pooled_as_clusters(tmp_path):
    for model, right in (("a", 0), ("b", 1)):
        for task in ("law", "art", "sea"):
            scores = {f"{i}": (i + right) % 2 for i in range(4)}
            harness(tmp_path / model / f"samples_mm_{task}_2026-01-01T00-00-00.jsonl", scores)
    (one,) = compared(tmp_path / "a", tmp_path / "b", pool=True).comparisons
    assert (one.task, one.pairs[0].n, one.pairs[0].items) == ("all tasks", 3, "clusters")


def test_a_task_is_named_as_the_harness_names_its_files(tmp_path):
    harness(tmp_path / "samples_mm_law_2026-01-01T00-00-00.jsonl", {"0": 1})
    harness(tmp_path / "other.jsonl", {"0": 1})
    assert {log.task for log in logs_of(tmp_path)} == {"mm_law", ""}


def test_items_that_one_side_lacks_are_listed(tmp_path):
    a = harness(tmp_path / "a" / "log.jsonl", {f"{i}": i % 2 for i in range(10)})
    b = harness(tmp_path / "b" / "log.jsonl", {f"{i}": 1 if i != 9 else math.nan for i in range(2, 10)})
    (one,) = compared(a, b).comparisons
    assert one.lacking == {
        "a": {},
        "b": {"0": "not in its log", "1": "not in its log", "9": one.lacking["b"]["9"]},
    }
    assert one.prompts == tuple("2345678")
    assert one.notes[0].startswith("Left out, because b has no score there: 0 (not in its log); 1 (not in")


def test_other_documents_and_other_prompts_are_refused(tmp_path):
    scores = {f"{i}": i % 2 for i in range(6)}
    a = harness(tmp_path / "a" / "log.jsonl", scores)
    other = harness(tmp_path / "b" / "log.jsonl", scores, doc_hash="x")
    with pytest.raises(LabError, match=r"cannot be paired: b has another text than a for the item 0\."):
        compared(a, other)
    other = harness(tmp_path / "b" / "log.jsonl", scores, prompt_hash="x")
    with pytest.raises(LabError, match=r"has another prompt than a for the item 0 \(--any-prompt"):
        compared(a, other)
    assert compared(a, other, any_prompt=True).comparisons[0].pairs[0].n == 6


def test_two_logs_without_a_common_item_and_without_a_common_metric_are_refused(tmp_path):
    a = harness(tmp_path / "a" / "log.jsonl", {"0": 1, "1": 0})
    with pytest.raises(LabError, match=r"The logs of a and b have no item in common\."):
        compared(a, harness(tmp_path / "b" / "log.jsonl", {"7": 1}))
    with pytest.raises(
        LabError, match="No two logs have the same task and metric that you ask for: they have acc"
    ):
        compared(a, write_lines(tmp_path / "c", table({"c": [1, 0]})))
    with pytest.raises(LabError, match="they have acc by a"):
        compared(a, harness(tmp_path / "b" / "log.jsonl", {"0": 1}), metric="f1")


def test_a_log_of_a_run_that_failed_says_why_it_has_no_score(tmp_path):
    good, bad = ([cell(i, m, f"q{i}", 1.0) for i in range(3)] for m in "ab")
    for row in bad:
        row |= {"failureReason": 2, "error": f"no such host{'!' * 300}\nTraceback"}
    path = tmp_path / "eval.json"
    path.write_text(json.dumps(promptfoo(good + bad)))
    said = r"The logs of a and b have no item in common: b has no score \(error: no such host!{181}\)\.$"
    with pytest.raises(LabError, match=said):
        compared(path)


def test_a_metric_where_less_is_better_turns_the_verdict(tmp_path):
    rng = np.random.default_rng(1)
    base = rng.random(30)
    rows = [r | {"metric": "wer"} for r in table({"a": (base / 2).tolist(), "b": (base / 2 + 0.3).tolist()})]
    path = write_csv(tmp_path / "log.csv", rows)
    (one,) = compared(path, lower_is_better=True).comparisons
    pair = one.pairs[0]
    assert (pair.a, pair.verdict, one.pick) == ("a", "better", "a") and pair.difference < 0
    assert compared(path).comparisons[0].pairs[0].a == "b"


def test_the_harness_says_itself_where_less_is_better(tmp_path):
    for model in "ab":
        harness(tmp_path / model / "samples_t_2026-01-01T00-00-00.jsonl", {"0": 1, "1": 0})
        about = {"model_name": model, "higher_is_better": {"t": {"acc": False}}}
        (tmp_path / model / "results_2026-01-01T00-00-00.json").write_text(json.dumps(about))
    assert not compared(tmp_path / "a", tmp_path / "b").comparisons[0].scale.higher_is_better


def test_one_model_in_two_logs_is_named_after_them(tmp_path):
    for day in ("monday", "tuesday"):
        harness(
            tmp_path / day / "m" / "samples_t_2026-01-01T00-00-00.jsonl", {f"{i}": i % 2 for i in range(8)}
        )
    (one,) = compared(tmp_path / "monday", tmp_path / "tuesday").comparisons
    assert set(one.ranking) == {"m (monday)", "m (tuesday)"}
    assert one.pairs[0].verdict == "tied"


def test_a_log_given_twice_is_refused():
    with pytest.raises(LabError, match="lab-gpt2 stands twice among these logs: give each once"):
        compared(HARNESS[0], HARNESS[0])


def test_the_last_of_two_logs_of_one_folder_counts(tmp_path):
    for day, acc in (("01", 0), ("02", 1)):
        harness(tmp_path / f"samples_t_2026-01-{day}T00-00-00.jsonl", {f"{i}": acc for i in range(8)})
    (log,) = logs_of(tmp_path)
    assert set(log.scores.values()) == {1} and "twice: samples_t_2026-01-02" in log.notes[-1]


def test_a_margin_is_asked_for_where_nobody_can_guess_it(tmp_path):
    path = write_csv(tmp_path / "log.csv", table({"a": [10, 20, 30], "b": [11, 25, 30]}))
    with pytest.raises(
        LabError, match=r"score is not a number from 0 to 1: say which difference matters by --margin"
    ):
        compared(path)
    assert compared(path, margin=2.0).comparisons[0].pairs[0].margin == 2
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(LabError, match="it must be more than 0"):
            compared(path, margin=bad)


BROKEN = {
    "": "is not a log of",
    "hello\nworld\n": "is not a log of",
    '{"a": 1}': "is not a log of",
    '{"results": {"t": {"acc,none": 1}}, "configs": {}}': "is not a log of",
    "[1, 2]": r"line 1: not a JSON object \(it is 1\)",
    '[{"id": 1, "model": "a", "score": 1}, 7]': "line 2: not a JSON object",
    "id,model,score\n1,a,1_0\n": "'1_0' is not a number",
    'id,model,score,text\n1,a,1,"x\n2,a,0,y\n': "quotation marks that do not close",
    '{"doc_id": 1, "metrics": ["acc"], "acc": 1}\n{"doc_id": 2,': "line 2: not a JSON object",
    '{"doc_id": 1, "metrics": ["acc"], "acc": 1}\n7\n': "line 2: not a JSON object",
    '{"doc_id": 1, "metrics": ["acc"], "acc": 1}\n{"doc_id": 1}\n': "as its tool writes it: KeyError",
    '{"evalId": "e", "results": {"version": 3, "results": [3]}}': "as its tool writes it",
    "id,model,score\n1,a,good\n": "line 2, column score: 'good' is not a number",
    'id,model,score,text\n1,a,1,"two\nlines"\n2,a,one,x\n': "line 4, column score: 'one' is not a number",
    "id,model,score\n,a,1\n": "line 2, column id: it is empty",
    "id,modle,score\n1,a,1\n": r"line 1: the column 'model' is missing \(it has id, modle, score\)",
    "id,model,score,score\n1,a,1,0\n": "line 1: the column 'score' stands twice",
    '{"id": 1, "model": "a", "score": 1}\n\n{"id": 2, "model": "", "score": 1}\n': "line 3, column model",
    "id,model,score\n1,a\n": "has more or fewer cells than the header",
    "id,model,score,repeat\n1,a,1,0\n1,a,0,0\n": "repeat 0 of the item 1 of a stands twice",
    "id,model,score,text\n1,a,1,x\n1,a,0,y\n": "the item 1 of a stands there with two texts",
}


@pytest.mark.parametrize("text", BROKEN)
def test_what_is_no_log_is_refused_in_one_sentence(text, tmp_path):
    path = tmp_path / "log"
    path.write_text(text)
    with pytest.raises(LabError, match=BROKEN[text]) as refused:
        logs_of(path)
    assert str(refused.value).startswith(str(path)) and "\n" not in str(refused.value)


def test_bytes_that_are_no_text_and_missing_files_are_refused(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(LabError, match="is not text in UTF-8, nor an Inspect log"):
        logs_of(path)
    with pytest.raises(LabError, match=r"There is no log"):
        logs_of(tmp_path / "none.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(LabError, match="holds no scores that could be compared"):
        logs_of(tmp_path / "empty")
    path.write_bytes(b"PK\x03\x04 broken")
    pytest.importorskip("inspect_ai", reason="inspect_ai is not installed (extra logs)")
    with pytest.raises(LabError, match="is not a log that this release of Inspect can read"):
        logs_of(path)


def test_a_blank_score_is_listed_and_a_rate_may_be_true_or_false(tmp_path):
    path = write_csv(
        tmp_path / "log.csv", [{"id": 1, "model": "a", "score": "True"}, {"id": 2, "model": "a", "score": ""}]
    )
    (log,) = logs_of(path)
    assert log.scores == {"1": 1.0} and log.dropped == {"2": "no score"}


def test_a_model_is_chosen_and_a_wrong_one_named(tmp_path):
    path = write_csv(tmp_path / "log.csv", table({"a": [1, 0], "b": [0, 1]}))
    assert [log.model for log in compare.read_logs(path, "b")] == ["b"]
    with pytest.raises(LabError, match=r"has no model 'c': it has a, b\."):
        compare.read_logs(path, "c")


def test_ten_thousand_rows_take_under_two_seconds(tmp_path):
    rng = np.random.default_rng(0)
    rows = table({m: rng.random(5000).tolist() for m in "ab"})
    harness(tmp_path / "h" / "log.jsonl", {f"{i}": i % 2 for i in range(5000)})
    harness(tmp_path / "k" / "log.jsonl", {f"{i}": i % 3 == 0 for i in range(5000)})
    path = write_csv(tmp_path / "log.csv", rows)
    for files in ((path,), (tmp_path / "h", tmp_path / "k")):
        start = time.process_time()
        found = compared(*files)
        assert found.comparisons[0].pairs[0].n == 5000
        assert time.process_time() - start < 2


def make_run(
    folder: Path, shift: float = 0.0, slow: float = 1.0, models=("a", "b"), prompts: int = 15
) -> Path:
    """A run's files with planted scores (b is 0.2 points above a) and times."""
    rng = np.random.default_rng(7)
    levels = {f"p{i:02}": float(rng.normal(6, 1)) for i in range(prompts)}
    for place, model in enumerate(models):
        samples, scores, timed = [], [], []
        for prompt, level in levels.items():
            for repeat in range(4):
                key, text = f"{model}{prompt}{repeat}", f"Answer {repeat} of {model}."
                took = slow * (1 + 0.1 * repeat)
                sample = Sample(
                    *(
                        key,
                        model,
                        "r",
                        prompt,
                        "short_post",
                        repeat,
                        0,
                        f"Ask {prompt}",
                        text,
                        3,
                        5,
                        len(text),
                    ),
                    *("eos", None, 1, took, 0.1, 0.1, None, None),
                    share_s=took,
                )
                samples.append(sample)
                value = round(level + 0.2 * place + shift + float(rng.normal(0, 0.3)), 3)
                scores.append(
                    Score(key, prompt, repeat, "short_post", False, 4, {"lab_v2": value, "lab_v2/x": 5.0})
                )
            timed.append(
                dataclasses.replace(samples[-1], repeat=0, latency_s=slow * float(rng.normal(1, 0.02)))
            )
        per_prompt = {
            p: float(np.mean([s.values["lab_v2"] for s in scores if s.prompt_id == p])) for p in levels
        }
        result = Result(
            *(
                model,
                model,
                "r",
                "f",
                10,
                "cpu",
                "float32",
                60,
                60,
                0,
                "lab_v2",
                True,
                {},
                {},
                per_prompt,
                Settings(),
            )
        )
        for name, rows in (("samples", samples), ("scores", scores), ("latency", timed)):
            store.write_rows(folder / model / f"{name}.jsonl", rows)
        store.write_json(folder / model / "result.json", result)
    return folder


def test_runs_are_logs_in_points(tmp_path):
    run = make_run(tmp_path / "run")
    (one,) = compared(run).comparisons
    pair = one.pairs[0]
    assert (pair.a, pair.n, pair.unit, pair.items, pair.margin) == ("b", 15, "points", "prompts", 0.5)
    a, b = (log.scores for log in logs_of(run) if log.metric == "lab_v2")
    x = np.array([b[item] - a[item] for item in a])
    assert (pair.low, pair.high) == pytest.approx(
        paired.t_interval(float(x.mean()), float(x.std(ddof=1)), 15)
    )
    assert {log.model for log in logs_of(run / "a")} == {"a"}
    two = compared(run / "a", make_run(tmp_path / "later") / "a")
    assert set(two.comparisons[0].ranking) == {"a (run)", "a (later)"}


def test_an_exported_run_says_the_same_as_the_run(tmp_path):
    run = make_run(tmp_path / "run")
    done = CliRunner().invoke(cli.app, ["compare", str(run), "--export", str(tmp_path / "out")])
    assert done.exit_code == 0 and done.stdout.strip() == str(tmp_path / "out")
    before = compared(run).comparisons[0].pairs[0]
    after = compared(tmp_path / "out", margin=0.5).comparisons[0].pairs[0]
    assert (after.a, after.n, after.low, after.high) == pytest.approx(
        (before.a, before.n, before.low, before.high)
    )
    line = json.loads((tmp_path / "out" / "a" / "samples_prompts_run.jsonl").read_text().splitlines()[0])
    real = json.loads(next(HARNESS[0].glob("samples_lab_endings*")).read_text().splitlines()[0])
    assert real.keys() - line.keys() == {"acc", "acc_norm"} and len(line["resps"][0]) == 4


def test_less_is_better_of_a_score_in_a_run_beside_its_primary_one_and_in_its_export(tmp_path):
    scales = {"exact": Scale(0, 1, 0.05), "bits_per_byte": Scale(0, 8, 0.05, higher_is_better=False)}
    for primary, scale in scales.items():
        for model, level in (("good", 2.0), ("bad", 4.0)):
            run, values = tmp_path / primary / model, {"exact": 1.0}
            every = {f"b{n:02d}": values | {"bits_per_byte": level + n % 3 / 10} for n in range(1, 16)}
            made = make_result(model, [own[primary] for own in every.values()], primary=primary, scale=scale)
            folder = write_model(run, made, [(make_sample(model, id, 0), 0.0) for id in every])
            rows = list(store.read_rows(folder / "scores.jsonl", Score))
            rows = [dataclasses.replace(row, values=every[row.prompt_id]) for row in rows]
            store.write_rows(folder / "scores.jsonl", rows)
            write_info(run, [model])
            out = tmp_path / f"{primary}, exported" / model
            assert CliRunner().invoke(cli.app, ["compare", str(run), "--export", str(out)]).exit_code == 0
        for place in (tmp_path / primary, tmp_path / f"{primary}, exported"):
            choice = ["--metric", "bits_per_byte", "--margin", "0.1", "--json"]
            asked = ["compare", str(place / "good"), str(place / "bad"), *choice]
            (found,) = json.loads(CliRunner().invoke(cli.app, asked).stdout)["comparisons"]
            pair = found["pairs"][0]
            assert (pair["a"], pair["verdict"]) == ("good", "better"), place


def test_an_export_takes_the_place_of_no_file_of_the_users_and_of_no_other_run(tmp_path):
    run, out = make_run(tmp_path / "run"), tmp_path / "mine"
    out.mkdir()
    (out / "README.md").write_text("My own.")
    done = CliRunner().invoke(cli.app, ["compare", str(run), "--dataset", str(out)])
    assert "no card of ours" in str(done.exception) and [*out.iterdir()] == [out / "README.md"]
    done = CliRunner().invoke(cli.app, ["compare", str(run), str(run), "--export", str(out)])
    assert "one run at a time" in str(done.exception) and [*out.iterdir()] == [out / "README.md"]


def test_a_run_is_a_dataset_that_the_hubs_library_reads(tmp_path, monkeypatch):
    run, out = make_run(tmp_path / "run"), tmp_path / "out"
    failed = next(iter(store.read_rows(run / "a" / "samples.jsonl", Sample)))
    again = dataclasses.replace(failed, error=None)
    store.write_rows(run / "a" / "samples.jsonl", [dataclasses.replace(failed, error="lost"), again])
    for sample in [*store.read_rows(make_run(tmp_path / "same") / "a" / "samples.jsonl", Sample)][1:]:
        store.append_row(run / "a" / "samples.jsonl", sample)
    done = CliRunner().invoke(cli.app, ["compare", str(run), "--dataset", str(out)])
    assert done.exit_code == 0 and done.stdout.strip() == str(out)
    lines = parquet.read_table(out / "test.parquet").to_pylist()
    assert len(lines) == 2 * 15 * 4  # what was tried again stands there once
    first = next(store.read_rows(run / "a" / "scores.jsonl", Score))
    assert lines[0]["scores"] == first.values and lines[0]["text"] == "Answer 0 of a."
    head, body = (out / "README.md").read_text().split("---\n")[1:]
    assert yaml.safe_load(head) == {"tags": ["nbhelpers"]} and "120 answers of `a` (r)" in body
    assert str(tmp_path) not in body
    assert CliRunner().invoke(cli.app, ["compare", str(run), "--dataset", str(out)]).exit_code == 0  # again
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    found = datasets.load_dataset(str(out), split="test", cache_dir=str(tmp_path / "cache"))
    assert found.to_list() == lines
    assert found.features["error"].dtype == "string" and found.features["latency_s"].dtype == "float64"
    both = CliRunner().invoke(cli.app, ["compare", str(run), str(run), "--dataset", str(out)])
    assert "one run at a time" in str(both.exception)


def test_the_command_prints_and_writes(tmp_path):
    files = [str(folder) for folder in HARNESS]
    done = CliRunner().invoke(cli.app, ["compare", *files, "--out", str(tmp_path), "--task", "lab_endings"])
    assert done.exit_code == 0, done.stdout
    assert "acc of lab_endings over 40 items" in done.stdout
    assert "lab-llama and lab-gpt2: cannot tell: +0.07 acc" in done.stdout
    page = (tmp_path / "index.html").read_text()
    assert "cannot tell: +0.07 acc" in page and page.count("<svg") == 0 and "image/svg+xml" in page
    written = store.read_json(tmp_path / "comparison.json", compare.LogsReport)
    printed = CliRunner().invoke(cli.app, ["compare", *files, "--task", "lab_endings", "--json"])
    assert json.loads(printed.stdout) == json.loads(json.dumps(dataclasses.asdict(written)))


def test_a_spreadsheets_semicolons_mark_and_decimal_commas_are_understood(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("\ufeffID;Model;Score\r\n1;a;0,5\r\n;;\r\n2;a;1\r\n", encoding="utf-8")
    assert logs_of(path)[0].scores == {"1": 0.5, "2": 1.0}


def test_a_text_may_hold_what_ends_a_line_elsewhere(tmp_path):
    path = tmp_path / "log.jsonl"
    rows = [{"doc_id": i, "doc": "a\u2028b", "metrics": ["acc"], "acc": 1} for i in range(2)]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    assert logs_of(path)[0].scores == {"0": 1, "1": 1}


def test_a_broken_log_in_a_folder_is_refused_and_never_passed_over(tmp_path):
    harness(tmp_path / "samples_t_1.jsonl", {"0": 1})
    (tmp_path / "samples_u_1.jsonl").write_text('{"doc_id": 1, "metrics": []}\n{"doc_id"')
    with pytest.raises(LabError, match="line 2: not a JSON object"):
        logs_of(tmp_path)


def test_one_text_counts_once_and_a_document_twice_is_refused(tmp_path):
    scores = {f"{i}": i % 2 for i in range(6)}
    a, b = (harness(tmp_path / m / "log.jsonl", scores, doc_hash="d", prompt_hash="p") for m in "ab")
    (one,) = compared(a, b).comparisons
    assert one.pairs[0].n == 1
    assert one.notes == ("6 items have 1 different texts: each text counts once.",)
    a.write_text(a.read_text() * 2)
    with pytest.raises(LabError, match="of the item 0 of a stands twice"):
        logs_of(a)


def test_null_is_no_cluster_and_a_wrong_field_is_said(tmp_path):
    rows = [row | {"cluster": None} for row in table({"a": [0.1, 0.5], "b": [0.2, 0.4]})]
    path = write_lines(tmp_path / "log.jsonl", rows)
    assert not logs_of(path)[0].clusters
    with pytest.raises(LabError, match="has no items with a field 'pasage'"):
        logs_of(path, cluster="pasage")


def test_blanks_around_cells_tell_nothing_apart(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("id, model, score\n1, a, 1\n2,a ,0\n")
    (log,) = logs_of(path)
    assert (log.model, log.scores) == ("a", {"1": 1.0, "2": 0.0})


def test_scores_beyond_all_measure_are_listed(tmp_path):
    path = write_csv(tmp_path / "log.csv", table({"a": [1e300, 1, 0], "b": [1, 1, 1]}))
    (one,) = compared(path, margin=1.0).comparisons
    assert one.lacking["a"] == {"0": "its score is not a number"}


def test_an_item_in_two_clusters_is_refused(tmp_path):
    rows = [
        {"id": n, "model": m, "score": 1, "cluster": f"{n // (2 + (m == 'b'))}"}
        for n in range(6)
        for m in "ab"
    ]
    with pytest.raises(LabError, match="The item 2 stands in two clusters: 1, 0"):
        compared(write_csv(tmp_path / "log.csv", rows))


def test_a_metric_named_as_what_runs_measure_is_compared_where_it_is_asked_for(tmp_path):
    rows = [{"id": n, "model": m, "score": n, "metric": "latency"} for n in range(6) for m in "ab"]
    path = write_csv(tmp_path / "log.csv", rows)
    with pytest.raises(LabError, match="they have latency by a; latency by b"):
        compared(path)
    (one,) = compared(path, metric="latency", margin=1.0).comparisons
    assert one.primary == "latency"


def test_a_score_too_large_for_a_number_is_refused(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("id,model,score\n1,a,1,2\n")
    with pytest.raises(LabError, match="line 2: it has more or fewer cells"):
        logs_of(path)
    write_lines(path, [{"id": 1, "model": "a", "score": 10**400}])
    with pytest.raises(LabError, match=r"line 1, column score: 10+ is not a number"):
        logs_of(path)


def test_a_run_of_a_task_keeps_its_scale_its_direction_and_its_clusters(tmp_path: Path) -> None:
    scale = Scale(0.0, 1.0, 0.1, higher_is_better=False, unit="wrong")
    given = {"primary": "wrong", "scale": scale, "clusters": {"b01": "b01", "b02": "b01"}}
    result = make_result("m", [0.0, 1.0, 1.0], **given)
    rows = [(make_sample("m", name, 0), score) for name, score in result.per_prompt.items()]
    write_model(tmp_path, result, rows)
    (log,) = [log for log in compare.read_logs(tmp_path) if log.metric == "wrong"]
    assert (log.unit, log.higher, log.margin) == ("wrong", False, 0.1)
    assert log.clusters == {"b01": "b01", "b02": "b01"}


def task_run(folder: Path, margin: float, models=("a", "b"), **settings) -> Path:
    """A run of a task with right and wrong answers, its margin and its settings."""
    scale = Scale(0.0, 1.0, margin, unit="exact")
    for place, model in enumerate(models):
        right = [float((i + place) % 3 > 0) for i in range(12)]
        result = make_result(model, right, primary="exact", scale=scale, settings=settings)
        write_model(folder, result, [(make_sample(model, id, 0), s) for id, s in result.per_prompt.items()])
    return folder


def test_a_run_brings_its_tasks_margin_and_two_that_disagree_are_asked(tmp_path):
    run = task_run(tmp_path / "run", 0.2)
    (one,) = compared(run, metric="exact").comparisons
    assert one.pairs[0].margin == 0.2 and "margin 0.2" in one.basis
    assert compared(run, metric="exact", margin=0.3).comparisons[0].pairs[0].margin == 0.3
    with pytest.raises(LabError, match="must be more than 0"):
        compared(run, metric="exact", margin=0.0)
    other = task_run(tmp_path / "other", 0.1)
    with pytest.raises(LabError, match=r"own margins of exact are 0.1 and 0.2: choose one by --margin"):
        compared(run, other, metric="exact")


def test_runs_that_were_made_otherwise_are_told_so_in_one_sentence(tmp_path):
    run = task_run(tmp_path / "run", 0.1)
    same = task_run(tmp_path / "same", 0.1, seed=1, repeats=9)
    hot = task_run(tmp_path / "hot", 0.1, temperature=0.0, max_new_tokens=9)
    assert compared(run, same, metric="exact").notes == ()
    (note,) = compared(run, hot, metric="exact").notes
    said = "The runs differ in max_new_tokens (256 and 9), temperature (0.8 and 0.0):"
    assert note == f"{said} what is compared is a model with its settings."


def early_run(folder: Path, shift: float, prompts: int = 40) -> Path:
    """A run of two models, b above a by ``shift``, that stopped after 40 of 60 prompts."""
    ids = [f"b{n:02d}" for n in range(1, 61)]
    info = dataclasses.replace(write_info(folder, ("a", "b")), prompts=dict.fromkeys(ids, ""))
    store.write_json(folder / "run.json", dataclasses.replace(info, looks=tuple(range(6, 61, 6))))
    for place, model in enumerate(("a", "b")):
        result = make_result(model, planted(6 + shift * place, place, prompts), parameters=10**6 * 2**place)
        write_model(folder, result, [(make_sample(model, id, 0), s) for id, s in result.per_prompt.items()])
    return folder


def test_a_run_that_stopped_early_keeps_its_always_valid_figures(tmp_path):
    run = early_run(tmp_path / "run", 0.4)
    whole = assemble(run)
    (one,) = compared(run).comparisons
    assert one.pairs == whole.pairs
    assert "by an always-valid test after 40 of 60 prompts" in one.basis
    # the size sentence: with twice the parameters, a doubling is the difference of the pair
    low, high = whole.pairs[0].low, whole.pairs[0].high
    assert f"[{low:+.2f}, {high:+.2f}]" in whole.size_hypothesis


def test_the_published_schema_is_that_of_the_record_and_accepts_it():
    text = make_schema.FILE.read_text()
    assert text == make_schema.schema(), "python tools/make_schema.py writes it again"
    schema, written = json.loads(text), json.loads(store.as_json(make_result("lab-gpt2", [1.0, 2.0, 3.0])))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(written, schema)
    with pytest.raises(jsonschema.ValidationError, match="colour"):
        jsonschema.validate(written | {"colour": "red"}, schema)
