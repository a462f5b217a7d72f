"""Saved models on disk: what a folder holds, checked and described without loading any weights."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from nbhelpers import registry
from nbhelpers.records import Failure, LabError, ModelSpec

DEFAULT_CONTEXT = 2048  # for a model whose files name no limit (ALiBi has none; BLOOM was trained on 2,048)
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
LARGEST_TEXT_FILE = 64 * 2**20  # bytes; the largest tokenizer.json in use has about 35 MB
_READ = (".json", ".jinja", ".txt", ".model", ".safetensors")
_BUFFERS = (".attn.bias", ".masked_bias", ".inv_freq")  # stored by old checkpoints, not parameters


def inspect(spec: ModelSpec) -> ModelSpec:
    """A model of this disk checked and described; any other as it is. Raises LabError as check_folder."""
    folder = registry.folder_of(spec)
    if folder is None:
        return spec
    check_folder(folder, spec.alias)
    return describe(spec, folder)


def check_folder(folder: Path, name: str) -> None:
    """Refuse a folder that cannot be loaded safely. Raises LabError with the reason and the way out."""
    root = folder.resolve()
    root = root.parents[2] if root.parent.name == "snapshots" else root  # the Hub's cache is one of links
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.suffix in _READ and path.is_file():
            if not path.resolve().is_relative_to(root):
                why = f"has {path.name} as a link out of its folder: copy it there."
                raise LabError(f"The model {name!r} {why}", Failure.REFUSED)
            if path.suffix != ".safetensors":
                _check_size(path, name)
    if (folder / "adapter_config.json").is_file():
        way_out = "merge the two with peft's merge_and_unload, save_pretrained the result, name that folder."
        raise LabError(f"The model {name!r} is an adapter to another one: {way_out}")
    config = read_json_file(folder / "config.json", name)
    check_no_remote_code(config, name)
    check_no_remote_code(read_json_file(folder / "tokenizer_config.json", name, optional=True), name)
    _check_layers(config, len(_tensor_shapes(folder, name)), name)
    if not any((folder / file).is_file() for file in VOCABULARIES):
        way_out = "copy the tokenizer files of the original model into its folder."
        raise LabError(f"The model {name!r} has no tokenizer ({VOCABULARIES[0]} or another): {way_out}")


def _check_size(path: Path, name: str) -> None:
    if (size := path.stat().st_size) > LARGEST_TEXT_FILE:
        why = f"has a {path.name} of {size / 2**20:,.0f} MiB, and none needs more than"
        way_out = "download it again, or choose another model."
        raise LabError(f"The model {name!r} {why} {LARGEST_TEXT_FILE >> 20}: {way_out}", Failure.REFUSED)


def _check_layers(config: dict[str, Any], tensors: int, name: str) -> None:
    """Refuse what would be built in a loop without end: every layer or expert has tensors of its own."""
    for key, value in config.items():
        if isinstance(value, dict):
            _check_layers(value, tensors, name)
        elif ("layer" in key or "expert" in key) and isinstance(value, int) and value > 100 + 10 * tensors:
            raise LabError(
                f"The model {name!r} has {key} = {value} in its config.json and {tensors} tensors in its "
                "weights: download both again, or choose another model."
            )


def check_no_remote_code(config: dict[str, Any], name: str) -> None:
    """Refuse a configuration that names code to be fetched and run. Raises LabError."""
    values = [str(value) for key, value in config.items() if key.endswith("_implementation")]
    if kernels := [value for value in values if "/" in value]:
        why = f"for compiled code from a repository ({kernels[0]}), which the laboratory never loads"
    elif config.get("auto_map"):
        why = "to run Python code from its own repository (auto_map), which the laboratory never does"
    else:
        return
    way_out = "choose a model whose architecture transformers knows by itself."
    raise LabError(f"The model {name!r} asks {why}: {way_out}", Failure.REFUSED)


def weight_files(folder: Path, name: str) -> list[Path]:
    """The safetensors files of a model folder, one or all shards. Raises LabError when there are none."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        listed = read_json_file(index, name).get("weight_map")
        shards = sorted({str(file) for file in listed.values()}) if isinstance(listed, dict) else []
        if odd := [file for file in shards if Path(file).name != file or Path(file).suffix != ".safetensors"]:
            why = f"has a weight index that names {odd[0]!r}, which is no safetensors file beside it"
            raise LabError(f"The model {name!r} {why}: choose another model.", Failure.REFUSED)
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing or not shards:
            raise LabError(f"The model {name!r} lacks the weight file {(missing or ['of its index'])[0]}.")
        return [folder / shard for shard in shards]
    if pickles := sorted(path.name for pattern in PICKLES for path in folder.glob(pattern)):
        raise pickled(name, pickles[0])
    way_out = "save the model with save_pretrained, or download it again."
    raise LabError(f"The model {name!r} has no weights (model.safetensors): {way_out}")


def pickled(name: str, file: str) -> LabError:
    """The refusal of a model that has no other weights."""
    return LabError(
        f"The model {name!r} has only pickled weights ({file}), and a pickle can run any code hidden in it: "
        "convert it once where you trust the source, with "
        "AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder) and "
        "AutoTokenizer.from_pretrained(...).save_pretrained(folder), then name that folder.",
        Failure.REFUSED,
    )


def read_json_file(path: Path, name: str, optional: bool = False) -> dict[str, Any]:
    """A JSON object of a model folder; {} for an optional file that is not there. Raises LabError."""
    try:
        _check_size(path, name)
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if optional:
            return {}
        raise LabError(f"The model {name!r} has no {path.name}: it is not a saved model.") from None
    except (ValueError, OSError, RecursionError) as error:
        raise LabError(f"The model {name!r} has a {path.name} that cannot be read ({error}).") from None
    if not isinstance(data, dict):
        raise LabError(f"The model {name!r} has a {path.name} that is not a JSON object.")
    return data


def describe(spec: ModelSpec, folder: Path) -> ModelSpec:
    """Fill in what a spec leaves open from the folder's configuration and the headers of its weights."""
    config = read_json_file(folder / "config.json", spec.alias)
    tokenizer = read_json_file(folder / "tokenizer_config.json", spec.alias, optional=True)
    registered = spec.family != "unknown"
    heads = _first(config, "num_attention_heads", "n_head")
    hidden = _first(config, "hidden_size", "n_embd", "n_embed")
    head_dim = _first(config, "head_dim") or (hidden // heads if hidden and heads else None)
    chat = bool(tokenizer.get("chat_template")) or (folder / "chat_template.jinja").is_file()
    return replace(
        spec,
        family=spec.family if registered else config.get("model_type", "unknown"),
        parameters=spec.parameters or count_parameters(folder, spec.alias),
        context=spec.context or context_of(config, tokenizer.get("model_max_length")),
        prompt_format="chat" if chat and not registered else spec.prompt_format,
        layers=spec.layers or _first(config, "num_hidden_layers", "n_layer"),
        kv_heads=spec.kv_heads or _first(config, "num_key_value_heads") or heads,
        head_dim=spec.head_dim or head_dim,
    )


def _first(config: dict[str, Any], *names: str) -> int | None:
    return next((value for name in names if isinstance(value := config.get(name), int) and value > 0), None)


def context_of(config: dict[str, Any], tokenizer_limit: Any = None) -> int:
    """The longest sequence in tokens: the configuration's, else a sane tokenizer limit, else 2,048."""
    limit = _first(config, "max_position_embeddings", "n_positions", "n_ctx", "seq_length", "max_seq_len")
    if limit is None and isinstance(tokenizer_limit, int) and 0 < tokenizer_limit < 10_000_000:
        limit = tokenizer_limit
    return limit or DEFAULT_CONTEXT


def count_parameters(folder: Path, name: str) -> int:
    """Parameters in the safetensors headers; a tied output layer that was stored all the same counts once."""
    shapes = _tensor_shapes(folder, name)
    if read_json_file(folder / "config.json", name).get("tie_word_embeddings") and len(shapes) > 1:
        shapes.pop("lm_head.weight", None)
    return sum(math.prod(shape) for key, shape in shapes.items() if not key.endswith(_BUFFERS))


def _tensor_shapes(folder: Path, name: str) -> dict[str, list[int]]:
    """The shape of every tensor in a folder's weight files, whose headers and lengths are checked."""
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, list[int]] = {}
    for path in weight_files(folder, name):
        try:
            with safe_open(path, framework="numpy") as file:
                shapes |= {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            why = f"has {path.name}, which is not a complete safetensors file ({error})"
            raise LabError(f"The model {name!r} {why}: download it again.") from None
    return shapes
