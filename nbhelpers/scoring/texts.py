"""What can be counted in an English text: sentences, word stems, echo; and how long a text should be."""

import importlib
import json
import re
import string
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal

from nbhelpers import store
from nbhelpers.errors import NoScore
from nbhelpers.records import LabError, Lenient, Prompt

PATTERN_S = 1.0  # longest that a user's pattern may search one answer
_LIST_MARK = re.compile(r"^\s*(?:[-*•–]|\(?\d{1,2}[.)]|#{1,6})\s+")
_SENTENCE_GAP = re.compile(r"(?<=[.!?…])\s+|(?<=[.!?…][\"'”’)\]])\s+")
_FINISHED = re.compile(r"[.!?…][\"'”’)\]*_]*$|(?:^|\s)#\w+$")
_LETTERS = re.compile(r"[^\W\d_]+")
_OTHER_SCRIPT = re.compile(r"[^\W\d_\u0000-\u024f\u1e00-\u1eff]")
_ACCENTED = re.compile(r"[\u00df-\u024f\u1e00-\u1eff]")
_QUOTED = re.compile(r"""(?<=[\w:,] )["'“‘„«][^"'”’“»\n]{1,120}["'”’“»](?!\w)""")  # inside a sentence
WORD = re.compile(r"\w+(?:['’]\w+)*")
_NUMBER_SIGN = re.compile(  # a number's minus, point, slash, colon or decimal comma; not that of thousands
    r"(?<!\w)-(?=[$€£]?\.?\d)|(?<=\d)[./:](?=\d)|(?<=\d),(?=\d)(?!\d{3}(?!\d))|(?<![\d.])\.(?=\d)"
)


@cache
def word_list(name: str) -> frozenset[str]:
    """A list of data/words.toml. Raises LabError if the file does not hold it."""
    return store.read_table("words.toml", lambda data: frozenset(data[name].split()))


@cache
def _ending() -> re.Pattern[str]:
    """At least four letters, as few as possible, before one of the endings."""
    return re.compile(rf"^(.{{4,}}?)(?:{'|'.join(word_list('endings'))})$")


def normalised(text: str) -> str:
    """Without case, punctuation, articles and extra blanks (SQuAD's rules, Rajpurkar et al. 2016), however an
    accent is encoded; a number keeps its sign and its point (as by DROP's rules, Dua et al. 2019).
    """
    text = unicodedata.normalize("NFC", text).casefold().replace("−", "-")
    kept = {match.start() for match in _NUMBER_SIGN.finditer(text)}
    dropped = {sign for sign in text if sign in string.punctuation or unicodedata.category(sign)[0] == "P"}
    bare = "".join(sign for i, sign in enumerate(text) if i in kept or sign not in dropped)
    return " ".join(re.sub(r"\b(?:a|an|the)\b", " ", bare).split())


def compared(target: str, strict: bool = False) -> Callable[[str], str]:
    """The form in which a text is compared with a target: normalised, unless nothing is left of it (A, +)."""
    bare = normalised if normalised(target) else lambda text: text.strip(" \n.'\"()*").lower()
    return (lambda text: unicodedata.normalize("NFC", text.strip())) if strict else bare


@lru_cache(maxsize=1024)
def is_english(text: str) -> bool:
    """False where most letters are of another script, or where small words of other languages (and words with
    letters that English lacks) outnumber the English ones and are a tenth of all words.

    Quoted phrases and names, known by their capitals, do not count. Too short a text passes as English.
    """
    unquoted = _QUOTED.sub(" ", unicodedata.normalize("NFKC", text))
    found = _LETTERS.findall(unquoted)
    english, foreign, particles = map(word_list, ("function_words", "foreign_words", "name_particles"))
    capitals, against = [word[0].isupper() for word in found], 0
    for i, (capital, word) in enumerate(zip(capitals, map(str.lower, found), strict=True)):
        if word in foreign:
            before, after = any(capitals[max(0, i - 2 + capital) : i]), any(capitals[i + 1 : i + 3 - capital])
            in_name = before or after if capital else before and after and word in particles
            against += not in_name
        elif not capital and _ACCENTED.search(word):
            against += 1
    outnumbered = against > max(1, sum(word.lower() in english for word in found), len(found) / 10)
    other_script = len(_OTHER_SCRIPT.findall(unquoted))
    return not outnumbered and not 3 < other_script > sum(map(len, found)) / 2


def words(text: str) -> list[str]:
    """Words and numbers in lower case, without punctuation; AI and ML stand for their long forms."""
    lowered = text.lower().replace("artificial intelligence", "ai").replace("machine learning", "ml")
    return WORD.findall(lowered.replace("’", "'"))


@lru_cache(maxsize=65536)
def stem(word: str) -> str:
    """A crude stem, so that inflections meet: strategy, strategies, strategic -> strateg.

    Takes off the longest known ending until none fits, and a plural s (after Lovins 1968).
    """
    word = word.lower()[:50]  # no English word is longer, and a model may write one without end
    while True:
        shorter = word[:-1] if len(word) > 3 and word.endswith("s") and word[-2] not in "su" else word
        match = _ending().match(word) or _ending().match(shorter)
        shorter = match.group(1) if match else shorter
        if shorter == word:
            return word
        word = shorter


def stems(text: str) -> list[str]:
    return [stem(word) for word in words(text)]


def sentences(text: str) -> list[str]:
    """Sentences, headings and list items, without list marks."""
    lines = (_LIST_MARK.sub("", line).strip() for line in text.splitlines())
    return [part for line in lines for part in _SENTENCE_GAP.split(line) if part]


def topic_stems(prompt: str) -> frozenset[str]:
    """Stems of what the prompt is about: the content words after "about", or of the whole prompt."""
    subject = prompt.partition(" about ")[2] or prompt
    return frozenset(map(stem, set(words(subject)) - word_list("function_words") - word_list("form_words")))


def trigrams(sequence: list[str]) -> list[tuple[str, ...]]:
    return list(zip(sequence, sequence[1:], sequence[2:], strict=False))


def without_prompt(text: str, prompt: str) -> str:
    """The text with the whole prompt cut out wherever it stands."""
    pattern = r"\s+".join(map(re.escape, prompt.strip(" :\n").split()))
    return re.sub(f"{pattern}:?", "\n", text, flags=re.IGNORECASE) if pattern else text


def own_sentences(text: str, prompt: str) -> list[str]:
    """The sentences that the text adds, each once: neither the prompt nor an echo, which has at least half of
    its three-word sequences (of its words, if fewer than three) from the prompt.
    """
    prompt_words = words(prompt)
    echoes = {*trigrams(prompt_words), *prompt_words}
    by_words: dict[tuple[str, ...], str] = {}
    for sentence in sentences(without_prompt(text, prompt)):
        sentence_words = words(sentence)
        units = trigrams(sentence_words) or sentence_words
        if units and sum(unit in echoes for unit in units) < len(units) / 2:
            by_words.setdefault(tuple(sentence_words), sentence)
    return list(by_words.values())


def ending(text: str) -> float:
    """1.0 for a finished last line, 0.0 where the text breaks off, 0.5 for an open list item or signature."""
    blocks = re.split(r"\n\s*\n", text.strip())
    lines = blocks[-1].splitlines()
    if not lines:
        return 0.0
    if _FINISHED.search(lines[-1].strip()):
        return 1.0
    signed = len(blocks) > 1 and len(lines) <= 2 and all(len(line.split()) <= 4 for line in lines)
    return 0.5 if signed or _LIST_MARK.match(lines[-1]) else 0.0


@dataclass(frozen=True)
class ContentType(Lenient):
    """What data/content_types.toml says of the length of one kind of text, among other things."""

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

    def build(data: dict[str, Any]) -> dict[str, ContentType]:
        rows = ((name, row) for name, row in data.items() if "unit" in row)
        return {name: store.from_plain(row, ContentType, f"[{name}]") for name, row in rows}

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


def search(pattern: str, text: str) -> Any:
    """The match of a user's pattern, or None. Raises NoScore where it takes longer than PATTERN_S."""
    import regex

    try:
        return regex.search(pattern, text, timeout=PATTERN_S)
    except TimeoutError:
        raise NoScore(f"the pattern took longer than {PATTERN_S:g} s") from None


@cache
def validator(path: Path) -> Any:
    """The validator of a JSON Schema in a file. LabError for one that is none, or refers to other files."""
    import jsonschema
    import referencing.jsonschema

    try:
        schema = json.loads(path.read_text(encoding="utf-8-sig"))
        registry = jsonschema.validators.SPECIFICATIONS
        kind = jsonschema.validators.validator_for(schema)
        kind.check_schema(schema, kind.FORMAT_CHECKER)
        dialect = referencing.jsonschema.specification_with(kind.ID_OF(kind.META_SCHEMA))
        root = dialect.create_resource(schema)
        resources = [(registry.resolver_with_root(root), root)]
        for resolver, resource in resources:  # the list grows by what each contains
            if isinstance(resource.contents, dict):
                resource.contents.pop("$schema", None)  # with it the limit in time would not hold
                resolver.lookup(resource.contents.get("$ref", "#"))
            resources += [(resolver.in_subresource(sub), sub) for sub in resource.subresources()]
    except referencing.exceptions.Unresolvable:
        why = f"refers to {resource.contents['$ref']!r}, which is not in it: other files are not read"
        raise LabError(f"The schema {path.name} {why}.") from None
    except (OSError, ValueError, TypeError, AttributeError, jsonschema.SchemaError) as error:
        raise LabError(f"The schema {path.name} cannot be used ({str(error).splitlines()[0]}).") from None
    limited = {"pattern": _pattern, "patternProperties": _pattern_properties}
    return jsonschema.validators.extend(kind, limited)(schema, registry=registry)


def _pattern(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[Any]:
    """JSON Schema's keyword, by a search that is limited in time."""
    import jsonschema

    if validator.is_type(instance, "string") and not search(pattern, instance):
        yield jsonschema.ValidationError(f"{instance!r} does not match {pattern!r}")


def _pattern_properties(validator: Any, schemas: dict[str, Any], instance: Any, schema: Any) -> Iterator[Any]:
    """As ``_pattern``, of the names in an object."""
    for pattern, subschema in schemas.items() if validator.is_type(instance, "object") else ():
        for name in filter(lambda name: search(pattern, name), instance):
            yield from validator.descend(instance[name], subschema, path=name, schema_path=pattern)


def library(name: str) -> Any:
    """A library of the extra ``text``. LabError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise LabError(f'A scorer needs {package}: pip install -c constraints.txt -e ".[text]".') from None


def json_schema(text: str, item: Prompt, options: Mapping[str, Any]) -> float:
    """The answer, or the block of code in it, is JSON that the schema accepts."""
    block = re.search(r"```(?:json)?\s*(.*?)```", text, re.DOTALL)
    schema = validator(options["folder"] / options["schema"])
    try:
        instance = json.loads(block[1] if block else text, parse_constant=int)  # NaN is no JSON
    except (ValueError, RecursionError):
        return 0.0
    try:
        return float(schema.is_valid(instance))
    except NoScore:
        raise
    except Exception as error:  # a reference that leads round in a circle
        raise NoScore(f"{options['schema']} cannot be applied: {type(error).__name__}") from None
