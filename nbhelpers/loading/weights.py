"""Weights in a model: saved ones, merged with an adapter and tried out, or random ones of a shape."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

from nbhelpers import registry
from nbhelpers.loading import folder as folders
from nbhelpers.records import Failure, ModelSpec

# What a model continues text without: eyes, ears, and layers that guess further on.
PASSED_OVER = re.compile(r"vision|visual|audio|image|projector|^(model\.)?mtp\.")
PREFIX = ("cpmant", "xlnet")  # families that read the prompt both ways, and then continue it
SEED = 0
BLOCK = 1_000_003  # random numbers drawn for a model; prime, so that no two rows of a matrix are the same


def read(folder: Path, name: str, dtype: str) -> tuple[Any, list[str]]:
    """The saved model, and what was set aside of its configuration.

    First counts what the configuration describes, without memory for it, against what the files hold:
    transformers would allocate what they lack. Packed weights hold up to 8 numbers in one.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    # A configuration may ask for a dtype or a kind of output that has nothing to do with the weights.
    here = {"local_files_only": True, "trust_remote_code": False, "dtype": getattr(torch, dtype)}
    config = AutoConfig.from_pretrained(folder, return_dict=True, **here)
    folders.check_config(config.to_dict(), name)  # with what its class assumes
    if type(config) not in AutoModelForCausalLM._model_mapping:
        why = f"is of the kind {config.model_type}, which transformers does not load for text alone"
        raise folders.refusal(name, f"{why}: name one that is for text.")
    words = config.get_text_config(decoder=True)
    if (getattr(words, "pad_token_id", 0) or 0) >= getattr(words, "vocab_size", math.inf):
        words.pad_token_id = None  # masked, whatever it is
    notes = []
    if (asked := config._attn_implementation) not in (None, "eager", "sdpa"):
        config._attn_implementation = None
        notes.append(f"the attention of config.json, {asked}, is set aside for PyTorch's own")
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    described = sum(tensor.numel() for tensor in (*empty.parameters(), *empty.buffers()))
    held = folders.count_parameters(folder, name)
    if described > 8 * held + 2**24:
        why = f"has a config.json that describes {described:,} numbers and its weights hold {held:,}"
        raise folders.refusal(name, f"{why}: download both again.")
    how = {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    net, info = AutoModelForCausalLM.from_pretrained(folder, config=config, **how, **here)
    # transformers would fill what is missing with random numbers, and drop what the model has no place for.
    if absent := sorted(info["missing_keys"]) or sorted(key for key, *_ in info["mismatched_keys"]):
        why = f"lacks tensors that its config.json describes ({len(absent)} are missing or of another size, "
        raise folders.refusal(name, f"{why}such as {absent[0]}): download both again.")
    first, more = (getattr(config, f"num_{key}_layers", 0) or 0 for key in ("hidden", "nextn_predict"))
    guesses = [f".layers.{layer}." for layer in range(first, first + more)]
    known = [key for key in info["unexpected_keys"] if folders.BUFFERS.search(key) or PASSED_OVER.search(key)]
    known += [key for key in info["unexpected_keys"] if any(guess in key for guess in guesses)]
    if left := sorted(set(info["unexpected_keys"]) - set(known)):
        why = f"holds tensors that its config.json does not describe ({len(left)}, such as {left[0]})"
        raise folders.refusal(name, f"{why}: use the config.json that was saved with these weights.")
    return net, notes


def merge(net: Any, folder: Path, name: str) -> Any:
    """The model with a LoRA adapter added to its weights by peft, which knows every variant of it."""
    import peft
    from safetensors.torch import load_file

    config = peft.PeftConfig.from_pretrained(str(folder))
    config.base_model_name_or_path = None  # peft warns where the base has moved
    held, embeddings = load_file(folder / "adapter_model.safetensors"), net.get_input_embeddings()
    # What was trained in full stands under up to three names beside more embeddings than the base has.
    saved = {key.replace(".modules_to_save.", "."): held[key] for key in held if "original_module" not in key}
    where = next(path for path, module in net.named_modules() if module is embeddings)
    if (own := saved.get(f"base_model.model.{where}.weight")) is not None:  # with rows for added tokens
        net.resize_token_embeddings(len(own), mean_resizing=False)
    adapted = peft.get_peft_model(net, config)
    result: Any = peft.set_peft_model_state_dict(adapted, saved)
    if wrong := [*result.unexpected_keys, *(key for key in result.missing_keys if "lora_" in key)]:
        why = f"is an adapter to another base than it names ({len(wrong)} tensors differ, such as {wrong[0]})"
        raise folders.refusal(name, f"{why}: put the right one into adapter_config.json.")
    return adapted.merge_and_unload()


def try_out(net: Any, name: str, dtype: str) -> None:
    """A first pass, which reads memory-mapped weights from disk.

    Raises LabError where weights are not finite, or where a token's logits depend on the tokens after it.
    """
    import torch

    ids = torch.tensor([[0, 1, 2], [0, 1, 3]], device=net.device)
    with torch.inference_mode():
        one, other = net(input_ids=ids % len(net.get_input_embeddings().weight)).logits[:, :2].float()
    ends = {key: p.aminmax() for key, p in net.named_parameters() if p.is_floating_point() and p.itemsize > 1}
    if broken := [key for key, pair in ends.items() if not torch.stack(pair).isfinite().all()]:
        why = f"has weights that are NaN or infinite in {dtype} ({len(broken)} tensors, such as {broken[0]})"
        way = "choose bfloat16 or float32" if dtype == "float16" else "use another checkpoint"
        raise folders.refusal(name, f"{why}: {way}.", Failure.BAD_OUTPUT)
    ahead = (one - other).abs().max() > (1e-3 if dtype == "float32" else 3e-2) * one.std()
    if ahead and net.config.model_type not in PREFIX:
        why = "looks at the tokens after the one that it continues, as masked language models do"
        raise folders.refusal(name, f"{why}: name a causal language model.")


def random_revision(spec: ModelSpec) -> str:
    """A name for exactly these random weights: a hash of the configuration and the way they are drawn."""
    recipe = json.dumps([registry.shape_config(spec), SEED, BLOCK], sort_keys=True)
    return "random-" + hashlib.sha256(recipe.encode()).hexdigest()[:12]


def random_model(spec: ModelSpec, device: str, dtype: str) -> Any:
    """The architecture of a shape: model on a device, in eval mode, filled with seeded random numbers.

    Matrices are one block of normal numbers laid end to end (drawing billions takes longer than all that a
    shape is for), norms 1, biases 0.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config = AutoConfig.for_model(**registry.shape_config(spec))
    with no_init_weights(), torch.device(device):
        net = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    net.tie_weights()  # part of the initialisation that was skipped
    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(SEED)) * 0.02
    block, position = block.to(net.dtype).to(device), 0
    for name, parameter in net.named_parameters():
        flat = parameter.data.view(-1)
        if parameter.dim() == 1:
            flat.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        for piece in (block[position:], *(block,) * (flat.numel() // BLOCK + 1)):
            count = min(len(piece), len(flat))
            flat[:count] = piece[:count]
            flat, position = flat[count:], (position + count) % BLOCK
    return net.eval()
