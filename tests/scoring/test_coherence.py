"""The joints between words against brute force, and against text that was broken on purpose."""

from __future__ import annotations

import random
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbhelpers import store
from nbhelpers.records import CONTENT_TYPES, LabError
from nbhelpers.scoring import coherence

STRONG = [row["text"] for kind in CONTENT_TYPES for row in store.read_table("planted.toml", dict)[kind]]


def names(text: str) -> list[str]:
    model = coherence.english()
    every = list(model.words)
    return [every[token] for token in model.tokens(text)]


def odds(tokens: coherence.Ids) -> coherence.Floats:
    model = coherence.english()
    return model.broken(tokens, model.joints(tokens))


def test_tokens_hand_worked() -> None:
    assert names("The team’s 12% fell.\n\nWhy?") == [
        *("<p>", "the", "<rare:s>", "<num>", "%", "fell", ".", "<p>", "why", "?", "<p>")
    ]
    assert names("a qwzxv") == ["<p>", "a", "<bad>", "<p>", "<p>"]
    assert names("We met Qwzxv and QWZXV.")[3] == "<name>" == names("We met Qwzxv and QWZXV.")[5]
    assert names("") == ["<p>"] * 5


@given(st.lists(st.integers(0, 3), max_size=12), st.integers(1, 5), st.sampled_from(["words", "classes"]))
def test_a_hash_stands_for_a_run_of_its_order_and_kind(row: list[int], order: int, kind: str) -> None:
    found = coherence.hashes(np.array(row, dtype=np.int64), order, kind).tolist()
    runs = [tuple(row[i : i + order]) for i in range(len(row) - order + 1)]
    assert len(found) == len(runs)
    assert all(
        (a == b) == (x == y)
        for a, x in zip(found, runs, strict=True)
        for b, y in zip(found, runs, strict=True)
    )
    other = coherence.hashes(
        np.array(row, dtype=np.int64), order, "words" if kind == "classes" else "classes"
    )
    assert not set(found) & set(other.tolist())


def toy(said: list[list[int]]) -> coherence.English:
    """Counts of these sentences, words and classes alike; no network."""
    words = {word: i for i, word in enumerate((*coherence.SPECIAL, *".?!:", *"abc"))}
    counts: Counter[int] = Counter()
    for row in said:
        for kind, orders in coherence.RUNS:
            for order in orders:
                counts.update(coherence.hashes(np.array(row), order, kind).tolist())
    runs = np.array(sorted(counts), dtype=np.uint32)
    levels = np.array([1 + int(np.log2(counts[int(run)])) for run in runs], dtype=np.uint8)
    return coherence.English(words, frozenset(), np.arange(len(words)), runs, levels, ())


def test_joints_against_brute_force() -> None:
    generator = random.Random(0)
    said = [[generator.choice([24, 25, 26]) for _ in range(9)] for _ in range(4)]
    model, row = toy(said), [0, 24, 25, 24, 26, 26, 0]
    found = model.joints(np.array(row))

    def level(run: list[int]) -> int:
        times = sum(other[i : i + len(run)] == run for other in said for i in range(9))
        return 1 + int(np.log2(times)) if times else 0

    for joint in range(len(row) - 1):
        column = 2
        assert [found[joint, 0], found[joint, 1]] == [level([row[joint]]), level([row[joint + 1]])]
        for orders in ((2, 3, 4), (2, 3, 4, 5)):
            for order in orders:
                starts = list(range(joint + 2 - order, joint + 1))
                inside = [level(row[s : s + order]) if 0 <= s <= len(row) - order else 0 for s in starts]
                assert found[joint, column] == max(inside), (joint, order)
                if order > 2:
                    assert found[joint, column + 1] == pytest.approx(sum(map(bool, inside)) / len(inside))
                column += 1 + (order > 2)


@pytest.mark.parametrize("text", STRONG, ids=lambda text: text.split("\n")[1][:30])
def test_broken_joints_are_found_in_texts_that_nothing_was_counted_from(text: str) -> None:
    model, generator = coherence.english(), random.Random(0)
    tokens = model.tokens(text)
    sound = odds(tokens)
    order = [0, *generator.sample(range(1, len(tokens) - 1), len(tokens) - 2), len(tokens) - 1]
    shuffled = odds(tokens[order])
    rate = np.mean(shuffled[:, None] > sound[None, :])  # a broken joint above a sound one: the area under ROC
    assert rate > 0.8 and np.mean(sound > 0) < 0.25 < np.mean(shuffled > 0)


def test_one_exchanged_word_stands_out() -> None:
    model = coherence.english()
    before = odds(model.tokens("We switched it off and waited for complaints."))
    after = odds(model.tokens("We switched it off and the for complaints."))
    assert int(np.argmax(after - before)) in (5, 6) and (after - before).max() > 1.5


def test_240_texts_in_under_two_seconds_of_one_core() -> None:
    texts = [" ".join(random.Random(i).sample(STRONG, 2))[:1100] for i in range(240)]
    coherence.english.cache_clear()
    start = time.process_time()
    for text in texts:
        coherence.features(text)
    assert time.process_time() - start < 2.0


def test_a_missing_or_broken_file_is_named(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(store, "data_dir", lambda: tmp_path)
    coherence.english.cache_clear()
    for content in (None, b"no archive"):
        if content:
            (tmp_path / "coherence.npz").write_bytes(content)
        with pytest.raises(LabError, match=r"coherence\.npz in the data folder"):
            coherence.english()
    coherence.english.cache_clear()
