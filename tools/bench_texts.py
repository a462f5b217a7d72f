"""What the engines of the bench share: models whose texts never end by themselves."""

from __future__ import annotations

from nbhelpers.loading import load

Texts = tuple[list[str], int]  # in order of the rows, and how many tokens were written


def endless(model: str, dtype: str, device: str) -> load.Loaded:
    """A model whose texts never end by themselves."""
    loaded = load.load(model, device, dtype)
    for owner in (loaded.model.generation_config, loaded.model.config, loaded.tokenizer):
        owner.eos_token_id = None
    return loaded
