"""The processes of a run: kernels and steps, on Linux forked from a server that has the libraries loaded.

The server is ``multiprocessing``'s own. It only imports: no thread, tensor or accelerator survives a fork. It
and all that it forked end with this process, even when that is killed.
"""

import asyncio
import contextlib
import ctypes
import functools
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
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

from nbhelpers import store

FORKS = sys.platform == "linux"  # elsewhere forking after imports is not safe
PRELOAD = ["nbhelpers.runner.preload"]
ENVIRONMENT = {  # the libraries read it when they are imported
    **{"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore"},
    "MLFLOW_DISABLE_TELEMETRY": os.environ.get("MLFLOW_DISABLE_TELEMETRY", "true"),
    "JPY_PARENT_PID": "1",  # ipykernel need not watch for the runner's end: _end_with_runner does
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
}
LOG = "run.log"  # beside the notebooks: what their kernels print
LONGEST = 60  # characters of a folder whose sockets still have short enough names: 107 on Linux
PR_SET_PDEATHSIG = 1  # prctl(2): the signal a process gets when its parent ends

_lock = threading.Lock()


@contextlib.contextmanager
def environment(threads: str) -> Iterator[None]:
    """What is started meanwhile has so many threads in its numerical libraries, and no progress bars."""
    old_environment, old_folder = dict(os.environ), tempfile.gettempdir()
    tempfile.tempdir = str(_temporary()[0])
    os.environ.update(ENVIRONMENT | {"OMP_NUM_THREADS": threads, "TMPDIR": tempfile.tempdir})
    try:
        yield
    finally:
        tempfile.tempdir = old_folder
        os.environ.clear()
        os.environ.update(old_environment)


@functools.cache
def _temporary() -> tuple[Path, FileLock]:
    """This process's folder for sockets and whatever kernels leave, and the lock that says it is in use.

    The system frees the lock of a process that was killed: the next one removes its folder.
    """
    parent = tempfile.gettempdir()
    if FORKS and len(parent) > LONGEST:
        parent = "/tmp"
    for abandoned in Path(parent).glob("nbhelpers_*"):
        with contextlib.suppress(OSError), FileLock(abandoned / "lock", timeout=0):
            shutil.rmtree(abandoned, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix="nbhelpers_", dir=parent))
    (lock := FileLock(folder / "lock")).acquire()
    # After multiprocessing has removed its own from it, at -100.
    util.Finalize(None, shutil.rmtree, (folder, True), exitpriority=-200)
    return folder, lock


def serve(log: Path) -> None:
    """Start the server, which imports for seconds and prints to the log."""
    if FORKS:
        forkserver.set_forkserver_preload(PRELOAD)
        with log.open("a") as out, os.fdopen(os.dup(2)) as stderr:
            os.dup2(out.fileno(), 2)
            try:
                forkserver.ensure_running()
            finally:
                os.dup2(stderr.fileno(), 2)


def start(log: Path, target: Callable[..., object], *arguments: Any) -> BaseProcess:
    """Call a module's function in a process of its own, which prints to the log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    context: Any = multiprocessing.get_context("forkserver" if FORKS else "spawn")
    copied = (log, dict(os.environ), target, *arguments)
    process: BaseProcess = context.Process(target=_become, args=copied, name=str(log))
    with _lock:  # multiprocessing would run the script that this process runs in every one that it starts
        main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
        try:
            process.start()
        except (EOFError, ConnectionError):  # the server was killed: once it has ended, there is another
            time.sleep(1)
            process.start()
        finally:
            sys.modules["__main__"] = main
    return process


def _become(log: Path, environment: dict[str, str], target: Callable[..., object], *arguments: Any) -> None:
    """Turn the forked copy of the server into the process that was asked for."""
    if FORKS:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # it ends with the server
        parent = psutil.Process(os.getppid())
        if multiprocessing.parent_process().pid not in (parent.pid, parent.ppid()):  # type: ignore[union-attr]
            os._exit(1)  # the server ended before it was watched
        os.setsid()
    threading.Thread(target=_end_with_runner, daemon=True).start()
    with log.open("a") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    target(*arguments)


def _end_with_runner() -> None:
    wait([multiprocessing.parent_process().sentinel])  # type: ignore[union-attr]
    kill_tree(os.getpid())


class Provisioner(LocalProvisioner):
    """Kernels of this interpreter, whatever the kernel's specification names."""

    log_file = Unicode(os.devnull).tag(config=True)
    process: Any = None

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> Any:
        self.process = start(Path(self.log_file), _kernel, self.parent.connection_file)  # type: ignore[union-attr]
        self.pid = self.pgid = self.process.pid
        return self.connection_info

    async def poll(self) -> int | None:
        return self.process.exitcode if self.process else 0

    async def wait(self) -> None:
        while await self.poll() is None:
            await asyncio.sleep(0.05)
        self.process = None

    async def kill(self, restart: bool = False) -> None:
        kill_tree(self.pid or 0)


def _kernel(connection_file: str) -> None:
    from ipykernel import kernelapp

    sys.path.append(str(store.project_root()))  # notebooks use tools/, which no installed package has
    kernelapp.launch_new_instance(["-f", connection_file])


@contextlib.contextmanager
def kernel_config(log: Path) -> Iterator[Config]:
    """What makes a kernel ours. TCP ports of several may collide, sockets in a folder of their own cannot."""
    factory = KernelProvisionerFactory.instance()
    factory.provisioners["run"] = EntryPoint("run", f"{__name__}:Provisioner", factory.GROUP_NAME)
    factory.default_provisioner_name = "run"
    with tempfile.TemporaryDirectory(prefix="nb", dir=_temporary()[0]) as sockets:
        manager = {"transport": "ipc", "ip": f"{sockets}/k"} if os.name == "posix" else {}
        yield Config({"Provisioner": {"log_file": str(log)}, "KernelManager": manager})


def exit_code(process: BaseProcess, limit_s: float) -> int | None:
    """Of a process that ends within so many seconds; None of one that does not."""
    wait([process.sentinel], limit_s)
    with _lock:  # a pipe holds it once: two threads that read it together take a success for a failure
        return process.exitcode


def kill(where: Path) -> None:
    """Kill what prints to this log, or to a log in this folder."""
    with _lock:  # it reads exit codes too
        running = multiprocessing.active_children()
    for process in running:
        if Path(process.name).is_relative_to(where):
            kill_tree(process.pid or 0)


def kill_tree(pid: int) -> None:
    """Kill a process and its descendants: those in sessions of their own survive a signal to the group."""
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        family = [*root.children(recursive=True), root]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=10)
