"""Saved models on disk: what a folder holds, checked and described without loading any weights."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from nbhelpers import registry
from nbhelpers.records import Failure, LabError, ModelSpec

DEFAULT_CONTEXT = 2048  # for a model whose files name no limit (ALiBi has none; BLOOM was trained on 2,048)
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
LARGEST_TEXT_FILE = 64 * 2**20  # bytes; the largest tokenizer.json in use has about 35 MB
_READ = (".json", ".jinja", ".txt", ".model", ".safetensors")
_BUFFERS = (".attn.bias", ".masked_bias", ".inv_freq")  # stored by old checkpoints, not parameters


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
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.suffix in _READ and path.is_file():
            if not path.resolve().is_relative_to(root):
                raise refusal(name, f"has {path.name} as a link out of its folder: copy it.", Failure.REFUSED)
            if path.suffix != ".safetensors":
                _check_size(path, name)
    if (folder / "adapter_config.json").is_file():
        raise refusal(name, "is an adapter to another one: merge them (peft's merge_and_unload), save that.")
    config = read_json_file(folder / "config.json", name)
    check_no_remote_code(config, name)
    check_no_remote_code(read_json_file(folder / "tokenizer_config.json", name, optional=True), name)
    _check_layers(config, len(_tensor_shapes(folder, name)), name)
    if not any((folder / file).is_file() for file in VOCABULARIES):
        raise refusal(name, "has no tokenizer (tokenizer.json or another): copy the original model's.")


def _check_size(path: Path, name: str) -> None:
    if (size := path.stat().st_size) > LARGEST_TEXT_FILE:
        raise refusal(name, f"has a {path.name} of {size >> 20:,} MiB: download it again.", Failure.REFUSED)


def _check_layers(config: dict[str, Any], tensors: int, name: str) -> None:
    """Refuse what would be built in a loop without end: every layer or expert has tensors of its own."""
    for key, value in config.items():
        if isinstance(value, dict):
            _check_layers(value, tensors, name)
        elif ("layer" in key or "expert" in key) and isinstance(value, int) and value > 100 + 10 * tensors:
            why = f"has {key} = {value} in its config.json and {tensors} tensors in its weights"
            raise refusal(name, f"{why}: download both again.")


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
    """The safetensors files of a model folder, one or all shards. Raises LabError when there are none."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
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
    if pickles := sorted(file for file in files if file.endswith(PICKLES)):
        why = f"has only pickled weights ({pickles[0]}), and a pickle can run any code hidden in it: where "
        why += "you trust it, load model and tokenizer, save_pretrained both, and name that folder."
        return refusal(name, why, Failure.REFUSED)
    return refusal(name, "has no weights (model.safetensors): save it with save_pretrained.")


def read_json_file(path: Path, name: str, optional: bool = False) -> dict[str, Any]:
    """A JSON object of a model folder; {} for an optional file that is not there. Raises LabError."""
    if optional and not path.exists():
        return {}
    try:
        _check_size(path, name)
        data, why = json.loads(path.read_text(encoding="utf-8")), "it is not a JSON object"
    except FileNotFoundError:
        raise refusal(name, f"has no {path.name}: it is not a saved model.") from None
    except (ValueError, OSError, RecursionError) as error:
        data, why = None, str(error)
    if not isinstance(data, dict):
        raise refusal(name, f"has a {path.name} that cannot be read ({why}): download it again.")
    return data


def describe(spec: ModelSpec, folder: Path) -> ModelSpec:
    """Fill in what a spec leaves open from the folder's configuration and the headers of its weights."""
    config = read_json_file(folder / "config.json", spec.alias)
    tokenizer = read_json_file(folder / "tokenizer_config.json", spec.alias, optional=True)
    named = spec.family != "unknown"  # in data/models.toml
    heads = _first(config, "num_attention_heads", "n_head")
    width = _first(config, "hidden_size", "n_embd", "n_embed")
    chat = bool(tokenizer.get("chat_template")) or (folder / "chat_template.jinja").is_file()
    return replace(
        spec,
        family=spec.family if named else config.get("model_type", "unknown"),
        parameters=spec.parameters or count_parameters(folder, spec.alias),
        context=spec.context or context_of(config, tokenizer.get("model_max_length")),
        prompt_format="chat" if chat and not named else spec.prompt_format,
        layers=spec.layers or _first(config, "num_hidden_layers", "n_layer"),
        kv_heads=spec.kv_heads or _first(config, "num_key_value_heads") or heads,
        head_dim=spec.head_dim or _first(config, "head_dim") or (width and heads and width // heads),
    )


def _first(config: dict[str, Any], *names: str) -> int | None:
    """The first positive whole number of these names, at the top or in a nested model's ``text_config``."""
    levels = [level for level in (config, config.get("text_config")) if isinstance(level, dict)]
    found = (level.get(name) for level in levels for name in names)
    return next((value for value in found if isinstance(value, int) and value > 0), None)


def context_of(config: dict[str, Any], tokenizer_limit: Any = None) -> int:
    """The longest sequence in tokens: the configuration's, else a sane tokenizer limit, else 2,048."""
    sane = isinstance(tokenizer_limit, int) and 0 < tokenizer_limit < 10_000_000
    limit = _first(config, "max_position_embeddings", "n_positions", "n_ctx", "seq_length", "max_seq_len")
    return limit or (tokenizer_limit if sane else DEFAULT_CONTEXT)


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
            why = f"has {path.name}, which is not a complete safetensors file ({error}): download it again."
            raise refusal(name, why) from None
    return shapes
