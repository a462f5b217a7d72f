"""The built wheel, installed into an environment of its own and used outside any checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """An environment with the wheel and this one's libraries, but without the checkout on its path."""
    folder = tmp_path_factory.mktemp("wheel")
    (source := folder / "source").mkdir()  # setuptools builds beside the files
    for name in ("nbhelpers", "notebooks", "data", "tools"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("cache", "__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = ["pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source)]
    subprocess.run([sys.executable, "-m", *build], check=True, capture_output=True, timeout=300)
    venv.create(folder / "env", symlinks=True)
    paths = {"base": str(folder / "env"), "platbase": str(folder / "env")}
    site = Path(sysconfig.get_path("purelib", vars=paths))
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    wheel = next(folder.glob("*.whl"))
    unpack = ["pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run([sys.executable, "-m", *unpack], check=True, capture_output=True, timeout=300)
    return folder


@pytest.fixture(scope="module")
def call(installed):
    place = installed / "work"
    place.mkdir()
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "NBHELPERS_OUTPUTS")}
    environment["JUPYTER_PATH"] = str(Path(sys.prefix, "share", "jupyter"))  # nbconvert's templates

    def run(*words: str) -> str:
        command = [str(installed / "env" / "bin" / "python"), "-m", "nbhelpers.cli", *words]
        done = subprocess.run(
            command, cwd=place, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_a_model_is_evaluated_outside_a_checkout(call, installed):
    assert "lab-llama" in call("models")
    doctor = call("doctor")
    assert str(installed / "work" / "outputs") in doctor and "ready" in doctor
    small = ["--limit", "2", "--repeats", "1", "--max-new-tokens", "16"]
    assert "only model with comparable results" in call("run", "lab-gpt2", *small)
    assert "index.html" in call("report", "latest")
    assert (installed / "work" / "outputs" / "index.html").is_file()


def test_a_copy_of_the_notebooks_is_used_from_its_own_folder(call, installed):
    call("lab", "mine")
    assert (installed / "work" / "mine" / "notebooks" / "00_start_here.ipynb").is_file()
