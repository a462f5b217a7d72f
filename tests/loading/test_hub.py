"""Fetching from the Hub, against a small real server on this machine: what arrives, and every refusal."""

import itertools
import json
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch
from hub_server import Fault, Repository, serve
from safetensors.torch import save_file
from saved_models import edit_json, make_model

# Fetches each name given, or name@revision, and prints what came of it, one JSON line per name.
FETCH = """
import dataclasses, json, os, sys
from nbhelpers import registry
from nbhelpers.loading import load
from nbhelpers.records import LabError
for name in sys.argv[1:]:
    try:
        name, _, revision = name.partition("@")
        spec = dataclasses.replace(registry.resolve(name), revision=revision or None)
        folder = load.fetch(spec)
        files = sorted(path.name for path in folder.iterdir())
        print(json.dumps({"revision": load.revision_of(spec), "files": files}))
    except LabError as error:
        print(json.dumps({"error": str(error), "kind": error.kind}))
"""
LOAD = """
import json, sys
from nbhelpers.loading import load
loaded = load.load(sys.argv[1])
ids = loaded.tokenizer("Write a note", return_tensors="pt")
out = loaded.model.generate(**ids, max_new_tokens=3, do_sample=False)
print(json.dumps([loaded.revision, loaded.report.parameters, loaded.spec.prompt_format, out.shape[1]]))
"""


def run(script: str, home: Path, endpoint: str, *names: str, **environment: str) -> list:
    env = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"} | environment
    env |= {"HF_HUB_DISABLE_XET": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", script, *names], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def tiny(models):
    folder = make_model(models / "tiny")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle beside the safetensors")
    (folder / "modeling.py").write_text("raise SystemExit('ran')")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return folder


def pickled(models: Path, name: str) -> Path:
    folder = make_model(models / name)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return folder


def remote_code(models: Path) -> Path:
    folder = make_model(models / "remote")
    edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling.Evil"})
    return folder


def classifier(models: Path) -> Path:
    folder = make_model(models / "classifier")
    edit_json(folder / "config.json", architectures=["GPT2ForSequenceClassification"])
    return folder


def only(models: Path, *names: str) -> Path:
    folder = models / names[0]
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(b"{}")
    return folder


def test_fetch_load_generate_and_again_without_network(tiny, tmp_path):
    with serve({"org/tiny": Repository({"main": tiny})}) as hub:
        commit = Repository({"main": tiny}).commit("main")
        ((revision, parameters, prompt_format, length),) = run(LOAD, tmp_path, hub.url, "org/tiny")
        assert (revision, prompt_format, length) == (commit, "chat", 6)
        assert parameters == 13 * 8 + 16 * 8 + 2 * (12 * 8 * 8 + 13 * 8) + 2 * 8
        (fetched,) = run(FETCH, tmp_path, hub.url, "org/tiny")
        assert fetched["revision"] == commit
        assert "model.safetensors" in fetched["files"] and "tokenizer.json" in fetched["files"]
        assert not {"pytorch_model.bin", "modeling.py"} & set(fetched["files"])
        downloads = [line for line in hub.requests if line.startswith("GET") and "model.safetensors" in line]
        assert len(downloads) == 1  # the second process found it in the cache
    (again,) = run(FETCH, tmp_path, hub.url, "org/tiny")  # the server is gone
    (offline,) = run(FETCH, tmp_path, hub.url, "org/tiny", HF_HUB_OFFLINE="1")
    assert again == offline == fetched


def test_an_adapter_to_a_model_of_the_hub_has_the_limits_of_its_base(tiny, tmp_path):
    (folder := tmp_path / "adapter").mkdir()
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "org/tiny",
        "target_modules": ["c_attn"],
        "r": 1,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config | {"fan_in_fan_out": True}))
    names = [f"base_model.model.transformer.h.{i}.attn.c_attn.lora" for i in (0, 1)]
    tensors = {f"{name}_A.weight": torch.ones(1, 8) for name in names}
    tensors |= {f"{name}_B.weight": torch.ones(24, 1) for name in names}
    save_file(tensors, folder / "adapter_model.safetensors")
    script = LOAD + "print(json.dumps([loaded.report.base, loaded.report.context, loaded.spec.layers]))"
    with serve({"org/tiny": Repository({"main": tiny})}) as hub:
        loaded, limits = run(script, tmp_path / "home", hub.url, str(folder))
    assert limits == ["org/tiny", 16, 2]
    assert loaded[2:] == ["chat", 6] and len(loaded[0]) == 12


@pytest.fixture(scope="module")
def wide(models):
    """Large enough for several reads of the network: 1.3 MB of weights."""
    return make_model(models / "wide", n_embd=128, n_layer=2)


def snapshot(home: Path, name: str, revision: str) -> Path:
    return home / f"hub/models--{name.replace('/', '--')}/snapshots/{revision}"


def leftovers(home: Path) -> list[Path]:
    return list(home.rglob("*.incomplete"))


def test_a_connection_that_breaks_at_random_bytes_is_taken_up(wide, tmp_path):
    weights = wide / "model.safetensors"
    size = weights.stat().st_size
    breaks = random.Random(5).sample(range(1, size // 4), 3)
    faults = {weights.name: [Fault(sent=sent) for sent in breaks]}
    with serve({"org/wide": Repository({"main": wide}, faults=faults)}) as hub:
        (fetched,) = run(FETCH, tmp_path, hub.url, "org/wide")
        assert not faults[weights.name]
    found = snapshot(tmp_path, "org/wide", fetched["revision"]) / weights.name
    assert found.read_bytes() == weights.read_bytes()


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_busy_hub_is_asked_again_when_it_says(tiny, tmp_path, file):
    faults = {file: [Fault(429, {"Retry-After": "2"})]}
    with serve({"org/tiny": Repository({"main": tiny}, faults=faults)}) as hub:
        (fetched,) = run(FETCH, tmp_path, hub.url, "org/tiny")
        assert "model.safetensors" in fetched.get("files", ()), fetched
        assert not faults[file]
        gaps = [later - earlier for earlier, later in itertools.pairwise(hub.times)]
        assert max(gaps) >= 2


def test_a_hub_that_stays_busy_is_given_up(tiny, tmp_path):
    faults = {"model.safetensors": [Fault(503, {"Retry-After": "1000"})] * 9}
    with serve({"org/tiny": Repository({"main": tiny}, faults=faults)}) as hub:
        (refused,) = run(FETCH, tmp_path, hub.url, "org/tiny")
    assert "answered HTTP 503" in refused["error"]
    assert not leftovers(tmp_path)


def test_weights_of_the_wrong_content_or_size_are_never_kept(wide, tmp_path):
    weights = (wide / "model.safetensors").read_bytes()
    for name, body in {"flipped": weights[:-1] + bytes([weights[-1] ^ 1]), "short": weights[:-9]}.items():
        faults = {"model.safetensors": [Fault(body=body)]}
        with serve({"org/wide": Repository({"main": wide}, faults=faults)}) as hub:
            (refused,) = run(FETCH, tmp_path / name, hub.url, "org/wide")
            assert {"flipped": "damaged", "short": "should be of size"}[name] in refused["error"]
            assert not list((tmp_path / name).rglob("*.safetensors")) and not leftovers(tmp_path)
            (offline,) = run(FETCH, tmp_path / name, hub.url, "org/wide", HF_HUB_OFFLINE="1")
            assert "not wholly in the local cache" in offline["error"]
            (fetched,) = run(FETCH, tmp_path / name, hub.url, "org/wide")
            assert "model.safetensors" in fetched["files"]


def test_a_file_that_changes_in_a_cache_that_was_never_checked_is_found(wide, tmp_path):
    with serve({"org/wide": Repository({"main": wide})}) as hub:
        (fetched,) = run(FETCH, tmp_path, hub.url, "org/wide")
        folder = snapshot(tmp_path, "org/wide", fetched["revision"])
        (folder.parent.parent / "verified" / folder.name).unlink()  # as after a kill between the two
        with (folder / "model.safetensors").resolve().open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\xff")
        (refused,) = run(FETCH, tmp_path, hub.url, "org/wide")
        assert "has a damaged model.safetensors in the local cache, which was deleted" in refused["error"]
        (again,) = run(FETCH, tmp_path, hub.url, "org/wide")
        assert again == fetched
        assert (folder / "model.safetensors").read_bytes() == (wide / "model.safetensors").read_bytes()


def test_the_download_ends_with_the_process_that_wanted_it(wide, tmp_path):
    faults = {"model.safetensors": [Fault(slow_s=0.05)]}
    with serve({"org/wide": Repository({"main": wide}, faults=faults)}) as hub:
        env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        parent = subprocess.Popen(
            [sys.executable, "-c", FETCH, "org/wide"], env=env, stdout=subprocess.DEVNULL
        )
        while not hub.served["model.safetensors"]:
            time.sleep(0.05)
        assert not psutil.Process(parent.pid).children()
        parent.kill()
        parent.wait()
        (fetched,) = run(FETCH, tmp_path, hub.url, "org/wide")
        assert "model.safetensors" in fetched["files"]


def test_a_full_disk_is_one_sentence_and_the_next_try_succeeds(wide, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("no tmpfs can be mounted here (needs root)")
    try:
        with serve({"org/wide": Repository({"main": wide})}) as hub:
            (refused,) = run(FETCH, disk, hub.url, "org/wide")
            assert "the disk was full" in refused["error"]
            assert not list(disk.rglob("model.safetensors")) and not leftovers(disk)
            subprocess.run(["mount", "-o", "remount,size=9m", disk], check=True)
            (fetched,) = run(FETCH, disk, hub.url, "org/wide")
            assert "model.safetensors" in fetched["files"]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_file_larger_than_the_system_allows_is_the_same_as_a_full_disk(wide, tmp_path):
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))\n" + FETCH
    with serve({"org/wide": Repository({"main": wide})}) as hub:
        (refused,) = run(limited, tmp_path, hub.url, "org/wide")
    assert "the disk was full" in refused["error"] and not leftovers(tmp_path)


def test_two_processes_that_want_the_same_model_fetch_it_once(wide, tmp_path):
    with serve({"org/wide": Repository({"main": wide})}) as hub, ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: run(FETCH, tmp_path, hub.url, "org/wide"), range(2)))
        assert both[0] == both[1] and "files" in both[0][0]
        assert hub.served["model.safetensors"] == (wide / "model.safetensors").stat().st_size


def test_a_pinned_revision_is_what_is_read_and_the_latest_is_not(models, tiny, wide, tmp_path):
    repository = Repository({"main": wide, "old": tiny})
    pinned = repository.commit("old")
    with serve({"org/model": repository}) as hub:
        latest, old, unknown = run(
            FETCH, tmp_path, hub.url, "org/model", f"org/model@{pinned}", f"org/model@{'0' * 40}"
        )
        assert (latest["revision"], old["revision"]) == (repository.commit("main"), pinned)
        found = snapshot(tmp_path, "org/model", pinned) / "model.safetensors"
        assert found.read_bytes() == (tiny / "model.safetensors").read_bytes()
        assert f"no revision '{'0' * 40}'" in unknown["error"]
    (offline,) = run(FETCH, tmp_path, hub.url, f"org/model@{pinned}", HF_HUB_OFFLINE="1")
    assert offline == old


def test_part_of_a_model_is_not_read_as_the_whole_without_network(wide, tmp_path):
    with serve({"org/wide": Repository({"main": wide})}) as hub:
        (fetched,) = run(FETCH, tmp_path, hub.url, "org/wide")
    folder = snapshot(tmp_path, "org/wide", fetched["revision"])
    (folder / "tokenizer_config.json").unlink()  # a download that was stopped before this file
    (offline,) = run(FETCH, tmp_path, hub.url, "org/wide", HF_HUB_OFFLINE="1")
    assert "not wholly in the local cache" in offline["error"]


def test_paths_that_leave_the_cache_are_refused(tiny, tmp_path):
    listed = [
        {"type": "file", "path": f"model-{way}evil.safetensors", "size": 2, "oid": "0" * 40}
        for way in ("/../../../../../../", "/../")
    ]
    for row in listed:
        with serve({"org/tiny": Repository({"main": tiny}, listed=(row,))}) as hub:
            (refused,) = run(FETCH, tmp_path / "home", hub.url, "org/tiny")
        assert "error" in refused and "Traceback" not in refused["error"]
    assert not list(tmp_path.rglob("*evil*"))


def test_a_gated_model_opens_with_the_token_and_the_token_is_in_no_file(tiny, tmp_path):
    token = "hf_planted0123456789"
    with serve({"org/tiny": Repository({"main": tiny}, token=token)}) as hub:
        (refused,) = run(FETCH, tmp_path, hub.url, "org/tiny", HF_TOKEN="hf_wrong")
        assert "is gated" in refused["error"] and "HF_TOKEN" in refused["error"]
        (fetched,) = run(FETCH, tmp_path, hub.url, "org/tiny", HF_TOKEN=token)
        assert "model.safetensors" in fetched["files"]
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and token.encode() in p.read_bytes()]


def test_every_refusal_is_one_clear_sentence(models, tiny, tmp_path):
    repositories = {
        "org/gated": Repository({"main": tiny}, refuse=(403, "GatedRepo")),
        "org/locked": Repository({"main": tiny}, refuse=(403, "")),
        "org/broken": Repository({"main": tiny}, refuse=(418, "")),
        "org/empty": Repository({"main": models}),  # holds folders, no config.json
        "org/pickled": Repository({"main": pickled(models, "pickled")}),
        "org/remote": Repository({"main": remote_code(models)}),
        "org/classifier": Repository({"main": classifier(models)}),
        "org/gguf": Repository({"main": only(models, "tiny-Q4.gguf")}),
        "org/adapter": Repository({"main": only(models, "adapter_config.json", "adapter_model.safetensors")}),
    }
    says = {
        "org/gated": "is gated: accept its licence",
        "org/locked": "answered HTTP 403: log in",
        "org/broken": "answered HTTP 418",
        "org/empty": "no config.json",
        "org/pickled": "only pickled weights (pytorch_model.bin)",
        "org/remote": "asks to run code",
        "org/classifier": "is a classifier or reward model",
        "org/gguf": "only GGUF weights (tiny-Q4.gguf)",
        "org/adapter": "is an adapter: download it",
        "facebook/opt-125": "is not on the Hub, or is private",  # 401, as the Hub answers the anonymous
    }
    with serve(repositories) as hub:
        answers = run(FETCH, tmp_path, hub.url, *says)
        for (name, expected), answer in zip(says.items(), answers, strict=True):
            assert expected in answer.get("error", ""), (name, answer)
            assert "\n" not in answer["error"]
        assert not any(
            "model.safetensors" in line for line in hub.requests if "remote" in line or "class" in line
        )
        assert not any("resolve" in line and ".bin" in line for line in hub.requests)


def test_a_hub_that_cannot_be_reached(tmp_path):
    (refused,) = run(FETCH, tmp_path, "http://127.0.0.1:9", "org/tiny")
    assert "did not come from http://127.0.0.1:9 (" in refused["error"]
    (offline,) = run(FETCH, tmp_path, "http://127.0.0.1:9", "org/tiny", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE" in offline["error"]
