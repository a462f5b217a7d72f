"""Every causal architecture of the installed transformers, built small from its own configuration class."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

KINDS = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
MOST_PARAMETERS = 20_000_000
VOCABULARY = 99
# Names that configurations use, each set where a configuration knows it.
IDS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {
    **{"hidden_size": 32, "n_embd": 32, "d_model": 32, "embedding_size": 32, "attention_hidden_size": 32},
    **{"intermediate_size": 48, "n_inner": 48, "ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48},
    **{"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "hidden_dim": 32},
    **{"max_position_embeddings": 64, "n_positions": 64, "context_length": 64},
    **{"state_size": 8, "mamba_d_state": 8, "ssm_state_size": 8, "mamba_chunk_size": 8, "chunk_size": 8},
    **{"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_num_heads": 8, "mamba_head_dim": 8, "rotary_dim": 4},
    **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "kv_lora_rank": 16, "q_lora_rank": 16},
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2},
    **{"linear_num_value_heads": 4, "index_head_dim": 8, "index_n_heads": 2, "index_topk": 64},
}
EXPERTS = {
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **{"num_experts_per_tok": 2, "moe_k": 2, "n_group": 1, "topk_group": 1},
}
HEADS = {
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "decoder_attention_heads", "encoder_attention_heads"), 4
    ),
    "num_key_value_heads": 2,
}
HEAD_DIM = {"head_dim": 8}


def layers(count: int) -> dict[str, int]:
    names = ("num_hidden_layers", "n_layer", "decoder_layers", "encoder_layers")
    return dict.fromkeys(names, count)


# From the most to the least that is asked of a configuration class: the first that it accepts and that works.
RECIPES: list[dict[str, Any]] = [
    *({**IDS, **SIZES, **EXPERTS, **HEADS, **HEAD_DIM, **layers(n)} for n in (2, 4, 6)),
    *({**IDS, **SIZES, **EXPERTS, **HEADS, **layers(n)} for n in (2, 4)),
    {**IDS, **SIZES, **EXPERTS, **HEADS},
    {**IDS, **SIZES, **EXPERTS, **layers(2)},
    {**IDS, **EXPERTS, **layers(4)},
]


def configuration(cls: Any, recipe: dict[str, Any]) -> Any:
    base, known = cls(), {}
    for key, value in recipe.items():
        name = getattr(cls, "attribute_map", {}).get(key, key)
        fixed = isinstance(prop := getattr(cls, name, None), property) and prop.fset is None
        try:
            if not fixed and hasattr(base, name):
                known[name] = value
        except Exception:  # a name that varies by layer
            continue
    for name, part in getattr(cls, "sub_configs", {}).items():
        inner = getattr(base, name, None)
        kind = type(inner) if inner is not None else part
        known[name] = configuration(kind, recipe).to_dict()
    return cls(**known)


def build(kind: str, seed: int = 0) -> tuple[Any, str]:
    """A small random model in eval mode, or None and why none could be built."""
    why = ""
    for recipe in RECIPES:
        try:
            config = configuration(CONFIG_MAPPING[kind], recipe)
            with torch.device("meta"):
                count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
            if count > MOST_PARAMETERS:
                why = why or f"{count:,} parameters"
                continue
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config).eval()
            generator = torch.Generator().manual_seed(seed)
            for parameter in model.parameters():
                if parameter.dim() >= 2:  # wide, so that its choices are not all alike
                    parameter.data.normal_(0, 0.25, generator=generator)
            with torch.inference_mode():
                model(input_ids=torch.tensor([[5, 6, 7]]))
                model(input_ids=torch.tensor([[5, 6, 7, 8, 9, 10, 11]]))
            return model, ""
        except Exception as error:
            why = f"{type(error).__name__}: {error}".splitlines()[0][:100]
    return None, why
