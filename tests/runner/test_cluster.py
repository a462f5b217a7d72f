"""A real Ray cluster on loopback, a head and two nodes of one core: one is killed in the middle of a run."""

import itertools
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
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from mlflow import cli as mlflow_cli

from nbhelpers import cli, registry, store
from nbhelpers.generation import generate
from nbhelpers.loading import load
from nbhelpers.records import LabError, ModelRun, Result, RunInfo, Sample, Settings
from nbhelpers.runner import cluster
from nbhelpers.runner.plan import Plan, plan_run
from nbhelpers.runner.run import STOPPED, Run

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
            nodes = [add_node(made, last) for last in (3, 4)]
            yield SimpleNamespace(cluster=made, nodes=nodes, address=f"ray://127.0.0.2:{port}")
        finally:
            made.shutdown()


def add_node(cluster, last: int):
    return cluster.add_node(num_cpus=1, node_ip_address=f"127.0.0.{last}", object_store_memory=80_000_000)


def texts(rows: list[Sample]) -> list[tuple[str, str, int, str]]:
    return sorted((row.key, row.prompt_id, row.repeat, row.text) for row in rows)


# As if every model were large.
LARGE = (
    "from nbhelpers import cli; from nbhelpers.runner.cluster import LEAST_WORK as w; w['CPU'] = 1; cli.app()"
)
TOTAL = GIVEN["limit"] * GIVEN["repeats"]
MANY = GIVEN | {"repeats": 160}  # of one model, whose parts are several batches too


@contextmanager
def running(said: Path, *command: str | Path) -> Iterator[subprocess.Popen]:
    with said.open("w") as out:
        process = subprocess.Popen([sys.executable, *map(str, command)], stdout=out, stderr=out)
        try:
            yield process
        finally:
            process.kill()


def options(given: dict[str, int]) -> list[str]:
    return [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def addresses(node: str) -> list[str]:
    return re.findall(r"\(([\d.]+)\)", node)


def test_one_large_model_runs_on_two_nodes_and_a_lost_one_s_rows_go_on_elsewhere(ray_cluster, tmp_path):
    out, said = tmp_path / "run", tmp_path / "said"
    rows, there = out / "lab-gpt2" / "samples.jsonl", [node.node_ip_address for node in ray_cluster.nodes]
    half = {prompt.id for prompt in registry.load_prompts(limit=MANY["limit"] // 2)}
    here = generate.generate_samples(load.load("lab-gpt2"), registry.load_prompts(limit=8), Settings(**MANY))
    total = len(here)
    last, kept = ray_cluster.nodes[1], list[str]()
    to_cluster = "--cluster", ray_cluster.cluster.address
    with running(said, "-c", LARGE, "run", "lab-gpt2", *options(MANY), "--out", out, *to_cluster) as process:
        end = time.monotonic() + 300
        while len({json.loads(line)["prompt_id"] in half for line in kept}) < 2:
            assert process.poll() is None and time.monotonic() < end, said.read_text()
            kept = re.findall(r"(.*)\n", rows.read_text()) if rows.exists() else []
            time.sleep(0.1)
        info = store.read_json(out / "run.json", RunInfo)
        assert sorted(addresses(info.nodes["lab-gpt2"])) == there
        # These choose the dtype, which is in the keys: every node has it from them.
        assert [s.notebook for s in info.notebooks][:2] == ["01_device_detection", "02_loading"]
        ray_cluster.cluster.remove_node(last, allow_graceful=False)
        assert process.wait(timeout=300) == 0, said.read_text()
    ray_cluster.nodes[1] = add_node(ray_cluster.cluster, 4)
    lines = rows.read_text().splitlines()
    assert kept and lines[: len(kept)] == kept  # timings included
    assert len(lines) == total and texts(list(store.read_rows(rows, Sample))) == texts(here)
    # On a busy machine one part may be over before the other begins: then its node is lost for nothing.
    assert re.findall(r"\(([\d.]+)\) was lost", said.read_text()) in ([], [there[1]])
    info = store.read_json(out / "run.json", RunInfo)
    assert addresses(info.nodes["lab-gpt2"]) == [there[1], there[0]]  # the last has the latency
    assert {status.status for status in info.notebooks} == {"passed"} and len(info.notebooks) == 7
    # A resume makes what is missing: the rows of a few prompts, too many for one node, but no other.
    kept = lines[: total // 2]
    rows.write_text("".join(f"{line}\n" for line in kept))
    store.write_json(out / "run.json", replace(info, notebooks=(), nodes={}))
    with running(said, "-c", LARGE, "run", "--resume", out, *to_cluster) as process:
        assert process.wait(timeout=300) == 0, said.read_text()
    lines = rows.read_text().splitlines()
    assert len(lines) == total and lines[: len(kept)] == kept
    assert texts(list(store.read_rows(rows, Sample))) == texts(here)
    info = store.read_json(out / "run.json", RunInfo)
    assert sorted(addresses(info.nodes["lab-gpt2"])) == there and "was lost" not in said.read_text()


@pytest.mark.parametrize("prompts", [1, 2, 3, 7])
@pytest.mark.parametrize("repeats", [1, 16, 5000])
@pytest.mark.parametrize("gpu", [False, True])
def test_the_parts_of_a_large_model_are_whole_prompts(prompts, repeats, gpu, tmp_path, monkeypatch):
    given = Settings(limit=prompts, repeats=repeats, max_new_tokens=200)
    run = ModelRun(given, registry.resolve("shape:bloom-560m"), tmp_path)
    need = {"num_gpus": 1} if gpu else {}
    every = list(itertools.product(range(prompts), range(repeats)))
    for at_once in range(9):
        found = [every[part] for part in cluster.parts(run, need, at_once)]
        assert len(found) != 1 and len(found) <= min(at_once, prompts)
        assert not found or list(itertools.chain(*found)) == every
        assert sum(len({row[0] for row in rows}) for rows in found) in (0, prompts)  # none in two
        enough = len(every) * 200 * 559_214_592 // cluster.LEAST_WORK["GPU" if gpu else "CPU"]
        assert bool(found) == (min(at_once, prompts, enough) > 1)
        assert max(map(len, found), default=0) - min(map(len, found), default=0) <= repeats
    assert not cluster.parts(replace(run, spec=registry.resolve("server:http://at#one")), need, 9)  # unknown
    monkeypatch.setattr(store, "read_rows", lambda *_: [SimpleNamespace(key=n, error=None) for n in every])
    assert not cluster.parts(run, need, 9)  # all are made


def test_a_cluster_has_room_for_what_its_nodes_hold_together():
    nodes = [{"CPU": 4.0, "memory": 10.0}, {"CPU": 8.0, "memory": 3.0, "GPU": 2.0}, {"memory": 99.0}]
    assert cluster.room(nodes, {"num_cpus": 1, "memory": 3}) == 3 + 1
    assert cluster.room(nodes, {"num_cpus": 2, "memory": 0}) == 2 + 4
    assert cluster.room(nodes, {"num_cpus": 1, "num_gpus": 1}) == 2
    assert cluster.room(nodes, {"num_cpus": 9}) == cluster.room([], {"num_cpus": 1}) == 0


def test_a_node_killed_in_the_middle_loses_nothing_and_its_model_runs_elsewhere(ray_cluster, tmp_path):
    out, said, begun = tmp_path / "run", tmp_path / "said", time.monotonic()
    command = "-m", "nbhelpers.cli", "run", *MODELS, *options(GIVEN), "--out", out
    with running(said, *command, "--cluster", ray_cluster.cluster.address) as process:
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
        while ", " not in info.nodes[victim] and process.poll() is None and time.monotonic() - begun < 300:
            time.sleep(0.1)
            info = store.read_json(out / "run.json", RunInfo)
        [other] = set(MODELS) - {victim}  # a node of one core has one model at a time
        assert (other, "05_statistics") in {(status.model, status.notebook) for status in info.notebooks}
        assert process.wait(timeout=300) == 0, said.read_text()
    survivor = ray_cluster.nodes[0].node_ip_address
    ray_cluster.nodes[1] = add_node(ray_cluster.cluster, 4)
    output, total = said.read_text(), TOTAL
    assert 0 < len(kept) < total
    lines = (out / victim / "samples.jsonl").read_text().splitlines()
    assert lines[: len(kept)] == kept and len(lines) == total  # timings included, and none made twice
    assert f"{address} was lost" in output
    info = store.read_json(out / "run.json", RunInfo)
    assert {status.status for status in info.notebooks} == {"passed"}
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


@pytest.fixture(params=["one task", "parts"])
def split(request, monkeypatch) -> Settings:
    """Of a run whose model is a task, or split first."""
    monkeypatch.setitem(cluster.LEAST_WORK, "CPU", 1 if request.param == "parts" else 10**20)
    return Settings(limit=2, repeats=50)


def test_a_folder_that_a_node_lacks_is_named(ray_cluster, tmp_path, split):
    folder = tmp_path / "mine"
    shutil.copytree(load.fetch(registry.resolve("lab-gpt2")), folder)
    plan = plan_run([str(folder)], split, str(tmp_path / "run"))
    shutil.rmtree(folder)
    assert refused(plan, ray_cluster.address).endswith(f"has no {folder}: copy it there, to the same place.")


def test_a_model_that_no_node_can_hold_is_refused(ray_cluster, tmp_path):
    plan = plan_run(["lab-gpt2"], Settings(limit=1, device="cuda"), str(tmp_path / "run"))
    assert "No node of the cluster has" in refused(plan, ray_cluster.address)


def test_a_model_that_no_node_can_hold_any_more_is_refused(ray_cluster, tmp_path, split, monkeypatch):
    rooms = itertools.chain([2], itertools.repeat(0))  # all nodes that have room are lost
    monkeypatch.setattr(cluster, "room", lambda *_: next(rooms))
    plan = plan_run(["lab-gpt2"], split, str(tmp_path / "run"))
    assert "No node of the cluster has" in refused(plan, ray_cluster.address)


def test_a_run_that_is_stopped_cancels_what_the_nodes_do(ray_cluster, tmp_path, split):
    plan = plan_run(["lab-gpt2"], split, str(tmp_path / "run"))
    (whole := Run(plan, plan.info, lambda status: None)).save()
    whole.refused = True  # --fail-on-error
    cluster.join_cluster(ray_cluster.address)(whole)
    assert {(status.status, status.error) for status in whole.info.notebooks} == {("skipped", STOPPED)}
    assert not list(plan.run_dir.rglob("*.ipynb"))


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
