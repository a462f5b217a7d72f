"""Weights in a model: saved ones, merged with an adapter and tried out, or random ones of a shape."""

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any
from unittest import mock

from nbhelpers import registry
from nbhelpers.loading import checkpoint
from nbhelpers.records import Failure, ModelSpec

# Parts that a model continues text without: for images and sound, and for predicting several tokens at once.
UNUSED_PARTS = re.compile(r"vision|visual|audio|image|projector|^(model\.)?mtp\.")
PREFIX = ("cpmant", "xlnet")  # families that read the prompt both ways, and then continue it
SEED = 0


def saved_model(folder: Path, name: str, dtype: str) -> tuple[Any, list[str]]:
    """The saved model, and notes of what was set aside of its configuration. Raises LabError."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    config = checkpoint.model_config(folder, name)
    if type(config) not in AutoModelForCausalLM._model_mapping:
        why = f"is of the kind {config.model_type}, which transformers does not load for text alone"
        raise checkpoint.refusal(name, f"{why}: name one that is for text.")
    text = config.get_text_config(decoder=True)
    if (getattr(text, "pad_token_id", 0) or 0) >= getattr(text, "vocab_size", math.inf):
        text.pad_token_id = None  # masked, whatever it is
    names, by_type = config.architectures or [], AutoModelForCausalLM._model_mapping._model_mapping
    if names and by_type.get(config.model_type) not in names and {*by_type.values()}.issuperset(names):
        why = f"is {names[0]} and of the type {config.model_type} by its config.json, which cannot both be"
        raise checkpoint.refusal(name, f"{why}: use the config.json that was saved with these weights.")
    notes = []
    if (attention := config._attn_implementation) not in (None, "eager", "sdpa"):
        config._attn_implementation = None
        notes.append(f"the attention of config.json, {attention}, is set aside for PyTorch's own")
    options = {"config": config, "dtype": dtype, "use_safetensors": True, "local_files_only": True}
    options |= {"output_loading_info": True}
    try:
        with mock.patch.object(GenerationConfig, "validate"):  # what is set aside need not make sense
            net, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, **options)
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        why = "has a config.json that describes tensors of other sizes than its weights have"
        raise checkpoint.refusal(name, f"{why}: download both again.") from error
    # transformers would fill what is missing with random numbers, and drop what the model has no place for.
    if missing := sorted(info["missing_keys"]):
        why = f"lacks tensors that its config.json describes ({len(missing)}, such as {missing[0]})"
        raise checkpoint.refusal(name, f"{why}: download both again.")
    keys = sorted(info["unexpected_keys"])
    if extra := [key for key in keys if not (checkpoint.BUFFERS.search(key) or UNUSED_PARTS.search(key))]:
        why = f"holds tensors that its config.json does not describe ({len(extra)}, such as {extra[0]})"
        raise checkpoint.refusal(name, f"{why}: use the config.json that was saved with these weights.")
    return net, notes


def merge(net: Any, folder: Path, name: str) -> Any:
    """The model with a LoRA adapter added to its weights by peft, which knows every variant of it."""
    import peft

    config = peft.PeftConfig.from_pretrained(str(folder))
    config.base_model_name_or_path = None  # peft warns where the base has moved
    adapted = peft.get_peft_model(net, config)
    keys = adapted.load_adapter(str(folder), "default", torch_device="cpu")
    if wrong := [*keys.unexpected_keys, *(key for key in keys.missing_keys if "lora_" in key)]:
        why = f"is an adapter to another base than it names ({len(wrong)} tensors differ, such as {wrong[0]})"
        raise checkpoint.refusal(name, f"{why}: put the right one into adapter_config.json.")
    return adapted.merge_and_unload()


def try_out(net: Any, name: str, dtype: str) -> None:
    """A first pass, which reads memory-mapped weights from disk.

    Raises LabError where weights are not finite, or where a token's logits depend on the tokens after it.
    """
    import torch

    ids = torch.tensor([[0, 1, 2], [0, 1, 3]], device=net.device)
    with torch.inference_mode():
        logits, others = net(input_ids=ids % len(net.get_input_embeddings().weight)).logits[:, :2].float()
    weights = {key: p for key, p in net.named_parameters() if p.is_floating_point() and p.itemsize > 1}
    if broken := [key for key, p in weights.items() if not torch.stack(p.aminmax()).isfinite().all()]:
        why = f"has weights that are NaN or infinite in {dtype} ({len(broken)} tensors, such as {broken[0]})"
        remedy = "choose bfloat16 or float32" if dtype == "float16" else "use another checkpoint"
        raise checkpoint.refusal(name, f"{why}: {remedy}.", Failure.BAD_OUTPUT)
    looks_ahead = (logits - others).abs().max() > (1e-3 if dtype == "float32" else 3e-2) * logits.std()
    if looks_ahead and net.config.model_type not in PREFIX:
        why = "looks at the tokens after the one that it continues, as masked language models do"
        raise checkpoint.refusal(name, f"{why}: name a causal language model.")


def random_revision(spec: ModelSpec) -> str:
    """A name for exactly these random weights: a hash of the configuration and the way they are drawn."""
    recipe = json.dumps([registry.shape_config(spec), SEED, "as transformers does"], sort_keys=True)
    return "random-" + hashlib.sha256(recipe.encode()).hexdigest()[:12]


def random_model(spec: ModelSpec, device: str, dtype: str) -> Any:
    """The architecture of a shape: model on a device, in eval mode, with seeded random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**registry.shape_config(spec))
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(SEED)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
