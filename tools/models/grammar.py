"""A small text grammar: slots drawn once, choices drawn afresh, articles that agree.

- ``{topic}`` is one draw for the whole passage, ``{topic2}`` a second, different one, ``{Topic}`` the first
  with a capital. Values may contain slots and choices themselves.
- ``[a|b|]`` picks one alternative at each occurrence; alternatives may be empty and may be nested.
- "a" or "an" in front of a slot or a choice is made to agree with what was drawn.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

Slots = dict[str, tuple[str, ...]]
_MARK = "\x00"  # stands in front of whatever was drawn, until the articles agree with it


@dataclass(frozen=True)
class Slot:
    name: str  # without number and capital: "topic"
    number: str  # "", "2", "3"
    capital: bool


@dataclass(frozen=True)
class Choice:
    options: tuple[tuple[Node, ...], ...]


Node = str | Slot | Choice
_SLOT = re.compile(r"\{([A-Za-z_]+)(\d*)\}")
_PLAIN = re.compile(r"[^\[\]{}|]+|.", re.DOTALL)  # outside a choice, "|" is itself


@lru_cache(maxsize=2048)  # a passage is expanded many times
def parse(source: str) -> tuple[Node, ...]:
    """Source text -> nodes. Raises ValueError for brackets that do not balance."""
    nodes, end = _sequence(source, 0, top=True)
    if end != len(source):
        raise ValueError(f"unbalanced bracket at {end}: {source[max(0, end - 20) : end + 20]!r}")
    return nodes


def _sequence(source: str, at: int, top: bool) -> tuple[tuple[Node, ...], int]:
    """Nodes from ``at`` to the end of the text or, inside a choice, to the next ``|`` or ``]``."""
    nodes: list[Node] = []
    while at < len(source):
        character = source[at]
        if character == "]" or (character == "|" and not top):
            return tuple(nodes), at
        if character in "{}":
            found = _SLOT.match(source, at)
            if not found:
                raise ValueError(f"broken slot at {at}: {source[at : at + 20]!r}")
            name = found[1]
            nodes.append(Slot(name[0].lower() + name[1:], found[2], name[0].isupper()))
            at = found.end()
        elif character == "[":
            options = []
            while source[at] != "]":
                option, at = _sequence(source, at + 1, top=False)
                options.append(option)
                if at >= len(source):
                    raise ValueError(f"bracket never closed: {source[-40:]!r}")
            nodes.append(Choice(tuple(options)))
            at += 1
        else:
            found = _PLAIN.match(source, at)
            assert found
            nodes.append(found[0])
            at = found.end()
    return tuple(nodes), at


def slots_of(nodes: Sequence[Node]) -> Iterator[Slot]:
    """Every slot in the nodes, nested choices included."""
    for node in nodes:
        if isinstance(node, Slot):
            yield node
        elif isinstance(node, Choice):
            for option in node.options:
                yield from slots_of(option)


def expand(nodes: Sequence[Node], slots: Slots, rng: random.Random, **given: str) -> str:
    """One text from parsed nodes; ``given`` fixes slots, e.g. topic="data quality".

    Raises KeyError for a slot that slots.toml does not define.
    """
    bound: dict[tuple[str, str], str] = {(name, ""): value for name, value in given.items()}

    def draw(slot: Slot) -> str:
        key = (slot.name, slot.number)
        if key not in bound:
            used = {value for (name, _), value in bound.items() if name == slot.name}
            values = slots[slot.name]
            value = render(parse(rng.choice(values)))
            while value in used and len(values) > len(used):
                value = render(parse(rng.choice(values)))
            bound[key] = value
        value = bound[key]
        return value[:1].upper() + value[1:] if slot.capital else value

    def render(sequence: Sequence[Node]) -> str:
        parts = []
        for node in sequence:
            if isinstance(node, str):
                parts.append(node)
            elif isinstance(node, Slot):
                parts.append(_MARK + draw(node).lstrip(_MARK))
            else:
                parts.append(_MARK + render(rng.choice(node.options)))
        return _agree("".join(parts))

    return _tidy(render(nodes))


_ARTICLE = re.compile(rf"\b([Aa])n?( +){_MARK}+(?=([A-Za-z0-9$]+))")


def _agree(text: str) -> str:
    """Make "a"/"an" in front of a drawn value agree with its first word."""
    return _ARTICLE.sub(lambda m: f"{m[1]}{'n' if _vowel_sound(m[3]) else ''}{m[2]}", text)


def _vowel_sound(word: str) -> bool:
    if word[0].isdigit():
        return word[0] == "8" or word in ("11", "18")
    if len(word) > 1 and word.isupper():
        return word[0] in "AEFHILMNORSX"  # spelled out: an ML pipeline, a GPU
    if re.match(r"(?i)uni|use|usu|util|one\b|once|eu", word):
        return False
    return word[0].lower() in "aeiou" or word.lower().startswith(("hour", "honest"))


def _tidy(text: str) -> str:
    """Spaces that empty alternatives leave behind, at most one blank line between paragraphs."""
    text = text.replace(_MARK, "")
    text = re.sub(r"[ \t]+", " ", text)
    text = re.sub(r" (?=[.,;:!?\n])|(?<=\n) ", "", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()
