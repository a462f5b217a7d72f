"""Processes from the fork server: real ones, their environment, their ends, and what happens without it."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from test_execute import run, texts

from nbhelpers.runner import forked, processes
from nbhelpers.runner import notebook as execute

pytestmark = pytest.mark.skipif(not forked.possible(), reason="forking after imports is safe on Linux only")


@pytest.fixture(scope="module")
def children(tmp_path_factory):
    """A group whose server is loaded, with a module to run in it."""
    folder = tmp_path_factory.mktemp("modules")
    (folder / "said.py").write_text(SAID)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        group = processes.Children(threads=1, preload=execute.KERNEL_ENVIRONMENT)
        yield group
        group.stop()


SAID = """
import json, os, random, subprocess, sys, time
import numpy
what = sys.argv[1]
if what == "facts":
    facts = {"modules": sorted({"torch", "transformers", "mlflow"} & set(sys.modules)), "name": __name__,
        "argv": sys.argv[1:], "cwd": os.getcwd(), "mark": os.environ.get("MARK"), "stdin": sys.stdin.read(),
        "threads": len(os.listdir("/proc/self/task")), "group": os.getpgid(0) == os.getpid(),
        "drawn": [float(numpy.random.rand()), random.random()],
        "tqdm": os.environ.get("TQDM_DISABLE"), "open": len(os.listdir("/proc/self/fd"))}
    import torch
    facts |= {"sum": float((torch.ones(300, 300) @ torch.ones(300, 300)).sum())}
    print(json.dumps(facts), flush=True)
    import atexit; atexit.register(print, "the end", flush=True)
    sys.exit(3)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(600)
"""


def started(children: processes.Children, *arguments: str, log: Path):
    with log.open("w") as out:
        child = children.start("-m", "said", *arguments, stdout=out, stderr=out)
    assert isinstance(child, forked.Forked), children.plain
    return child


def until(condition) -> bool:
    limit = time.monotonic() + 60
    while not condition() and time.monotonic() < limit:
        time.sleep(0.02)
    return condition()


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_forked_process_is_as_if_started_with_the_libraries_loaded(children, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(children.environment, "MARK", "here")
    facts = []
    for number in range(2):
        log = tmp_path / f"{number}.log"
        assert children.wait(started(children, "facts", "a b", log=log), 60) == 3
        first, last = log.read_text().splitlines()
        assert last == "the end"  # what was registered for the exit has run
        facts.append(json.loads(first))
    for fact in facts:
        assert fact["modules"] == ["mlflow", "torch", "transformers"]
        assert (fact["name"], fact["argv"], fact["cwd"]) == ("__main__", ["facts", "a b"], str(tmp_path))
        assert (fact["mark"], fact["stdin"], fact["group"]) == ("here", "", True)
        assert fact["threads"] == 1 and fact["open"] <= 5  # its streams, and the folder it is listing
        assert fact["sum"] == 300.0**3
    assert facts[0]["drawn"][0] != facts[1]["drawn"][0] and facts[0]["drawn"][1] != facts[1]["drawn"][1]


def test_killing_reaches_what_a_forked_process_started(children, tmp_path):
    log = tmp_path / "log"
    child = started(children, "family", log=log)
    assert until(lambda: log.read_text().endswith("\n"))
    assert child.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.05)
    assert children.wait(child, 0.05) == -signal.SIGKILL
    assert until(lambda: gone(child.pid) and gone(int(log.read_text())))


ASK = """
import os, sys
from nbhelpers.runner.forked import Forked
child = Forked(["said", "family"], os.environ, (0, 1, 2), os.getcwd())
print(child.pid, flush=True)
os.kill(os.getpid(), 9)
"""


def test_what_a_dead_client_asked_for_does_not_survive_it(children, tmp_path):
    log = tmp_path / "log"
    children.wait(started(children, "facts", log=log))
    with log.open("w") as out:
        command = [sys.executable, "-c", ASK]
        subprocess.run(command, stdout=out, stdin=subprocess.DEVNULL, env=children.environment)
    pids = [int(line) for line in log.read_text().split()]
    assert pids and until(lambda: all(map(gone, pids)))


def test_notebooks_run_in_forked_kernels(children, tmp_path, monkeypatch):
    """Pictures included: matplotlib was loaded before there was a notebook to show them in."""
    children.wait(started(children, "facts", log=tmp_path / "log"))
    monkeypatch.setenv(forked.ADDRESS, children.environment[forked.ADDRESS])
    status, output = run(
        tmp_path,
        "import os, sys; print('torch' in sys.modules, os.getppid())",
        "import matplotlib.pyplot as plt; plt.plot([1, 2]); 'drawn'",
        "import os; os._exit(7)",
    )
    assert status.error == "DeadKernelError: Kernel died"
    assert "image/png" in output.read_text()
    loaded, parent = texts(output).split()
    assert loaded == "True" and int(parent) in {child.pid for child in children.running}
    status, _ = run(tmp_path, "while True: pass", timeout=1)
    assert status.error == "a cell passed the limit of 1 s"
    server = psutil.Process(int(parent))
    assert until(lambda: not server.children())


def test_after_the_server_was_killed_everything_starts_plainly(tmp_path, monkeypatch):
    server = "from nbhelpers import forkserver; forkserver.preload = lambda: None; forkserver.main()"
    monkeypatch.setattr(processes, "SERVER", ("-c", server))
    group = processes.Children(threads=1, preload={})
    first = group.start("-m", "timeit", "-n", "1", "import time; time.sleep(600)")
    assert isinstance(first, forked.Forked)
    [running] = [child for child in group.running if child is not first]
    running.kill()
    assert group.wait(first, 30) == forked.LOST and until(lambda: gone(first.pid))
    later = group.start("-m", "this", stdout=subprocess.PIPE)
    assert isinstance(later, subprocess.Popen) and "Zen" in later.communicate()[0]
    assert "no answer from the fork server" in group.plain
    group.stop()


def test_without_a_server_everything_starts_plainly(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(processes, "SERVER", ("-c", "raise SystemExit(1)"))
    group = processes.Children(threads=1, preload={})
    child = group.start("-m", "this", stdout=subprocess.PIPE)
    assert isinstance(child, subprocess.Popen) and "Zen" in child.communicate()[0]
    assert "no answer from the fork server" in group.plain
    assert forked.ADDRESS not in group.environment
    group.stop()
    monkeypatch.setenv(forked.ADDRESS, str(tmp_path / "nobody"))
    status, output = run(tmp_path, "import sys; print('torch' in sys.modules)")
    assert status.error is None and texts(output) == "False\n"
    assert "this kernel is started plainly: no answer from the fork server" in capfd.readouterr().err


def test_the_server_ends_with_who_started_it(children):
    server = "from nbhelpers import forkserver; forkserver.preload = lambda: None; forkserver.main()"
    code = (
        f"import os\nfrom nbhelpers import processes\nprocesses.SERVER = ('-c', {server!r})\n"
        "group = processes.Children(1, preload={})\ngroup.start('-m', 'said', 'family')\n"
        "print(*(child.pid for child in group.running), flush=True)\nos._exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2 and until(lambda: all(map(gone, pids)))
