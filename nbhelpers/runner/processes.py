"""Child processes that are started together and, if need be, all stopped at once with their descendants."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import DEVNULL
from typing import IO, Any

from nbhelpers.runner.forked import ADDRESS, Forked, possible

Stream = int | IO[Any]
SERVER = ("-m", "nbhelpers.runner.forkserver")
Child = subprocess.Popen[str] | Forked


class Stopping(Exception):
    """Raised instead of starting a child once the group has been stopped."""


class Children:
    """A group of Python processes, each in a session of its own. Safe to use from several threads."""

    def __init__(self, threads: int, preload: Mapping[str, str] | None = None) -> None:
        """threads: for each child's numerical libraries, unless the user set OMP_NUM_THREADS.

        preload: have modules forked by a server that starts with these environment variables as well, where
        that is possible; `plain` then says why it is not. Without it every child is started plainly.
        """
        self.environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        self.environment.pop(ADDRESS, None)
        self.preload = preload
        self.plain = "" if preload is not None and possible() else "this system cannot fork safely"
        self.running: set[Child] = set()
        self.stopping = False
        self._lock = threading.Lock()
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def start(self, *arguments: str, stdout: Stream = DEVNULL, stderr: Stream = DEVNULL) -> Child:
        """Start this interpreter with some arguments. Raises Stopping after stop()."""
        forked = self._fork(arguments, stdout, stderr)
        with self._lock:
            if self.stopping:  # the server is dead, and what it forked with it
                raise Stopping
            child = forked or _popen(arguments, self.environment, DEVNULL, stdout, stderr)
            self.running.add(child)
        return child

    def _fork(self, arguments: Sequence[str], stdout: Stream, stderr: Stream) -> Forked | None:
        """The same process from the fork server; None, and the reason in `plain`, where that fails."""
        if arguments[0] != "-m" or self.plain or self.stopping:
            return None
        with Path(os.devnull).open("r+b", buffering=0) as null:
            given = [null if stream == DEVNULL else stream for stream in (DEVNULL, stdout, stderr)]
            streams = [stream if isinstance(stream, int) else stream.fileno() for stream in given]
            try:
                self._serve(stderr)
                return Forked(arguments[1:], self.environment, streams, str(Path.cwd()))
            except OSError as error:
                self.plain = str(error)
                self.environment.pop(ADDRESS, None)
                return None

    def _serve(self, log: Stream) -> None:
        """Start the fork server, unless it runs. Raises OSError where no socket can be made."""
        with self._lock:
            if self._folder is not None or self.stopping:
                return
            self._folder = tempfile.TemporaryDirectory(prefix="nb")  # nobody else may enter it
            address = f"{self._folder.name}/fork"
            environment = {**self.environment, **(self.preload or {})}
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(address)
                listener.listen(64)
                server = _popen((*SERVER, str(os.getpid())), environment, listener, DEVNULL, log)
            self.running.add(server)
            self.environment[ADDRESS] = address

    def wait(self, child: Child, timeout: float | None = None) -> int:
        """The exit status of a child; past the timeout (seconds) it is killed with its descendants."""
        try:
            status = child.wait(timeout)
        except subprocess.TimeoutExpired:
            kill_tree(child.pid)
            status = child.wait()
        with self._lock:
            self.running.discard(child)
        return status

    def stop(self) -> None:
        """Kill every child that still runs, the fork server too; none can be started any more."""
        with self._lock:
            self.stopping = True
            running = list(self.running)
        for child in running:
            kill_tree(child.pid)
        if self._folder:
            self._folder.cleanup()


def _popen(
    arguments: Sequence[str], environment: Mapping[str, str], stdin: Any, stdout: Any, stderr: Any
) -> subprocess.Popen[str]:
    streams = {"stdin": stdin, "stdout": stdout, "stderr": stderr}
    command = [sys.executable, *arguments]
    return subprocess.Popen(command, **streams, text=True, env=environment, start_new_session=True)


def kill_tree(pid: int) -> None:
    """Kill a process and all its descendants: kernels start sessions of their own and survive otherwise."""
    import psutil

    try:
        root = psutil.Process(pid)
        family = [*root.children(recursive=True), root]
    except psutil.NoSuchProcess:
        return
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(family, timeout=10)


def end_with_parent() -> None:
    """Have this process, with its descendants, killed when the one that started it ends."""

    def watch(parent: int) -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        kill_tree(os.getpid())

    threading.Thread(target=watch, args=(os.getppid(),), daemon=True).start()
