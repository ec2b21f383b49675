"""`read`: how well a model tells a given text in advance."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from raas_cache import RaaSCache, read

from ..helpers import prompt, tiny_model
from ..tracing.recorded import SMALL


pytestmark = pytest.mark.filterwarnings("ignore:budget=")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.mark.parametrize("padding", [(), (0, 5)])
def test_reading_is_what_one_forward_says(model, padding):
    """Nothing evicted: the log-likelihood of a text is that of a plain forward."""
    inputs, text = prompt(2, 14, padding=padding), prompt(2, 30, seed=5)["input_ids"]
    ids = torch.cat([inputs["input_ids"], text], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(text)], 1)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits[:, 13:-1]
    expected = cross_entropy(logits.transpose(1, 2).float(), text, reduction="none")
    cache = RaaSCache(budget=128)
    losses = read(model, ids, 14, cache, inputs["attention_mask"] if padding else None)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    assert cache.get_seq_length() == 43


@pytest.mark.parametrize("length", [0, 20, 21])
def test_nothing_to_read_is_refused(model, length):
    with pytest.raises(ValueError, match=f"prompt={length} must be less than the 20 tokens of ids"):
        read(model, prompt(1, 20)["input_ids"], length, RaaSCache(**SMALL))
