"""Which token comes next: temperature, top-k, top-p, and noise that depends on a row's own seed alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# SplitMix64's constants 9E3779B97F4A7C15, BF58476D1CE4E5B9 and 94D049BB133111EB, as signed 64-bit integers.
GAMMA = -7046029254386353131
MIX_A = -4658895280553007687
MIX_B = -7723592293110705685
BLOCK = 65_536  # random numbers made at a time: they stay in the processor's cache

Chooser = Callable[["Tensor", list[int], list[int]], "Tensor"]


def sampler(seeds: Sequence[int], temperature: float, top_k: int = 0, top_p: float = 1.0) -> Chooser:
    """A chooser that samples from softmax(logits / temperature), filtered; temperature 0 is greedy.

    The Gumbel-max trick (Gumbel 1954; Maddison et al. 2014): the argmax of logits plus Gumbel noise is a
    draw from their softmax. The noise is a hash of (row seed, step, token id), so a row's draw depends on
    nothing but its own seed: not on its place in the batch, nor on who shares it.
    """

    def choose(logits: Tensor, rows: list[int], steps: list[int]) -> Tensor:
        tokens: Tensor | None = None
        if temperature > 0:
            logits = logits / temperature
            if 0 < top_k < logits.shape[-1] or top_p < 1:
                logits, tokens = shortlist(logits, top_k, top_p)
            noise_for = logits.shape[-1] if tokens is None else tokens
            logits += gumbel_noise([seeds[row] for row in rows], steps, noise_for, logits.device)
        best = logits.max(dim=-1)
        if best.values.isnan().any():
            raise ArithmeticError("the model returned NaN logits: try dtype float32")
        return best.indices if tokens is None else tokens.gather(1, best.indices[:, None])[:, 0]

    return choose


def shortlist(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """The tokens within top-k and the nucleus: logits [B, n], largest first, and their ids [B, n].

    top_k keeps the k largest (0: all). top_p keeps the smallest set of most likely tokens whose probability
    reaches top_p (Holtzman et al. 2020; 1.0: all), computed after top-k, at least one token. n is that of
    the row that keeps most; in the others the rest is minus infinity.
    """
    size = logits.shape[-1]
    logits, tokens = logits.topk(min(top_k, size)) if top_k else logits.sort(descending=True)
    if top_p < 1.0:
        probabilities = logits.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        most = int((before < top_p).sum(dim=-1).max()) or size  # none: NaN, which the chooser reports
        logits = logits.masked_fill(before >= top_p, float("-inf"))[:, :most]
        tokens = tokens[:, :most]
    return logits, tokens


def gumbel_noise(
    seeds: Sequence[int], steps: Sequence[int], tokens: int | Tensor, device: Any = "cpu"
) -> Tensor:
    """Standard Gumbel noise [B, n] float32, a pure function of (seed, step, token id).

    tokens: the ids [B, n], or n for the ids 0 to n - 1. Each row is the SplitMix64 stream (Steele, Lea and
    Flood 2014) seeded by the mixed (seed, step); token i takes its i-th output. Integer arithmetic wraps at
    64 bits and is the same on every device.
    """
    import torch

    base, step = torch.tensor([list(seeds), list(steps)], dtype=torch.int64, device=device)[..., None]
    base = _mix(base + (step + 1) * GAMMA)
    ids = torch.arange(tokens, device=device).expand(len(base), -1) if isinstance(tokens, int) else tokens
    noise = torch.empty(ids.shape, device=device)
    rows = max(1, BLOCK // ids.shape[1])
    for start in range(0, len(base), rows):
        some = slice(start, start + rows)
        bits = _shift_right(_mix(base[some] + (ids[some] + 1) * GAMMA), 11)
        # Between 0 and 1, both excluded, and finest near 0: small exponentials are the ones that win.
        uniform = noise[some].copy_(bits).add_(0.5).mul_(2.0**-53).clamp_(max=1 - 2.0**-24)
        exponential = uniform.neg_().log1p_().neg_()
        exponential.log_().neg_()
    return noise


def row_seed(seed: int, prompt_id: str, repeat: int) -> int:
    """A 63-bit seed for one row, from the run's seed, the prompt and the repeat (SHA-256)."""
    digest = hashlib.sha256(f"{seed}\x1f{prompt_id}\x1f{repeat}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _mix(bits: Tensor) -> Tensor:
    """SplitMix64's finaliser, in place."""
    bits ^= _shift_right(bits, 30)
    bits *= MIX_A
    bits ^= _shift_right(bits, 27)
    bits *= MIX_B
    bits ^= _shift_right(bits, 31)
    return bits


def _shift_right(bits: Tensor, places: int) -> Tensor:
    """Logical shift: torch's own copies the sign bit."""
    return (bits >> places) & ((1 << (64 - places)) - 1)
