"""Does a model fit: the bytes of using or training it, from formulas and a dry run, before any download."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any
from unittest import mock

from nbhelpers import registry
from nbhelpers.devices import device as devices
from nbhelpers.loading.folder import describe
from nbhelpers.records import LabError, ModelSpec

MIXED = "mixed"  # weights, gradients and optimizer in float32, arithmetic in bfloat16
TRAINING_BYTES = {**devices.ITEM_BYTES, MIXED: 4}
ADAM_STATES = 2  # running means of the gradient and of its square, in the dtype of the weights


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes of one workload. What does not apply is 0; ``total`` is the peak if nothing is freed early."""

    model: str
    batch: int
    tokens: int
    weights: int
    gradients: int = 0
    optimizer: int = 0  # Adam or AdamW, not sharded
    activations: int = 0  # kept by the forward pass for the backward pass
    logits: int = 0  # the loss's two float32 gradients, as large as the logits, when backward begins
    cache: int = 0  # keys and values

    @property
    def parts(self) -> dict[str, int]:
        names = ("weights", "gradients", "optimizer", "activations", "logits", "cache")
        return {name: size for name in names if (size := getattr(self, name))}

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def largest_batch(self, free_bytes: int) -> int:
        """Rows that fit into the free memory, less the headroom of ``devices``; 0 where not even one does."""
        per_row = (self.activations + self.logits + self.cache) / self.batch
        fixed = self.weights + self.gradients + self.optimizer
        return max(0, int((devices.HEADROOM * free_bytes - fixed) // per_row))


def answer(model: str, train: bool, batch: int, tokens: int, dtype: str, checkpointing: bool) -> str:
    """The table of ``nbhelpers memory``: each part, the total, and whether it fits into what is free now."""
    if checkpointing and not train:
        raise LabError("--checkpointing saves memory in training: add --train, or leave it out.")
    need = (
        training_need(model, batch, tokens, dtype, checkpointing)
        if train
        else inference_need(model, batch, tokens, dtype)
    )
    device = devices.available_devices()[0]
    free, mib = devices.free_memory(device), 2**20
    rows = [
        f"{name:12}{size / mib:12,.1f} MiB" for name, size in (need.parts | {"total": need.total}).items()
    ]
    verdict = "fits" if need.total <= devices.HEADROOM * free else "does not fit"
    share = f"{devices.HEADROOM:.0%} of the {free / mib:,.0f} MiB free on {device}"
    largest = need.largest_batch(free) or "none"
    return "\n".join([*rows, f"{verdict} into {share}; the largest batch that does: {largest}"])


def inference_need(model: str, batch: int = 1, tokens: int = 512, dtype: str = "float32") -> MemoryNeed:
    """Weights and key-value cache (``devices.kv_cache_bytes``) of generating to a length of ``tokens``."""
    spec, dtype = _workload(model, batch, tokens, dtype, devices.ITEM_BYTES)
    weights = (spec.parameters or 0) * devices.ITEM_BYTES[dtype]
    cache = devices.kv_cache_bytes(spec, batch, tokens, dtype)
    return MemoryNeed(spec.alias, batch, tokens, weights, cache=cache)


def training_need(
    model: str, batch: int = 1, tokens: int = 512, dtype: str = "float32", checkpointing: bool = False
) -> MemoryNeed:
    """A step of AdamW on all parameters, ``batch`` rows of ``tokens`` tokens; dtype may be "mixed".

    Weights, gradients and optimizer are parameters x item size x 1, 1 and 2. The activations come from a dry
    run (``saved_bytes``), whose attention is the CPU's memory-efficient one. Raises LabError.
    """
    spec, dtype = _workload(model, batch, tokens, dtype, TRAINING_BYTES)
    config = _config(spec)
    weights = (spec.parameters or 0) * TRAINING_BYTES[dtype]
    saved = saved_bytes(config, batch, tokens, dtype, checkpointing)
    logits = 2 * batch * tokens * config.vocab_size * 4
    return MemoryNeed(spec.alias, batch, tokens, weights, weights, ADAM_STATES * weights, saved, logits)


def saved_bytes(config: Any, batch: int, tokens: int, dtype: str, checkpointing: bool = False) -> int:
    """Bytes that autograd keeps for the backward pass, weights aside, each storage once.

    The forward pass runs on tensors that have shapes and no numbers (``FakeTensorMode``), so it needs
    neither the memory nor the weights; ``saved_tensors_hooks`` sees what is kept.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoModelForCausalLM

    # On tensors without numbers transformers cannot see that rows are not packed, and would keep a mask.
    no_packing = mock.patch("transformers.masking_utils.find_packed_sequence_indices", return_value=None)
    mixed = dtype == MIXED
    with warnings.catch_warnings(), FakeTensorMode(), no_packing:
        warnings.simplefilter("ignore")
        net = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, "float32" if mixed else dtype)
        ).train()
        if checkpointing:
            net.gradient_checkpointing_enable()
        own = {parameter.untyped_storage()._cdata for parameter in net.parameters()}
        kept: dict[int, Any] = {}  # holding a storage keeps its address from being used again

        def keep(tensor: Any) -> Any:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage
            return tensor

        ids = torch.zeros((batch, tokens), dtype=torch.long)
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=mixed),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            net(input_ids=ids, labels=ids, use_cache=False)
        return sum(storage.nbytes() for storage in kept.values())


def _workload(
    model: str, batch: int, tokens: int, dtype: str, dtypes: dict[str, int]
) -> tuple[ModelSpec, str]:
    dtype = devices.SHORT_DTYPES.get(dtype, dtype)
    if dtype not in dtypes:
        raise LabError(f"There is no dtype {dtype!r} for this: use {', '.join(dtypes)}.")
    if batch < 1 or tokens < 1:
        raise LabError(f"A workload has at least one row of one token, not batch {batch}, tokens {tokens}.")
    spec = registry.resolve(model)
    if (folder := registry.folder_of(spec)) is not None:
        spec = describe(spec, folder)
    if not spec.parameters:
        raise LabError(f"Nothing is known about {model!r} before it is fetched: add it to data/models.toml.")
    if tokens > (spec.context or tokens):
        raise LabError(f"{spec.alias} reads at most {spec.context} tokens, not {tokens}: ask for fewer.")
    return spec, dtype


def _config(spec: ModelSpec) -> Any:
    from transformers import AutoConfig

    folder = registry.folder_of(spec)
    if folder is None:
        config = AutoConfig.for_model(**registry.shape_config(spec))
    else:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    config.loss_type = "ForCausalLM"  # said once here, or transformers warns at some families
    return config
