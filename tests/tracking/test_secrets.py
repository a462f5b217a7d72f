"""No password, token or key of the environment stands in anything that a run writes or prints."""

import json
import os
import re
import subprocess
import sys
from urllib.parse import quote, unquote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import make_url

from nbhelpers.records import LabError
from nbhelpers.tracking import mlflow_run

RESERVED = "/@:?#%&=[] +;,$!*()'\"`\\|^{}<>~"
SECRET = "".join(f"zqx{number:03}{mark}" for number, mark in enumerate(RESERVED)) + "zqx999"
LEAK = re.compile(r"zqx(0[0-3]\d|999)")  # few forms: the pictures of a page are megabytes of base64
ENCODED = quote(SECRET, safe="")
POSTGRES = "postgresql://user:{}@127.0.0.1:1/db"
KEYS = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")


def planted(address: str, password: str) -> dict[str, str]:
    """Variables that hold the secret: as it is, and in addresses, where it should be encoded."""
    addresses = dict.fromkeys(PROXIES, f"http://user:{password}@127.0.0.1:1")
    addresses["MLFLOW_TRACKING_URI"] = address.format(password)
    addresses["HF_ENDPOINT"] = f"http://user:{ENCODED}@127.0.0.1:1"
    return dict.fromkeys(KEYS, SECRET) | addresses | {"MLFLOW_TRACKING_USERNAME": "user"}


def test_a_run_tells_no_secret(tmp_path):
    """Neither the run itself, whose secrets stand as they are, nor its resumption with encoded ones."""
    outputs = tmp_path / "outputs"
    places = {"NBHELPERS_OUTPUTS": str(outputs), "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    for command, address, password in (
        ("lab-gpt2 nobody/nothing --limit 2 --repeats 1 --max-new-tokens 8 --out", POSTGRES, SECRET),
        ("--resume", "http://user:{}@127.0.0.1:1/x", ENCODED),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "nbhelpers.cli", "run", *command.split(), str(outputs / "run")],
            capture_output=True,
            text=True,
            env=os.environ | planted(address, password) | places,
            timeout=300,
        )
        print(done.stdout, done.stderr)
        assert done.returncode == 1
        assert not LEAK.search(done.stdout + done.stderr)
        written = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert outputs / "run" / "lab-gpt2" / "result.json" in written
        assert "06_tracking: " in done.stdout  # tracking failed, and the run says so
        for path in written:
            assert not LEAK.search(path.read_bytes().decode("latin-1")), path
            assert not LEAK.search(str(path))


@settings(max_examples=200, deadline=None)
@given(st.text("zqx01aB" + RESERVED + "é", min_size=6, max_size=20), st.sampled_from(["http", "postgresql"]))
def test_an_address_is_shown_without_its_password_whatever_that_is(password, scheme):
    encoded = quote(password, safe="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"{scheme}://user:{encoded}@host:1/db?password={encoded}&x=1")
        assert mlflow_run.shown_uri() == f"{scheme}://host:1/db"
        for form in (password, encoded, quote(password), repr(password)[1:-1], json.dumps(password)[1:-1]):
            assert str(LabError(f"cannot connect to ({form})")) == "cannot connect to (***)"
        # As it is: where every parser ends it at the same place it is used, anything else is refused.
        patch.setenv("MLFLOW_TRACKING_URI", f"{scheme}://user:{password}@host:1/db")
        if set(password) & set("/?#@[] "):
            with pytest.raises(LabError, match=r"MLflow at MLFLOW_TRACKING_URI is refused: write .* %2F"):
                mlflow_run.shown_uri()
        else:
            url = make_url(mlflow_run.tracking_uri())
            assert (url.host, url.password) == ("host", unquote(password))
            assert mlflow_run.shown_uri() == f"{scheme}://host:1/db"


def test_paths_words_and_switches_are_no_secrets(monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////home/me@work:lab/mlflow.db")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:8080")
    told = "1 of 10 in /home/me@work:lab/mlflow.db by http://proxy:8080"
    assert str(LabError(told)) == told
    assert mlflow_run.shown_uri() == "sqlite:////home/me@work:lab/mlflow.db"
