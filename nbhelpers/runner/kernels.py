"""The processes of a run: kernels and steps, on Linux forked from a server that has the libraries loaded.

The server is ``multiprocessing``'s own. It only imports: no thread, tensor or accelerator survives a fork. It
and all that it forked end with this process, even when that is killed.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import gc
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from multiprocessing import forkserver, util
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
from filelock import FileLock
from jupyter_client.provisioning import KernelProvisionerFactory, LocalProvisioner
from traitlets import Unicode
from traitlets.config import Config

FORKS = sys.platform == "linux"
PRELOAD = [
    *("ipykernel.kernelapp", "matplotlib.pyplot", "scipy.stats", "pandas", "mlflow.tracking", "torch"),
    *("transformers", "transformers.generation", "huggingface_hub"),
    *(f"transformers.models.{name}.modeling_{name}" for name in ("gpt2", "bloom", "opt", "llama")),
    *("nbhelpers.cli", "nbhelpers.pipeline", "nbhelpers.report.html", "nbhelpers.tracking.mlflow_run"),
]
ENVIRONMENT = {  # the libraries read it when they are imported
    **{"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore"},
    "MLFLOW_DISABLE_TELEMETRY": os.environ.get("MLFLOW_DISABLE_TELEMETRY", "true"),
    "JPY_PARENT_PID": "1",  # ipykernel need not watch for the runner's end: _end_with_runner does
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
}
LOG = "run.log"  # beside the notebooks: what their kernels print
SOCKET_PATH_LIMIT = 100  # characters; Linux allows 107, macOS 103
PR_SET_PDEATHSIG = 1  # prctl(2): the signal a process gets when its parent ends

plain = "" if FORKS else "this system cannot fork safely"  # why processes are not forked
_lock = threading.Lock()
_running: list[tuple[Path, Any]] = []  # (log, process), ended ones too


@contextlib.contextmanager
def environment(threads: str) -> Iterator[None]:
    """What is started meanwhile has so many threads in its numerical libraries, and no progress bars."""
    before, outer, folder = dict(os.environ), tempfile.gettempdir(), str(_temporary()[0])
    os.environ.update(ENVIRONMENT | {"OMP_NUM_THREADS": threads, "TMPDIR": folder})
    tempfile.tempdir = folder
    try:
        yield
    finally:
        tempfile.tempdir = outer
        os.environ.clear()
        os.environ.update(before)


@functools.cache
def _temporary() -> tuple[Path, FileLock]:
    """This process's folder for sockets, connection files and whatever kernels leave, and its lock.

    The system frees the lock of a process that was killed: whoever comes next removes its folder, and one
    without a lock, which a server that was still importing has made again.
    """
    for left in Path(tempfile.gettempdir()).glob("nbhelpers_*"):
        with contextlib.suppress(OSError), FileLock(left / "lock", timeout=0):
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix="nbhelpers_"))
    (lock := FileLock(folder / "lock")).acquire()
    # After multiprocessing has removed its own from it, at -100.
    util.Finalize(None, shutil.rmtree, (folder, True), exitpriority=-200)
    return folder, lock


def serve(log: Path) -> None:
    """Start the server, which imports for seconds. It prints to the log and gets no Ctrl-C."""
    global plain
    if plain:
        return
    stderr, before = os.dup(2), signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with log.open("a") as out:
            os.dup2(out.fileno(), 2)
        forkserver.set_forkserver_preload(PRELOAD)
        forkserver.ensure_running()
    except OSError as error:
        plain = f"no fork server ({error})"
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start(log: Path, target: Callable[..., object], *arguments: Any) -> Process:
    """Call a module's function in a process of its own, which prints to the log."""
    global plain
    log.parent.mkdir(parents=True, exist_ok=True)
    context: Any = multiprocessing.get_context("spawn" if plain else "forkserver")
    process = context.Process(target=_become, args=(log, dict(os.environ), Path.cwd(), target, *arguments))
    with _lock:  # multiprocessing would run the script that this process runs in every one that it starts
        main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
        try:
            process.start()
            _running.append((log, started := Process(process)))
            return started
        except (OSError, EOFError) as error:
            if plain:
                raise
            plain = f"no answer from the fork server ({error or 'it ended'})"
        finally:
            sys.modules["__main__"] = main
    return start(log, target, *arguments)


def _become(log: Path, environment: dict[str, str], folder: Path, target: Any, *arguments: Any) -> None:
    """Turn the forked copy of the server into the process that was asked for."""
    if FORKS:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        parent = psutil.Process(os.getppid())
        if multiprocessing.parent_process().pid not in (parent.pid, parent.ppid()):  # type: ignore[union-attr]
            os._exit(1)  # the server ended before it was watched
        os.setsid()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_with_runner, daemon=True).start()
    gc.freeze()  # the collector would otherwise touch, and so copy, every shared page
    with log.open("a") as out, Path(os.devnull).open() as null:
        for number, stream in enumerate((null, out, out)):
            os.dup2(stream.fileno(), number)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # the server may have asked for it in an earlier run
    os.chdir(folder)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()  # seeded before the fork; the module random does it itself
    try:
        target(*arguments)
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out


def _end_with_runner() -> None:
    wait([multiprocessing.parent_process().sentinel])  # type: ignore[union-attr]
    kill_tree(os.getpid())


class Process:
    """What jupyter_client uses of subprocess.Popen, for a process of multiprocessing."""

    stdin = stdout = stderr = None

    def __init__(self, process: BaseProcess) -> None:
        self.process, self.pid = process, process.pid or 0

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        self.process.join(timeout)
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


class Provisioner(LocalProvisioner):
    """Kernels of this interpreter, whatever the kernel's specification names."""

    log_file = Unicode(os.devnull).tag(config=True)

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> Any:
        file = self.parent.connection_file  # type: ignore[union-attr]
        self.process = start(Path(self.log_file), _kernel, file)  # type: ignore[assignment]
        self.pid = self.pgid = self.process.pid  # type: ignore[union-attr]
        return self.connection_info

    async def kill(self, restart: bool = False) -> None:
        kill_tree(self.pid or 0)


def _kernel(connection_file: str) -> None:
    from ipykernel import kernelapp

    kernelapp.launch_new_instance(["-f", connection_file])


def kernel_config(log: Path, sockets: str) -> Config:
    """What makes a kernel ours. TCP ports of several may collide, sockets in a folder of their own cannot."""
    factory = KernelProvisionerFactory.instance()
    factory.provisioners["run"] = EntryPoint("run", f"{__name__}:Provisioner", factory.GROUP_NAME)
    factory.default_provisioner_name = "run"
    config = Config({"Provisioner": {"log_file": str(log)}})
    if os.name == "posix" and len(sockets) <= SOCKET_PATH_LIMIT:
        config.KernelManager = Config(transport="ipc", ip=f"{sockets}/k")
    return config


def kill(log: Path | None = None) -> None:
    """Kill what prints to a log, or everything."""
    for where, process in list(_running):
        if log in (None, where) and process.poll() is None:
            kill_tree(process.pid)


def kill_tree(pid: int) -> None:
    """Kill a process and its descendants: those in sessions of their own survive a signal to the group."""
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        family = [*root.children(recursive=True), root]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=10)
