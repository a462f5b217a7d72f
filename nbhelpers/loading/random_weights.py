"""Real architectures with random weights: does it fit, and how fast is it, before any download."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from nbhelpers import registry
from nbhelpers.records import ModelSpec

SEED = 0
BLOCK = 1_000_003  # random numbers drawn for a model; prime, so that no two rows of a matrix are the same


def shape_revision(spec: ModelSpec) -> str:
    """A name for exactly these random weights: a hash of the configuration and the way they are drawn."""
    recipe = json.dumps([registry.shape_config(spec), SEED, BLOCK], sort_keys=True)
    return "random-" + hashlib.sha256(recipe.encode()).hexdigest()[:12]


def random_weights(spec: ModelSpec, device: str, dtype: str) -> Any:
    """The architecture of a shape: model on a device, in eval mode, filled with seeded random numbers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config = AutoConfig.for_model(**registry.shape_config(spec))
    with no_init_weights(), torch.device(device):
        net = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    net.tie_weights()  # part of the initialisation that was skipped
    _fill(net)
    return net.eval()


def _fill(net: Any) -> None:
    """Matrices from one block of normal numbers laid end to end, norms 1, biases 0.

    Drawing billions of numbers would take longer than everything that a shape is for.
    """
    import torch

    drawn = torch.randn(BLOCK, generator=torch.Generator().manual_seed(SEED)) * 0.02
    block = drawn.to(net.dtype).to(net.device)
    position = 0
    for name, parameter in net.named_parameters():
        flat = parameter.data.view(-1)
        if parameter.dim() == 1:
            flat.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        done = 0
        while done < flat.numel():
            count = min(BLOCK - position, flat.numel() - done)
            flat[done : done + count] = block[position : position + count]
            done, position = done + count, (position + count) % BLOCK
