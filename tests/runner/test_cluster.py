"""A real Ray cluster on loopback, a head and two nodes of one core: one is killed in the middle of a run."""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from mlflow import cli as mlflow_cli

from nbhelpers import cli, registry, store
from nbhelpers.generation import generate
from nbhelpers.loading import load
from nbhelpers.records import LabError, Result, RunInfo, Sample, Settings
from nbhelpers.runner import cluster
from nbhelpers.runner.plan import Plan, plan_run
from nbhelpers.runner.run import Run

NO_RAY = "the extra cluster (Ray) is not installed"
MODELS = ("lab-gpt2", "lab-opt")
GIVEN = {"limit": 8, "repeats": 40, "max_new_tokens": 64}  # several batches: time enough for a kill
# No token of this user, no statistics, and both also in what the nodes run.
QUIET = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
# A busy machine takes longer than 30 s; grpc's handlers of forks now and then break what serves ray://.
QUIET |= {"RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S": "60", "GRPC_ENABLE_FORK_SUPPORT": "0"}


@pytest.fixture(scope="module")
def ray_cluster(tmp_path_factory) -> Iterator[SimpleNamespace]:
    pytest.importorskip("ray", reason=NO_RAY)
    pytest.importorskip("grpc", reason=NO_RAY)  # what the extra has besides
    with pytest.MonkeyPatch.context() as patch:
        for name, value in QUIET.items():
            patch.setenv(name, value)
        # A node whose processes import for 15 s is given up. Most of that is a grammar of addresses, which
        # jsonschema compiles and does without: a busy machine then starts nodes, and what serves ray://.
        (left_out := tmp_path_factory.mktemp("path") / "rfc3987_syntax.py").write_text("raise ImportError\n")
        patch.setenv("PYTHONPATH", str(left_out.parent), prepend=os.pathsep)
        from ray.cluster_utils import Cluster

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        small = {"object_store_memory": 80_000_000}
        # Not 127.0.0.1, for which Ray would put the machine's address on its network.
        head = {"num_cpus": 0, "node_ip_address": "127.0.0.2", "ray_client_server_port": port}
        head |= {"include_dashboard": False, "include_log_monitor": False, "no_monitor": True}
        made = Cluster(initialize_head=True, head_node_args=head | small)
        try:
            nodes = [made.add_node(num_cpus=1, node_ip_address=f"127.0.0.{last}", **small) for last in (3, 4)]
            yield SimpleNamespace(cluster=made, nodes=nodes, address=f"ray://127.0.0.2:{port}")
        finally:
            made.shutdown()


def texts(rows: list[Sample]) -> list[tuple[str, str, int, str]]:
    return sorted((row.key, row.prompt_id, row.repeat, row.text) for row in rows)


def test_a_node_killed_in_the_middle_loses_nothing_and_its_model_runs_elsewhere(ray_cluster, tmp_path):
    out = tmp_path / "run"
    options = [part for name, value in GIVEN.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "nbhelpers.cli", "run", *MODELS, *options, "--out", str(out)]
    with (tmp_path / "said").open("w+") as said:
        begun = time.monotonic()
        process = subprocess.Popen(
            [*command, "--cluster", ray_cluster.cluster.address], stdout=said, stderr=said
        )
        try:
            lost = ray_cluster.nodes[1]
            address, kept = f"({lost.node_ip_address})", []
            while not kept and process.poll() is None and time.monotonic() - begun < 300:
                info = store.read_json(out / "run.json", RunInfo) if (out / "run.json").exists() else None
                for model, node in info.nodes.items() if info else ():
                    if node.endswith(address):
                        victim, rows = model, out / model / "samples.jsonl"
                        kept = rows.read_text().splitlines() if rows.exists() else []
                time.sleep(0.1)
            ray_cluster.cluster.remove_node(lost, allow_graceful=False)
            while (
                ", " not in info.nodes[victim] and process.poll() is None and time.monotonic() - begun < 300
            ):
                time.sleep(0.1)
                info = store.read_json(out / "run.json", RunInfo)
            [other] = set(MODELS) - {victim}  # a node of one core has one model at a time
            assert (other, "05_statistics") in {(status.model, status.notebook) for status in info.notebooks}
            assert process.wait(timeout=300) == 0, (tmp_path / "said").read_text()
        finally:
            process.kill()
        said.seek(0)
        output = said.read()
    total = GIVEN["limit"] * GIVEN["repeats"]
    assert 0 < len(kept) < total
    lines = (out / victim / "samples.jsonl").read_text().splitlines()
    assert lines[: len(kept)] == kept and len(lines) == total  # timings included, and none made twice
    assert f"{address} was lost" in output
    info = store.read_json(out / "run.json", RunInfo)
    assert {status.status for status in info.notebooks} == {"passed"}
    survivor = ray_cluster.nodes[0].node_ip_address
    assert [part.partition(" (")[2] for part in info.nodes[victim].split(", ")] == [
        address[1:],
        f"{survivor})",
    ]
    for model in MODELS:
        here = generate.generate_samples(load.load(model), registry.load_prompts(limit=8), Settings(**GIVEN))
        rows = list(store.read_rows(out / model / "samples.jsonl", Sample))
        assert texts(rows) == texts(here)
        result = store.read_json(out / model / "result.json", Result)
        assert (result.attempted, result.failed) == (total, 0)
        notebook = json.loads((out / model / "03_generation.ipynb").read_text())
        assert str(out) in json.dumps(notebook)  # and not a folder of the node
    page = (out / "index.html").read_text()
    assert "Ray cluster" in page and info.nodes[victim] in page


def refused(plan: Plan, address: str) -> str:
    """What run.json says of a run's only model after it was given to the cluster."""
    whole = Run(plan, plan.info, lambda status: None)
    whole.save()
    cluster.join_cluster(address)(whole)
    first, *rest = whole.info.notebooks
    assert first.status == "failed" and {status.status for status in rest} == {"skipped"}
    return str(first.error)


def test_a_folder_that_a_node_lacks_is_named(ray_cluster, tmp_path):
    folder = tmp_path / "mine"
    shutil.copytree(load.fetch(registry.resolve("lab-gpt2")), folder)
    plan = plan_run([str(folder)], Settings(limit=1), str(tmp_path / "run"))
    shutil.rmtree(folder)
    assert refused(plan, ray_cluster.address).endswith(f"has no {folder}: copy it there, to the same place.")


def test_a_model_that_no_node_can_hold_is_refused(ray_cluster, tmp_path):
    plan = plan_run(["lab-gpt2"], Settings(limit=1, device="cuda"), str(tmp_path / "run"))
    assert "No node of the cluster has" in refused(plan, ray_cluster.address)


def test_no_ray_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(LabError, match=r"^The option --cluster needs Ray: install nbhelpers\[cluster\]"):
        cluster.join_cluster("auto")


@pytest.mark.parametrize("address", ["ray://127.0.0.1:9", "127.0.0.1:9", "ray://no"])
def test_no_cluster_there_is_one_sentence(address):
    pytest.importorskip("ray", reason=NO_RAY)
    with pytest.raises(LabError, match=f"No Ray cluster can be used at {address}"):
        cluster.join_cluster(address)


PAGE = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```console\n(.*?)```", PAGE, re.S) for line in block.splitlines()]


@pytest.mark.parametrize("command", [c for c in COMMANDS if "nbhelpers run" in c])
def test_the_page_s_runs_have_options_that_are_there(command, tmp_path):
    (config := tmp_path / "forty.toml").write_text('models = ["lab-gpt2", "lab-opt"]\n')
    words = shlex.split(command.partition("nbhelpers run ")[2].replace("forty.toml", str(config)))
    context = typer.main.get_command(cli.app).commands["run"].make_context("run", words)
    assert context.params["cluster"] in ("auto", "ray://HEAD:10001")


@pytest.mark.parametrize("command", [c for c in COMMANDS if "ray start" in c or c.startswith("ray ")])
def test_the_page_s_commands_of_ray_are_ray_s(command):
    scripts = pytest.importorskip("ray.scripts.scripts", reason=NO_RAY)
    name, *words = shlex.split(command.partition("ray ")[2])
    assert scripts.cli.commands[name].make_context(name, words)


def test_the_page_s_other_commands_are_known():
    rest = [c for c in COMMANDS if "nbhelpers run" not in c and "ray st" not in c]
    assert [c.split()[0] for c in rest] == ["pip", "mlflow"]
    words = shlex.split(rest[1])
    assert mlflow_cli.cli.commands[words[1]].make_context(words[1], words[2:])
    assert "get-auth-token" in PAGE


def test_memory_is_asked_for_where_no_gpu_has_the_weights():
    plan = plan_run(["shape:bloom-560m"], Settings(limit=1), "unused")
    [run] = Run(plan, plan.info, print).runs(plan.info.settings)
    weights = 4 * run.spec.parameters
    need = cluster.needs(run, 2, gpus=False)
    assert need["num_cpus"] == 2 and weights < need["memory"] < 1.3 * weights
    assert cluster.needs(run, 2, gpus=True) == {"num_cpus": 2, "num_gpus": 1}
