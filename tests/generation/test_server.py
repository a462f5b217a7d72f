"""Models behind a server: what is asked and recorded, by servers whose truth is planted and by a real one."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from statistics import median
from types import SimpleNamespace

import openai_server
import pytest
from openai_server import Fault, serve
from planted_clock import VirtualClock

from nbhelpers import pipeline, registry, store, tasks
from nbhelpers.generation import generate, latency, server
from nbhelpers.loading import load, remote
from nbhelpers.records import FailOnError, Failure, LabError, Limits, Sample, Settings

SHORT = Settings(limit=3, repeats=2, max_new_tokens=12, temperature=0.8, top_p=0.9)
PROMPTS = registry.load_prompts(limit=3)


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    for name in remote.KEY_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def connected(served, model="tiny"):
    return server.connect(registry.resolve(f"server:{served.url}#{model}"))


def one_row(served, limits=Limits()):
    found = generate.generate_samples(
        connected(served), PROMPTS[:1], replace(SHORT, repeats=1), limits=limits
    )
    return found[0]


def test_a_row_says_what_was_asked_and_what_came_back():
    with serve(reason="stop") as tiny:
        rows = generate.generate_samples(connected(tiny), PROMPTS, replace(SHORT, top_k=7))
        asked = [body for body in tiny.requests if body["max_tokens"] == 12]
    assert [(r.prompt_id, r.repeat) for r in rows] == [(p.id, n) for p in PROMPTS for n in range(2)]
    seeds = {(b["messages"][0]["content"], b["seed"]) for b in asked}
    assert len(seeds) == 6 and all(0 <= seed < 2**31 for _, seed in seeds)
    assert {(b["temperature"], b["top_p"], b["stream"]) for b in asked} == {(0.8, 0.9, True)}
    assert not any("ignore_eos" in body for body in asked)
    assert all((server.PLAIN_SAMPLING | {"top_k": 7}).items() <= body.items() for body in asked)
    for row in rows:
        seed = next(
            s
            for text, s in seeds
            if text == row.prompt and row.text == "".join(openai_server.words(text, s)).strip()
        )
        assert seed in {b["seed"] for b in asked}
    row = rows[0]
    assert (row.model, row.engine, row.finish_reason, row.batch_size) == ("server:tiny", "server", "eos", 4)
    assert (row.prompt_tokens, row.new_tokens, row.estimated, row.error) == (7, 12, None, None)
    assert (row.peak_memory_bytes, row.energy_j, row.bytes) == (None, None, len(row.text))
    assert 0 < row.ttft_s < row.latency_s and row.tpot_s == (row.latency_s - row.ttft_s) / 11


def test_rows_are_found_again_and_failed_ones_asked_again(tmp_path):
    path = tmp_path / "samples.jsonl"
    with serve(answer=lambda prompt, seed: openai_server.words(prompt, 0)) as tiny:
        model = connected(tiny)
        tiny.faults = [Fault(sent=3, then="drop")]
        first = generate.generate_samples(model, PROMPTS, SHORT, path, batch_size=1)
        assert [row.failure for row in first] == [Failure.SERVER, *[None] * 5]
        before = len(tiny.requests)
        second = generate.generate_samples(model, PROMPTS, SHORT, path)
        assert len(tiny.requests) == before + 1
        assert second[1:] == first[1:] and second[0].error is None
        assert generate.generate_samples(connected(tiny), PROMPTS, SHORT, path) == second
        tiny.models = [{"id": "tiny", "created": 1}]  # another revision
        generate.generate_samples(connected(tiny), PROMPTS, SHORT, path)
    assert len(list(store.read_rows(path, Sample))) == 6 + 1 + 6
    assert "estimated" not in path.read_text()


@pytest.mark.parametrize(
    ("fault", "kind", "said"),
    [
        (Fault(500), None, ""),  # once: asked again
        (Fault(sent=2, then="drop"), Failure.SERVER, "APIConnectionError|breaks off"),
        (Fault(sent=2, then="end"), Failure.SERVER, "breaks off"),
        (Fault(sent=2, then='{"choices": [{"del'), Failure.BAD_OUTPUT, "JSON"),
        (Fault(sent=2, then='{"choices": 7}'), Failure.BAD_OUTPUT, "TypeError"),
        (Fault(sent=2, then='{"error": {"message": "out of slots"}}'), Failure.SERVER, "out of slots"),
        (
            Fault(sent=2, then="stall", stall_s=60),
            Failure.TIMEOUT,
            "",
        ),  # it then ends: SERVER, if not stopped
        (Fault(sent=0, then="stall", stall_s=60), Failure.TIMEOUT, ""),
    ],
    ids=["500", "drop", "end", "half JSON", "no choices", "error", "stall", "silence"],
)
def test_what_a_server_does_wrong_is_a_row_with_its_kind(fault, kind, said):
    with serve() as tiny:
        model = connected(tiny)
        tiny.faults = [fault]
        asked, limits = replace(SHORT, repeats=1), Limits(generation_s=1 if fault.then == "stall" else 300)
        rows = generate.generate_samples(model, PROMPTS[:1], asked, limits=limits)
        rows += generate.generate_samples(model, PROMPTS[1:], asked)
    assert [row.failure for row in rows] == [kind, None, None]
    if kind:
        assert re.search(said, rows[0].error) and rows[0].finish_reason == "error" and rows[0].text == ""
        assert rows[0].latency_s is None and rows[0].share_s is None


def test_a_server_that_never_works_costs_its_rows_and_stops_the_run_where_asked(tmp_path):
    with serve() as tiny:
        model = connected(tiny)
        tiny.faults = [Fault(500)] * 100
        rows = generate.generate_samples(model, PROMPTS[:1], SHORT)
        assert [(row.failure, row.finish_reason) for row in rows] == [(Failure.SERVER, "error")] * 2
        limits = Limits(fail_on_error=FailOnError(count=1))
        with pytest.raises(LabError, match="stopped by --fail-on-error: 1 of 6"):
            generate.generate_samples(model, PROMPTS, SHORT, tmp_path / "samples.jsonl", 1, limits)


def test_a_slow_answer_ends_at_its_limit(monkeypatch):
    """On a clock that the server's waits alone move, however the machine is used."""
    clock = VirtualClock()
    planted = SimpleNamespace(perf_counter=clock, monotonic=clock, sleep=clock.pause, time=time.time)
    for module in (server, remote, openai_server):
        monkeypatch.setattr(module, "time", planted)
    monkeypatch.setattr(remote, "LATE_S", 1000)  # the answer's own limit ends it, not that of its bytes
    with serve(piece_s=15) as slow:
        row = one_row(slow, Limits(generation_s=100))
    assert (row.failure, row.finish_reason) == (Failure.TIMEOUT, "time")
    assert row.text and row.new_tokens < 12 and 100 < row.latency_s <= 11 * 15


@pytest.mark.parametrize("piece", [": waiting\n\n", "x"], ids=["comments", "bytes"])
def test_what_keeps_a_connection_alive_does_not_keep_an_answer_waiting(piece):
    with serve() as tiny:
        model = connected(tiny)
        tiny.faults = [Fault(sent=1, then="drip", drip=piece, stall_s=60)]
        rows = generate.generate_samples(
            model, PROMPTS[:1], replace(SHORT, repeats=1), limits=Limits(generation_s=1)
        )
    assert rows[0].failure is Failure.TIMEOUT  # not stopped, it would break off in the end: SERVER


def test_it_waits_as_long_as_the_server_asks():
    with serve() as busy:
        model = connected(busy)
        busy.faults = [Fault(429, {"Retry-After": "1"})]
        row = generate.generate_samples(model, PROMPTS[:1], replace(SHORT, repeats=1))[0]
        waited = busy.times[-1] - busy.times[-2]
    assert row.error is None and row.ttft_s < 1 <= waited  # the wait is not the model's


@pytest.mark.parametrize(
    ("usage", "estimated", "tokens"),
    [
        (None, True, (12, None)),
        ({"prompt_tokens": 7, "completion_tokens": 10**9}, True, (12, 7)),
        ({"prompt_tokens": 7, "completion_tokens": 3}, True, (12, 7)),  # fewer than the pieces
        ({"prompt_tokens": 7, "completion_tokens": "12"}, True, (12, 7)),
        ({"prompt_tokens": -1, "completion_tokens": 12}, True, (12, None)),
        ({"prompt_tokens": 7, "completion_tokens": 12}, None, (12, 7)),
    ],
)
def test_tokens_that_cannot_be_are_estimated_and_marked(usage, estimated, tokens):
    with serve(usage=lambda n: usage) as tiny:
        row = one_row(tiny)
    new, prompt = tokens
    assert row.estimated is estimated and row.new_tokens == new
    assert row.prompt_tokens == (prompt or -(-len(row.prompt) // 4))


def test_an_end_that_is_none_of_an_answer_fails_the_row():
    with serve(reason="content_filter") as tiny, pytest.raises(LabError, match="content_filter"):
        connected(tiny)


def test_chat_where_there_is_one_else_completion():
    with serve() as tiny:
        assert connected(tiny).report.prompt_format == "chat"
    for status in (404, 400, 501):
        with serve(chat=status) as plain:
            assert connected(plain).report.prompt_format == "plain"
            row = one_row(plain)
            assert row.error is None and plain.requests[-1]["prompt"] == PROMPTS[0].text
    with serve() as both:
        name = f"server:{both.url}/completions#tiny"
        assert server.connect(registry.resolve(name)).report.prompt_format == "plain"


def test_options_that_a_server_refuses_are_left_out_and_said():
    with serve() as all_of_them:
        assert connected(all_of_them).report.notes == (server.UNMEASURED,)
    with serve(refused=("ignore_eos",)) as tiny:
        model = connected(tiny)
        assert model.options == ("top_k", "stream_options", "seed")
        assert "ends an answer" in model.report.notes[1]
    with serve(refused=("min_p",)) as tiny:
        model = connected(tiny)
        assert model.options == ("stream_options", "seed") and "rare words" in model.report.notes[2]
    with serve(refused=("seed",)) as tiny:
        model = connected(tiny)
        assert model.options == () and len(model.report.notes) == 6
        assert one_row(tiny).error is None and "seed" not in tiny.requests[-1]
    with (
        serve(refused=("temperature",)) as strict,
        pytest.raises(LabError, match="does not answer as the model"),
    ):
        connected(strict)


def test_a_temperature_or_seed_without_effect_is_said():
    with serve(answer=lambda prompt, seed: openai_server.words(prompt, 0)) as cold:
        assert connected(cold).report.notes == (server.UNMEASURED, server.COLD)
    with serve(answer=lambda *_: openai_server.words(str(time.perf_counter()), 0)) as unsteady:
        assert connected(unsteady).report.notes == (server.UNMEASURED, server.UNSTEADY)


def test_what_a_server_adds_to_sampling_is_set_aside_unless_it_is_asked_for():
    asked = replace(SHORT, repeats=1, maker_settings=True)
    with serve() as tiny:
        model = connected(tiny)
        generate.generate_samples(model, PROMPTS[:1], asked)
        assert not server.PLAIN_SAMPLING.keys() & tiny.requests[-1].keys()
        generate.generate_samples(model, PROMPTS[:1], replace(asked, maker_settings=False))
        assert server.PLAIN_SAMPLING.keys() <= tiny.requests[-1].keys()


def test_reasoning_is_set_aside_however_it_comes():
    with serve(answer=lambda prompt, seed: ["<think>", "hm", "</think>", "Yes."]) as tiny:
        assert (one_row(tiny).reasoning, one_row(tiny).text) == ("hm", "Yes.")
    with serve(delta="reasoning_content") as tiny:
        row = one_row(tiny)
        assert row.reasoning.startswith("w") and row.text == "" and row.ttft_s is not None
    with serve(delta="reasoning") as tiny:
        assert one_row(tiny).reasoning.startswith("w")


@pytest.mark.parametrize("at_once", [1, 3])
def test_as_many_requests_at_a_time_as_asked(at_once):
    """Each answer waits until as many are under way."""
    with serve() as tiny:
        model, together = connected(tiny), threading.Barrier(at_once)
        tiny.answer = lambda *asked: [together.wait(60), *openai_server.words(*asked)][1:]
        rows = generate.generate_samples(model, PROMPTS, SHORT, batch_size=at_once)
        assert tiny.most == at_once
        rows += generate.generate_samples(model, PROMPTS, SHORT, limits=Limits(at_once=at_once))
    assert {(row.batch_size, row.error) for row in rows} == {(at_once, None)}
    shared, whole = (sum(getattr(row, name) for row in rows) for name in ("share_s", "latency_s"))
    assert shared < whole or at_once == 1  # shares add up to the wall time


@pytest.mark.parametrize(("first_s", "piece_s"), [(0.1, 0.01), (0.4, 0.02)])
def test_times_are_those_of_a_server_that_waits_by_plan(tmp_path, first_s, piece_s):
    """TTFT within 5 ms or 2%, TPOT within 5%: of many answers the nearest, as others use the machine."""
    apart, prompts = list[tuple[float, float]](), registry.load_prompts(limit=5)
    with serve(first_s=first_s, piece_s=piece_s, answer=lambda *_: [" w"] * 12) as slow:
        model, allowed = connected(slow), (max(0.005, 0.02 * first_s), 0.05)
        for n in range(10):  # a clock that is off by more is so every time
            path = tmp_path / f"{n}.jsonl"
            latency.measure_latency(model, prompts, SHORT, path)
            rows = list(store.read_rows(path, Sample))  # in the order in which they were asked
            own = [(first - asked, (last - first) / 11) for asked, first, *_, last in slow.own[-10:]]
            assert min(ttft for ttft, _ in own) >= first_s
            pairs = zip(rows, own, strict=True)
            apart += [(row.ttft_s - ttft, abs(row.tpot_s / tpot - 1)) for row, (ttft, tpot) in pairs]
            if all(min(one) < most for one, most in zip(zip(*apart, strict=True), allowed, strict=True)):
                break
    nearest = [min(one) for one in zip(*apart, strict=True)]
    assert 0 < nearest[0] < allowed[0] and nearest[1] < allowed[1]
    assert {body.get("ignore_eos") for body in slow.requests[-10:]} == {True}
    assert slow.most == 1


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("server:http://127.0.0.1:9/v1#x", "is not reachable: start it"),
        ("server:http://user:hush1234@127.0.0.1:9/v1#x", "NBHELPERS_SERVER_KEY"),
        ("server:http://127.0.0.1:9/v1?api_key=hush1234#x", "NBHELPERS_SERVER_KEY"),
        ("server:ftp://127.0.0.1/v1#x", "write http://HOST:PORT/v1"),
        ("server:http://127.0.0.1:port/v1#x", "write http://HOST:PORT/v1"),
        ("server:#x", "write http://HOST:PORT/v1"),
        ("server:http://127.0.0.1:9/v1", "lacks a model"),
    ],
)
def test_names_that_mean_no_server_are_one_sentence(name, said):
    with pytest.raises(LabError, match=said) as caught:
        pipeline.open_run(Settings(model=name))
    assert "hush1234" not in str(caught.value)


def test_a_model_that_the_server_lacks_gets_the_nearest():
    with serve() as tiny:
        with pytest.raises(LabError, match=r"has no model 'large': it has large:7b"):
            pipeline.open_run(Settings(model=f"server:{tiny.url}#large"))
        with pytest.raises(LabError, match=r"it has large:7b, tiny"):
            pipeline.open_run(Settings(model=f"server:{tiny.url}#qqqqqq"))
        with pytest.raises(LabError, match="does not answer as the model '/nowhere'"):
            connected(tiny, "/nowhere")
        with pytest.raises(LabError, match="no list of models"):
            pipeline.open_run(Settings(model=f"server:{tiny.url}/v2#tiny"))
        assert [body for body in tiny.requests if body["model"] != "/nowhere"] == []


def test_what_a_server_says_of_a_model_is_its_revision():
    def revision(**said):
        with serve(models=[{"id": "tiny"} | said]) as tiny:
            return remote.look_up(registry.resolve(f"server:{tiny.url}#tiny"))

    assert revision().revision == revision(created=int(time.time())).revision  # the time of day is no version
    assert len({revision(created=n).revision for n in (1, 2)} | {revision().revision}) == 3
    assert revision(permission=[{"id": time.time()}]).revision == revision().revision
    assert revision(meta={"n_ctx_train": 512, "n_params": 10}).parameters == 10
    assert revision(max_model_len=4096).context == 4096 and revision(max_model_len="x").context is None


def test_names_tell_servers_apart():
    one, two, three = (registry.resolve(f"server:http://{host}#m") for host in ("a:1", "b:2/v1", "b:2"))
    assert two == three and one.alias == "server:m" and one.source == "http://a:1/v1#m"
    assert [spec.alias for spec in registry.tell_apart([one, two])] == ["server:a:1#m", "server:b:2#m"]
    local = registry.resolve("server:http://a/v1#/home/me/models/tiny")
    assert (local.alias, local.slug) == ("server:tiny", "server--tiny")


def test_the_key_is_sent_and_stands_nowhere(monkeypatch, tmp_path):
    key = "sk-very-secret-12345"
    with serve(key=key) as locked:
        name = f"server:{locked.url}#tiny"
        with pytest.raises(
            LabError, match="refuses the key: put its key into the variable NBHELPERS_SERVER_KEY"
        ):
            pipeline.open_run(Settings(model=name))
        monkeypatch.setenv("OPENAI_API_KEY", key)
        run = pipeline.open_run(Settings(name, str(tmp_path), limit=1, repeats=1, max_new_tokens=4))
        model = server.connect(run.spec)
        locked.faults = [Fault(sent=1, then=json.dumps({"error": {"message": f"bad {key}"}}))]
        row = generate.generate_samples(model, PROMPTS[:1], run.settings, run.folder / "samples.jsonl")[0]
        assert row.error == "APIError: bad ***"
        pipeline.make(run, "result")
    written = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert written and not any(key in text for text in written)


def test_all_of_a_models_files_from_a_server(tmp_path):
    with serve() as tiny:
        run = pipeline.open_run(replace(SHORT, model=f"server:{tiny.url}#tiny", run_dir=str(tmp_path)))
        pipeline.make(run, "result")
        before = len(tiny.requests)
        pipeline.make(run, "result")
        assert len(tiny.requests) == before
        pipeline.make(pipeline.open_run(replace(run.settings, repeats=3)), "samples")
    report, made = load.read_report(run), json.loads((run.folder / "result.json").read_text())
    assert (report.device, report.dtype, report.parameters, report.parameter_bytes) == (
        "server",
        "unknown",
        None,
        None,
    )
    assert made["parameters"] is None and made["finished"] == 6
    names = set(made["metrics"])
    assert not [
        name for name in names if name.startswith("memory/") or "joules" in name or "per_request" in name
    ]
    assert {"latency/ttft_s/mean", "latency/tpot_s/mean", "latency/batch_tokens_per_s"} <= names


def test_a_server_is_asked_a_tasks_own_items(tmp_path):
    """A planted server that answers two of three items right scores two thirds."""
    asked = Settings(task="arithmetic", run_dir=str(tmp_path), limit=6, repeats=1, max_new_tokens=8)
    items = {item.text: item for item in tasks.prompts_of(asked)}
    right = {text: n % 3 != 0 for n, text in enumerate(items)}
    with serve(answer=lambda text, _: [" ", items[text].target[0] if right.get(text) else "none"]) as tiny:
        run = pipeline.open_run(replace(asked, model=f"server:{tiny.url}#tiny"))
        pipeline.make(run, "result")
        bodies = [body for body in tiny.requests if body["messages"][-1]["content"] in items]
    result = json.loads((run.folder / "result.json").read_text())
    assert (result["finished"], result["quality"][result["primary"]]["mean"]) == (6, pytest.approx(2 / 3))
    before = [list(turn) for turn in next(iter(items.values())).before]
    assert [[turn["role"], turn["content"]] for turn in bodies[0]["messages"][:-1]] == before


def test_weights_behind_a_server_are_not_loaded():
    with serve() as tiny, pytest.raises(LabError, match="behind a server"):
        load.fetch(registry.resolve(f"server:{tiny.url}#tiny"))


@pytest.fixture(scope="module")
def transformers_serve(tmp_path_factory):
    """transformers' own server over the embedded models, whose folder it is started in."""
    pytest.importorskip("fastapi", reason="transformers serve needs fastapi and uvicorn")
    pytest.importorskip("uvicorn", reason="transformers serve needs fastapi and uvicorn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--device", "cpu", "--dtype", "float32"]
    given = os.environ | {"HF_HUB_CACHE": str(tmp_path_factory.mktemp("cache")), "HF_HUB_OFFLINE": "1"}
    log, where = tmp_path_factory.mktemp("log") / "log", store.data_dir() / "models"
    with (
        log.open("w") as out,
        subprocess.Popen(command, env=given, cwd=where, stdout=out, stderr=out) as process,
    ):
        address, end = f"http://127.0.0.1:{port}/v1", time.monotonic() + 120
        try:
            while process.poll() is None and time.monotonic() < end:
                try:
                    remote.list_models(address)
                    break
                except LabError:
                    time.sleep(0.2)
            yield address
        finally:
            process.terminate()


def test_texts_of_transformers_serve_are_ours(transformers_serve):
    model = server.connect(registry.resolve(f"server:{transformers_serve}#lab-gpt2"))
    assert model.report.prompt_format == "plain" and model.options == ("stream_options", "seed")
    greedy = Settings(repeats=1, max_new_tokens=40, temperature=0)
    prompts = registry.load_prompts(limit=5)
    theirs = generate.generate_samples(model, prompts, greedy, batch_size=1)
    loaded = load.load("lab-gpt2", "cpu", "float32")
    ours = generate.generate_samples(loaded, prompts, greedy)
    for a, b in zip(theirs, ours, strict=True):
        assert (a.error, a.text, a.finish_reason) == (None, b.text, b.finish_reason)
        assert (a.prompt_tokens, a.new_tokens, a.estimated) == (b.prompt_tokens, b.new_tokens, None)
    assert median(a.tpot_s for a in theirs) > 0
