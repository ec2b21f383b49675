import pytest

from .tiny import model_of, tokenizer_of


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_of("spaced")


@pytest.fixture(scope="module")
def model(tokenizer):
    return model_of(tokenizer)
