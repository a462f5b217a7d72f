"""The notebooks that a run executes for each model, in phases: models go through a phase together."""

from enum import IntEnum

from nbhelpers import tasks
from nbhelpers.records import ModelSpec


class Phase(IntEnum):
    """In order: the notebooks of a phase need what those of the phases before it have made."""

    LOADING = 1  # of the machine and the model: no prompts yet
    ANSWERS = 2  # timed, so that as few models run at a time as was asked for
    SCORES = 3  # from the answers alone
    TRACKING = 4  # on this machine, never on a cluster's node: MLflow's address may hold a password
    COMPARISON = 5  # once, of all models


COMPARISON = "07_comparison"
NOTEBOOKS = {
    "01_device_detection": Phase.LOADING,
    "02_loading": Phase.LOADING,
    "03_generation": Phase.ANSWERS,
    "03_server": Phase.ANSWERS,  # in place of 02 and 03, of a model whose weights are not here
    "04_scoring": Phase.SCORES,
    "04_own_task": Phase.SCORES,  # in its place, where the task is not the posts
    "05_statistics": Phase.SCORES,
    "06_tracking": Phase.TRACKING,
    COMPARISON: Phase.COMPARISON,
}


def pipeline_of(spec: ModelSpec, task: str = "") -> tuple[str, ...]:
    """The notebooks that a run executes for a model, in order."""
    left_out = {"02_loading", "03_generation"} if spec.kind == "server" else {"03_server"}
    left_out |= {"04_own_task" if tasks.load_task(task) is tasks.POSTS else "04_scoring", COMPARISON}
    return tuple(name for name in NOTEBOOKS if name not in left_out)
