"""Ray Tune on a real cluster of this machine stops every run where the class of notebook 27 stops it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from definitions import definitions

pytest.importorskip("ray", reason="ray is in the extra applications")

BOOK = definitions("27_experiment_tools_at_scale", "definitions")
RUNS, EPOCHS = 20, 20
# Ray gives its own start thirty seconds, which no setting changes: on a busy machine it is tried again.
# 127.0.0.1 would be replaced by the address that this machine has in its network.
SCRIPT = """
import json, os, sys
import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler

for attempt in range(5):
    try:
        ray.init(
            "local", num_cpus=1, include_dashboard=False, _node_ip_address="127.0.0.2", log_to_driver=False
        )
        break
    except Exception as error:
        ray.shutdown()
        if attempt == 4 or "timed out" not in str(error):
            raise

def train(config):
    for loss in config["curve"]:
        tune.report({"loss": loss})

ends = []
for curves in json.loads(sys.argv[1]):
    asha = ASHAScheduler("training_iteration", max_t=len(curves[0]), grace_period=2, reduction_factor=3)
    how = tune.TuneConfig(
        metric="loss", mode="min", scheduler=asha, max_concurrent_trials=1, reuse_actors=True
    )
    tuner = tune.Tuner(
        train,
        param_space={"curve": tune.grid_search(curves)},
        tune_config=how,
        run_config=tune.RunConfig(storage_path=os.getcwd(), verbose=0),
    )
    ends.append([result.metrics["training_iteration"] for result in tuner.fit()])
ray.shutdown()
print(json.dumps(ends))
"""


def curves(task: int) -> list[list[float]]:
    """Losses of runs, epoch by epoch, that come down to ends of their own."""
    draw = np.random.default_rng(task)
    ends, epochs = draw.uniform(2, 3, (RUNS, 1)), np.arange(1, EPOCHS + 1)
    return (ends + 2 * 0.8**epochs + draw.normal(0, 0.05, (RUNS, EPOCHS))).tolist()


def asked_by_hand(losses: list[list[float]]) -> list[int]:
    """The epoch at which the notebook's class stops each run."""
    pruner, ends = BOOK.ByRay(grace=2), []
    for number, curve in enumerate(losses):
        steps = (
            SimpleNamespace(number=number, last_step=e, intermediate_values={e: loss})
            for e, loss in enumerate(curve, 1)
        )
        ends.append(next((step.last_step for step in steps if pruner.prune(None, step)), EPOCHS))
    return ends


def asked_for(tried: Path) -> set[str]:
    """The other machines that any process of Ray asked for."""
    return {line.split()[1] for line in tried.read_text().splitlines()} if tried.exists() else set()


def test_a_cluster_stops_every_run_where_the_class_does_and_asks_only_which_cloud_it_is_in(
    tmp_path: Path,
) -> None:
    tasks, tried = [curves(task) for task in range(3)], tmp_path / "tried"
    guard = Path(__file__).resolve().parents[1] / "offline"
    env = os.environ | {"PYTHONPATH": str(guard), "NBHELPERS_TRIED": str(tried), "HOME": str(tmp_path)}
    env |= {"RAY_USAGE_STATS_ENABLED": "0", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(tasks)],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ends = json.loads(done.stdout.splitlines()[-1])
    assert ends == [asked_by_hand(task) for task in tasks]
    assert all(sum(each) < RUNS * EPOCHS / 2 and max(each) == EPOCHS for each in ends)
    # Its dashboard asks for the cloud before it looks whether reports are switched off; each has one second.
    assert asked_for(tried) <= {"169.254.169.254", "metadata.google.internal"}
