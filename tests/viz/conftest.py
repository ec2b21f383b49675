"""Recordings to draw: two written by hand, and two of the embedded model."""

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from raas_cache import DenseCache, RaaSCache, embedded_model, read, record
from raas_cache.eval.chains import problems

from .by_hand import HELD, MASS, SCORES, recording_of


@pytest.fixture
def by_hand():
    return recording_of(HELD, SCORES)


@pytest.fixture
def dense_by_hand():
    held = [[first for first in (0, 2, 3, 5, 7, 9) if first <= step] for step in range(3, 11)]
    return recording_of(held, MASS, method="DensePolicy()")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded_model())


@pytest.fixture(scope="module")
def embedded(tokenizer):
    """Recordings of RaaS and of dense, of a chain of the embedded model, and its ids."""
    model = AutoModelForCausalLM.from_pretrained(embedded_model()).eval()
    (problem,) = problems(1, num_lines=50, seed=0)
    inputs = tokenizer(problem.prompt, return_tensors="pt", return_token_type_ids=False)
    cache, dense = RaaSCache(384, page_size=4), DenseCache(384, page_size=4)
    with record(cache) as recording:
        (ids,) = model.generate(**inputs, past_key_values=cache)
    with record(dense, layers=[1], heads=[0]) as everything:
        read(model, ids[None], inputs["input_ids"].shape[1], dense)
    return recording, everything, ids
