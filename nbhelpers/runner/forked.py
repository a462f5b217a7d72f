"""Processes forked from a server that has the heavy libraries loaded: milliseconds instead of seconds.

The client's half of :mod:`nbhelpers.runner.forkserver`. A process asked for is ``python -m MODULE ARGUMENTS`` and
behaves as if started so, in a session of its own. Its life hangs on one connection: the server writes the
exit status to it, and kills the process with its descendants when the client's end closes, so that what a
dead client started does not survive it. Linux only; whoever asks has a plain start to fall back on.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence

ADDRESS = "NBHELPERS_FORK_SERVER"  # environment variable: the path of the server's socket
NUMBER = 8  # bytes of the server's two answers, process id and exit status, in decimal
START_S = 120.0  # the server may still be importing when the first process is asked for
LOST = -int(signal.SIGKILL)  # the exit status of a process whose server is gone: it went down with it


class Forked:
    """What callers use of subprocess.Popen, for a forked process; `pid` is also its process group."""

    stdin = stdout = stderr = None

    def __init__(
        self, arguments: Sequence[str], environment: Mapping[str, str], streams: Sequence[int], cwd: str
    ) -> None:
        """arguments: MODULE and its arguments. streams: descriptors of the three standard streams.

        Raises OSError where no server answers.
        """
        self.returncode: int | None = None
        request = {"arguments": list(arguments), "environment": dict(environment), "cwd": cwd}
        self._server = socket.socket(socket.AF_UNIX)
        try:
            self._server.settimeout(START_S)
            self._server.connect(environment[ADDRESS])
            socket.send_fds(self._server, [b"3"], list(streams))
            self._server.sendall(json.dumps(request).encode() + b"\n")
            self.pid = int(self._server.recv(NUMBER))
        except (OSError, KeyError, ValueError) as error:  # ValueError: the server closed the connection
            self._server.close()
            raise OSError(f"no answer from the fork server ({error})") from None

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, minus the signal's number if one ended it. Raises TimeoutExpired."""
        if self.returncode is None:
            self._server.settimeout(timeout)
            try:
                answer = self._server.recv(NUMBER)
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired("a forked process", timeout or 0) from None
            except OSError:
                answer = b""
            self.returncode = int(answer or LOST)
            self._server.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


def possible() -> bool:
    return sys.platform == "linux"
