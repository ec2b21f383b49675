"""A dropped cache is freed at once, not when the cycle collector happens to run: on a GPU a dead store is the memory of
the next one.
"""

import copy
import gc
import weakref
from contextlib import suppress

import pytest
import torch

from raas_cache import DenseCache, RaaSCache, from_name, list_methods, record
from raas_cache.serving.packed_forward import PackedForward

from ..architectures import build
from ..helpers import generate, prompt, tiny_model
from ..serving.alone import answers, requests
from ..serving.alone import rows as rows_of


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(autouse=True)
def without_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def store_of(cache):
    return weakref.ref(cache.layers[0].keys)


def forwards(model, cache):
    """Without `generate`: the cache then looks for the model among the functions that call it."""
    with torch.no_grad():
        for length in (12, 1, 5):
            model(prompt(length=length)["input_ids"], past_key_values=cache)


def with_gradients(model, cache):
    for length in (12, 1, 5):
        model(prompt(length=length)["input_ids"], past_key_values=cache)


def drafts(model, cache):
    generate(model, prompt(), cache, 20, sample=False, prompt_lookup_num_tokens=3)


def beams(model, cache):
    generate(model, prompt(), cache, 20, sample=False, num_beams=3)


def rows(model, cache):
    ids = prompt(length=12)["input_ids"]
    with torch.no_grad():
        with cache.admit(0, batch_size=2):
            model(ids, past_key_values=cache)
        with cache.on_rows(0):
            model(ids[:, :1], past_key_values=cache)


def a_recording(model, cache):
    with record(cache):
        generate(model, prompt(), cache, 20)


def a_reset(model, cache):
    generate(model, prompt(), cache, 20)
    cache.reset()
    generate(model, prompt(), cache, 20)


def a_refusal(model, cache):
    forwards(model, cache)
    with suppress(ValueError):
        model(prompt(length=1)["input_ids"], past_key_values=cache, output_attentions=True)


def a_refused_prompt(model, cache):
    with suppress(ValueError):
        model(**prompt(), past_key_values=cache, output_attentions=True)


def out_of_memory_in_a_step(model, cache):
    forwards(model, cache)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("raas_cache.engine.forward.step", out_of_memory)
        with suppress(torch.OutOfMemoryError):
            model(prompt(length=1)["input_ids"], past_key_values=cache)


def out_of_memory_in_a_prompt(model, cache):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.nn.functional.scaled_dot_product_attention", out_of_memory)
        with suppress(torch.OutOfMemoryError):
            model(**prompt(), past_key_values=cache)


def out_of_memory(*args, **kwargs):
    raise torch.OutOfMemoryError


@pytest.mark.parametrize(
    "use",
    [
        forwards,
        with_gradients,
        drafts,
        beams,
        rows,
        a_recording,
        a_reset,
        a_refusal,
        a_refused_prompt,
        out_of_memory_in_a_step,
        out_of_memory_in_a_prompt,
    ],
)
def test_after(model, use):
    cache = RaaSCache(64, page_size=4)
    use(model, cache)
    keys = store_of(cache)
    del cache
    assert keys() is None


@pytest.mark.parametrize("name", list_methods())
def test_every_method(model, name):
    cache = from_name(name, 64, page_size=4)
    generate(model, prompt(), cache, 40)
    keys = store_of(cache)
    del cache
    assert keys() is None


@pytest.mark.parametrize("use", [forwards, drafts])
def test_a_latent(use):
    cache = RaaSCache(64, page_size=4)
    use(build("deepseek_v3"), cache)
    keys = store_of(cache)
    del cache
    assert keys() is None


def test_shares_of_the_kv_heads(model):
    cache = RaaSCache(64, page_size=4, shares=[[0.5, 1.5]] * 2)
    forwards(model, cache)
    keys = [weakref.ref(part.keys) for part in cache.layers[0].parts]
    del cache
    assert [key() for key in keys] == [None, None]


def test_forwards_of_continuous_batching(model, monkeypatch):
    monkeypatch.setattr(gc, "collect", lambda: 0)  # transformers calls it when the batching ends
    with rows_of(model) as manager:
        answers(manager, requests(3))
    assert not any(isinstance(one, PackedForward) for one in gc.get_objects())


def test_a_copy_does_not_keep_its_original(model):
    cache = DenseCache(64)
    generate(model, prompt(), cache, 5)
    other, keys = copy.deepcopy(cache), store_of(cache)
    del cache
    assert keys() is None and other.get_seq_length() == 24
