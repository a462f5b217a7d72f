"""The same weights for llama.cpp: a float32 GGUF of a GPT-2, Llama or BLOOM model.

    python -m tools.bench_gguf lab-llama lab-llama.gguf

llama.cpp's own converter is not part of a package; this writes what it would for these three families
(conversion/llama.py, gpt2.py and bloom.py of llama.cpp). With a vocabulary where the tokenizer has every id
of the model, as of the embedded ones; of others, as those of random weights, ids go in and come out.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import gguf

from nbhelpers.loading import load

FAMILIES = {"gpt2": gguf.MODEL_ARCH.GPT2, "llama": gguf.MODEL_ARCH.LLAMA, "bloom": gguf.MODEL_ARCH.BLOOM}


def convert(model: str, path: str) -> None:
    loaded = load.load(model, "cpu", "float32")
    net = loaded.model
    config, family = net.config, net.config.model_type
    layers = config.num_hidden_layers
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[FAMILIES[family]])
    _describe(writer, config)
    _vocabulary(writer, loaded.tokenizer, config.vocab_size)
    names = gguf.get_tensor_name_map(FAMILIES[family], layers)
    tied = net.get_output_embeddings().weight is net.get_input_embeddings().weight
    for name, tensor in net.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        known = name.removeprefix("transformer.") if family == "bloom" else name
        target = names.get_name(known, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise SystemExit(f"{model}: no place in a GGUF for {name}")
        writer.add_tensor(target, _arranged(name, tensor, config).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: gguf.GGUFWriter, config: Any) -> None:
    hidden, heads = config.hidden_size, config.num_attention_heads
    writer.add_context_length(getattr(config, "max_position_embeddings", None) or 2048)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", None) or 4 * hidden)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    if config.model_type == "llama":
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    else:
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)


def _vocabulary(writer: gguf.GGUFWriter, tokenizer: Any, size: int) -> None:
    """Of byte-level BPE, as GPT-2's."""
    ids = tokenizer.get_vocab()
    if len(ids) != size:
        return writer.add_tokenizer_model("no_vocab")
    kinds, special = (gguf.TokenType.NORMAL, gguf.TokenType.CONTROL), set(tokenizer.all_special_tokens)
    words, merges = (
        sorted(ids, key=ids.get),
        json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"],
    )
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    writer.add_token_types([kinds[word in special] for word in words])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id)


def _arranged(name: str, tensor: Any, config: Any) -> Any:
    """As llama.cpp wants it: GPT-2 transposed, Llama's rotary halves interleaved, BLOOM's q, k, v apart."""
    heads = config.num_attention_heads
    if config.model_type == "gpt2" and re.search(r"c_(attn|proj|fc)\.weight$", name):
        return tensor.T
    if config.model_type == "llama" and re.search(r"[qk]_proj\.weight$", name):
        heads = config.num_key_value_heads if "k_proj" in name else heads
        return tensor.reshape(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
    if config.model_type == "bloom" and "query_key_value" in name:
        return tensor.reshape(heads, 3, -1, *tensor.shape[1:]).swapaxes(0, 1).reshape(tensor.shape)
    return tensor


if __name__ == "__main__":
    convert(*sys.argv[1:])
