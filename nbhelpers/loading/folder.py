"""Saved models on disk: what a folder holds, checked and described without loading any weights."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nbhelpers import registry
from nbhelpers.records import Failure, LabError, ModelSpec

DEFAULT_CONTEXT = 2048  # for a model whose files name no limit (ALiBi has none; BLOOM was trained on 2,048)
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
LARGEST_TEXT_FILE = 64 * 2**20  # bytes; the largest tokenizer.json in use has about 35 MB
_READ = (".json", ".jinja", ".txt", ".model", ".safetensors")
BUFFERS = re.compile(  # stored by old releases, not parameters
    r"(\.(attn|attention)\.bias|masked_bias|causal_mask|inv_freq|(cos|sin)_cached|position_ids|embed_positions\.weights"
    r"|decoder\.version)$"
)
# By the name of its class: what a model is; the first that fits. A Model is the trunk of one, without a head.
ARCHITECTURES = {
    "Speech|Audio|Whisper|Wav2Vec|CTC|TTS|Musicgen|Moshi|RNNT|TDT": "a speech model",
    r"CausalLM|LMHead|ForConditionalGeneration|DoubleHeads|BertGenerationDecoder": "",  # continues text
    "MaskedLM|ForPreTraining|NextSentence": "a masked language model",
    "Classification|Reward|Regression|QuestionAnswering|MultipleChoice|Scor": "a classifier or reward model",
    "Model$|Encod|Embed|Retriev": "an embedding model or a trunk without a language-model head",
    "": "another kind of model",
}
# Quantised models: the package that reads each kind.
LOADERS = {"awq": "gptqmodel", "gptq": "gptqmodel", "compressed-tensors": "compressed_tensors"}
LOADERS |= {"bitsandbytes": "bitsandbytes"}
NESTED = ("text_config", "llm_config", "language_config")  # a multimodal model's part for text


def refusal(name: str, why: str, kind: Failure = Failure.USAGE) -> LabError:
    """The error about a model: ``why`` goes on after its name and ends with the way out."""
    return LabError(f"The model {name!r} {why}", kind)


def inspect(spec: ModelSpec) -> ModelSpec:
    """A model of this disk checked and described; any other as it is. Raises LabError as check_folder."""
    if folder := registry.folder_of(spec):
        check_folder(folder, spec.alias)
        return describe(spec, folder)
    return spec


def check_folder(folder: Path, name: str) -> None:
    """Refuse a folder that cannot be loaded safely. Raises LabError with the reason and the way out."""
    root = folder.resolve()
    root = root.parents[2] if root.parent.name == "snapshots" else root  # the Hub's cache is one of links
    for path in (paths := [*folder.iterdir()] if folder.is_dir() else []):
        if path.suffix in _READ and path.is_file():
            if not path.resolve().is_relative_to(root):
                raise refusal(name, f"has {path.name} as a link out of its folder: copy it.", Failure.REFUSED)
            if path.suffix != ".safetensors":
                _check_size(path, name)
    check_no_remote_code(read_json_file(folder / "tokenizer_config.json", name, optional=True), name)
    if adapter_base(folder, name):
        return
    if not (folder / "config.json").exists():
        raise no_weights(name, (path.name for path in paths))
    check_config(config := read_json_file(folder / "config.json", name), name)
    if (folder / "modules.json").exists():
        raise refusal(name, "is an embedding model (modules.json): name one that continues text.")
    tensors = _tensors(weight_files(folder, name), name)
    _check_layers(config, len(tensors), name)
    for key, (_, dtype) in tensors.items():
        if key.endswith("weight") and dtype not in ("F64", "F32", "F16", "BF16") and not quantised(config):
            why = f"stores {key} as {dtype} and its config.json has no quantization_config that says how"
            raise refusal(name, f"{why}: use the config.json that was saved with these weights.")
    if not any((folder / file).is_file() for file in VOCABULARIES):
        raise refusal(name, "has no tokenizer (tokenizer.json or another): copy the original model's.")


def _check_size(path: Path, name: str) -> None:
    if (size := path.stat().st_size) > LARGEST_TEXT_FILE:
        raise refusal(name, f"has a {path.name} of {size >> 20:,} MiB: download it again.", Failure.REFUSED)


def _check_layers(config: dict[str, Any], tensors: int, name: str) -> None:
    """Refuse what would be built in a loop without end: every layer has tensors of its own."""
    for key, value in config.items():
        if isinstance(value, dict):
            _check_layers(value, tensors, name)
        elif isinstance(value, int) and (
            ("layer" in key and value > 1000 + 10 * tensors) or ("expert" in key and value > 10**5)
        ):
            why = f"has {key} = {value} in its config.json and {tensors} tensors in its weights"
            raise refusal(name, f"{why}: download both again.")


def check_config(config: dict[str, Any], name: str) -> None:
    """Refuse all but a model that continues text and that can be read here. Raises LabError."""
    check_no_remote_code(config, name)
    listed = config.get("architectures")
    named = [str(name) for name in listed if name] if isinstance(listed, list) else []
    kinds = [next(ARCHITECTURES[part] for part in ARCHITECTURES if re.search(part, one)) for one in named]
    what = "" if "" in kinds else next(iter(kinds), "")  # one that continues text will do
    if what := "an encoder-decoder" if config.get("is_encoder_decoder") is True else what:
        why = f"is {what} ({', '.join(named) or config.get('model_type')}), not trained to continue text"
        raise refusal(name, f"{why}: name a causal language model of text (as LlamaForCausalLM is one).")
    if (package := LOADERS.get(quantised(config))) and find_spec(package) is None:
        why = f"is quantised ({quantised(config)}), which the package {package} reads: pip install {package}"
        raise refusal(name, f"{why}, or name the model that it was made from.")


def quantised(config: dict[str, Any]) -> str:
    """The method of a quantised model's configuration; "" for any other."""
    levels = [config, *(config[key] for key in NESTED if isinstance(config.get(key), dict))]
    hows = [level.get(key) for level in levels for key in ("quantization_config", "compression_config")]
    # The first releases of bitsandbytes did not name themselves.
    named = (str(how.get("quant_method", "bitsandbytes")) for how in hows if isinstance(how, dict))
    return next(named, "")


def adapter_base(folder: Path, name: str) -> ModelSpec | None:
    """The model that a LoRA adapter changes; None for a folder that is no adapter. Raises LabError."""
    if not (folder / "adapter_config.json").is_file():
        return None
    if any(folder.glob("model*.safetensors*")):
        raise refusal(name, "is an adapter and a whole model in one folder: move one of them out.")
    config = read_json_file(folder / "adapter_config.json", name)
    kind, task = config.get("peft_type"), config.get("task_type")
    if kind != "LORA" or task not in (None, "CAUSAL_LM") or config.get("megatron_config"):
        why = f"is an adapter of another kind ({kind}, {task}) than LoRA for text"
        raise refusal(name, f"{why}: merge it with its base and save that.")
    _tensors(weight_files(folder, name), name)
    named = str(config.get("base_model_name_or_path"))
    with suppress(LabError):
        base = registry.resolve(named)
        if not ((registry.folder_of(base) or folder.parent) / "adapter_config.json").exists():
            return base
    why = f"is an adapter to {named!r}, which is no whole model here"
    raise refusal(name, f"{why}: put the right path into adapter_config.json.")


def check_no_remote_code(config: dict[str, Any], name: str) -> None:
    """Refuse a configuration that names code to be fetched and run. Raises LabError."""
    for key, value in config.items():
        asked = "Python code from its own repository (auto_map)" if key == "auto_map" and value else None
        if key.endswith("_implementation") and "/" in str(value):
            asked = f"compiled code from a repository ({value})"
        if asked:
            why = f"asks to run {asked}: choose one that transformers knows by itself."
            raise refusal(name, why, Failure.REFUSED)


def weight_files(folder: Path, name: str) -> list[Path]:
    """The safetensors files of a model or adapter, one or all shards. Raises LabError when there are none."""
    kind = "adapter_model" if (folder / "adapter_config.json").exists() else "model"
    single, index = folder / f"{kind}.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise no_weights(name, (path.name for path in folder.glob("*")))
    listed = read_json_file(index, name).get("weight_map")
    shards = sorted({str(file) for file in listed.values()}) if isinstance(listed, dict) else []
    for file in shards or [single.name]:
        if Path(file).name != file or Path(file).suffix != ".safetensors":
            raise refusal(name, f"has a weight index that names {file!r}: choose another.", Failure.REFUSED)
        if not (folder / file).is_file():
            raise refusal(name, f"lacks the weight file {file}: download it again.")
    return [folder / file for file in shards]


def no_weights(name: str, files: Iterable[str]) -> LabError:
    """The refusal of a model without safetensors among its files."""
    files = sorted(files)
    if "adapter_config.json" in files and "adapter_model.safetensors" in files:
        return refusal(name, "is an adapter: download it, and name its folder.")
    if gguf := [file for file in files if file.endswith(".gguf")]:
        why = f"has only GGUF weights ({gguf[0]}), which llama.cpp reads: name the model that they were made"
        return refusal(name, f"{why} from, in safetensors.")
    if pickles := [file for file in files if file.endswith(PICKLES)]:
        why = f"has only pickled weights ({pickles[0]}), and a pickle can run any code hidden in it: where "
        why += "you trust it, load model and tokenizer, save_pretrained both, and name that folder."
        return refusal(name, why, Failure.REFUSED)
    return refusal(
        name, "has no config.json or no weights (model.safetensors): save it with save_pretrained."
    )


def read_json_file(path: Path, name: str, optional: bool = False) -> dict[str, Any]:
    """A JSON object of a model folder; {} for an optional file that is not there. Raises LabError."""
    if optional and not path.exists():
        return {}
    try:
        _check_size(path, name)
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        data = error
    if not isinstance(data, dict):
        why = f"cannot be read ({type(data).__name__}), it is not a JSON object in UTF-8"
        raise refusal(name, f"has a {path.name} that {why}: save it as one, or download it again.")
    return data


def describe(spec: ModelSpec, folder: Path, trunk: Path | None = None) -> ModelSpec:
    """The spec as it is, if data/models.toml or run.json has described it; else by the folder's files.

    An adapter is described as its base is; trunk: the base's folder, where it had to be fetched.
    """
    if spec.parameters:
        return spec
    tokenizer = read_json_file(folder / "tokenizer_config.json", spec.alias, optional=True)
    chat = bool(tokenizer.get("chat_template")) or (folder / "chat_template.jinja").is_file()
    if base := adapter_base(folder, spec.alias):
        found = describe(base, trunk) if trunk else inspect(base)
        found = replace(found, alias=spec.alias, source=spec.source, kind=spec.kind, sha256={}, revision=None)
        return replace(found, base=base.alias, prompt_format="chat" if chat else found.prompt_format)
    config = read_json_file(folder / "config.json", spec.alias)
    heads = _first(config, "num_attention_heads", "n_head")
    width, nested = _first(config, "hidden_size", "n_embd", "n_embed"), "text_config" in config
    return replace(
        spec,
        family=config.get("model_type", "unknown"),
        parameters=count_parameters(folder, spec.alias),
        context=context_of(config, tokenizer.get("model_max_length")),
        prompt_format="chat" if chat and spec.family == "unknown" else spec.prompt_format,
        layers=_first(config, "num_hidden_layers", "n_layer"),
        kv_heads=_first(config, "num_key_value_heads", assume=nested) or heads,
        head_dim=_first(config, "head_dim", assume=nested) or (width and heads and width // heads),
    )


def _first(config: dict[str, Any], *names: str, assume: bool = True) -> int | None:
    """The first positive whole number of these names: of a nested text model, else of the whole one, else,
    where assume allows the seconds that importing transformers takes, what its class assumes."""
    levels = [config[key] for key in NESTED if isinstance(config.get(key), dict)] + [config]
    if assume and not any(level.get(name) for level in levels for name in names):
        levels.append(_defaults(str(config.get("model_type"))))
    found = (level.get(name) for level in levels for name in names)
    return next((value for value in found if isinstance(value, int) and value > 0), None)


@functools.cache
def _defaults(family: str) -> dict[str, Any]:
    """What transformers assumes of a family; {} for one that it does not know."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return dict(CONFIG_MAPPING[family]().get_text_config().to_dict()) if family in CONFIG_MAPPING else {}


def context_of(config: dict[str, Any], tokenizer_limit: Any = None) -> int:
    """The longest sequence in tokens: the configuration's, else a sane tokenizer limit, else 2,048."""
    sane = isinstance(tokenizer_limit, int) and 0 < tokenizer_limit < 10_000_000
    limit = _first(config, "max_position_embeddings", "n_positions", "n_ctx", "seq_length", "max_seq_len")
    return limit or (tokenizer_limit if sane else DEFAULT_CONTEXT)


def count_parameters(folder: Path, name: str) -> int:
    """Parameters in the safetensors headers; a tied output layer that was stored all the same counts once."""
    tensors = _tensors(weight_files(folder, name), name)
    if read_json_file(folder / "config.json", name).get("tie_word_embeddings") and len(tensors) > 1:
        tensors.pop("lm_head.weight", None)
    return sum(math.prod(shape) for key, (shape, _) in tensors.items() if not BUFFERS.search(key))


def _tensors(files: Iterable[Path], name: str) -> dict[str, tuple[list[int], str]]:
    """Shape and dtype of every tensor of weight files, whose headers and lengths are checked."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, tuple[list[int], str]] = {}
    for path in files:
        try:
            with safe_open(path, framework="numpy") as file:
                parts = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
                found |= {key: (part.get_shape(), part.get_dtype()) for key, part in parts.items()}
        except (SafetensorError, OSError) as error:
            why = f"has {path.name}, which is not a complete safetensors file ({error}): download it again."
            raise refusal(name, why) from None
    return found
