"""How a notebook's kernel is forked: a provisioner for jupyter_client, in effect where a fork server runs."""

from __future__ import annotations

import os
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

from jupyter_client.provisioning import KernelProvisionerFactory, LocalProvisioner

from nbhelpers.runner.forked import ADDRESS, Forked

NAME = "nbhelpers-fork"


class ForkingProvisioner(LocalProvisioner):
    """Local kernels, of this interpreter, that come from the fork server; any other is started plainly."""

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> Any:
        if cmd[:2] != [sys.executable, "-m"]:
            return await super().launch_kernel(cmd, **kwargs)
        cwd = str(kwargs.get("cwd") or Path.cwd())
        with Path(os.devnull).open("r+b", buffering=0) as null:
            try:
                forked = Forked(cmd[2:], kwargs["env"], (null.fileno(), 1, 2), cwd)
            except OSError as error:
                print(f"this kernel is started plainly: {error}", file=sys.stderr, flush=True)
                return await super().launch_kernel(cmd, **kwargs)
        self.process = forked  # type: ignore[assignment]
        self.pid = self.pgid = forked.pid
        return self.connection_info


def use_fork_server() -> None:
    """Have this process's kernels forked, if it was told the address of a server."""
    if ADDRESS in os.environ:
        factory = KernelProvisionerFactory.instance()
        where = f"{__name__}:{ForkingProvisioner.__name__}"
        factory.provisioners[NAME] = EntryPoint(NAME, where, factory.GROUP_NAME)
        factory.default_provisioner_name = NAME
