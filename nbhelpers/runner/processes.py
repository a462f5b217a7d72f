"""Have a process end with the one that started it."""

from __future__ import annotations

import contextlib
import os
import threading
import time


def end_with_parent() -> None:
    """Have this process, with its descendants, killed when the one that started it ends."""

    def watch(parent: int) -> None:
        import psutil

        while os.getppid() == parent:
            time.sleep(0.5)
        root = psutil.Process()
        for process in [*root.children(recursive=True), root]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    threading.Thread(target=watch, args=(os.getppid(),), daemon=True).start()
