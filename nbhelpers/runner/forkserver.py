"""The server that forks: ``python -m nbhelpers.runner.forkserver PARENT``, a listening socket as standard input.

It imports what workers and notebooks import, once, then forks itself for each request of
:class:`nbhelpers.runner.forked.Forked` and runs the module that was asked for in the child. Only importing happens
before a fork: no thread is started, no tensor computed and no accelerator touched, because none of these
survives one. It ends with the process PARENT that started it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
from typing import Any

from nbhelpers.loading.load import quiet_torchao
from nbhelpers.runner.processes import kill_tree
from nbhelpers.tracking.mlflow_run import quiet_mlflow

PRELOAD = (
    *("ipykernel.kernelapp", "papermill", "nbconvert", "nbclient", "matplotlib.pyplot", "scipy.stats"),
    *("torch", "transformers", "transformers.generation", "huggingface_hub", "mlflow.tracking", "pandas"),
    *(f"transformers.models.{name}.modeling_{name}" for name in ("gpt2", "bloom", "opt", "llama")),
    *(
        "nbhelpers.runner.notebook",
        "nbhelpers.tracking.result",
        "nbhelpers.report.html",
        "nbhelpers.scoring.validity",
        "nbhelpers.scoring.judge",
    ),
)

PR_SET_PDEATHSIG = 1  # prctl(2): the signal a process gets when its parent ends


class Server:
    """One thread, one selector: new requests, ends of children, and clients that are gone."""

    def __init__(self, listener: socket.socket, parent: int) -> None:
        self.listener, self.parent = listener, parent
        self.selector = selectors.DefaultSelector()
        self.selector.register(listener, selectors.EVENT_READ, self._accept)

    def serve(self) -> list[str] | None:
        """Fork until the parent is gone (None); in a child, return what the child is to run."""
        while os.getppid() == self.parent:
            for key, _ in self.selector.select(timeout=1.0):
                if self.selector.get_map().get(key.fd) is key and (arguments := key.data()):
                    return arguments
        kill_tree(os.getpid())
        return None

    def _accept(self) -> list[str] | None:
        client, _ = self.listener.accept()
        try:
            _, streams, _, _ = socket.recv_fds(client, 1, 3)
            with client.makefile("rb") as lines:
                request = json.loads(lines.readline())
        except (OSError, ValueError):  # the client is gone already
            client.close()
            return None
        pid = os.fork()
        if pid == 0:
            self._become(request, streams, client)
            return request["arguments"]
        for stream in streams:
            os.close(stream)
        self._follow(pid, client)
        return None

    def _become(self, request: dict[str, Any], streams: list[int], client: socket.socket) -> None:
        """Turn the forked copy into the process that was asked for."""
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.setsid()
        for target, stream in enumerate(streams):
            os.dup2(stream, target)
        client.sendall(b"%8d" % os.getpid())
        for key in list(self.selector.get_map().values()):
            os.close(key.fd)  # the ends of others: they must close when their owner dies
        self.selector.close()
        for descriptor in (*streams, client.detach()):
            os.close(descriptor)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["cwd"])

    def _follow(self, pid: int, client: socket.socket) -> None:
        end = os.pidfd_open(pid)

        def ended() -> None:
            self.selector.unregister(end)
            self.selector.unregister(client)
            os.close(end)
            with contextlib.suppress(OSError):  # nobody may be listening any more
                client.sendall(b"%8d" % _reap(pid))
            client.close()

        def gone() -> None:
            kill_tree(pid)
            ended()

        self.selector.register(end, selectors.EVENT_READ, ended)
        self.selector.register(client, selectors.EVENT_READ, gone)


def _reap(pid: int) -> int:
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except ChildProcessError:  # kill_tree has waited for it
        return -9


def preload() -> None:
    """Import what is installed of PRELOAD. Raises RuntimeError if a fork would no longer be safe."""
    quiet_mlflow()
    quiet_torchao()
    for name in PRELOAD:
        if os.getppid() != int(sys.argv[1]):
            sys.exit("whoever started the fork server is gone")
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    import torch

    if torch.cuda.is_initialized():
        raise RuntimeError("an accelerator is in use before the first fork")
    gc.collect()
    gc.freeze()  # the collector would otherwise touch, and so copy, every shared page


def main() -> None:
    os.environ["JPY_PARENT_PID"] = "1"  # read by ipykernel's import: somebody else ends the kernels
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"  # read by matplotlib's import
    listener = socket.socket(fileno=os.dup(0))
    preload()
    arguments = Server(listener, int(sys.argv[1])).serve()
    if arguments is None:
        return
    import numpy

    numpy.random.seed()  # the global generator was seeded before the fork; random seeds itself
    sys.argv = arguments
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
