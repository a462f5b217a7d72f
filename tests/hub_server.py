"""A small Hub on 127.0.0.1: enough of its protocol to serve model folders, refuse some, and misbehave.

Repositories are folders; a revision is "main" or a branch. Protocol: huggingface_hub's HfApi and
hf_hub_download: model info, tree with sizes and sha256, resolve with ETag, commit and size, ranges; files of
safetensors are large files (LFS), which resolve redirects to another address.
"""

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit


@dataclass(frozen=True)
class Fault:
    """What happens to one transfer of a file instead of the right thing."""

    status: int = 200  # another one is the whole answer
    headers: dict[str, str] = field(default_factory=dict)
    sent: int | None = None  # the connection breaks after so many bytes of the answer
    slow_s: float = 0.0  # the body comes byte by byte, so many seconds apart
    body: bytes | None = None  # other content


@dataclass
class Repository:
    revisions: dict[str, Path]  # "main" or a branch -> folder
    refuse: tuple[int, str] | None = None  # HTTP status and X-Error-Code for every file
    faults: dict[str, list[Fault]] = field(default_factory=dict)  # file, or "api" -> of its next transfers
    listed: tuple[dict, ...] = ()  # further rows of the file list
    token: str = ""  # without it in the request: 401

    def commit(self, revision: str) -> str:
        return hashlib.sha1(f"{revision} {self.revisions[revision].name}".encode()).hexdigest()

    def folder(self, revision: str) -> Path | None:
        return next((f for name, f in self.revisions.items() if revision in (name, self.commit(name))), None)


@dataclass
class Hub:
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # of each request, time.monotonic
    served: Counter = field(default_factory=Counter)  # file -> bytes of its content that were sent
    url: str = ""


@contextmanager
def serve(repositories: dict[str, Repository]) -> Iterator[Hub]:
    hub = Hub(repositories)

    class Handler(_Handler):
        state = hub

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        self.state.requests.append(f"{self.command} {urlsplit(self.path).path}")
        self.state.times.append(time.monotonic())

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if parts[:2] == ["api", "models"]:
            self._api("/".join(parts[2:4]), parts[4:])
        elif len(parts) > 4 and parts[2] in ("resolve", "large"):
            self._file("/".join(parts[:2]), "/".join(parts[3:-1]), parts[-1], parts[2] == "large")
        else:
            self._send(404, b"")

    def _api(self, name: str, rest: list[str]) -> None:
        repository = self.state.repositories.get(name)
        if repository is None:  # the real Hub tells the anonymous no more than this
            return self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        if repository.faults.get("api"):
            fault = repository.faults["api"].pop(0)
            return self._send(fault.status, b"{}", fault.headers)
        revision = "/".join(rest[1:]) or "main"
        folder = repository.folder(revision)
        if folder is None:
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        files = sorted(path for path in folder.iterdir() if path.is_file())
        if rest[:1] == ["tree"]:
            return self._json([_row(path) for path in files] + list(repository.listed))
        commit = next(
            repository.commit(r) for r in repository.revisions if revision in (r, repository.commit(r))
        )
        siblings = [{"rfilename": path.name} for path in files]
        self._json({"id": name, "sha": commit, "private": False, "tags": [], "siblings": siblings})

    def _file(self, name: str, revision: str, file: str, large: bool) -> None:
        repository = self.state.repositories[name]
        folder = repository.folder(revision)
        if repository.token and self.headers.get("Authorization") != f"Bearer {repository.token}":
            return self._send(401, b"", {"X-Error-Code": "GatedRepo"})
        if repository.refuse:
            status, code = repository.refuse
            return self._send(status, b"", {"X-Error-Code": code} if code else {})
        if folder is None:
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if not (folder / file).is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        commit = next(repository.commit(r) for r, place in repository.revisions.items() if place == folder)
        headers = {"ETag": f'"{_etag(folder / file)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if not large and _is_large(folder / file):
            headers |= {"X-Linked-Etag": headers["ETag"], "Location": f"/{name}/large/{commit}/{quote(file)}"}
            headers["X-Linked-Size"] = str((folder / file).stat().st_size)
            return self._send(302, b"", headers)
        faults = repository.faults.get(file)
        fault = faults.pop(0) if faults and self.command == "GET" else Fault()
        if fault.status != 200:
            return self._send(fault.status, b"", fault.headers)
        body = (folder / file).read_bytes() if fault.body is None else fault.body
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        self._send(206 if start else 200, body[start:], headers, fault, file)

    def _json(self, data: object) -> None:
        self._send(200, json.dumps(data).encode(), {"Content-Type": "application/json"})

    def _send(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        fault: Fault | None = None,
        file: str = "",
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        fault = fault or Fault()
        self.close_connection = self.close_connection or fault.sent is not None
        sent = body[: fault.sent]
        try:
            for piece in (sent,) if not fault.slow_s else (bytes([byte]) for byte in sent):
                self.wfile.write(piece)
                self.state.served[file] += len(piece)
                time.sleep(fault.slow_s)
        except ConnectionError:  # the client was stopped
            self.close_connection = True


def _is_large(path: Path) -> bool:
    return path.suffix == ".safetensors"


def _row(path: Path) -> dict:
    row = {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": _blob(path)}
    if _is_large(path):
        row["oid"] = "0" * 40  # git's name of the pointer, not of the content
        row["lfs"] = {"oid": _etag(path), "size": row["size"], "pointerSize": 135}
    return row


def _blob(path: Path) -> str:
    """The name that git gives a file: sha1 over its size and content."""
    body = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


def _etag(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if _is_large(path) else _blob(path)
