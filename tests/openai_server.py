"""A small OpenAI-compatible server on 127.0.0.1 that answers by plan, and misbehaves by plan.

Protocol: platform.openai.com/docs/api-reference, models, chat completions and completions, streamed.
"""

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Fault:
    """What happens to one answer instead of the right thing."""

    status: int = 200  # another one is the whole answer
    headers: dict[str, str] = field(default_factory=dict)
    sent: int | None = None  # pieces, then what ``then`` says
    then: str = (
        ""  # "drop": the connection breaks; "end": it ends well; "stall"; "drip"; or a line sent as it is
    )
    drip: str = ""  # sent again and again, stall_s long
    stall_s: float = 5.0


def words(prompt: str, seed: int | None) -> list[str]:
    """An answer that its prompt and seed decide: 12 words."""
    digest = hashlib.sha256(f"{prompt} {seed}".encode()).hexdigest()
    return [f" w{digest[n : n + 4]}" for n in range(0, 48, 4)]


@dataclass
class Server:
    models: list[dict] = field(default_factory=lambda: [{"id": "tiny"}, {"id": "large:7b"}])
    answer: Callable[[str, int | None], list[str]] = words  # pieces, by prompt and seed
    # What is told of the tokens, by pieces sent; None: nothing.
    usage: Callable[[int], dict | None] = lambda n: {"prompt_tokens": 7, "completion_tokens": n}
    echo: Callable[[str], dict] | None = None  # logprobs of a prompt and one token more; None: it tells none
    chat: int = 200  # status of chat completions, as 404 where there are none
    refused: tuple[str, ...] = ()  # fields that make a request a bad one
    reason: str = "length"
    delta: str = "content"  # the field of a chat's pieces
    first_s: float = 0.0  # waits before the first piece
    piece_s: float = 0.0  # and between two
    key: str = ""  # without it: 401
    faults: list[Fault] = field(default_factory=list)  # of the next answers
    requests: list[dict] = field(default_factory=list)  # bodies
    times: list[float] = field(default_factory=list)  # of each, time.monotonic
    own: list[list[float]] = field(default_factory=list)  # when each answer was asked for and its pieces sent
    alive: int = 0  # answers under way
    most: int = 0  # at a time, so far
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def serve(**given: object) -> Iterator[Server]:
    made = Server(**given)

    class Handler(_Handler):
        state = made

    with _Quiet(("127.0.0.1", 0), Handler) as server:
        made.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield made
        finally:
            server.shutdown()
            thread.join()


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no error of the server."""


class _Handler(BaseHTTPRequestHandler):
    state: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # pieces go out when they are written

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        if not self._allowed():
            return
        if self.path != "/v1/models":
            return self._send(404, {"error": {"message": "not found"}})
        self._send(200, {"object": "list", "data": [{"object": "model"} | one for one in self.state.models]})

    def do_POST(self) -> None:
        state, body = self.state, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._allowed():
            return
        chat = self.path == "/v1/chat/completions"
        with state.lock:
            state.requests.append(body | {"path": self.path})
            state.times.append(time.monotonic())
            fault = state.faults.pop(0) if state.faults else Fault()
            state.own.append(sent := [time.perf_counter()])
        status = state.chat if chat else 200
        if {one["id"] for one in state.models}.isdisjoint({body["model"]}):
            status = 404
        if bad := [name for name in state.refused if name in body]:
            status = 400
        if status != 200 or fault.status != 200:
            status = fault.status if status == 200 else status
            return self._send(status, {"error": {"message": f"refused {bad}"}}, fault.headers)
        if body.get("echo"):
            told = state.echo(body["prompt"]) if state.echo else None
            one = {"index": 0, "finish_reason": "length", "text": body["prompt"], "logprobs": told}
            about = {"id": "1", "object": "text_completion", "created": 1, "model": body["model"]}
            return self._send(200, about | {"choices": [one]})
        with state.lock:
            state.alive += 1
            state.most = max(state.most, state.alive)
        try:
            done = self._stream(body, chat, fault, sent)
        finally:
            with state.lock:  # before the client knows, or its next request would count as company
                state.alive -= 1
        self.wfile.write(done)

    def _stream(self, body: dict, chat: bool, fault: Fault, sent: list[float]) -> bytes:
        """Sends all but the returned end."""
        state = self.state
        prompt = body["messages"][-1]["content"] if chat else body["prompt"]
        pieces = state.answer(prompt, body.get("seed"))[: body["max_tokens"]]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        time.sleep(state.first_s)
        for n, piece in enumerate(pieces[: fault.sent]):
            time.sleep(state.piece_s if n else 0.0)
            self._event({"choices": [self._choice(chat, piece)]})
            sent.append(time.perf_counter())
        if fault.then == "drop":
            return b"data: {"
        if fault.then == "stall":
            time.sleep(fault.stall_s)
        elif fault.then == "drip":
            for _ in range(int(fault.stall_s / 0.2)):
                self.wfile.write(fault.drip.encode())
                time.sleep(0.2)
        elif fault.then not in ("", "end"):
            self.wfile.write(f"data: {fault.then}\n\n".encode())
        if not fault.then:
            self._event({"choices": [self._choice(chat, "", state.reason)]})
            if usage := state.usage(len(pieces)):
                self._event({"choices": [], "usage": usage})
        return b"data: [DONE]\n\n"

    def _choice(self, chat: bool, piece: str, reason: str | None = None) -> dict:
        part = {"delta": {self.state.delta: piece}} if chat else {"text": piece}
        return {"index": 0, "finish_reason": reason} | part

    def _event(self, data: dict) -> None:
        data = {"id": "1", "object": "chunk", "created": 1, "model": "tiny"} | data
        self.wfile.write(f"data: {json.dumps(data)}\n\n".encode())
        self.wfile.flush()

    def _allowed(self) -> bool:
        if self.state.key and self.headers.get("Authorization") != f"Bearer {self.state.key}":
            said = f"Incorrect API key provided: {self.headers.get('Authorization')}"
            self._send(401, {"error": {"message": said}})
            return False
        return True

    def _send(self, status: int, data: object, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(data).encode()
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
