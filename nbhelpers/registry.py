"""Which models and prompts there are, and what a name means, without loading anything heavy."""

import difflib
import functools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import fields, replace
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from nbhelpers import store
from nbhelpers.errors import nearest
from nbhelpers.records import CONTENT_TYPES, LabError, ModelSpec, Prompt

SHAPE, SERVER = "shape:", "server:"
_FIELDS = "id, text and content_type"
_ALWAYS, _LISTS = ("id", "text", "content_type"), ("target", "choices", "tags")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@functools.cache
def _tables() -> dict[str, tuple[ModelSpec, dict[str, Any]]]:
    """data/models.toml: models by alias, each with its configuration, {} where it has none."""
    return store.read_table(
        "models.toml",
        lambda data: {alias: (_spec(alias, entry), entry.get("config", {})) for alias, entry in data.items()},
    )


def _spec(alias: str, entry: dict[str, Any]) -> ModelSpec:
    kind = "embedded" if entry["source"].startswith("data/") else "hub"
    values = {name: value for name, value in entry.items() if name not in ("config", "prompt")}
    values |= {"alias": alias, "kind": kind, "prompt_format": entry["prompt"]}
    if kind == "embedded":  # the digests of its files, as the models' build wrote them
        values["sha256"] = json.loads((store.project_root() / entry["source"] / "sha256.json").read_text())
    return store.from_plain(values, ModelSpec, f"[{alias}]")


def load_registry() -> dict[str, ModelSpec]:
    """Every model of data/models.toml by alias, embedded ones first."""
    return {alias: spec for alias, (spec, _) in _tables().items()}


def embedded_models() -> list[str]:
    """Aliases of the models shipped in data/models, smallest first."""
    return [alias for alias, spec in load_registry().items() if spec.kind == "embedded"]


def resolve(name: str) -> ModelSpec:
    """The model of an alias, a Hub repository, a folder, shape:<alias> or server:<address>#<model>.

    Only the name is looked at: ``checkpoint.inspect`` describes what is on this disk, a Hub repository is
    checked when it is fetched. LabError for any other name, with the nearest ones.
    """
    specs = load_registry()
    for spec in filter(shape_config, load_registry().values()):
        shape = SHAPE + spec.alias
        specs[shape] = replace(spec, alias=shape, source=shape, kind="shape")
    if name in specs:
        return specs[name]
    folder: Path | None = None
    with suppress(OSError, ValueError, RuntimeError):  # too long, a null byte, the home of an unknown user
        path = Path(name).expanduser()
        folder = path.resolve() if name.strip() and path.exists() else None
    if not (shown := name + (folder.name if folder else "")).isprintable():  # it would reach terminals
        raise LabError(f"The name {shown!r} has characters that cannot be printed: rename the model.")
    if name.startswith(SERVER):
        return _served(name)
    for spec in specs.values():
        if name == spec.source or (folder and folder == folder_of(spec)):
            return spec
    if folder and not folder.is_dir():
        raise LabError(f"{name!r} is a file: name the model's folder, {str(folder.parent)!r}.")
    if folder:
        return ModelSpec(alias=_folder_name(folder), source=str(folder), kind="local")
    if _HUB_NAME.fullmatch(name):
        return ModelSpec(alias=name, source=name, kind="hub")
    completions = [alias for alias in specs if name and alias.startswith(name.lower())]
    near = (completions or difflib.get_close_matches(name.lower(), specs, n=3, cutoff=0.5))[:3]
    hint = f"did you mean {' or '.join(near)}? Otherwise " if near else ""
    advice = "give an alias (`nbhelpers models` lists them), an org/name of the Hub, or a model folder."
    raise LabError(f"There is no model {name!r}: {hint}{advice}")


def _served(name: str) -> ModelSpec:
    """The model of server:<address>#<model>. LabError for a name without one, and as ``server_address``."""
    address, _, model = name.removeprefix(SERVER).partition("#")
    source = f"{server_address(address)}#{model}"
    if not model:
        lists = "(`nbhelpers models --server ADDRESS` lists them)"
        raise LabError(f"The name {name!r} lacks a model: server:ADDRESS#MODEL {lists}.")
    return ModelSpec(SERVER + (Path(model).name if model.startswith("/") else model), source, "server")


def server_address(address: str) -> str:
    """The address of an OpenAI-compatible server, /v1 where it has no path.

    Raises LabError, without the address, for one with a user name, password or query, which would be printed.
    """
    try:
        url = urlsplit(address.strip())
        usable = url.scheme in ("http", "https") and url.hostname and (url.port or True)
    except ValueError:  # a port that is none, half an IPv6 address
        usable = False
    if not usable or "@" in url.netloc or url.query or url.fragment:
        form = "write http://HOST:PORT/v1, and a key into the variable NBHELPERS_SERVER_KEY or OPENAI_API_KEY"
        raise LabError(f"The server's address cannot be used: {form}.")
    return f"{url.scheme}://{url.netloc}{url.path.rstrip('/') or '/v1'}"


def _folder_name(folder: Path, parts: int = 1) -> str:
    """The last parts of a path; for a snapshot in the Hub's cache its repository, with more its commit."""
    cache = folder.parent.parent.name
    if folder.parent.name != "snapshots" or not cache.startswith("models--"):
        return "/".join(folder.parts[-parts:])
    repository = cache.removeprefix("models--").replace("--", "/", 1)
    return repository if parts == 1 else f"{repository}@{folder.name[:12]}"


def tell_apart(specs: Iterable[ModelSpec]) -> list[ModelSpec]:
    """The models, with names that several share made longer by a folder's path or a server's host."""
    named = list(specs)
    for parts in range(2, 10):
        slugs = Counter(slug for slug, _ in {(spec.slug, spec.source) for spec in named})
        for index, spec in enumerate(named):
            alias = _folder_name(Path(spec.source), parts)
            if spec.kind == "server":
                alias = f"{SERVER}{urlsplit(spec.source).netloc}#{spec.source.partition('#')[2]}"
            if slugs[spec.slug] > 1 and spec.kind in ("local", "server") and alias.isprintable():
                named[index] = replace(spec, alias=alias)
    return named


def shape_config(spec: ModelSpec) -> dict[str, Any]:
    """The configuration of a registered Hub or shape: model, ready for ``AutoConfig.for_model(**config)``."""
    return dict(_tables()[spec.alias.removeprefix(SHAPE)][1])


def folder_of(spec: ModelSpec) -> Path | None:
    """The folder of an embedded or local model; None for the Hub and for shapes."""
    return {"embedded": store.project_root() / spec.source, "local": Path(spec.source)}.get(spec.kind)


def digests(prompts: Iterable[Prompt]) -> dict[str, str]:
    """Prompt id -> digest of its text, content type and whatever else is set, as run.json keeps them."""
    return {(parts := prompt_fields(p)).pop("id"): store.row_key(**parts)[:16] for p in prompts}


def prompt_fields(prompt: Prompt) -> dict[str, Any]:
    """The fields that every prompt has, and those that are set of this one."""
    return {name: value for name, value in vars(prompt).items() if value or name in _ALWAYS}


def _is_post(prompt: Prompt) -> None:
    if not one_text(kind := prompt.content_type):
        raise LabError("the field 'content_type' is missing or not a non-empty text.")
    if kind not in CONTENT_TYPES:
        raise LabError(f"unknown content type {kind!r}; use one of {', '.join(CONTENT_TYPES)}.")


def load_prompts(
    path: str | Path = "", limit: int | None = None, check: Callable[[Prompt], None] = _is_post
) -> list[Prompt]:
    """Read prompts from JSON lines or CSV; "" is the 15 benchmark prompts b01…b15.

    Fields: id, text (or messages, whose last is the text), and content_type, target, choices, cluster, tags;
    in CSV a bar stands between several. check: what a task asks of each, as a LabError without the place.
    Raises LabError for a missing, empty or malformed file (with the line number) and for a text asked twice.
    """
    source = store.user_path(str(path)) if str(path) else store.data_dir() / "prompts.jsonl"
    try:
        body = source.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise LabError(f"The prompts file {source} cannot be read as UTF-8 text ({error}).") from None
    prompts, texts = dict[str, Prompt](), dict[Any, str]()
    for number, row in _rows(body, source):
        where = f"{source.name}, line {number}"
        try:
            check(prompt := _prompt(row))
        except LabError as error:
            raise LabError(f"{where}: {error}") from None
        text = one_text(prompt.text) if check is _is_post else prompt.text.strip()  # US is not us
        first = texts.setdefault((text, prompt.choices, prompt.before), prompt.id)
        if prompt.id in prompts:
            raise LabError(f"{where}: the id {prompt.id!r} was used before; ids are unique.")
        if first != prompt.id:
            raise LabError(f"{where}: the prompt {prompt.id!r} has the text of {first!r}: leave it out.")
        prompts[prompt.id] = prompt
    if not prompts:
        raise LabError(f"The prompts file {source} is empty: write one JSON object ({_FIELDS}) per line.")
    return [p for p in prompts.values() if str(path) or re.fullmatch(r"b\d\d", p.id)][:limit]


def one_text(text: str) -> str:
    """What prompts that ask the same share: their letters without case, white space and unseen ones."""
    seen = (letter for letter in unicodedata.normalize("NFKC", text) if unicodedata.category(letter) != "Cf")
    return " ".join("".join(seen).casefold().split())


def _rows(body: str, source: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a file of prompts and their line numbers, as JSON has them."""
    if source.suffix.lower() != ".csv":
        yield from store.objects(body, source.name, f"object with {_FIELDS}")
        return
    for number, cells in store.table(body, source.name):
        lists = {name: cells[name].split("|") for name in _LISTS if cells.get(name)}
        yield number, {name: cell for name, cell in cells.items() if cell} | lists


def _prompt(row: dict[str, Any]) -> Prompt:
    """A prompt from what a row says. LabError for fields that are missing, misspelt or no text."""
    names = [*(field.name for field in fields(Prompt)), "messages"]
    for unknown in (name for name in row if name not in names):
        raise LabError(f"the field {unknown!r} is not known: {nearest(unknown, names)}.")
    turns = row.get("before") or []
    if not isinstance(turns, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
        raise LabError("the field 'before' is no list of pairs of a role and a text: use 'messages'.")
    if "messages" in row:
        try:
            *turns, (role, text) = [(turn["role"], turn["content"]) for turn in row["messages"]]
        except (TypeError, LookupError, ValueError):
            raise LabError('messages are no list of {"role", "content"}.') from None
        if role != "user" or row.get("text"):
            raise LabError("messages end with the user's, the text: no other one stands beside them.")
        row = row | {"text": text}
    values: dict[str, Any] = {name: row.get(name) or "" for name in ("id", "text", "content_type", "cluster")}
    values["id"] = str(row["id"]) if type(row.get("id")) is int else values["id"]
    values |= {name: _tuple(row.get(name)) for name in _LISTS}
    prompt = Prompt(**values, before=tuple((role, text) for role, text in turns))
    if re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", str(prompt.id)):  # no link leads to it
        raise LabError(f"the id {prompt.id!r} holds a control character: leave it out.")
    for name, value in vars(prompt).items():
        texts = [*chain(*value)] if name == "before" else value if isinstance(value, tuple) else [value]
        needed = name in ("id", "text", *_LISTS, "before")
        for text in texts:
            if not isinstance(text, str) or (needed and not one_text(text)):
                raise LabError(f"the field {name!r} is missing or not a non-empty text.")
            if re.search("[\ud800-\udfff]", text):  # no tokenizer takes it
                raise LabError(f"the field {name!r} holds half a surrogate pair: mend the emoji.")
    return prompt


def _tuple(value: Any) -> tuple[Any, ...]:
    """One value or several as texts: a number is written as JSON writes it."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(json.dumps(v) if isinstance(v, int | float) else v for v in values)
