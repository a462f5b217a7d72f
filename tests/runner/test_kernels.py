"""Processes from the fork server: real ones, their environment, their ends, and what happens without it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import forkserver
from pathlib import Path

import psutil
import pytest
from test_notebook import run, texts

from nbhelpers.records import Failure
from nbhelpers.runner import kernels

pytestmark = pytest.mark.skipif(not kernels.FORKS, reason="forking after imports is safe on Linux only")


@pytest.fixture(scope="module", autouse=True)
def server(tmp_path_factory):
    """This process's fork server, with the libraries loaded."""
    folder = tmp_path_factory.mktemp("server")
    forkserver._forkserver._stop()  # an earlier test's, which may have loaded nothing
    with kernels.environment("1"):
        kernels.serve(folder / "log")
        yield


def facts() -> None:
    import gc
    import random
    import threading

    found = {
        "collects": gc.isenabled(),  # what the server does not while it imports
        "frozen": gc.get_freeze_count() > 100_000,  # what the server imported
        "modules": sorted({"torch", "transformers", "mlflow"} & set(sys.modules)),
        "cwd": str(Path.cwd()),
        "mark": os.environ.get("MARK"),
        "stdin": sys.stdin.read(),
        "leader": os.getpgid(0) == os.getpid(),
        "threads": threading.active_count(),
        "drawn": random.random(),
        "tqdm": os.environ.get("TQDM_DISABLE"),
    }
    import torch

    found |= {"sum": float((torch.ones(300, 300) @ torch.ones(300, 300)).sum())}
    print(json.dumps(found), flush=True)
    sys.exit(3)


def family() -> None:
    """A process with a child in a session of its own, as kernels may have."""
    code = [sys.executable, "-c", "import time; time.sleep(600)"]
    print(subprocess.Popen(code, start_new_session=True).pid, flush=True)
    time.sleep(600)


def until(condition) -> bool:
    limit = time.monotonic() + 60
    while not condition() and time.monotonic() < limit:
        time.sleep(0.02)
    return condition()


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def server_pid() -> int:
    [server] = [
        child.pid
        for child in psutil.Process().children()
        if "multiprocessing.forkserver" in " ".join(child.cmdline()) and not gone(child.pid)
    ]
    return server


def test_a_forked_process_is_as_if_started_with_the_libraries_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MARK", "here")
    found = []
    for number in range(2):
        log = tmp_path / f"{number}.log"
        process = kernels.start(log, facts)
        process.join(120)
        assert process.exitcode == 3
        found.append(json.loads(log.read_text()))
    for fact in found:
        assert fact["modules"] == ["mlflow", "torch", "transformers"]
        assert (fact["mark"], fact["cwd"], fact["stdin"]) == ("here", str(tmp_path), "")
        assert (fact["leader"], fact["tqdm"], fact["threads"]) == (True, "1", 2)  # one waits for our end
        assert fact["sum"] == 300.0**3
        assert fact["frozen"] and fact["collects"]
    assert found[0]["drawn"] != found[1]["drawn"]


def test_killing_reaches_what_a_process_started(tmp_path):
    log = tmp_path / "log"
    process = kernels.start(log, family)
    assert until(lambda: log.exists() and log.read_text().endswith("\n"))
    kernels.kill(tmp_path / "another log")
    assert process.is_alive()
    kernels.kill(log)
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    assert until(lambda: gone(process.pid) and gone(int(log.read_text())))


def test_whoever_looks_at_the_processes_meanwhile_leaves_their_exit_codes(tmp_path, monkeypatch):
    """The moment in which two threads may read one exit code is made longer."""
    read, ended = forkserver.read_signed, threading.Event()
    monkeypatch.setattr(forkserver, "read_signed", lambda pipe: time.sleep(0.1) or read(pipe))

    def look() -> None:
        while not ended.is_set():
            kernels.kill(tmp_path / "another log")

    (looker := threading.Thread(target=look)).start()
    try:
        codes = [kernels.exit_code(kernels.start(tmp_path / "log", os.getpid), 60) for _ in range(5)]
    finally:
        ended.set()
        looker.join()
    assert codes == [0] * 5
    assert kernels.exit_code(late := kernels.start(tmp_path / "log", family), 0.1) is None
    kernels.kill(tmp_path / "log")
    assert kernels.exit_code(late, 60) == -signal.SIGKILL


RUNNER = """
import os, sys, time
from pathlib import Path
import test_kernels
from nbhelpers.runner import kernels
if {bare}:
    kernels.PRELOAD.clear()
log = Path(sys.argv[1])
kernels.serve(log)
print(kernels.start(log, test_kernels.family).pid, test_kernels.server_pid(), flush=True)
while not log.exists() or not log.read_text().endswith("\\n"): time.sleep(0.01)
os.kill(os.getpid(), 9)
"""


def test_what_a_killed_runner_started_does_not_survive_it(tmp_path):
    log = tmp_path / "log"
    command = [sys.executable, "-c", RUNNER.format(bare=True), str(log)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    pids = [int(pid) for pid in (done.stdout + log.read_text()).split()]
    assert len(pids) == 3, done.stderr
    assert until(lambda: all(map(gone, pids)))


def test_a_script_is_not_run_again_by_what_it_starts(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\nfrom nbhelpers.runner import kernels\nprint('once', flush=True)\n"
        f"(started := kernels.start(Path({str(tmp_path / 'log')!r}), print, 'here')).join(60)\n"
        "print(started.exitcode)"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.stdout == "once\n0\n", done.stderr
    assert (tmp_path / "log").read_text() == "here\n"


def test_notebooks_run_in_forked_kernels(tmp_path):
    """Pictures included: matplotlib was loaded before there was a notebook to show them in."""
    status, output = run(
        tmp_path,
        "import os, sys; print('torch' in sys.modules, os.getppid())",
        "import matplotlib.pyplot as plt; plt.plot([1, 2]); 'drawn'",
        "import os; os._exit(7)",
    )
    assert status.error == "DeadKernelError: Kernel died"
    assert "image/png" in output.read_text()
    assert texts(output) == f"True {server_pid()}\n"
    status, _ = run(tmp_path, "while True: pass", timeout=1)
    assert status.failure is Failure.TIMEOUT
    assert until(lambda: not psutil.Process(server_pid()).children())


def test_a_server_that_was_killed_is_started_again(tmp_path, monkeypatch):
    first = kernels.start(tmp_path / "log", family)
    old = server_pid()
    os.kill(old, signal.SIGKILL)
    first.join(30)
    assert first.exitcode != 0 and until(lambda: gone(first.pid))
    forkserver.set_forkserver_preload([])
    second = kernels.start(tmp_path / "log", family)
    assert second.is_alive() and server_pid() != old
    kernels.kill(tmp_path)
    assert until(lambda: gone(second.pid))


def test_a_server_that_is_killed_while_it_imports_costs_nothing(tmp_path):
    code = (
        "import os, threading\nfrom pathlib import Path\nimport test_kernels\n"
        "from nbhelpers.runner import kernels\nkernels.PRELOAD[:] = ['torch']\nkernels.serve(Path('log'))\n"
        "threading.Timer(0.2, os.kill, [test_kernels.server_pid(), 9]).start()\n"
        "(started := kernels.start(Path('log'), print, 'here')).join(60)\nprint(started.exitcode)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.stdout == "0\n", done.stderr


def test_where_forking_is_not_safe_everything_starts_plainly(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "FORKS", False)
    status, output = run(tmp_path, "import sys; print('torch' in sys.modules)")
    assert status.error is None and texts(output) == "False\n"


GENERATIONS = """
import subprocess, sys, time
left = int(sys.argv[1])
if left:
    subprocess.Popen([sys.executable, "-c", sys.argv[2], str(left - 1), sys.argv[2]], start_new_session=True)
else:
    print("ready", flush=True)
time.sleep(600)
"""


def test_kill_tree_reaches_every_generation():
    command = [sys.executable, "-c", GENERATIONS, "2", GENERATIONS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as root:
        assert root.stdout.readline() == "ready\n"
        family = [root.pid, *(p.pid for p in psutil.Process(root.pid).children(recursive=True))]
        assert len(family) == 3
        kernels.kill_tree(root.pid)
    assert all(gone(pid) for pid in family)
    kernels.kill_tree(root.pid)  # a process that is no more
