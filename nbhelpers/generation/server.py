"""A model behind an OpenAI-compatible server: how it is asked, and its streamed answers."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from nbhelpers import tasks
from nbhelpers.devices import meters
from nbhelpers.errors import FAILURES, failure_of
from nbhelpers.generation import likelihood
from nbhelpers.loading import load, remote, tokenization
from nbhelpers.loading.load import Loaded, LoadingReport
from nbhelpers.records import Failure, FinishReason, ModelSpec, Prompt, Settings

if TYPE_CHECKING:
    from openai import OpenAI

CHARACTERS_PER_TOKEN = 4  # of a prompt whose tokens the server does not report (assumed)
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
# Of an answer: JSON that is none or of another form, and a stream that breaks off.
WRONG = FAILURES | dict.fromkeys(("ValueError", "TypeError", "AttributeError"), Failure.BAD_OUTPUT)
WRONG |= {"EOFError": Failure.SERVER}
ENDS: dict[str, FinishReason] = {"stop": "eos", "length": "length", "time": "time"}
Asked = tuple[Prompt, int]  # and which of its repeats


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
    prompt_tokens: int | None  # as the server reports them, where that is possible
    new_tokens: int | None


def open_model(spec: ModelSpec, device: str = "auto", dtype: str = "auto") -> Loaded | Served:
    """A model that is loaded here, or asked at its server. Raises LabError as ``load`` and ``connect``."""
    return connect(spec) if spec.kind == "server" else load.load(spec, device, dtype)


def close(model: Loaded | Served) -> None:
    """Free a model that was loaded here."""
    if isinstance(model, Loaded):
        load.unload(model)


def connect(spec: ModelSpec) -> Served:
    """A server's model and how to ask it, learned from requests for a few tokens. Raises LabError.

    By chat or, where the server has no template for it, by completion; an address that ends in /completions
    says which. Options that the server refuses are left out, and the report's notes say what has no effect.
    """
    started = time.perf_counter()
    address, _, model = spec.source.partition("#")
    spec = remote.look_up(spec)
    source = f"{address}#{spec.alias.removeprefix('server:')}"
    known = spec.alias, spec.slug, str(spec.revision), source, spec.family, spec.parameters, spec.context
    report = LoadingReport(*known, engine="server", ids_digests={})
    with remote.client_errors(address, f"does not answer as the model {model!r}"):
        served = _negotiated(Served(spec, remote.client_of(address), report, tuple(OPTIONS)), address)
        texts = [ask(served, "Once", HOT, seed, likelihood.FIRST_ANSWER_S).text for seed in (1, 2, 1)]
    notes = (UNMEASURED, *(OPTIONS[name] for name in OPTIONS if name not in served.options))
    notes += (COLD,) if texts[0] == texts[1] else ()
    notes += (UNSTEADY,) if "seed" in served.options and texts[0] != texts[2] else ()
    return replace(served, report=replace(served.report, notes=notes, load_s=time.perf_counter() - started))


def _negotiated(served: Served, address: str) -> Served:
    """With the first prompt format, and of it the most options, that the server answers."""
    import openai

    formats: list[Literal["chat", "plain"]] = ["chat", "plain"]
    if address.endswith("/completions"):
        formats = ["chat" if address.endswith("/chat/completions") else "plain"]
    refusals = list[Exception]()
    for prompt_format in formats:
        report = replace(served.report, prompt_format=prompt_format)
        for dropped in range(len(OPTIONS) + 1):
            trial = replace(served, report=report, options=tuple(OPTIONS)[dropped:])
            try:
                ask(trial, "Hello", Settings(max_new_tokens=1), 0, likelihood.FIRST_ANSWER_S, fixed=True)
                return trial
            except openai.APIStatusError as error:
                refusals.append(error)
                if error.status_code not in (400, 422):
                    break
    raise refusals[0]


def ask(
    served: Served,
    text: str,
    settings: Settings,
    seed: int,
    limit_s: float,
    fixed: bool = False,
    before: tokenization.Turns = (),
) -> Answer:
    """One streamed answer to a text after other turns. fixed: of full length, where the server can.

    Raises what the client raises, ValueError for what is no answer, and EOFError for one that breaks off.
    """
    chat = served.report.prompt_format == "chat"
    options: Any = {"ignore_eos": True, "top_k": settings.top_k, "seed": seed & 0x7FFFFFFF}
    options["stream_options"] = {"include_usage": True}
    extra = {name: options[name] for name in served.options if fixed or name != "ignore_eos"}
    if "top_k" in extra and not settings.maker_settings:
        extra |= PLAIN_SAMPLING
    turns = [{"role": role, "content": content} for role, content in (*before, ("user", text))]
    request: Any = {"messages": turns} if chat else {"prompt": tokenization.plain(text, before)}
    request |= {"model": served.spec.source.partition("#")[2], "extra_body": extra, "stream": True}
    request |= {"temperature": settings.temperature, "top_p": settings.top_p}
    request |= {"max_tokens": settings.max_new_tokens, "timeout": limit_s}
    if (stops := tasks.load_task(settings.task).stop) and not fixed:
        request["stop"] = list(stops)
    remote.CLOCK.until = time.perf_counter() + limit_s
    with (served.client.chat if chat else served.client).completions.create(**request) as stream:
        return _read(stream, chat, settings.max_new_tokens, limit_s)


def _read(stream: Any, chat: bool, max_new_tokens: int, limit_s: float) -> Answer:
    """The answer that a stream brings until it ends or the limit passes."""
    pieces = list[tuple[str, str]]()  # text and thought
    end, usage, first = "", None, None
    began = last = remote.CLOCK.began
    for chunk in stream:
        now = time.perf_counter()
        usage = getattr(chunk, "usage", None) or usage
        for choice in (chunk.choices or [])[:1]:
            piece = choice.delta if chat else choice
            text = getattr(piece, "content" if chat else "text", None) or ""
            thought = next((t for name in THOUGHTS if (t := getattr(piece, name, None))), "")
            if text or thought:
                pieces.append((text, thought))
                first, last = first or now, now
            if choice.finish_reason:
                end, last = str(choice.finish_reason), now
        if not end and now - began > limit_s:
            end, last = "time", now
            break
    if not end:
        raise EOFError("the answer breaks off: if the server ends one for the next, use --at-once 1")
    if end not in ENDS:
        raise ValueError(f"the server ended its answer with {end!r}")
    counts = (getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens"))
    prompt_tokens, new = (count if type(count) is int and count > 0 else None for count in counts)
    new = new if new and len(pieces) <= new <= max_new_tokens else None  # a piece is a token or more
    text = "".join(text for text, _ in pieces)
    reasoning = "".join(thought for _, thought in pieces)
    times = first and first - began, last - began
    return Answer(text, reasoning, ENDS[end], len(pieces), *times, prompt_tokens, new)


def answers(
    served: Served, asked: Sequence[Asked], settings: Settings, at_once: int, limit_s: float, fixed: bool
) -> Iterator[tuple[int, Exception | None, dict[str, Any]]]:
    """Of each answer as it ends: its place in asked, what went wrong, and the fields of its row."""
    from nbhelpers.generation.sampling import row_seed

    task = tasks.load_task(settings.task)
    kinds = task.likelihoods()
    model = served.spec.source.partition("#")[2]
    logprobs_of = partial(likelihood.of_server, served.client, model, kinds, limit_s)
    logprobs = dict[Prompt, Future[dict[str, tuple[float, ...]]]]()
    ledger, lock = meters.Ledger("server"), threading.Lock()
    alive = 0

    def charge(change: int) -> meters.Share:  # to all that are alive, as one comes (+1) or goes (-1)
        nonlocal alive
        with lock:
            share = ledger.charge(max(1, alive))
            alive += change
        return share

    def answer(place: int) -> tuple[int, Exception | None, dict[str, Any]]:
        prompt, repeat = asked[place]
        seed = row_seed(settings.seed, prompt.id, repeat)
        row, error = dict[str, Any](), None
        before = charge(+1)
        try:
            row["logprobs"] = logprobs[prompt].result() if kinds else None
            row |= fields_of(ask(served, prompt.text, settings, seed, limit_s, fixed, prompt.before), prompt)
            row["text"] = tokenization.before_stop(row["text"], task.stop)
        except Exception as problem:
            row, error = {"failure": failure_of(problem, WRONG)}, problem
        share = charge(-1).since(before)
        if error is None:
            row["share_s"] = share.seconds
            if row["finish_reason"] == "time":
                error = TimeoutError("the limit of a generation passed")
                row |= {"failure": Failure.TIMEOUT, "logprobs": None}
        return place, error, row

    with ThreadPoolExecutor(at_once) as pool:
        for prompt in dict.fromkeys(prompt for prompt, _ in asked if kinds):  # before any row, once a prompt
            logprobs[prompt] = pool.submit(logprobs_of, prompt)
        futures = [pool.submit(answer, place) for place in range(len(asked))]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def fields_of(answer: Answer, prompt: Prompt) -> dict[str, Any]:
    """What a row says of an answer to a prompt."""
    thought, text = tokenization.split_reasoning(answer.text.encode("utf-8", "replace").decode().strip())
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
