"""The gate: may a candidate take a baseline's place? For continuous integration, by its exit code."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from nbhelpers.errors import some
from nbhelpers.logs import compare
from nbhelpers.logs.formats import Log
from nbhelpers.options import Choice
from nbhelpers.records import SCHEMA_VERSION, LabError, Record
from nbhelpers.stats import noninferiority, paired, sequential

EXIT_CODES: dict[noninferiority.Outcome, int] = {"passes": 0, "worse": 1, "cannot tell": 3}


@dataclass(frozen=True, kw_only=True)
class Check(noninferiority.NonInferiority, Record):
    """What a candidate must keep: a metric within its margin, or a mean within a factor (a budget)."""

    name: str
    baseline: str
    candidate: str
    items: str = "items"  # what n counts
    limit: float = 0.0  # -margin, or the budget
    reason: str = ""


@dataclass(frozen=True)
class GateReport(Record):
    """The gate's answer: the worst of its checks."""

    outcome: noninferiority.Outcome
    checks: tuple[Check, ...]
    notes: tuple[str, ...]
    schema_version: int = SCHEMA_VERSION


def gate_logs(
    baseline: Sequence[Log], candidate: Sequence[Log], choice: Choice, budgets: dict[str, float] | None = None
) -> GateReport:
    """Is no metric of the candidate worse by the margin, and no mean above its budget? All tests at 5%.

    Each model of the candidate is tested against the one of its name, or one against one, as
    ``noninferiority`` says. All checks must pass; "worse" is corrected by Holm. LabError as ``compare_logs``,
    for a budget that was not measured, and where it is not clear what to pair.
    """
    olds = {log.model: [other for other in baseline if other.model == log.model] for log in baseline}
    news = {log.model: [other for other in candidate if other.model == log.model] for log in candidate}
    pairs = [(name, name) for name in olds if name in news] or list(zip(olds, news, strict=False))
    if len(olds) > 1 and {log.source for log in baseline} == {log.source for log in candidate}:
        hint = f"name one of {', '.join(olds)} on each side, as LOG#MODEL"
        raise LabError(f"Baseline and candidate are the same, {baseline[0].source}: {hint}.")
    if len(pairs) < max(len(olds), len(news)) > 1:
        raise LabError(f"Choose a model by LOG#MODEL: these have {', '.join(olds)} and {', '.join(news)}.")
    checks, notes = list[Check](), list[str]()
    for old, new in pairs:
        old_name, new_name = (log.model for log in compare.named([olds[old][0], news[new][0]]))
        new_name += " (candidate)" if new_name == old_name else ""
        old_logs = [replace(log, model=old_name) for log in olds[old]]
        new_logs = [replace(log, model=new_name) for log in news[new]]
        lost = sorted({log.task for log in old_logs} - {log.task for log in new_logs} - {""})
        if lost and not choice.pool and choice.task in ("", *lost):
            raise LabError(f"The candidate {new_name} has no log of the task {lost[0]}.")
        groups, group_notes = compare.groups([*old_logs, *new_logs], choice)
        added = [_margin_check(group, old_name, new_name) for group in groups]
        added += [_budget_check(*budget, old_logs, new_logs) for budget in (budgets or {}).items()]
        checks += [replace(c, name=f"{c.name}, {new_name}") for c in added] if len(pairs) > 1 else added
        notes += [*group_notes, *(note for group in groups for note in group.notes)]
    corrected = tuple(_corrected(checks))
    outcome = max((check.outcome for check in corrected), key=["passes", "cannot tell", "worse"].index)
    return GateReport(outcome, corrected, tuple(dict.fromkeys(notes)))


def _corrected(checks: Sequence[Check]) -> Iterator[Check]:
    """The checks with p by Holm over those that have one."""
    adjusted = iter(paired.holm([check.p_worse for check in checks if check.p_worse is not None]))
    for check in checks:
        p = None if check.p_worse is None else next(adjusted)
        check = replace(check, p_worse=p)
        if check.outcome == "worse" and p is not None and p >= paired.ALPHA:
            check = replace(check, outcome="cannot tell", reason="not after correction for the other checks")
        yield check


def _margin_check(group: compare.Group, old: str, new: str) -> Check:
    """``noninferiority.difference`` of a metric; a candidate that lacks items cannot pass."""
    margin, sign = group.scale.margin, 1 if group.scale.higher_is_better else -1
    before, after = ([sign * score for score in group.scores[name].values()] for name in (old, new))
    test, reason = noninferiority.difference(before, after, margin), ""
    if group.looks:
        gains = {unit: round(b - a, 12) for unit, a, b in zip(group.scores[new], before, after, strict=True)}
        planned = sum(map(len, group.looks))
        test = noninferiority.early_difference(*sequential.in_order(gains, group.looks), planned, margin)
        reason = "" if test.outcome != "cannot tell" else f"{planned} prompts were planned, and may tell"
    if test.outcome == "passes" and (lost := len(group.lacking[new])):
        test, reason = replace(test, outcome="cannot tell"), f"the candidate lacks {some(lost, 'items')}"
    name = f"{group.primary}{compare.of_task(group.logs[0].task)}"
    check = Check(**vars(test), name=name, baseline=old, candidate=new)
    return replace(check, items=group.items, limit=-margin, reason=reason)


def _budget_check(name: str, limit: float, old: Sequence[Log], new: Sequence[Log]) -> Check:
    """``noninferiority.ratio`` of what was measured; cost is in proportion to energy, else to time."""
    before, after = ({log.metric: log.scores for log in logs if log.scores} for logs in (old, new))
    both = [metric for metric in compare.MEASURED if metric in before and metric in after]
    accepted = (name, "energy", "time") if name == "cost" else (name,)
    metric = next((metric for metric in accepted if metric in both), None)
    if metric is None:
        raise LabError(f"There is no {name} in both: a budget may be on {', '.join(both) or 'nothing here'}.")
    items = sorted(before[metric].keys() & after[metric].keys())
    values, new_values = ([scores[metric][item] for item in items] for scores in (before, after))
    test = noninferiority.ratio(values, new_values, limit)
    label = name if metric == name else f"{name} (by {metric})"
    check = Check(**vars(test), name=label, baseline=old[0].model, candidate=new[0].model)
    return replace(check, items="prompts", limit=limit)


def check_sentence(check: Check) -> str:
    """One check with its figures."""
    if check.value is None or check.low is None or check.high is None:
        return f"{check.name}: {check.outcome}: not enough to tell by {some(check.n, check.items)}."
    budget, worse = check.limit > 0, check.outcome == "worse"
    value = f"{check.value:.2f} times" if budget else f"{check.value:+.3f}"
    bound = f"at most {check.high:.3f}" if budget != worse else f"at least {check.low:.3f}"  # what decides
    limit = f"budget {check.limit:g}" if budget else f"margin {-check.limit:g}"
    sentence = f"{check.name}: {check.outcome}: {value} ({bound}, {limit}) over {some(check.n, check.items)}"
    if worse:
        sentence += f", p {check.p_worse:.2g}"
    if check.reason:
        sentence += f"; {check.reason}"
    elif check.outcome == "cannot tell":
        needed = f"about {check.needed:,}" if check.needed else "too many"
        sentence += f"; {needed} {check.items} would tell, if the models are equal"
    return f"{sentence}."
