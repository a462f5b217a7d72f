"""Which model a folder holds: what is refused because it is none that continues text, and what is not."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_models import WORDS, edit_json, make_model, make_tokenizer

from nbhelpers import registry
from nbhelpers.generation import generate
from nbhelpers.loading import checkpoint, load, tokenization
from nbhelpers.records import Failure, LabError, Prompt, Settings

GREEDY = Settings(repeats=1, max_new_tokens=4, temperature=0.0)
PROMPTS = [Prompt("a", "Write a note", "short_post"), Prompt("b", "Write", "short_post")]


def inspect(folder):
    return checkpoint.inspect(registry.resolve(str(folder)))


def loaded_from(folder, dtype="float32"):
    return load.load(str(folder), "cpu", dtype)


def change_tensors(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"architectures": ["BertForMaskedLM"]}, "masked language model"),
        ({"architectures": ["BertForPreTraining"]}, "masked language model"),
        ({"architectures": ["GPT2ForSequenceClassification"]}, "classifier or reward model"),
        ({"architectures": ["LlamaForTokenClassification"]}, "classifier or reward model"),
        ({"architectures": ["LlamaForRewardModel"]}, "classifier or reward model"),
        ({"architectures": ["MistralModel"]}, "embedding model"),
        ({"architectures": ["T5EncoderModel"]}, "embedding model"),
        ({"architectures": ["WhisperForCausalLM"]}, "speech model"),
        ({"architectures": ["Wav2Vec2ForCTC"]}, "speech model"),
        ({"architectures": ["ViTForImages"]}, "another kind of model"),
        ({"architectures": ["BartForConditionalGeneration"], "is_encoder_decoder": True}, "encoder-decoder"),
    ],
)
def test_what_was_not_trained_to_continue_text_is_named_and_refused(folder, config, says):
    edit_json(folder / "config.json", **config)
    with pytest.raises(LabError, match=f"is an? .*{says}|is {says}") as caught:
        inspect(folder)
    assert config["architectures"][0] in str(caught.value)


def test_an_embedding_model_of_sentence_transformers_is_refused(folder):
    (folder / "modules.json").write_text("[]")
    with pytest.raises(LabError, match="embedding model"):
        inspect(folder)


def test_a_family_that_transformers_does_not_load_for_text_alone_is_named(folder):
    edit_json(folder / "config.json", model_type="llava", architectures=["LlavaForConditionalGeneration"])
    with pytest.raises(LabError, match="of the kind llava, which transformers does not load for text alone"):
        loaded_from(folder)


@pytest.mark.parametrize(
    "names",
    [
        *(
            None,
            [],
            "GPT2Model",
            [None],
            ["GPT2LMHeadModel"],
            ["XForCausalLM"],
            ["XForConditionalGeneration"],
        ),
        ["LlamaModel", "LlamaForCausalLM"],
    ],
)
def test_what_continues_text_or_says_nothing_is_accepted(folder, names):
    edit_json(folder / "config.json", architectures=names)
    inspect(folder)


def test_a_configuration_that_names_two_families_is_refused(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), **sizes)).save_pretrained(tmp_path)
    make_tokenizer(tmp_path)
    for names in (["LLaMAForCausalLM"], ["LlamaForCausalLM", "MistralForCausalLM"], None):
        edit_json(tmp_path / "config.json", architectures=names)
        loaded_from(tmp_path)
    # With the same tensors and another attention.
    edit_json(tmp_path / "config.json", architectures=["MistralForCausalLM"], sliding_window=2)
    with pytest.raises(LabError, match="is MistralForCausalLM and of the type llama by its config"):
        loaded_from(tmp_path)


@pytest.mark.parametrize("decoder", [False, True])
def test_a_model_that_looks_ahead_is_found_out_by_what_it_does(tmp_path, decoder):
    from transformers import RobertaConfig, RobertaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = RobertaConfig(vocab_size=13, max_position_embeddings=40, is_decoder=decoder, **sizes)
    RobertaForCausalLM(config).save_pretrained(tmp_path)
    make_tokenizer(tmp_path, unk_token="<unk>")
    if decoder:
        loaded_from(tmp_path)
    else:
        with pytest.raises(LabError, match="looks at the tokens after"):
            loaded_from(tmp_path)


# Tensors that the configuration does not describe


def test_a_configuration_of_fewer_layers_is_refused(folder):
    edit_json(folder / "config.json", n_layer=1)
    with pytest.raises(LabError, match=r"does not describe \(11, such as .*h\.1\."):
        loaded_from(folder)


def test_a_value_head_beside_the_model_is_refused(folder):
    change_tensors(folder, lambda tensors: tensors | {"v_head.summary.weight": torch.zeros(1, 8)})
    with pytest.raises(LabError, match=r"does not describe \(1, such as v_head"):
        loaded_from(folder)


def test_buffers_of_old_checkpoints_a_stored_tied_layer_and_eyes_do_no_harm(folder):
    first = loaded_from(folder)
    extra = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 16, 16) for i in range(2)}
    extra |= {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    extra |= {"transformer.h.0.attn.rotary_emb.inv_freq": torch.ones(4)}
    extra |= {"model.vision_tower.patch.weight": torch.ones(4)}
    old = ("transformer.h.0.attn.attention.bias", "gpt_neox.layers.0.attention.bias")  # GPT-Neo, Pythia
    old += ("transformer.h.0.attn.causal_mask", "model.embed_positions.weights")  # CodeGen, XGLM
    old += ("model.decoder.version", "model.layers.0.self_attn.rotary_emb.cos_cached")  # OPT, Llama
    extra |= {name: torch.ones(4) for name in (*old, "mtp.layers.0.fc.weight")}

    def change(tensors):
        return tensors | extra | {"lm_head.weight": tensors["transformer.wte.weight"].clone()}

    change_tensors(folder, change)
    ids = torch.tensor([[2, 3, 4]])
    assert torch.equal(loaded_from(folder).model(ids).logits, first.model(ids).logits)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("ending", ["", "_packed"])
def test_weights_stored_as_codes_are_not_read_as_numbers(folder, dtype, ending):
    name = "transformer.h.0.mlp.c_fc.weight"
    change_tensors(folder, lambda tensors: tensors | {name + ending: (tensors[name] * 100).to(dtype)})
    with pytest.raises(LabError, match=f"stores {name}{ending} as .*no quantization_config"):
        inspect(folder)


@pytest.mark.parametrize("how", [{"quant_method": "modelopt"}, {"quant_method": "GPTQ"}, {"bits": 4}, {}])
def test_a_quantisation_that_transformers_would_pass_over_is_refused(folder, how):
    name = "transformer.h.0.mlp.c_fc.weight"
    change_tensors(folder, lambda tensors: tensors | {name: (tensors[name] * 100).to(torch.float8_e4m3fn)})
    edit_json(folder / "config.json", quantization_config=how)
    with pytest.raises(LabError, match=r"is quantised \(.*\), unread here: name the model") as caught:
        inspect(folder)
    assert "bitsandbytes" not in str(caught.value)


@pytest.mark.parametrize(
    ("how", "package"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptqmodel"),
        ({"quant_method": "awq"}, "gptqmodel"),
        ({"load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "compressed-tensors"}, "compressed_tensors"),
        ({"quant_method": "hqq"}, "hqq"),
    ],
)
@pytest.mark.parametrize("place", ["quantization_config", "text_config"])
def test_a_quantised_model_names_what_reads_it(folder, how, package, place, monkeypatch):
    monkeypatch.setattr(checkpoint, "find_spec", lambda name: None)
    edit_json(
        folder / "config.json", **{place: {"quantization_config": how} if place == "text_config" else how}
    )
    with pytest.raises(LabError, match=f"is quantised .*pip install {package}"):
        inspect(folder)
    monkeypatch.setattr(checkpoint, "find_spec", lambda name: name)
    inspect(folder)


@pytest.mark.parametrize("file", ["model-Q4_K_M.gguf", "MODEL.Q8_0.GGUF"])
def test_a_folder_of_gguf_alone_says_what_to_name_instead(tmp_path, file):
    (tmp_path / file).write_bytes(b"GGUF")
    with pytest.raises(LabError, match=rf"only GGUF weights \({file}\)"):
        inspect(tmp_path)


def test_shards_without_their_index_and_files_of_a_trainer_are_called_what_they_are(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(LabError, match=r"has model-00001-of-00002\.safetensors, but .* no index"):
        inspect(folder)
    (folder / "model-00001-of-00002.safetensors").rename(folder / "training_args.bin")
    with pytest.raises(LabError, match=r"has no config\.json or no weights"):
        inspect(folder)


def test_one_file_and_shards_of_another_model_are_refused_unless_the_shards_are_gone(folder, tmp_path):
    make_model(tmp_path / "other", shard_size="3KB")
    for path in (tmp_path / "other").glob("model*"):
        shutil.copy(path, folder)
    with pytest.raises(LabError, match=r"has model\.safetensors and model-00001.* of two models"):
        inspect(folder)
    for path in folder.glob("model-*"):
        path.unlink()
    inspect(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_are_not_finite_are_refused_with_the_way_out(folder, value, dtype):
    def change(tensors):
        tensors["transformer.h.1.mlp.c_fc.weight"][3, 5] = value
        return tensors

    change_tensors(folder, change)
    with pytest.raises(LabError, match=rf"NaN or infinite in {dtype} \(1 tensors, such as .*h\.1") as caught:
        loaded_from(folder, dtype)
    assert caught.value.kind is Failure.BAD_OUTPUT
    assert str(caught.value).endswith("use another checkpoint.")


def test_weights_too_large_for_float16_are_sent_to_another_dtype(folder):
    def change(tensors):
        tensors["transformer.ln_f.weight"][0] = 1e5
        return tensors

    change_tensors(folder, change)
    with pytest.raises(LabError, match="choose bfloat16 or float32"):
        loaded_from(folder, "float16")
    loaded_from(folder, "bfloat16")


# Needless refusals


def test_a_token_above_the_embeddings_that_no_prompt_uses_stops_nothing(folder):
    plain = generate.generate_samples(loaded_from(folder), PROMPTS, GREEDY)
    make_tokenizer(
        folder, eos_token="</s>", bos_token="</s>", pad_token="[PAD]", extra_special_tokens=["<img>"]
    )
    loaded = loaded_from(folder)
    assert len(loaded.tokenizer) == len(WORDS) + 2 > loaded.report.vocabulary
    assert loaded.tokenizer.pad_token_id < loaded.report.vocabulary
    assert [s.text for s in generate.generate_samples(loaded, PROMPTS, GREEDY)] == [s.text for s in plain]
    (used,) = generate.generate_samples(loaded, [Prompt("c", "Write a <img>", "short_post")], GREEDY)
    assert "The prompt 'c' has '<img>', which the model lacks" in used.error


def test_a_pad_token_above_the_embeddings_in_the_configuration_stops_nothing(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    net = LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), **sizes)).eval()
    net.save_pretrained(tmp_path)
    make_tokenizer(tmp_path)
    edit_json(tmp_path / "config.json", pad_token_id=len(WORDS))
    ids = torch.tensor([[2, 3, 4]])
    assert torch.equal(loaded_from(tmp_path).model(ids).logits, net(ids).logits)


def test_a_tokenizer_model_alone_gives_the_ids_of_sentencepiece(tmp_path):
    import sentencepiece

    (tmp_path / "texts.txt").write_text("a note about caching\nwrite a note about the model\n" * 50)
    ids = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1}
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "texts.txt"),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=60,
        model_type="bpe",
        byte_fallback=False,
        minloglevel=9,
        **ids,
    )
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=60, **sizes)).save_pretrained(tmp_path)
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"} | named))
    loaded = loaded_from(tmp_path)
    truth = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    prompt = Prompt("a", "write a note about the model", "short_post")
    assert tokenization.encode(loaded, prompt) == [1, *truth.encode(prompt.text)]


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_an_attention_that_cannot_run_here_is_set_aside_and_the_report_says_so(folder, key, capsys):
    ids = torch.tensor([[2, 3, 4]])
    plain = loaded_from(folder)
    assert plain.report.notes == ()
    edit_json(folder / "config.json", **{key: "flash_attention_2"})
    loaded = loaded_from(folder)
    assert torch.equal(loaded.model(ids).logits, plain.model(ids).logits)
    assert "flash_attention_2" in loaded.report.notes[0] and loaded.report.notes[0] in capsys.readouterr().out


@pytest.mark.parametrize("asked", [{"dtype": "auto"}, {"torch_dtype": "auto"}, {"return_dict": False}])
def test_what_a_configuration_asks_of_a_library_stops_nothing(folder, asked):
    ids = torch.tensor([[2, 3, 4]])
    right = loaded_from(folder).model(ids).logits
    config = {k: v for k, v in json.loads((folder / "config.json").read_text()).items() if "dtype" not in k}
    (folder / "config.json").write_text(json.dumps(config | asked))
    assert torch.equal(loaded_from(folder).model(ids).logits, right)


def test_a_file_of_a_model_is_no_name_of_the_hub(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    with pytest.raises(LabError, match="is a file: name the model's folder"):
        registry.resolve("tiny/model.safetensors")


def test_what_a_configuration_leaves_out_is_what_its_class_assumes(folder):
    config = json.loads((folder / "config.json").read_text())
    for name in ("n_positions", "n_ctx"):
        config.pop(name, None)
    (folder / "config.json").write_text(json.dumps(config))
    assert inspect(folder).context == 1024
    nested = {"num_hidden_layers": 2, "hidden_size": 64, "model_type": "gemma3_text"}
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": nested}))
    found = inspect(folder)
    from transformers import Gemma3TextConfig

    truth = Gemma3TextConfig(**nested)
    assert (found.context, found.layers) == (truth.max_position_embeddings, 2)
    assert (found.kv_heads, found.head_dim) == (truth.num_key_value_heads, truth.head_dim)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"a": 1' + b"0" * 5000 + b"}", "ValueError"),
        ('{"a": "é"}'.encode("latin-1"), "UnicodeDecodeError"),
        ('{"a": 1}'.encode("utf-16"), "UnicodeDecodeError"),
        (b"\xef\xbb\xbf{}", "JSONDecodeError"),
        (b"", "JSONDecodeError"),
    ],
)
def test_a_configuration_that_cannot_be_read_says_what_to_do(folder, content, says):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(
        LabError, match=rf"\({says}\), it is not a JSON object in UTF-8: save it as one"
    ) as caught:
        inspect(folder)
    assert "codec" not in str(caught.value) and "sys." not in str(caught.value)


# Names


def test_a_snapshot_of_the_hub_is_named_by_its_repository(saved, tmp_path):
    snapshot = shutil.copytree(saved, tmp_path / "models--me--my--tiny" / "snapshots" / ("a" * 40))
    (tmp_path / "link").symlink_to(snapshot)
    for name in (snapshot, tmp_path / "link"):
        assert registry.resolve(str(name)).alias == "me/my--tiny"
    other = shutil.copytree(saved, snapshot.with_name("b" * 40))
    both = registry.tell_apart(registry.resolve(str(path)) for path in (snapshot, other))
    assert [spec.alias for spec in both] == ["me/my--tiny@aaaaaaaaaaaa", "me/my--tiny@bbbbbbbbbbbb"]


def test_folders_of_one_name_are_told_apart_by_their_paths(tmp_path):
    places = ["run-a/checkpoint-500", "run-b/checkpoint-500", "x/y/one", "x/z/one", "w/z/one", "alone"]
    for place in places:
        (tmp_path / place).mkdir(parents=True)
    specs = registry.tell_apart(registry.resolve(str(tmp_path / place)) for place in places)
    assert [spec.alias for spec in specs] == [*places[:2], "y/one", "x/z/one", "w/z/one", "alone"]
    assert len({spec.slug for spec in specs}) == len(places)
    twice = registry.tell_apart([registry.resolve(str(tmp_path / "alone"))] * 2)
    assert [spec.alias for spec in twice] == ["alone", "alone"]
    (tmp_path / "lab-gpt2").mkdir()
    named = registry.tell_apart(map(registry.resolve, ("lab-gpt2", str(tmp_path / "lab-gpt2"))))
    assert [spec.alias for spec in named] == ["lab-gpt2", f"{tmp_path.name}/lab-gpt2"]


def test_long_names_that_differ_at_their_ends_are_two_folders(tmp_path):
    names = [f"{'a-long-recipe-' * 8}seed{seed}" for seed in (1, 2)]
    for name in names:
        (tmp_path / name).mkdir()
    slugs = {spec.slug for spec in registry.tell_apart(registry.resolve(str(tmp_path / n)) for n in names)}
    assert len(slugs) == 2 and all(len(slug) <= 80 for slug in slugs)


# Adapters


@pytest.fixture
def adapter(saved, tmp_path):
    """A LoRA adapter of rank 2 to the first attention of the tiny model, and its change of weights."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    down, up = (torch.randn(shape, generator=generator) for shape in ((2, 8), (24, 2)))
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(saved)}
    config |= {"r": 2, "lora_alpha": 6, "target_modules": ["c_attn"], "layers_to_transform": [0]}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"fan_in_fan_out": True}))
    name = "base_model.model.transformer.h.0.attn.c_attn"
    tensors = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder, 3 * (up @ down).T  # alpha / r, and a Conv1D is stored the other way round


def test_an_adapter_is_its_base_with_its_change_added(adapter, saved):
    folder, change = adapter
    base, merged = loaded_from(saved), loaded_from(folder)
    before, after = (one.model.state_dict() for one in (base, merged))
    assert list(before) == list(after)
    for name, tensor in before.items():
        planted = change if name == "transformer.h.0.attn.c_attn.weight" else 0
        assert torch.allclose(after[name], tensor + planted, atol=1e-6), name
    assert (merged.spec.alias, merged.report.base, base.report.base) == ("adapter", "tiny", None)
    assert merged.report.parameters == base.report.parameters
    assert tokenization.encode(merged, PROMPTS[0]) == tokenization.encode(base, PROMPTS[0])
    spec = inspect(folder)
    assert (spec.base, spec.family, spec.context, spec.layers) == ("tiny", "gpt2", 16, 2)
    assert str(saved.parent) not in str(merged.report)
    assert checkpoint.weight_files(load.fetch(spec), "x") == [folder / "adapter_model.safetensors"]


@pytest.mark.parametrize("added", [0, 2])
def test_embeddings_that_were_trained_in_full_are_merged_where_they_have_the_sizes_of_the_base(
    adapter, added
):
    folder, _ = adapter
    tensors, rows = load_file(folder / "adapter_model.safetensors"), torch.randn(len(WORDS) + added, 8)
    tensors["base_model.model.transformer.wte.weight"] = rows
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    edit_json(folder / "adapter_config.json", modules_to_save=["wte"])
    if added:
        with pytest.raises(LabError, match="model 'adapter' cannot be loaded"):
            loaded_from(folder)
    else:
        assert torch.equal(loaded_from(folder).model.get_input_embeddings().weight, rows)


def test_the_revision_of_an_adapter_names_its_base_too(adapter, saved, tmp_path):
    folder, _ = adapter
    first = load.revision_of(inspect(folder))
    assert first != load.revision_of(inspect(saved))
    moved = shutil.copytree(saved, tmp_path / "moved")
    edit_json(folder / "adapter_config.json", base_model_name_or_path=str(moved))
    second = load.revision_of(inspect(folder))
    change_tensors(moved, lambda tensors: {name: tensor * 2 for name, tensor in tensors.items()})
    assert len({first, second, load.revision_of(inspect(folder))}) == 3


def test_the_pinned_revision_of_a_base_is_the_one_that_is_fetched(adapter):
    folder, _ = adapter
    edit_json(folder / "adapter_config.json", base_model_name_or_path="some/base", revision="abc123")
    base = checkpoint.adapter_base(folder, "adapter")
    assert (base.source, base.revision) == ("some/base", "abc123")


def test_an_adapter_to_a_base_of_other_sizes_says_so(adapter, tmp_path):
    folder, _ = adapter
    edit_json(
        folder / "adapter_config.json",
        base_model_name_or_path=str(make_model(tmp_path / "wide", n_embd=16)),
    )
    with pytest.raises(LabError, match=r"'adapter' cannot be loaded .*size mismatch.*lora_A"):
        loaded_from(folder)


def test_an_adapter_to_a_model_of_the_registry(adapter):
    folder, _ = adapter
    edit_json(folder / "adapter_config.json", base_model_name_or_path="lab-gpt2")
    spec, base = inspect(folder), registry.resolve("lab-gpt2")
    assert (spec.base, spec.context, spec.parameters, spec.sha256) == ("lab-gpt2", 512, base.parameters, {})


def _pickled(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def _whole(folder):
    (folder / "model.safetensors").write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (
            lambda f: edit_json(f / "adapter_config.json", base_model_name_or_path="/gone/base"),
            "'/gone/base'",
        ),
        (lambda f: edit_json(f / "adapter_config.json", base_model_name_or_path=None), "'None'"),
        (lambda f: edit_json(f / "adapter_config.json", base_model_name_or_path=str(f)), "no whole model"),
        (lambda f: edit_json(f / "adapter_config.json", peft_type="PREFIX_TUNING"), "another kind"),
        (lambda f: edit_json(f / "adapter_config.json", task_type="SEQ_CLS"), "another kind"),
        (
            lambda f: edit_json(f / "adapter_config.json", megatron_config={"a": 1}, megatron_core="evil"),
            "text",
        ),
        (_pickled, "only pickled weights"),
        (_whole, "adapter and a whole model"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x"), "not a complete safetensors"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "cannot be read"),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_one_clear_sentence(adapter, damage, says):
    damage(adapter[0])
    with pytest.raises(LabError, match=says):
        inspect(adapter[0])


@pytest.mark.parametrize("layers", [[1], [0, 1]])
def test_an_adapter_to_another_base_is_refused(adapter, layers):
    folder, _ = adapter
    edit_json(folder / "adapter_config.json", layers_to_transform=layers)
    with pytest.raises(LabError, match="adapter to another base"):
        loaded_from(folder)
