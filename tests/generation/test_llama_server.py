"""llama-cpp-python's own server over a GGUF of lab-llama, where it is installed (extra bench; compiled)."""

import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nbhelpers import registry
from nbhelpers.generation import generate, likelihood, server
from nbhelpers.loading import load, remote
from nbhelpers.records import Failure, LabError, Prompt, Settings

for needed in ("llama_cpp", "gguf", "sse_starlette"):
    pytest.importorskip(needed, reason=f"{needed} is not installed (extra bench)")

GREEDY = Settings(repeats=1, max_new_tokens=40, temperature=0)
PROMPTS = registry.load_prompts(limit=4)


def start(folder: Path, *options: str) -> tuple[subprocess.Popen, str]:
    """The server, once it lists its model, and its address for completions: lab-llama is no chat model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(folder / "lab-llama.gguf")]
    command += ["--model_alias", "lab-llama", "--host", "127.0.0.1", "--port", str(port), *options]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=os.environ, stdout=log, stderr=log)
    address, end = f"http://127.0.0.1:{port}/v1/completions", time.monotonic() + 120
    while process.poll() is None and time.monotonic() < end:
        try:
            remote.list_models(address)
            break
        except LabError:
            time.sleep(0.2)
    return process, address


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    from tools import bench_gguf

    made = tmp_path_factory.mktemp("gguf")
    bench_gguf.convert("lab-llama", str(made / "lab-llama.gguf"))
    return made


@pytest.fixture(scope="module")
def address(folder):
    process, at = start(folder, "--logits_all", "true", "--interrupt_requests", "false")
    yield at
    process.terminate()
    process.wait()


def asked(address: str) -> server.Served:
    return server.connect(registry.resolve(f"server:{address}#lab-llama"))


@pytest.mark.parametrize("at_once", [1, 4])
def test_its_texts_are_ours(address, at_once):
    """Word for word, or up to a token that is about as likely as ours: it adds up in another order."""
    model, ours = asked(address), load.load("lab-llama", "cpu", "float32")
    assert model.report.prompt_format == "plain" and model.options == tuple(server.OPTIONS)
    theirs = generate.generate_samples(model, PROMPTS, GREEDY, batch_size=at_once)
    for a, b in zip(theirs, generate.generate_samples(ours, PROMPTS, GREEDY), strict=True):
        assert (a.error, a.finish_reason) == (None, b.finish_reason) and 0 < a.ttft_s < a.latency_s
        assert a.estimated  # while it streams it counts no tokens
        if a.text == b.text:
            continue
        x, y = (ours.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (a.text, b.text))
        n = next(n for n, (one, other) in enumerate(zip(x, y, strict=False)) if one != other)
        read = ours.tokenizer(a.prompt)["input_ids"] + y[:n]
        with torch.inference_mode():
            logits = ours.model(torch.tensor([read])).logits[0, -1]
        assert abs(float(logits[x[n]] - logits[y[n]])) < 0.05, (a.text, b.text)


def test_its_log_likelihoods_of_choices_are_ours(address):
    ours = load.load("lab-llama", "cpu", "float32")
    client, item = (
        remote.client_of(address),
        Prompt("id", "We now write down one", choices=("lesson", "plan B")),
    )
    found = likelihood.of_server(client, "lab-llama", ("choices",), 60, item)
    want = likelihood.log_likelihoods(ours, likelihood.choices(ours, item))
    assert found["choices"] == pytest.approx(want, abs=0.05)  # its cache holds float16
    spec = registry.resolve(f"server:{address}#lab-llama")
    likelihood.check_server(spec, ("choices",))
    with pytest.raises(LabError, match="the log-likelihood of text is not available there"):
        likelihood.check_server(spec, ("text",))  # it tells none of a first token


def test_what_it_breaks_off_and_what_its_end_costs_is_asked_again(folder, tmp_path):
    """As it starts by itself it ends an answer when the next is asked for."""
    file, warm = tmp_path / "samples.jsonl", replace(GREEDY, temperature=0.8, repeats=2)
    process, at = start(folder)
    try:
        model = asked(at)
        rows = generate.generate_samples(model, PROMPTS[:2], warm, file, batch_size=4)
        assert any("use --at-once 1" in (row.error or "") for row in rows)
        rows = generate.generate_samples(model, PROMPTS[:2], warm, file, batch_size=1)
        assert [row.error for row in rows] == [None] * 4
    finally:
        process.kill()
        process.wait()
    dead = generate.generate_samples(model, PROMPTS[:3], warm, file, batch_size=2)
    assert dead[:4] == rows and [row.failure for row in dead[4:]] == [Failure.SERVER] * 2
    process, at = start(folder)  # at another address, which is no part of what decides a text
    try:
        again = generate.generate_samples(asked(at), PROMPTS[:3], warm, file, batch_size=1)
    finally:
        process.kill()
        process.wait()
    assert again[:4] == rows and [row.error for row in again[4:]] == [None] * 2
