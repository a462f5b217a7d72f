"""A model behind an OpenAI-compatible server: how it is asked, and its streamed answers."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from nbhelpers import tasks
from nbhelpers.devices import meters
from nbhelpers.generation import likelihood
from nbhelpers.loading import load, remote, tokenizer
from nbhelpers.loading.load import Loaded, LoadingReport
from nbhelpers.records import Failure, FinishReason, ModelSpec, Prompt, Settings

if TYPE_CHECKING:
    from openai import OpenAI

CHARACTERS_PER_TOKEN = 4  # of a prompt whose tokens the server does not tell (assumed)
UNMEASURED = "the server's memory and energy are not measured"
OPTIONS = {  # that a server may refuse, in the order in which they are given up, and what that means
    "ignore_eos": "it ends an answer where it likes, also where speed is measured",
    "top_k": "it may leave out rare words, or punish repeated ones, as it likes",
    "stream_options": "it may not tell the tokens of an answer: then the pieces of its stream are counted",
    "seed": "it takes no seed: its texts cannot be made again",
}
PLAIN_SAMPLING = {"min_p": 0.0, "repeat_penalty": 1.0, "repetition_penalty": 1.0}  # not the server's own
HOT = Settings(temperature=1.5, max_new_tokens=8)  # at which two seeds give two texts, if anything does
COLD = "it gave two seeds one text at a high temperature: it ignores that, and repeats say nothing new"
UNSTEADY = "it gave one seed two texts: they cannot be made again"
THOUGHTS = ("reasoning_content", "reasoning")  # the fields of a piece that some servers set apart
ENDS: dict[str, FinishReason] = {"stop": "eos", "length": "length", "time": "time"}


@dataclass(frozen=True)
class Served:
    """A server's model, ready to answer: the counterpart of ``load.Loaded``."""

    spec: ModelSpec
    client: OpenAI
    report: LoadingReport
    options: tuple[str, ...]  # those of OPTIONS that it takes


@dataclass(frozen=True)
class Answer:
    """One streamed answer; seconds count from when the request, or its last retry, was sent."""

    text: str
    reasoning: str  # that was sent apart from the text
    finish_reason: FinishReason  # "eos", "length" or "time"
    pieces: int  # of the stream, that held text
    ttft_s: float | None  # until the first of them; None: none came
    latency_s: float
    prompt_tokens: int | None  # as the server tells them, where that can be
    new_tokens: int | None


def open_model(spec: ModelSpec, device: str = "auto", dtype: str = "auto") -> Loaded | Served:
    """A model that is loaded here, or asked at its server. Raises LabError as ``load`` and ``connect``."""
    return connect(spec) if spec.kind == "server" else load.load(spec, device, dtype)


def close(model: Loaded | Served) -> None:
    """Free a model that was loaded here."""
    if isinstance(model, Loaded):
        load.unload(model)


def connect(spec: ModelSpec) -> Served:
    """A server's model with how it is asked, found out by requests for one token. Raises LabError.

    By chat or, where the server has no template for it, by completion; an address that ends in /completions
    says which. Options that the server refuses are left out, and the report's notes say what has no effect.
    """
    import openai

    started = time.perf_counter()
    spec, (address, _, model) = remote.inspect(spec), spec.source.partition("#")
    formats = ["chat", "plain"]
    if address.endswith("/completions"):
        formats = ["chat" if address.endswith("/chat/completions") else "plain"]
    source = f"{address}#{spec.alias.removeprefix('server:')}"
    about = spec.alias, spec.slug, str(spec.revision), source, spec.family, spec.parameters, spec.context
    report = LoadingReport(*about, engine="server", ids_digests={})
    client, names, refused = remote.client_of(address), tuple(OPTIONS), list[Exception]()
    with remote.one_sentence(address, f"does not answer as the model {model!r}"):
        for report in (replace(report, prompt_format=one) for one in formats):  # type: ignore[arg-type]
            for taken in (names[n:] for n in range(len(names) + 1)):
                served = Served(spec, client, report, taken)
                try:
                    ask(served, "Hello", Settings(max_new_tokens=1), 0, likelihood.FIRST_ANSWER_S, fixed=True)
                except openai.APIStatusError as error:
                    refused.append(error)
                    if error.status_code not in (400, 422):
                        break
                else:
                    texts = [ask(served, "Once", HOT, n, likelihood.FIRST_ANSWER_S).text for n in (1, 2, 1)]
                    notes = (UNMEASURED, *(OPTIONS[name] for name in names if name not in taken))
                    notes += (COLD,) if texts[0] == texts[1] else ()
                    notes += (UNSTEADY,) if "seed" in taken and texts[0] != texts[2] else ()
                    took = time.perf_counter() - started
                    return replace(served, report=replace(report, notes=notes, load_s=took))
        raise refused[0]


def ask(
    served: Served,
    text: str,
    settings: Settings,
    seed: int,
    limit_s: float,
    fixed: bool = False,
    before: tokenizer.Turns = (),
) -> Answer:
    """One streamed answer to a text after other turns. fixed: of full length, where the server can.

    Raises what the client raises, ValueError for what is no answer, and EOFError for one that breaks off.
    """
    chat, model = served.report.prompt_format == "chat", served.spec.source.partition("#")[2]
    values: Any = True, settings.top_k, {"include_usage": True}, seed & 0x7FFFFFFF
    extra = dict(zip(OPTIONS, values, strict=True))
    extra = {name: extra[name] for name in served.options if fixed or name != "ignore_eos"}
    extra |= PLAIN_SAMPLING if "top_k" in extra and not settings.maker_settings else {}
    body: dict[str, Any] = {"model": model, "extra_body": extra, "max_tokens": settings.max_new_tokens}
    body |= {"temperature": settings.temperature, "top_p": settings.top_p, "timeout": limit_s, "stream": True}
    turns = [{"role": role, "content": said} for role, said in (*before, ("user", text))]
    body |= {"messages": turns} if chat else {"prompt": tokenizer.plain(text, before)}
    body |= {"stop": [*stops]} if (stops := tasks.load_task(settings.task).stop) and not fixed else {}
    remote.CLOCK.until = time.perf_counter() + limit_s
    words, thoughts, end, usage, first, pieces = list[str](), list[str](), "", None, None, 0
    with (served.client.chat if chat else served.client).completions.create(**body) as stream:
        began = last = remote.CLOCK.began
        for chunk in stream:
            now, usage = time.perf_counter(), getattr(chunk, "usage", None) or usage
            for choice in (chunk.choices or [])[:1]:
                one = choice.delta if chat else choice
                words.append(getattr(one, "content" if chat else "text", None) or "")
                thoughts.append(next((t for n in THOUGHTS if (t := getattr(one, n, None))), ""))
                if words[-1] or thoughts[-1]:
                    first, last, pieces = first or now, now, pieces + 1
                end, last = (str(choice.finish_reason), now) if choice.finish_reason else (end, last)
            if not end and now - began > limit_s:
                end, last = "time", now
                break
    if not end:
        raise EOFError("the answer breaks off: if the server ends one for the next, use --at-once 1")
    if end not in ENDS:
        raise ValueError(f"the server ended its answer with {end!r}")
    counts = (getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens"))
    asked, new = (count if type(count) is int and count > 0 else None for count in counts)
    new = new if new and pieces <= new <= settings.max_new_tokens else None  # a piece is a token or more
    times = first and first - began, last - began
    return Answer("".join(words), "".join(thoughts), ENDS[end], pieces, *times, asked, new)


def answers(
    served: Served,
    asked: Sequence[tuple[Prompt, int]],
    settings: Settings,
    at_once: int,
    limit_s: float,
    fixed: bool,
) -> Iterator[tuple[int, Exception | None, dict[str, Any]]]:
    """The place of each prompt and repeat as its answer ends, what went wrong, and the fields of its row."""
    from nbhelpers.generation.sampling import row_seed

    task, lock, alive, ledger = tasks.load_task(settings.task), threading.Lock(), [0], meters.Ledger("server")
    kinds, likely = task.likelihoods(), dict[Prompt, Future[dict[str, tuple[float, ...]]]]()
    told = partial(likelihood.of_server, served.client, served.spec.source.partition("#")[2], kinds, limit_s)

    def one(place: int) -> tuple[int, Exception | None, dict[str, Any]]:
        with lock:
            before = ledger.charge(max(1, alive[0]))
            alive[0] += 1
        (prompt, repeat), row, error = asked[place], dict[str, Any](), None
        try:
            row["logprobs"] = likely[prompt].result() if kinds else None
            seed = row_seed(settings.seed, prompt.id, repeat)
            row |= fields_of(ask(served, prompt.text, settings, seed, limit_s, fixed, prompt.before), prompt)
            row["text"] = tokenizer.before_stop(row["text"], task.stop)
        except Exception as wrong:
            row, error = {"failure": failure_of(wrong)}, wrong
        with lock:
            share = ledger.charge(alive[0]).since(before)
            alive[0] -= 1
        if error is None:
            row["share_s"] = share.seconds
            if row["finish_reason"] == "time":
                error = TimeoutError("the limit of a generation passed")
                row |= {"failure": Failure.TIMEOUT, "logprobs": None}
        return place, error, row

    with ThreadPoolExecutor(at_once) as pool:
        for prompt in dict.fromkeys(prompt for prompt, _ in asked if kinds):  # before any row, once a prompt
            likely[prompt] = pool.submit(told, prompt)
        futures = [pool.submit(one, place) for place in range(len(asked))]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def fields_of(answer: Answer, prompt: Prompt) -> dict[str, Any]:
    """What a row says of an answer to a prompt."""
    thought, text = tokenizer.split_reasoning(answer.text.encode("utf-8", "replace").decode().strip())
    return {
        "text": text,
        "prompt_tokens": answer.prompt_tokens or math.ceil(len(prompt.text) / CHARACTERS_PER_TOKEN),
        "new_tokens": answer.new_tokens or answer.pieces,
        "estimated": None in (answer.prompt_tokens, answer.new_tokens) or None,
        "finish_reason": answer.finish_reason,
        "ttft_s": answer.ttft_s,
        "latency_s": answer.latency_s,
        "reasoning": "\n\n".join(filter(None, (answer.reasoning.strip(), thought))) or None,
    }


def failure_of(error: Exception) -> Failure:
    """The kind of what ``ask`` raises."""
    import openai

    if isinstance(error, TimeoutError | openai.APITimeoutError):
        return Failure.TIMEOUT
    if isinstance(error, ValueError | TypeError | AttributeError):  # JSON that is none, or of another form
        return Failure.BAD_OUTPUT
    return Failure.SERVER if isinstance(error, EOFError | openai.OpenAIError) else Failure.OTHER
