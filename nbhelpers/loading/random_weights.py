"""Real architectures with random weights: does it fit, and how fast is it, before any download."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from nbhelpers import registry
from nbhelpers.records import ModelSpec

SEED = 0
BLOCK = 1_000_003  # random numbers drawn for a model; prime, so that no two rows of a matrix are the same


def revision(spec: ModelSpec) -> str:
    """A name for exactly these random weights: a hash of the configuration and the way they are drawn."""
    recipe = json.dumps([registry.shape_config(spec), SEED, BLOCK], sort_keys=True)
    return "random-" + hashlib.sha256(recipe.encode()).hexdigest()[:12]


def build(spec: ModelSpec, device: str, dtype: str) -> Any:
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
