"""`nbhelpers ui` with MLflow's real server: the link it prints, and what it says of a taken port."""

import json
import os
import signal
import socket
import subprocess
import sys
from urllib.request import ProxyHandler, build_opener

import psutil
import pytest

from nbhelpers import cli
from nbhelpers.tracking import mlflow_run

COMMAND = [sys.executable, "-m", "nbhelpers.cli", "ui", "--port"]


@pytest.fixture
def own_outputs(tmp_path, monkeypatch):
    monkeypatch.setenv("NBHELPERS_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


def test_a_port_that_is_taken_is_one_sentence(own_outputs):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = subprocess.run([*COMMAND, f"{port}"], capture_output=True, text=True, cwd=own_outputs)
    assert (ended.returncode, ended.stdout) == (2, "")
    [line] = ended.stderr.splitlines()
    assert line.startswith(f"nbhelpers: Port {port} of 127.0.0.1 cannot be used (")
    assert line.endswith("): choose another by --port.")


@pytest.mark.skipif(os.name != "posix", reason="SIGINT to one process")
def test_the_link_opens_on_the_runs_and_nothing_is_left_after_ctrl_c(own_outputs, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shown = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*COMMAND, f"{port}"], cwd=own_outputs, **shown)
    family = []
    try:
        link = process.stdout.readline().strip()
        address, _, number = link.removesuffix("/runs").partition("/#/experiments/")
        assert address == f"http://127.0.0.1:{port}"
        asked = f"{address}/api/2.0/mlflow/experiments/get?experiment_id={number}"
        with build_opener(ProxyHandler({})).open(asked, timeout=120) as answer:
            assert json.load(answer)["experiment"]["name"] == mlflow_run.EXPERIMENT
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:secret@127.0.0.1:{port}/")
        cli.ui(port)  # of a server that is there it only says where
        assert capsys.readouterr().out.strip() == link
        family = psutil.Process(process.pid).children(recursive=True)
        assert family
        process.send_signal(signal.SIGINT)
        said, warned = process.communicate(timeout=120)
        assert (process.returncode, said, warned) == (0, "", "")
        assert psutil.wait_procs(family, timeout=30)[1] == []
        assert [path.name for path in own_outputs.iterdir()] == ["outputs"]
    finally:
        for one in [process, *family]:
            if one.is_running() if isinstance(one, psutil.Process) else one.poll() is None:
                one.kill()
