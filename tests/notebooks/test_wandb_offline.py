"""W&B offline calls nobody, and leaves what was logged in its file, even when its process is killed."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from definitions import definitions

pytest.importorskip("wandb", reason="wandb is in the extra applications")

BOOK = definitions("27_experiment_tools_at_scale", "definitions")
SCRIPT = """
import sys, time, wandb
quiet = wandb.Settings(console="off", silent=True, init_timeout=20)
run = wandb.init(project="quiet", config={"number": 3}, settings=quiet)
for loss in range(5):
    run.log({"loss": loss})
print("logged", flush=True)
time.sleep(float(sys.argv[1]))
run.finish()
wandb.teardown()
"""


class Proxy:
    """Every request of a process that leaves this machine comes here first, and is counted and hung up on."""

    def __init__(self) -> None:
        self.asked = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.count, daemon=True).start()

    def count(self) -> None:
        while True:
            try:
                caller, _ = self.listener.accept()
            except OSError:  # closed
                return
            self.asked += 1
            caller.close()


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    made = Proxy()
    yield made
    made.listener.close()


def start(folder: Path, proxy: Proxy, mode: str, pause: float = 0) -> subprocess.Popen:
    through = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), proxy.address)
    env = (
        os.environ | through | {"NO_PROXY": "", "no_proxy": "", "WANDB_MODE": mode, "WANDB_DIR": str(folder)}
    )
    env |= {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://wandb.invalid", "HOME": str(folder)}
    run = [sys.executable, "-c", SCRIPT, str(pause)]
    return subprocess.Popen(
        run, env=env, cwd=folder, start_new_session=True, stdout=subprocess.PIPE, text=True
    )


def test_an_offline_run_asks_nobody_and_ends(tmp_path: Path, proxy: Proxy) -> None:
    assert start(tmp_path, proxy, "offline").wait(timeout=240) == 0
    assert proxy.asked == 0
    (file,) = tmp_path.rglob("*.wandb")
    config, metrics, code = BOOK.read(file)
    assert (config["number"], metrics["loss"], code) == (3, 4, 0)


def test_the_same_run_online_would_have_asked(tmp_path: Path, proxy: Proxy) -> None:
    run, until = start(tmp_path, proxy, "online"), time.monotonic() + 240
    while not proxy.asked and run.poll() is None and time.monotonic() < until:
        time.sleep(0.1)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait(timeout=60)
    assert proxy.asked > 0


def test_a_killed_run_leaves_its_rows_and_no_exit(tmp_path: Path, proxy: Proxy) -> None:
    run = start(tmp_path, proxy, "offline", pause=600)
    assert run.stdout is not None and run.stdout.readline() == "logged\n"
    (file,) = tmp_path.rglob("*.wandb")
    until = time.monotonic() + 120
    while len(rows(file)) < 5 and time.monotonic() < until:
        time.sleep(0.2)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait(timeout=60)
    assert rows(file) == [0, 1, 2, 3, 4]
    assert BOOK.read(file)[2] is None


def rows(file: Path) -> list[float]:
    """The losses that the file holds so far."""
    items = [item for record in BOOK.records(file) for item in record.history.item]
    return [float(item.value_json) for item in items if [*item.nested_key] == ["loss"]]
