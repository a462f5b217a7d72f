"""Options of commands, from the fields of dataclasses, and a TOML file that sets them."""

import dataclasses
import json
import tomllib
from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from nbhelpers import store
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
        original = signature(command, eval_str=True)
        parameters = list(original.parameters.values())[:-1]
        for kind in kinds:
            types = get_type_hints(kind)
            for name, field in options_of(kind).items():
                hint: Any = Annotated[types[field.name], typer.Option(help=field.metadata["help"])]
                option = Parameter(name, Parameter.KEYWORD_ONLY, default=field.default, annotation=hint)
                parameters.append(option)
        command.__signature__ = original.replace(parameters=parameters)  # type: ignore[attr-defined]
        return command

    return decorate


def _parameters(command: Callable[..., None]) -> dict[str, Parameter]:
    """The options and arguments that a file may set, by their names on the command line."""
    by_name = dict[str, Parameter]()
    for parameter in signature(command, eval_str=True).parameters.values():
        declared = next(iter(getattr(parameter.annotation, "__metadata__", ())), None)
        if declared and not declared.is_eager:  # that is the option which reads the file
            name = str(declared.default)  # in Annotated, typer's first argument: the name, if it is another
            by_name[name.lstrip("-") if name.startswith("--") else parameter.name] = parameter
    return by_name


def read_config(context: typer.Context, path: Path, command: Callable[..., None]) -> None:
    """Set a command's defaults by a TOML file. LabError for what the command does not take."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise LabError(f"The file {path} cannot be read as TOML ({error}).") from None
    parameters = _parameters(command)
    kinds = {name: parameter.annotation.__origin__ for name, parameter in parameters.items()}
    values = {name.replace("-", "_"): value for name, value in table.items()}
    for name, value in values.items():
        if kinds.get(name) is str and isinstance(value, int | float):  # a count or share of failures
            values[name] = json.dumps(value)
    checked = store.checked(values, kinds, str(path))
    context.default_map = {parameters[name].name: value for name, value in checked.items()}


def config_text(command: Callable[..., None], given: Mapping[str, Any] | None = None) -> str:
    """A file that ``read_config`` reads: what is given, and all else as comments with the defaults."""
    entries = [f"# {command.__doc__}\n# A name without # is set. An option on the command line wins."]
    for name, parameter in _parameters(command).items():
        default = [] if name == "models" else parameter.default
        value = (given or {}).get(parameter.name, default)
        text = "" if value is None else json.dumps(value, ensure_ascii=False)
        line = f"# {name} = {text}".rstrip() if value in (default, None) else f"{name} = {text}"
        entries.append(f"# {parameter.annotation.__metadata__[0].help}\n{line}")
    return "\n\n".join(entries) + "\n"
