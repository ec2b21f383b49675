"""A tiny model, and what was timed of it."""

import json

import pytest
import torch
from transformers import LlamaConfig

from raas_cache.bench.filling import build_model
from raas_cache.bench.steps import Grid, run

from .tiny import BUDGET, CONFIG, CPU, PAGE


@pytest.fixture(scope="module")
def model():
    return build_model(LlamaConfig(**CONFIG), CPU, torch.float32)


@pytest.fixture(scope="module")
def rows(model):
    grid = Grid(("raas", "quest"), (40, 256), budgets=(BUDGET,), page_size=PAGE, steps=5)
    return [row for cell in run(model, grid) for row in cell]


@pytest.fixture
def config_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **CONFIG}))
    return tmp_path
