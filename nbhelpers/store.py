"""Where files live, and how records become JSON and come back."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import sys
import time
import tomllib
import uuid
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from nbhelpers.records import SCHEMA_VERSION, LabError, Settings

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")
SYNC_S = 1.0  # appended rows reach the disk at most this much later: fsync takes 6 ms, rows can be faster
LOCK_S = 60.0  # wait for another writer: what a killed run left behind ends within seconds


def project_root() -> Path:
    """The checkout: the nearest folder, from here or from the working directory up, with data/models.toml."""
    for folder in (*Path(__file__).resolve().parents, Path.cwd(), *Path.cwd().parents):
        if (folder / "data" / "models.toml").is_file():
            return folder
    raise LabError("The file data/models.toml was not found: run from a checkout of the laboratory.")


def data_dir() -> Path:
    return project_root() / "data"


def read_table(name: str, build: Callable[[Any], T]) -> T:
    """What ``build`` makes of a TOML file of the data folder. Raises LabError for a file it cannot use."""
    try:
        return build(tomllib.loads((data_dir() / name).read_text(encoding="utf-8")))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, LabError) as error:
        raise LabError(f"{name} in the data folder is not usable ({error}): restore it.") from None


def outputs_dir() -> Path:
    """The outputs folder; the environment variable NBHELPERS_OUTPUTS moves it."""
    moved = os.environ.get("NBHELPERS_OUTPUTS")
    return Path(moved).resolve() if moved else project_root() / "outputs"


def run_dir(settings: Settings) -> Path:
    return Path(settings.run_dir).resolve() if settings.run_dir else outputs_dir() / "standalone"


def write_json(path: Path, record: Any) -> Path:
    """Write a dataclass as JSON, atomically as write_text does."""
    body = json.dumps(dataclasses.asdict(record), indent=2, ensure_ascii=True, allow_nan=False)
    return write_text(path, [body + "\n"])


def write_text(path: Path, parts: Iterable[str]) -> Path:
    """Write a file atomically: a reader sees the old one or the new one, never half, power loss included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
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
        body = path.read_bytes()
    except FileNotFoundError:
        raise LabError(f"{path} does not exist: run the notebook that writes it first.") from None
    except OSError as error:
        raise LabError(f"{path} cannot be read ({error.strerror}): delete it and run again.") from None
    return _record(body, cls, str(path))


def append_row(path: Path, record: Any) -> None:
    """Append one record as a JSON line."""
    with appending(path) as append:
        append(record)


def write_rows(path: Path, records: Iterable[Any]) -> Path:
    """Write a JSONL file as a whole, atomically as write_text does."""
    return write_text(path, map(_line, records))


@contextmanager
def appending(path: Path) -> Iterator[Callable[[Any], None]]:
    """A function that appends a record to a JSONL file which nobody else appends to meanwhile.

    A last line that was cut off is removed first, with a warning. Each row is flushed to the operating system
    at once and to the disk within SYNC_S: a killed process loses none, a power failure the last ones.
    Raises LabError where the file cannot be written, or another process writes it for LOCK_S.
    """
    from filelock import FileLock, Timeout

    with ExitStack() as stack:
        with _writable(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(FileLock(path.with_name(f".{path.stem}.lock"), timeout=LOCK_S))
            except Timeout:
                raise LabError(f"{path} is being written by another process: wait, or stop it.") from None
            if repair_tail(path):
                name = f"{path.parent.name}/{path.name}"
                print(f"warning: the last line of {name} was cut off and is made again", file=sys.stderr)
            out = stack.enter_context(path.open("a", encoding="ascii"))
        synced = time.monotonic()

        def append(record: Any) -> None:
            nonlocal synced
            with _writable(path):
                out.write(_line(record))
                out.flush()
                if time.monotonic() - synced > SYNC_S:
                    os.fsync(out.fileno())
                    synced = time.monotonic()

        yield append
        os.fsync(out.fileno())


@contextmanager
def _writable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LabError(
            f"{path} cannot be written ({error.strerror}): free space or choose another output folder."
        ) from None


def _line(record: Any) -> str:
    row = dataclasses.asdict(record)
    if row.get("failure", "") is None:  # most rows have none
        del row["failure"]
    return json.dumps(row, ensure_ascii=True, allow_nan=False) + "\n"


def read_rows(path: Path, cls: type[T]) -> Iterator[T]:
    """Yield the records of a JSONL file, one at a time; a missing file has no rows.

    A last line without its newline is a write that was cut off: it is not a row.
    """
    for line, number, _ in _lines(path):
        yield _record(line, cls, f"{path}, line {number}")


def _lines(path: Path) -> Iterator[tuple[bytes, int, int]]:
    """Each whole line that is not blank, with its number and the byte where it starts."""
    if not path.exists():
        return
    with path.open("rb") as lines:
        offset = 0
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                return
            if line.strip():
                yield line, number, offset
            offset += len(line)


class Rows(Sequence[T]):
    """Rows of a JSONL file by position, read when they are asked for: eight bytes of memory a row."""

    def __init__(self, path: Path, cls: type[T], offsets: Iterable[int]) -> None:
        self.path, self.cls, self.offsets = path, cls, array("q", offsets)

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: Any) -> Any:
        chosen = self.offsets[index]
        return Rows(self.path, self.cls, chosen) if isinstance(index, slice) else next(self._read([chosen]))

    def __iter__(self) -> Iterator[T]:
        return self._read(self.offsets)

    def _read(self, offsets: Sequence[int]) -> Iterator[T]:
        if not offsets:  # there may be no file
            return
        with self.path.open("rb") as file:
            for offset in offsets:
                file.seek(offset)
                yield _record(file.readline(), self.cls, f"{self.path}, byte {offset}")


def all_rows(path: Path, cls: type[T]) -> Rows[T]:
    return Rows(path, cls, (offset for _, _, offset in _lines(path)))


def index(path: Path, cls: type[Any]) -> dict[str, int]:
    """Where the row of each key starts, in bytes; of two rows with one key, the later."""
    lines = _lines(path)
    return {_record(line, cls, f"{path}, line {number}").key: offset for line, number, offset in lines}


def repair_tail(path: Path) -> bool:
    """Cut a half-written last line off, so that the next row starts on a line of its own.

    Returns True when something was cut.
    """
    if not path.exists():
        return False
    with path.open("rb+") as file:
        size = end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        newline = 0 if file.read(1) in (b"\n", b"") else -1  # as a rule the file ends well
        while end > 0 and newline < 0:
            start = max(0, end - 65536)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            end = start + newline + 1 if newline >= 0 else start
        file.truncate(end)
    return end < size


def row_key(**parts: Any) -> str:
    """A hash of everything that decides a generated text; same parts, same key, in any order."""
    canonical = json.dumps(parts, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]


def from_plain(data: Any, cls: type[T], where: str) -> T:
    """A record from plain JSON or TOML values, checked by its annotations. Raises LabError with the place."""
    try:
        body = json.dumps(data, default=list).encode()  # sets too
    except (TypeError, ValueError, RecursionError) as error:
        raise LabError(f"{where}: not a valid {cls.__name__} ({error}).") from None
    return _record(body, cls, where)


def _record(body: bytes, cls: type[T], where: str) -> T:
    """A record from JSON, read strictly by pydantic. Raises LabError with the place."""
    from pydantic import ValidationError

    try:
        record: T = _reader(cast(Any, cls)).validate_json(
            body if b"\\ud" not in body.lower() else _without_halves(body)
        )
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
        if problem["type"] == "json_invalid":
            raise LabError(f"{where}: not JSON ({problem['msg']}); delete it and run again.") from None
        _check_version(body, cls, where)
        field = ".".join(map(str, problem["loc"]))
        raise LabError(f"{where}: not a valid {cls.__name__} ({field}: {problem['msg']}).") from None
    version = getattr(record, "schema_version", None)
    if version is not None and (version != SCHEMA_VERSION or b"schema_version" not in body):
        _check_version(body, cls, where)
    return record


def _without_halves(body: bytes) -> bytes:
    """JSON with U+FFFD for each lone half of a surrogate pair, which pydantic refuses."""
    try:
        plain = json.dumps(json.loads(body), ensure_ascii=False).encode("utf-16", "surrogatepass")
    except (ValueError, RecursionError):  # no JSON: pydantic says what is wrong
        return body
    return plain.decode("utf-16", "replace").encode()


@functools.cache
def _reader(cls: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(cls)


def _check_version(body: bytes, cls: type[Any], where: str) -> None:
    """Raises LabError for a file of another version of this record."""
    data = json.loads(body)
    version = data.get("schema_version") if isinstance(data, dict) else None
    if hasattr(cls, "schema_version") and version != SCHEMA_VERSION:
        raise LabError(
            f"{where}: schema version {version!r} is unknown to this release (it knows {SCHEMA_VERSION}): "
            "upgrade nbhelpers or make the file again."
        )
