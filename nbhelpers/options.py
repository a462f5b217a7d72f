"""Options of commands, made of a dataclass's fields: their names, types, defaults and help."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from inspect import Parameter, signature
from typing import Annotated, Any, get_type_hints

import typer


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
