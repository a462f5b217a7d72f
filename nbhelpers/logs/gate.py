"""The gate: may a candidate take a baseline's place? For continuous integration, by its exit code."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from nbhelpers.errors import some
from nbhelpers.logs import compare
from nbhelpers.logs.formats import Log
from nbhelpers.logs.read import named
from nbhelpers.options import Choice
from nbhelpers.records import SCHEMA_VERSION, LabError, Record
from nbhelpers.stats import noninferiority, paired, sequential
from nbhelpers.stats.noninferiority import NonInferiority, Outcome
from nbhelpers.stats.paired import ALPHA

EXIT_CODES: dict[Outcome, int] = {"passes": 0, "worse": 1, "cannot tell": 3}


@dataclass(frozen=True, kw_only=True)
class Check(NonInferiority, Record):
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

    outcome: Outcome
    checks: tuple[Check, ...]
    notes: tuple[str, ...]
    schema_version: int = SCHEMA_VERSION


def gate_logs(
    baseline: Sequence[Log], candidate: Sequence[Log], choice: Choice, budgets: dict[str, float] | None = None
) -> GateReport:
    """Is no metric of the candidate worse by the margin, and no mean above its budget? All tests at 5%.

    Each model of the candidate is held against the one of its name, or one against one. A check passes where
    the difference is shown to be above -margin (non-inferiority, one-sided), is worse where it is shown to
    be below 0 and not above -margin, and otherwise cannot tell. All must pass; "worse" is corrected by Holm.
    LabError as ``compare_logs``, for a budget that was not measured, and where it is not clear what to pair.
    """
    olds, news = (list(dict.fromkeys(log.model for log in every)) for every in (baseline, candidate))
    pairs = [(name, name) for name in olds if name in news] or list(zip(olds, news, strict=False))
    if len(olds) > 1 and {log.source for log in baseline} == {log.source for log in candidate}:
        asks = f"name one of {', '.join(olds)} on each side, as LOG#MODEL"
        raise LabError(f"Baseline and candidate are the same, {baseline[0].source}: {asks}.")
    if len(pairs) < max(len(olds), len(news)) > 1:
        raise LabError(f"Choose a model by LOG#MODEL: these have {', '.join(olds)} and {', '.join(news)}.")
    checks, notes = list[Check](), list[str]()
    for old, new in pairs:
        mine, other = ([g for g in every if g.model == m] for every, m in ((baseline, old), (candidate, new)))
        one, two = (log.model for log in named([mine[0], other[0]]))
        names = one, two if two != one else f"{two} (candidate)"
        both = [replace(g, model=name) for own, name in ((mine, one), (other, names[1])) for g in own]
        lost = sorted({g.task for g in mine} - {g.task for g in other} - {""})
        if lost and not choice.pool and choice.task in ("", *lost):
            raise LabError(f"The candidate {names[1]} has no log of the task {lost[0]}.")
        groups, said = compare.groups(both, choice)
        kept = [_kept(group, *names) for group in groups]
        kept += [_within(name, limit, mine, other, names) for name, limit in (budgets or {}).items()]
        checks += [replace(c, name=f"{c.name}, {c.candidate}") for c in kept] if len(pairs) > 1 else kept
        notes += [*said, *(note for group in groups for note in group.notes)]
    tested = [check for check in checks if check.p_worse is not None]
    for check, p in zip(tested, paired.holm([c.p_worse or 0.0 for c in tested]), strict=True):
        corrected = replace(check, p_worse=p)
        if check.outcome == "worse" and p >= ALPHA:
            why = "not after correction for the other checks"
            corrected = replace(corrected, outcome="cannot tell", reason=why)
        checks[checks.index(check)] = corrected
    outcome = max((check.outcome for check in checks), key=["passes", "cannot tell", "worse"].index)
    return GateReport(outcome, tuple(checks), tuple(dict.fromkeys(notes)))


def _kept(group: compare.Group, old: str, new: str) -> Check:
    """``noninferiority.difference`` of a metric; a candidate that lacks items cannot pass."""
    log, margin, sign = group.logs[0], group.scale.margin, 1 if group.scale.higher_is_better else -1
    scores, reason = {name: [sign * one for one in group.scores[name].values()] for name in (old, new)}, ""
    found: NonInferiority = noninferiority.difference(scores[old], scores[new], margin)
    if group.looks:
        rise = zip(group.scores[new], scores[old], scores[new], strict=True)
        ordered = sequential.in_order({unit: round(b - a, 12) for unit, a, b in rise}, group.looks)
        planned = sum(map(len, group.looks))
        found = noninferiority.early(*ordered, planned, margin)
        reason = "" if found.outcome != "cannot tell" else f"{planned} prompts were planned, and may tell"
    if found.outcome == "passes" and (lost := len(group.lacking[new])):
        found, reason = replace(found, outcome="cannot tell"), f"the candidate lacks {some(lost, 'items')}"
    check = Check(**vars(found), name=f"{log.metric}{compare.of(log.task)}", baseline=old, candidate=new)
    return replace(check, items=group.items, limit=-margin, reason=reason)


def _within(name: str, limit: float, old: Sequence[Log], new: Sequence[Log], names: tuple[str, str]) -> Check:
    """``noninferiority.ratio`` of what was measured; cost is in proportion to energy, else to time."""
    means = [{log.metric: log.scores for log in logs if log.scores} for logs in (old, new)]
    both = [metric for metric in compare.MEASURED if all(metric in own for own in means)]
    used = next((m for m in ([name, "energy", "time"] if name == "cost" else [name]) if m in both), None)
    if used is None:
        raise LabError(f"There is no {name} in both: a budget may be on {', '.join(both) or 'nothing here'}.")
    one, two = (own[used] for own in means)
    items = sorted(one.keys() & two.keys())
    found = noninferiority.ratio([one[item] for item in items], [two[item] for item in items], limit)
    said = name if used == name else f"{name} (by {used})"
    check = Check(**vars(found), name=said, baseline=names[0], candidate=names[1])
    return replace(check, items="prompts", limit=limit)


def check_sentence(check: Check) -> str:
    """One check with its figures."""
    if check.value is None or check.low is None or check.high is None:
        return f"{check.name}: {check.outcome}: not enough to tell by {some(check.n, check.items)}."
    budget, worse = check.limit > 0, check.outcome == "worse"
    figures = f"{check.value:.2f} times" if budget else f"{check.value:+.3f}"
    bound, of_what = (check.high, "at most") if budget != worse else (check.low, "at least")  # what decides
    limit = f"budget {check.limit:g}" if budget else f"margin {-check.limit:g}"
    figures += f" ({of_what} {bound:.3f}, {limit}) over {some(check.n, check.items)}"
    said = f"{check.name}: {check.outcome}: {figures}"
    if worse:
        said += f", p {check.p_worse:.2g}"
    if check.reason:
        said += f"; {check.reason}"
    elif check.outcome == "cannot tell":
        needed = f"about {check.needed:,}" if check.needed else "too many"
        said += f"; {needed} {check.items} would tell, if the models are equal"
    return f"{said}."
