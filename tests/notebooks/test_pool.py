"""The model pool of notebook 08: against a plain list, and measured on real models."""

import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
from definitions import definitions
from hypothesis import given, settings
from hypothesis import strategies as st
from saved_models import make_model

from nbhelpers import registry
from nbhelpers.loading import load
from nbhelpers.records import LabError

POOL = definitions("08_routing", "pool")
NAMES = "abcd"


class Shelf:
    """Stands in for loading: models of planted sizes, and what was alive at any moment."""

    def __init__(self, sizes, broken=()):
        self.sizes, self.broken = sizes, broken
        self.alive, self.peak, self.loads = [], 0, []

    def pool(self, limit):
        return POOL.ModelPool(limit, self.load, self.unload, self.sizes.__getitem__)

    def load(self, name):
        if name in self.broken:
            raise LabError(f"{name} is broken.")
        self.loads.append(name)
        self.alive.append(name)
        self.peak = max(self.peak, sum(self.sizes[name] for name in self.alive))
        return SimpleNamespace(name=name)

    def unload(self, loaded):
        self.alive.remove(loaded.name)


@given(
    limit=st.integers(1, 12),
    sizes=st.lists(st.integers(1, 6), min_size=4, max_size=4),
    broken=st.sets(st.sampled_from(NAMES), max_size=2),
    asked=st.lists(st.sampled_from(NAMES), max_size=30),
)
@settings(max_examples=300)
def test_any_sequence_of_requests_is_served_as_by_a_plain_list(limit, sizes, broken, asked):
    shelf = Shelf(dict(zip(NAMES, sizes, strict=True)), broken)
    models = shelf.pool(limit)
    kept, loads = [], []  # the brute force: least recently used first
    for name in asked:
        if name in kept:
            kept.remove(name)
        elif shelf.sizes[name] <= limit:
            while sum(shelf.sizes[other] for other in kept) + shelf.sizes[name] > limit:
                kept.pop(0)
        if shelf.sizes[name] <= limit and name not in broken:
            loads += [name] if name not in shelf.alive else []
            kept.append(name)
            assert models.get(name).name == name
        else:
            with pytest.raises(LabError):
                models.get(name)
        assert list(models.models) == kept
        assert sorted(shelf.alive) == sorted(kept)
    assert shelf.loads == loads and models.loads == len(loads)
    assert shelf.peak <= limit


def test_a_model_larger_than_the_pool_is_refused_in_one_sentence_before_it_is_loaded():
    shelf = Shelf({"a": 3, "b": 1})
    models = shelf.pool(2)
    models.get("b")
    with pytest.raises(LabError, match=r"^The model 'a' takes 3 bytes, more than the pool's 2\.$"):
        models.get("a")
    assert shelf.loads == ["b"] == list(models.models)


def test_the_need_known_before_loading_is_what_the_weights_take(tmp_path):
    folder = make_model(tmp_path / "tiny")
    for name, dtype in ((str(folder), "float32"), ("lab-bloom", "bfloat16"), ("lab-llama", "float32")):
        needed = POOL.weight_bytes(name, dtype)
        loaded = load.load(name, "cpu", dtype)
        assert loaded.report.parameter_bytes == needed
        load.unload(loaded)


def test_the_count_of_a_shape_is_the_registered_one():
    assert POOL.weight_bytes("shape:distilgpt2") == 4 * registry.resolve("distilgpt2").parameters


@pytest.mark.skipif(sys.platform != "linux", reason="reads private memory from /proc")
def test_evicted_memory_goes_back_to_the_system(tmp_path):
    """About 200 MiB in a file and 312 MiB of random weights take turns: measured in a process of its own."""
    folder = make_model(tmp_path / "large", n_embd=1024, n_layer=4, n_head=8)
    script = f"""
        import sys
        sys.path.insert(0, "tests")
        import psutil
        from definitions import definitions
        from nbhelpers.loading import load

        def private():
            return psutil.Process().memory_full_info().uss / 2**20

        pool = definitions("08_routing", "pool")
        on_cpu = lambda name: load.load(name, "cpu", "float32")
        models = pool.ModelPool(400 * 2**20, on_cpu, load.unload, pool.weight_bytes)
        load.unload(on_cpu("lab-gpt2"))  # the libraries are in memory from here on
        base, seen = private(), []
        for name in ({str(folder)!r}, "shape:distilgpt2", {str(folder)!r}, "lab-gpt2"):
            models.get(name)
            seen.append(private() - base)
        print(*seen)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    first, second, third, _ = map(float, done.stdout.split())
    size, other = (POOL.weight_bytes(name) / 2**20 for name in (str(folder), "shape:distilgpt2"))
    assert size + other > 400
    assert size * 0.9 < first < size + 60 and size * 0.9 < third < size + 60
    assert other * 0.9 < second < other + 60
