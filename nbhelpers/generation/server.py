"""A model behind an OpenAI-compatible server: how it is asked, and its streamed answers as rows."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import MISSING, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbhelpers import redact, tasks
from nbhelpers.devices import meters
from nbhelpers.generation import generate, likelihood
from nbhelpers.loading import remote, tokenizer
from nbhelpers.loading.load import LoadingReport
from nbhelpers.records import Failure, FinishReason, Limits, ModelSpec, Prompt, Sample, Settings

if TYPE_CHECKING:
    from openai import OpenAI

CHARACTERS_PER_TOKEN = 4  # of a prompt whose tokens the server does not tell (assumed)
UNMEASURED = "the server's memory and energy are not measured"
OPTIONS = {  # that a server may refuse, in the order in which they are given up, and what that means
    "ignore_eos": "it ends an answer where it likes, also where speed is measured",
    "stream_options": "it may not tell the tokens of an answer: then the pieces of its stream are counted",
    "seed": "it takes no seed: its texts cannot be made again",
}
HOT = Settings(temperature=1.5, max_new_tokens=8)  # at which two seeds give two texts, if anything does
COLD = "it gave two seeds one text at a high temperature: it ignores that, and repeats say nothing new"
UNSTEADY = "it gave one seed two texts: they cannot be made again"
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


def connect(spec: ModelSpec) -> Served:
    """A server's model with how it is asked, found out by requests for one token. Raises LabError.

    By chat or, where the server has no template for it, by completion; an address that ends in /completions
    says which. Options that the server refuses are left out; the report's notes say so, and whether
    temperature and seed have an effect.
    """
    import openai

    started = time.perf_counter()
    spec, (address, _, model) = remote.inspect(spec), spec.source.partition("#")
    formats = ["chat", "plain"]
    if address.endswith("/completions"):
        formats = ["chat" if address.endswith("/chat/completions") else "plain"]
    known: dict[str, Any] = {one.name: None for one in fields(LoadingReport) if one.default is MISSING}
    known |= {name: value for name, value in vars(spec).items() if name in known} | {"slug": spec.slug}
    known |= {"model": spec.alias, "source": f"{address}#{spec.alias.removeprefix('server:')}"}
    report = LoadingReport(
        **known | {"device": "server", "dtype": "unknown"}, engine="server", ids_digests={}
    )
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
    extra = {"ignore_eos": True, "stream_options": {"include_usage": True}, "seed": seed & 0x7FFFFFFF}
    extra = {name: extra[name] for name in served.options if fixed or name != "ignore_eos"}
    body: dict[str, Any] = {"model": model, "stream": True, "extra_body": extra, "timeout": limit_s}
    body |= {"temperature": settings.temperature, "top_p": settings.top_p}
    body |= {"max_tokens": settings.max_new_tokens}
    turns = [{"role": role, "content": said} for role, said in (*before, ("user", text))]
    body |= {"messages": turns} if chat else {"prompt": tokenizer.plain(text, before)}
    body |= {"stop": [*stops]} if (stops := tasks.load_task(settings.task).stop) and not fixed else {}
    create: Any = served.client.chat.completions.create if chat else served.client.completions.create
    remote.CLOCK.until = time.perf_counter() + limit_s
    words, thoughts, end, usage, first, pieces = list[str](), list[str](), "", None, None, 0
    with create(**body) as stream:
        began = last = remote.CLOCK.began
        for chunk in stream:
            now, usage = time.perf_counter(), getattr(chunk, "usage", None) or usage
            for choice in (chunk.choices or [])[:1]:
                part = choice.delta if chat else choice
                words.append(getattr(part, "content" if chat else "text", None) or "")
                found = (getattr(part, name, None) for name in ("reasoning_content", "reasoning"))
                thoughts.append(next(filter(None, found), ""))
                if words[-1] or thoughts[-1]:
                    first, last, pieces = first or now, now, pieces + 1
                if choice.finish_reason:
                    end, last = str(choice.finish_reason), now
            if not end and now - began > limit_s:
                end, last = "time", now
                break
    if not end:
        raise EOFError("the answer breaks off")
    if end not in ENDS:
        raise ValueError(f"the server ended its answer with {end!r}")
    counts = (getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens"))
    asked, new = (count if type(count) is int and count > 0 else None for count in counts)
    if new and not pieces <= new <= settings.max_new_tokens:  # a piece of the stream is a token or more
        new = None
    times = first and first - began, last - began
    return Answer("".join(words), "".join(thoughts), ENDS[end], pieces, *times, asked, new)


def generate_samples(
    served: Served,
    prompts: Sequence[Prompt],
    settings: Settings,
    path: Path | None = None,
    batch_size: int | None = None,
    limits: Limits = Limits(),
    purpose: generate.Purpose = "samples",
    only: int | None = None,
) -> list[Sample]:
    """As ``generate.generate_samples``, with batch_size requests at a time (None: limits.at_once)."""
    wanted = generate.requests(prompts, settings, served.report, purpose, only)
    fixed = purpose == "latency"
    most = min(generate.LATENCY_TOKENS, settings.max_new_tokens) if fixed else settings.max_new_tokens
    asked, at_once = replace(settings, max_new_tokens=most), batch_size or limits.at_once

    make = partial(_made, served, asked, at_once, limits.generation_s, fixed)
    return generate.collect(wanted, make, path, limits)


def _made(
    served: Served,
    settings: Settings,
    at_once: int,
    limit_s: float,
    fixed: bool,
    wanted: list[generate.Request],
) -> Iterator[Sample]:
    """A sample for every request as it ends, ``at_once`` of them asked at a time."""
    from nbhelpers.generation.sampling import row_seed

    lock, alive, ledger = threading.Lock(), [0], meters.Ledger("server")
    kinds = () if fixed else tasks.load_task(settings.task).likelihoods()
    name = served.spec.source.partition("#")[2]
    told = partial(likelihood.of_server, served.client, name, kinds, limit_s)
    likely = dict[str, Future[dict[str, tuple[float, ...]]]]()  # begun before any row, once a prompt

    def one(request: generate.Request) -> Sample:
        with lock:
            before = ledger.charge(max(1, alive[0]))
            alive[0] += 1
        seed = row_seed(settings.seed, request.prompt.id, request.repeat)
        got: Answer | Exception
        prompt, sums = request.prompt, None
        try:
            sums = likely[prompt.id].result() if kinds else None
            got = ask(served, prompt.text, settings, seed, limit_s, fixed, prompt.before)
        except Exception as error:
            got = error
        with lock:
            share = ledger.charge(alive[0]).since(before)
            alive[0] -= 1
        row = sample_of(served, request, settings, at_once, share.seconds, got)
        return replace(row, logprobs=sums) if kinds and not row.error else row

    with ThreadPoolExecutor(at_once) as pool:
        for prompt in {request.prompt.id: request.prompt for request in wanted if kinds}.values():
            likely[prompt.id] = pool.submit(told, prompt)
        futures = [pool.submit(one, request) for request in wanted]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def sample_of(
    served: Served,
    request: generate.Request,
    settings: Settings,
    at_once: int,
    share_s: float,
    got: Answer | Exception,
) -> Sample:
    """The record of one answer, or of its failure."""
    answer = got if isinstance(got, Answer) else None
    a = answer or Answer("", "", "time", 0, None, 0.0, 0, 0)
    late = TimeoutError("the limit of a generation passed") if a.finish_reason == "time" else None
    error = got if isinstance(got, Exception) else late
    thought, text = tokenizer.split_reasoning(a.text.encode("utf-8", "replace").decode().strip())
    text = tokenizer.before_stop(text, tasks.load_task(settings.task).stop)
    new, asked = a.new_tokens, a.prompt_tokens
    estimated = None in (new, asked)
    new = a.pieces if new is None else new
    if asked is None:
        asked = math.ceil(len(request.prompt.text) / CHARACTERS_PER_TOKEN)
    sentence = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return Sample(
        key=request.key,
        model=served.spec.alias,
        revision=served.report.revision,
        prompt_id=request.prompt.id,
        content_type=request.prompt.content_type,
        repeat=request.repeat,
        seed=settings.seed,
        prompt=request.prompt.text,
        text=text,
        prompt_tokens=asked,
        new_tokens=new,
        bytes=len(text.encode()),
        finish_reason=a.finish_reason if answer else "error",
        error=redact.redacted(sentence) if error else None,
        batch_size=at_once,
        latency_s=a.latency_s if answer else None,
        ttft_s=a.ttft_s,
        tpot_s=(a.latency_s - a.ttft_s) / (new - 1) if a.ttft_s is not None and new > 1 else None,
        peak_memory_bytes=None,
        energy_j=None,
        share_s=share_s if answer else None,
        engine="server",
        failure=failure_of(error) if error else None,
        reasoning="\n\n".join(filter(None, (a.reasoning.strip(), thought))) or None,
        estimated=estimated or None,
    )


def failure_of(error: Exception) -> Failure:
    """The kind of what ``ask`` raises."""
    import openai

    if isinstance(error, TimeoutError | openai.APITimeoutError):
        return Failure.TIMEOUT
    if isinstance(error, ValueError | TypeError | AttributeError):  # JSON that is none, or of another form
        return Failure.BAD_OUTPUT
    return Failure.SERVER if isinstance(error, EOFError | openai.OpenAIError) else Failure.OTHER
