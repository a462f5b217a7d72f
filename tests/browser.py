"""A real browser for tests: headless Chromium, driven over its DevTools protocol."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import websocket

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Tab:
    """One page; ``run`` gives the value of a JavaScript expression, ``log`` is what the console said."""

    def __init__(self, address: str) -> None:
        self.socket = websocket.create_connection(address, timeout=60, suppress_origin=True)
        self.number, self.log = 0, list[str]()

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": params}))
        while (answer := json.loads(self.socket.recv())).get("id") != self.number:
            if answer.get("method") == "Log.entryAdded":
                self.log.append(answer["params"]["entry"]["text"])
        assert "error" not in answer, answer
        return answer["result"]

    def run(self, expression: str) -> Any:
        given = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        found = self.call("Runtime.evaluate", **given)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def press(self, key: str) -> None:
        codes = {"Tab": 9, "Escape": 27, "Enter": 13, " ": 32}
        given = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": codes[key]}
        text = {"Enter": "\r", " ": " "}.get(key)
        self.call("Input.dispatchKeyEvent", type="keyDown", **given, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **given)

    def open(self, page: Path, width: int = 1280, dark: bool = False) -> None:
        self.log.clear()
        self.call("Log.enable")
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=page.as_uri())
        until = time.monotonic() + 60
        while not self.run(
            f"document.readyState === 'complete' && location.href === {json.dumps(page.as_uri())}"
        ):
            assert time.monotonic() < until, f"{page} did not load"


@contextmanager
def browser(profile: Path) -> Iterator[Tab]:
    assert CHROMIUM
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--no-first-run"]
    process = subprocess.Popen(
        [CHROMIUM, *flags, f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        port, until = profile / "DevToolsActivePort", time.monotonic() + 60
        while not (port.exists() and port.read_text().count("\n")):
            assert time.monotonic() < until and process.poll() is None, "the browser did not start"
            time.sleep(0.05)
        place = f"http://127.0.0.1:{port.read_text().splitlines()[0]}/json/new?about:blank"
        with urlopen(Request(place, method="PUT"), timeout=60) as answer:
            yield Tab(json.load(answer)["webSocketDebuggerUrl"])
    finally:
        process.terminate()
        process.wait(30)
