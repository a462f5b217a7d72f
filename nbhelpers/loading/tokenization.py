"""A model's tokenizer: its ids, its chat template, the marks of its reasoning, the tokens that end a text.

A chat template is a stranger's program: transformers runs it in jinja2's sandbox.
"""

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from itertools import chain, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from nbhelpers.loading import checkpoint
from nbhelpers.records import LabError, Prompt

Turns = Sequence[tuple[str, str]]  # role, text
Stopped = Callable[[int, Sequence[int]], bool]  # a row, its new ids
UNREAD = "unread by templates"  # a key that shows where one prints a list of parts as it is
TODAY = datetime(2025, 1, 1)  # what a chat template is told: with today's date a run could not go on tomorrow
_NAMES = "think thinking thought thoughts reasoning reason scratchpad seed:think longcat_think analysis"
TAGS = (*(f"<{name}>" for name in _NAMES.split(" ")), "[THINK]", "◁think▷")
MARKS = (  # around reasoning, as models in use write them
    *((tag, f"{tag[0]}/{tag[1:]}") for tag in TAGS),
    *(("<|START_THINKING|>", "<|END_THINKING|>"), ("<|begin_of_thought|>", "<|end_of_thought|>")),
    *(("<|inner_prefix|>", "<|inner_suffix|>"), ("<|channel>thought", "<channel|>")),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
)
# A closing mark in a chat template: after the reasoning or where an answer is cut off.
_OWN_MARK = re.compile(
    r"""(?:(?:reason|think|thought)\w*[^<\[◁]{0,80}|split\(\s*['"])([<\[◁]\|?/[\w:]+\|?[>\]▷])"""
)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder, padding on the left, with a pad token; its ids are tokenizer.json's.

    The class that a folder names may rebuild that file, drop its normaliser or pre-tokenizer and add tokens,
    or fail at it: so it names the special tokens, and the file does the work.
    """
    from tokenizers import AddedToken, Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    given: dict[str, Any] = {"padding_side": "left", "local_files_only": True, "trust_remote_code": False}
    if not (file := folder / "tokenizer.json").is_file():
        return with_padding(AutoTokenizer.from_pretrained(folder, **given))
    truth = Tokenizer.from_file(str(file))
    truth.no_truncation()
    truth.no_padding()
    config = checkpoint.read_json_file(folder / "tokenizer_config.json", folder.name)
    listed = config.get("added_tokens_decoder") or {}
    for number, token in sorted(listed.items(), key=lambda item: int(item[0])):
        if int(number) == truth.get_vocab_size():  # known to the configuration alone
            truth.add_tokens([AddedToken(**token)])
    tokenizer = None
    with suppress(Exception):  # whatever a class raises that expects another kind of file
        tokenizer = AutoTokenizer.from_pretrained(folder, **given)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, **given)
    tokenizer._tokenizer = truth
    named = tokenizer.special_tokens_map.items()
    for name in [name for name, token in named if truth.token_to_id(str(token)) is None]:
        setattr(tokenizer, name, None)  # known to the class alone
    return with_padding(tokenizer)


def with_padding(tokenizer: Any) -> Any:
    """Give a tokenizer without a pad token its end token, else its unknown token, else token 0.

    Padded positions are masked, so any token serves; a new one would need a row that the model lacks.
    """
    if tokenizer.pad_token_id is None:
        spare = (tokenizer.eos_token, tokenizer.unk_token, tokenizer.convert_ids_to_tokens(0))
        tokenizer.pad_token = next(token for token in spare if token is not None)
    return tokenizer


def encode(loaded: Any, prompt: Prompt) -> list[int]:
    """The input ids of ``written``; never empty. LabError for a prompt that gives none, and as that."""
    ids = ids_of(loaded, written(loaded, prompt))
    if not ids and loaded.tokenizer.bos_token_id is None:
        raise LabError(f"The prompt {prompt.id!r} has no token that the model's tokenizer knows: reword it.")
    return ids or [loaded.tokenizer.bos_token_id]


def written(loaded: Any, prompt: Prompt) -> str:
    """A prompt as written, or in the chat template of a loaded chat model. LabError for one without."""
    if loaded.spec.prompt_format != "chat":
        return plain(prompt.text, prompt.before)
    if not getattr(loaded.tokenizer, "chat_template", None):
        why = 'has no chat template: register it with prompt = "plain".'
        raise checkpoint.refusal(loaded.spec.alias, why)
    return render(loaded.tokenizer, prompt.text, prompt.before)


def ids_of(loaded: Any, text: str) -> list[int]:
    """The ids of what ``written`` gives; a template brings its own special tokens.

    Nothing stands after the text, whatever a post-processor appends: an end there would close it.
    """
    special = {"add_special_tokens": loaded.spec.prompt_format != "chat", "return_special_tokens_mask": True}
    found = loaded.tokenizer(text, **special, verbose=False)  # it warns of a long prompt, which is cut later
    ids = list(found["input_ids"])
    while ids and found["special_tokens_mask"][len(ids) - 1]:
        ids.pop()
    return ids


def plain(text: str, before: Turns = ()) -> str:
    """The turns of a prompt as one text: an answer follows its question, all else an empty line."""
    whole = ""
    for role, said in (*before, ("user", text)):
        gap = " " if role == "assistant" else "\n\n"
        whole += (gap if whole and not (role == "assistant" and whole[-1].isspace()) else "") + said
    return whole


def end_tokens(loaded: Any) -> frozenset[int]:
    """The ids that end a text: all that the generation settings, the model and the tokenizer name.

    A chat model's text also ends with what its template writes after an answer.
    """
    model, words, mark = loaded.model, loaded.tokenizer, "\ue000"
    ends = set[int]()
    for source in (model.generation_config, model.config, model.config.get_text_config(decoder=True), words):
        ids = getattr(source, "eos_token_id", None)
        # A file may hold anything.
        ends |= {int(i) for i in map(str, ids if isinstance(ids, list | tuple) else [ids]) if i.isdecimal()}
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
    marks = (*MARKS, *((mark.replace("/", "", 1), mark) for mark in _OWN_MARK.findall(template)))
    parts, tokens = "".join(chain(*marks)), tokenizer.added_tokens_decoder.items()
    hidden = {number for number, token in tokens if token.special and token.content not in parts}
    text = tokenizer.decode([number for number in ids if number not in hidden]).strip()
    asked, opening = tokenizer.decode(list(prompt[-32:])), "|".join(re.escape(mark) for mark, _ in marks)
    opened = bool(text) and re.search(rf"(?<!\w )(?:{opening})\s*\Z", asked) is not None
    return split_reasoning(text, opened, marks)


def stop_check(tokenizer: Any, prompts: Sequence[Sequence[int]], stops: Sequence[str]) -> Stopped | None:
    """Whether the answer in a row's new ids holds one of the stop strings; None without any."""

    def stopped(row: int, ids: Sequence[int]) -> bool:
        for stop in stops:  # the whole is read only where the end may hold it: a letter has up to four tokens
            if stop in tokenizer.decode(list(ids[-4 * len(stop) - 4 :])):
                return stop in read_answer(tokenizer, prompts[row], ids)[1]
        return False

    return stopped if stops else None


def before_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    return re.split("|".join(map(re.escape, stops)), text, maxsplit=1)[0].rstrip() if stops else text


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
    return (reasoning, answer.strip()) if found else (None, text)


# What is given to a template by name arrives there as text, so its clock can only be set from outside.
@mock.patch("transformers.utils.chat_template_utils.datetime", SimpleNamespace(now=lambda: TODAY))
def render(tokenizer: Any, text: str, before: Turns = ()) -> str:
    """The text as the user's turn in the tokenizer's chat template, after other turns, ready for the answer.

    As a list of parts where it is lost as a string; the system prompt in front of the first question where
    the template has no place for it. Raises LabError for a template that fails or does not give the texts
    back; one that does not end is stopped by the limit of a notebook.
    """
    turns, failures = [*before, ("user", text)], []
    joined = turns
    if turns[0][0] == "system":
        (_, system), (role, first), *rest = turns
        joined = [(role, f"{system}\n\n{first}"), *rest]
    for said, parts in product((turns, joined), (False, True)):
        given = [
            {"role": r, "content": [{"type": "text", "text": t, UNREAD: ""}] if parts else t} for r, t in said
        ]
        try:
            prompt = str(tokenizer.apply_chat_template(given, add_generation_prompt=True, tokenize=False))
            whole = all(one.strip() in prompt for _, one in said)
            if whole and UNREAD not in prompt:  # the list itself is no request
                return prompt
            failures.append("it does not write the request as it is")
        except Exception as error:  # whatever a template can raise
            failures.append(f"{type(error).__name__}: {error}"[:200])
    raise LabError(f"The chat template fails ({failures[0]}): choose another model.")
