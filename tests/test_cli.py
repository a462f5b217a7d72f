"""The command line as a user meets it: exit codes, one clear sentence, nothing lost."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import openai_server
import pytest
from made_runs import make_result, make_sample, planted, prompt_ids, write_info, write_model

from nbhelpers import cli, registry, store
from nbhelpers.comparison import compare
from nbhelpers.records import FailOnError, LabError, Limits, NotebookStatus, RunInfo, Settings
from nbhelpers.runner.plan import Plan, plan_run


@pytest.fixture
def call(monkeypatch, capfd):
    """Exit code, output and errors of a command, run in this process: a new one takes a second to start."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["nbhelpers", *arguments])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code or 0, *capfd.readouterr()

    before = signal.getsignal(signal.SIGTERM)
    yield run
    signal.signal(signal.SIGTERM, before)  # `run` sets it


def sentence(done: tuple[int, str, str]) -> str:
    """The one line a wrong call prints; fails on a traceback or on chatter."""
    code, _, said = done
    assert code == 2, said
    lines = said.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("nbhelpers: "), said
    return lines[0]


def test_unknown_model_suggests_the_nearest_and_makes_nothing(tmp_path):
    """As the installed command, in a process of its own."""
    command = [Path(sys.executable).with_name("nbhelpers"), "run", "lab-lama"]
    env = {**os.environ, "NBHELPERS_OUTPUTS": str(tmp_path / "outputs")}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert "lab-llama" in sentence((done.returncode, done.stdout, done.stderr))
    assert not (tmp_path / "outputs").exists()


def test_limit_zero_is_refused(call):
    assert "limit" in sentence(call("run", "--limit", "0"))


def test_repeats_zero_is_refused(call):
    assert "repeats is 0" in sentence(call("run", "--repeats", "0"))


@pytest.mark.parametrize(("flag", "value"), [("--device", "tpu"), ("--dtype", "int3")])
def test_unknown_device_and_dtype_name_the_choices(call, flag, value):
    text = sentence(call("run", flag, value))
    assert value in text and "choose one of auto" in text


def test_malformed_prompts_name_the_line(call, tmp_path):
    bad = tmp_path / "prompts.jsonl"
    bad.write_text('{"id": "a", "text": "Write:", "content_type": "short_post"}\n{"id": \n')
    assert "line 2" in sentence(call("run", "--prompts", str(bad)))


def test_unwritable_output_folder(call, tmp_path):
    (tmp_path / "file").write_text("x")
    assert "--out" in sentence(call("run", "--out", str(tmp_path / "file" / "below")))


def test_wrong_flag_exits_2(call):
    assert call("run", "--no-such-flag")[0] == 2


def test_resume_of_an_unknown_run_and_with_changed_settings(call):
    assert "no run" in sentence(call("run", "--resume", "never-was"))
    assert "leave out seed" in sentence(call("run", "--resume", "latest", "--seed", "3"))


def test_an_output_folder_that_cannot_be_made(call, tmp_path):
    (tmp_path / "file").touch()
    shown = sentence(call("run", "lab-gpt2", "--out", str(tmp_path / "file" / "below")))
    assert "file/below cannot be used (Not a directory): free space or choose another folder" in shown


@pytest.mark.parametrize(
    ("text", "failed", "attempted", "reached"),
    [
        ("false", 60, 60, False),
        ("0", 60, 60, False),
        ("true", 1, 60, True),
        ("TRUE", 0, 2, False),
        ("0.1", 6, 60, True),
        ("0.1", 5, 60, False),
        ("5", 5, 60, True),
        ("5", 4, 60, False),
    ],
)
def test_fail_on_error_counts_as_inspect_ai_does(text, failed, attempted, reached):
    assert cli._fail_on_error(text).reached(failed, attempted) == reached


@pytest.mark.parametrize("text", ["", "no", "-1", "1e999", "5x", "nan"])
def test_another_fail_on_error_is_refused(text):
    with pytest.raises(LabError, match="give true, false, a share"):
        cli._fail_on_error(text)


def test_the_command_line_hands_settings_and_limits_to_the_run(call, tmp_path, monkeypatch):
    seen: list[tuple[Settings, Limits]] = []

    def run(plan, jobs, limits, watch, spread) -> RunInfo:
        seen.append((plan.info.settings, limits))
        return plan.info

    monkeypatch.setattr("nbhelpers.runner.run.run_models", run)
    flags = "--timeout 1 --batch-timeout 3"
    drawn = "--temperature 0.5 --top-k 3 --top-p 0.9"
    given = ["run", "lab-gpt2", "--out", str(tmp_path), *flags.split(), *drawn.split()]
    assert call(*given, "--fail-on-error", "0.5")[0] == 0
    settings = Settings(model="", temperature=0.5, top_k=3, top_p=0.9)
    assert seen == [(settings, Limits(1, 3, FailOnError(share=0.5)))]


def test_a_stopped_run_says_how_to_go_on_and_exits_130(call, tmp_path, monkeypatch):
    def run(plan, jobs, limits, watch, spread) -> RunInfo:
        raise KeyboardInterrupt

    monkeypatch.setattr("nbhelpers.runner.run.run_models", run)
    code, _, shown = call("run", "lab-gpt2", "--out", str(tmp_path))
    assert code == 130 and shown.endswith(f"Continue with: nbhelpers run --resume {tmp_path}\n")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "shift_jis"])
@pytest.mark.parametrize("command", ["run", "report", "label", "a mistake"])
def test_a_terminal_that_lacks_letters_gets_escapes(command, encoding, tmp_path, monkeypatch):
    name = "Модель…–naïve😀"
    folder, model = tmp_path / f"run {name}", tmp_path / name
    shutil.copytree(store.data_dir() / "models" / "lab-gpt2", model)
    results = [make_result(name, planted(5, 1)), make_result("lab-opt", planted(4, 2))]
    for result in results:
        write_model(folder, result, [(make_sample(result.model, id, 0), 5.0) for id in prompt_ids()])
    compare.compare_run(folder)
    info = write_info(folder, [name, "lab-opt"], failures={"lab-opt": "geht nicht: …"})
    monkeypatch.setattr(
        "nbhelpers.runner.run.run_models", lambda plan, jobs, limits, watch, spread: watch(event) or info
    )
    event = NotebookStatus("02_loading", str(model), "failed", 1.0, "…")
    wanted = {
        "run": ["run", str(model), "--out", str(folder.with_name("new"))],
        "a mistake": ["run", "lab-gpt2", "--out", str(folder)],
    }
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    for stream, to in (("stdout", out), ("stderr", err), ("argv", ["nbhelpers"])):
        monkeypatch.setattr(sys, stream, to)
    sys.argv += wanted.get(command, [command, str(folder)])
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    signal.signal(signal.SIGTERM, before)
    assert stop.value.code == {"a mistake": 2, "run": 1}.get(command, 0)
    for stream in (out, err):
        stream.flush()
    shown = (out.buffer.getvalue() + err.buffer.getvalue()).decode(encoding)
    assert "\\U0001f600" in shown


def test_models_lists_the_registry(call):
    code, shown, _ = call("models")
    assert code == 0
    for name in ("lab-gpt2", "lab-llama", "bigscience/bloom-560m", "Qwen/Qwen2.5-0.5B-Instruct"):
        assert name.split("/")[-1].lower() in shown.lower()


def test_doctor_says_ready(call):
    code, shown, said = call("doctor")
    assert code == 0, shown + said
    assert shown.strip().endswith("ready")


def test_a_servers_models_are_listed_and_found_by_name(call, tmp_path, monkeypatch):
    with openai_server.serve() as tiny:
        code, shown, _ = call("models", "--server", tiny.url.removesuffix("/v1"))
        assert (code, shown) == (0, f"server:{tiny.url}#tiny\nserver:{tiny.url}#large:7b\n")
        plan = plan_run([f"server:{tiny.url}#tiny", "lab-gpt2"], Settings(), str(tmp_path / "run"))
        assert [spec.alias for spec in plan.models.values()] == ["server:tiny", "lab-gpt2"]
        planned = list[object]()
        monkeypatch.setattr(
            "nbhelpers.runner.plan.plan_run", lambda models, *_: planned.append(models) or plan
        )
        monkeypatch.setattr("nbhelpers.runner.run.run_models", lambda *_: plan.info)
        assert call("run", "tiny", "large:7b", "--server", tiny.url)[0] == 0
        assert planned == [[f"server:{tiny.url}#tiny", f"server:{tiny.url}#large:7b"]]


def test_what_is_wrong_with_a_server_is_said_before_anything_is_made(call, tmp_path):
    out = ("--out", str(tmp_path / "run"))
    with openai_server.serve() as tiny:
        assert "has no model 'tinny': it has tiny." in sentence(
            call("run", "tinny", "--server", tiny.url, *out)
        )
        assert "takes no --top-k" in sentence(call("run", "tiny", "--server", tiny.url, "--top-k", "5", *out))
        address = tiny.url
    assert f"The server {address} is not reachable" in sentence(call("run", f"server:{address}#tiny", *out))
    assert "is not reachable" in sentence(call("models", "--server", address))
    assert "`nbhelpers models --server ADDRESS`" in sentence(call("run", "--server", address, *out))
    said = sentence(call("run", "tiny", "--server", "http://me:hush1234@127.0.0.1:9", *out))
    assert "NBHELPERS_SERVER_KEY" in said and "hush1234" not in said
    assert not (tmp_path / "run").exists()


def asked(call, monkeypatch, *arguments: str) -> tuple[Plan, int, Limits]:
    """What `run` would have done."""
    seen = []

    def run(plan, jobs, limits, watch, spread) -> RunInfo:
        seen.append((plan, jobs, limits))
        return plan.info

    monkeypatch.setattr("nbhelpers.runner.run.run_models", run)
    assert call("run", *arguments)[0] == 0
    return seen[0]


def test_a_run_is_a_file_and_an_option_on_the_line_wins(call, tmp_path, monkeypatch):
    file, folder = tmp_path / "run.toml", tmp_path / "run"
    lines = 'models = ["lab-gpt2", "lab-llama"]\nmax-new-tokens = 16\ntop_p = 0.9\nfail_on_error = 0.5\n'
    file.write_text(f"{lines}limit = 2\ntimeout = 60\nmaker_settings = true\njobs = 1\ntemperature = 0\n")
    given = "--config", str(file), "--out", str(folder), "--limit", "3"
    plan, jobs, limits = asked(call, monkeypatch, *given)
    drawn = {"temperature": 0.0, "top_p": 0.9, "maker_settings": True}
    assert plan.info.settings == Settings(model="", max_new_tokens=16, limit=3, **drawn)
    assert (plan.info.models, jobs) == (("lab-gpt2", "lab-llama"), 1)
    assert limits == Limits(cell_s=60.0, fail_on_error=FailOnError(share=0.5))
    # the folder keeps all that was asked: from it the same run begins again
    kept = str(folder / "run.toml")
    again, *rest = asked(call, monkeypatch, "--config", kept, "--out", str(tmp_path / "again"))
    assert (again.info.settings, again.info.models) == (plan.info.settings, plan.info.models)
    assert rest == [jobs, limits]
    assert "out" not in tomllib.loads(Path(kept).read_text())


def test_the_commented_file_says_every_option_and_changes_nothing(call, tmp_path, monkeypatch):
    code, text, _ = call("config")
    assert code == 0 and tomllib.loads(text) == {}
    said = tomllib.loads("\n".join(re.findall(r"^# (\w+ = .+)$", text, re.M)))
    assert {"models", "json", "timeout", "top_p", "until_decided"} <= said.keys()
    flags = set(re.findall(r"--([a-z][\w-]*)", call("run", "--help")[1]))
    names = {name.replace("_", "-") for name in said} | {"limit"}
    assert {f for f in flags if not f.startswith("no-")} - {"config", "help"} <= names
    (tmp_path / "all.toml").write_text("\n".join(f"{k} = {json.dumps(v)}" for k, v in said.items()))
    plan, *_ = asked(call, monkeypatch, "--config", str(tmp_path / "all.toml"), "--out", str(tmp_path / "a"))
    assert plan.info.settings == Settings(model="")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("temprature = 1", "did you mean 'temperature'"),
        ("limit = true", "limit is True"),
        ("limit = 1.5", "limit is 1.5"),
        ("models = [1]", "models is"),
        ("json = 1", "json is 1"),
        ("config = 'x'", "'config' is not known"),
        ("limit = -1", "at least 1"),
        ("task = 3", "no task '3'"),
        ("x =", "cannot be read as TOML"),
    ],
)
def test_a_file_that_says_what_it_may_not_is_refused(line, said, call, tmp_path):
    (tmp_path / "run.toml").write_text(line)
    done = call("run", "--config", str(tmp_path / "run.toml"), "--out", str(tmp_path / "out"))
    assert said in sentence(done)
    assert not (tmp_path / "out").exists()


def test_a_file_does_not_change_what_a_resumed_run_asks(call, tmp_path):
    (tmp_path / "run.toml").write_text("temperature = 0.8")
    done = call("run", "--config", str(tmp_path / "run.toml"), "--resume", "latest")
    assert "temperature" in sentence(done)


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("nbhelpers ga", ["gate"]),
        ("nbhelpers run lab-", ["lab-gpt2", "lab-bloom", "lab-opt", "lab-llama"]),
        ("nbhelpers run --until", ["--until-decided"]),
    ],
)
def test_a_shell_completes_commands_options_and_names_of_models(typed, offered):
    asked = {"_NBHELPERS_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    command = Path(sys.executable).with_name("nbhelpers")
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | asked, timeout=300)
    assert done.stdout.split() == offered


@pytest.mark.parametrize(("width", "tty"), [("80", True), ("80", False)])
def test_models_are_listed_with_whole_names(call, width, tty, monkeypatch):
    monkeypatch.setenv("COLUMNS", width)
    monkeypatch.setattr("sys.stdout.isatty", lambda: tty, raising=False)
    code, said, _ = call("models")
    listed = [line.split()[0] for line in said.splitlines()[1:-1]]
    assert code == 0 and listed == list(registry.load_registry())


def test_the_version_is_that_of_the_package(call):
    from importlib.metadata import version

    assert call("--version")[:2] == (0, f"{version('nbhelpers')}\n")


def test_a_copy_of_the_laboratory_holds_what_notebooks_use_and_overwrites_nothing(call, tmp_path):
    code, said, _ = call("lab", str(tmp_path / "mine"))
    assert code == 0 and "jupyter lab notebooks/00_start_here.ipynb" in said
    for held in ("notebooks/00_start_here.ipynb", "data/models.toml", "tools/memory.py"):
        assert (tmp_path / "mine" / held).is_file()
    code, _, said = call("lab", str(tmp_path / "mine"))
    assert code == 2 and "is there already, or inside what is copied: name another one." in said
    for part in ("data", "tools", "notebooks"):
        assert call("lab", str(store.project_root() / part / "x"))[0] == 2
