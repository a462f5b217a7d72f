"""Loading, metering and unloading real models; identities; and every model that must not load."""

import gc
import hashlib
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_models import WORDS, edit_json, make_tokenizer

from nbhelpers import registry
from nbhelpers.devices import machine
from nbhelpers.loading import load, tokenization
from nbhelpers.records import LabError, ModelSpec

MIB = 2**20
EMBEDDED = registry.embedded_models()


def distinct_bytes(model):
    """Parameter bytes by brute force: every piece of memory once."""
    return sum({p.data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}.values())


@pytest.mark.parametrize("alias", EMBEDDED)
def test_an_embedded_model_loads_as_registered(alias):
    spec = registry.resolve(alias)
    loaded = load.load(alias, "cpu")
    report = loaded.report
    assert (report.parameters, report.context, report.family) == (spec.parameters, 512, spec.family)
    assert (report.dtype, report.device, report.quality_applies) == ("float32", "cpu", True)
    assert report.parameter_bytes == distinct_bytes(loaded.model) == 4 * spec.parameters
    assert report.vocabulary == len(loaded.tokenizer) == 4096
    assert report.revision == loaded.revision == load.revision_of(spec)
    assert not loaded.model.training
    assert loaded.tokenizer.padding_side == "left" and loaded.tokenizer.pad_token_id is not None
    ids = loaded.tokenizer("Write a note:", return_tensors="pt")
    assert torch.isfinite(loaded.model(**ids).logits).all()
    load.unload(loaded)


def test_a_half_dtype_halves_the_bytes():
    full = load.load("lab-gpt2", "cpu", "float32")
    half = load.load("lab-gpt2", "cpu", "bf16")
    assert half.report.dtype == "bfloat16"
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    assert 2 * half.report.parameter_bytes == full.report.parameter_bytes
    assert half.revision == full.revision  # the files are the same; the dtype is a fact of its own


def test_a_model_whose_end_token_is_its_beginning_token_loads(folder):
    loaded = load.load(str(folder), "cpu")
    assert (
        loaded.tokenizer.bos_token_id == loaded.tokenizer.eos_token_id == loaded.tokenizer.pad_token_id == 1
    )
    assert (loaded.report.context, loaded.spec.alias, loaded.report.source) == (16, "tiny", "tiny")
    assert loaded.report.device_peak_bytes is None
    assert str(folder.parent) not in str(loaded.report)


@pytest.mark.parametrize(
    ("special", "pad"),
    [
        ({"pad_token": "fast", "eos_token": "</s>"}, "fast"),
        ({"eos_token": "</s>", "unk_token": "<unk>"}, "</s>"),
        ({"unk_token": "is"}, "is"),
        ({}, WORDS[0]),
    ],
)
def test_the_pad_token_falls_back_without_growing_the_vocabulary(tmp_path, special, pad):
    make_tokenizer(tmp_path, **special)
    edit_json(tmp_path / "tokenizer_config.json", model_max_length=16)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    tokenizer = tokenization.load_tokenizer(tmp_path)
    assert tokenizer.pad_token == pad and tokenizer.padding_side == "left"
    assert len(tokenizer) == len(WORDS)
    batch = tokenizer(["Write", "Write a note"], padding=True)["input_ids"]
    assert batch[0][:2] == [WORDS.index(pad)] * 2


def test_unload_gives_the_memory_back():
    model, floor = "shape:distilgpt2", 150 * MIB  # 82 M parameters, 156 MiB in bfloat16
    load.unload(load.load("lab-gpt2", "cpu"))  # what the libraries keep for good is there now
    gc.collect()
    before = machine.resident_memory()
    loaded = load.load(model, "cpu", "bfloat16")
    kept = loaded.model  # another name for it, as a notebook's output history holds one
    held = machine.resident_memory()
    assert held - before > floor
    load.unload(loaded)
    assert held - machine.resident_memory() > floor
    assert {p.device.type for p in kept.parameters()} == {"meta"}


def test_a_shape_is_the_architecture_with_the_same_random_weights_every_time():
    first = load.load("shape:distilgpt2", "cpu", "bfloat16")
    again = load.load("shape:distilgpt2", "cpu", "bfloat16")
    assert first.report.parameters == registry.resolve("distilgpt2").parameters
    assert first.report.quality_applies is False and first.folder is None
    assert first.revision == again.revision == load.revision_of(first.spec)
    assert first.revision != load.revision_of(registry.resolve("shape:gpt2"))
    for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    ids = first.tokenizer("Write a note about caching:", return_tensors="pt")["input_ids"]
    assert ids.max() < 4096 < first.report.vocabulary
    logits = first.model(input_ids=ids).logits.float()
    assert torch.isfinite(logits).all() and logits.std() > 0
    embeddings = first.model.get_input_embeddings().weight
    assert len(torch.unique(embeddings[:2000].float(), dim=0)) == 2000


def test_the_revision_names_everything_that_decides_the_text_and_nothing_else(folder, tmp_path):
    def revision(path):
        return load.revision_of(registry.resolve(str(path)))

    first = revision(folder)
    assert len(first) == 12
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    (moved / "README.md").write_text("not part of the model")
    assert revision(moved) == first
    tensors = load_file(moved / "model.safetensors")
    tensors["transformer.wte.weight"][0, 0] += 1
    save_file(tensors, moved / "model.safetensors", metadata={"format": "pt"})
    edit_json(folder / "config.json", layer_norm_epsilon=1e-3)
    third = revision(folder)
    make_tokenizer(folder, words=WORDS[::-1])
    assert len({first, revision(moved), third, revision(folder)}) == 4


def test_a_file_is_hashed_again_only_when_it_changed(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    assert load.file_digest(path) == hashlib.sha256(b"one").hexdigest()
    misses = load._sha256.cache_info().misses
    load.file_digest(path)
    assert load._sha256.cache_info().misses == misses
    path.write_bytes(b"three")
    assert load.file_digest(path) == hashlib.sha256(b"three").hexdigest()


def test_embedded_files_are_held_against_their_recorded_digests():
    spec = registry.resolve("lab-gpt2")
    config = registry.folder_of(spec) / "config.json"
    right = hashlib.sha256(config.read_bytes()).hexdigest()
    assert load.fetch(replace(spec, sha256={"config.json": right})) == config.parent
    for name, digest in (("config.json", "0" * 64), ("absent.json", right)):
        with pytest.raises(LabError, match=rf"model 'lab-gpt2' lacks {name} as it was recorded.*build.py"):
            load.fetch(replace(spec, sha256={name: digest}))
    with pytest.raises(LabError, match=r"lacks .* run tools/models/build.py"):
        load.fetch(replace(spec, source="data/models/no-such"))


def _without_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: make_tokenizer(f, words=(*WORDS, "extra")), "knows token 13 and only 13 embeddings"),
        (_without_a_tensor, r"\(1, such as transformer.h.1.mlp.c_fc.weight"),
        (lambda f: edit_json(f / "config.json", n_embd=16), "tensors of other sizes"),
        (
            lambda f: edit_json(f / "config.json", model_type="no-such-type"),
            "configuration of the model 'tiny' cannot be loaded",
        ),
        (
            lambda f: edit_json(f / "config.json", model_type="t5", architectures=[]),
            "model 'tiny' is an encoder-decoder",
        ),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer of the model 'tiny' cannot be loaded"),
    ],
)
def test_a_folder_that_contradicts_itself_is_one_clear_sentence(folder, damage, says):
    damage(folder)
    with pytest.raises(LabError, match=says) as caught:
        load.load(str(folder), "cpu")
    assert "\n" not in str(caught.value)


def test_a_model_that_cannot_fit_is_refused_before_it_is_built():
    monster = replace(registry.resolve("shape:opt-2.7b"), parameters=10**15)
    with pytest.raises(LabError, match=r"take 3725290\.3 GiB in float32, .* free on cpu"):
        load.load(monster, "cpu")


def test_a_missing_folder_and_an_unregistered_spec():
    with pytest.raises(LabError, match=r"no config\.json"):
        load.load(ModelSpec("gone", "/no/such/folder", "local"), "cpu")


@pytest.mark.skipif(machine.available_devices()[0] != "cuda", reason="needs CUDA")
def test_cuda_holds_the_model_and_gives_it_back():
    machine.reset_peak("cuda")
    loaded = load.load("shape:distilgpt2", "cuda")
    assert loaded.report.device_peak_bytes >= loaded.report.parameter_bytes > 150 * MIB
    held = torch.cuda.memory_allocated()
    load.unload(loaded)
    assert held - torch.cuda.memory_allocated() >= loaded.report.parameter_bytes
