"""Make data/coherence.npz: the counts of English prose and the network behind ``scoring.coherence``.

    python tools/fit_coherence.py --work FOLDER

Fetches its prose as Debian and Python packages (apt-get download, pip download) into the folder: the manuals
of Python, PostgreSQL, Django and Rust, the Debian developer's reference and FAQ, the Jargon File, An
Anarchist FAQ; all under free licences, of all only counts are kept. To it come the passages of the training
corpora. Words that stand in the same company become classes (singular vectors of positive PMI, k-means).

The network learns from windows of prose that were damaged with known joints: words exchanged (for any, or
for one of their class), shuffled, left out, replaced by unknown ones; pieces in another order,
with their signs or around signs that stay; and walks that jump from passage to passage wherever one to three
words are the same, as small models do. Half of the damaged windows are measured with the counts of the other
half of the passages: that a run is new is no damage. A quarter of an hour of a processor; with --network the
words, classes and counts stay as they are.
"""

from __future__ import annotations

import argparse
import gzip
import html
import random
import re
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import sparse
from scipy.sparse.linalg import svds
from sklearn.cluster import MiniBatchKMeans
from torch import nn

from nbhelpers import store
from nbhelpers.scoring import coherence
from nbhelpers.scoring.coherence import BREAK, SPECIAL, UNKNOWN, English, Ids
from tools.models import corpus

DEBIAN = {  # package -> where its prose is
    "python3.11-doc": "usr/share/doc/python3.11/html/**/*.html",
    "postgresql-doc-15": "usr/share/doc/postgresql-doc-15/html/*.html",
    "rust-doc": "usr/share/doc/rust-doc/html/[ber]*/**/*.html",
    "developers-reference": "usr/share/developers-reference/*.html",
    "debian-faq": "usr/share/doc/debian/FAQ/*.html",
    "anarchism": "usr/share/doc/anarchism/html/*.html",
    "jargon-text": "usr/share/doc/jargon-text/*.gz",
}
PYTHON = ("Django", "symspellpy")  # its manual; its list of 82,000 words (MIT)
FREQUENT, CLASSES, SINGLE = 14_000, 150, 250  # words with a token; classes of them; words that are their own
LEAST = {
    ("words", 2): 2,
    ("words", 3): 3,
    ("words", 4): 4,
    ("classes", 4): 3,
    ("classes", 5): 4,
}  # counted so often
WINDOW, HIDDEN, BESIDE = 64, 32, 8  # tokens; units of the network; numbers that stand for a class
MANY, ROUNDS, BATCH = (2080, 3200), 4, 32  # windows of prose and of passages; training
DAMAGE = {
    "whole": 1.0,
    "exchanged": 0.25,
    "shuffled": 0.25,
    "unknown": 0.25,
    "left out": 0.25,
    "in class": 0.25,
}
DAMAGE |= {"pieces": 0.5, "pieces around signs": 0.5}  # share of the windows, each with both halves' counts
CORPORA = (corpus.FOLDER, store.data_dir() / "readers" / "corpus")


@dataclass(frozen=True)
class Windows:
    """Windows of tokens, and which of their joints are broken."""

    joints: np.ndarray  # [windows, WINDOW - 1, features]
    tokens: Ids  # [windows, WINDOW]
    broken: Ids  # [windows, WINDOW - 1]
    kinds: list[str]


def fetch(work: Path) -> None:
    """The packages, unpacked below the folder; nothing where they are already."""
    for package in DEBIAN:
        if not list(work.glob(f"{package}_*.deb")):
            subprocess.run(["apt-get", "download", "-q", package], cwd=work, check=True)
            subprocess.run(
                ["dpkg", "-x", next(work.glob(f"{package}_*.deb")).name, "deb"], cwd=work, check=True
            )
    for package in PYTHON:
        if not (work / package).exists():
            options = ["--no-deps", "-q", *(["--no-binary", ":all:"] if package == "Django" else [])]
            command = [sys.executable, "-m", "pip", "download", *options, "-d", package, package]
            subprocess.run(command, cwd=work, check=True)
    for archive in work.glob("Django/*.tar.gz"):
        with tarfile.open(archive) as file:
            file.extractall(work / "Django", filter="data")


def paragraphs(work: Path) -> Iterator[str]:
    """Paragraphs of prose: at least 8 words, mostly letters, with an end."""
    for pattern in DEBIAN.values():
        for path in sorted((work / "deb").glob(pattern)):
            raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            text = raw.decode(errors="ignore")
            if path.suffix == ".html":
                text = re.sub(r"(?s)<(pre|script|style|nav|table)\b.*?</\1>", " ", text)
                blocks = re.findall(r"(?s)<p\b[^>]*>(.*?)</p>", text)
                yield from (html.unescape(re.sub(r"<[^>]+>", "", block)) for block in blocks)
            else:
                yield from re.split(r"\n\s*\n", text)
    for path in sorted(work.glob("Django/*/docs/**/*.txt")):
        text = re.sub(r":[\w:]+:`[~!]?([^`<]+?)(?:\s*<[^>]*>)?`", r"\1", path.read_text(errors="ignore"))
        yield from re.split(r"\n\s*\n", re.sub(r"``?([^`]+?)``?_*", r"\1", text))


def is_prose(block: str) -> bool:
    letters = sum(character.isalpha() or character == " " for character in block)
    ended = re.search(r"[.!?:][\"')]*$", block)
    return len(block.split()) >= 8 and letters > 0.88 * len(block) and ended is not None


def passages(expansions: int = 4) -> list[list[str]]:
    """The expansions of each passage of the training corpora."""
    chosen, found = random.Random(1), list[list[str]]()
    for folder in CORPORA:
        slots = corpus.load_slots(folder)
        for kind in corpus.CONTENT_TYPES:
            for source in map(corpus.parse, corpus.load_passages(kind, folder)):
                draws = (corpus.draw_topic(slots, chosen, lambda topic: True) for _ in range(expansions))
                found.append([corpus.expand(source, slots, chosen, topic=topic) for topic in draws])
    return found


def vocabulary(texts: list[str], known: frozenset[str]) -> English:
    """Tokens of the frequent words and signs, everything else still empty."""
    signs = coherence._SIGNS
    found = (
        signs.get(raw) or raw.lower().replace("’", "'") for t in texts for raw in coherence._TOKEN.findall(t)
    )
    counts = Counter(word for word in found if not word[0].isdigit() and word[0] != "\n")
    often = (w for w, n in counts.most_common() if n >= 25 or (n >= 8 and (w in known or not w[0].isalpha())))
    words = [*SPECIAL, *list(often)[:FREQUENT]]
    rarer = known | {word for word, count in counts.items() if count >= 4 and word[0].isalpha()}
    empty = np.zeros(0)
    return English(dict(zip(words, range(len(words)), strict=True)), rarer, empty, empty, empty, ())  # type: ignore[arg-type]


def classes(streams: list[Ids], size: int, single: list[int]) -> Ids:
    """[tokens]: the most frequent words and the signs alone, the others by the company they keep."""
    stream = np.concatenate(streams)
    pairs, count = np.unique(stream[:-1] * size + stream[1:], return_counts=True)
    before, after, often = pairs // size, pairs % size, np.bincount(stream, minlength=size)
    column = np.full(size, -1)
    column[np.argsort(-often)[:1500]] = np.arange(1500)
    parts = []
    for word, near in ((before, column[after]), (after, column[before])):
        table = sparse.csr_matrix(
            (count[near >= 0], (word[near >= 0], near[near >= 0])), shape=(size, 1500)
        ).tocoo()
        rows, smooth = np.bincount(word, count, size) + 1e-9, np.bincount(table.col, table.data, 1500) ** 0.75
        pmi = np.log(table.data / rows[table.row] / (smooth / smooth.sum())[table.col])
        parts.append(sparse.csr_matrix((np.maximum(pmi, 0), (table.row, table.col)), shape=(size, 1500)))
    vectors, strength, _ = svds(sparse.hstack(parts).tocsr(), k=50, random_state=0)
    vectors *= np.sqrt(strength)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True) + 1e-9
    alone = np.isin(np.arange(size), [*single, *np.argsort(-often)[:SINGLE]])
    found = np.zeros(size, np.int64)
    means = MiniBatchKMeans(CLASSES, random_state=0, n_init=3, batch_size=4096)
    found[~alone] = means.fit_predict(vectors[~alone], sample_weight=np.sqrt(often[~alone] + 1.0))
    found[alone] = CLASSES + np.arange(alone.sum())
    return found


def counted(prose: list[Ids], own: list[Ids], of: Ids) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the runs, sorted, and their levels. Of prose what is frequent, of passages all."""
    found: dict[str, list[np.ndarray]] = {"runs": [], "counts": []}
    for kind, orders in coherence.RUNS:
        for order in orders:
            for rows, least in ((prose, LEAST.get((kind, order), 2)), (own, 1)):
                row = np.concatenate(rows)
                runs = coherence.hashes(row if kind == "words" else of[row], order, kind)
                runs, counts = np.unique(runs, return_counts=True)
                found["runs"].append(runs[counts >= least])
                found["counts"].append(counts[counts >= least])
    runs, where = np.unique(np.concatenate(found["runs"]), return_inverse=True)
    counts = np.bincount(where, np.concatenate(found["counts"]))
    familiar = np.isin(runs, coherence.hashes(np.concatenate(own), 2, "words"))
    return runs, ((1 + np.floor(np.log2(counts))).clip(max=15) + coherence.OWN * familiar).astype(np.uint8)


def damaged(stream: Ids, how: str, many: int, rng: np.random.Generator, base: English) -> tuple[Ids, Ids]:
    """[many, WINDOW] tokens, and 1 at each that does not follow the one that it followed in the stream."""
    starts, size = rng.integers(0, len(stream) - 2 * WINDOW, (many, 1)), (many, WINDOW)
    order = np.tile(np.arange(WINDOW), (many, 1))
    if how == "shuffled":
        order = np.argsort(order + rng.choice([1.5, 4, 12], (many, 1)) * rng.random(size), axis=1)
    if how == "left out":
        order = np.cumsum(1 + (rng.random(size) < 0.1), axis=1) - 1
    if how in ("pieces", "pieces around signs"):
        word = np.array([word[0].isalpha() or word in SPECIAL for word in base.words])
        word[base.words[BREAK]] = False
        for row, start in zip(order, starts, strict=True):
            free = word[stream[start + row]] if how == "pieces around signs" else row >= 0
            row[free] = in_pieces(row[free], rng)
    tokens, broken = stream[starts + order], np.zeros(size, np.int64)
    broken[:, 1:] = np.diff(order, axis=1) != 1
    if how in ("exchanged", "in class", "unknown"):
        shares = {"exchanged": [0.05, 0.15, 0.3, 0.5], "in class": [0.1, 0.25, 0.5], "unknown": [0.03, 0.1]}
        other = {
            "exchanged": stream[rng.integers(0, len(stream), size)],
            "in class": alike(stream, tokens, base.classes, rng),
            "unknown": np.full(size, base.words[UNKNOWN]),
        }[how]
        hit = (rng.random(size) < rng.choice(shares[how], (many, 1))) & (tokens >= len(SPECIAL))
        hit &= other != tokens
        tokens, broken = np.where(hit, other, tokens), hit.astype(np.int64)
        broken[:, 1:] |= broken[:, :-1].copy()
    return tokens, broken


def in_pieces(row: Ids, rng: np.random.Generator) -> Ids:
    """Some or all of its pieces of one to eight in another order; often within each run without a gap."""
    gaps = np.flatnonzero(np.diff(row) > 1) + 1 if rng.random() < 0.4 else np.array([], np.int64)
    found, size, share = list[Ids](), rng.integers(1, 9), rng.choice([0.3, 1.0])
    for part in np.split(row, gaps):
        cut = np.split(part, np.arange(size, len(part), size))
        moving = np.flatnonzero(rng.random(len(cut)) < share)
        for place, piece in zip(moving, [cut[other] for other in rng.permutation(moving)], strict=True):
            cut[place] = piece
        found += cut
    return np.concatenate(found)


def alike(stream: Ids, tokens: Ids, of: Ids, rng: np.random.Generator) -> Ids:
    """For each token one of the stream that is of its class."""
    order = np.argsort(of[stream], kind="stable")
    first, last = (np.searchsorted(of[stream][order], of[tokens], side=side) for side in ("left", "right"))
    pick = first + (rng.random(tokens.shape) * (last - first)).astype(np.int64)
    return stream[order[pick]]


def walks(stream: Ids, order: int, jumps: float, many: int, rng: np.random.Generator) -> tuple[Ids, Ids]:
    """As damaged: walks through the stream that jump to another place with the same last ``order`` words."""
    at = np.zeros((many, WINDOW), np.int64)
    at[:, 0] = rng.integers(0, len(stream) - 2 * WINDOW, many)
    places = {n: coherence.hashes(stream, n, "words") for n in range(1, order + 1)}
    sorting = {n: np.argsort(found, kind="stable") for n, found in places.items()}
    for step in range(1, WINDOW):
        following = np.minimum(at[:, step - 1] + 1, len(stream) - 1)
        other = rng.integers(0, len(stream), many)
        if n := min(order, step):
            said = np.stack([stream[at[:, step - back]] for back in range(n, 0, -1)], 1)
            keys = coherence.hashes(said.ravel(), n, "words")[::n]
            found = places[n][sorting[n]]
            first, last = (np.searchsorted(found, keys, side=side) for side in ("left", "right"))
            pick = first + (rng.random(many) * np.maximum(1, last - first)).astype(np.int64)
            other = np.minimum(sorting[n][pick.clip(max=len(found) - 1)] + n, len(stream) - 1)
            other = np.where(last > first, other, following)
        at[:, step] = np.where(rng.random(many) < jumps, other, following)
    broken = np.zeros((many, WINDOW), np.int64)
    broken[:, 1:] = np.diff(at, axis=1) != 1
    return stream[at], broken


def windows(base: English, halves: list[list[list[Ids]]], rng: np.random.Generator) -> Windows:
    """Sound and damaged windows of both halves of prose and of passages, measured with one half's counts."""
    tables = [
        English(base.words, base.known, base.classes, *counted(*half, base.classes), ()) for half in halves
    ]
    made: list[tuple[str, int, tuple[Ids, Ids]]] = []
    for number, half in enumerate(halves):
        for stream, many in zip(map(np.concatenate, half), MANY, strict=True):
            for how, share in DAMAGE.items():
                for new in (0, 1):
                    rows = damaged(stream, how, int(many * share), rng, base)
                    made.append((f"{how}, new" if new else how, number ^ new, rows))
            for order in range(4):
                for jumps in (0.05, 0.15, 0.4):
                    made.append((f"walk of {order}", number, walks(stream, order, jumps, many // 8, rng)))
    joints = [tables[half].joints(row) for _, half, (rows, _) in made for row in rows]
    tokens = np.concatenate([rows for *_, (rows, _) in made])
    broken = np.concatenate([broken[:, 1:] for *_, (_, broken) in made])
    return Windows(np.stack(joints), tokens, broken, [kind for kind, _, (rows, _) in made for _ in rows])


class Network(nn.Module):
    """What ``English.broken`` computes."""

    def __init__(self, features: int, of: Ids) -> None:
        super().__init__()
        self.of = torch.tensor(of)
        self.classes = nn.Embedding(int(of.max()) + 1, BESIDE)
        nn.init.normal_(self.classes.weight, std=0.3)
        self.first, self.last = nn.Linear(features + 2 * BESIDE, HIDDEN), nn.Linear(HIDDEN, 1)
        self.wider = nn.ModuleList(
            nn.Conv1d(HIDDEN, HIDDEN, 3, padding=step, dilation=step) for step in coherence.DILATIONS
        )

    def forward(self, joints: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        beside = self.classes(self.of[tokens])
        seen = torch.relu(self.first(torch.cat([joints, beside[:, :-1], beside[:, 1:]], -1))).transpose(1, 2)
        for layer in self.wider:
            seen = seen + torch.relu(layer(seen))
        return self.last(seen.transpose(1, 2))[..., 0]

    def layers(self) -> list[np.ndarray]:
        wider = [layer.weight.permute(2, 1, 0).reshape(3 * HIDDEN, HIDDEN) for layer in self.wider]
        biases = torch.stack([layer.bias for layer in self.wider])
        found = [self.classes.weight, self.first.weight.T, self.first.bias, torch.stack(wider), biases]
        return [part.detach().numpy() for part in (*found, self.last.weight[0], self.last.bias)]


def train(base: English, halves: list[list[list[Ids]]], rng: np.random.Generator) -> list[np.ndarray]:
    """The network's layers; says how well it tells the damage of windows that it did not learn from."""
    made = windows(base, halves, rng)
    mean, scale = made.joints.mean((0, 1)), made.joints.std((0, 1)) + 1e-3
    data = torch.tensor((made.joints - mean) / scale), torch.tensor(made.tokens), torch.tensor(made.broken)
    torch.manual_seed(0)
    order = torch.randperm(len(made.tokens))
    held, learned = order[: len(order) // 20], order[len(order) // 20 :]
    net = Network(len(mean), base.classes)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.01)
    steps = ROUNDS * (len(learned) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        rows = learned[torch.randint(len(learned), (BATCH,))]
        joints, tokens, broken = (part[rows] for part in data)
        loss = nn.functional.binary_cross_entropy_with_logits(net(joints, tokens), broken.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        odds = torch.sigmoid(net(data[0][held], data[1][held])).numpy()
    broken, kind = made.broken[held], np.array(made.kinds)[held]
    for name in sorted(set(kind)):
        print(f"{name:24s} broken {broken[kind == name].mean():.2f}, read {odds[kind == name].mean():.2f}")
    return [mean, scale, *net.layers()]


def learned_words(prose: list[str], own: list[list[str]], known: frozenset[str]) -> English:
    """Words and their classes, without runs."""
    base = vocabulary([*prose, *(text for texts in own for text in texts)], known)
    streams = [base.tokens(text)[:-1] for text in (*prose, *(text for texts in own for text in texts))]
    single = [*range(len(SPECIAL)), *(i for word, i in base.words.items() if not word[0].isalpha())]
    of = classes(streams, len(base.words), single)
    return English(base.words, base.known - {*base.words}, of, base.runs, base.levels, ())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for packages, some 300 MB")
    parser.add_argument("--network", action="store_true", help="train the network alone")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    fetch(given.work)
    blocks = dict.fromkeys(re.sub(r"\s+", " ", block).strip() for block in paragraphs(given.work))
    prose, own = list(filter(is_prose, blocks)), passages()
    print(f"{len(prose):,} paragraphs, {sum(map(len, map(str.split, prose))):,} words; {len(own)} passages")
    base = coherence.english() if given.network else learned_words(prose, own, listed_words(given.work))
    prose_ids = [base.tokens(block)[:-1] for block in prose]
    own_ids = [np.concatenate([base.tokens(text)[:-1] for text in texts]) for texts in own]
    halves = [
        [[row for number, row in enumerate(ids) if number // 8 % 2 == half] for ids in (prose_ids, own_ids)]
        for half in (0, 1)
    ]
    layers = train(base, halves, np.random.default_rng(0))
    runs, levels = (base.runs, base.levels) if given.network else counted(prose_ids, own_ids, base.classes)
    gaps = np.diff(runs.astype(np.int64), prepend=0)
    assert gaps.max() < 2**16, "too few runs for gaps of 16 bits"
    text = {
        name: np.frombuffer("\n".join(words).encode(), np.uint8)
        for name, words in (("words", base.words), ("known", sorted(base.known)))
    }
    path = store.data_dir() / "coherence.npz"
    np.savez_compressed(
        path,
        **text,
        classes=base.classes.astype(np.uint16),
        gaps=gaps.astype(np.uint16),
        levels=levels,
        **{f"layer{number}": layer.astype(np.float32) for number, layer in enumerate(layers)},
    )
    print(f"{len(base.words):,} words, {len(runs):,} runs, {path.stat().st_size / 2**20:.1f} MiB")


def listed_words(work: Path) -> frozenset[str]:
    """The list of words of symspellpy."""
    wheel = next((work / "symspellpy").glob("*.whl"))
    command = ["unzip", "-p", wheel, "*/frequency_dictionary_en_82_765.txt"]
    listed = subprocess.run(command, capture_output=True, check=True)
    return frozenset(line.split()[0] for line in listed.stdout.decode("utf-8-sig").splitlines())


if __name__ == "__main__":
    main()
