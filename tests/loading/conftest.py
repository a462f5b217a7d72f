"""A small saved model for the tests of loading."""

import shutil

import pytest
from saved_models import make_model


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "tiny")
