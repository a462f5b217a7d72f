"""Model cards of the embedded models: measure the saved files, then describe what was measured."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tools.models import corpus, training

TEMPLATES = Path(__file__).resolve().parent / "templates"
REPEATS = 4
NEW_TOKENS = 256
TEMPERATURE = 0.8
COPY_WORDS = 8  # a run of this many corpus words counts as copied
SAMPLE_PROMPT = "b01"
NAMES = {"gpt2": "GPT-2", "bloom": "BLOOM (ALiBi positions)", "opt": "OPT", "llama": "Llama"}


@dataclass(frozen=True)
class Generation:
    prompt_id: str
    content_type: str
    text: str  # stripped
    ended: bool  # by itself, within NEW_TOKENS
    named: bool  # the topic of the prompt stands in it, whole


def generate(model: Any, tokenizer: Any, prompts: Sequence[dict[str, str]], repeats: int) -> list[Generation]:
    """Sample every prompt ``repeats`` times: temperature 0.8, no filter, at most 256 new tokens, seed 0."""
    import torch

    rows = [prompt for prompt in prompts for _ in range(repeats)]
    torch.manual_seed(0)
    inputs = tokenizer([row["text"] for row in rows], return_tensors="pt", padding=True)
    with torch.inference_mode():
        output = model.generate(
            **inputs, do_sample=True, temperature=TEMPERATURE, top_k=0, top_p=1.0, max_new_tokens=NEW_TOKENS
        )
    made = []
    for row, ids in zip(rows, output[:, inputs["input_ids"].shape[1] :], strict=True):
        text = tokenizer.decode(ids, skip_special_tokens=True).strip()
        named = corpus.contains_any(text, [row["text"].lower().partition(" about ")[2].rstrip(":")])
        made.append(Generation(row["id"], row["content_type"], text, training.EOS_ID in ids.tolist(), named))
    return made


def shared_runs(corpus_texts: Sequence[str], texts: Sequence[str]) -> list[np.ndarray]:
    """For each word of each text, the length in words of the longest run from there that the corpus contains.

    Words are compared exactly, punctuation attached; runs end at the borders of texts. An array per text.
    """
    numbers: dict[str, int] = {}
    known = [
        numbers.setdefault(word, len(numbers) + 2) for text in corpus_texts for word in [*text.split(), ""]
    ]
    asked = [numbers.get(word, 0) if word else 1 for text in texts for word in [*text.split(), ""]]
    border = numbers.get("", 0)
    left, right = np.array(known, dtype=np.uint64), np.array(asked, dtype=np.uint64)
    runs = np.zeros(len(right), dtype=np.int64)
    # Starts that still match, on both sides, with a hash of the run from each: they dwindle quickly.
    starts = [np.flatnonzero(left != border), np.arange(len(right))]
    hashes = [np.zeros(len(start), dtype=np.uint64) for start in starts]
    for n in range(len(right)):
        for side, words in enumerate((left, right)):
            inside = starts[side] + n < len(words)
            starts[side], hashes[side] = starts[side][inside], hashes[side][inside]
            hashes[side] = _mixed(hashes[side], words[starts[side] + n])
        keep = [np.isin(hashes[0], hashes[1]), np.isin(hashes[1], hashes[0])]
        starts = [start[mask] for start, mask in zip(starts, keep, strict=True)]
        hashes = [value[mask] for value, mask in zip(hashes, keep, strict=True)]
        if not len(starts[1]):
            break
        runs[starts[1]] = n + 1
    ends = np.cumsum([len(text.split()) + 1 for text in texts])
    return [part[:-1] for part in np.split(runs, ends[:-1])]


def _mixed(hashes: np.ndarray, words: np.ndarray) -> np.ndarray:
    """The next hash of each run, one word longer (64 bits, multiply and shift)."""
    mixed = (hashes ^ (words * np.uint64(0x9E3779B97F4A7C15))) * np.uint64(0xD6E8FEB86659FD93)
    return mixed ^ (mixed >> np.uint64(32))


def copied_words(runs: np.ndarray, n: int = COPY_WORDS) -> int:
    """Words that stand in a shared run of at least n words."""
    covered = np.zeros(len(runs), dtype=bool)
    for start in np.flatnonzero(runs >= n):
        covered[start : start + runs[start]] = True
    return int(covered.sum())


def measure(
    model: Any, tokenizer: Any, prompts: Sequence[dict[str, str]], texts: Sequence[str]
) -> dict[str, Any]:
    """The figures of a card, by name."""
    held_out = training.perplexity(model, tokenizer, list(corpus.held_out_texts()))
    unseen = training.perplexity(model, tokenizer, list(corpus.unseen_passage_texts()))
    benchmark = generate(model, tokenizer, [p for p in prompts if p["id"].startswith("b")], REPEATS)
    further = generate(model, tokenizer, [p for p in prompts if not p["id"].startswith("b")], REPEATS)
    runs = shared_runs(texts, [sample.text for sample in benchmark])
    longest = [int(run.max(initial=0)) for run in runs]
    words = sum(len(sample.text.split()) for sample in benchmark)
    by_type = {
        name: [sample for sample in further if sample.content_type == name] for name in corpus.CONTENT_TYPES
    }
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "perplexity": held_out.per_token,
        "perplexity_per_byte": held_out.per_byte,
        "perplexity_tokens": held_out.tokens,
        "unseen": unseen.per_token,
        "unseen_per_byte": unseen.per_byte,
        "ended": statistics.mean(sample.ended for sample in benchmark),
        "named": statistics.mean(sample.named for sample in benchmark),
        "named_further": statistics.mean(sample.named for sample in further),
        "benchmark_words": statistics.median(len(sample.text.split()) for sample in benchmark),
        "words": {
            name: statistics.median(len(s.text.split()) for s in samples) for name, samples in by_type.items()
        },
        "ended_by_type": {
            name: statistics.mean(s.ended for s in samples) for name, samples in by_type.items()
        },
        "longest_span": max(longest),
        "median_span": statistics.median(longest),
        "copied": sum(copied_words(run) for run in runs) / words,
        "sample": next(sample.text for sample in benchmark if sample.prompt_id == SAMPLE_PROMPT),
        "sample_prompt": next(p["text"] for p in prompts if p["id"] == SAMPLE_PROMPT),
    }


def write(recipe: training.Recipe, cache: Path, out: Path) -> None:
    """Measure the saved model; write README.md beside it, the figures into the cache."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folder = out / recipe.alias
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    lines = (corpus.FOLDER.parent.parent / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line) for line in lines if line.strip()]
    texts, *parts = (
        [corpus.Text(**json.loads(line)) for line in (cache / f"{name}.jsonl").open(encoding="utf-8")]
        for name in ("corpus", *(f"copying{part}" for part in range(len(recipe.copy_steps))))
    )
    copying = list(itertools.chain(*parts))
    record = json.loads((cache / f"{recipe.alias}.json").read_text())
    figures = measure(model, tokenizer, prompts, [text.text for text in (*texts, *copying)])
    figures |= {
        "alias": recipe.alias,
        "name": NAMES[recipe.family],
        "tokens": record["tokens"],
        "steps": recipe.steps + sum(recipe.copy_steps),
        "copy_steps": sum(recipe.copy_steps),
        "corpus_texts": len(texts),
        "corpus_topics": len({text.topic for text in texts}),
        "copy_topics": len({text.topic for text in copying}),
        "corpus_mb": sum(len(text.document.encode()) for text in texts) / 1e6,
        "minutes": record["seconds"] / 60,
        "full": record["float32_perplexity"],
        "size_mb": (folder / "model.safetensors").stat().st_size / 1e6,
    }
    (cache / f"{recipe.alias}-figures.json").write_text(json.dumps(figures, indent=2))
    (folder / "README.md").write_text(render(recipe, figures), encoding="utf-8")


def render(recipe: training.Recipe, figures: dict[str, Any]) -> str:
    """The card's text from its figures."""
    types = "\n".join(
        f"| {name.replace('_', ' ')} | {figures['words'][name]:.0f} | {figures['ended_by_type'][name]:.0%} |"
        for name in corpus.CONTENT_TYPES
    )
    shape = ", ".join(f"`{key}` {value}" for key, value in recipe.config.items() if value)
    sample = "\n".join(f"> {line}".rstrip() for line in figures["sample"].splitlines())
    return (
        (TEMPLATES / "card.md")
        .read_text(encoding="utf-8")
        .format(
            **(figures | {"sample": sample}),
            types=types,
            shape=shape,
            context=training.CONTEXT,
            vocabulary=training.VOCABULARY,
            passages=sum(len(corpus.training_passages(name)) for name in corpus.CONTENT_TYPES),
            held_out=sum(len(corpus.held_out_passages(name)) for name in corpus.CONTENT_TYPES),
            repeats=REPEATS,
            temperature=TEMPERATURE,
            new_tokens=NEW_TOKENS,
            copy_words=COPY_WORDS,
        )
    )


def write_overview(recipes: Sequence[training.Recipe], cache: Path, out: Path) -> None:
    """README.md of all models, from the figures that ``write`` left in the cache."""
    found = [cache / f"{recipe.alias}-figures.json" for recipe in recipes]
    if not all(path.is_file() for path in found):
        return  # only a part was built here: the table would be half empty
    cards = sorted((json.loads(path.read_text()) for path in found), key=lambda card: card["parameters"])
    rows = "\n".join(
        f"| [{card['alias']}]({card['alias']}/README.md) | {card['name']} | {card['parameters']:,} "
        f"| {card['size_mb']:.1f} MB | {card['steps']:,} | {card['perplexity']:.2f} | {card['unseen']:.0f} "
        f"| {card['ended']:.0%} | {card['named']:.0%} / {card['named_further']:.0%} | {card['copied']:.0%} |"
        for card in cards
    )
    counts = {name: len(corpus.load_passages(name)) for name in corpus.CONTENT_TYPES}
    text = (
        (TEMPLATES / "overview.md")
        .read_text(encoding="utf-8")
        .format(
            rows=rows,
            cpu_minutes=sum(card["minutes"] for card in cards),
            passages=sum(counts.values()),
            counts=", ".join(f"{count} {name.replace('_', ' ')}s" for name, count in counts.items()),
            texts=cards[0]["corpus_texts"],
            size_mb=cards[0]["corpus_mb"],
            all_topics=cards[0]["corpus_topics"],
            copy_topics=cards[0]["copy_topics"],
            words=", ".join(corpus.HELD_OUT_WORDS),
        )
    )
    (out / "README.md").write_text(text, encoding="utf-8")
