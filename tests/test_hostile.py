"""Models, texts and names that mean harm: nothing runs, nothing escapes, one clear sentence says why."""

import json
import multiprocessing
import pickle
import shutil
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from saved_models import edit_json, make_model

from nbhelpers import chat, checkpoints, loading, registry
from nbhelpers.records import LabError, ModelSpec


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "tiny")


class Bomb:
    """Unpickled, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_beside_the_weights_is_never_opened(folder, tmp_path):
    fuse = tmp_path / "exploded"
    body = pickle.dumps(Bomb(fuse))
    for name in ("pytorch_model.bin", "training_args.bin", "model.pt", "adapter_model.bin", "tokenizer.pkl"):
        (folder / name).write_bytes(body)
    loading.unload(loading.load(str(folder), "cpu"))
    assert not fuse.exists()
    (folder / "model.safetensors").unlink()
    with pytest.raises(LabError, match="only pickled weights"):
        loading.load(str(folder), "cpu")
    shutil.copy(folder / "pytorch_model.bin", folder / "model.safetensors")
    with pytest.raises(LabError, match="not a complete safetensors file"):
        loading.load(str(folder), "cpu")
    assert not fuse.exists()
    pickle.loads(body)  # the bomb is live
    assert fuse.exists()


CODE = "import pathlib\npathlib.Path({fuse!r}).touch()\nclass Evil: pass\n"


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_a_model_never_runs(folder, tmp_path, monkeypatch, file):
    fuse = tmp_path / "ran"
    (folder / "evil.py").write_text(CODE.format(fuse=str(fuse)))
    classes = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "evil.Evil")
    edit_json(folder / file, auto_map={**classes, "AutoTokenizer": ["evil.Evil", None]})
    edit_json(folder / "config.json", model_type="evil")
    for name in ("TRUST_REMOTE_CODE", "HF_TRUST_REMOTE_CODE", "TRANSFORMERS_TRUST_REMOTE_CODE"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(LabError, match="Python code"):
        loading.load(str(folder), "cpu")
    monkeypatch.setattr(checkpoints, "check_no_remote_code", lambda config, name: None)  # the second wall
    with pytest.raises(LabError):
        loading.load(ModelSpec("tiny", str(folder), "local"), "cpu")
    assert not fuse.exists()


def test_the_registry_cannot_ask_for_remote_code():
    entry = {"source": "a/b", "family": "x", "prompt": "plain", "licence": "x", "trust_remote_code": True}
    assert "trust" not in str(registry._spec("a", entry))
    package = Path(loading.__file__).parent
    sources = "".join(path.read_text() for path in package.glob("*.py"))
    assert sources.count("trust_remote_code=") == sources.count("trust_remote_code=False") > 0


def _index(folder: Path, shard: str) -> None:
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"transformer.wte.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _link(name: str):
    def damage(folder: Path) -> None:
        outside = folder.parent / f"outside-{name}"
        (folder / name).rename(outside)
        (folder / name).symlink_to(outside)

    return damage


def _sparse(name: str, size: int = 2 * 2**30):
    def damage(folder: Path) -> None:
        with (folder / name).open("ab") as file:
            file.truncate(size)

    return damage


def _headed(folder: Path) -> None:
    """Weights whose header says that it has a gigabyte."""
    with (folder / "model.safetensors").open("r+b") as file:
        file.write((2**30).to_bytes(8, "little"))
        file.truncate(2**31)


HARM = [
    (lambda f: _index(f, "../outside.safetensors"), r"names '\.\./outside\.safetensors'"),
    (lambda f: _index(f, "/etc/hostname"), "names '/etc/hostname'"),
    (lambda f: _index(f, "pytorch_model.bin"), r"names 'pytorch_model\.bin'"),
    (_link("model.safetensors"), "model.safetensors .* link out of its folder"),
    (_link("tokenizer.json"), "tokenizer.json .* link out of its folder"),
    (_link("config.json"), "config.json .* link out of its folder"),
    (_sparse("config.json"), "config.json .* 2,048 MiB"),
    (_sparse("tokenizer.json"), "tokenizer.json .* 2,048 MiB"),
    (_sparse("chat_template.jinja"), "chat_template.jinja .* 2,048 MiB"),
    (_headed, "not a complete safetensors file"),
    (lambda f: (f / "config.json").write_text('{"a":' * 100_000), "config.json .* cannot be read"),
    (lambda f: edit_json(f / "config.json", n_layer=10**6), "n_layer = 1000000 and its weights have 29 ten"),
    (lambda f: edit_json(f / "config.json", text_config={"num_experts": 10**9}), "num_experts = 1000000000"),
    (lambda f: edit_json(f / "config.json", attn_implementation="evil/kernels"), "evil/kernels"),
    (lambda f: (f / "adapter_config.json").write_text("{}"), "is an adapter"),
]


@pytest.mark.parametrize(("damage", "says"), HARM)
def test_a_hostile_folder_is_refused_before_its_files_are_read(folder, damage, says):
    damage(folder)
    started = time.monotonic()
    with pytest.raises(LabError, match=says) as caught:
        registry.resolve(str(folder))
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < 20  # two gigabytes of json take longer, if they end at all


@pytest.mark.parametrize("size", [{"n_positions": 2**33}, {"vocab_size": 2**40}, {"n_inner": 2**40}])
def test_absurd_sizes_are_refused_without_memory_for_them(folder, size):
    edit_json(folder / "config.json", **size)
    with pytest.raises(LabError, match=r"describes [\d,]+ numbers and its weights hold"):
        loading.load(str(folder), "cpu")


def with_template(folder: Path, template: str):
    (folder / "chat_template.jinja").write_text(template)
    return loading.load_tokenizer(folder)


def test_a_good_chat_template_gives_what_transformers_gives(folder):
    tokenizer = with_template(folder, "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    odd = "tab\tnewline\n\x00 \ud83d <script> {{ 7 * 7 }} é 🙂"
    turns = [{"role": "user", "content": odd}]
    direct = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert chat.render(tokenizer, odd) == direct == f"<user>{odd}"


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch FUSE') }}",
    "{{ messages.__class__.__base__.__subclasses__()[0]('FUSE') }}",
    "{{ (lipsum | attr('__globals__'))['os'].popen('touch FUSE') }}",
    "{{ messages.append(1) }}",
    "{{ self.__init__.__globals__ }}",
    "{% include '/etc/hostname' %}",
    "{{ raise_exception('a' * 10000) }}",
    "{{ 1 / 0 }}",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_a_template_cannot_reach_out_of_its_sandbox(folder, tmp_path, template):
    fuse = tmp_path / "fuse"
    tokenizer = with_template(folder, template.replace("FUSE", str(fuse)))
    with pytest.raises(LabError, match="chat template fails") as caught:
        chat.render(tokenizer, "x")
    assert len(str(caught.value)) < 300
    assert not fuse.exists()


LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"


@pytest.mark.skipif(sys.platform != "linux", reason="the limits need fork")
@pytest.mark.parametrize(
    ("template", "says"),
    [
        (LOOPS + "{% endfor %}" * 3, "longer than 1 s"),
        ("{{ 9 ** (9 ** 9) }}", "longer than 1 s"),
        ("{{ 'a' * 10 ** 11 }}", "MiB of memory"),
        ("{{ 'a' * 10 ** 7 }}", "MiB of text"),
    ],
)
def test_a_template_that_would_not_end_is_stopped(folder, template, says):
    tokenizer = with_template(folder, template)
    with pytest.raises(LabError, match=says):
        chat.render(tokenizer, "x", limit_s=1)
    assert not multiprocessing.active_children()


def test_weights_may_lie_beside_a_snapshot_in_the_hubs_cache(folder, tmp_path):
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / ("0" * 40)
    shutil.copytree(folder, snapshot)
    blob = tmp_path / "models--org--tiny" / "blobs" / "b"
    blob.parent.mkdir()
    (snapshot / "model.safetensors").rename(blob)
    (snapshot / "model.safetensors").symlink_to(Path("../../blobs/b"))
    checkpoints.check_folder(snapshot, "tiny")


def test_tensors_of_another_model_in_the_file_do_no_harm(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({f"../{key}": value for key, value in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(LabError, match="are missing"):
        loading.load(str(folder), "cpu")
