"""Models behind an OpenAI-compatible server: its client, its list of models, and what it tells of each.

Ollama, llama.cpp, vLLM, LM Studio and ``transformers serve`` speak this protocol
(platform.openai.com/docs/api-reference), each a dialect of it.
"""

from __future__ import annotations

import difflib
import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from nbhelpers import store
from nbhelpers.records import Failure, LabError, ModelSpec

if TYPE_CHECKING:
    from openai import OpenAI

KEY_VARIABLES = ("NBHELPERS_SERVER_KEY", "OPENAI_API_KEY")  # of the environment; the first that is set
RETRIES = 2  # after 408, 409, 429, 5xx and lost connections; the client waits as long as Retry-After says
LATE_S = 1.0  # after a request's limit, so that a caller's own look at it comes first
LIST_S = 10.0  # that a list of models may take
IDENTITY = ("id", "root", "max_model_len", "meta")  # fields of a listed model that tell which it is


class _Clock(threading.local):
    """When this thread's latest request was sent, and the time after which it sends none."""

    began, until = 0.0, math.inf


CLOCK = _Clock()


def client_of(address: str) -> OpenAI:
    """A client of the server, its key from the environment. No proxy is used for this machine."""
    import openai

    def limit_whole(response: Any) -> None:  # the client's own limit starts again with every byte
        read, limit_s = response.iter_raw, response.request.extensions["timeout"]["read"] + LATE_S

        def iter_raw(*size: Any) -> Iterator[bytes]:
            for chunk in read(*size):
                if time.perf_counter() - CLOCK.began > limit_s:
                    raise openai.APITimeoutError(request=response.request)
                yield chunk

        response.iter_raw = iter_raw

    def start_clock(request: Any) -> None:  # for each retry, too
        CLOCK.began = time.perf_counter()
        if CLOCK.began > CLOCK.until:
            raise openai.APITimeoutError(request=request)

    local = urlsplit(address).hostname in ("localhost", "127.0.0.1", "::1")
    hooks: dict[str, list[Any]] = {"request": [start_clock], "response": [limit_whole]}
    http = openai.DefaultHttpxClient(event_hooks=hooks, trust_env=not local)
    key = next(filter(None, (os.environ.get(name, "").strip() for name in KEY_VARIABLES)), "none")
    base = address.removesuffix("/completions").removesuffix("/chat")
    return openai.OpenAI(base_url=base, api_key=key, max_retries=RETRIES, http_client=http)


def list_models(address: str) -> dict[str, dict[str, Any]]:
    """The entries of a server's list by the model's id. Raises LabError."""
    with client_errors(address, "gives no list of models"), client_of(address) as client:
        CLOCK.until = math.inf
        entries = client.with_options(timeout=LIST_S).models.list().data
        return {str(entry.id): entry.model_dump() for entry in entries or []}


def look_up(spec: ModelSpec) -> ModelSpec:
    """The spec with what its server tells of the model. Raises LabError for a server that is down, and for a
    model that it lacks, with the nearest names that it has.

    ``transformers serve`` lists no folders: a path, or any name where the list is empty, is not refused here.
    """
    address, _, model = spec.source.partition("#")
    models = list_models(address)
    if model not in models and models and not Path(model).is_absolute():
        near = difflib.get_close_matches(model, models, n=3, cutoff=0.4) or sorted(models)[:5]
        raise LabError(f"The server {address} has no model {model!r}: it has {', '.join(near)}.")
    entry = models.get(model, {"id": model})
    meta = entry["meta"] if isinstance(entry.get("meta"), dict) else {}  # llama.cpp's
    sizes = (entry.get("max_model_len") or meta.get("n_ctx_train"), meta.get("n_params"))
    context, parameters = (size if type(size) is int and size > 0 else None for size in sizes)
    identity, created = {name: entry.get(name) for name in IDENTITY}, entry.get("created")
    if type(created) is int and abs(created - time.time()) > 60:  # llama.cpp and vLLM give the time of day
        identity["created"] = created
    return replace(spec, revision=store.row_key(**identity)[:12], context=context, parameters=parameters)


@contextmanager
def client_errors(address: str, trouble: str) -> Iterator[None]:
    """What the client raises about a server as a whole, as a LabError. trouble: what the server fails at."""
    import openai

    try:
        yield
    except openai.APIConnectionError as error:
        why = "does not answer in time" if isinstance(error, openai.APITimeoutError) else "is not reachable"
        message = f"The server {address} {why}: start it, or correct the address."
        raise LabError(message, Failure.SERVER) from None
    except openai.AuthenticationError:
        remedy = f"put its key into the variable {KEY_VARIABLES[0]} or {KEY_VARIABLES[1]}"
        raise LabError(f"The server {address} refuses the key: {remedy}.", Failure.SERVER) from None
    except (openai.OpenAIError, ValueError, AttributeError, TypeError, EOFError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        hint = "is it OpenAI-compatible, and is this the address that ends in /v1?"
        raise LabError(f"The server {address} {trouble} ({reason}): {hint}", Failure.SERVER) from None
