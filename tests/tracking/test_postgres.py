"""Forty runs by four processes at once into MLflow on a real PostgreSQL: none is lost, all can be asked."""

import os
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

INITDB, POSTGRES = shutil.which("initdb"), shutil.which("postgres")
missing = [
    n for n, p in (("initdb", INITDB), ("postgres", POSTGRES), ("runuser", shutil.which("runuser"))) if not p
]
if missing:
    pytest.skip(f"PostgreSQL is not installed: no {missing[0]} on the path", allow_module_level=True)
pytest.importorskip("psycopg", reason="the driver of PostgreSQL is in the extra applications")

# The server refuses to be started by root: another user owns its folder then.
AS_USER = ["runuser", "-u", "nobody", "--"] if os.geteuid() == 0 else []

WRITER = """
    import sys
    import mlflow
    from mlflow.entities import Metric, Param

    client, experiment, first = mlflow.MlflowClient(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    for number in range(first, first + 10):
        run = client.create_run(experiment).info.run_id
        client.log_batch(run, [Metric("loss", 2 + number / 40, 0, 0)], [Param("number", str(number))])
        client.set_terminated(run, "FAILED" if number == 7 else "FINISHED")
"""


@pytest.fixture
def database(tmp_path: Path) -> Iterator[str]:
    """The address of a fresh PostgreSQL on loopback."""
    folder = Path(f"/tmp/nbhelpers-postgres-{os.getpid()}")  # short, and open to another user
    folder.mkdir()
    if AS_USER:
        shutil.chown(folder, "nobody")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    make = [INITDB, "-D", str(folder / "db"), "-U", "lab", "--auth=trust", "--no-sync"]
    subprocess.run([*AS_USER, *make], check=True, capture_output=True, cwd="/")
    options = ["-h", "127.0.0.1", "-p", str(port), "-k", "", "-c", "fsync=off"]
    log = (tmp_path / "server.log").open("w")
    server = subprocess.Popen([*AS_USER, POSTGRES, "-D", str(folder / "db"), *options], cwd="/", stderr=log)
    try:
        wait_for(port, server)
        yield f"postgresql://lab@127.0.0.1:{port}/postgres"
    finally:
        server.terminate()
        server.wait(timeout=60)
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(port: int, server: subprocess.Popen) -> None:
    import psycopg

    until = time.monotonic() + 120
    while True:
        try:
            psycopg.connect(host="127.0.0.1", port=port, user="lab", dbname="postgres").close()
            return
        except psycopg.OperationalError:
            assert server.poll() is None and time.monotonic() < until, "the server did not start"
            time.sleep(0.2)


def test_forty_runs_by_four_processes_are_all_there(database: str, tmp_path: Path) -> None:
    import mlflow

    client = mlflow.MlflowClient(database)
    experiment = client.create_experiment("search", artifact_location=tmp_path.as_uri())
    run = [sys.executable, "-c", textwrap.dedent(WRITER), database, experiment]
    writers = [subprocess.Popen([*run, str(first)]) for first in range(0, 40, 10)]
    assert [writer.wait(timeout=300) for writer in writers] == [0, 0, 0, 0]
    found = client.search_runs([experiment], order_by=["metrics.loss"])
    assert [int(run.data.params["number"]) for run in found] == list(range(40))
    asked = client.search_runs([experiment], "metrics.loss < 2.2 and status = 'FINISHED'")
    assert sorted(int(run.data.params["number"]) for run in asked) == [0, 1, 2, 3, 4, 5, 6]
    assert [run.data.params["number"] for run in client.search_runs([experiment], "status = 'FAILED'")] == [
        "7"
    ]
