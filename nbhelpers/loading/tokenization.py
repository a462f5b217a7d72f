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
UNREAD = "unread by templates"  # a key that stands in a prompt only where a template prints a list of parts
TODAY = datetime(2025, 1, 1)  # for chat templates: with the real date a run could not go on tomorrow
_TAG_NAMES = "think thinking thought thoughts reasoning reason scratchpad seed:think longcat_think analysis"
TAGS = (*(f"<{name}>" for name in _TAG_NAMES.split(" ")), "[THINK]", "◁think▷")
REASONING_MARKS = (  # around reasoning, as models in use write them
    *((tag, f"{tag[0]}/{tag[1:]}") for tag in TAGS),
    *(("<|START_THINKING|>", "<|END_THINKING|>"), ("<|begin_of_thought|>", "<|end_of_thought|>")),
    *(("<|inner_prefix|>", "<|inner_suffix|>"), ("<|channel>thought", "<channel|>")),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
)
# A closing mark in a chat template: after the reasoning, or where the template splits an answer at it.
_TEMPLATE_MARK = re.compile(
    r"""(?:(?:reason|think|thought)\w*[^<\[◁]{0,80}|split\(\s*['"])([<\[◁]\|?/[\w:]+\|?[>\]▷])"""
)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder, padding on the left, with a pad token; its ids are tokenizer.json's.

    The class that a folder names may rebuild that file, drop its normaliser or pre-tokenizer and add tokens,
    or fail at it: so it names the special tokens, and the file does the work.
    """
    from tokenizers import AddedToken, Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    options: dict[str, Any] = {"padding_side": "left", "local_files_only": True, "trust_remote_code": False}
    if not (file := folder / "tokenizer.json").is_file():
        return with_padding(AutoTokenizer.from_pretrained(folder, **options))
    backend = Tokenizer.from_file(str(file))
    backend.no_truncation()
    backend.no_padding()
    config = checkpoint.read_json_file(folder / "tokenizer_config.json", folder.name)
    added = config.get("added_tokens_decoder") or {}
    for number, token in sorted(added.items(), key=lambda item: int(item[0])):
        if int(number) == backend.get_vocab_size():  # known to the configuration alone
            backend.add_tokens([AddedToken(**token)])
    tokenizer = None
    with suppress(Exception):  # whatever a class raises that expects another kind of file
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, **options)
    tokenizer._tokenizer = backend
    for name, token in [*tokenizer.special_tokens_map.items()]:
        if backend.token_to_id(str(token)) is None:  # known to the class alone
            setattr(tokenizer, name, None)
    return with_padding(tokenizer)


def with_padding(tokenizer: Any) -> Any:
    """Give a tokenizer without a pad token its end token, else its unknown token, else token 0.

    Padded positions are masked, so any token serves; a new one would need a row that the model lacks.
    """
    if tokenizer.pad_token_id is None:
        candidates = tokenizer.eos_token, tokenizer.unk_token, tokenizer.convert_ids_to_tokens(0)
        tokenizer.pad_token = next(token for token in candidates if token is not None)
    return tokenizer


def encode(loaded: Any, prompt: Prompt) -> list[int]:
    """The input ids of ``written``, never empty. LabError as there, and for a prompt without known tokens."""
    ids = ids_of(loaded, written(loaded, prompt))
    if not ids and loaded.tokenizer.bos_token_id is None:
        raise LabError(f"The prompt {prompt.id!r} has no token that the model's tokenizer knows: reword it.")
    return ids or [loaded.tokenizer.bos_token_id]


def written(loaded: Any, prompt: Prompt) -> str:
    """A prompt as written, or in the chat template of a loaded chat model. LabError for one without."""
    if loaded.spec.prompt_format != "chat":
        return plain(prompt.text, prompt.before)
    if not getattr(loaded.tokenizer, "chat_template", None):
        raise checkpoint.refusal(loaded.spec.alias, 'has no chat template: set prompt = "plain".')
    return render(loaded.tokenizer, prompt.text, prompt.before)


def ids_of(loaded: Any, text: str) -> list[int]:
    """The ids of what ``written`` gives; a template brings its own special tokens.

    Special tokens at its end are removed: an end token there would close the text.
    """
    options = {"add_special_tokens": loaded.spec.prompt_format != "chat", "return_special_tokens_mask": True}
    encoding = loaded.tokenizer(text, **options, verbose=False)  # no warning: a long prompt is cut later
    ids = list(encoding["input_ids"])
    while ids and encoding["special_tokens_mask"][len(ids) - 1]:
        ids.pop()
    return ids


def plain(text: str, before: Turns = ()) -> str:
    """The turns of a prompt as one text: an answer after a space, all else after an empty line."""
    joined = ""
    for role, turn in (*before, ("user", text)):
        gap = " " if role == "assistant" else "\n\n"
        joined += (gap if joined and not (role == "assistant" and joined[-1].isspace()) else "") + turn
    return joined


def end_tokens(loaded: Any) -> frozenset[int]:
    """The ids that end a text: all that the generation settings, the model and the tokenizer name.

    A chat model's text also ends with what its template writes after an answer.
    """
    config, tokenizer, mark = loaded.model.config, loaded.tokenizer, "\ue000"
    ends = set[int]()
    for source in (loaded.model.generation_config, config, config.get_text_config(decoder=True), tokenizer):
        ids = getattr(source, "eos_token_id", None)
        # A file may hold anything.
        ends |= {int(i) for i in map(str, ids if isinstance(ids, list | tuple) else [ids]) if i.isdecimal()}
    for answer in (mark, [{"type": "text", "text": mark}]) if loaded.spec.prompt_format == "chat" else ():
        with suppress(Exception):  # whatever a template raises that has no place for an answer
            turns = [{"role": "user", "content": "-"}, {"role": "assistant", "content": answer}]
            after = tokenizer.apply_chat_template(turns, tokenize=False).partition(mark)[2].lstrip()
            first = tokenizer(after, add_special_tokens=False)["input_ids"][:1]
            ends |= set(first) & set(tokenizer.added_tokens_decoder)
    return frozenset(ends)


def read_answer(tokenizer: Any, prompt: Sequence[int], ids: Sequence[int]) -> tuple[str | None, str]:
    """The reasoning, None without any, and the answer in the ids that follow a prompt's ids.

    The marks of the model's own chat template count as well, and so do marks that are special tokens.
    """
    template = str(getattr(tokenizer, "chat_template", None))
    closing = _TEMPLATE_MARK.findall(template)
    marks = (*REASONING_MARKS, *((mark.replace("/", "", 1), mark) for mark in closing))
    shown, added = "".join(chain(*marks)), tokenizer.added_tokens_decoder.items()
    hidden = {number for number, token in added if token.special and token.content not in shown}
    text = tokenizer.decode([number for number in ids if number not in hidden]).strip()
    opening = "|".join(re.escape(mark) for mark, _ in marks)
    at_end = re.search(rf"(?<!\w )(?:{opening})\s*\Z", tokenizer.decode(list(prompt[-32:])))
    return split_reasoning(text, bool(text and at_end), marks)


def stop_check(tokenizer: Any, prompts: Sequence[Sequence[int]], stops: Sequence[str]) -> Stopped | None:
    """Whether the answer in a row's new ids holds one of the stop strings; None without any."""

    def stopped(row: int, ids: Sequence[int]) -> bool:
        for stop in stops:  # all is read only where the end may hold it: a letter has up to four tokens
            if stop in tokenizer.decode(list(ids[-4 * len(stop) - 4 :])):
                return stop in read_answer(tokenizer, prompts[row], ids)[1]
        return False

    return stopped if stops else None


def before_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    return re.split("|".join(map(re.escape, stops)), text, maxsplit=1)[0].rstrip() if stops else text


def split_reasoning(
    text: str, opened: bool = False, marks: Sequence[tuple[str, str]] = REASONING_MARKS
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
    at_start, not_inside = r"(?:\A|(?<=[\n.!?:>]))\s*", r"""(?![ ]*(?-i:[a-z,.:;'"`”)]))"""
    begins = rf"{at_start}(?:{opening})"
    ends = rf"""(?:{at_start}(?:{closing})|(?<!['"`“])(?:{closing}){not_inside})"""
    blocks, answer = list[str](), text
    for pattern in (rf"{begins}(.*?)(?:{closing})", rf"\A(.*){ends}", rf"\A.*?{begins}(.*)"):
        blocks += re.findall(pattern, answer, flags)
        answer = re.sub(pattern, "\n", answer, flags=flags)
    return ("\n\n".join(map(str.strip, blocks)), answer.strip()) if blocks else (None, text)


# transformers takes no clock for a template's strftime_now, so it is replaced.
@mock.patch("transformers.utils.chat_template_utils.datetime", SimpleNamespace(now=lambda: TODAY))
def render(tokenizer: Any, text: str, before: Turns = ()) -> str:
    """The text as the user's turn in the tokenizer's chat template, after other turns, ready for the answer.

    Turns are lists of parts where the template drops strings; the system prompt stands before the first
    question where the template has no place for it. Raises LabError for a template that fails or drops a
    text; a notebook's time limit stops one that does not end.
    """
    turns, failures = [*before, ("user", text)], []
    joined = turns
    if turns[0][0] == "system":
        (_, system), (role, first), *rest = turns
        joined = [(role, f"{system}\n\n{first}"), *rest]
    for version, in_parts in product((turns, joined), (False, True)):
        contents = [[{"type": "text", "text": t, UNREAD: ""}] if in_parts else t for _, t in version]
        messages = [{"role": role, "content": c} for (role, _), c in zip(version, contents, strict=True)]
        try:
            prompt = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
            if UNREAD not in prompt and all(turn.strip() in prompt for _, turn in version):
                return prompt
            failures.append("it does not write the request as it is")
        except Exception as error:  # whatever a template can raise
            failures.append(f"{type(error).__name__}: {error}"[:200])
    raise LabError(f"The chat template fails ({failures[0]}): choose another model.")
