"""Models behind an OpenAI-compatible server, before any is asked: its client, its list, what it says of each.

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
LATE_S = 1.0  # beyond a request's limit, for those who look at it themselves
LIST_S = 10.0  # that a list of models may take
SAID = ("id", "root", "max_model_len", "meta")  # of a model in a server's list: what it is


class _Clock(threading.local):
    """When this thread's latest try was sent, and after what time it sends none."""

    began, until = 0.0, math.inf


CLOCK = _Clock()


def client_of(address: str) -> OpenAI:
    """A client of the server, its key from the environment. Proxies are not asked for this machine."""
    import openai

    def limited(response: Any) -> None:  # though comments or bytes come again and again
        parts, most = response.iter_raw, response.request.extensions["timeout"]["read"] + LATE_S

        def iter_raw(*size: Any) -> Iterator[bytes]:
            for part in parts(*size):
                if time.perf_counter() - CLOCK.began > most:
                    raise openai.APITimeoutError(request=response.request)
                yield part

        response.iter_raw = iter_raw

    def started(request: Any) -> None:  # also by each retry
        CLOCK.began = time.perf_counter()
        if CLOCK.began > CLOCK.until:
            raise openai.APITimeoutError(request=request)

    local = urlsplit(address).hostname in ("localhost", "127.0.0.1", "::1")
    http = openai.DefaultHttpxClient(
        event_hooks={"request": [started], "response": [limited]}, trust_env=not local
    )
    key = next(filter(None, (os.environ.get(name, "").strip() for name in KEY_VARIABLES)), "none")
    base = address.removesuffix("/completions").removesuffix("/chat")
    return openai.OpenAI(base_url=base, api_key=key, max_retries=RETRIES, http_client=http)


def list_models(address: str) -> dict[str, dict[str, Any]]:
    """The entries of a server's list by the model's id; most hold little. Raises LabError."""
    with client_errors(address, "gives no list of models"), client_of(address) as client:
        CLOCK.until = math.inf
        entries = client.with_options(timeout=LIST_S).models.list().data
        return {str(entry.id): entry.model_dump() for entry in entries or []}


def look_up(spec: ModelSpec) -> ModelSpec:
    """The spec with what its server says of the model. Raises LabError for a server that is down, and for a
    model that it lacks, with the nearest of its own.

    ``transformers serve`` lists no folders: a path, or any name where the list is empty, is asked for later.
    """
    address, _, model = spec.source.partition("#")
    listed = list_models(address)
    if model not in listed and listed and not Path(model).is_absolute():
        near = difflib.get_close_matches(model, listed, n=3, cutoff=0.4) or sorted(listed)[:5]
        raise LabError(f"The server {address} has no model {model!r}: it has {', '.join(near)}.")
    entry = listed.get(model, {"id": model})
    meta = entry["meta"] if isinstance(entry.get("meta"), dict) else {}  # llama.cpp's
    sizes = (entry.get("max_model_len") or meta.get("n_ctx_train"), meta.get("n_params"))
    context, parameters = (size if type(size) is int and size > 0 else None for size in sizes)
    said, created = {name: entry.get(name) for name in SAID}, entry.get("created")
    if type(created) is int and abs(created - time.time()) > 60:  # llama.cpp's and vLLM's is the time of day
        said["created"] = created
    return replace(spec, revision=store.row_key(**said)[:12], context=context, parameters=parameters)


@contextmanager
def client_errors(address: str, trouble: str) -> Iterator[None]:
    """What the client raises about a server as a whole, as a LabError."""
    import openai

    try:
        yield
    except openai.APIConnectionError as error:
        late = isinstance(error, openai.APITimeoutError)
        why = "does not answer in time" if late else "is not reachable"
        problem = f"The server {address} {why}: start it, or correct the address."
        raise LabError(problem, Failure.SERVER) from None
    except openai.AuthenticationError:
        key = f"put its key into the variable {KEY_VARIABLES[0]} or {KEY_VARIABLES[1]}"
        raise LabError(f"The server {address} refuses the key: {key}.", Failure.SERVER) from None
    except (openai.OpenAIError, ValueError, AttributeError, TypeError, EOFError) as error:
        first = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        hint = "is it OpenAI-compatible, and is this the address that ends in /v1?"
        raise LabError(f"The server {address} {trouble} ({first}): {hint}", Failure.SERVER) from None
