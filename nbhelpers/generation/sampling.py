"""Which token comes next: temperature, top-k, top-p, and draws that depend on a row's own seed alone."""

import hashlib
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from nbhelpers.records import Failure, LabError, Settings

# SplitMix64's constants 9E3779B97F4A7C15, BF58476D1CE4E5B9 and 94D049BB133111EB, as signed 64-bit integers.
GAMMA = -7046029254386353131
MIX_A = -4658895280553007687
MIX_B = -7723592293110705685
BLOCK = 64  # neighbouring tokens that are drawn as one, then singled out: few random numbers per draw

# What a generation_config.json may ask for: what transformers' processors of logits do, and what they do not.
PROCESSED = re.compile(
    r"temperature|top_[khp]|min_p|typical_p|\w+_cutoff|\w*repetition_penalty|\w*no_repeat_ngram_size|min_length|"
    r"min_new_tokens|bad_words_ids|sequence_bias|forced_[be]os_token_id|\w*suppress_tokens|\w+_length_penalty"
)
BEYOND = re.compile(
    r"stop_strings|max_(time|length|new_tokens)|num_beams|num_return_sequences|guidance_scale|token_healing|"
    r"penalty_alpha|dola_layers|watermarking_config|prompt_lookup_num_tokens"
)

# (logits [rows, vocabulary], the rows, tokens that each has so far) -> token ids [rows]. It may overwrite the
# logits, in float32: of 64 rows and a vocabulary of 250,000, new memory took longer than the arithmetic.
NextToken = Callable[[Tensor, list[int], list[int]], Tensor]


def sampler(seeds: Sequence[int], temperature: float, top_k: int = 0, top_p: float = 1.0) -> NextToken:
    """Draws from softmax(logits / temperature), filtered; temperature 0 is greedy.

    The Gumbel-max trick (Gumbel 1954; Maddison et al. 2014): the argmax of logits plus Gumbel variates is a
    draw from their softmax. The variates are a hash of (row seed, step, number), so that a row's text does
    not depend on who shares its batch; torch's own generators cannot promise that.
    """

    def next_token(logits: Tensor, rows: list[int], steps: list[int]) -> Tensor:
        if temperature <= 0:
            return _largest(logits)
        row_seeds, logits = [seeds[row] for row in rows], logits.div_(temperature)
        if not 0 < top_k < logits.shape[-1] and top_p >= 1:
            return _draw(logits, row_seeds, steps)
        logits, tokens = shortlist(logits, top_k, top_p)
        best = _largest(logits + gumbel(row_seeds, steps, tokens))
        return tokens.gather(1, best[:, None])[:, 0]

    return next_token


def _draw(logits: Tensor, seeds: Sequence[int], steps: Sequence[int]) -> Tensor:
    """One token [B] of softmax(logits [B, n]): first its block, by the block's summed weight, then the token.

    The same distribution as a variate for every logit, from n / 64 + 64 of them instead of n.
    """
    weights, padding = torch.softmax(logits, dim=-1, out=logits), -logits.shape[1] % BLOCK
    weights = torch.nn.functional.pad(weights, (0, padding)) if padding else weights  # it copies even by 0
    blocks = weights.unflatten(1, (-1, BLOCK))
    count = blocks.shape[1]
    variates = gumbel(seeds, steps, torch.arange(count + BLOCK, device=logits.device).expand(len(logits), -1))
    block = _largest(blocks.sum(dim=-1).log() + variates[:, :count])
    within = blocks[torch.arange(len(block), device=block.device), block].log()
    return block * BLOCK + _largest(within + variates[:, count:])


def _largest(logits: Tensor) -> Tensor:
    best = logits.max(dim=-1)
    if best.values.isnan().any():
        raise LabError("The model returned NaN logits: try dtype float32.", Failure.BAD_OUTPUT)
    return best.indices


def _maker_fields(model: Any, names: re.Pattern[str]) -> dict[str, Any]:
    fields: dict[str, Any] = getattr(model.generation_config, "to_diff_dict", dict)()
    return {name: value for name, value in fields.items() if names.fullmatch(name)}


def maker_settings(model: Any, use: bool = False) -> str:
    """What a model's generation_config.json asks for, and what becomes of it; "" where it asks nothing."""
    by_fate = {"used": list[str](), "set aside": list[str]()}
    for fate, names in (("used" if use else "set aside", PROCESSED), ("set aside", BEYOND)):
        by_fate[fate] += [f"{name}={value}" for name, value in _maker_fields(model, names).items()]
    return "; ".join(f"{fate}: {', '.join(fields)}" for fate, fields in by_fate.items() if fields)


def maker_sampler(
    model: Any, settings: Settings, rows: Sequence[tuple[Sequence[int], int, int]], ends: Collection[int]
) -> NextToken:
    """Draws as generation_config.json asks, otherwise as the settings do, each row by itself.

    By transformers' processors of logits. rows: prompt ids, how many tokens may follow, and the seed of each.
    """
    fields: dict[str, Any] = {name: getattr(settings, name) for name in ("temperature", "top_k", "top_p")}
    fields |= _maker_fields(model, PROCESSED) | {"eos_token_id": sorted(ends) or None}
    greedy = fields["temperature"] == 0
    fields |= {"do_sample": not greedy, "temperature": fields["temperature"] or 1.0}
    texts, processors = [list(ids) for ids, *_ in rows], []
    try:
        for ids, room, _ in rows:
            config = GenerationConfig(**fields, max_length=len(ids) + room)
            prompt = torch.tensor([list(ids)], device=model.device)
            model._prepare_special_tokens(config, True, device=model.device)
            processors.append(model._get_logits_processor(config, len(ids), prompt, device=model.device))
    except (LookupError, TypeError, ValueError) as error:
        why = f"What generation_config.json asks for makes no sense ({maker_settings(model, True)}: {error})"
        raise LabError(f"{why}: correct it, or leave out --maker-settings.") from None
    draw = sampler([seed for *_, seed in rows], 0.0 if greedy else 1.0)

    def next_token(logits: Tensor, rows: list[int], steps: list[int]) -> Tensor:
        for n, row in enumerate(rows):
            text = torch.tensor([texts[row]], device=logits.device)
            logits[n : n + 1] = processors[row](text, logits[n : n + 1])
        drawn = draw(logits, rows, steps)
        for row, token in zip(rows, drawn.tolist(), strict=True):
            texts[row].append(token)
        return drawn

    return next_token


def shortlist(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """The tokens within top-k and the nucleus: logits [B, n], largest first, and their ids [B, n].

    top_k keeps the k largest (0: all). top_p then keeps the smallest set of likeliest tokens that reaches it
    (Holtzman et al. 2020; 1.0: all). n is that of the row that keeps most; shorter ones end in -infinity. Not
    by transformers' processors, which sort the whole vocabulary even after top-k.
    """
    size = logits.shape[-1]
    logits, tokens = logits.topk(min(top_k, size)) if top_k else logits.sort(descending=True)
    if top_p < 1.0:
        probabilities = logits.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        kept = int((before < top_p).sum(dim=-1).max()) or size  # 0 of NaN, which _largest reports
        logits = logits.masked_fill(before >= top_p, float("-inf"))[:, :kept]
        tokens = tokens[:, :kept]
    return logits, tokens


def gumbel(seeds: Sequence[int], steps: Sequence[int], numbers: Tensor) -> Tensor:
    """Standard Gumbel variates [B, n] float32, a pure function of (seed, step, number) for numbers [B, n].

    Number i takes the i-th output of the SplitMix64 stream (Steele, Lea and Flood 2014) seeded by the mixed
    (seed, step): integers that wrap at 64 bits, the same on every device.
    """
    base, step = torch.tensor([list(seeds), list(steps)], dtype=torch.int64, device=numbers.device)[..., None]
    bits = _shift_right(_mix(_mix(base + (step + 1) * GAMMA) + (numbers + 1) * GAMMA), 11)
    # Between 0 and 1, both excluded, and finest near 0: small exponentials are the ones that win.
    uniform = ((bits.float() + 0.5) * 2.0**-53).clamp_(max=1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def row_seed(seed: int, prompt_id: str, repeat: int) -> int:
    """A 63-bit seed for one row, from the run's seed, the prompt and the repeat (SHA-256)."""
    digest = hashlib.sha256(f"{seed}\x1f{prompt_id}\x1f{repeat}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _mix(bits: Tensor) -> Tensor:
    """SplitMix64's finaliser, in place."""
    for count, factor in ((30, MIX_A), (27, MIX_B)):
        bits ^= _shift_right(bits, count)
        bits *= factor
    bits ^= _shift_right(bits, 31)
    return bits


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Logical shift: torch's own copies the sign bit."""
    return (bits >> count) & ((1 << (64 - count)) - 1)
