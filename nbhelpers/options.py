"""Options of commands, made of a dataclass's fields: their names, types, defaults and help."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from inspect import Parameter, signature
from typing import Annotated, Any, get_type_hints

import typer


def _choice(default: Any, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text, "option": ""})


@dataclasses.dataclass(frozen=True)
class Choice:
    """What is read of logs, and how it is paired: options of the command line."""

    metric: str = _choice("", "Metric, or all; default: the first of each task.")
    task: str = _choice("", "Only this task.")
    margin: float | None = _choice(
        None, "Difference that matters; default: 0.5 points, 0.05 of a 0..1 metric."
    )
    lower_is_better: bool = _choice(False, "Less is better of the metric, where the log does not say so.")
    cluster: str = _choice("", "Field of an item that names its cluster (a passage, say).")
    pool: bool = _choice(False, "Take all tasks as one, each a cluster of its items.")
    filter: str = _choice("", "Filter of lm-evaluation-harness; default: the first.")
    any_prompt: bool = _choice(False, "Pair items whose prompts differ, as by chat templates.")


def options_of(kind: Any) -> dict[str, dataclasses.Field[Any]]:
    """Option -> field, of those with a help text."""
    return {
        field.metadata["option"] or field.name: field for field in dataclasses.fields(kind) if field.metadata
    }


def with_options(*kinds: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command with an option for each field of the dataclasses in place of its ``**options``."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        given = signature(command, eval_str=True)
        parameters = list(given.parameters.values())[:-1]
        for kind in kinds:
            types = get_type_hints(kind)
            for name, field in options_of(kind).items():
                hint: Any = Annotated[types[field.name], typer.Option(help=field.metadata["help"])]
                parameters.append(
                    Parameter(name, Parameter.KEYWORD_ONLY, default=field.default, annotation=hint)
                )
        command.__signature__ = given.replace(parameters=parameters)  # type: ignore[attr-defined]
        return command

    return decorate
