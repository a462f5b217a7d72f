"""The gate: may a candidate take a baseline's place? For continuous integration, by its exit code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from nbhelpers.comparison import logs
from nbhelpers.comparison.logs import Choice, Log
from nbhelpers.records import SCHEMA_VERSION, LabError, Record
from nbhelpers.stats import noninferiority, paired
from nbhelpers.stats.noninferiority import Outcome
from nbhelpers.stats.paired import ALPHA

EXIT_CODES: dict[Outcome, int] = {"passes": 0, "worse": 1, "cannot tell": 3}


@dataclass(frozen=True)
class Check(Record):
    """What a candidate must keep: a metric within its margin, or a mean within a factor (a budget)."""

    name: str
    baseline: str
    candidate: str
    items: str  # what n counts
    limit: float  # -margin, or the budget
    n: int  # and the rest as in ``noninferiority.Kept``
    value: float | None
    low: float | None
    high: float | None
    p_worse: float | None  # corrected over all checks
    outcome: Outcome
    needed: int | None
    reason: str = ""


@dataclass(frozen=True)
class GateReport(Record):
    """The gate's answer: the worst of its checks."""

    outcome: Outcome
    checks: tuple[Check, ...]
    notes: tuple[str, ...]
    schema_version: int = SCHEMA_VERSION


def gate(
    baseline: Sequence[Log],
    candidate: Sequence[Log],
    choice: Choice,
    budgets: dict[str, float] | None = None,
    allow_missing: bool = False,
) -> GateReport:
    """Is no metric of the candidate worse by the margin, and no mean above its budget? All tests at 5%.

    Each model of the candidate is held against the one of its name, or one against one. A check passes where
    the difference is shown to be above -margin (non-inferiority, one-sided), is worse where it is shown to
    be below 0 and not above -margin, and otherwise cannot tell. All must pass; "worse" is corrected by Holm.
    LabError as ``compare_logs``, for a budget that was not measured, and where it is not clear what to pair.
    """
    olds, news = (list(dict.fromkeys(log.model for log in every)) for every in (baseline, candidate))
    pairs = [(name, name) for name in olds if name in news] or list(zip(olds, news, strict=False))
    if len(pairs) < max(len(olds), len(news)) and (len(olds) > 1 or len(news) > 1):
        raise LabError(f"Choose a model by LOG#MODEL: these have {', '.join(olds)} and {', '.join(news)}.")
    checks, notes = list[Check](), list[str]()
    for old, new in pairs:
        mine, other = ([g for g in every if g.model == m] for every, m in ((baseline, old), (candidate, new)))
        one, two = logs.named([mine[0], other[0]])
        names = one.model, two.model if two.model != one.model else f"{two.model} (candidate)"
        both = [replace(g, model=name) for own, name in ((mine, names[0]), (other, names[1])) for g in own]
        lost_tasks = sorted({g.task for g in mine} - {g.task for g in other} - {""})
        if lost_tasks and not allow_missing and not choice.pool and choice.task in ("", *lost_tasks):
            lacks = f"{names[1]} has no log of the task {lost_tasks[0]}"
            raise LabError(f"The candidate {lacks} (--allow-missing, if that is meant).")
        found, said = logs.groups(both, choice)
        notes += said
        for group in found:
            check = _kept(group, *names)
            lost = len(group.lacking.get(names[1], {}))
            if lost and check.outcome == "passes" and not allow_missing:
                lost_says = f"the candidate lacks {lost} items (--allow-missing, if that is meant)"
                check = replace(check, outcome="cannot tell", reason=lost_says)
            checks.append(check)
            notes += group.notes
        for budget, limit in (budgets or {}).items():
            checks.append(_within(budget, limit, mine, other, names))
    if len(pairs) > 1:
        checks = [replace(check, name=f"{check.name}, {check.candidate}") for check in checks]
    p = iter(paired.holm([check.p_worse for check in checks if check.p_worse is not None]))
    checks = [c if c.p_worse is None else _corrected(replace(c, p_worse=next(p))) for c in checks]
    outcome = max((check.outcome for check in checks), key=["passes", "cannot tell", "worse"].index)
    return GateReport(outcome, tuple(checks), tuple(dict.fromkeys(notes)))


def _corrected(check: Check) -> Check:
    """Worse only if it still is after Holm's correction."""
    if check.outcome == "worse" and check.p_worse is not None and check.p_worse >= ALPHA:
        return replace(check, outcome="cannot tell", reason="not after correction for the other checks")
    return check


def _kept(group: logs.Group, old: str, new: str) -> Check:
    """``noninferiority.difference`` of a metric."""
    log, sign = group.logs[0], 1 if group.logs[0].higher else -1
    scores = [[sign * score for score in group.scores[name].values()] for name in (old, new)]
    found = noninferiority.difference(scores[0], scores[1], group.margin)
    return Check(f"{log.metric}{logs.of(log.task)}", old, new, group.items, -group.margin, **vars(found))


def _within(name: str, limit: float, old: Sequence[Log], new: Sequence[Log], names: tuple[str, str]) -> Check:
    """``noninferiority.ratio`` of what was measured; cost is in proportion to energy, else to time."""
    means = [{log.metric: log.scores for log in logs if log.scores} for logs in (old, new)]
    both = [metric for metric in logs.MEASURED if all(metric in own for own in means)]
    used = next((m for m in ([name, "energy", "time"] if name == "cost" else [name]) if m in both), None)
    if used is None:
        raise LabError(f"There is no {name} in both: a budget may be on {', '.join(both) or 'nothing here'}.")
    one, two = (own[used] for own in means)
    items = sorted(one.keys() & two.keys())
    found = noninferiority.ratio([one[item] for item in items], [two[item] for item in items], limit)
    return Check(name if used == name else f"{name} (by {used})", *names, "prompts", limit, **vars(found))


def sentence(check: Check) -> str:
    """One check with its figures."""
    if check.value is None or check.low is None or check.high is None:
        return f"{check.name}: {check.outcome}: {check.n} {check.items} are not enough."
    budget = check.limit > 0
    figures = f"{check.value:.2f} times" if budget else f"{check.value:+.3f}"
    bound, of_what = (check.high, "at most") if budget else (check.low, "at least")
    limit = f"budget {check.limit:g}" if budget else f"margin {-check.limit:g}"
    figures += f" ({of_what} {bound:.3f}, {limit}) over {check.n} {check.items}"
    said = f"{check.name}: {check.outcome}: {figures}"
    if check.outcome == "worse":
        said += f", p {check.p_worse:.2g}"
    if check.reason:
        said += f"; {check.reason}"
    elif check.outcome == "cannot tell":
        needed = f"about {check.needed:,}" if check.needed else "too many"
        said += f"; {needed} {check.items} would tell, if the models are equal"
    return f"{said}."


def text(report: GateReport) -> str:
    """The answer as lines."""
    said = [f"the gate: {report.outcome}", *(f"  {sentence(check)}" for check in report.checks)]
    return "\n".join([*said, *report.notes]) + "\n"


def markdown(report: GateReport) -> str:
    """The answer as a comment of a pull request."""
    head = [f"**The gate: {report.outcome}**", "", "| baseline | candidate | outcome | figures |"]
    rows = [f"| {c.baseline} | {c.candidate} | {c.outcome} | {sentence(c)} |" for c in report.checks]
    notes = [f"- {note}" for note in report.notes]
    return "\n".join([*head, "|---|---|---|---|", *rows, "", *notes]) + "\n"


def junit(report: GateReport) -> str:
    """The checks as test cases: worse is a failure, cannot tell an error."""
    from xml.etree import ElementTree

    kinds = {"worse": "failure", "cannot tell": "error"}
    outcomes = [check.outcome for check in report.checks]
    counts = {
        "tests": len(outcomes),
        "failures": outcomes.count("worse"),
        "errors": outcomes.count("cannot tell"),
    }
    suite = ElementTree.Element("testsuite", {"name": "gate"} | {name: f"{n}" for name, n in counts.items()})
    for check in report.checks:
        case = ElementTree.SubElement(suite, "testcase", classname=check.candidate, name=check.name)
        if kind := kinds.get(check.outcome):
            ElementTree.SubElement(case, kind, type=check.outcome, message=sentence(check))
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"
