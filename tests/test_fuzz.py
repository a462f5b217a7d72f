"""Every file that is read, filled with anything: one clear sentence or a right result, nothing else."""

import dataclasses
import enum
import json
import shutil
import struct
import typing
from pathlib import Path

import made_runs
import pytest
from all_records import all_records
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from saved_models import make_model

from nbhelpers import records, registry, store
from nbhelpers.comparison import rating_sheet, ratings
from nbhelpers.loading import checkpoint
from nbhelpers.loading.checkpoint import inspect
from nbhelpers.records import LabError
from nbhelpers.report import html
from nbhelpers.scoring import costs, rubric, texts
from nbhelpers.tracking import result
from tools import quiz

MANY = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
DATA = store.data_dir()
RECORDS = [kind for kind in all_records() if hasattr(kind, "schema_version")]
numbers = st.integers() | st.floats() | st.sampled_from([10**400, -1, 2**63, True])
anything = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
deep = st.sampled_from([b"[" * 100_000, b'{"a":' * 50_000, b"[" * 500 + b"]" * 500])


def value_of(kind: typing.Any) -> typing.Any:
    """Some right value of an annotation."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is records.Settings:  # it refuses most values
        return records.Settings()
    if isinstance(kind, type) and issubclass(kind, enum.StrEnum):
        return next(iter(kind))
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return kind(**{field.name: value_of(hints[field.name]) for field in dataclasses.fields(kind)})
    if origin is tuple:
        return (value_of(arguments[0]),)
    if origin is dict:
        return {"key": value_of(arguments[1])}
    if origin is typing.Literal:
        return arguments[0]
    if arguments:  # a union with None
        return value_of(arguments[0])
    return {int: records.SCHEMA_VERSION, float: 1.5, str: "text", bool: True}[kind]


@st.composite
def damaged(draw, body: bytes) -> bytes:
    """Nothing but bytes, or the file with a piece cut out, doubled or overwritten."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=200) | deep)
    start = draw(st.integers(0, len(body)))
    end = draw(st.integers(start, min(len(body), start + 40)))
    piece = st.binary(max_size=6) | anything.map(lambda value: json.dumps(value).encode())
    return body[:start] + draw(piece | st.just(body[start:end] * 2)) + body[end:]


@st.composite
def replaced(draw, plain: typing.Any) -> typing.Any:
    """Plain data in which one value, somewhere, is anything, gone or not asked for."""
    if not isinstance(plain, dict | list) or not plain or draw(st.integers(0, 4)) == 0:
        return draw(anything)
    keys = list(plain) if isinstance(plain, dict) else range(len(plain))
    key = draw(st.sampled_from(list(keys)))
    changed = dict(plain) if isinstance(plain, dict) else list(plain)
    match draw(st.integers(0, 5)):
        case 0:
            del changed[key]
        case 1 if isinstance(changed, dict):
            changed[draw(st.text(max_size=9))] = draw(anything)
        case _:
            changed[key] = draw(replaced(plain[key]))
    return changed


def outcome(read: typing.Callable[[], typing.Any]) -> typing.Any:
    """What the reader returns; None for a LabError of one clear sentence. Any other error fails the test."""
    try:
        return read()
    except LabError as error:
        assert len(str(error)) > 20
        return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: kind.__name__)
@MANY
@given(draw=st.data())
def test_every_record(folder, kind, draw):
    right = value_of(kind)
    plain = dataclasses.asdict(right)
    body = json.dumps(plain).encode()
    changed = replaced(plain).map(lambda data: json.dumps(data).encode())
    content = draw.draw(st.just(body) | damaged(body) | changed)
    path = folder / f"{kind.__name__}.json"
    path.write_bytes(content)
    found = outcome(lambda: store.read_json(path, kind))
    assert content != body or found == right
    if found is not None:  # what is accepted can be kept
        assert store.read_json(store.write_json(folder / "again.json", found), kind) == found


@pytest.mark.parametrize("kind", [records.Sample, records.Score], ids=lambda kind: kind.__name__)
@MANY
@given(draw=st.data())
def test_rows(folder, kind, draw):
    right = value_of(kind)
    body = json.dumps(dataclasses.asdict(right)).encode() + b"\n"
    changed = replaced(dataclasses.asdict(right)).map(lambda data: json.dumps(data).encode() + b"\n")
    path = folder / "rows.jsonl"
    path.write_bytes(body + draw.draw(damaged(body) | changed))
    found = outcome(lambda: list(store.read_rows(path, kind)))
    assert found is None or (found[:1] == [right] and all(isinstance(row, kind) for row in found))


@MANY
@given(draw=st.data())
def test_prompts(folder, draw):
    path = folder / "prompts.jsonl"
    path.write_bytes(draw.draw(damaged((DATA / "prompts.jsonl").read_bytes()[:600])))
    for prompt in outcome(lambda: registry.load_prompts(path)) or ():
        assert prompt.id.strip() and prompt.text.strip() and prompt.content_type in records.CONTENT_TYPES


TOML = {
    "models.toml": (registry.load_registry, registry._tables.cache_clear),
    "content_types.toml": (texts.content_types, texts.content_types.cache_clear),
    "rubric.csv": (rubric.rated_texts, rubric.rated_texts.cache_clear),
    "prices.toml": (costs.load_prices, lambda: None),
    "questions.toml": (quiz.select, lambda: None),
    "words.toml": (lambda: texts.topic_stems("one two three four"), texts.word_list.cache_clear),
}


@pytest.mark.parametrize("name", TOML)
def test_tables(folder, monkeypatch, name):
    read, forget = TOML[name]
    body = (DATA / name).read_bytes()
    monkeypatch.setattr(store, "data_dir", lambda: folder)

    @MANY
    @given(damaged(body))
    def check(content):
        (folder / name).write_bytes(content)
        forget()
        outcome(read)

    try:
        (folder / name).write_bytes(body)
        assert outcome(read)
        check()
    finally:
        forget()


@MANY
@given(draw=st.data())
def test_sheets_of_raters(folder, draw):
    run = folder / "labelled"
    key = ratings.LabelKey({str(number): f"key{number}" for number in range(1, 4)})
    store.write_json(run / ratings.KEY, key)
    sheet = b'\xef\xbb\xbfitem,prompt,text,score\r\n1,p,"a\nb",7\r\n2,p,t,"8,5"\r\n3,p,t,\r\n'
    (run / "rater.csv").write_bytes(draw.draw(damaged(sheet)))
    found = outcome(lambda: rating_sheet.read_sheet(run, run / "rater.csv"))
    for rated in found.ratings.values() if found else ():
        assert set(rated) <= set(key.items) and all(1 <= score <= 10 for score in rated.values())
    (run / ratings.KEY).write_bytes(draw.draw(damaged((run / ratings.KEY).read_bytes())))
    outcome(lambda: rating_sheet.read_sheet(run, run / "rater.csv"))
    (run / ratings.KEY).unlink()


@pytest.fixture(scope="module")
def model(folder):
    return make_model(folder / "model")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "model.safetensors"])
def test_model_folders(folder, model, name):
    copy = shutil.copytree(model, folder / f"copy-{name}")
    body = (model / name).read_bytes()
    contents = damaged(body)
    if name != "model.safetensors":
        contents |= replaced(json.loads(body)).map(lambda data: json.dumps(data).encode())
    else:
        length = struct.unpack("<Q", body[:8])[0]
        header = json.loads(body[8 : 8 + length])

        def with_header(data):
            text = json.dumps(data).encode()
            return struct.pack("<Q", len(text)) + text + body[8 + length :]

        contents |= replaced(header).map(with_header)

    @MANY
    @given(contents)
    def check(content):
        (copy / name).write_bytes(content)
        spec = outcome(lambda: inspect(registry.resolve(str(copy))))
        assert spec is None or isinstance(spec.parameters, int)

    assert outcome(lambda: inspect(registry.resolve(str(copy))))
    check()


@MANY
@given(draw=st.data())
def test_weight_indexes(folder, draw):
    copy = folder / "sharded"
    copy.mkdir(exist_ok=True)
    plain = {"metadata": {"total_size": 1}, "weight_map": {"a": "model-1.safetensors"}}
    data = draw.draw(replaced(plain))
    (copy / "model.safetensors.index.json").write_text(json.dumps(data))
    (copy / "model-1.safetensors").touch()
    found: list[Path] = outcome(lambda: checkpoint.weight_files(copy, "x")) or []
    assert all(path.parent == copy and path.is_file() for path in found)


def test_the_report_of_a_result_whose_interval_lacks_an_end(folder):
    run = folder / "half"
    made_runs.write_model(run, made_runs.make_result("m", [5.0, 6.0, 7.0]), [])
    made_runs.write_info(run, ["m"])
    path = run / "m" / "result.json"
    text = path.read_text()
    assert '"latency/words_per_s/high"' in text
    path.write_text(text.replace('"latency/words_per_s/high"', '"latency/words_per_s/hihg"'))
    assert "</html>" in html.write_report(run).read_text()


@settings(MANY, max_examples=10)
@given(draw=st.data())
def test_the_report_of_a_damaged_run(folder, draw):
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    sample = made_runs.make_sample("m", "b01", 0)
    made_runs.write_model(run, made_runs.make_result("m", [5.0, 6.0, 7.0]), [(sample, 5.0)])
    made_runs.write_info(run, ["m"])
    path = draw.draw(st.sampled_from(sorted(path for path in run.rglob("*.json*"))))
    path.write_bytes(draw.draw(damaged(path.read_bytes())))
    outcome(lambda: result.read_results(run))
    page = outcome(lambda: html.write_report(run))
    assert page is None or "</html>" in page.read_text()
    assert "</html>" in html.write_runs_index(folder).read_text()
