import importlib.util

import pytest

from ..helpers import tiny_model
from .engines import Engines


# `make test-vllm` runs these tests, in an environment that has vLLM.
collect_ignore_glob = ["test_*.py"] if importlib.util.find_spec("vllm") is None else []


@pytest.fixture(scope="session")
def model():
    import torch

    return tiny_model(dtype=torch.float32)


@pytest.fixture(scope="session")
def folder(model, tmp_path_factory):
    """A folder with the model, without a tokenizer."""
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    return str(path)


@pytest.fixture
def engines(monkeypatch):
    """Starts vLLM in this process, and stops it after the test."""
    started = Engines(monkeypatch)
    yield started
    started.stop()
