"""The decode loop: token ids in, rows out as they end, with a cache and a clock. (Imports torch.)"""

import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from nbhelpers.generation.engines import KeyValues, States, reach, takes, threads_for
from nbhelpers.generation.sampling import NextToken
from nbhelpers.records import Engine, Failure, FinishReason, LabError

# Share of the slots that must be free before waiting rows are admitted. At a quarter, 150 texts of about 210
# tokens took 2 to 9% fewer passes in 16 slots than when all must be free.
REFILL = 0.25
STEPS = 3  # tokens that an engine is tried with
# How far its logits may lie from those of passes without a cache, in their standard deviations. Of 160
# architectures in float32, those that are served right lay below 0.002, the others above 0.06.
CLOSE, CLOSE_IN_HALF = 0.01, 0.3
SERVES: WeakKeyDictionary[Any, Engine] = WeakKeyDictionary()  # which engine each model was found to need


@dataclass(frozen=True)
class Started:
    """These rows are about to be prefilled; their clock starts when the next event is asked for."""

    rows: list[int]


@dataclass(frozen=True)
class Finished:
    """What one row produced; seconds count from the start of its own prefill."""

    row: int
    tokens: tuple[int, ...]  # unpadded, the end token included
    finish_reason: FinishReason  # "eos", "stop", "length" or "time"
    ttft_s: float
    latency_s: float  # until this row's own last token


@torch.inference_mode()
def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: Sequence[int],
    choose: NextToken,
    end_tokens: Collection[int] = (),
    slots: int | None = None,
    timeout_s: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
    engine: Engine | None = None,
    stopped: Callable[[int, Sequence[int]], bool] | None = None,
) -> Iterator[Started | Finished]:
    """Continue all prompts, at most `slots` of them at a time (None: all), one token each per pass.

    prompts: token ids, none empty; equal ones share one prefill. max_new_tokens: of each row, at least 1.
    end_tokens end a row when they are generated. engine: None is that of engine_for. A row that ends leaves;
    when a quarter of the slots are free, the longest waiting prompts take them. A row that took more than
    timeout_s ends after the pass it is in ("time"), and one of whose new ids ``stopped`` says so ("stop").
    """
    longest = max(len(ids) + room for ids, room in zip(prompts, max_new_tokens, strict=True))
    loop = (engine or engine_for(model, longest)) == "loop"
    slots, parameters = slots or len(prompts), sum(weight.numel() for weight in model.parameters())
    # Like lengths pad little; states (see States) share a batch with their own kind only.
    waiting = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), () if loop else tuple(prompts[i])))
    turns = {row: turn for turn, row in enumerate(waiting)}
    tokens: list[list[int]] = [[] for _ in prompts]
    began, ttft_s = dict[int, float](), dict[int, float]()
    live, live_memory = list[int](), cast(Any, None)
    while live or waiting:
        new = waiting[: slots - len(live)] if len(live) <= slots * (1 - REFILL) else []
        if not loop:
            new = [] if live else [row for row in new if tuple(prompts[row]) == tuple(prompts[new[0]])]
        if new:
            waiting = waiting[len(new) :]
            yield Started(new)
            began.update(dict.fromkeys(new, clock()))
        rows, new_prompts = new or live, [prompts[row] for row in new]
        with threads_for(parameters * (sum(map(len, new_prompts)) or len(live))):
            if new:
                memory = KeyValues(model, new_prompts) if loop else States(model, new_prompts)
            else:
                memory, lengths = live_memory, [len(prompts[row]) + len(tokens[row]) for row in live]
                memory.step([tokens[row][-1] for row in live], lengths)
            ids = choose(memory.logits.float(), rows, [len(tokens[row]) for row in rows]).tolist()  # waits
        now, ended = clock(), set[int]()
        for row, token in sorted(zip(rows, ids, strict=True), key=lambda pair: turns[pair[0]]):
            tokens[row].append(token)
            latency_s = now - began[row]
            ttft_s.setdefault(row, latency_s)
            reason: FinishReason | None = "time" if latency_s > timeout_s else None
            if token in end_tokens:
                reason = "eos"
            elif stopped and stopped(row, tokens[row]):
                reason = "stop"
            elif len(tokens[row]) == max_new_tokens[row]:
                reason = "length"
            if reason:
                ended.add(row)
                yield Finished(row, tuple(tokens[row]), reason, ttft_s[row], latency_s)
        if ended:  # the last rows take the places of those that left
            staying = [index for index, row in enumerate(rows) if row not in ended]
            last = [index for index in staying if index >= len(staying)]
            staying = [last.pop() if rows[index] in ended else index for index in range(len(staying))]
            rows = [rows[index] for index in staying]
            memory.keep(staying, max((len(prompts[row]) + len(tokens[row]) for row in rows), default=1) - 1)
        if new and live:
            live_memory.join(memory)
            live = live + rows
        else:
            live, live_memory = rows, memory


def decode_all(*args: Any, **kwargs: Any) -> list[Finished]:
    """The rows of ``decode``, which takes the same arguments, in their order."""
    return sorted((e for e in decode(*args, **kwargs) if isinstance(e, Finished)), key=lambda e: e.row)


@torch.inference_mode()
def engine_for(model: Any, tokens: int = 0) -> Engine:
    """What serves a model and rows of so many tokens: the loop, otherwise transformers' generate.

    A model is tried once: logits of unlike rows are compared with those of passes that use no cache. Raises
    LabError where neither engine gives the same. A model that fails without a cache too is not tried: its
    rows will say why.
    """
    engines: list[Engine] = ["loop", "generate"] if _remembers_keys_and_values(model) else ["generate"]
    if model not in SERVES:
        try:
            rows, logits = _trial(model)
        except Exception:
            return engines[0]
        limit = CLOSE if model.dtype.itemsize >= 4 else CLOSE_IN_HALF
        exact = next((engine for engine in engines if _distance(model, engine, rows, logits) <= limit), None)
        if exact is None:
            why = "gives other logits with a cache than without one: choose another model."
            raise LabError(f"The class {type(model).__name__} {why}", Failure.REFUSED)
        SERVES[model] = exact
    return "generate" if tokens > reach(model) else SERVES[model]


def _remembers_keys_and_values(model: Any) -> bool:
    """Whether that is all it remembers, in a cache that its forward takes."""
    config = model.config.get_text_config(decoder=True)
    layers = {type(layer) for layer in DynamicCache(config=config).layers}
    chunked = "chunked_attention" in (getattr(config, "layer_types", None) or ())
    more = chunked or config.is_encoder_decoder or layers - {DynamicLayer, DynamicSlidingWindowLayer}
    return not more and "past_key_values" in takes(model)


def _trial(model: Any) -> tuple[list[list[int]], Tensor]:
    """Rows of 5 and 9 tokens, none of which the configuration names; each twice, as repeats share a batch.

    And the logits [rows, STEPS, vocabulary] that their last tokens follow, by a pass over each row alone.
    """
    config, size = model.config.get_text_config(decoder=True), model.get_input_embeddings().weight.shape[0]
    special = [value for name, value in config.to_dict().items() if name.endswith(("_id", "_index"))]
    plain = [token for token in range(size) if token not in special]
    plain = plain[:: len(plain) // 14 or 1]
    rows, extra = [plain[:5], plain[-9:]], {"use_cache": False} if "use_cache" in takes(model) else {}
    passes = [model(input_ids=torch.tensor([row], device=model.device), **extra).logits[0] for row in rows]
    return rows * 2, torch.stack([logits[-STEPS - 1 : -1] for logits in passes]).float().repeat(2, 1, 1)


def _distance(model: Any, engine: Engine, rows: list[list[int]], reference: Tensor) -> float:
    """How far an engine's logits lie from the reference's, in standard deviations of these.

    The largest of a token, the median of a row, the worst row; infinite where the engine fails.
    """
    best = reference.amax(-1, keepdim=True)
    unmasked = reference > best - 1e3  # some models mask a part of their vocabulary
    sd = reference.where(unmasked, best).std(-1).clamp(min=1e-3)
    distance = torch.full_like(sd, math.inf)

    def follow(logits: Tensor, indices: list[int], steps: list[int]) -> Tensor:
        error = (logits - reference[indices, steps]).abs().where(unmasked[indices, steps], 0.0)
        distance[indices, steps] = error.amax(-1) / sd[indices, steps]
        return torch.tensor([rows[index][step - STEPS] for index, step in zip(indices, steps, strict=True)])

    with suppress(Exception):  # whatever a model raises that is used in a way it is not made for
        decode_all(model, [row[:-STEPS] for row in rows], [STEPS] * len(rows), follow, engine=engine)
    return distance.median(1).values.max().item()
