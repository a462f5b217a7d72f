"""Predicted bytes against what real models and caches hold, and the one rule of what fits."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbhelpers import registry
from nbhelpers.devices import fit
from nbhelpers.loading import load
from nbhelpers.loading.checkpoint import inspect
from nbhelpers.records import ModelSpec


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_cache_formula_gives_the_bytes_of_a_real_cache(family, dtype):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "gpt2": {"n_embd": 24, "n_layer": 3, "n_head": 4},
        "llama": {
            "hidden_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 8,
        },
    }
    config = AutoConfig.for_model(family, vocab_size=10, **sizes[family])
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    with torch.inference_mode():
        cache = model(input_ids=torch.ones(5, 7, dtype=torch.long), use_cache=True).past_key_values
    real = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    kv_heads = 4 if family == "gpt2" else 2
    spec = ModelSpec("x", "x", "local", layers=3, kv_heads=kv_heads, head_dim=6)
    assert fit.kv_cache_bytes(spec, rows=5, tokens=7, dtype=dtype) == real


@pytest.mark.parametrize("name", registry.embedded_models())
def test_the_need_is_what_a_model_holds_and_fills(name):
    import torch

    model = load.load(name, "cpu", "float32").model
    with torch.inference_mode():
        cache = model(torch.full((2, 40), 7), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    need = fit.generation_need(inspect(registry.resolve(name)), "float32", 2, 40)
    assert (need.weights, need.cache, need.logits) == (sum(p.nbytes for p in model.parameters()), held, 0)


@given(
    parameters=st.integers(1, 10**10),
    rows=st.integers(1, 64),
    tokens=st.integers(1, 5000),
    vocabulary=st.integers(0, 300_000),
    free=st.integers(1, 10**11),
)
def test_a_model_fits_into_nine_tenths_of_the_free_memory(parameters, rows, tokens, vocabulary, free):
    spec = ModelSpec("x", "x", "hub", parameters=parameters, context=2048, layers=4, kv_heads=2, head_dim=8)
    for dtype, size in (("float32", 4), ("bfloat16", 2), ("float16", 2)):
        need = fit.generation_need(spec, dtype, rows, tokens, vocabulary)
        cache = 2 * 4 * 2 * 8 * min(tokens, 2048) * rows * size
        assert need.total == parameters * size + cache + 24 * rows * vocabulary
        assert fit.fits(need, free) == (need.total <= 0.9 * free)
        one = fit.generation_need(spec, dtype, 1, tokens, vocabulary)
        most = fit.rows_that_fit(one, free)
        assert most == 0 or fit.fits(fit.generation_need(spec, dtype, most, tokens, vocabulary), free + 1)
        assert not fit.fits(fit.generation_need(spec, dtype, most + 1, tokens, vocabulary), free - 1)
        assert fit.rows_that_fit(one, free, loaded=True) == fit.rows_that_fit(replace(one, weights=0), free)


def test_what_is_not_known_counts_as_nothing():
    assert fit.generation_need(registry.resolve("someone/unknown"), "float32").total == 0


@pytest.mark.parametrize("model", ["shape:bloom-560m", "bloom-560m"])
def test_an_architecture_is_known_before_a_download(model):
    need = fit.generation_need(inspect(registry.resolve(model)), "bfloat16", 1, 16)
    assert need.weights == 559_214_592 * 2 and need.cache > 0
