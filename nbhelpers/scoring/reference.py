"""Scores of an answer by its task: against a right answer, by a pattern, or by the laboratory's rubric.

Each is 1 for right and 0 for wrong, unless it says otherwise; several right answers: the best counts.
"""

import importlib
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from decimal import Decimal
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from nbhelpers import registry, store, tasks
from nbhelpers.errors import LabError, NoScore, nearest
from nbhelpers.generation import generate, server
from nbhelpers.loading.checkpoint import inspect
from nbhelpers.loading.tokenization import split_reasoning
from nbhelpers.records import Limits, ModelRun, Prompt, Sample, Score, Settings
from nbhelpers.scoring import judge, rubric
from nbhelpers.scoring.texts import compared, json_schema, library, normalised, search, validator
from nbhelpers.stats.estimate import pass_at, repeats_of
from nbhelpers.tasks import LETTERS, Scorer, Task

SCORER_LIBRARIES = {"chrf": "sacrebleu", "rouge": "rouge_score.rouge_scorer"}
_DIGITS = r"\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?<!\.)(?=\.\d)"
_NUMBER = re.compile(rf"(?<!\w)(?<!\d\.)[-−]?[$€£]?(?:{_DIGITS})(?:\.\d+)?(?:e[-+]?\d+)?%?", re.IGNORECASE)
Options = Mapping[str, Any]
Logprobs = Mapping[str, tuple[float, ...]] | None  # of a sample


def exact(text: str, item: Prompt, options: Options) -> float:
    """The answer is the target: after the usual normalisation or, ``strict``, but for blanks around it."""
    forms = ((target, compared(target, options["strict"])) for target in item.target)
    return float(any(form(text) == form(target) for target, form in forms))


def contains(text: str, item: Prompt, options: Options) -> float:
    """The target stands in the answer, as whole words or, ``strict``, letter by letter."""
    edge = "" if options["strict"] else " "
    forms = ((target, compared(target, options["strict"])) for target in item.target)
    return float(any(f"{edge}{form(target)}{edge}" in f"{edge}{form(text)}{edge}" for target, form in forms))


def pattern(text: str, item: Prompt, options: Options) -> float:
    """The pattern is found; what its group takes out is the target, where the item has one."""
    match = search(options["pattern"], text)
    if match and item.target and match.groups():
        return exact(next(filter(None, match.groups()), ""), item, {"strict": False})
    return float(match is not None)


def number(text: str, item: Prompt, options: Options) -> float:
    """The last number of the answer lies within tolerance, or relative times the target, of the target."""
    numbers = _NUMBER.findall(text)
    if not numbers:
        return 0.0
    tolerance, relative = (Decimal(str(options[name])) for name in ("tolerance", "relative"))
    for target in map(tasks.parse_number, item.target):
        within = max(tolerance, relative * abs(target), min(Decimal(1), abs(target)) / 10**9)
        with suppress(ArithmeticError, LabError):  # too large to be near any
            if abs(tasks.parse_number(numbers[-1]) - target) <= within:
                return 1.0
    return 0.0


def letter(text: str, item: Prompt, options: Options) -> float:
    """The letter that the answer chooses is the right one."""
    letters = LETTERS[: len(item.choices)]
    after = rf"\W*(?i:is\b|:)?\W*([{letters}])\b"
    alone = rf"(?<![\w'])([{letters}])(?![\w'’]| [a-z])"
    patterns = rf"(?i:answer){after}", rf"(?i:choice|option){after}", alone
    match = next(filter(None, (re.search(pattern, text) for pattern in patterns)), None)
    return float(match is not None and LETTERS.index(match[1]) in tasks.right_choices(item))


def f1(text: str, item: Prompt, options: Options) -> float:
    """The harmonic mean of the shares of words in common with the target, normalised (SQuAD's F1)."""

    def overlap(target: str) -> float:
        answer, right = normalised(text).split(), normalised(target).split()
        common = sum((Counter(answer) & Counter(right)).values())
        return 2 * common / (len(answer) + len(right)) if common else 0.0

    return max(exact(text, item, {"strict": False}), *map(overlap, item.target))


def chrf(text: str, item: Prompt, options: Options) -> float:
    """chrF2 of the answer and the targets, 0 to 1 (Popovic 2015; sacrebleu's)."""
    return float(library("sacrebleu").sentence_chrf(text, list(item.target)).score) / 100


def rouge(text: str, item: Prompt, options: Options) -> float:
    """ROUGE-L's F measure with stems (Lin 2004; rouge-score's)."""
    scorer = library("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=True)
    return max(float(scorer.score(target, text)["rougeL"].fmeasure) for target in item.target)


def own(text: str, item: Prompt, options: Options) -> float:
    """What a function of the user's returns for the answer and the item."""
    name, number = options["function"], math.nan
    function = own_function(options["folder"], name)
    try:
        score = function(text, item)
        shown = repr(score)
    except (Exception, SystemExit) as error:  # whatever a user's function raises
        raise NoScore(f"{name} raised {type(error).__name__}: {error}") from None
    with suppress(TypeError, ValueError, OverflowError):
        number = math.nan if isinstance(score, str) else float(score)
    if not math.isfinite(number):
        raise NoScore(f"{name} returned {shown}, which is no number")
    return number


@cache
def own_function(folder: Path, name: str) -> Callable[[str, Prompt], Any]:
    """A function by ``module.function``, of a module beside the task. LabError for what cannot be used."""
    module, _, attribute = name.rpartition(".")
    path, imported = folder.resolve() / f"{module.replace('.', '/')}.py", sys.modules.get(module)
    if path.is_file() and imported and getattr(imported, "__file__", "") != str(path):
        del sys.modules[module]  # another task's
    sys.path.insert(0, str(folder.resolve()))
    try:
        function: Callable[[str, Prompt], Any] = getattr(importlib.import_module(module), attribute)
        if not callable(function):
            raise TypeError(f"{attribute} is no function")
    except (Exception, SystemExit) as error:  # whatever a user's module raises
        raise LabError(f"The scorer {name!r} cannot be imported ({type(error).__name__}: {error}).") from None
    finally:
        sys.path.pop(0)
    return function


def check_scorers(task: Task) -> None:
    """LabError for a schema, a function, a judge or a primary score of the task's that cannot be used."""
    if task.primary not in (names := worst(task)):
        raise LabError(f"The task {task.name} has no score {task.primary!r}: {nearest(task.primary, names)}.")
    for scorer in task.scorers:
        if scorer.kind == "judge":
            inspect(registry.resolve(scorer.options["model"]))
        if scorer.kind == "json":
            validator(scorer.options["folder"] / scorer.options["schema"])
        if scorer.kind in SCORER_LIBRARIES:
            library(SCORER_LIBRARIES[scorer.kind])
        if scorer.kind == "python":
            own_function(scorer.options["folder"], scorer.options["function"])


def files(task: Task) -> list[Path]:
    """The files beside a task's that decide its scores: schemas, and modules of the user's functions."""
    names = [scorer.options["schema"] for scorer in task.scorers if scorer.kind == "json"]
    for function in (scorer.options["function"] for scorer in task.scorers if scorer.kind == "python"):
        names.append(f"{function.rpartition('.')[0].replace('.', '/')}.py")
    return [path for name in names if (path := task.folder / name).is_file()]


SCORERS: dict[str, Callable[[str, Prompt, Options], float]] = {
    **{scorer.__name__: scorer for scorer in (exact, contains, number, letter, f1, chrf, rouge)},
    **{"regex": pattern, "json": json_schema, "judge": judge.by_rubric, "python": own},
}


def likely(scorer: Scorer, item: Prompt, text: str, logprobs: Logprobs) -> dict[str, float]:
    """1 where the choice of the largest log-likelihood is right, as it is and ``per_byte`` of the choice; or
    the bits that the model needs per byte of the item's text: fewer are better.
    """
    field, names = tasks.LIKELIHOODS[scorer.kind], (scorer.name, f"{scorer.name}/per_byte")
    if logprobs is None and field == "choices":
        right = tuple(item.choices[index] for index in tasks.right_choices(item))
        return dict.fromkeys(names, exact(text, replace(item, target=right), {"strict": False}))
    if not (sums := (logprobs or {}).get(field)):
        raise NoScore(f"the log-likelihood of its {field} is not available")
    if field == "text":
        return {scorer.name: -sum(sums) / math.log(2) / len(item.text.encode())}
    means = tuple(total / len(choice.encode()) for total, choice in zip(sums, item.choices, strict=True))
    best = [values.index(max(values)) for values in (sums, means)]
    return {name: float(i in tasks.right_choices(item)) for name, i in zip(names, best, strict=True)}


def scores_of(
    task: Task, item: Prompt, text: str, logprobs: Logprobs = None
) -> tuple[dict[str, float], str | None]:
    """Every score of an answer, without its reasoning; and why one is missing, though the others are there.

    logprobs: the sample's. None: of a text alone, which stands for the choice that it is.
    """
    text = split_reasoning(text)[1]
    scores, reason = dict[str, float](), None
    for scorer in task.scorers:
        try:
            if scorer.kind in SCORERS:
                scores[scorer.name] = SCORERS[scorer.kind](text, item, scorer.options)
            elif scorer.kind in tasks.LIKELIHOODS:
                scores |= likely(scorer, item, text, logprobs)
            elif values := rubric.score_text(text, item.text, item.content_type):
                scores |= _named_after(scorer, values)
            else:
                reason = rubric.inapplicable(text, item.text)
        except NoScore as problem:
            reason = f"{reason}; {problem}" if reason else str(problem)
    passes = {passed: scores[name] for name, passed in task.passes().items() if name in scores}
    return scores | passes, reason


def _named_after(scorer: Scorer, values: Mapping[str, float]) -> dict[str, float]:
    return {name.replace(rubric.PRIMARY, scorer.name, 1): value for name, value in values.items()}


def worst(task: Task) -> dict[str, float]:
    """The scores of a failed generation."""
    scores = dict[str, float]()
    for scorer in task.scorers:
        per_byte = f"{scorer.name}/per_byte"
        scale = task.scale if task.primary in (scorer.name, per_byte) else scorer.scale
        scores[scorer.name] = scale.low if scale.higher_is_better else scale.high
        scores |= _named_after(scorer, rubric.LOWEST) if scorer.kind == "rubric" else {}
        scores |= {per_byte: scale.low} if scorer.kind == "loglikelihood" else {}
    return scores | dict.fromkeys(task.passes().values(), 0.0)


def with_passes(task: Task, scores: list[Score]) -> list[Score]:
    """The scores with pass@k of their prompts, for scorers of right and wrong: a score of 1 is right."""
    few = f"fewer than {task.pass_at} answers to its prompt have a score"
    for name, passed in task.passes().items():
        chances = {id: pass_at(tries, task.pass_at) for id, tries in repeats_of(scores, name).items()}
        for index, score in enumerate(scores):
            if name in score.values:
                chance = chances[score.prompt_id]
                values = {key: value for key, value in score.values.items() if key != passed}
                values |= {} if chance is None else {passed: chance}
                scores[index] = replace(score, values=values, reason=few if chance is None else score.reason)
    return scores


def scored(settings: Settings, samples: Iterable[Sample], limits: Limits = Limits()) -> Iterable[Score]:
    """One Score a sample, in order, by the task of a run; a server's judge is asked limits.at_once at a time.
    LabError for a sample of no item.
    """
    task = tasks.load_task(settings.task)
    if task is tasks.POSTS:
        return rubric.score_samples([*samples])
    scores = _task_scores(task, settings, samples, limits.at_once)
    return with_passes(task, [*scores]) if task.pass_at else scores


def _task_scores(task: Task, settings: Settings, samples: Iterable[Sample], at_once: int) -> Iterator[Score]:
    items = {item.id: item for item in tasks.items(settings)}

    def score(sample: Sample) -> Score:
        if (item := items.get(sample.prompt_id)) is None:
            raise LabError(f"The task {task.name} has no item {sample.prompt_id!r}: score it by its own.")
        values, reason = worst(task), None
        if not (failed := sample.error is not None):
            values, reason = scores_of(task, item, sample.text, sample.logprobs or {})
        row = sample.key, sample.prompt_id, sample.repeat, sample.content_type, failed
        words, target, tags = len(sample.text.split()), item.target or None, item.tags or None
        return Score(*row, words, values, reason=reason, target=target, tags=tags)

    judges = [scorer.options["model"] for scorer in task.scorers if scorer.kind == "judge"]
    served = any(registry.resolve(model).kind == "server" for model in judges)
    try:
        with ThreadPoolExecutor(at_once) as pool:
            remaining = iter(samples)
            yield from map(score, islice(remaining, 1))  # which opens the judge
            yield from pool.map(score, remaining) if served else map(score, remaining)
    finally:
        for opened in (scorer.options["judges"] for scorer in task.scorers):
            while opened:
                server.close(opened.popitem()[1])


def make_scores(run: ModelRun) -> None:
    """Score the run's samples by its task into scores.jsonl, always anew: a file may be of another task."""
    scores = scored(run.settings, generate.read_samples(run), run.limits)
    store.write_rows(run.folder / "scores.jsonl", scores)
