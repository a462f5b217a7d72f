"""Notebooks from 20 on are executed without a network (conftest.py): here the guard itself is tried."""

import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = "192.0.2.1"  # kept for documentation: no machine has it, so that a connection waits


@pytest.mark.parametrize(
    ("code", "tried"),
    [
        (f"socket.create_connection(('{OUTSIDE}', 80))", f"socket.getaddrinfo {OUTSIDE}"),
        (f"socket.socket().connect(('{OUTSIDE}', 80))", f"socket.connect {OUTSIDE}"),
        (f"socket.socket(type=socket.SOCK_DGRAM).sendto(b'', ('{OUTSIDE}', 80))", f"socket.sendto {OUTSIDE}"),
        ("socket.gethostbyname('example.org')", "socket.gethostbyname example.org"),
        ("socket.getaddrinfo(b'example.org', 80)", "socket.getaddrinfo example.org"),
        (
            "server = socket.create_server(('localhost', 0)); socket.create_connection(server.getsockname())",
            "",
        ),
        ("socket.getaddrinfo(None, 80); socket.gethostbyname(socket.gethostname()); socket.socketpair()", ""),
    ],
)
def test_other_machines_are_out_of_reach_and_this_one_is_not(code, tried, tmp_path):
    noted = tmp_path / "tried"
    env = os.environ | {"PYTHONPATH": str(ROOT / "tests" / "offline"), "NBHELPERS_TRIED": str(noted)}
    began = time.monotonic()
    run = [sys.executable, "-c", f"import socket; {code}"]
    done = subprocess.run(run, env=env, capture_output=True, text=True)
    assert time.monotonic() - began < 30
    assert ("no network" in done.stderr) == bool(tried) == bool(done.returncode), done.stderr
    assert (noted.read_text() if noted.exists() else "").strip() == tried


def test_a_notebook_that_reaches_out_fails_even_if_it_hides_that(tmp_path):
    hidden = "try:\n    import socket; socket.gethostbyname('example.org')\nexcept OSError:\n    pass"
    cell = nbformat.v4.new_code_cell(hidden, execution_count=1)
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=kernel), tmp_path / "20_reaching.ipynb")
    run = [
        sys.executable,
        "-m",
        "pytest",
        "--nbval",
        "-p",
        "conftest",
        "-p",
        "no:cacheprovider",
        str(tmp_path),
    ]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert "reached for the network: socket.gethostbyname example.org" in done.stdout, done.stdout
    assert done.returncode == 1
