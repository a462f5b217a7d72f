"""What a model is tested on: items, what stands before them, and how an answer is scored.

A task is a TOML file beside a file of prompts. The posts are the default; data/tasks holds others.
"""

import random
import re
import string
import tomllib
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

from nbhelpers import registry, store
from nbhelpers.errors import LabError, nearest
from nbhelpers.records import LAB_SCALE, Prompt, RunInfo, Scale, Settings

RIGHT = Scale(0.0, 1.0, 0.05)  # of a score that is 1 for a right answer
LIKELIHOODS = {"loglikelihood": "choices", "bits_per_byte": "text"}  # kind -> what is asked of an item
LETTERS = string.ascii_uppercase


@dataclass(frozen=True)
class Kind:
    """A kind of scorer: what its table in the task's file may say, and what it asks of an item."""

    options: dict[str, Any] = field(default_factory=dict)  # name -> default
    needs: tuple[str, ...] = ()  # fields of the item
    scale: Scale = RIGHT


KINDS = {
    "rubric": Kind(needs=("content_type",), scale=LAB_SCALE),  # the laboratory's own, of posts
    "exact": Kind({"strict": False}, ("target",)),
    "contains": Kind({"strict": False}, ("target",)),
    "regex": Kind({"pattern": ""}),
    "number": Kind({"tolerance": 0.0, "relative": 0.0}, ("target",)),
    "letter": Kind({}, ("target", "choices")),
    "f1": Kind({}, ("target",)),
    "chrf": Kind({}, ("target",)),
    "rouge": Kind({}, ("target",)),
    "json": Kind({"schema": ""}),
    "loglikelihood": Kind({}, ("target", "choices")),
    "bits_per_byte": Kind(scale=Scale(0.0, 8.0, 0.05, higher_is_better=False)),  # 8: of a guess
    "judge": Kind({"model": "", "rubric": "", "scale": [1, 10]}),
    "python": Kind({"function": ""}),
}


@dataclass(frozen=True)
class Scorer:
    name: str  # of its score
    kind: str  # one of KINDS
    options: dict[str, Any]  # of its table; "folder", the task's; "judges", what it has loaded

    @property
    def scale(self) -> Scale:
        if self.kind != "judge":
            return KINDS[self.kind].scale
        low, high = self.options["scale"]
        return Scale(low, high, (high - low) / 18)  # half a point from 1 to 10


@dataclass(frozen=True)
class Examples:
    """Solved items that stand before each item (few-shot)."""

    count: int = 0
    file: str = ""  # "": the task's own items
    seed: int = 0


@dataclass(frozen=True)
class Task:
    name: str
    scorers: tuple[Scorer, ...]
    primary: str  # the score that verdicts rest on
    scale: Scale
    prompts: str = ""  # file; "": the benchmark's
    system: str = ""
    stop: tuple[str, ...] = ()  # strings that end an answer
    examples: Examples = Examples()
    pass_at: int = 0  # k of pass@k, of the scores that are right or wrong; 0: none
    folder: Path = Path()  # of its file: other names in it are relative to that
    digest: str = ""  # of its file

    def kinds(self) -> set[str]:
        return {scorer.kind for scorer in self.scorers}

    def likelihoods(self) -> tuple[str, ...]:
        """Whose log-probabilities the scorers want (``Sample.logprobs``)."""
        return tuple(name for kind, name in LIKELIHOODS.items() if kind in self.kinds())

    def passes(self) -> dict[str, str]:
        """The scores that are right or wrong -> the names of their pass@k."""
        right = (scorer.name for scorer in self.scorers if self.pass_at and scorer.scale == RIGHT)
        return {name: f"{name}/pass_at_{self.pass_at}" for name in right}

    def decides(self) -> dict[str, tuple[str, ...]]:
        """What decides a sample, besides the items."""
        deciding = {"stop": self.stop, "likelihoods": self.likelihoods()}
        return {name: texts for name, texts in deciding.items() if texts}


POSTS = Task("posts", (Scorer("lab_v2", "rubric", {}),), "lab_v2", LAB_SCALE)


def shipped() -> dict[str, Path]:
    """The tasks of data/tasks by name."""
    return {path.stem: path for path in sorted((store.data_dir() / "tasks").glob("*.toml"))}


def load_task(name: str = "") -> Task:
    """The task of a TOML file or of a shipped name; "" is the posts. LabError with the nearest known name."""
    if name in ("", POSTS.name):
        return POSTS
    path = shipped().get(name) or store.user_path(name)
    if not path.is_file():
        hint = nearest(name, [POSTS.name, *shipped()])
        raise LabError(f"There is no task {name!r}: {hint}, or give the path of a TOML file.")
    try:
        text = path.read_bytes().decode("utf-8-sig")
        data = tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise LabError(f"The task {path.name} cannot be read as TOML ({error}).") from None
    return _task(data, path, store.row_key(task=text)[:16])


def _task(data: dict[str, Any], path: Path, digest: str) -> Task:
    from pydantic import Field

    where, folder = path.name, path.parent
    levels = {"low": float, "high": float, "margin": float, "higher_is_better": bool}
    kinds: dict[str, Any] = dict.fromkeys(("prompts", "system", "primary"), str) | levels
    kinds |= {"examples": dict, "scorers": dict[str, dict], "pass_at": Annotated[int, Field(ge=0)]}
    kinds["stop"] = list[Annotated[str, Field(min_length=1)]]
    data = store.checked(data, kinds, where)
    if not (tables := data.get("scorers")):
        raise LabError(f"{where}: there is no scorer: add a table, as [scorers.exact].")
    judges = dict[str, Any]()
    scorers = tuple(_scorer(name, table, where, folder, judges) for name, table in tables.items())
    primary = data.get("primary", scorers[0].name)
    scorer = next((s for s in scorers if s.name in (primary, primary.partition("/")[0])), None)
    if scorer is None:
        raise LabError(f"{where}: the primary score {primary!r} has no scorer: {nearest(primary, tables)}.")
    scale = replace(scorer.scale, unit=primary, **{name: data[name] for name in levels if name in data})
    if not (scale.low < scale.high and scale.margin > 0):
        raise LabError(f"{where}: low must lie below high, and the margin above 0.")
    examples = Examples()
    if table := data.get("examples"):
        option_kinds = {"count": Annotated[int, Field(ge=1)], "file": str, "seed": int}
        examples = Examples(**store.checked({"count": 0} | table, option_kinds, f"{where}, [examples]"))
    if "prompts" not in data:
        raise LabError(f"{where}: the field 'prompts' is missing: name a file of prompts beside it.")
    prompts, system = str(folder / data["prompts"]), data.get("system", "")
    stop, pass_at = tuple(data.get("stop", ())), data.get("pass_at", 0)
    return Task(path.stem, scorers, primary, scale, prompts, system, stop, examples, pass_at, folder, digest)


def _scorer(name: str, table: dict[str, Any], where: str, folder: Path, judges: dict[str, Any]) -> Scorer:
    import regex

    where = f"{where}, [scorers.{name}]"
    kind = table.get("kind", name)
    if kind not in KINDS:
        raise LabError(f"{where}: the scorer {kind!r} is unknown: {nearest(str(kind), KINDS)}.")
    defaults = KINDS[kind].options
    kinds = {option: type(default) for option, default in defaults.items()}
    options = defaults | store.checked(table, kinds | {"kind": str}, where)
    for option, default in defaults.items():
        if default == "" and not options[option]:
            raise LabError(f"{where}: the field {option!r} is missing.")
        if default == 0.0 and options[option] < 0:
            raise LabError(f"{where}: tolerance and relative are numbers from 0 on.")
    try:
        regex.compile(options.get("pattern", ""))
    except regex.error as error:
        raise LabError(f"{where}: the pattern {options['pattern']!r} does not compile ({error}).") from None
    ends = options.get("scale", [1, 2])
    if len(ends) != 2 or not all(type(end) is int for end in ends) or not 0 <= ends[0] < ends[1] <= 100:
        raise LabError(f"{where}: scale is {ends}: give two whole numbers, as [1, 5].")
    return Scorer(name, kind, options | {"folder": folder, "judges": judges})


def items(settings: Settings) -> list[Prompt]:
    """The items of a run's task. LabError, with the line, for one that lacks what a scorer needs."""
    task = load_task(settings.task)
    if settings.repeats < task.pass_at:
        raise LabError(f"The task {task.name} asks for pass@{task.pass_at}: give --repeats {task.pass_at}.")
    return _items(task, settings.prompts or task.prompts, settings.limit)


def _items(task: Task, path: str, limit: int | None = None) -> list[Prompt]:
    if task is POSTS:
        return registry.load_prompts(path, limit)
    return registry.load_prompts(path, limit, lambda item: _check_item(task, item))


def _check_item(task: Task, item: Prompt) -> None:
    for scorer in task.scorers:
        for name in KINDS[scorer.kind].needs:
            if not getattr(item, name):
                raise LabError(f"the field {name!r} is missing, which the scorer {scorer.name} needs.")
        if "choices" in KINDS[scorer.kind].needs:
            right_choices(item)
        if scorer.kind == "number" and not all(parse_number(text).is_finite() for text in item.target):
            raise LabError(f"a target of {', '.join(item.target)} is no finite number.")


def right_choices(item: Prompt) -> list[int]:
    """The places of the right choices, which targets name by text or letter. LabError for one of none."""
    choices, right = dict(zip(LETTERS, item.choices, strict=False)), set[str]()
    for target in item.target:
        letters = {letter for letter, choice in choices.items() if choice == target} or {target} & {*choices}
        if not letters or not 2 <= len(item.choices) <= len(LETTERS):
            raise LabError(f"the target {target!r} is none of the choices, nor the letter of one.")
        right |= letters
    return sorted(map(LETTERS.index, right))


def parse_number(text: str) -> Decimal:
    """A number as people write it, 1,234.5 and 5% included. LabError for what is none."""
    try:
        plain = text.translate(str.maketrans("−", "-", "$€£%"))
        return Decimal(re.sub(r",(?=\d{3}(?!\d))", "", plain))
    except ArithmeticError:
        raise LabError(f"the target {text!r} is no number.") from None


def clusters(settings: Settings) -> dict[str, str]:
    """Item -> the first item of its cluster, of those that have one: what counts once."""
    first = dict[str, str]()
    return {item.id: first.setdefault(item.cluster, item.id) for item in items(settings) if item.cluster}


def prompts_of(settings: Settings) -> list[Prompt]:
    """What a run asks: its items, the choices listed where a letter is wanted, after system and examples."""
    task, prompts = load_task(settings.task), items(settings)
    drawn, count = _draw_examples(task, settings), task.examples.count
    for index, item in enumerate(prompts):
        text = registry.one_text(item.text)
        shots = [shot for shot in drawn if registry.one_text(shot.text) != text][:count]
        if len(shots) < count:
            few = f"there are {len(shots)} besides the item {item.id!r}"
            raise LabError(f"The task {task.name} asks for {count} examples, and {few}: name a file of more.")
        before = [("system", task.system)] if task.system else []
        for shot in shots:
            before += [*shot.before, ("user", _question(task, shot)), ("assistant", _answer(task, shot))]
        prompts[index] = replace(item, text=_question(task, item), before=(*before, *item.before))
    return prompts


def _draw_examples(task: Task, settings: Settings) -> list[Prompt]:
    """The same draw for every item, with one to spare for the item that is drawn itself."""
    if not (examples := task.examples).count:
        return []
    path = str(task.folder / examples.file) if examples.file else settings.prompts or task.prompts
    solved = sorted(_items(task, path), key=lambda item: item.id)
    if lacking := next((item.id for item in solved if not item.target), None):
        raise LabError(f"The example {lacking!r} has no target, which is what an example shows.")
    return random.Random(examples.seed).sample(solved, min(examples.count + 1, len(solved)))


def _question(task: Task, item: Prompt) -> str:
    if "letter" not in task.kinds():
        return item.text
    lines = (f"{letter}. {choice}" for letter, choice in zip(LETTERS, item.choices, strict=False))
    return "\n".join((item.text, *lines, "Answer:"))


def _answer(task: Task, item: Prompt) -> str:
    if not task.kinds() & {"letter", "loglikelihood"}:
        return item.target[0]
    first = right_choices(item)[0]
    return LETTERS[first] if "letter" in task.kinds() else item.choices[first]


def check_unchanged(info: RunInfo, settings: Settings) -> None:
    """Raise LabError where a run's prompts, or its task, are other ones than it began with."""
    if load_task(settings.task).digest != info.task:
        raise LabError(f"The task of {info.run} has changed since it began: restore it, or start a new run.")
    digests = registry.digests(prompts_of(settings)) if info.prompts else {}
    if changed := sorted({id for id, _ in digests.items() ^ info.prompts.items()}):
        change = f"The prompts of {info.run} have changed since it began ({', '.join(changed[:5])})"
        raise LabError(f"{change}: restore {info.settings.prompts or 'them'}, or start a new run.")
