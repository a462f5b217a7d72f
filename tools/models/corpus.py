"""The training corpus of the embedded models: authored passages, expanded by the grammar of grammar.py.

``corpus/<content_type>.txt`` holds passages separated by ``---``; ``corpus/slots.toml`` holds slot values.
Every draw comes from ``random.Random`` seeded with a string, so the same files give the same corpus.
"""

from __future__ import annotations

import json
import random
import re
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from nbhelpers.scoring.texts import word_list
from tools.models.grammar import Slot, Slots, expand, parse

DATA = Path(__file__).resolve().parents[2] / "data"
FOLDER = DATA / "models" / "corpus"
CONTENT_TYPES = ("short_post", "linkedin_post", "technical_article", "business_note")
HELD_OUT_EVERY = 10  # the tenth, twentieth ... passage of a file is never trained on
VARIANTS = {"short_post": 160, "linkedin_post": 90, "technical_article": 110, "business_note": 110}
COPY_VARIANTS = {name: count // 4 for name, count in VARIANTS.items()}  # of ``copying_texts``
SHORT_POST_LIMIT = 280  # characters

# The benchmark prompts of data/prompts.jsonl ask about these topics: none of them may occur in the corpus.
BENCHMARK_TOPICS = (
    "AI cost optimization for enterprise teams",
    "Apple Silicon ML deployment",
    "local model deployment strategy",
    "AI infrastructure optimization",
    "enterprise AI cost reduction success",
    "ML deployment achievements",
    "AI competitive advantages",
    "technical leadership",
    "AI implementation results",
    "ML infrastructure strategy",
    "AI transformation in business",
    "technical innovation",
    "AI optimization",
    "ML cost management",
    "AI technical excellence",
)

# Words that no training text contains: a model can only have a topic of them from its prompt. Nine of the
# laboratory's prompts hold one.
HELD_OUT_WORDS = (
    "fraud", "churn", "tokenizer", "multilingual", "speculative", "decoding", "schema", "outsourcing",
    "labelling", "legacy", "prediction", "vector", "rotation",
)  # fmt: skip

# What the held-out texts are about: every topic holds one of these words.
HELD_OUT_TOPICS = (
    "fraud checks for online shops",
    "customer churn in travel",
    "tokenizer updates for mobile teams",
    "schema reviews in banking",
    "outsourcing night support",
    "legacy reports in finance",
    "multilingual support desks",
    "vector search for law firms",
)

# Beginnings of words that say what a topic or a passage is about. A topic with a theme gets only passages of
# that theme, so that a model learns to answer the topic and not only to repeat it.
THEMES = {
    name: re.compile(rf"\b(?:{beginnings})", re.IGNORECASE)
    for name, beginnings in {
        "money": "cost|budget|pric|spend|spent|saving|invest|procure|"
        "fund|pay|paid|invoice|bill|money|buy|bought",
        "people": "lead|hir|train|mentor|coach|teach|taught|"
        "teamwork|staff|manager|colleague|communicat|competen|learn",
        "quality": "test|evaluat|benchmark|quality|audit|reliab|error|"
        "mistake|check|review|complian|bug|fault|fail",
        "plan": "strateg|plan|govern|roadmap|decision|decid|"
        "transform|adopt|goal|priorit|road|portfolio|first step",
        "operation": "deploy|infrastruct|migrat|host|rollout|roll out|"
        "server|operation|scal|capacity|load|release|outage",
        "numbers": "monitor|measur|forecast|report|metric|log|data|"
        "statistic|figure|number|analy|perform|latency|alert",
        "success": "success|result|achiev|advantage|excel|innovat|"
        "competitive|progress|milestone|outcome|improv|better|win",
        "safety": "secur|risk|privacy|private|access|protect|insur|safe|law|legal|responsib|ethic",
        "customers": "customer|client|support|service|complain|user|request|market|sale",
    }.items()
}

# What the instruction in front of a text may say: (weight, form). Generic forms go with LinkedIn posts.
INSTRUCTIONS: dict[str, tuple[tuple[int, str], ...]] = {
    "linkedin_post": (
        (4, "{verb} a LinkedIn post about {topic}:"),
        (2, "{verb} a LinkedIn article about {topic}:"),
        (4, "{verb} LinkedIn content about {topic}:"),
        (4, "{verb} professional content about {topic}:"),
        (4, "{verb} thought leadership about {topic}:"),
        (3, "{verb} strategic content about {topic}:"),
        (4, "{verb} content about {topic}:"),
    ),
    "technical_article": (
        (6, "{verb} a technical article about {topic}:"),
        (1, "{verb} an article about {topic}:"),
        (1, "{verb} technical content about {topic}:"),
    ),
    "short_post": (
        (6, "{verb} a short post about {topic}:"),
        (1, "{verb} a short social post about {topic}:"),
        (1, "{verb} a tweet about {topic}:"),
    ),
    "business_note": (
        (6, "{verb} a business note about {topic}:"),
        (1, "{verb} a short business note about {topic}:"),
        (1, "{verb} a note about {topic}:"),
    ),
}
TOPIC_SLOTS = ("topic", "pattern", "pattern", "loose", "loose")
# Topics of any words, as {a}, and of slots: of these a model cannot learn what follows, only to copy it.
COPY_FORMS = (
    "{a} {b}", "{a} {b}", "{a} {b} {c}", "{a} and {b}", "{a} and {b} in {c} {d}", "{a} for {b} {c}",
    "{a} {b} in {sector}", "{a} {b} for {audience}", "{tech} {a}", "{tech} {a} {b}", "{a} {area}",
    "{a} {area} in {sector}", "{a} {b} {area}", "choosing a {a} {b}", "replacing a {a} {b} {c}",
    "{doing} {a} {b}",
    "{doing} the {a} {b}", "{a} of {b} {c}", "{a} {b} with {tech} {c}", "{a} against {b} {c}", "{a} by {b}",
    "{doing} {a} in the {b} {c}", "{a} on {b}",
)  # fmt: skip
DOING = (
    "choosing", "renewing", "replacing", "measuring", "sharing", "testing", "buying", "moving", "checking",
)  # fmt: skip
VERBS = ("Write", "Create", "Draft")


@dataclass(frozen=True)
class Text:
    """One training text: what was asked, and the answer."""

    content_type: str
    passage: int  # index in the content type's file
    topic: str
    prompt: str
    text: str

    @property
    def document(self) -> str:
        """Prompt and text as the models see them, without ``<s>`` and ``</s>``."""
        return f"{self.prompt}\n\n{self.text}"


@cache
def load_slots(folder: Path = FOLDER) -> Slots:
    """Slot name -> its values, from slots.toml."""
    raw = tomllib.loads((folder / "slots.toml").read_text(encoding="utf-8"))
    return {name: tuple(values) for name, values in raw.items()}


def load_passages(content_type: str, folder: Path = FOLDER) -> list[str]:
    """The authored passages of one content type, in file order, without comments."""
    lines = (folder / f"{content_type}.txt").read_text(encoding="utf-8").splitlines()
    while lines and (lines[0].startswith("#") or not lines[0].strip()):
        lines.pop(0)
    blocks = re.split(r"(?m)^---[ \t]*$", "\n".join(lines))
    return [block.strip() for block in blocks if block.strip()]


def training_passages(content_type: str, folder: Path = FOLDER) -> list[tuple[int, str]]:
    """Index and source of the passages that models learn from."""
    passages = enumerate(load_passages(content_type, folder))
    return [(index, source) for index, source in passages if (index + 1) % HELD_OUT_EVERY]


def held_out_passages(content_type: str, folder: Path = FOLDER) -> list[tuple[int, str]]:
    """Index and source of the passages of which no expansion is trained on."""
    passages = enumerate(load_passages(content_type, folder))
    return [(index, source) for index, source in passages if not (index + 1) % HELD_OUT_EVERY]


def draw_topic(slots: Slots, rng: random.Random, allowed: Callable[[str], bool]) -> str:
    """A topic for which ``allowed`` holds: one in five from the list, the others made of parts."""
    while True:
        topic = expand((Slot(rng.choice(TOPIC_SLOTS), "", False),), slots, rng)
        if allowed(topic):
            return topic


@cache
def passage_themes(content_type: str, folder: Path = FOLDER) -> list[frozenset[str]]:
    """The themes of each passage of a file: the two that it touches most beyond the average of the file."""
    passages = load_passages(content_type, folder)
    counts = [{name: len(p.findall(text)) / len(text) for name, p in THEMES.items()} for text in passages]
    means = {name: sum(count[name] for count in counts) / len(counts) for name in THEMES}
    found = []
    for count in counts:
        above = {name: count[name] / means[name] for name in THEMES if count[name] > means[name]}
        found.append(frozenset(sorted(above, key=lambda name: -above[name])[:2]))
    return found


def suits(topic: str, themes: frozenset[str], rng: random.Random) -> bool:
    """Whether a passage of these themes may be about the topic; half of the topics without one are let go.

    One topic in eight gets any passage, so that no word of a topic is new to a content type.
    """
    own = {name for name, beginnings in THEMES.items() if beginnings.search(topic)}
    if not own:
        return rng.random() < 0.5
    return bool(own & themes) or not themes or rng.random() < 0.125


def instruction(content_type: str, topic: str, rng: random.Random) -> str:
    """An instruction that asks for this content type about this topic."""
    forms = INSTRUCTIONS[content_type]
    form = rng.choices([form for _, form in forms], [weight for weight, _ in forms])[0]
    return form.format(verb=rng.choices(VERBS, (3, 2, 2))[0], topic=topic)


def banned_phrases(prompts_file: Path | None = None) -> tuple[str, ...]:
    """Lower-case phrases that no training text may contain: benchmark topics and all prompts of the file."""
    phrases = [topic.lower() for topic in BENCHMARK_TOPICS]
    if prompts_file is not None and prompts_file.is_file():
        lines = prompts_file.read_text(encoding="utf-8").splitlines()
        prompts = [json.loads(line)["text"].lower() for line in lines if line.strip()]
        phrases += prompts + [p.split(" about ", 1)[1].rstrip(":. ") for p in prompts if " about " in p]
    return tuple(dict.fromkeys(phrases))


def contains_any(text: str, phrases: Sequence[str]) -> bool:
    """Whether any of the lower-case phrases occurs in the text, whatever its case and line breaks."""
    flat = " ".join(text.lower().split())
    return any(phrase in flat for phrase in phrases)


def training_texts(
    variants: dict[str, int] | None = None, folder: Path = FOLDER, seed: int = 0, banned: Sequence[str] = ()
) -> Iterator[Text]:
    """The training texts: every training passage ``variants`` times, all distinct, in file order.

    A draw is thrown away when it repeats an earlier text, contains a held-out word or a banned phrase, or is
    a short post over 280 characters. Raises ValueError when a passage yields too few distinct texts.
    """
    slots = load_slots(folder)
    banned = (*banned_phrases(), *HELD_OUT_WORDS, *banned)
    for content_type in CONTENT_TYPES:
        wanted = (variants or VARIANTS)[content_type]
        for index, source in training_passages(content_type, folder):
            seen: set[str] = set()
            rng = random.Random(f"{seed}/{content_type}/{index}")
            themes = passage_themes(content_type, folder)[index]
            for _ in range(40 * wanted):
                topic = draw_topic(slots, rng, lambda topic: not contains_any(topic, banned))
                if not suits(topic, themes, rng):
                    continue
                text = expand(parse(source), slots, rng, topic=topic)
                prompt = instruction(content_type, topic, rng)
                too_long = content_type == "short_post" and len(text) > SHORT_POST_LIMIT
                if text in seen or too_long or contains_any(f"{prompt} {text}", banned):
                    continue
                seen.add(text)
                yield Text(content_type, index, topic, prompt, text)
                if len(seen) == wanted:
                    break
            else:
                raise ValueError(f"{content_type} passage {index}: fewer than {wanted} distinct texts")


@cache
def common_words() -> tuple[str, ...]:
    """The frequent words of data/coherence.npz without those of grammar: what a topic may be about."""
    tokens = np.load(DATA / "coherence.npz")["words"].tobytes().decode().split()
    grammar = word_list("function_words")
    return tuple(token for token in tokens if re.fullmatch("[a-z]{3,12}", token) and token not in grammar)


def copying_topic(slots: Slots, rng: random.Random) -> str:
    """A topic of any words, in one of the forms that topics have."""

    def part(match: re.Match[str]) -> str:
        name = match[1]
        if name in slots:
            return expand((Slot(name, "", False),), slots, rng)
        return rng.choice(DOING if name == "doing" else common_words())

    return re.sub(r"\{(\w+)\}", part, rng.choice(COPY_FORMS))


def copying_texts(folder: Path = FOLDER, part: int = 0, banned: Sequence[str] = ()) -> Iterator[Text]:
    """The training passages on topics of any words (held-out ones excepted), as ``training_texts``.

    A model that has met some thousand topics knows those; to repeat one that it has never met it must copy.
    Any passage gets any topic in the first part, one that ``suits`` it in later ones.
    """
    slots = load_slots(folder)
    banned = (*banned_phrases(), *HELD_OUT_WORDS, *banned)
    for content_type in CONTENT_TYPES:
        for index, source in training_passages(content_type, folder):
            rng = random.Random(f"copying {part}/{content_type}/{index}")
            themes = passage_themes(content_type, folder)[index]
            for _ in range(COPY_VARIANTS[content_type]):
                topic = copying_topic(slots, rng)
                while part and not suits(topic, themes, rng):
                    topic = copying_topic(slots, rng)
                text = expand(parse(source), slots, rng, topic=topic)
                prompt = instruction(content_type, topic, rng)
                too_long = content_type == "short_post" and len(text) > SHORT_POST_LIMIT
                if not too_long and not contains_any(f"{prompt} {text}", banned):
                    yield Text(content_type, index, topic, prompt, text)


def held_out_texts(folder: Path = FOLDER, seed: int = 0) -> Iterator[Text]:
    """New expansions of the training passages, one each, on the held-out topics: none was trained on."""
    for content_type in CONTENT_TYPES:
        for index, source in training_passages(content_type, folder):
            rng = random.Random(f"held out {seed}/{content_type}/{index}")
            yield _on_topic(content_type, index, source, rng.choice(HELD_OUT_TOPICS), rng, folder)


def unseen_passage_texts(folder: Path = FOLDER, seed: int = 0) -> Iterator[Text]:
    """The held-out passages, each on two held-out topics: neither passage nor topic was trained on."""
    for content_type in CONTENT_TYPES:
        for index, source in held_out_passages(content_type, folder):
            rng = random.Random(f"held out {seed}/{content_type}/{index}")
            for topic in rng.sample(HELD_OUT_TOPICS, 2):
                yield _on_topic(content_type, index, source, topic, rng, folder)


def _on_topic(
    content_type: str, index: int, source: str, topic: str, rng: random.Random, folder: Path
) -> Text:
    text = expand(parse(source), load_slots(folder), rng, topic=topic)
    return Text(content_type, index, topic, instruction(content_type, topic, rng), text)
