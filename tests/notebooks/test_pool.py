"""The model pool: against brute force, between threads, and measured on real models."""

import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from saved_models import make_model

from nbhelpers import registry
from nbhelpers.loading import load as loading
from nbhelpers.loading import pool
from nbhelpers.loading.pool import ModelPool
from nbhelpers.records import LabError

NAMES = ("lab/a", "lab/b", "lab/c", "lab/d")  # named like Hub repositories: nothing is looked up


class Shelf:
    """Stands in for loading: models of planted sizes, and what was alive at any moment."""

    def __init__(self, sizes, broken=(), seconds=0.0):
        self.sizes, self.broken, self.seconds = sizes, broken, seconds
        self.alive, self.peak, self.loads, self.lock = [], 0, [], threading.Lock()

    def pool(self, limit, wait_s=10.0):
        return ModelPool(
            limit,
            wait_s=wait_s,
            load=self.load,
            unload=self.unload,
            need=lambda spec, device, dtype: self.sizes[spec.alias],
        )

    def load(self, spec, device, dtype):
        time.sleep(self.seconds)
        if spec.alias in self.broken:
            raise LabError(f"{spec.alias} is broken.")
        with self.lock:
            self.loads.append(spec.alias)
            self.alive.append(spec.alias)
            self.peak = max(self.peak, sum(self.sizes[name] for name in self.alive))
        return SimpleNamespace(spec=spec, report=SimpleNamespace(parameter_bytes=self.sizes[spec.alias]))

    def unload(self, loaded):
        with self.lock:
            self.alive.remove(loaded.spec.alias)


# ---- against brute force -------------------------------------------------------------------------------


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
        served = shelf.sizes[name] <= limit and name not in broken
        if served:
            loads += [name] if name not in shelf.alive else []
            kept.append(name)
            with models.use(name) as loaded:
                assert loaded.spec.alias == name
        else:
            with pytest.raises(LabError), models.use(name):
                pass
        assert models.resident == tuple(kept)
        assert sorted(shelf.alive) == sorted(kept)
        assert models.held_bytes == sum(shelf.sizes[other] for other in kept) <= limit
    assert shelf.loads == loads and models.loads == len(loads)
    assert models.evictions == len(loads) - len(kept)
    assert shelf.peak <= models.peak_bytes <= limit


@given(
    limit=st.integers(4, 12),
    sizes=st.lists(st.integers(1, 6), min_size=4, max_size=4),
    steps=st.lists(st.tuples(st.booleans(), st.sampled_from(NAMES)), max_size=25),
)
@settings(max_examples=200)
def test_a_model_in_use_is_never_evicted(limit, sizes, steps):
    """Uses that overlap in one thread: what cannot fit beside them is refused at once."""
    shelf = Shelf(dict(zip(NAMES, sizes, strict=True)))
    models, open_uses = shelf.pool(limit), {}
    with ExitStack() as rest:
        for enter, name in steps:
            if enter and name not in open_uses:
                held = sum(shelf.sizes[other] for other in open_uses)
                if held + shelf.sizes[name] > limit:
                    with pytest.raises(LabError, match="more than the model pool's limit"):
                        rest.enter_context(models.use(name))
                else:
                    stack = open_uses[name] = rest.enter_context(ExitStack())
                    stack.enter_context(models.use(name))
            elif not enter and name in open_uses:
                open_uses.pop(name).close()
            assert set(open_uses) <= set(shelf.alive) == set(models.resident)
            assert shelf.peak <= limit
    models.clear()
    assert models.resident == () and shelf.alive == [] and models.held_bytes == 0


# ---- what cannot be served -----------------------------------------------------------------------------


def test_a_model_larger_than_the_pool_is_refused_in_one_sentence_before_it_is_loaded():
    shelf = Shelf({"lab/a": 3 * pool.MIB, "lab/b": pool.MIB})
    models = shelf.pool(2 * pool.MIB)
    with models.use("lab/b"), pytest.raises(LabError) as refused, models.use("lab/a"):
        pass
    assert str(refused.value) == (
        "lab/a takes 3.0 MiB beside the 1.0 MiB that its caller holds in use, more than the model pool's "
        "limit of 2.0 MiB: raise it, or choose a half dtype or a smaller model."
    )
    with (
        pytest.raises(LabError, match=r"^lab/a takes 3\.0 MiB, more than"),
        models.use("lab/a"),
    ):
        pass
    assert shelf.loads == ["lab/b"] and models.resident == ("lab/b",)


def test_a_model_that_turns_out_larger_than_its_files_said_is_not_kept():
    shelf = Shelf({"lab/a": 5})
    models = ModelPool(10, load=shelf.load, unload=shelf.unload, need=lambda *spec: 4)
    with pytest.raises(LabError, match="that its files name"), models.use("lab/a"):
        pass
    assert (shelf.alive, models.resident, models.held_bytes) == ([], (), 0)


def test_an_error_inside_a_use_releases_the_model():
    shelf = Shelf({"lab/a": 1, "lab/b": 1})
    models = shelf.pool(1)
    with pytest.raises(ZeroDivisionError), models.use("lab/a"):
        raise ZeroDivisionError
    with models.use("lab/b"):
        assert models.resident == ("lab/b",)


def test_a_limit_below_one_byte_is_refused():
    with pytest.raises(LabError, match="limit of a model pool is 0 bytes"):
        ModelPool(0)


# ---- between threads -----------------------------------------------------------------------------------


def in_threads(work, arguments):
    """Run work on every argument, all starting together; the outcome or the exception of each."""
    gate = threading.Barrier(len(arguments))

    def run(argument):
        gate.wait(10)
        try:
            return work(argument)
        except LabError as error:
            return error

    with ThreadPoolExecutor(len(arguments)) as threads:
        return list(threads.map(run, arguments))


def test_two_threads_that_ask_for_the_same_model_load_it_once():
    shelf = Shelf({"lab/a": 1}, seconds=0.05)
    models = shelf.pool(1)

    def work(name):
        with models.use(name) as loaded:
            return loaded

    found = in_threads(work, ["lab/a"] * 4)
    assert shelf.loads == ["lab/a"] and all(loaded is found[0] for loaded in found)


def test_threads_that_ask_for_different_models_never_pass_the_limit():
    shelf = Shelf(dict(zip(NAMES, (2, 3, 4, 5), strict=True)), {"lab/b"}, 0.001)
    models = shelf.pool(7)

    def work(offset):
        for step in range(25):
            name = NAMES[(step * (offset + 1) + offset) % 4]
            try:
                with models.use(name) as loaded:
                    assert loaded.spec.alias in shelf.alive
                    time.sleep(0.0005)
                    assert loaded.spec.alias in shelf.alive
            except LabError:
                assert name == "lab/b"

    assert in_threads(work, [0, 1, 2, 3]) == [None] * 4
    assert shelf.peak <= models.peak_bytes <= 7
    assert sorted(shelf.alive) == sorted(models.resident)
    assert models.held_bytes == sum(shelf.sizes[name] for name in shelf.alive)


def test_a_failed_load_reaches_each_thread_that_asked():
    shelf = Shelf({"lab/a": 1}, {"lab/a"}, seconds=0.02)
    models = shelf.pool(1)

    def work(name):
        with models.use(name):
            pass

    assert [str(error) for error in in_threads(work, ["lab/a"] * 3)] == ["lab/a is broken."] * 3
    assert (models.resident, models.held_bytes, models.loads) == ((), 0, 0)


def test_a_thread_waits_for_room_and_says_whose_use_it_waited_for():
    shelf = Shelf({"lab/a": 1, "lab/b": 1})
    patient, impatient = shelf.pool(1), shelf.pool(1, wait_s=0.02)
    for models in (patient, impatient):
        with ThreadPoolExecutor(1) as thread:
            with models.use("lab/a"):
                asked = thread.submit(lambda models=models: models.use("lab/b").__enter__())
                if models is impatient:
                    with pytest.raises(LabError, match="because lab/a is in use"):
                        asked.result(10)
                else:
                    with pytest.raises(TimeoutError):
                        asked.result(0.1)
                assert models.resident == ("lab/a",)
            if models is patient:
                assert asked.result(10).spec.alias == "lab/b"


# ---- real models ---------------------------------------------------------------------------------------


def test_the_need_known_before_loading_is_what_the_weights_take(tmp_path):
    folder = make_model(tmp_path / "tiny")
    for name, dtype in ((str(folder), "float32"), ("lab-bloom", "bfloat16"), ("lab-llama", "float32")):
        needed = pool.weight_bytes(registry.resolve(name), "cpu", dtype)
        loaded = loading.load(name, "cpu", dtype)
        assert loaded.report.parameter_bytes == needed
        loading.unload(loaded)


def test_embedded_models_take_turns_in_a_pool_too_small_for_all(tmp_path):
    names = registry.embedded_models()
    needs = {name: pool.weight_bytes(registry.resolve(name), "cpu") for name in names}
    models = ModelPool(max(needs.values()) + min(needs.values()), "cpu")
    broken = make_model(tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])

    def work(offset):
        for name in names[offset:] + names[:offset]:
            with models.use(name) as loaded:
                ids = loaded.tokenizer("Write a note:", return_tensors="pt")
                assert loaded.model(**ids).logits.isfinite().all()

    assert in_threads(work, [0, 2]) == [None, None]
    before = (models.resident, models.held_bytes)
    with pytest.raises(LabError, match="not a complete safetensors file"), models.use(str(broken)):
        pass
    assert (models.resident, models.held_bytes) == before
    assert models.peak_bytes <= models.max_bytes < sum(needs.values())
    models.clear()
    assert models.resident == ()


@pytest.mark.skipif(sys.platform != "linux", reason="reads and resets the process's peak in /proc")
def test_evicted_memory_goes_back_to_the_system(tmp_path):
    """About 200 MiB in a file and 312 MiB of random weights take turns: measured in a process of its own."""
    folder = make_model(tmp_path / "large", n_embd=1024, n_layer=4, n_head=8)
    script = f"""
        import psutil
        from nbhelpers.devices import device as devices
        from nbhelpers.loading.pool import MIB, ModelPool

        def private():
            return psutil.Process().memory_full_info().uss / MIB

        models = ModelPool(400 * MIB, "cpu", "float32")
        with models.use("lab-gpt2"):  # the libraries are in memory from here on
            pass
        models.clear()
        base, resident = private(), devices.resident_memory() / MIB
        reset, seen, peaks = devices.reset_peak("cpu"), [], []
        for name in ({str(folder)!r}, "shape:distilgpt2", {str(folder)!r}):
            with models.use(name):
                seen.append(private() - base)
                peaks.append(devices.peak_memory("cpu") / MIB - resident)  # since this model's load began
            assert models.held_bytes <= models.max_bytes
        models.clear()
        print(reset, *seen, private() - base, max(peaks))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(pool.__file__).parents[2],
    )
    reset, *figures = done.stdout.split()
    first, second, third, after, peak = map(float, figures)
    size = pool.weight_bytes(registry.resolve(str(folder)), "cpu", "float32") / pool.MIB
    other = pool.weight_bytes(registry.resolve("shape:distilgpt2"), "cpu", "float32") / pool.MIB
    assert size + other > 400
    assert size * 0.9 < first < size + 60 and size * 0.9 < third < size + 60
    assert other * 0.9 < second < other + 60
    assert after < 60
    assert reset == "False" or peak < 400 + 60
