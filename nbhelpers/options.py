"""Options of commands, made of a dataclass's fields, and as a file: their names, types, defaults and help."""

import dataclasses
import json
import tomllib
from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, get_type_hints

import typer

from nbhelpers.errors import LabError
from nbhelpers.records import setting


@dataclasses.dataclass(frozen=True)
class Choice:
    """What is read of logs, and how it is paired: options of the command line."""

    metric: str = setting("", "Metric, or all; default: the first of each task.")
    task: str = setting("", "Only this task.")
    margin: float | None = setting(None, "Difference that matters; default: 0.5 points, 0.05 of 0..1.")
    lower_is_better: bool = setting(False, "Less is better of the metric, where the log does not say so.")
    cluster: str = setting("", "Field of an item that names its cluster (a passage, say).")
    pool: bool = setting(False, "Take all tasks as one, each a cluster of its items.")
    filter: str = setting("", "Filter of lm-evaluation-harness; default: the first.")
    any_prompt: bool = setting(False, "Pair items whose prompts differ, as by chat templates.")


def options_of(kind: Any) -> dict[str, dataclasses.Field[Any]]:
    """Option -> field, of those with a help text."""
    described = (field for field in dataclasses.fields(kind) if field.metadata)
    return {field.metadata["option"] or field.name: field for field in described}


def with_options(*kinds: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command with an option for each field of the dataclasses in place of its ``**options``."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        given = signature(command, eval_str=True)
        parameters = list(given.parameters.values())[:-1]
        for kind in kinds:
            types = get_type_hints(kind)
            for name, field in options_of(kind).items():
                hint: Any = Annotated[types[field.name], typer.Option(help=field.metadata["help"])]
                option = Parameter(name, Parameter.KEYWORD_ONLY, default=field.default, annotation=hint)
                parameters.append(option)
        command.__signature__ = given.replace(parameters=parameters)  # type: ignore[attr-defined]
        return command

    return decorate


def _parameters(command: Callable[..., None]) -> dict[str, Parameter]:
    """What a file may say of a command: its options and arguments, by the names that its line has."""
    found = dict[str, Parameter]()
    for one in signature(command, eval_str=True).parameters.values():
        about = next(iter(getattr(one.annotation, "__metadata__", ())), None)
        if about and not about.is_eager:  # that is the option which reads the file
            name = str(about.default)  # Annotated, its first argument is the name, if it is another
            found[name.lstrip("-") if name.startswith("--") else one.name] = one
    return found


def read_config(context: typer.Context, path: Path, command: Callable[..., None]) -> None:
    """What a TOML file says takes the place of a command's defaults. LabError for what it may not say."""
    from nbhelpers import store

    try:
        given = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise LabError(f"The file {path} cannot be read as TOML ({error}).") from None
    known = _parameters(command)
    kinds = {name: one.annotation.__origin__ for name, one in known.items()}
    said = {key.replace("-", "_"): value for key, value in given.items()}
    for key, value in said.items():  # a count or share of failures
        said[key] = json.dumps(value) if kinds.get(key) is str and isinstance(value, int | float) else value
    found = store.checked(said, kinds, str(path))
    context.default_map = {known[key].name: value for key, value in found.items()}


def config_text(command: Callable[..., None], given: Mapping[str, Any] = MappingProxyType({})) -> str:
    """A file that ``read_config`` reads: what is given, and all else as comments with the defaults."""
    parts = [f"# {command.__doc__}\n# A name without # is set. An option on the command line wins."]
    for key, one in _parameters(command).items():
        default = [] if key == "models" else one.default
        value = given.get(one.name, default)
        said = "" if value is None else json.dumps(value, ensure_ascii=False)
        line = f"# {key} = {said}".rstrip() if value in (default, None) else f"{key} = {said}"
        parts.append(f"# {one.annotation.__metadata__[0].help}\n{line}")
    return "\n\n".join(parts) + "\n"
