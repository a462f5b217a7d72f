"""What names mean, what folders are refused, which prompts files are read."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from saved_models import edit_json, make_model

from nbhelpers import registry
from nbhelpers.loading import checkpoint
from nbhelpers.loading.checkpoint import inspect
from nbhelpers.records import CONTENT_TYPES, LabError, ModelSpec, Prompt

ALL = registry.load_registry()
HUB = [spec for spec in ALL.values() if spec.kind == "hub"]


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "tiny", tie_word_embeddings=True)


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "tiny")


@pytest.mark.parametrize("spec", HUB, ids=lambda spec: spec.alias)
def test_registered_numbers_are_those_of_the_architecture(spec):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**registry.shape_config(spec))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert spec.parameters == sum(p.numel() for p in model.parameters())
    assert spec.family == config.model_type
    assert spec.context == checkpoint.context_of(config)
    assert spec.layers == config.num_hidden_layers
    heads = config.num_attention_heads
    assert spec.kv_heads == getattr(config, "num_key_value_heads", heads)
    assert spec.head_dim == config.hidden_size // heads


@pytest.mark.parametrize("alias", registry.embedded_models())
def test_registered_numbers_are_those_of_the_embedded_files(alias):
    spec = ALL[alias]
    found = checkpoint.describe(ModelSpec(alias, "", "local"), registry.folder_of(spec))
    for name in ("family", "parameters", "context", "layers", "kv_heads", "head_dim", "prompt_format"):
        assert getattr(found, name) == getattr(spec, name), name


def test_the_registry_names_what_it_promises():
    names = ["lab-gpt2", "lab-bloom", "lab-opt", "lab-llama", "gpt2", "distilgpt2"]
    names += [f"facebook/opt-{size}" for size in ("125m", "350m", "1.3b", "2.7b")]
    names += ["bigscience/bloom-560m", "bigscience/bloom-1b1", "EleutherAI/pythia-410m"]
    names += ["HuggingFaceTB/SmolLM2-360M-Instruct", "Qwen/Qwen2.5-0.5B-Instruct"]
    names += ["TinyLlama/TinyLlama-1.1B-Chat-v1.0"]
    assert {registry.resolve(name).alias for name in names} == set(ALL)
    sizes = [ALL[alias].parameters for alias in registry.embedded_models()]
    assert sizes == sorted(sizes) and len(sizes) == 4
    assert len({spec.slug for spec in ALL.values()}) == len(ALL)


def test_names_that_resolve(folder):
    assert registry.resolve("lab-gpt2").kind == "embedded"
    assert registry.resolve("facebook/opt-125m") == ALL["opt-125m"]
    assert registry.resolve("someone/new-model") == ModelSpec("someone/new-model", "someone/new-model", "hub")
    assert registry.resolve(str(registry.folder_of(ALL["lab-opt"]))) == ALL["lab-opt"]
    shape = registry.resolve("shape:bloom-560m")
    assert (shape.kind, shape.parameters, shape.slug) == ("shape", 559_214_592, "shape--bloom-560m")
    local = inspect(registry.resolve(str(folder)))
    assert (local.kind, local.alias, local.family, local.context) == ("local", "tiny", "gpt2", 16)
    assert (local.layers, local.kv_heads, local.head_dim) == (2, 2, 4)


@pytest.mark.parametrize(
    ("name", "suggested"),
    [
        ("lab-lama", "lab-llama"),
        ("BLOOM560m", "bloom-560m"),
        ("gpt-2", "gpt2"),
        ("shape:opt2.7b", "shape:opt-2.7b"),
        ("qwen", "qwen2.5-0.5b-instruct"),  # the beginning of a name
    ],
)
def test_an_unknown_name_gets_the_nearest(name, suggested):
    with pytest.raises(LabError, match=suggested):
        registry.resolve(name)


@given(st.text(max_size=300) | st.from_regex(r"(shape:|~|\./|[a-z]+/)[a-z0-9.\x00/-]*", fullmatch=True))
def test_any_text_is_a_model_or_a_clear_error(name):
    try:
        assert registry.resolve(name).slug
    except LabError as error:
        assert len(str(error)) > 20


def test_parameters_are_counted_from_the_headers_alone(saved, tmp_path):
    from transformers import AutoModelForCausalLM

    untied = make_model(tmp_path / "untied", tie_word_embeddings=False)
    for folder in (saved, untied):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert checkpoint.count_parameters(folder, "x") == sum(p.numel() for p in model.parameters())


def test_a_tied_layer_and_buffers_in_the_file_are_not_counted(folder):
    import torch
    from safetensors.torch import load_file, save_file

    before = checkpoint.count_parameters(folder, "x")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = torch.zeros(13, 8)
    tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
    save_file(tensors, folder / "model.safetensors")
    assert checkpoint.count_parameters(folder, "x") == before


def test_sharded_weights_are_read_and_a_lost_shard_is_named(saved, tmp_path):
    folder = make_model(tmp_path / "sharded", shard_size="4KB", tie_word_embeddings=True)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert inspect(registry.resolve(str(folder))).parameters == checkpoint.count_parameters(saved, "x")
    shards[0].unlink()
    with pytest.raises(LabError, match=shards[0].name):
        inspect(registry.resolve(str(folder)))


def _pickle_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json .*cannot be read"),
        (lambda f: (f / "config.json").write_text("[]"), "not a JSON object"),
        (lambda f: (f / "model.safetensors").unlink(), "no weights"),
        (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer"),
        (_pickle_only, r"pytorch_model.bin.*any code.*save_pretrained"),
        (_cut, "not a complete safetensors"),
        (lambda f: (f / "model.safetensors").write_text("version https://git-lfs"), "not a complete"),
        (
            lambda f: edit_json(f / "config.json", auto_map={"AutoConfig": "x.Y"}),
            "run code from a repository",
        ),
        (
            lambda f: edit_json(f / "tokenizer_config.json", auto_map={"AutoTokenizer": ["x.Y"]}),
            "run code from a repository",
        ),
    ],
)
def test_a_folder_that_cannot_be_loaded_safely_is_refused(folder, damage, says):
    damage(folder)
    with pytest.raises(LabError, match=says):
        inspect(registry.resolve(str(folder)))


def test_a_chat_template_makes_an_unregistered_model_a_chat_model(folder):
    assert inspect(registry.resolve(str(folder))).prompt_format == "plain"
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert inspect(registry.resolve(str(folder))).prompt_format == "chat"
    registered = replace(ALL["gpt2"])
    assert checkpoint.describe(registered, folder) == registered


@pytest.mark.parametrize(
    ("config", "tokenizer_limit", "context"),
    [
        ({"max_position_embeddings": 2048}, None, 2048),
        ({"seq_length": 4096}, None, 4096),
        ({}, 512, 512),
        ({}, int(1e30), 2048),
        ({"max_position_embeddings": None}, None, 2048),
    ],
)
def test_the_context_comes_from_the_first_file_that_names_a_sane_one(config, tokenizer_limit, context):
    assert checkpoint.context_of(SimpleNamespace(**config), tokenizer_limit) == context


def test_the_benchmark_prompts_are_the_default():
    prompts = registry.load_prompts()
    assert [prompt.id for prompt in prompts] == [f"b{number:02d}" for number in range(1, 16)]
    assert registry.load_prompts(limit=4) == prompts[:4]


prompt_rows = st.lists(
    st.fixed_dictionaries(
        {
            "id": st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1).filter(
                registry.one_text
            ),
            "text": st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(registry.one_text),
            "content_type": st.sampled_from(CONTENT_TYPES),
        }
    ),
    min_size=1,
    max_size=5,
    unique_by=(lambda row: row["id"], lambda row: registry.one_text(row["text"])),
)


@given(rows=prompt_rows, ascii_only=st.booleans(), limit=st.none() | st.integers(1, 9))
def test_every_valid_prompts_file_comes_back(tmp_path_factory, rows, ascii_only, limit):
    path = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    path.write_bytes("\n\n".join(lines).encode())
    read = registry.load_prompts(path, limit)
    assert read == [Prompt(**row) for row in rows[:limit]]


GOOD = '{"id": "a", "text": "Write.", "content_type": "short_post"}'


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        (GOOD + "\n{oops", r"line 2: not a JSON object"),
        (GOOD + "\n\n[1]", "line 3: not a JSON object"),
        ('{"id": "a", "content_type": "short_post"}', "line 1: the field 'text'"),
        ('{"id": "a", "text": " ", "content_type": "short_post"}', "line 1: the field 'text'"),
        ('{"id": null, "text": "x", "content_type": "short_post"}', "line 1: the field 'id'"),
        ('{"id": "a", "text": "x", "content_type": "poem"}', "line 1: unknown content type 'poem'"),
        (GOOD + "\n" + GOOD, "line 2: the id 'a' was used before"),
        (GOOD + "\n" + GOOD.replace('"a"', '"b"'), "line 2: the prompt 'b' has the text of 'a'"),
        (GOOD + "\n" + GOOD.replace('"a"', '"b"').replace("short", "linkedin"), "'b' has the text of 'a'"),
        (GOOD + "\n" + GOOD.replace('"a"', '"b"').replace("Write", " write"), "'b' has the text of 'a'"),
        (
            GOOD + "\n" + GOOD.replace('"a"', '"b"').replace("Write", "Wr\\u00adi\\u200bte\\ufeff"),
            "text of 'a'",
        ),
        ('{"id": "a", "text": "\\u200b\\ufeff", "content_type": "short_post"}', "line 1: the field 'text'"),
        (
            GOOD.replace("Write", "A cut \\ud83d emoji"),
            "line 1: the field 'text' holds half a surrogate pair",
        ),
        (GOOD + "\n" + GOOD.replace('"a"', '"\\uDC00"'), "line 2: the field 'id' holds half"),
        (
            GOOD.replace("}", ', "reference": "b"}'),
            "line 1: the field 'reference' is not known: known are id",
        ),
        (GOOD.replace("}", ', "system": "b"}'), "line 1: the field 'system' is not known"),
        (GOOD.replace("Write", "swapped \\ude00\\ud83d halves"), "line 1: .* half"),
    ],
)
def test_a_bad_prompts_file_is_one_clear_sentence(tmp_path, content, says):
    path = tmp_path / "p.jsonl"
    path.write_text(content)
    with pytest.raises(LabError, match=says):
        registry.load_prompts(path)


def test_a_whole_surrogate_pair_is_an_emoji(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(GOOD.replace("Write", "smile \\ud83d\\ude00"))
    assert registry.load_prompts(path)[0].text == "smile \N{GRINNING FACE}."


def test_unreadable_prompts(tmp_path):
    with pytest.raises(LabError, match="cannot be read"):
        registry.load_prompts(tmp_path / "absent.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(LabError, match="cannot be read as UTF-8"):
        registry.load_prompts(tmp_path / "latin.jsonl")


def test_a_row_with_more_cells_than_the_header_is_refused(tmp_path):
    (tmp_path / "p.csv").write_text("id,text,content_type\na,Ask\tme,short_post\nb,Ask, again,short_post\n")
    with pytest.raises(LabError, match=r"p\.csv, line 3: it has more or fewer cells than the header"):
        registry.load_prompts(tmp_path / "p.csv")


@pytest.mark.parametrize("id", ["a\nb", "\x1b[31mred", "a\tb", "a\u2028b", "\x85"])
def test_an_id_that_no_link_leads_to_is_refused(tmp_path, id):
    path = tmp_path / "prompts.jsonl"
    row = {"id": "fine é 日", "text": "One", "content_type": "short_post"}
    path.write_text(f"{json.dumps(row)}\n{json.dumps(row | {'id': id, 'text': 'Two'})}\n")
    with pytest.raises(
        LabError, match=r"prompts.jsonl, line 2: the id .* holds a control character"
    ) as error:
        registry.load_prompts(path)
    assert str(error.value).isprintable()
