"""The gate: what passes, what is worse, what cannot be told, budgets, and what it writes."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_read import HARNESS, compared, early_run, make_run, table, write_csv
from typer.testing import CliRunner

from nbhelpers import cli
from nbhelpers.logs import gate
from nbhelpers.logs.compare import read_logs
from nbhelpers.options import Choice
from nbhelpers.records import LabError
from nbhelpers.stats import noninferiority, paired, sequential
from nbhelpers.stats.estimate import bonett_price

ROOT = Path(__file__).resolve().parents[2]


def gated(old: Path, new: Path, budgets: dict[str, float] | None = None, **choice) -> gate.GateReport:
    chosen = Choice(**choice)
    return gate.gate_logs(read_logs(old, choice=chosen), read_logs(new, choice=chosen), chosen, budgets)


def invoke(*args: object):
    return CliRunner().invoke(cli.app, [str(arg) for arg in args])


def test_a_run_passes_is_worse_or_cannot_tell(tmp_path):
    run = make_run(tmp_path / "run", models=("a",))
    outcomes = {}
    for shift in (0.0, -1.0, -0.4):
        new = make_run(tmp_path / f"new{shift}", shift, models=("a",))
        outcomes[shift] = gated(run, new, margin=0.5).outcome
    assert outcomes == {0.0: "passes", -1.0: "worse", -0.4: outcomes[-0.4]}
    done = invoke("gate", run, tmp_path / "new-1.0")
    assert done.exit_code == 1 and "the gate: worse\n  lab_v2: worse: -1.0" in done.stdout
    assert "-1.000 (at most -1.000, margin 0.5) over 15 prompts" in done.stdout  # the bound that decides
    assert invoke("gate", run, run).exit_code == 0
    unclear = invoke("gate", *HARNESS, "--task", "lab_endings")
    assert unclear.exit_code == 3
    assert (
        "acc of lab_endings: cannot tell: +0.075 (at least -0.098, margin 0.05) over 40 items"
        in unclear.stdout
    )
    assert "about 1,053 items would tell, if the models are equal." in unclear.stdout


def test_models_of_one_name_are_held_against_each_other(tmp_path):
    run, new = make_run(tmp_path / "run"), make_run(tmp_path / "new", -1.0)
    found = gated(run, new)
    assert [(check.baseline, check.candidate) for check in found.checks] == [
        ("a (run)", "a (new)"),
        ("b (run)", "b (new)"),
    ]
    assert invoke("gate", f"{run}#a", f"{run}#b").exit_code == 0
    with pytest.raises(LabError, match=r"Choose a model by LOG#MODEL: these have a, b and c\."):
        gated(run, make_run(tmp_path / "other", models=("c",)))


def test_bounds_are_students_and_both_tests_must_agree():
    rng = np.random.default_rng(3)
    a = rng.normal(6, 1, 15)
    b = a + rng.normal(0, 0.4, 15)
    found = noninferiority.difference(a, b, 0.5)
    x = np.round(b - a, 12)
    half = 1.761310135774891 * x.std(ddof=1) / np.sqrt(15)  # t(14) at 95%
    assert (found.low, found.high) == pytest.approx((x.mean() - half, x.mean() + half))
    assert (found.outcome == "passes") == (found.low > -0.5 and paired.paired_p(x + 0.5) < 0.1)
    assert noninferiority.difference(a, a - 2 + rng.normal(0, 0.1, 15), 0.5).outcome == "worse"
    wide = noninferiority.difference(a, a + rng.normal(0, 3, 15), 0.5)
    assert wide.outcome == "cannot tell" and wide.needed > 100


def test_equal_logs_pass_from_five_items_on():
    for n, outcome in ((4, "cannot tell"), (5, "passes")):
        assert noninferiority.difference([1.0] * n, [1.0] * n, 0.05).outcome == outcome
    assert noninferiority.difference([1.0] * 4, [1.0] * 4, 0.05).needed == 5
    assert noninferiority.difference([0.5], [0.5], 0.05).outcome == "cannot tell"
    worse = noninferiority.difference([1.0] * 8, [0.5] * 8, 0.05)
    assert worse.outcome == "worse" and worse.p_worse == 2**-8
    with pytest.raises(LabError, match="not finite"):
        noninferiority.difference([float("nan"), 1], [1, 1], 0.1)


def test_binary_scores_have_binary_bounds():
    a, b = [1] * 90 + [0] * 10, [1] * 88 + [0, 0] + [1, 1] + [0] * 8
    found = noninferiority.difference(a, b, 0.05)
    assert (found.low, found.high) == pytest.approx(bonett_price(2, 2, 100, 0.95))
    assert found.p_worse == pytest.approx(0.5) and found.outcome == "passes"
    assert noninferiority.difference([1] * 30, [1] * 15 + [0] * 15, 0.05).outcome == "worse"


def test_a_candidate_that_lacks_items_cannot_pass(tmp_path):
    rows = table({"m": [0.5 + i % 3 / 10 for i in range(20)]})
    old, new = write_csv(tmp_path / "old.csv", rows), write_csv(tmp_path / "new.csv", rows[:-2])
    found = gated(old, new)
    assert found.outcome == "cannot tell" and "the candidate lacks 2 items" in found.checks[0].reason
    assert any("m (new) has no score there: 18 (not in its log); 19" in note for note in found.notes)
    assert gated(new, old).outcome == "passes"
    rows = [row | {"task": task} for task in ("art", "law") for row in rows]
    old, new = write_csv(tmp_path / "old.csv", rows), write_csv(tmp_path / "new.csv", rows[:20])
    with pytest.raises(LabError, match=r"has no log of the task law\."):
        gated(old, new)


def test_tasks_are_checked_each_and_all_must_pass(tmp_path):
    rng = np.random.default_rng(0)
    base = rng.random(40)
    for name, drop in (("old", 0.0), ("new", 0.3)):
        rows = [
            row | {"task": task}
            for task, less in (("easy", 0.0), ("hard", drop))
            for row in table({"m": (base - less + rng.normal(0, 0.01, 40)).tolist()})
        ]
        write_csv(tmp_path / name, rows)
    found = gated(tmp_path / "old", tmp_path / "new", margin=0.05)
    assert {check.name: check.outcome for check in found.checks} == {
        "score of easy": "passes",
        "score of hard": "worse",
    }
    assert found.outcome == "worse"


def test_less_is_better_turns_the_gate(tmp_path):
    old = write_csv(tmp_path / "old.csv", table({"m": [0.2 + i % 3 / 10 for i in range(20)]}))
    new = write_csv(tmp_path / "new.csv", table({"m": [0.5 + i % 3 / 10 for i in range(20)]}))
    assert gated(old, new).outcome == "passes"
    assert gated(old, new, lower_is_better=True).outcome == "worse"


def test_budgets_hold_ratios_of_means(tmp_path):
    run = make_run(tmp_path / "run", models=("a",))
    slower = make_run(tmp_path / "slower", slow=1.5, models=("a",))
    found = gated(run, slower, {"latency": 1.2, "cost": 2.0})
    checks = {check.name: check for check in found.checks}
    assert checks["latency"].outcome == "worse" and found.outcome == "worse"
    assert checks["latency"].value == pytest.approx(1.5, rel=0.02)
    assert checks["cost (by time)"].outcome == "passes" and checks["cost (by time)"].value == pytest.approx(
        1.5
    )
    assert invoke("gate", run, run, "--budget", "latency=1.2", "--budget", "ttft=1.01").exit_code == 0
    said = [gate.check_sentence(check) for check in found.checks[1:]]  # each with the bound that decides
    assert f"times (at least {checks['latency'].low:.3f}, budget 1.2)" in said[0]
    assert f"times (at most {checks['cost (by time)'].high:.3f}, budget 2)" in said[1]
    with pytest.raises(LabError, match="There is no memory in both: a budget may be on latency, ttft, tpot"):
        gated(run, run, {"memory": 1.2})


def test_the_bound_of_a_ratio_covers_it_as_often_as_it_says():
    rng, passed = np.random.default_rng(5), 0
    for _ in range(4000):
        level = rng.lognormal(0, 0.5, 15)
        a, b = (level * rng.lognormal(0, 0.15, 15) for _ in range(2))
        passed += noninferiority.ratio(a, 1.2 * b, 1.2).outcome == "passes"
    assert passed / 4000 == pytest.approx(0.05, abs=0.015)


@pytest.mark.parametrize("budget", ["latency", "latency=", "latency=-1", "latency=0", "latency=fast"])
def test_a_wrong_budget_is_refused(budget, tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", models=("a",))
    done = invoke("gate", run, run, "--budget", budget)
    assert isinstance(done.exception, LabError) and "is not a name and a factor" in str(done.exception)


def test_wrong_usage_leaves_with_code_2(tmp_path, monkeypatch, capsys):
    for wrong in (
        ["gate", "one"],
        ["gate", str(tmp_path / "no.csv"), "b"],
        ["compare", str(tmp_path / "no.csv")],
    ):
        monkeypatch.setattr("sys.argv", ["nbhelpers", *wrong])
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code == 2


def test_junit_markdown_and_json_say_the_same(tmp_path):
    files = {name: tmp_path / name for name in ("junit", "markdown")}
    options = [option for name, path in files.items() for option in (f"--{name}", path)]
    done = invoke("gate", *HARNESS, *options, "--json")
    assert done.exit_code == 3
    said = json.loads(done.stdout)
    assert said["outcome"] == "cannot tell" and [check["n"] for check in said["checks"]] == [40, 12]
    suite = ElementTree.fromstring(files["junit"].read_text())
    assert suite.attrib == {"name": "gate", "tests": "2", "failures": "0", "errors": "2"}
    assert [case.find("error").get("type") for case in suite] == ["cannot tell"] * 2
    comment = files["markdown"].read_text()
    assert (
        comment.startswith("**The gate: cannot tell**") and comment.count("\n| lab-gpt2 | lab-llama |") == 2
    )


def test_names_with_bars_and_controls_leave_a_table_and_xml_whole(tmp_path):
    names, rows = ("old|\x1b[31m", "new|\x1b[31m"), ["id,model,score"]
    rows += [f"{n},{name},{n % 2}" for n in range(20) for name in names]
    (tmp_path / "log.csv").write_text("\n".join(rows))
    files = {name: tmp_path / name for name in ("junit", "markdown")}
    options = [option for name, path in files.items() for option in (f"--{name}", path)]
    done = invoke("gate", *(f"{tmp_path / 'log.csv'}#{name}" for name in names), *options)
    assert done.exit_code == 0, done.output
    ElementTree.fromstring(files["junit"].read_text())
    assert files["markdown"].read_text().splitlines()[4].count("|") == 5


def test_the_gate_and_the_comparison_count_the_same(tmp_path):
    (check, _) = gated(*HARNESS, cluster="passage").checks
    pair = compared(*HARNESS, cluster="passage").comparisons[0].pairs[0]
    assert (check.n, check.items) == (pair.n, pair.items) == (4, "clusters")
    assert check.value == pytest.approx(pair.difference)


@pytest.mark.parametrize(
    ("code", "allow", "leaves"), [(0, "passes", 0), (3, "passes", 1), (3, "passes, cannot tell", 0)]
)
def test_the_action_turns_the_answer_into_a_step(code, allow, leaves, tmp_path):
    """Its script, with a stand-in for the command: quoting, outputs, and what succeeds."""
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    step = action["runs"]["steps"][-1]
    assert not re.search(r"\$\{\{", step["run"])  # names of logs reach the script as variables only
    command = tmp_path / "nbhelpers"
    command.write_text(f"#!/bin/bash\nprintf '%s|' \"$@\" > asked\necho said > gate.md\nexit {code}\n")
    command.chmod(0o755)
    names = {"BASELINE": "a log; $(x)", "CANDIDATE": "b", "OPTIONS": "--metric acc", "ALLOW": allow}
    names |= {name: str(tmp_path / name) for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
    env = os.environ | names | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-e", "-o", "pipefail", "-c", step["run"]], cwd=tmp_path, env=env)
    assert done.returncode == leaves
    assert (tmp_path / "asked").read_text().startswith("gate|a log; $(x)|b|--metric|acc|--markdown|")
    outcome = {0: "passes", 3: "cannot tell"}[code]
    assert (tmp_path / "GITHUB_OUTPUT").read_text() == f"outcome={outcome}\n"
    assert (tmp_path / "GITHUB_STEP_SUMMARY").read_text() == "said\n"


def needed(names: list[str]) -> set[str]:
    """These packages and all that they need here."""
    found, left = set(), list(names)
    while left:
        if (name := canonicalize_name(left.pop())) not in found:
            found.add(name)
            needs = map(Requirement, importlib.metadata.requires(name) or ())
            left += [need.name for need in needs if not need.marker or need.marker.evaluate({"extra": ""})]
    return found


LACKING = """
import sys

class Finder:
    lacks = sys.argv.pop(1).split()

    def find_spec(self, name, *rest):
        if name.partition(".")[0] in self.lacks:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Finder())
from nbhelpers import cli
cli.main()
"""


def test_the_action_installs_what_its_gate_needs(tmp_path):
    """The gate in a process that lacks every other package of this environment."""
    install = yaml.safe_load((ROOT / "action.yml").read_text())["runs"]["steps"][1]["run"]
    own = needed(re.search(r"packages=\((.*)\)", install)[1].split()) | {"nbhelpers"}
    owners = importlib.metadata.packages_distributions()
    others = sorted(top for top, names in owners.items() if own.isdisjoint(map(canonicalize_name, names)))
    assert {"torch", "transformers", "mlflow", "jupyterlab"} <= {*others}
    files = [option for name in ("junit", "markdown") for option in (f"--{name}", str(tmp_path / name))]
    command = [sys.executable, "-c", LACKING, " ".join(others), "gate", *map(str, HARNESS), *files]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (3, "") and "the gate: cannot tell" in done.stdout


def test_points_that_meet_by_chance_are_no_passes() -> None:
    """As pass and fail their bound would end at the one difference seen."""
    found = noninferiority.difference([1.0] * 5 + [2.48], [1.0] * 6, 0.5)
    step = 1.48 / 6  # minus the mean of the differences, and its standard error
    assert found.low == pytest.approx(-step - 2.015 * step, abs=1e-3)  # 2.015: t of 95% with 5 degrees


def test_a_file_of_two_models_against_itself_is_asked_which(tmp_path):
    path = write_csv(tmp_path / "log.csv", table({"a": [1, 0] * 9, "b": [0, 1] * 9}))
    done = invoke("gate", path, path)
    assert done.exit_code != 0 and "name one of a, b on each side, as LOG#MODEL" in str(done.exception)
    assert invoke("gate", f"{path}#a", f"{path}#b").exit_code == 3
    assert invoke("gate", f"{path}#a", f"{path}#a").exit_code == 0


def test_a_run_that_stopped_early_is_gated_by_figures_that_hold_early(tmp_path):
    outcomes = {}
    for shift in (0.0, -0.3, -1.5):
        run = early_run(tmp_path / f"{shift}", shift)
        old, new = (read_logs(run, model) for model in "ab")
        (check,) = gate.gate_logs(old, new, Choice()).checks
        a, b = (next(log.scores for log in logs if log.metric == "lab_v2") for logs in (old, new))
        looks = [list(a)[n : n + 6] for n in range(0, 40, 6)]
        x = np.round([b[item] - a[item] for item in a], 12)
        assert (check.low, check.high) == sequential.early_interval(x, [len(look) for look in looks], 60)
        outcomes[shift] = check.outcome
    assert outcomes == {0.0: "passes", -0.3: "passes", -1.5: "worse"}


def test_the_gate_of_runs_that_stop_early_is_seldom_wrong() -> None:
    """Looked at after every tenth prompt until it answers, a candidate at the margin passes in under 5%."""
    rng, looks, passed = np.random.default_rng(3), [4] * 10, 0
    for _ in range(400):
        x = rng.normal(-0.5, 1.0, 40)
        ends = (noninferiority.early_difference(x[: 4 * n], looks[:n], 40, 0.5).outcome for n in range(1, 11))
        passed += next((end for end in ends if end != "cannot tell"), "") == "passes"
    assert passed / 400 < 0.05
