"""Make the embedded models from nothing: corpus, tokenizer, weights, cards.

    python tools/models/build.py                    all four, about two and a half hours on two CPU cores
    python tools/models/build.py --only lab-gpt2    one of them
    python tools/models/build.py --cards            measure the models again and rewrite their cards
    python tools/models/build.py --steps 30 --out /tmp/try    a short trial, elsewhere

Every seed and step count is fixed. A model trains on one thread, two models at a time, so that the number
of cores does not change the arithmetic.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import multiprocessing
import os
import random
import shutil
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from tools.models import corpus, training

MODELS = Path(__file__).resolve().parents[2] / "data" / "models"
CACHE = MODELS / "cache"
WORKERS = 2
# Of every model: what differs between them is architecture and size, not practice.
STEPS = 6000
COPY_STEPS, COPY_RATE = (1000, 1500), 0.4  # then, half on topics of any words; share of the peak rates

# The longest training first, so that the two workers end at about the same time.
RECIPES = {
    recipe.alias: recipe
    for recipe in (
        training.Recipe(
            "lab-llama",
            "llama",
            {
                "hidden_size": 256,
                "intermediate_size": 768,
                "num_hidden_layers": 5,
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
                "max_position_embeddings": training.CONTEXT,
            },
            steps=STEPS,
            copy_steps=COPY_STEPS,
            learning_rate=1e-2,
            matrix_rate=6e-3,
            cool_down=0.8,
        ),
        training.Recipe(
            "lab-gpt2",
            "gpt2",
            {
                "n_embd": 104,
                "n_layer": 4,
                "n_head": 4,
                "n_positions": training.CONTEXT,
                "resid_pdrop": 0.0,
                "embd_pdrop": 0.0,
                "attn_pdrop": 0.0,
            },
            steps=STEPS,
            copy_steps=COPY_STEPS,
            learning_rate=1.2e-2,
        ),
        training.Recipe(
            "lab-bloom",
            "bloom",
            {"hidden_size": 112, "n_layer": 4, "n_head": 4, "hidden_dropout": 0.0, "attention_dropout": 0.0},
            steps=STEPS,
            copy_steps=COPY_STEPS,
            learning_rate=1e-2,
            matrix_rate=1.5e-2,
        ),
        training.Recipe(
            "lab-opt",
            "opt",
            {
                "hidden_size": 160,
                "word_embed_proj_dim": 160,
                "ffn_dim": 640,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "max_position_embeddings": training.CONTEXT,
                "dropout": 0.0,
                "attention_dropout": 0.0,
                "layerdrop": 0.0,
            },
            steps=STEPS,
            copy_steps=COPY_STEPS,
            learning_rate=1.2e-2,
            matrix_rate=1.2e-2,
        ),
    )
}
# What the files hold; anything else in a model's folder (card, picture) is description.
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


def write_corpus(path: Path, texts: Iterable[corpus.Text]) -> list[corpus.Text]:
    """The texts as a JSONL file, one a line; returns them."""
    found = list(texts)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as out:
        for text in found:
            out.write(json.dumps(dataclasses.asdict(text), ensure_ascii=False) + "\n")
    return found


def read_corpus(path: Path) -> list[corpus.Text]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [corpus.Text(**json.loads(line)) for line in lines]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def prepare(out: Path) -> None:
    """Corpus and tokenizer into the cache, with their digests on the screen."""
    prompts = corpus.banned_phrases(MODELS.parent / "prompts.jsonl")
    texts = write_corpus(out / "corpus.jsonl", corpus.training_texts(banned=prompts))
    for part in range(len(COPY_STEPS)):
        write_corpus(out / f"copying{part}.jsonl", corpus.copying_texts(part=part, banned=prompts))
    tokenizer = training.train_tokenizer([text.document for text in texts])
    tokenizer.save_pretrained(out / "tokenizer")
    rows = training.encode(tokenizer, texts)
    size = sum(len(text.document.encode()) for text in texts)
    print(f"corpus: {len(texts)} texts, {size / 1e6:.1f} MB, {sum(map(len, rows))} tokens")
    print(f"corpus.jsonl   {digest(out / 'corpus.jsonl')}")
    print(f"tokenizer.json {digest(out / 'tokenizer' / 'tokenizer.json')}", flush=True)


def teach_copying(
    model: Any, tokenizer: Any, recipe: training.Recipe, cache: Path, part: int
) -> training.Training:
    """A later part of a training: copying topics, beside as many texts of the first part."""
    texts, known = read_corpus(cache / f"copying{part}.jsonl"), read_corpus(cache / "corpus.jsonl")
    seed = recipe.seed + part
    texts += random.Random(seed).sample(known, min(len(texts), len(known)))
    later = dataclasses.replace(
        recipe,
        steps=recipe.copy_steps[part],
        learning_rate=COPY_RATE * recipe.learning_rate,
        matrix_rate=COPY_RATE * recipe.matrix_rate,
        cool_down=1.0,
        seed=seed,
    )
    rows = training.encode(tokenizer, texts)
    if part:
        model.half().float()  # it begins as a file of the weights would: it can be made from one
    return training.train(model, rows, later, log=lambda line: print(line, flush=True))


def build_one(recipe: training.Recipe, cache: Path, out: Path) -> str:
    """Train one model on one thread and put it in place; returns its alias."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(cache / "tokenizer")
    model = training.new_model(recipe)
    rows = training.encode(tokenizer, read_corpus(cache / "corpus.jsonl"))
    result = training.train(model, rows, recipe, log=lambda line: print(line, flush=True))
    for part in range(len(recipe.copy_steps)):
        result = result.then(teach_copying(model, tokenizer, recipe, cache, part))
    texts = list(corpus.unseen_passage_texts())
    full = training.perplexity(model, tokenizer, texts).per_token  # before the weights are halved
    record = {**dataclasses.asdict(result), "float32_perplexity": full}
    (cache / f"{recipe.alias}.json").write_text(json.dumps(record))
    training.save(model, tokenizer, cache / recipe.alias)
    (out / recipe.alias).mkdir(parents=True, exist_ok=True)
    for name in MODEL_FILES:
        shutil.copyfile(cache / recipe.alias / name, out / recipe.alias / name)
    sums = {name: digest(out / recipe.alias / name) for name in MODEL_FILES}
    (out / recipe.alias / "sha256.json").write_text(json.dumps(sums, indent=2) + "\n")
    return recipe.alias


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", choices=sorted(RECIPES), help="build this model alone")
    parser.add_argument("--steps", type=int, help="train this many steps instead (a trial)")
    parser.add_argument("--out", type=Path, default=MODELS, help="write the models here")
    parser.add_argument("--cards", action="store_true", help="only measure and describe the models")
    args = parser.parse_args()
    cache = CACHE if args.out == MODELS else args.out / "cache"
    recipes = [recipe for alias, recipe in RECIPES.items() if args.only in (None, alias)]
    if args.steps:
        short = (args.steps,) * len(COPY_STEPS)
        recipes = [dataclasses.replace(r, steps=args.steps, copy_steps=short) for r in recipes]
    os.environ["OMP_NUM_THREADS"] = "1"  # for the workers
    if not args.cards:
        prepare(cache)
        with ProcessPoolExecutor(WORKERS, multiprocessing.get_context("spawn")) as pool:
            futures = [pool.submit(build_one, recipe, cache, args.out) for recipe in recipes]
            for future in futures:
                print(f"{future.result()}: trained", flush=True)
    from tools.models import card

    for recipe in recipes:
        card.write(recipe, cache, args.out)
    card.write_overview(list(RECIPES.values()), cache, args.out)
    for recipe in recipes:
        for name, value in json.loads((args.out / recipe.alias / "sha256.json").read_text()).items():
            print(f"{value}  {recipe.alias}/{name}")


if __name__ == "__main__":
    main()
