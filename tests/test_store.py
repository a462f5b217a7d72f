"""What is written comes back the same; what is broken is refused in one sentence, and never half read."""

import dataclasses
import enum
import json
import os
import random
import resource
import signal
import subprocess
import sys
import types
import typing
from pathlib import Path

import pytest
from all_records import all_records
from hypothesis import given, settings
from hypothesis import strategies as st
from saved_models import edit_json

from nbhelpers import store
from nbhelpers.comparison import ratings
from nbhelpers.records import Estimate, LabError, Limits, Result, Sample, Score, Settings
from nbhelpers.tracking.metrics import StatsReport
from nbhelpers.tracking.mlflow_run import TrackingReport

RECORDS = [kind for kind in all_records() if hasattr(kind, "schema_version")]
OPEN = settings(max_examples=50)
# Every character that JSON or a line reader could trip over.
TRICKY = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]), st.sampled_from("\x00\t\n\r\x1c\x85\u2028\u2029\ufffe")
    )
)


def strategy(kind) -> st.SearchStrategy:
    """Values of an annotated type, built from the annotations alone."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Settings:  # it refuses most values
        return st.builds(Settings, model=TRICKY, seed=st.integers(), temperature=st.floats(0, 9))
    if kind is Limits:  # so does this
        return st.builds(Limits, cell_s=st.floats(1, 9), generation_s=st.floats(0, 9))
    if isinstance(kind, type) and issubclass(kind, enum.StrEnum):
        return st.sampled_from(list(kind))
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        names = [field.name for field in dataclasses.fields(kind) if field.name != "schema_version"]
        fields = {name: strategy(hints[name]) for name in names}
        return st.builds(kind, **fields)
    if origin is tuple:
        return st.lists(strategy(args[0]), max_size=3).map(tuple)
    if origin is dict:
        return st.dictionaries(TRICKY, strategy(args[1]), max_size=3)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*(strategy(arg) for arg in args))
    if origin is typing.Literal:
        return st.sampled_from(args)
    finite = st.floats(allow_nan=False, allow_infinity=False)
    return {str: TRICKY, int: st.integers(), float: finite, bool: st.booleans(), type(None): st.none()}[kind]


HELLO = Sample(
    key="k",
    model="m",
    revision="r",
    prompt_id="b01",
    content_type="short_post",
    repeat=0,
    seed=0,
    prompt="Say hello:",
    text="Hello.",
    prompt_tokens=3,
    new_tokens=2,
    bytes=6,
    finish_reason="eos",
    error=None,
    batch_size=1,
    latency_s=0.5,
    ttft_s=0.1,
    tpot_s=0.4,
    peak_memory_bytes=None,
    energy_j=None,
)


def sample(**changes) -> Sample:
    return dataclasses.replace(HELLO, **changes)


@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: kind.__name__)
def test_every_record_comes_back_the_same(kind, tmp_path):
    path = tmp_path / "record.json"

    @OPEN
    @given(strategy(kind))
    def round_trip(record):
        store.write_json(path, record)
        assert store.read_json(path, kind) == record

    round_trip()


def test_samples_come_back_in_order_whatever_their_text(tmp_path):
    path = tmp_path / "samples.jsonl"

    @OPEN
    @given(st.lists(strategy(Sample), min_size=1, max_size=4))
    def round_trip(rows):
        path.unlink(missing_ok=True)
        for row in rows:
            store.append_row(path, row)
        assert list(store.read_rows(path, Sample)) == rows
        assert path.read_bytes().count(b"\n") == len(rows)

    round_trip()


def test_files_are_plain_ascii_json_that_any_tool_reads(tmp_path):
    record = sample(text="naïve 😀")
    store.write_json(tmp_path / "a.json", record)
    store.append_row(tmp_path / "a.jsonl", record)
    for name in ("a.json", "a.jsonl"):
        assert json.loads((tmp_path / name).read_bytes().decode("ascii"))["text"] == record.text


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_unknown_schema_versions_are_refused(tmp_path, version):
    data = dataclasses.asdict(sample()) | {"schema_version": version}
    (tmp_path / "a.json").write_text(json.dumps(data))
    (tmp_path / "a.jsonl").write_text(json.dumps(dataclasses.asdict(sample())) + f"\n{json.dumps(data)}\n")
    with pytest.raises(LabError, match=r"a\.json.*schema version .* is unknown"):
        store.read_json(tmp_path / "a.json", Sample)
    with pytest.raises(LabError, match=r"a\.jsonl, line 2.*schema version .* is unknown"):
        list(store.read_rows(tmp_path / "a.jsonl", Sample))


@pytest.mark.parametrize(
    "content, what",
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[1]", "not a valid StatsReport"),
        ("null", "not a valid StatsReport"),
        (b"\xff\xfe\xfa", "not JSON"),
    ],
)
def test_broken_files_are_one_sentence(tmp_path, content, what):
    path = tmp_path / "stats.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(LabError, match=f"stats.json.*{what}"):
        store.read_json(path, StatsReport)


def test_a_missing_file_says_what_to_run(tmp_path):
    with pytest.raises(LabError, match=r"nothing\.json cannot be read .*: run the notebook"):
        store.read_json(tmp_path / "nothing.json", Result)


@pytest.mark.parametrize(
    "changes, what",
    [
        ({"surprise": 1}, "surprise: Unexpected keyword argument"),
        ({"repeat": "0"}, "repeat: Input should be a valid integer"),
        ({"repeat": True}, "repeat: Input should be a valid integer"),
        ({"text": None}, "text: Input should be a valid string"),
        ({"latency_s": "fast"}, "latency_s: Input should be a valid number"),
        ({"latency_s": 10**400}, "latency_s: Input should be a"),
        ({"finish_reason": "bored"}, "finish_reason: Input should be 'eos', 'stop', 'length', "),
        ({"prompt_truncated": 1}, "prompt_truncated: Input should be a valid boolean"),
    ],
)
def test_a_wrong_field_is_named(tmp_path, changes, what):
    path = tmp_path / "samples.jsonl"
    path.write_text(json.dumps(dataclasses.asdict(sample()) | changes) + "\n")
    with pytest.raises(LabError, match=what):
        list(store.read_rows(path, Sample))


JSON_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TRICKY),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TRICKY, inner, max_size=3)),
    max_leaves=5,
)


def test_any_json_in_any_field_is_read_or_refused_never_a_crash(tmp_path):
    path = tmp_path / "result.json"
    good = dataclasses.asdict(StatsReport("m", 1, 1, 0, {"a": Estimate("a", 1, 1.0, None, None, None)}, {}))

    @OPEN
    @given(st.sampled_from(["model", "attempted", "quality", "latency", "inner"]), JSON_VALUES)
    def read(field, value):
        data = good | ({"quality": {"a": value}} if field == "inner" else {field: value})
        path.write_text(json.dumps(data))
        try:
            assert isinstance(store.read_json(path, StatsReport), StatsReport)
        except LabError as error:
            assert "result.json" in str(error)

    read()


def test_a_file_of_bytes_that_are_no_text_is_refused(tmp_path):
    path = tmp_path / "samples.jsonl"
    store.append_row(path, sample())
    path.write_bytes(path.read_bytes() + b"\xff\xfe\xfd\n")
    with pytest.raises(LabError, match="line 2: not JSON"):
        list(store.read_rows(path, Sample))


def test_a_missing_jsonl_has_no_rows(tmp_path):
    assert list(store.read_rows(tmp_path / "none.jsonl", Sample)) == []


@pytest.mark.parametrize("size", [10, 65_535, 65_536, 65_537, 200_000])
def test_a_torn_last_line_is_not_read_and_can_be_cut_off(tmp_path, size):
    path = tmp_path / "samples.jsonl"
    rows = [sample(key="1", text="x" * 70_000), sample(key="2")]
    for row in rows:
        store.append_row(path, row)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"key": "' + b"y" * size)
    assert list(store.read_rows(path, Sample)) == rows
    store.append_row(path, sample(key="3"))
    assert path.read_bytes().startswith(whole) and path.read_bytes().count(b"\n") == 3
    assert [row.key for row in store.read_rows(path, Sample)] == ["1", "2", "3"]


def test_wherever_a_write_was_cut_the_rows_before_it_survive(tmp_path):
    path = tmp_path / "scores.jsonl"
    rows = [Score(str(i), "b01", i, "short_post", False, 3, {"lab_v1": 5.0}) for i in range(3)]
    for row in rows:
        store.append_row(path, row)
    whole = path.read_bytes()
    for cut in random.Random(0).sample(range(len(whole)), 60):
        path.write_bytes(whole[:cut])
        complete = whole[:cut].count(b"\n")
        assert list(store.read_rows(path, Score)) == rows[:complete]


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path):
    path = tmp_path / "stats.json"
    store.write_json(path, Estimate("old", 1, 1.0, None, None, None))
    before = path.read_bytes()
    for broken in (float("nan"), float("inf"), object()):
        with pytest.raises((ValueError, TypeError)):
            store.write_json(path, Estimate("new", 1, broken, None, None, None))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["stats.json"]


@pytest.mark.skipif(os.name != "posix", reason="limits of a process")
def test_a_full_disk_is_one_sentence_that_names_the_file_and_costs_no_row(tmp_path):
    path = tmp_path / "scores.jsonl"
    row = Score("0", "b01", 0, "short_post", False, 3, {"lab_v1": 5.0})
    store.write_json(tmp_path / "stats.json", row)
    room = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, room[1]))  # in the middle of a row
        for file in (path, tmp_path / "stats.json"):
            with pytest.raises(LabError, match=f"{file} cannot be written .*: free space or"):
                if file == path:
                    with store.appending(path) as append:
                        for n in range(100):
                            append(dataclasses.replace(row, key=str(n)))
                store.write_json(file, dataclasses.replace(row, key="x" * 2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, room)
        signal.signal(signal.SIGXFSZ, ignored)
    keys = [score.key for score in store.read_rows(path, Score)]
    assert keys == [str(n) for n in range(len(keys))] and len(keys) >= 5
    assert store.read_json(tmp_path / "stats.json", Score) == row
    store.append_row(path, dataclasses.replace(row, key="later"))
    assert [score.key for score in store.read_rows(path, Score)] == [*keys, "later"]
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".stats")]


@pytest.mark.parametrize("write", [store.write_json, store.append_row])
def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path, write):
    (tmp_path / "file").touch()
    with pytest.raises(LabError, match=r"file/below/stats\.json cannot be written \(Not a directory\)"):
        write(tmp_path / "file" / "below" / "stats.json", Settings())


def test_a_reader_never_sees_half_a_file(tmp_path):
    """Two processes write different records to one file while this one reads it."""
    path = tmp_path / "result.json"
    code = (
        "import sys; from pathlib import Path; from nbhelpers import store\n"
        "from nbhelpers.records import Estimate\n"
        "for _ in range(300): store.write_json(Path(sys.argv[1]), "
        "Estimate(sys.argv[2] * 20_000, 1, None, None, None, None))"
    )
    store.write_json(path, Estimate("a" * 20_000, 1, None, None, None, None))
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), letter]) for letter in "ab"]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        name = store.read_json(path, Estimate).name
        assert name in ("a" * 20_000, "b" * 20_000)
        seen.add(name[0])
    assert [writer.wait() for writer in writers] == [0, 0]
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
    assert seen


@pytest.mark.skipif(os.name != "posix", reason="permission bits")
def test_written_files_get_the_usual_permissions(tmp_path):
    (tmp_path / "usual").touch()
    store.write_json(tmp_path / "stats.json", Settings())
    assert (tmp_path / "stats.json").stat().st_mode == (tmp_path / "usual").stat().st_mode


PARTS = st.dictionaries(
    st.text("abcdef", min_size=1), st.one_of(st.integers(), TRICKY, st.none(), st.booleans()), min_size=1
)


@OPEN
@given(PARTS, st.randoms(use_true_random=False))
def test_row_key_does_not_depend_on_the_order_of_its_parts(parts, rng):
    names = list(parts)
    rng.shuffle(names)
    assert store.row_key(**parts) == store.row_key(**{name: parts[name] for name in names})


@OPEN
@given(PARTS, st.data())
def test_row_key_changes_with_every_part(parts, data):
    name = data.draw(st.sampled_from(sorted(parts)))
    other = data.draw(st.one_of(st.integers(), TRICKY, st.booleans()))
    same = type(other) is type(parts[name]) and other == parts[name]
    assert (store.row_key(**(parts | {name: other})) == store.row_key(**parts)) is same
    assert store.row_key(**{key: parts[key] for key in parts if key != name}) != store.row_key(**parts)


def test_row_key_is_the_same_in_every_process():
    code = "from nbhelpers import store; print(store.row_key(model='m', seed=0, prompt='Grüße', limit=None))"
    keys = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert keys == {store.row_key(prompt="Grüße", limit=None, seed=0, model="m")}
    assert len(keys.pop()) == 32


def test_the_project_is_found_from_any_working_directory(tmp_path, monkeypatch):
    here = store.project_root()
    assert (here / "data" / "models.toml").is_file()
    monkeypatch.chdir(tmp_path)
    assert store.project_root() == here
    assert store.data_dir() == here / "data"


def test_outputs_go_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("NBHELPERS_OUTPUTS", str(tmp_path / "elsewhere"))
    assert store.outputs_dir() == tmp_path / "elsewhere"
    assert store.run_dir(Settings()) == tmp_path / "elsewhere" / "standalone"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NBHELPERS_OUTPUTS", "relative")
    assert store.outputs_dir() == tmp_path / "relative"
    monkeypatch.delenv("NBHELPERS_OUTPUTS")
    assert store.outputs_dir() == store.project_root() / "outputs"
    assert store.run_dir(Settings(run_dir="mine")) == Path(tmp_path / "mine")


def test_what_older_releases_wrote_besides_is_passed_over(tmp_path):
    path, design = tmp_path / "record.json", ratings.Design(0, ("p1",), 1)
    store.write_json(path, ratings.LabelKey({"1": "key"}, design))
    edit_json(path, design=dataclasses.asdict(design) | {"chances": {"short_post": 1.0}})
    assert store.read_json(path, ratings.LabelKey).design == design
    store.write_json(path, report := TrackingReport("abc", 3, ("files/result.json",)))
    edit_json(path, tracking_uri="sqlite:///mlflow.db", experiment="local-model-evaluation")
    assert store.read_json(path, TrackingReport) == report
