import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from raas_cache import embedded_model


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded_model())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32).eval()
