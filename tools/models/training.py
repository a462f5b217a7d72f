"""Tokenizer, shapes, training loop and held-out perplexity of the embedded models."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tools.models.corpus import Text

CONTEXT = 512
VOCABULARY = 4096
PAD, BOS, EOS = "<pad>", "<s>", "</s>"
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
# A processor without such instructions computes in bfloat16 ten times slower than in float32.
BFLOAT16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()


@dataclass(frozen=True)
class Recipe:
    """How one model is made. ``steps`` is fixed, so that a rebuild does the same work on any machine."""

    alias: str
    family: str
    config: dict[str, Any]
    steps: int
    learning_rate: float  # of embeddings and vectors (AdamW)
    matrix_rate: float = 2e-2  # of the matrices (Muon, Jordan et al. 2024; as large as AdamW's would be)
    batch_tokens: int = 2000  # padded tokens of a step; its logits stay below malloc's 32 MiB mmap threshold
    warm_up: int = 60  # steps
    cool_down: float = 0.6  # share of the steps in which the learning rates fall
    weight_decay: float = 0.01  # of the matrices
    seed: int = 0
    copy_steps: tuple[int, ...] = ()  # of each part of build.teach_copying


def train_tokenizer(texts: Sequence[str]) -> Any:
    """A byte-level BPE tokenizer of the tokenizers library, wrapped for transformers; ``<s>`` comes first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def new_model(recipe: Recipe) -> Any:
    """A randomly initialised model of the recipe's family and shape, seeded."""
    import transformers

    torch.manual_seed(recipe.seed)
    config = transformers.AutoConfig.for_model(
        recipe.family,
        vocab_size=VOCABULARY,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        tie_word_embeddings=True,
        **recipe.config,
    )
    # On a CPU, plain attention trains faster than PyTorch's fused one at these lengths (1.1 to 1.3 times).
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.generation_config = transformers.GenerationConfig(
        pad_token_id=PAD_ID, bos_token_id=BOS_ID, eos_token_id=EOS_ID
    )
    return model


def encode(tokenizer: Any, texts: Sequence[Text]) -> list[list[int]]:
    """Token ids of ``<s>``, prompt, blank line, text and ``</s>``, cut at the context."""
    batch = tokenizer([text.document for text in texts])["input_ids"]
    return [[*ids, EOS_ID][:CONTEXT] for ids in batch]


def batches(rows: Sequence[list[int]], tokens: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless batches of whole documents of similar length, padded on the right; (rows, length) int64.

    A document has its row to itself: nothing reaches over its end, and the first token is always ``<s>``.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=generator).tolist()
        groups: list[list[int]] = []
        for start in range(0, len(order), 1024):
            pool = sorted(order[start : start + 1024], key=lambda index: len(rows[index]))
            group: list[int] = []
            for index in pool:
                if group and len(rows[index]) * (len(group) + 1) > tokens:
                    groups.append(group)
                    group = []
                group.append(index)
            groups.append(group)
        for number in torch.randperm(len(groups), generator=generator).tolist():
            chosen = [torch.tensor(rows[index]) for index in groups[number]]
            yield torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True, padding_value=PAD_ID)


def next_token_loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats over all tokens but padding and the first."""
    # Padding is on the right and attention is causal: no mask is needed.
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), ids[:, 1:].flatten(), ignore_index=PAD_ID
    )


def schedule(step: int, recipe: Recipe) -> float:
    """The share of the peak learning rate: linear warm-up, a constant part, a straight line to a fiftieth."""
    warm, left = (step + 1) / recipe.warm_up, (recipe.steps - step) / (recipe.cool_down * recipe.steps)
    return min(1.0, warm, 0.02 + 0.98 * left)


def _orthogonalised(grad: torch.Tensor, factors: tuple[float, ...], steps: int, eps: float) -> torch.Tensor:
    """What torch.optim.Muon makes of a gradient [rows, columns], without rounding it to bfloat16."""
    tall = grad.shape[0] > grad.shape[1]
    found = grad.T if tall else grad
    found = found / found.norm().clamp(min=eps)
    a, b, c = factors
    for _ in range(steps):
        gram = found @ found.T
        found = a * found + (b * gram + c * gram @ gram) @ found
    return found.T if tall else found


def _optimizers(model: Any, recipe: Recipe) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the matrices inside the blocks, AdamW for embeddings and vectors; each group knows its peak.

    Learned positions get a tenth of the rate: the late ones see few tokens a step.
    """
    inner, outer, positions = [], [], []
    for name, parameter in model.named_parameters():
        if "wpe" in name or "embed_positions" in name:
            positions.append(parameter)
        else:
            embedding = any(part in name for part in ("embed", "wte"))
            (inner if parameter.dim() == 2 and not embedding else outer).append(parameter)
    if not BFLOAT16:
        torch.optim._muon._zeropower_via_newtonschulz = _orthogonalised
    muon = torch.optim.Muon(
        inner, lr=recipe.matrix_rate, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    groups = [{"params": outer, "lr": recipe.learning_rate}]
    if positions:
        groups.append({"params": positions, "lr": recipe.learning_rate / 10})
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    for group in (*muon.param_groups, *adam.param_groups):
        group["peak"] = group["lr"]
    return muon, adam


@dataclass(frozen=True)
class Training:
    """What training took: loss of every step in nats, tokens seen (padding excluded), processor seconds."""

    losses: tuple[float, ...]
    tokens: int
    seconds: float

    def then(self, other: Training) -> Training:
        """Both, one after the other."""
        return Training(self.losses + other.losses, self.tokens + other.tokens, self.seconds + other.seconds)


def train(
    model: Any, rows: Sequence[list[int]], recipe: Recipe, log: Callable[[str], None] = print
) -> Training:
    """Muon and AdamW on whole documents, for ``recipe.steps`` steps; the model is changed in place."""
    optimizers = _optimizers(model, recipe)
    model.train()
    losses, tokens, start = [], 0, time.process_time()
    stream = batches(rows, recipe.batch_tokens, recipe.seed)
    for step, ids in zip(range(recipe.steps), stream, strict=False):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["peak"] * schedule(step, recipe)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=BFLOAT16):
            loss = next_token_loss(model, ids)
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
        tokens += int((ids != PAD_ID).sum())
        if (step + 1) % 50 == 0:
            recent = sum(losses[-50:]) / 50
            speed = tokens / (time.process_time() - start)
            log(f"{recipe.alias} step {step + 1}/{recipe.steps} loss {recent:.3f} {speed:.0f} tokens/s")
    model.eval()
    return Training(tuple(losses), tokens, time.process_time() - start)


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood: per token and per UTF-8 byte, of texts given their prompts."""

    per_token: float
    per_byte: float
    tokens: int
    bytes: int


def perplexity(model: Any, tokenizer: Any, texts: Sequence[Text], batch: int = 8) -> Perplexity:
    """Perplexity of the texts (with ``</s>``) given their instructions."""
    nats, tokens, size = 0.0, 0, 0
    ordered = sorted(texts, key=lambda text: len(text.text))
    for start in range(0, len(ordered), batch):
        part = ordered[start : start + batch]
        rows = [torch.tensor(ids) for ids in encode(tokenizer, part)]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD_ID)
        labels = ids.clone()
        labels[ids == PAD_ID] = -100
        for row, text in enumerate(part):
            labels[row, : len(tokenizer(text.prompt)["input_ids"])] = -100
        with torch.inference_mode():
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        )
        nats += float(loss)
        tokens += int((labels[:, 1:] != -100).sum())
        size += sum(len(text.text.encode()) for text in part)
    return Perplexity(math.exp(nats / tokens), math.exp(nats / size), tokens, size)


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write config, tokenizer and float16 safetensors weights."""
    import copy

    half = copy.deepcopy(model).half()
    half.config.dtype = torch.float16
    half.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
