"""Predicted bytes against what real models, optimizers and caches hold."""

import subprocess
import sys

import pytest
import torch

from nbhelpers import cli, registry
from nbhelpers.devices import device as devices
from nbhelpers.devices import fit as memory
from nbhelpers.loading import load as loading
from nbhelpers.records import LabError


@pytest.fixture(scope="module", params=registry.embedded_models())
def net(request):
    return request.param, loading.load(request.param, "cpu", "float32").model


def kept_by(net, batch, tokens, checkpointing):
    """Bytes that a forward pass on real numbers keeps, by the addresses of what it packs."""
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.randint(5, 4000, (batch, tokens), generator=torch.Generator().manual_seed(0))
    if checkpointing:
        net.gradient_checkpointing_enable()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        net.train()(input_ids=ids, labels=ids, use_cache=False)
    net.activation_checkpointing_disable()
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_dry_run_keeps_what_the_model_keeps(net, checkpointing):
    name, model = net
    need = memory.training_need(name, 3, 50, checkpointing=checkpointing)
    assert need.activations == pytest.approx(kept_by(model, 3, 50, checkpointing), rel=0.005)


def test_states_are_what_the_optimizer_holds(net):
    name, model = net
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    ids = torch.full((1, 8), 7)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    tensors = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    need = memory.training_need(name, 1, 8)
    assert need.optimizer == sum(t.nbytes for t in tensors)
    assert need.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert need.weights == loading.parameter_bytes(model)


def test_the_cache_is_what_the_model_fills(net):
    name, model = net
    with torch.inference_mode():
        cache = model.eval()(torch.full((2, 40), 7), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert memory.inference_need(name, 2, 40).cache == held


def test_checkpointing_and_half_precision_shrink_activations_alone():
    plain = memory.training_need("lab-llama", 8, 128)
    saving = memory.training_need("lab-llama", 8, 128, checkpointing=True)
    mixed = memory.training_need("lab-llama", 8, 128, "mixed")
    assert saving.activations < plain.activations / 3
    assert mixed.activations < plain.activations
    assert plain.gradients == saving.gradients == mixed.gradients == plain.weights


def test_mixed_precision_keeps_half_size_copies_of_the_weights():
    few, many = (memory.training_need("lab-llama", 1, n, "mixed").activations for n in (1, 33))
    per_token = (many - few) / 32
    copies = few - per_token
    matrices = loading.load("lab-llama", "cpu", "float32").model
    halves = sum(2 * p.numel() for n, p in matrices.named_parameters() if p.dim() == 2 and "embed" not in n)
    assert copies == pytest.approx(halves, rel=0.3)


def test_the_largest_batch_is_the_last_that_fits():
    one = memory.training_need("lab-opt", 1, 32)
    largest = one.largest_batch(200 * 2**20)
    room = devices.HEADROOM * 200 * 2**20
    assert memory.training_need("lab-opt", largest, 32).total <= room
    assert memory.training_need("lab-opt", largest + 2, 32).total > room
    assert one.largest_batch(one.weights) == 0


METER = """
import ctypes, sys
ctypes.CDLL(None).mallopt(-3, 2**16)  # glibc hands freed tensors back at once
import torch
from nbhelpers.devices import device as devices, fit as memory, meters
from nbhelpers.loading import load as loading
torch.set_num_threads(1)
model = loading.load("lab-llama", "cpu", "float32").model.train()
optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
def step(batch, tokens):
    ids = torch.full((batch, tokens), 7)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
step(1, 8)
loading.release("cpu")
with meters.track_memory() as meter:
    step(8, 256)
need = memory.training_need("lab-llama", 8, 256)
print(meter.use.process_peak_bytes - meter.use.process_before_bytes, need.activations + need.logits)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's peak can be set back on Linux alone")
def test_a_real_step_peaks_where_predicted():
    done = subprocess.run([sys.executable, "-c", METER], capture_output=True, text=True, check=True)
    measured, predicted = map(int, done.stdout.split())
    assert measured == pytest.approx(predicted, rel=0.15)


@pytest.mark.parametrize("model", ["shape:bloom-560m", "bloom-560m"])
def test_an_architecture_is_known_before_a_download(model):
    need = memory.training_need(model, 1, 16, "mixed")
    assert need.weights == 559_214_592 * 4 and need.activations > 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("lab-llama", 0, 8), "at least one row"),
        (("lab-llama", 1, 513), "at most 512 tokens"),
        (("lab-llama", 1, 8, "int3"), "use float32, bfloat16, float16, mixed"),
        (("some/model", 1, 8), "add it to data/models.toml"),
        (("lab-lama", 1, 8), "did you mean lab-llama"),
    ],
)
def test_mistakes_are_answered_with_a_sentence(arguments, sentence):
    with pytest.raises(LabError, match=sentence):
        memory.training_need(*arguments)


def test_mixed_is_for_training():
    with pytest.raises(LabError, match="use float32, bfloat16, float16"):
        memory.inference_need("lab-llama", dtype="mixed")


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["nbhelpers", "memory", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code, capsys.readouterr()


def test_the_command_answers(monkeypatch, capsys):
    monkeypatch.setattr(devices, "free_memory", lambda device: 40 * 2**20)
    code, shown = run(monkeypatch, capsys, "lab-gpt2", "--batch", "2", "--tokens", "512")
    assert code == 0 and "fits into 90% of the 40 MiB free on" in shown.out
    code, shown = run(monkeypatch, capsys, "opt-2.7b", "--dtype", "bf16")
    assert code == 0 and "does not fit" in shown.out and shown.out.endswith("none\n")
    code, shown = run(monkeypatch, capsys, "lab-gpt2", "--checkpointing")
    assert code == 2 and "add --train" in shown.err
