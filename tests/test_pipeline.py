"""What is missing of a model's files is made, once and visibly; what is there and right stays."""

import json
import os
import re
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest

from nbhelpers import pipeline, registry, store
from nbhelpers.generation import decode, generate, sampling
from nbhelpers.loading import load
from nbhelpers.records import LabError, Limits, ModelSpec, Result, RunInfo, Sample, Settings
from nbhelpers.report import html
from nbhelpers.scoring import rubric


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    asked = Settings("lab-gpt2", str(folder), limit=2, repeats=1, max_new_tokens=8, device="cpu")
    made = pipeline.open_run(asked)
    pipeline.make(made, "result")
    return made


def test_every_step_leaves_its_file_and_the_next_call_makes_nothing(run, capsys):
    names = ["device", "loading", "stats", "result"]
    assert all((run.folder / f"{name}.json").exists() for name in names)
    assert len(generate.read_samples(run)) == len(rubric.read_scores(run)) == 2
    assert len(generate.read_samples(run, "latency")) == 2 * generate.ROUNDS
    before = {path.name: path.stat().st_mtime_ns for path in run.folder.iterdir()}
    pipeline.make(run, "result")
    assert {path.name: path.stat().st_mtime_ns for path in run.folder.iterdir()} == before
    assert capsys.readouterr().out == ""


def test_only_what_is_asked_for_is_made(tmp_path, capsys):
    made = pipeline.open_run(Settings("lab-gpt2", str(tmp_path), device="cpu"))
    pipeline.make(made, "device")
    assert [path.name for path in made.folder.iterdir()] == ["device.json"]
    with pytest.raises(LabError, match=r"loading\.json cannot be read \(No such file"):
        generate.read_samples(made)
    pipeline.make(made, "loading")
    assert capsys.readouterr().out == "making lab-gpt2/loading.json\n"
    with pytest.raises(LabError, match=r"lacks 60 of 60 rows: make them with pipeline\.make"):
        generate.read_samples(made)


def test_a_part_of_the_samples_is_made_and_the_rest_later(tmp_path, capsys, monkeypatch):
    asked = Settings("lab-gpt2", str(tmp_path), limit=2, repeats=2, max_new_tokens=4, device="cpu")
    made = pipeline.open_run(asked)
    pipeline.make(made, "samples", slice(2, 4))
    first = generate.stored_samples(made)
    assert [row and row.prompt_id for row in first] == [None, None, *[first[3].prompt_id] * 2]
    with monkeypatch.context() as patch:
        patch.setattr(load, "load", None)  # nobody loads it for rows that are there
        pipeline.make(made, "samples", slice(2, 4))
    capsys.readouterr()
    pipeline.make(made, "samples")
    assert capsys.readouterr().out == "making lab-gpt2/samples.jsonl\n"
    assert generate.read_samples(made)[2:] == first[2:]
    assert len(list(store.read_rows(made.folder / "samples.jsonl", Sample))) == 4


def test_loading_json_stays_until_it_answers_another_question(run, tmp_path):
    path, first = run.folder / "loading.json", load.read_report(run)
    marked = replace(first, load_s=12345.0)
    store.write_json(path, marked)
    pipeline.make(run, "loading")
    assert load.read_report(run) == marked
    other = pipeline.open_run(replace(run.settings, run_dir=str(tmp_path), dtype="bfloat16"))
    pipeline.make(other, "loading")
    assert load.read_report(other).dtype == "bfloat16"
    store.write_json(path, replace(marked, revision="another"))
    pipeline.make(run, "loading")
    assert load.read_report(run).revision == first.revision


def test_new_rows_bring_new_scores_and_a_new_result(run):
    more = pipeline.open_run(replace(run.settings, repeats=2))
    pipeline.make(more, "result")
    assert len(generate.read_samples(more)) == len(rubric.read_scores(more)) == 4
    assert store.read_json(more.folder / "result.json", Result).attempted == 4
    assert sum(1 for _ in store.read_rows(more.folder / "samples.jsonl", Sample)) == 4


def test_scores_of_other_settings_are_made_anew_from_rows_that_are_there(run):
    fewer = pipeline.open_run(replace(run.settings, limit=1))
    for asked, count in ((fewer, 1), (run, 2)):
        pipeline.make(asked, "result")
        assert len(rubric.read_scores(asked)) == count
        assert store.read_json(asked.folder / "result.json", Result).attempted == count


def test_a_scorer_file_that_changes_has_scores_made_anew_and_secondary_ones_counted_apart(tmp_path):
    (tmp_path / "items.csv").write_text("id,text,target\na,One?,1\n")
    mine = "def score(answer, item):\n    return 1.0\ndef none(answer, item):\n    return None\n"
    (tmp_path / "mine_a.py").write_text(mine)
    text = 'prompts = "items.csv"\n[scorers.one]\nkind = "python"\nfunction = "mine_a.score"\n'
    (tmp_path / "t.toml").write_text(text + '[scorers.two]\nkind = "python"\nfunction = "mine_a.none"\n')
    asked = Settings("lab-gpt2", str(tmp_path), str(tmp_path / "t.toml"), repeats=1, max_new_tokens=2)
    run = pipeline.open_run(asked)
    pipeline.make(run, "result")
    metrics = store.read_json(run.folder / "result.json", Result).metrics
    counts = {name: value for name, value in metrics.items() if "not_applicable" in name}
    assert counts == {"samples/not_applicable/two": 1}
    samples, scores = (run.folder / name for name in ("samples.jsonl", "scores.jsonl"))
    made, before = samples.stat().st_mtime_ns, scores.stat().st_mtime_ns
    pipeline.make(run, "result")
    assert scores.stat().st_mtime_ns == before
    os.utime(tmp_path / "mine_a.py", (time.time() + 5, time.time() + 5))
    pipeline.make(run, "scores")
    assert (samples.stat().st_mtime_ns, scores.stat().st_mtime_ns != before) == (made, True)


def test_a_prompt_that_was_edited_while_a_run_goes_on_is_refused(tmp_path):
    path, other = tmp_path / "prompts.jsonl", tmp_path / "other.jsonl"
    path.write_text('{"id": "a", "text": "Tea:", "content_type": "short_post"}')
    asked = Settings("lab-gpt2", str(tmp_path), prompts=str(path))
    digests = registry.digests(registry.load_prompts(path))
    info = RunInfo("r", ("lab-gpt2",), asked, "2026", None, {}, "m", None, prompts=digests)
    store.write_json(tmp_path / "run.json", info)
    assert pipeline.open_run(asked).settings == asked
    other.write_text(path.read_text().replace("Tea", "Rain"))
    assert pipeline.open_run(replace(asked, prompts=str(other))).folder.name == "lab-gpt2"  # not the run's
    path.write_text(other.read_text())
    with pytest.raises(LabError, match=r"prompts of r have changed since it began \(a\)"):
        pipeline.open_run(asked)


def test_every_setting_is_what_the_engine_gets_and_what_the_report_says(tmp_path, monkeypatch):
    path, lines = tmp_path / "prompts.jsonl", ("Write about tea:", "Write about rain:")
    rows = ({"id": f"p{n}", "text": text, "content_type": "short_post"} for n, text in enumerate(lines))
    path.write_text("\n".join(map(json.dumps, rows)))
    drawn = {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "seed": 7, "max_new_tokens": 5, "repeats": 3}
    place = {"model": "lab-opt", "run_dir": str(tmp_path / "run"), "device": "cpu", "dtype": "bfloat16"}
    task = tmp_path / "brief.toml"
    task.write_text('prompts = "none"\nsystem = "Be brief."\n[scorers.lab_v2]\nkind = "rubric"\n')
    asked = Settings(**drawn, **place, task=str(task), prompts=str(path), limit=1, maker_settings=True)
    same = [field.name for field in fields(Settings) if getattr(asked, field.name) == field.default]
    assert not same, "give each setting another value than its default, and see below what it does"

    samplers, decodes, models = [], [], []
    make_sampler, run_decode = sampling.sampler, decode.decode
    monkeypatch.setattr(sampling, "sampler", lambda *a: samplers.append(a) or make_sampler(*a))
    makers, make_makers = [], sampling.maker_sampler
    monkeypatch.setattr(sampling, "maker_sampler", lambda *a: makers.append(a) or make_makers(*a))
    monkeypatch.setattr(decode, "decode", lambda *a, **k: decodes.append(a) or run_decode(*a, **k))
    make_model = load.load
    monkeypatch.setattr(load, "load", lambda *a: models.append(make_model(*a)) or models[-1])
    made = pipeline.open_run(asked)
    pipeline.make(made, "result")

    [loaded] = models
    assert (loaded.spec.alias, loaded.device) == ("lab-opt", "cpu")
    assert {str(weight.dtype) for weight in loaded.model.parameters()} == {"torch.bfloat16"}
    seeds = [sampling.row_seed(7, "p0", repeat) for repeat in range(3)]
    assert samplers[0] == (seeds, 0.5, 3, 0.9)
    assert makers[0][:2] == (loaded.model, replace(asked, run_dir=makers[0][1].run_dir))
    model, ids, room, *_ = next(asked for asked in decodes if len(asked[1]) == 3)  # not the engine's trial
    assert model is loaded.model and [*room] == [5] * 3
    read = [loaded.tokenizer.decode(row, skip_special_tokens=True) for row in ids]
    assert read == [f"Be brief.\n\n{lines[0]}"] * 3
    said = store.read_json(made.folder / "result.json", Result).settings
    assert said == replace(asked, run_dir="")
    page = html.write_report(made.folder.parent).read_text()
    values = dict(re.findall(r"<dt>([\w ]+)</dt><dd>\s*(.*?)</dd>", page))
    assert {name: values[name.replace("_", " ")] for name in drawn} == {n: str(v) for n, v in drawn.items()}
    assert (values["prompts"], values["limit"], values["dtype"]) == ("prompts.jsonl", "1", "bfloat16")
    assert (values["maker settings"], values["task"]) == ("True", "brief.toml")


def test_a_run_s_own_record_says_what_a_name_means(tmp_path):
    spec = ModelSpec("tuned", "/gone/by/now", "local")
    info = RunInfo(
        "r", ("./tuned",), Settings(), "2026", None, {}, "m", None, specs=(spec,), limits=Limits(9.0)
    )
    path = store.write_json(tmp_path / "run.json", info)
    old = '"model_s": 9.0, "download_s": 5.0, "memory_wait_s": 0.0, "cell_s"'  # limits that there once were
    path.write_text(path.read_text().replace('"cell_s"', old))
    found = pipeline.open_run(Settings("./tuned", str(tmp_path)))
    assert (found.spec, found.folder.name, found.limits.cell_s) == (spec, "tuned", 9.0)
    assert found.folder == Path(tmp_path).resolve() / "tuned"
