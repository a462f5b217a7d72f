"""From text to ids and back: the file's own ids, open prompts, whole requests, reasoning apart."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from saved_models import edit_json, make_model
from tiny_models import byte_tokenizer, tiny
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from nbhelpers import registry, store
from nbhelpers.loading import load, tokenization
from nbhelpers.loading.load import Loaded, LoadingReport
from nbhelpers.records import LabError, Prompt

TEXTS = (
    "How are you doing?",
    "12345 and 2023",
    "We'LL meet in 1999, OK?",
    "  two  spaces\n\nnew lines",
    "don't DON'T",
    "Résumé, ｗｉｄｅ and e\u0301",
    "a <s>b</s> c",
)
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"


def bytes_bpe() -> Tokenizer:
    """Byte-level BPE that knows a few pairs, most of them over a space or a figure."""
    vocabulary = {name: number for number, name in enumerate(["<pad>", "<s>", "</s>", *ALPHABET])}
    pairs = [("Ġ", "a"), ("e", "s"), ("Ġ", "Ġ"), ("1", "2"), ("12", "3"), ("Ċ", "Ċ"), ("o", "n")]
    for pair in pairs:
        vocabulary["".join(pair)] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def pieces(scheme: str | None) -> Tokenizer:
    """BPE with byte fallback in the way of SentencePiece; scheme None is the older kind, a normaliser."""
    letters = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;?'"
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *letters, "▁t", "he", "▁a", "▁▁"]
    merges = [("▁", "t"), ("h", "e"), ("▁", "a"), ("▁", "▁")]
    vocabulary = {name: number for number, name in enumerate(names)}
    model = models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(names[:3])
    if scheme is None:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer


def with_part(**parts: Any) -> Tokenizer:
    tokenizer = bytes_bpe()
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer


def words() -> Tokenizer:
    names = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "How",
        "are",
        "you",
        "doing",
        "?",
        "and",
        ",",
        "in",
        "meet",
        "OK",
    ]
    tokenizer = Tokenizer(models.WordPiece({n: i for i, n in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


def byte_level(regex: str) -> Any:
    split = pre_tokenizers.Split(Regex(regex), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def saved(folder: Path, tokenizer: Tokenizer, **config: Any) -> Path:
    """A model folder with this tokenizer.json and what its tokenizer_config.json says besides."""
    make_model(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return folder


FILES = {
    "split": with_part(pre_tokenizer=byte_level(SPLIT)),
    "digits": with_part(pre_tokenizer=byte_level(r"\d|\D+")),
    "lower case": with_part(normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])),
    "strip": with_part(normalizer=normalizers.Strip()),
    "prefix space": with_part(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "begins": with_part(
        post_processor=processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    ),
    "SentencePiece, old": pieces(None),
    "SentencePiece, first": pieces("first"),
    "SentencePiece, never": pieces("never"),
    "SentencePiece, always": pieces("always"),
}
CLASSES = (
    "GPT2Tokenizer",
    "LlamaTokenizer",
    "GemmaTokenizer",
    "T5Tokenizer",
    "BertTokenizer",
    "NoSuchTokenizer",
)


@pytest.mark.parametrize("named", CLASSES)
@pytest.mark.parametrize("file", FILES)
def test_the_ids_are_those_of_the_file_whatever_class_the_folder_names(
    tmp_path: Path, file: str, named: str
) -> None:
    folder = saved(tmp_path, FILES[file], tokenizer_class=named, add_prefix_space=True, legacy=False)
    truth = Tokenizer.from_file(str(folder / "tokenizer.json"))
    loaded = replace(tiny(), tokenizer=tokenization.load_tokenizer(folder))
    for text in TEXTS:
        ids = truth.encode(text).ids
        assert tokenization.encode(loaded, Prompt("x", text, "short_post")) == ids, text
        assert loaded.tokenizer.decode(ids) == truth.decode(ids, skip_special_tokens=False)
    assert loaded.tokenizer.bos_token_id == 1 and loaded.tokenizer.eos_token_id == 2
    assert loaded.tokenizer.padding_side == "left" and loaded.tokenizer.pad_token_id is not None
    assert len(loaded.tokenizer) == truth.get_vocab_size()  # no special token that only the class knows


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("file", ["split", "begins"])
def test_the_file_decides_on_the_beginning_token(tmp_path: Path, file: str, asked: bool) -> None:
    """tokenizer_config.json may say the opposite."""
    folder = saved(tmp_path, FILES[file], add_bos_token=asked, tokenizer_class="LlamaTokenizer")
    loaded = replace(tiny(), tokenizer=tokenization.load_tokenizer(folder))
    truth = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenization.encode(loaded, Prompt("x", "Hi", "short_post")) == truth.encode("Hi").ids


def token(content: str, **changes: bool) -> dict[str, Any]:
    """An added token as tokenizer_config.json writes it."""
    flags = ("lstrip", "rstrip", "single_word", "normalized")
    return {"content": content, "special": True, **dict.fromkeys(flags, False), **changes}


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word", "normalized"])
@pytest.mark.parametrize("in_file", [True, False])
@pytest.mark.parametrize("named", ["GPT2Tokenizer", "PreTrainedTokenizerFast"])
def test_added_tokens_are_the_files_and_those_of_the_configuration_stay(
    tmp_path: Path, flag: str, in_file: bool, named: str
) -> None:
    """The two files contradict each other on one token, and only one of them knows the other token."""
    tokenizer = bytes_bpe()
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.add_special_tokens([AddedToken("<Mask>", **{flag: in_file, "normalized": in_file})])
    number = tokenizer.get_vocab_size()
    listed = {str(number - 1): token("<Mask>", **{flag: not in_file}), str(number): token("<More>")}
    folder = saved(tmp_path, tokenizer, added_tokens_decoder=listed, tokenizer_class=named)
    found = tokenization.load_tokenizer(folder)
    for text in ("a <Mask> b", "a<Mask>b", "a <mask> B <MASK>"):
        assert found(text)["input_ids"] == tokenizer.encode(text).ids, text
    assert found("<More>")["input_ids"] == [number]


def test_limits_of_length_in_the_file_cut_and_fill_no_prompt(tmp_path: Path) -> None:
    tokenizer = bytes_bpe()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    loaded = replace(tiny(), tokenizer=tokenization.load_tokenizer(saved(tmp_path, tokenizer)))
    assert len(tokenization.encode(loaded, Prompt("x", "xyz" * 5, "short_post"))) == 15


def ends_with(*parts: Any) -> Tokenizer:
    return with_part(post_processor=processors.Sequence(list(parts)))


CLOSING = {
    "template": with_part(
        post_processor=processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    ),
    "sequence": ends_with(
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)]),
    ),
    "twice": with_part(
        post_processor=processors.TemplateProcessing(
            single="<s> $A </s> <pad> </s>", special_tokens=[("<s>", 1), ("</s>", 2), ("<pad>", 0)]
        )
    ),
    "Roberta": with_part(post_processor=processors.RobertaProcessing(("</s>", 2), ("<s>", 1))),
    "Bert": words(),
}


@pytest.mark.parametrize("file", CLOSING)
@pytest.mark.parametrize("text", ["How are you", "How are you?</s>", "and and"])
def test_a_prompt_stays_open(tmp_path: Path, file: str, text: str) -> None:
    truth = CLOSING[file]
    loaded = replace(
        tiny(), tokenizer=tokenization.load_tokenizer(saved(tmp_path, truth, add_eos_token=True))
    )
    whole, body = truth.encode(text).ids, truth.encode(text, add_special_tokens=False).ids
    begin = next(i for i in range(3) if whole[i : i + len(body)] == body)
    assert whole != whole[: begin + len(body)], "this post-processor appends something"
    assert tokenization.encode(loaded, Prompt("x", text, "short_post")) == whole[: begin + len(body)]


def test_an_end_of_which_only_the_configuration_speaks_is_not_appended(tmp_path: Path) -> None:
    """Without tokenizer.json the class follows the configuration."""
    folder = make_model(tmp_path)
    (folder / "tokenizer.json").unlink()
    names = ["<pad>", "<s>", "</s>", *ALPHABET]
    (folder / "vocab.json").write_text(json.dumps({name: number for number, name in enumerate(names)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "</s>",
    }
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config | {"add_eos_token": True, "add_bos_token": True})
    )
    loaded = replace(tiny(), tokenizer=tokenization.load_tokenizer(folder))
    assert loaded.tokenizer("Hi")["input_ids"][-1] == 2
    assert tokenization.encode(loaded, Prompt("x", "Hi", "short_post")) == [
        1,
        *(names.index(letter) for letter in "Hi"),
    ]


def test_a_prompt_that_leaves_nothing_but_special_tokens(tmp_path: Path) -> None:
    loaded = replace(tiny(), tokenizer=tokenization.load_tokenizer(saved(tmp_path, CLOSING["template"])))
    assert tokenization.encode(loaded, Prompt("x", "", "short_post")) == [1]


def chat(template: str, tokenizer: Any = None) -> Loaded:
    loaded = tiny(prompt_format="chat", tokenizer=tokenizer or byte_tokenizer())
    loaded.tokenizer.chat_template = template
    return loaded


def rendered(template: str, text: str = "Tell me\nof 3 ships") -> str:
    loaded = chat(template)
    return loaded.tokenizer.decode(tokenization.encode(loaded, Prompt("x", text, "short_post")))


LOOP = "{% for m in messages %}<|{{ m.role }}|>CONTENT{% endfor %}<|assistant|>"
WHOLE = "<|user|>Tell me\nof 3 ships<|assistant|>"


@pytest.mark.parametrize(
    "content",
    [
        "{{ m.content }}",
        "{{ m.content | trim }}",
        "{% for c in m.content %}{{ c.text }}{% endfor %}",
        "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}",
        "{{ m.content[0].text }}",
        "{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}{% endif %}",
        "{% if m.content is string %}{{ raise_exception('no text') }}{% endif %}{{ m.content[0].text }}",
    ],
)
def test_the_request_is_rendered_as_a_string_or_as_parts(content: str) -> None:
    assert rendered(LOOP.replace("CONTENT", content)) == WHOLE
    assert rendered("{{ bos_token }}" + LOOP.replace("CONTENT", content)) == f"<s>{WHOLE}"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (LOOP.replace("CONTENT", ""), "does not write the request"),
        (LOOP.replace("CONTENT", "{{ m.content | upper }}"), "does not write the request"),
        (LOOP.replace("CONTENT", "{{ m.content[:4] }}"), "does not write the request"),
        ("{% for m in messages[1:] %}{{ m.content }}{% endfor %}", "does not write the request"),
        ("{{ raise_exception('a system turn first') }}", "a system turn first"),
        ("{% for tool in tools %}{{ tool.name }}{% endfor %}{{ messages[0].content }}", "TypeError"),
        ("{{ documents[0].text }}{{ messages[0].content }}", "UndefinedError"),
        ("{% for m in messages", "TemplateSyntaxError"),
    ],
)
def test_a_template_that_loses_the_request_is_refused_in_one_sentence(template: str, says: str) -> None:
    with pytest.raises(LabError, match=r"^The chat template fails \(.*\): choose another model\.$") as caught:
        rendered(template)
    assert says in str(caught.value)


@pytest.mark.parametrize("content", ["{{ m.content[:12] }}", "{{ m.content[:12] | tojson }}"])
def test_a_list_of_parts_that_is_printed_as_it_is_is_no_request(content: str) -> None:
    loaded = chat(LOOP.replace("CONTENT", content))
    assert "Ship" in tokenization.render(loaded.tokenizer, "Ship")
    with pytest.raises(LabError, match="does not write the request"):
        tokenization.render(loaded.tokenizer, "Ships and harbours")


def chatml_tokenizer() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


def test_a_date_in_a_template_is_fixed() -> None:
    now = "{% set date = strftime_now('%d %b %Y %H:%M:%S.%f') %}Today is {{ date }}. "
    first = rendered(now + "{{ messages[0].content }}")
    time.sleep(0.01)
    assert rendered(now + "{{ messages[0].content }}") == first
    assert first.startswith("Today is 01 Jan 2025 00:00:00.000000. Tell me")


def test_a_report_of_an_older_release_is_still_read(tmp_path: Path) -> None:
    report = load.load(str(make_model(tmp_path)), "cpu").report
    path = store.write_json(tmp_path / "loading.json", report)
    edit_json(path, template_date="2025-01-01")  # which a release before this one wrote
    assert store.read_json(path, LoadingReport) == report


PAIRS = [pair for pair in tokenization.REASONING_MARKS if "channel" not in pair[0]]


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(
    ("text", "reasoning", "answer"),
    [
        ("OPEN\nI count.\nCLOSE\n\nThe answer.", "I count.", "The answer."),
        ("OPENI countCLOSEThe answer.", "I count", "The answer."),
        ("I count.\nCLOSE\n\nThe answer.", "I count.", "The answer."),
        ("I countCLOSE The answer.", "I count", "The answer."),
        ("Sure!\nOPEN I count. CLOSE\nThe answer.", "I count.", "Sure!\n\nThe answer."),
        ("OPENoneCLOSEThe\n\nOPENtwoCLOSEanswer.", "one\n\ntwo", "The\n\nanswer."),
        ("OPEN\n\nCLOSE\n\nThe answer.", "", "The answer."),
        ("OPEN\nI count and", "I count and", ""),
        ("Sure! OPEN I count and", "I count and", ""),
        ("I count.\nCLOSE", "I count.", ""),
        ("The answer.", None, "The answer."),
    ],
)
def test_reasoning_stands_apart(pair: tuple[str, str], text: str, reasoning: str | None, answer: str) -> None:
    text = text.replace("OPEN", pair[0]).replace("CLOSE", pair[1])
    assert tokenization.split_reasoning(text) == (reasoning, answer)


def test_a_request_that_ends_with_a_mark_opens_no_reasoning() -> None:
    tokenizer = chatml_tokenizer()
    prompt, answer = (ids_of(tokenizer, text) for text in ("What is the tag <think>", "It begins a block."))
    assert tokenization.read_answer(tokenizer, prompt, answer) == (None, "It begins a block.")


@pytest.mark.parametrize(
    "text",
    [
        "- <think>: opens a block\n- </think>: closes it",
        "Such a model thinks between `<think>` and `</think>`, then answers.",
        "Such a model thinks between <think> and </think> tags, then answers.",
        'It writes "<think>" first.\n\nAnd "</think>" last.',
        "Look for <think> in the log.",
        " Nothing of that, and spaces stay. ",
        "",
    ],
)
def test_a_text_may_speak_of_the_marks(text: str) -> None:
    assert tokenization.split_reasoning(text) == (None, text)


def test_channels_are_reasoning_until_the_last_one() -> None:
    turn = "<|start|>assistant<|channel|>"
    analysis = "<|channel|>analysis<|message|>I count.<|end|>"
    final = f"{analysis}{turn}final<|message|>The answer."
    reasoning, answer = tokenization.split_reasoning(final)
    assert answer == "The answer." and reasoning and reasoning.startswith("I count.")
    assert tokenization.split_reasoning(analysis)[1] == ""
    assert tokenization.split_reasoning("<|channel|>final<|message|>The answer.")[1] == "The answer."


plain = st.text("ab .\n", max_size=12)


@given(st.lists(st.tuples(plain, plain), max_size=4), plain, st.booleans())
def test_blocks_put_into_a_text_come_out_again(
    blocks: list[tuple[str, str]], last: str, opened: bool
) -> None:
    """Each block begins a line; the first opening mark may stand in the prompt."""
    text = "\n".join([*(f"<think>{inside}</think>{after}" for inside, after in blocks), last])
    parts = "\n".join([*(after for _, after in blocks), last])
    if opened and blocks:
        text = text.removeprefix("<think>")
    reasoning, answer = tokenization.split_reasoning(text, opened and bool(blocks))
    assert answer.split() == parts.split()
    assert (reasoning is None) == (not blocks)
    assert (reasoning or "").split() == " ".join(inside for inside, _ in blocks).split()


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize(
    ("template", "opening", "closing"),
    [
        ("{{ messages[0].content }}", "<think>", "</think>"),
        ("{{ messages[0].content.split('</ponder>')[-1] }}", "<ponder>", "</ponder>"),
        (
            "{% for m in messages %}{% if m['reasoning_content'] %}{{ '<|muse|>\\n' + m['reasoning_content']"
            " + '\\n<|/muse|>' }}{% endif %}{{ m.content }}{% endfor %}",
            "<|muse|>",
            "<|/muse|>",
        ),
    ],
)
def test_marks_of_the_template_count_also_as_special_tokens(
    template: str, opening: str, closing: str, special: bool
) -> None:
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = template
    tokenizer.add_tokens([AddedToken(mark, special=special) for mark in (opening, closing)])
    new = ids_of(tokenizer, f"{opening}\nI count.\n{closing}\n\n<s>The answer.<|im_end|>")
    prompt = ids_of(tokenizer, "Hi")
    assert tokenization.read_answer(tokenizer, prompt, new) == ("I count.", "The answer.")
    prompt = ids_of(tokenizer, f"Hi{opening}\n")
    assert tokenization.read_answer(tokenizer, prompt, new[1:]) == ("I count.", "The answer.")
    assert tokenization.read_answer(tokenizer, prompt, ids_of(tokenizer, "I count")) == ("I count", "")
    assert tokenization.read_answer(tokenizer, prompt, []) == (None, "")


@pytest.mark.parametrize("name", registry.embedded_models())
def test_without_marks_the_text_is_that_of_transformers(name: str) -> None:
    folder = registry.folder_of(registry.resolve(name))
    assert folder is not None
    tokenizer, plain = tokenization.load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for start in range(0, len(tokenizer), 97):
        ids = [(start + 31 * step) % len(tokenizer) for step in range(40)]
        text = plain.decode(ids, skip_special_tokens=True).strip()
        assert tokenization.read_answer(tokenizer, ids, ids) == (None, text)
