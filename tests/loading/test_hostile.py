"""Models, texts and names that mean harm: nothing runs, nothing escapes, one clear sentence says why."""

import ast
import csv
import io
import json
import pickle
import re
import shutil
import subprocess
import time
import unicodedata
from dataclasses import replace
from pathlib import Path

import made_runs
import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from saved_models import edit_json

from nbhelpers import redact, registry, store
from nbhelpers.comparison import compare, rating_sheet
from nbhelpers.loading import checkpoint, load, tokenization
from nbhelpers.records import LabError, ModelSpec, NotebookStatus, RunInfo
from nbhelpers.report.html import outcome, write_report
from nbhelpers.runner import notebook, run
from nbhelpers.runner.plan import Plan
from nbhelpers.tracking.result import read_results


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
    load.unload(load.load(str(folder), "cpu"))
    assert not fuse.exists()
    (folder / "model.safetensors").unlink()
    with pytest.raises(LabError, match="only pickled weights"):
        load.load(str(folder), "cpu")
    shutil.copy(folder / "pytorch_model.bin", folder / "model.safetensors")
    with pytest.raises(LabError, match="not a complete safetensors file"):
        load.load(str(folder), "cpu")
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
    with pytest.raises(LabError, match="run code from a repository"):
        load.load(str(folder), "cpu")
    monkeypatch.setattr(checkpoint, "check_no_remote_code", lambda config, name: None)  # the second wall
    with pytest.raises(LabError):
        load.load(ModelSpec("tiny", str(folder), "local"), "cpu")
    assert not fuse.exists()


def test_the_registry_cannot_ask_for_remote_code():
    entry = {"source": "a/b", "family": "x", "prompt": "plain", "licence": "x", "trust_remote_code": True}
    with pytest.raises(LabError, match="trust_remote_code"):
        registry._spec("a", entry)
    package = Path(load.__file__).parents[1]
    sources = "".join(path.read_text() for path in package.rglob("*.py"))
    assert sources.count("trust_remote_code=") == sources.count("trust_remote_code=False") > 0


def _index(folder: Path, shard: str) -> None:
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"transformer.wte.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


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
    (lambda f: _index(f, "../outside.safetensors"), r"lacks the weight file '\.\./outside\.safetensors'"),
    (lambda f: _index(f, "/etc/hostname"), "lacks the weight file '/etc/hostname'"),
    (lambda f: _index(f, "config.json"), "config.json, which is not a complete safetensors file"),
    (_sparse("config.json"), "config.json .* 2,048 MiB"),
    (_sparse("tokenizer.json"), "tokenizer.json .* 2,048 MiB"),
    (_sparse("chat_template.jinja"), "chat_template.jinja .* 2,048 MiB"),
    (_headed, "not a complete safetensors file"),
    (lambda f: (f / "config.json").write_text('{"a":' * 100_000), "config.json .* cannot be read"),
    (
        lambda f: edit_json(f / "config.json", n_layer=10**6),
        r"n_layer = 1000000 in its config\.json and 28 tensors",
    ),
    (lambda f: edit_json(f / "config.json", text_config={"num_experts": 10**9}), "num_experts = 1000000000"),
    (lambda f: edit_json(f / "config.json", attn_implementation="evil/kernels"), "evil/kernels"),
    (lambda f: (f / "adapter_config.json").write_text("{}"), "is an adapter"),
]


@pytest.mark.parametrize(("damage", "says"), HARM)
def test_a_hostile_folder_is_refused_before_its_files_are_read(folder, damage, says):
    damage(folder)
    started = time.monotonic()
    with pytest.raises(LabError, match=says) as caught:
        checkpoint.inspect(registry.resolve(str(folder)))
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < 20  # two gigabytes of json take longer, if they end at all


@pytest.mark.parametrize("size", [{"n_positions": 2**33}, {"vocab_size": 2**40}, {"n_inner": 2**40}])
def test_absurd_sizes_are_refused_without_memory_for_them(folder, size):
    edit_json(folder / "config.json", **size)
    with pytest.raises(LabError, match="describes tensors of other sizes"):
        load.load(str(folder), "cpu")


def with_template(folder: Path, template: str):
    (folder / "chat_template.jinja").write_text(template)
    return tokenization.load_tokenizer(folder)


def test_a_good_chat_template_gives_what_transformers_gives(folder):
    tokenizer = with_template(folder, "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    odd = "tab\tnewline\n\x00 \ud83d <script> {{ 7 * 7 }} é 🙂"
    turns = [{"role": "user", "content": odd}]
    direct = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert tokenization.render(tokenizer, odd) == direct == f"<user>{odd}"


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
        tokenization.render(tokenizer, "x")
    assert len(str(caught.value)) < 300
    assert not fuse.exists()


def test_weights_may_lie_beside_a_snapshot_in_the_hubs_cache(folder, tmp_path):
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / ("0" * 40)
    shutil.copytree(folder, snapshot)
    blob = tmp_path / "models--org--tiny" / "blobs" / "b"
    blob.parent.mkdir()
    (snapshot / "model.safetensors").rename(blob)
    (snapshot / "model.safetensors").symlink_to(Path("../../blobs/b"))
    checkpoint.check_folder(snapshot, "tiny")


def test_tensors_of_another_model_in_the_file_are_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    others = {f"../{key}": value.clone() for key, value in tensors.items()}
    for held, says in ((others, "lacks tensors"), (tensors | others, "does not describe")):
        save_file(held, folder / "model.safetensors")
        with pytest.raises(LabError, match=says):
            load.load(str(folder), "cpu")


EVIL = "<script>document.title='ran'</script><img src=x onerror=\"document.title='ran'\"></pre></td>"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def title_in_browser(page: Path) -> str:
    """The page's title after a headless browser has run whatever it would run."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000", "--dump-dom"]
    command = [CHROMIUM, *flags, f"--user-data-dir={page.parent / 'profile'}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return re.search("<title>(.*?)</title>", done.stdout).group(1)


def hostile_run(run_dir: Path) -> Path:
    """A run in which every text that comes from outside is evil."""
    model = f"evil{EVIL}\x1b[31m"
    result = made_runs.make_result(model, [5.0, 6.0], revision=EVIL, family=EVIL)
    sample = made_runs.make_sample(model, EVIL, 0, text=EVIL, prompt=EVIL, revision=EVIL)
    failed = made_runs.make_sample(model, "b02", 0, text="", error=EVIL, finish_reason="error")
    made_runs.write_model(run_dir, result, [(sample, 5.0), (failed, 0.0)])
    made_runs.write_info(run_dir, [model], {model: f"{EVIL}\x1b]0;ran\x07"})
    return run_dir


@pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine")
def test_the_browser_runs_what_is_not_escaped(tmp_path):
    page = tmp_path / "bare.html"
    page.write_text(f"<html><head><title>still</title></head><body>{EVIL}</body></html>")
    assert title_in_browser(page) == "ran"  # so that the tests below can fail


def test_a_report_shows_hostile_texts_as_texts(tmp_path):
    page = write_report(hostile_run(tmp_path / "run"))
    body = page.read_text()
    assert body.count("<script") == 1 and "<img src=x" not in body and "\x1b" not in body
    assert "&lt;script&gt;document.title=" in body
    if CHROMIUM:
        assert title_in_browser(page) not in ("ran", "")


def test_an_executed_notebook_shows_hostile_texts_as_texts(tmp_path):
    cell = nbformat.v4.new_code_cell("print(text)")
    html = {"text/html": EVIL, "text/plain": EVIL}
    cell.outputs = [
        nbformat.v4.new_output("stream", text=EVIL),
        nbformat.v4.new_output("execute_result", data=html),
        nbformat.v4.new_output("error", ename="E", evalue=EVIL, traceback=[EVIL]),
    ]
    path = tmp_path / "evil.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[cell, nbformat.v4.new_markdown_cell(EVIL)]), path)
    page = notebook.to_html(path)
    assert "<script" not in page.read_text()
    if CHROMIUM:
        assert title_in_browser(page) == "evil"


def test_no_terminal_code_reaches_the_terminal(tmp_path, capsys):
    run_dir = hostile_run(tmp_path / "run")
    compare.compare_run(run_dir)
    info = store.read_json(run_dir / "run.json", RunInfo)
    print(outcome(run_dir, info))
    spec = ModelSpec("evil", "evil", "hub")
    plan = Plan(run_dir, replace(info, models=("evil",), specs=(spec,)))
    with run.watching(plan) as watch:
        watch(NotebookStatus("02_loading", "evil", "failed", 1.0, "\x1b[5m"))
    shown = capsys.readouterr().out
    assert "evil<script>" in shown and "\x1b" not in shown and "\x07" not in shown


@pytest.mark.parametrize("name", ["\x1b[31mred", "a\nb", "x/\x9bmodel", "shape:\x1b", "a\u202eb"])
def test_names_that_drive_a_terminal_are_no_names(name, tmp_path):
    with pytest.raises(LabError, match="cannot be printed") as caught:
        registry.resolve(name)
    assert str(caught.value).isprintable()


def test_a_folder_whose_name_drives_a_terminal_is_refused(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(saved, tmp_path / "\x1b[31mred"))
    with pytest.raises(LabError, match="cannot be printed"):
        registry.resolve(".")


anything = st.text(max_size=200)


@given(text=anything)
def test_printable_text_keeps_all_that_a_page_and_a_terminal_can_show(text):
    shown = redact.printable(text)
    assert len(shown) == len(text)
    shown.encode()  # no half of a surrogate pair is left
    for before, after in zip(text, shown, strict=True):
        assert after == before or not before.isprintable()
        assert after.isprintable() or after in "\t\n" or unicodedata.category(after) not in ("Cc", "Cs")


@given(alias=st.sampled_from(["../../x", "/etc/passwd", "..", ".", "a/b", "C:\\x", "x" * 500]) | anything)
def test_every_name_becomes_one_folder_inside_the_run(alias):
    slug = ModelSpec(alias, "", "hub").slug
    assert Path("/outputs/run", slug).resolve().parent == Path("/outputs/run")
    assert len(slug.encode()) < 250 + 80 and slug


@given(texts_=st.lists(anything, min_size=1, max_size=5))
def test_no_cell_of_a_sheet_is_a_formula_and_all_come_back(texts_):
    out = io.StringIO(newline="")
    csv.writer(out).writerows([[rating_sheet.harmless(text)] for text in texts_])
    cells = [row[0] if row else "" for row in csv.reader(io.StringIO(out.getvalue(), newline=""))]
    for text, cell in zip(texts_, cells, strict=True):
        assert cell[:1] not in {"=", "+", "-", "@", "\t", "\r"}
        assert cell.removeprefix("'") == text or cell == text


def test_a_result_that_names_another_folder_is_not_followed(tmp_path):
    result = made_runs.make_result("good", [5.0, 6.0])
    store.write_json(tmp_path / "run" / "good" / "result.json", replace(result, slug="../../outside"))
    sample = made_runs.make_sample("good", "b01", 0, text="a secret text")
    store.append_row(tmp_path.parent / "outside" / "samples.jsonl", sample)
    results, broken = read_results(tmp_path / "run")
    assert not results and "'../../outside'" in broken["good"]
    assert "a secret text" not in write_report(tmp_path / "run").read_text()


def test_no_name_or_prompt_reaches_a_shell():
    package = Path(load.__file__).parents[1]
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"os.system", "os.popen", "subprocess.getoutput", "eval", "exec"}, path
                assert not any(key.arg == "shell" for key in node.keywords), path
