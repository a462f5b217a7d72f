"""Where files live, and how records become JSON and come back."""

import csv
import dataclasses
import functools
import hashlib
import io
import json
import os
import re
import shutil
import sys
import tomllib
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from nbhelpers import redact
from nbhelpers.errors import nearest
from nbhelpers.records import SCHEMA_VERSION, Failure, LabError, Settings

T = TypeVar("T")
WHEEL = Path(__file__).parent / "lab"  # of a package that was installed: its own notebooks and data
LOCK_S = 60.0  # wait for another writer: what a killed run left behind ends within seconds


def project_root() -> Path:
    """The nearest folder with data/models.toml: a checkout, a copy by `nbhelpers lab`, or the wheel's own."""
    for folder in (*Path(__file__).resolve().parents, Path.cwd(), *Path.cwd().parents, WHEEL):
        if (folder / "data" / "models.toml").is_file():
            return folder
    raise LabError("The file data/models.toml was not found: run from a checkout of the laboratory.")


def copy_lab(target: Path) -> Path:
    """A copy of notebooks, data and tools to work on. Raises LabError for a folder that is there already."""
    folders = [project_root() / name for name in ("notebooks", "data", "tools")]
    if target.exists() or any(target.resolve().is_relative_to(folder) for folder in folders):
        raise LabError(f"The folder {target} is there already, or inside what is copied: name another one.")
    for folder in folders:
        shutil.copytree(folder, target / folder.name, ignore=shutil.ignore_patterns("cache", "__pycache__"))
    return target


def data_dir() -> Path:
    return project_root() / "data"


def read_table(name: str, build: Callable[[Any], T]) -> T:
    """What ``build`` makes of a TOML file of the data folder. Raises LabError for a file it cannot use."""
    try:
        return build(tomllib.loads((data_dir() / name).read_text(encoding="utf-8")))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, LabError) as error:
        raise LabError(f"{name} in the data folder is not usable ({error}): restore it.") from None


def outputs_dir() -> Path:
    """The outputs folder, of an installed package in the working directory; NBHELPERS_OUTPUTS moves it."""
    if moved := os.environ.get("NBHELPERS_OUTPUTS"):
        return Path(moved).expanduser().resolve()
    return (Path.cwd() if project_root() == WHEEL else project_root()) / "outputs"


def address(whose: str, variable: str, kind: Failure = Failure.USAGE) -> str:
    """The address in a variable of the environment, "" where it is not set.

    Raises LabError for a user name or password that libraries would cut at different places, and print.
    """
    value = os.environ.get(variable, "").strip()
    if set(redact.credentials(value)) & set(redact.RESERVED):
        hint = "write / ? # @ [ ] and blanks in its user name and password as %2F %3F %23 %40 %5B %5D %20"
        raise LabError(f"{whose} at {variable} is refused: {hint}.", kind)
    return value


def user_path(name: str) -> Path:
    """A path as a user writes it; a home that cannot be found stays as it is written, and does not exist."""
    with suppress(RuntimeError):
        return Path(name).expanduser()
    return Path(name)


def run_dir(settings: Settings) -> Path:
    return Path(settings.run_dir).resolve() if settings.run_dir else outputs_dir() / "standalone"


def write_json(path: Path, record: Any) -> Path:
    """Write a dataclass as JSON, atomically as write_text does."""
    return write_text(path, [as_json(record)])


def as_json(record: Any) -> str:
    """A dataclass as the JSON that write_json writes."""
    return json.dumps(dataclasses.asdict(record), indent=2, ensure_ascii=True, allow_nan=False) + "\n"


def write_text(path: Path, parts: Iterable[str]) -> Path:
    """Write a file atomically: a reader sees the old one or the new one, never half, power loss included."""
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with _writable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with unfinished.open("w", encoding="utf-8") as out:
                out.writelines(parts)
                out.flush()
                os.fsync(out.fileno())
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    return path


def read_json(path: Path, cls: type[T]) -> T:
    """Read a record written by write_json. Raises LabError for a missing, broken or newer file."""
    try:
        return _record(path.read_bytes(), cls, str(path))
    except OSError as error:
        reason = error.strerror
        raise LabError(f"{path} cannot be read ({reason}): run the notebook that writes it first.") from None


def append_row(path: Path, record: Any) -> None:
    """Append one record to a JSONL file."""
    with appending(path) as append:
        append(record)


def write_rows(path: Path, records: Iterable[Any]) -> Path:
    """Write a JSONL file as a whole, atomically as write_text does."""
    return write_text(path, map(_line, records))


@contextmanager
def appending(path: Path) -> Iterator[Callable[[Any], None]]:
    """A function that appends a record to a JSONL file which nobody else appends to meanwhile.

    A last line that was cut off is removed first. A killed process loses no row. Raises LabError where the
    file cannot be written, or another process writes it for LOCK_S.
    """
    from filelock import FileLock

    with ExitStack() as stack:
        with _writable(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(path.with_name(f".{path.stem}.lock"), timeout=LOCK_S))
            out = stack.enter_context(path.open("ab", buffering=0))
            written = path.read_bytes()
            if written and not written.endswith(b"\n"):
                print(f"warning: the last line of {path} was cut off and is made again", file=sys.stderr)
                out.truncate(written.rfind(b"\n") + 1)

        def append(record: Any) -> None:
            with _writable(path):
                line = _line(record).encode()
                while line:  # a disk that is nearly full takes only a part of it
                    line = line[out.write(line) :]

        yield append
        with _writable(path):
            os.fsync(out.fileno())


@contextmanager
def _writable(path: Path) -> Iterator[None]:
    try:
        yield
    except TimeoutError:  # of the lock
        raise LabError(f"{path} is being written by another process: wait, or stop it.") from None
    except OSError as error:
        reason = error.strerror
        raise LabError(f"{path} cannot be written ({reason}): free space or choose another folder.") from None


def _line(record: Any) -> str:
    optional = ("failure", "reasoning", "reason", "estimated", "target", "tags", "logprobs")  # seldom there
    fields = dataclasses.asdict(record).items()
    row = {name: value for name, value in fields if value is not None or name not in optional}
    return json.dumps(row, ensure_ascii=True, allow_nan=False) + "\n"


def read_rows(path: Path, cls: type[T]) -> Iterator[T]:
    """Yield the records of a JSONL file, one at a time; a missing file has no rows.

    A last line without its newline is a write that was cut off: it is not a row. Raises LabError.
    """
    try:
        file = path.open("rb") if path.exists() else io.BytesIO()
    except OSError as error:  # a folder, say
        raise LabError(f"{path} cannot be read ({error.strerror}): move it away and run again.") from None
    with file as lines:
        for number, line in enumerate(lines, 1):
            if line.strip() and line.endswith(b"\n"):
                yield _record(line, cls, f"{path}, line {number}")


def objects(text: str, where: str, wanted: str = "object") -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON document, a list or JSON lines, with their places. LabError for anything else."""
    lines = ((n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip())  # U+2028 ends no line
    rows: Iterable[tuple[int, Any]] = lines
    with suppress(ValueError, RecursionError):
        document = json.loads(text)
        rows = enumerate(document if isinstance(document, list) else [document], 1)
    for number, row in rows:
        try:
            row = json.loads(row) if rows is lines else row
            row.keys()
        except (ValueError, RecursionError, AttributeError) as error:
            why = f"it is {row!r:.40}" if isinstance(error, AttributeError) else error
            raise LabError(f"{where}, line {number}: not a JSON {wanted} ({why}).") from None
        yield number, row


def table(text: str, where: str) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a CSV file by the names of its header, and the lines on which they begin; the delimiter is
    a comma, or a semicolon as spreadsheets write it. LabError for cells that do not match the header."""
    first_line = text.partition("\n")[0]
    delimiter = ";" if first_line.count(";") > first_line.count(",") else ","
    options: Any = {"delimiter": delimiter, "skipinitialspace": True, "strict": True}
    reader, line = csv.reader(io.StringIO(text, newline=""), **options), 1
    try:
        header, line = [name.strip().lower() for name in next(reader, [])], reader.line_num + 1
        if twice := next((name for name in header if name and header.count(name) > 1), ""):
            raise LabError(f"{where}, line 1: the column {twice!r} stands twice: name each once.")
        for cells in reader:
            if any(cells):
                yield line, dict(zip(header, cells, strict=True))
            line = reader.line_num + 1
    except (csv.Error, ValueError):
        problem = "has more or fewer cells than the header, or quotation marks that do not close"
        raise LabError(f"{where}, line {line}: it {problem}.") from None


def row_key(**parts: Any) -> str:
    """A hash of everything that decides a generated text; same parts, same key, in any order."""
    canonical = json.dumps(parts, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]


def checked(table: dict[str, Any], kinds: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values of a TOML table, each of its kind. LabError for an unknown field, with the nearest."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    values, config = dict[str, Any](), ConfigDict(strict=True, allow_inf_nan=False)
    for name, value in table.items():
        if name not in kinds:
            raise LabError(f"{where}: the field {name!r} is not known: {nearest(name, kinds)}.")
        try:
            values[name] = TypeAdapter(kinds[name], config=config).validate_python(value)
        except ValidationError as error:
            raise LabError(f"{where}: {name} is {value!r}: {error.errors()[0]['msg']}.") from None
    return values


def from_plain(data: Any, cls: type[T], where: str) -> T:
    """A record from plain JSON or TOML values, checked by its annotations. Raises LabError with the place."""
    return _record(json.dumps(data, default=list).encode(), cls, where)  # JSON has no sets


@functools.cache
def _adapter(cls: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(cls)


def _record(body: bytes, cls: Any, where: str) -> Any:
    """A record from JSON, read strictly by pydantic. Raises LabError with the place."""
    from pydantic import ValidationError

    version = re.search(rb'"schema_version": ?([^,}\s]+)', body)
    if version and version[1] != b"%d" % SCHEMA_VERSION:
        problem = f"schema version {version[1].decode(errors='replace')} is unknown to this release"
        raise LabError(f"{where}: {problem} (it knows {SCHEMA_VERSION}): upgrade nbhelpers.")
    try:
        return _adapter(cls).validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        raise LabError(f"{where}: not JSON ({first['msg']}); delete it and run again.")
    field = ".".join(map(str, first["loc"]))
    raise LabError(f"{where}: not a valid {cls.__name__} ({field}: {first['msg']}).")
