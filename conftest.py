"""How pytest and nbval run here: fixed examples, quiet kernels, outputs in a scratch folder."""

import importlib.util
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples every time: a red run is red for everybody. `pytest --hypothesis-profile=search` looks
# for new ones.
settings.register_profile("lab", derandomize=True, deadline=None)
settings.register_profile("search", deadline=None, max_examples=1000)
settings.load_profile("lab")

_scratch = tempfile.TemporaryDirectory(prefix="nbhelpers-tests-")
os.environ.update(
    NBHELPERS_OUTPUTS=_scratch.name,
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TQDM_DISABLE="1",
    PYTHONWARNINGS="ignore",
)


def pytest_collectstart(collector: pytest.Collector) -> None:
    """nbval: stderr carries process ids and library chatter; it is no result."""
    if collector.path.suffix == ".ipynb":
        collector.skip_compare += ("stderr",)
        if collector.path.name >= "20":
            without_network(collector)
            if not importlib.util.find_spec("bm25s"):
                collector.collect = without_applications


def without_network(collector: pytest.Collector) -> None:
    """The kernel of this notebook reaches no other machine, and the notebook fails if it tries."""
    setup, teardown = collector.setup, collector.teardown
    tried = Path(_scratch.name) / f"{collector.path.stem}.tried"
    first = str(Path(__file__).parent / "tests" / "offline")

    def guarded_setup() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("NBHELPERS_TRIED", str(tried))
            patch.setenv("PYTHONPATH", first, prepend=os.pathsep)
            setup()

    def checked_teardown() -> None:
        teardown()
        assert not tried.exists(), f"reached for the network: {tried.read_text()}"

    collector.setup, collector.teardown = guarded_setup, checked_teardown


def without_applications() -> list:
    said = "notebooks from 20 on need the extra applications, which `make concepts` installs"
    raise pytest.Collector.CollectError(said)


# The files that take longest are given out first, so that no worker is left alone with one of them.
FIRST = (
    *("test_run.py", "test_chaos", "15_", "08_", "12_", "11_", "10_", "test_wheel", "16_", "22_", "25_"),
    *("26_", "24_", "27_", "test_ray_tune"),
    *("test_engines", "test_readme", "test_until_decided", "20_", "14_", "23_", "13_", "17_"),
    *("test_kernels", "21_", "test_secrets", "03_", "07_", "test_hub", "test_tracking", "18_", "19_"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        return next((n for n, name in enumerate(FIRST) if item.path.name.startswith(name)), len(FIRST))

    items.sort(key=place)


def pytest_unconfigure() -> None:
    _scratch.cleanup()
