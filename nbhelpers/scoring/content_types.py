"""The content types: how long a text of each should be."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache
from typing import Any, Literal

from nbhelpers import store
from nbhelpers.records import LabError, Record


@dataclass(frozen=True)
class ContentType(Record):
    """What data/content_types.toml says of the length of one kind of text."""

    unit: Literal["words", "characters"]
    low: int
    high: int
    source: str  # "notes" or "ours"

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.high:
            raise LabError("A content type has a bound below 1, or low above high.")

    def size(self, text: str) -> int:
        return len(text.split()) if self.unit == "words" else len(text.strip())


@cache
def content_types() -> dict[str, ContentType]:
    """The content types by name. Raises LabError if data/content_types.toml does not hold them."""
    names = {field.name for field in fields(ContentType)}

    def build(data: dict[str, Any]) -> dict[str, ContentType]:
        rows = {name: row for name, row in data.items() if "unit" in row}
        known = {name: {k: v for k, v in row.items() if k in names} for name, row in rows.items()}
        return {name: store.from_plain(row, ContentType, f"[{name}]") for name, row in known.items()}

    return store.read_table("content_types.toml", build)


def content_type_named(name: str) -> ContentType:
    """One content type. Raises LabError for a name that data/content_types.toml does not hold."""
    if name not in content_types():
        raise LabError(f"The content type {name!r} is unknown: use one of {', '.join(content_types())}.")
    return content_types()[name]


def band(size: float, low: float, high: float) -> float:
    """10 from low to high, falling in a straight line to 0 at nothing and at twice high: no cliff."""
    if size < low:
        return 10.0 * size / low
    return 10.0 * max(0.0, min(1.0, 2.0 - size / high))
