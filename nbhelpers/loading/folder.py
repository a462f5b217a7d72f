"""Saved models on disk: what a folder holds, checked and described without loading any weights."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from nbhelpers import registry
from nbhelpers.records import LabError, ModelSpec

DEFAULT_CONTEXT = 2048  # for a model whose files name no limit (ALiBi has none; BLOOM was trained on 2,048)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
LARGEST_TEXT_FILE = 64 * 2**20  # bytes; the largest tokenizer.json in use has about 35 MB
_READ = (".json", ".jinja", ".txt", ".model", ".safetensors")
_BUFFERS = (".attn.bias", ".masked_bias", ".inv_freq")  # stored by old checkpoints, not parameters


def check_folder(folder: Path, name: str) -> None:
    """Refuse a folder that cannot be loaded safely. Raises LabError with the reason and the way out."""
    _check_files(folder, name)
    config = read_json_file(folder / "config.json", name)
    check_no_remote_code(config, name)
    tokenizer_config = folder / "tokenizer_config.json"
    if tokenizer_config.is_file():
        check_no_remote_code(read_json_file(tokenizer_config, name), name)
    _check_layers(config, len(_tensor_shapes(folder, name)), name)
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise LabError(
            f"The model folder {name!r} has no tokenizer ({TOKENIZER_FILES[0]} or another vocabulary file): "
            "copy the tokenizer files of the original model into it."
        )


def _check_files(folder: Path, name: str) -> None:
    """Refuse links out of the folder (of the Hub's cache: out of the cache) and texts of absurd size."""
    root = folder.resolve()
    root = root.parents[2] if root.parent.name == "snapshots" else root
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.suffix not in _READ or not path.is_file():
            continue
        if not path.resolve().is_relative_to(root):
            raise LabError(
                f"The file {path.name} of the model {name!r} is a link out of its folder: copy it there."
            )
        if path.suffix != ".safetensors" and path.stat().st_size > LARGEST_TEXT_FILE:
            raise _too_large(path, name)
    if (folder / "adapter_config.json").is_file():
        raise LabError(
            f"The model {name!r} is an adapter to another one: merge the two with peft's merge_and_unload, "
            "save the result with save_pretrained, and name that folder."
        )


def _too_large(path: Path, name: str) -> LabError:
    return LabError(
        f"The file {path.name} of the model {name!r} has {path.stat().st_size / 2**20:,.0f} MiB, and no such "
        f"file needs more than {LARGEST_TEXT_FILE >> 20}: download the model again, or choose another."
    )


def _check_layers(config: dict[str, Any], tensors: int, name: str) -> None:
    """Refuse what would be built in a loop without end: every layer or expert has tensors of its own."""
    for key, value in config.items():
        if isinstance(value, dict):
            _check_layers(value, tensors, name)
        elif ("layer" in key or "expert" in key) and isinstance(value, int) and value > 100 + 10 * tensors:
            raise LabError(
                f"The config.json of the model {name!r} says {key} = {value} and its weights have "
                f"{tensors} tensors: download both again, or choose another model."
            )


def check_no_remote_code(config: dict[str, Any], name: str) -> None:
    kernels = [value for key, value in config.items() if key.endswith("_implementation")]
    if any("/" in str(kernel) for kernel in kernels):
        raise LabError(
            f"The model {name!r} asks for compiled code from a repository ({kernels[0]}), which the "
            "laboratory never loads: remove it from config.json, or choose another model."
        )
    if config.get("auto_map"):
        raise LabError(
            f"The model {name!r} asks to run Python code from its own repository (auto_map), "
            "which the laboratory never does: choose a model whose architecture transformers knows by itself."
        )


def weight_files(folder: Path, name: str) -> list[Path]:
    """The safetensors files of a model folder, one or all shards. Raises LabError when there are none."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        listed = read_json_file(index, name).get("weight_map")
        shards = sorted({str(file) for file in listed.values()}) if isinstance(listed, dict) else []
        if odd := [file for file in shards if Path(file).name != file or Path(file).suffix != ".safetensors"]:
            raise LabError(
                f"The weight index of the model {name!r} names {odd[0]!r}, which is no safetensors file "
                "beside it: choose another model."
            )
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing or not shards:
            raise LabError(
                f"The model folder {name!r} lacks the weight file {(missing or ['of its index'])[0]}."
            )
        return [folder / shard for shard in shards]
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise LabError(pickle_message(name, pickles[0]))
    raise LabError(
        f"The model folder {name!r} has no weights (model.safetensors): "
        "save the model with save_pretrained, or download it again."
    )


def pickle_message(name: str, file: str) -> str:
    return (
        f"The model {name!r} has only pickled weights ({file}), and a pickle can run any code hidden in it: "
        "convert it once where you trust the source, with "
        "AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder) and "
        "AutoTokenizer.from_pretrained(...).save_pretrained(folder), then name that folder."
    )


def read_json_file(path: Path, name: str) -> dict[str, Any]:
    try:
        if path.stat().st_size > LARGEST_TEXT_FILE:
            raise _too_large(path, name)
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LabError(f"The model folder {name!r} has no {path.name}: it is not a saved model.") from None
    except (ValueError, OSError, RecursionError) as error:
        raise LabError(f"The file {path.name} of the model {name!r} cannot be read ({error}).") from None
    if not isinstance(data, dict):
        raise LabError(f"The file {path.name} of the model {name!r} is not a JSON object.")
    return data


def inspect(spec: ModelSpec) -> ModelSpec:
    """A model of this disk checked and described; any other as it is. Raises LabError as check_folder does."""
    folder = registry.folder_of(spec)
    if folder is None:
        return spec
    check_folder(folder, spec.alias)
    return describe(spec, folder)


def describe(spec: ModelSpec, folder: Path) -> ModelSpec:
    """Fill in what a spec leaves open from the folder's configuration and the headers of its weights."""
    config = read_json_file(folder / "config.json", spec.alias)
    tokenizer_path = folder / "tokenizer_config.json"
    tokenizer = read_json_file(tokenizer_path, spec.alias) if tokenizer_path.is_file() else {}
    registered = spec.family != "unknown"
    heads = _first(config, "num_attention_heads", "n_head")
    hidden = _first(config, "hidden_size", "n_embd", "n_embed")
    chat = bool(tokenizer.get("chat_template")) or (folder / "chat_template.jinja").is_file()
    return replace(
        spec,
        family=spec.family if registered else config.get("model_type", "unknown"),
        parameters=spec.parameters or count_parameters(folder, spec.alias),
        context=spec.context or context_of(config, tokenizer.get("model_max_length")),
        prompt_format="chat" if chat and not registered else spec.prompt_format,
        layers=spec.layers or _first(config, "num_hidden_layers", "n_layer"),
        kv_heads=spec.kv_heads or _first(config, "num_key_value_heads") or heads,
        head_dim=spec.head_dim
        or _first(config, "head_dim")
        or (hidden // heads if hidden and heads else None),
    )


def _first(config: dict[str, Any], *names: str) -> int | None:
    return next((value for name in names if isinstance(value := config.get(name), int) and value > 0), None)


def context_of(config: dict[str, Any], tokenizer_limit: Any = None) -> int:
    """The longest sequence in tokens: the configuration's, else a sane tokenizer limit, else 2,048.

    BLOOM's ALiBi positions have no table and so no limit in the configuration; a tokenizer without a
    limit says 1e30, which is not sane.
    """
    limit = _first(config, "max_position_embeddings", "n_positions", "n_ctx", "seq_length", "max_seq_len")
    if limit is None and isinstance(tokenizer_limit, int) and 0 < tokenizer_limit < 10_000_000:
        limit = tokenizer_limit
    return limit or DEFAULT_CONTEXT


def count_parameters(folder: Path, name: str) -> int:
    """Parameters in the safetensors headers, without reading the weights.

    A tied output layer that was stored all the same is not counted twice.
    """
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
            raise LabError(
                f"The file {path.name} of the model {name!r} is not a complete safetensors file ({error}): "
                "download it again."
            ) from None
    return shapes
