"""Does a model fit the memory of a device? The bytes of generating come from its architecture."""

from dataclasses import dataclass

from nbhelpers.records import DTYPES, ModelSpec

HEADROOM = 0.9  # assumed: share of the free memory that a need may take; the rest is for activations
LOGIT_BYTES = 24  # for each row and entry of the vocabulary: logits, and what drawing from them takes


@dataclass(frozen=True)
class Need:
    """Bytes of generating. What is not known before a model is fetched counts as 0."""

    weights: int
    cache: int  # keys and values of all rows
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.logits


def kv_cache_bytes(spec: ModelSpec, rows: int, tokens: int, dtype: str) -> int:
    """2 x layers x key-value heads x head size x tokens x rows x item size; 0 where one is not known."""
    size = (spec.layers or 0) * (spec.kv_heads or 0) * (spec.head_dim or 0)
    return 2 * size * tokens * rows * DTYPES[dtype]


def generation_need(
    spec: ModelSpec, dtype: str, rows: int = 1, tokens: int = 512, vocabulary: int = 0
) -> Need:
    """The need of ``rows`` texts at a time of ``tokens`` tokens each with its prompt, cut to the context."""
    cache = kv_cache_bytes(spec, rows, min(tokens, spec.context or tokens), dtype)
    return Need((spec.parameters or 0) * DTYPES[dtype], cache, LOGIT_BYTES * rows * vocabulary)


def fits(need: Need, free: int) -> bool:
    return need.total <= HEADROOM * free


def rows_that_fit(row: Need, free: int, loaded: bool = False) -> int:
    """How many rows fit, given the need of one; 0 where not even one does. loaded: the weights are there."""
    room = HEADROOM * free - (0 if loaded else row.weights)
    return max(0, int(room // max(1, row.cache + row.logits)))
