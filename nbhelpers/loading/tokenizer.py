"""A model's tokenizer: its ids, its chat template, the marks of its reasoning, the tokens that end a text.

A chat template is a stranger's program: transformers runs it in jinja2's sandbox.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from itertools import chain, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from nbhelpers.loading import folder as folders
from nbhelpers.records import LabError, Prompt

LONGEST = 10**6  # characters that a chat template may write
UNREAD = "unread by templates"  # a key that shows where one prints a list of parts as it is
TODAY = datetime(2025, 1, 1)  # what a chat template is told: with today's date a run could not go on tomorrow
PROBES = (  # texts that normalisers, pre-tokenizers and decoders of different makers treat differently
    "How are you? We'LL meet in 1999, don't DON'T; 12345 of 1234567890 (1,234.50) cost $5!",
    " Two  spaces,\n\nnew lines\r\n\tand tabs \n   end  ",
    "Ünïcode e\u0301 \ufb01 ½ ² Ω İ ＡＢＣ naïve_x CamelCase x**2 // http://a.b/c?d=e",
    "日本語 中文字 한국어 العربية हिन्दी 👩‍👧 \u00a0\u200b — “quotes”…",
)
_NAMES = "think thinking thought thoughts reasoning reason scratchpad seed:think longcat_think analysis"
TAGS = (*(f"<{name}>" for name in _NAMES.split(" ")), "[THINK]", "◁think▷")
MARKS = (  # around reasoning, as models in use write them
    *((tag, f"{tag[0]}/{tag[1:]}") for tag in TAGS),
    *(("<|START_THINKING|>", "<|END_THINKING|>"), ("<|begin_of_thought|>", "<|end_of_thought|>")),
    *(("<|inner_prefix|>", "<|inner_suffix|>"), ("<|channel>thought", "<channel|>")),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
)
# Closing marks in a chat template: after the reasoning or where an answer is cut off; or by their names.
_OWN_MARK = re.compile(
    r"""(?:(?:reason|think|thought)\w*[^<\[◁]{0,80}|split\(\s*['"])([<\[◁]\|?/[\w:]+\|?[>\]▷])"""
)
# Around the answer that follows.
_NAME = r"\w*(?:answer|response|solution|output|return)\w*\|?>"
_FRAME = re.compile(rf"\A<\|?{_NAME}|<[/|]{_NAME}\Z", re.IGNORECASE)
_OWN_END = re.compile(r"[<\[◁]\|?(?=\w*(?:think|thought|reason))\w*end\w*\|?[>\]▷]", re.IGNORECASE)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder, padding on the left, with a pad token; its ids are tokenizer.json's.

    The class that a folder names may rebuild that file and drop its normaliser or pre-tokenizer, or fail at
    it; then the file is used as it is, with the special tokens of the class. Raises LabError where even that
    gives other ids.
    """
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    given: dict[str, Any] = {"padding_side": "left", "local_files_only": True, "trust_remote_code": False}
    if not (folder / "tokenizer.json").is_file():
        return with_padding(AutoTokenizer.from_pretrained(folder, **given))
    truth = Tokenizer.from_file(str(folder / "tokenizer.json"))
    truth.no_truncation()
    truth.no_padding()
    added = [token.content for token in truth.get_added_tokens_decoder().values()]
    probes = [*PROBES, "".join(f"a{name} {name}B1{name.swapcase()}" for name in added)]
    ids = [found.ids for found in truth.encode_batch(probes)]

    def faithful(tokenizer: Any) -> bool:
        texts = [tokenizer.decode(row, clean_up_tokenization_spaces=False) for row in ids]
        same = texts == truth.decode_batch(ids, skip_special_tokens=False)
        return same and tokenizer(probes, verbose=False)["input_ids"] == ids

    for cls in (AutoTokenizer, PreTrainedTokenizerFast, PreTrainedTokenizerFast):
        try:
            tokenizer = cls.from_pretrained(folder, **given)
        except Exception:  # whatever a class raises that expects another kind of file
            if cls is not AutoTokenizer:
                raise
            continue
        first = cls is AutoTokenizer  # a class of its own may add special tokens that the model never had
        if faithful(tokenizer) and not (first and len(tokenizer) > truth.get_vocab_size()):
            return with_padding(tokenizer)
        named, more = tokenizer.special_tokens_map.items(), tokenizer.added_tokens_decoder.items()
        given |= {name: token for name, token in named if truth.token_to_id(str(token)) is not None}
        if not first:
            given["added_tokens_decoder"] = {i: token for i, token in more if truth.id_to_token(i) is None}
    why = f"transformers gives other ids than the tokenizer.json in the folder {folder.name!r}"
    raise LabError(f"{why}: save the tokenizer there again with save_pretrained.")


def with_padding(tokenizer: Any) -> Any:
    """Give a tokenizer without a pad token its end token, else its unknown token, else token 0.

    Padded positions are masked, so any token serves; a new one would need a row that the model lacks.
    """
    if tokenizer.pad_token_id is None:
        spare = (tokenizer.eos_token, tokenizer.unk_token, tokenizer.convert_ids_to_tokens(0))
        tokenizer.pad_token = next(token for token in spare if token is not None)
    return tokenizer


def encode(loaded: Any, prompt: Prompt) -> list[int]:
    """The input ids of a prompt as written, or in the chat template of a loaded chat model; never empty.

    Nothing stands after the text, whatever a post-processor appends: an end there would close it. Raises
    LabError for a prompt that gives no tokens and for a chat model without a template.
    """
    tokenizer, text, chat = loaded.tokenizer, prompt.text, loaded.spec.prompt_format == "chat"
    if chat and not getattr(tokenizer, "chat_template", None):
        raise folders.refusal(loaded.spec.alias, 'has no chat template: register it with prompt = "plain".')
    text = render(tokenizer, text) if chat else text  # a template brings its own special tokens
    # verbose warns of a long prompt, which is cut afterwards.
    found = tokenizer(text, add_special_tokens=not chat, return_special_tokens_mask=True, verbose=False)
    ids = list(found["input_ids"])
    while ids and found["special_tokens_mask"][len(ids) - 1]:
        ids.pop()
    if not ids and tokenizer.bos_token_id is None:
        raise LabError(f"The prompt {prompt.id!r} has no token that the model's tokenizer knows: reword it.")
    return ids or [tokenizer.bos_token_id]


def end_tokens(loaded: Any) -> frozenset[int]:
    """The ids that end a text: all that the generation settings, the model and the tokenizer name.

    A chat model's text also ends with what its template writes after an answer.
    """
    model, words, mark = loaded.model, loaded.tokenizer, "\ue000"
    ends = set[int]()
    for source in (model.generation_config, model.config, model.config.get_text_config(decoder=True), words):
        ids = getattr(source, "eos_token_id", None)
        ends |= set(ids if isinstance(ids, list | tuple) else [ids] if ids is not None else [])
    for answer in (mark, [{"type": "text", "text": mark}]) if loaded.spec.prompt_format == "chat" else ():
        with suppress(Exception):  # whatever a template raises that has no place for an answer
            turns = [{"role": "user", "content": "-"}, {"role": "assistant", "content": answer}]
            after = words.apply_chat_template(turns, tokenize=False).partition(mark)[2].lstrip()
            first = words(after, add_special_tokens=False)["input_ids"][:1]
            ends |= set(first) & set(words.added_tokens_decoder)
    return frozenset(ends)


def read_answer(tokenizer: Any, prompt: Sequence[int], ids: Sequence[int]) -> tuple[str | None, str]:
    """The reasoning, None without any, and the answer in the ids that follow a prompt's ids.

    Marks are also those of the model's own chat template, and are seen where they are special tokens.
    """
    template = str(getattr(tokenizer, "chat_template", None))
    own = [(mark.replace("/", "", 1), mark) for mark in _OWN_MARK.findall(template)]
    for mark, word in product(_OWN_END.findall(template), ("start", "begin")):
        own.append((mark.replace("end", word).replace("END", word.upper()), mark))
    marks = (*MARKS, *own)
    parts, tokens = "".join(chain(*marks)), tokenizer.added_tokens_decoder.items()
    hidden = {number for number, token in tokens if token.special and token.content not in parts}
    text = tokenizer.decode([number for number in ids if number not in hidden]).strip()
    asked, opening = tokenizer.decode(list(prompt[-32:])), "|".join(re.escape(mark) for mark, _ in marks)
    opened = bool(text) and re.search(rf"(?<!\w )(?:{opening})\s*\Z", asked) is not None
    return split_reasoning(text, opened, marks)


def split_reasoning(
    text: str, opened: bool = False, marks: Sequence[tuple[str, str]] = MARKS
) -> tuple[str | None, str]:
    """The reasoning, None without any, and the answer of a text: all that stands in no block of ``marks``.

    A closing mark alone ends a block that began before the text (``opened``: that is sure, and without a
    closing mark it is all reasoning). A block without an end makes the answer empty. A text may speak of
    marks: inside a sentence or in quotes they begin and end nothing.
    """
    text = marks[0][0] + text if opened else text
    opening, closing = ("|".join(map(re.escape, side)) for side in zip(*marks, strict=True))
    flags = re.DOTALL | re.IGNORECASE
    if not re.search(f"{opening}|{closing}", text, flags):
        return None, text
    start, inside = r"(?:\A|(?<=[\n.!?:>]))\s*", r"""(?![ ]*(?-i:[a-z,.:;'"`”)]))"""
    begins = rf"{start}(?:{opening})"
    ends = rf"""(?:{start}(?:{closing})|(?<!['"`“])(?:{closing}){inside})"""
    found, answer = list[str](), text
    for pattern in (rf"{begins}(.*?)(?:{closing})", rf"\A(.*){ends}", rf"\A.*?{begins}(.*)"):
        found += re.findall(pattern, answer, flags)
        answer = re.sub(pattern, "\n", answer, flags=flags)
    reasoning = "\n\n".join(part.strip() for part in found)
    return (reasoning, _FRAME.sub("", answer.strip()).strip()) if found else (None, text)


# What is given to a template by name arrives there as text, so its clock can only be set from outside.
@mock.patch("transformers.utils.chat_template_utils.datetime", SimpleNamespace(now=lambda: TODAY))
def render(tokenizer: Any, text: str) -> str:
    """The text as the user's turn in the tokenizer's chat template, ready for the answer.

    As a list of parts where it is lost as a string. A template without a place for the answer gets the
    control tokens that it writes before one. Raises LabError for a template that fails or does not give the
    text back; one that does not end is stopped by the limit of a notebook.
    """

    def chat(parts: bool, *turns: str, ready: bool = False) -> str:
        shaped = ([{"type": "text", "text": turn, UNREAD: ""}] if parts else turn for turn in turns)
        named = zip(("user", "assistant"), shaped, strict=False)
        messages = [{"role": role, "content": content} for role, content in named]
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=ready, tokenize=False))

    failures = []
    for parts in (False, True):
        try:
            prompt = chat(parts, text, ready=True)
            whole = text.strip() in prompt and UNREAD not in prompt  # the list itself is no request
            alike = prompt == chat(parts, text, ready=True) != chat(parts, f"{text} x", ready=True)
            if whole and alike and len(prompt) < LONGEST:
                break
            failures.append(f"it does not write the request as it is, twice alike, in {LONGEST:,} characters")
        except Exception as error:  # whatever a template can raise
            failures.append(f"{type(error).__name__}: {error}"[:200])
    else:
        raise LabError(f"The chat template fails ({failures[0]}): choose another model.")
    with suppress(Exception):
        begun, mark, _ = chat(parts, text, "\ue000").partition("\ue000")
        control = any(token in begun.removeprefix(prompt) for token in tokenizer.get_added_vocab())
        if mark and control and prompt == chat(parts, text) and begun.startswith(prompt):
            return begun
    return prompt
