"""Where a run lives: names that mean something to formats, full and read-only disks, what a kill leaves."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import namedtuple
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_notebook import texts, write

from nbhelpers import store
from nbhelpers.records import Failure, NotebookStatus, Settings
from nbhelpers.runner import kernels, plan
from nbhelpers.runner.notebook import run_notebook
from nbhelpers.runner.run import with_disk

NAMES = ("{", "}", "{0}", "{name}", "{missing!r:>9}", "100%", "%s %(x)d", "q?x#y", "a'b\"c", "$HOME `x` \\n")
COMMAND = Path(sys.executable).with_name("nbhelpers")

# Text from outside stays text


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_s_name_is_no_format_and_a_value_arrives_as_it_is(tmp_path, name):
    for part in ("from", "to"):
        (tmp_path / name / part).mkdir(parents=True)
    notebook = write(tmp_path / name / "from", "print(ascii(name))", stem="01_tiny")
    output = tmp_path / name / "to" / "01_tiny.ipynb"
    value = f"{name}\n{{x}}\u2028é"
    status = run_notebook(notebook, output, {"name": value}, 60, name)
    assert (status.status, status.error, status.model) == ("passed", None, name)
    assert texts(output) == f"{value!a}\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == [name]
    assert output.with_suffix(".html").exists()


@given(st.text(), st.lists(st.text() | st.integers() | st.booleans() | st.none()))
def test_what_papermill_writes_into_a_notebook_is_what_it_was_given(text, items):
    from papermill.translators import PythonTranslator

    scope: dict = {}
    exec(PythonTranslator.codify({"text": text, "items": items}), scope)
    assert (scope["text"], scope["items"]) == (text, items)


# Disks


@pytest.fixture
def call(monkeypatch, capfd):
    from nbhelpers import cli

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["nbhelpers", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, capfd.readouterr().err.strip()

    before = signal.getsignal(signal.SIGTERM)
    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("command", ["run --out", "run --resume", "report", "label"])
def test_a_disk_that_takes_nothing_is_named_in_one_sentence(command, number, call, monkeypatch, tmp_path):
    from made_runs import make_result, make_sample, write_info, write_model

    folder = tmp_path / "here"
    if command != "run --out":
        write_info(folder, ["lab-gpt2"])
        write_model(folder, make_result("lab-gpt2", [5.0, 6.0]), [(make_sample("lab-gpt2", "b01", 0), 5.0)])

    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))  # without the file's name, as a write does

    monkeypatch.setattr(os, "fsync", refuse)
    what = ["run", "lab-gpt2", "--out"] if command == "run --out" else command.split()
    code, shown = call(*what, str(folder))
    assert code in (1, 2) and len(shown.splitlines()) == 1, shown
    assert shown.startswith("nbhelpers: ") and os.strerror(number) in shown and "space" in shown


FULL = """
mount -t tmpfs -o size=400k tmpfs {0} || exit 77
dd if=/dev/zero of={0}/filler bs=1k 2>/dev/null
{1} run lab-gpt2 --limit 1 --repeats 1 --max-new-tokens 4 --out {0}/run 2>{2}/first; echo $? >{2}/codes
rm {0}/filler; cp -r {2}/made {0}/made; mount -o remount,ro {0}
{1} run --resume {0}/made 2>{2}/second; echo $? >>{2}/codes
{1} report {0}/made 2>{2}/third; echo $? >>{2}/codes
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a small disk of its own")
def test_real_disks_that_are_full_or_read_only(tmp_path):
    from made_runs import make_result, write_info, write_model

    disk = tmp_path / "disk"
    disk.mkdir()
    write_info(tmp_path / "made", ["lab-gpt2"])
    write_model(tmp_path / "made", make_result("lab-gpt2", [5.0, 6.0]))
    script = FULL.format(disk, COMMAND, tmp_path)
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("no mounts for users here")
    assert (tmp_path / "codes").read_text().split() in (["2"] * 3, ["1"] * 3)
    for name, word in (("first", "No space left"), ("second", "Read-only"), ("third", "Read-only")):
        shown = (tmp_path / name).read_text().strip()
        assert len(shown.splitlines()) == 1 and word in shown, shown


Usage = namedtuple("Usage", "total used free")


def test_what_fails_on_a_full_disk_names_the_disk(tmp_path, monkeypatch):
    died = NotebookStatus(
        "03_generation", "m", "failed", 1.0, "DeadKernelError: Kernel died", Failure.DEAD_KERNEL
    )
    assert with_disk(died, tmp_path) == died
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 4096))
    named = with_disk(died, tmp_path)
    assert named.error == f"DeadKernelError: Kernel died; no space is left on the disk of {tmp_path}"
    assert named.failure is Failure.DEAD_KERNEL
    passed = NotebookStatus("03_generation", "m", "passed", 1.0)
    assert with_disk(passed, tmp_path) == passed


# What a kill leaves


@pytest.fixture
def short():
    """A folder for temporary files whose path leaves room for the names of sockets."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.mark.skipif(not kernels.FORKS, reason="there is no fork server elsewhere")
def test_a_path_of_temporary_files_too_long_for_sockets_is_not_used(tmp_path):
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    deep.mkdir(parents=True)
    code = (
        "from pathlib import Path\nfrom nbhelpers.runner import kernels\nwith kernels.environment('1'):\n"
        "    kernels.serve(Path('log'))\n    (started := kernels.start(Path('log'), print)).join(60)\n"
        "print(started.exitcode)"
    )
    environment = {**os.environ, "TMPDIR": str(deep)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("0\n", "") and not list(deep.iterdir())


TEMPORARY = """
import tempfile, time
from nbhelpers.runner import kernels
for _ in range(2):  # runs of one process, which its fork server serves too
    with kernels.environment('1'):
        tempfile.mkstemp('.json'), tempfile.mkdtemp(prefix='nb')
        place = tempfile.gettempdir()
    assert tempfile.gettempdir() != place
with kernels.environment('1'):
    kernels.PRELOAD.clear()
    kernels.serve(kernels.Path(place, 'log'))
    kernels.start(kernels.Path(place, 'log'), print, 'here').join(60)
    print(place, flush=True)
    input()
    {}
"""


@pytest.mark.parametrize("end", ["pass", "raise SystemExit", "time.sleep(600)"])
def test_temporary_files_lie_in_one_folder_that_goes_with_the_run_or_when_the_next_starts(short, end):
    environment = {**os.environ, "TMPDIR": str(short)}

    def start(end: str) -> subprocess.Popen[str]:
        code, pipe = TEMPORARY.format(end), subprocess.PIPE
        command = [sys.executable, "-c", code]
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)

    with start("pass") as other:  # goes on meanwhile, until its input ends
        places = [Path(other.stdout.readline().strip())]
        with start(end) as ended:
            places.append(Path(ended.stdout.readline().strip()))
            assert sorted(short.iterdir()) == sorted(places)
            assert "log" in [path.name for path in places[0].iterdir()]
            if end.startswith("time"):
                ended.kill()
            assert ended.communicate("\n")[1] == ""
        assert places[1].exists() == end.startswith("time")
        (short / "nbhelpers_x" / "torchinductor_me").mkdir(parents=True)  # made again after it was removed
        with start("pass") as last:
            assert last.communicate("\n")[1] == ""
        assert [*short.iterdir()] == [places[0]]


def test_half_written_files_in_a_run_s_folder_are_removed_by_the_next_start(tmp_path):
    info = plan.plan_run(["lab-gpt2"], Settings(), str(tmp_path / "run")).info
    folder = tmp_path / "run"
    store.write_json(folder / "run.json", info)
    (folder / "lab-gpt2").mkdir()
    left = [folder / f".run.json.{'0a' * 16}", folder / "lab-gpt2" / f".result.json.{'1f' * 16}"]
    kept = [folder / ".note.of.mine", folder / "lab-gpt2" / ".samples.lock"]
    for path in (*left, *kept):
        path.write_text("x")
    plan.still_valid(plan.plan_resume(str(folder)))
    assert not [path for path in left if path.exists()] and all(path.exists() for path in kept)
