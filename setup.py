"""What a wheel holds besides the package: notebooks, data and tools, so that it works outside a checkout."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HELD = ("notebooks", "data", "tools")
IGNORED = shutil.ignore_patterns("cache", "__pycache__", ".ipynb_checkpoints")


class WithLab(build_py):
    def run(self) -> None:
        super().run()
        for name in () if self.editable_mode else HELD:
            shutil.copytree(
                name, Path(self.build_lib, "nbhelpers", "lab", name), ignore=IGNORED, dirs_exist_ok=True
            )


setup(cmdclass={"build_py": WithLab})
