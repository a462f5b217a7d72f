"""Saved models on disk: what a folder holds, checked and described without loading any weights."""

import json
import math
import re
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nbhelpers import registry
from nbhelpers.loading import remote
from nbhelpers.records import Failure, LabError, ModelSpec

DEFAULT_CONTEXT = 2048  # for a model whose files name no limit (ALiBi has none; BLOOM was trained on 2,048)
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")
# Besides the weights, what decides a text.
SMALL_FILES = ["config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja"]
SMALL_FILES += [*VOCABULARIES, "merges.txt", "special_tokens_map.json", "added_tokens.json"]
LARGEST_TEXT_FILE = 64 * 2**20  # bytes; the largest tokenizer.json in use has about 35 MB
BUFFERS = re.compile(  # stored by old releases, not parameters
    r"(\.(attn|attention)\.bias|masked_bias|causal_mask|inv_freq|(cos|sin)_cached|position_ids|embed_positions\.weights"
    r"|decoder\.version)$"
)
# What a model is by the name of its class: the first that fits. "…Model" has no head.
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
LOADERS |= {"auto-round": "auto_round"} | {name: name for name in ("bitsandbytes", "hqq", "aqlm", "vptq")}
# The refusal of a model without safetensors, by a file that it has instead.
WITHOUT_WEIGHTS = {
    r"^adapter_model\.safetensors$": "is an adapter: download it, and name its folder ({}).",
    r"^model.*\.safetensors$": "has {}, but no config.json or no index of its shards: download it again.",
    r"\.gguf$": "has only GGUF weights ({}), which llama.cpp reads: name the model that they were made from.",
    r"^(?!training|optim|sched|rng_).*\.(bin|pt|pth|ckpt|pkl)$": "has only pickled weights ({}), and a "
    "pickle can run any code: where you trust it, save_pretrained model and tokenizer, and name that folder.",
}


def refusal(name: str, why: str, kind: Failure = Failure.USAGE) -> LabError:
    """The error about a model: ``why`` follows its name and ends with what to do."""
    return LabError(f"The model {name!r} {why}", kind)


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Whatever a broken model makes the libraries raise, as one sentence; without warnings and bars."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except LabError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise LabError(f"The {what} cannot be loaded ({reason}).", Failure.OTHER) from error
    finally:
        logging.set_verbosity(verbosity)


def inspect(spec: ModelSpec) -> ModelSpec:
    """The spec of a model on this disk, checked and described, or as its server tells; any other as it is.

    Raises LabError as check_folder and remote.look_up.
    """
    if spec.kind == "server":
        return remote.look_up(spec)
    if folder := registry.folder_of(spec):
        check_folder(folder, spec.alias)
        return describe(spec, folder)
    return spec


def check_folder(folder: Path, name: str) -> None:
    """Refuse a folder that cannot be loaded safely. Raises LabError with the reason and what to do."""
    for path in folder.glob("*"):
        size = path.stat().st_size if path.is_file() else 0
        if path.suffix in (".json", ".jinja", ".txt", ".model") and size > LARGEST_TEXT_FILE:
            raise refusal(name, f"has {path.name} of {size >> 20:,} MiB: fetch it again.", Failure.REFUSED)
    check_no_remote_code(read_json_file(folder / "tokenizer_config.json", name), name)
    read_json_file(folder / "generation_config.json", name)  # transformers would ignore a broken one
    if adapter_base(folder, name):
        return
    if not (folder / "config.json").exists():
        raise no_weights(name, [path.name for path in folder.glob("*")])
    check_config(config := read_json_file(folder / "config.json", name), name)
    if (folder / "modules.json").exists():
        raise refusal(name, "is an embedding model (modules.json): name one that continues text.")
    tensors = _tensors(folder, name)
    # Each layer has tensors of its own: a number far beyond them would be built almost without end.
    for key, number in re.findall(r'"(\w*(?:layers?|experts))": (\d+)', json.dumps(config)):
        if int(number) > 1000 + 10 * len(tensors):
            why = f"has {key} = {number} in its config.json and {len(tensors)} tensors in its weights"
            raise refusal(name, f"{why}: download both again.")
    for key, (_, dtype) in tensors.items():
        if "weight" in key and dtype not in ("F64", "F32", "F16", "BF16") and not quantised(config):
            why = f"stores {key} as {dtype} and its config.json has no quantization_config that says how"
            raise refusal(name, f"{why}: use the one saved with it, or the model that it was made from.")
    if not any((folder / file).is_file() for file in VOCABULARIES):
        raise refusal(name, "has no tokenizer (tokenizer.json or another): copy the original model's.")


def check_config(config: dict[str, Any], name: str) -> None:
    """Refuse all but a model that continues text and that can be read here. Raises LabError."""
    check_no_remote_code(config, name)
    entries = config.get("architectures")
    names = [str(entry) for entry in entries if entry] if isinstance(entries, list) else []
    kinds = [next(kind for part, kind in ARCHITECTURES.items() if re.search(part, n)) for n in names]
    if config.get("is_encoder_decoder") is True:
        kinds = ["an encoder-decoder"]
    if kinds and "" not in kinds:  # one that continues text is enough
        why = f"is {kinds[0]} ({', '.join(names) or config.get('model_type')}), not trained to continue text"
        raise refusal(name, f"{why}: name a causal language model of text (as LlamaForCausalLM is one).")
    if method := quantised(config):
        from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as methods

        package = LOADERS.get(method)
        if not (find_spec(package) if package else method in methods):  # it would be read as not quantised
            way = f"pip install {package}, or name" if package else "name"
            raise refusal(name, f"is quantised ({method}), unread here: {way} the model it was made from.")


def quantised(config: dict[str, Any]) -> str:
    """The method of a quantised model's configuration, or of a part's; "" for any other."""
    sections = [section for section in (config, *config.values()) if isinstance(section, dict)]
    settings = [q for section in sections if isinstance(q := section.get("quantization_config"), dict)]
    unnamed = "bitsandbytes" if "load_in_" in str(settings) else "?"  # whose first releases name no method
    return str(settings[0].get("quant_method", unnamed)) if settings else ""


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
        raise refusal(name, f"{why}: name a whole model, such as this one merged with its base by peft.")
    _tensors(folder, name)
    base_name = str(config.get("base_model_name_or_path"))
    with suppress(LabError):
        base = registry.resolve(base_name)
        if not ((registry.folder_of(base) or folder.parent) / "adapter_config.json").exists():
            return replace(base, revision=config.get("revision") or base.revision)
    why = f"is an adapter to {base_name!r}, which is no whole model here"
    raise refusal(name, f"{why}: put the right path into adapter_config.json.")


def check_no_remote_code(config: dict[str, Any], name: str) -> None:
    """Refuse a configuration that names code to be fetched and run. Raises LabError."""
    for key, value in config.items():
        if (key == "auto_map" and value) or (key.endswith("_implementation") and "/" in str(value)):
            why = f"asks to run code from a repository ({key}: {value}): name another."
            raise refusal(name, why, Failure.REFUSED)


def weight_files(folder: Path, name: str) -> list[Path]:
    """The safetensors files of a model or adapter, one or all shards. Raises LabError when there are none."""
    kind = "adapter_model" if (folder / "adapter_config.json").exists() else "model"
    single, index = f"{kind}.safetensors", "model.safetensors.index.json"
    present = {path.name for path in folder.iterdir() if path.is_file()}
    weight_map = read_json_file(folder / index, name).get("weight_map")
    shards = sorted({*map(str, weight_map.values())}) if isinstance(weight_map, dict) else []
    if single in present:
        if others := present & {*shards} - {single}:
            raise refusal(name, f"has {single} and {min(others)}, of two models: move one of them out.")
        return [folder / single]
    if index not in present:
        raise no_weights(name, present)
    for file in shards or [single]:
        if file not in present:
            raise refusal(name, f"lacks the weight file {file!r}: download it again.")
    return [folder / file for file in shards]


def no_weights(name: str, files: Collection[str]) -> LabError:
    """The refusal of a model without safetensors, by its other files."""
    for pattern, why in WITHOUT_WEIGHTS.items():
        if matching := [file for file in files if re.search(pattern, file, re.IGNORECASE)]:
            return refusal(name, why.format(min(matching)), Failure.REFUSED)
    return refusal(name, "has no config.json or no weights (model.safetensors): use save_pretrained.")


def read_json_file(path: Path, name: str) -> dict[str, Any]:
    """A JSON object of a model folder; {} for a file that is not there. Raises LabError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (ValueError, OSError, RecursionError) as error:
        data = error
    if not isinstance(data, dict):
        why = f"cannot be read ({type(data).__name__}), it is not a JSON object in UTF-8"
        raise refusal(name, f"has a {path.name} that {why}: save it as one, or download it again.")
    return data


def model_config(folder: Path, name: str) -> Any:
    """config.json as transformers reads it, with what its class assumes. Raises LabError."""
    from transformers import AutoConfig

    # A configuration may ask for a dtype or a kind of output that has nothing to do with the weights.
    options = {"dtype": "float32", "return_dict": True, "local_files_only": True, "trust_remote_code": False}
    with library_errors(f"configuration of the model {name!r}"):
        config = AutoConfig.from_pretrained(folder, **options)
        check_config(config.to_dict(), name)
    return config


def describe(spec: ModelSpec, folder: Path, base_folder: Path | None = None) -> ModelSpec:
    """The spec as it is, if data/models.toml or run.json has described it; else by the folder's files.

    An adapter is described as its base is; base_folder: where the base is, if it had to be fetched.
    """
    if spec.parameters:
        return spec
    tokenizer = read_json_file(folder / "tokenizer_config.json", spec.alias)
    chat = bool(tokenizer.get("chat_template")) or (folder / "chat_template.jinja").is_file()
    if base := adapter_base(folder, spec.alias):
        whole = describe(base, base_folder) if base_folder else inspect(base)
        whole = replace(whole, alias=spec.alias, source=spec.source, kind=spec.kind, sha256={}, revision=None)
        return replace(whole, base=base.alias, prompt_format="chat" if chat else whole.prompt_format)
    config = model_config(folder, spec.alias)
    text = config.get_text_config(decoder=True)  # of a multimodal model its part for text
    heads, width = _positive(text, "num_attention_heads"), _positive(text, "hidden_size")
    return replace(
        spec,
        family=config.model_type,
        parameters=count_parameters(folder, spec.alias),
        context=context_of(text, tokenizer.get("model_max_length")),
        prompt_format="chat" if chat and spec.family == "unknown" else spec.prompt_format,
        layers=_positive(text, "num_hidden_layers"),
        kv_heads=_positive(text, "num_key_value_heads") or heads,
        head_dim=_positive(text, "head_dim") or (width and heads and width // heads),
    )


def _positive(config: Any, *names: str) -> int | None:
    """The first of a configuration's attributes that is a positive whole number."""
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if type(value) is int and value > 0), None)


def context_of(config: Any, tokenizer_limit: Any = None) -> int:
    """The longest sequence in tokens: the configuration's, else a sane tokenizer limit, else 2,048."""
    sane = isinstance(tokenizer_limit, int) and 0 < tokenizer_limit < 10_000_000
    limit = _positive(config, "max_position_embeddings", "max_seq_len", "seq_length")
    return limit or (tokenizer_limit if sane else DEFAULT_CONTEXT)


def count_parameters(folder: Path, name: str) -> int:
    """Parameters in the safetensors headers; a tied output layer counts once, even if it is stored."""
    tensors = _tensors(folder, name)
    if read_json_file(folder / "config.json", name).get("tie_word_embeddings") and len(tensors) > 1:
        tensors.pop("lm_head.weight", None)
    return sum(math.prod(shape) for key, (shape, _) in tensors.items() if not BUFFERS.search(key))


def _tensors(folder: Path, name: str) -> dict[str, tuple[list[int], str]]:
    """Shape and dtype of every tensor of a folder, whose headers and lengths are checked."""
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, tuple[list[int], str]] = {}
    for path in weight_files(folder, name):
        try:
            with safe_open(path, framework="numpy") as file:
                slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
                tensors |= {key: (part.get_shape(), part.get_dtype()) for key, part in slices.items()}
        except (SafetensorError, OSError) as error:
            why = f"has {path.name}, which is not a complete safetensors file ({error}): download it again."
            raise refusal(name, why) from None
    return tensors
