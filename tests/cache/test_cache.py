"""What a user does with a cache besides generating: look at it, copy it, reorder its rows, send it away."""

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache, Qwen3NextConfig

from raas_cache import RaaSCache

from ..helpers import generate, prompt, resident_set, tiny_model


SETTINGS = {"page_size": 4, "alpha": 1e-2, "min_decode_pages": 2}


def state_of(cache):
    return [
        {name: tensor for name, tensor in vars(layer).items() if isinstance(tensor, torch.Tensor)}
        for layer in cache.layers
    ]


def assert_same_state(one, other):
    for ours, theirs in zip(state_of(one), state_of(other), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-9, atol=1e-9, msg=name)


def grown(model, inputs, tokens, **kw):
    """A cache after the prompt and `tokens` `[batch, n]`, one at a time."""
    cache = RaaSCache(48, **{**SETTINGS, **kw})
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        for i in range(tokens.shape[1]):
            model(tokens[:, i : i + 1], past_key_values=cache)
    return cache


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(1, 97, (3, 90), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("scoring", ["exact", "minmax"])
@pytest.mark.parametrize(
    ("operation", "rows"),
    [
        (lambda c: c.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda c: c.batch_select_indices(torch.tensor([1])), [1]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ],
    ids=["reorder", "select", "repeat"],
)
def test_rows_move_with_their_pages(model, tokens, operation, rows, scoring):
    inputs = prompt(3, 15, (0, 6, 2))
    cache = grown(model, inputs, tokens, scoring=scoring)
    operation(cache)
    moved = grown(model, {k: v[rows] for k, v in inputs.items()}, tokens[rows], scoring=scoring)
    assert_same_state(cache, moved)
    assert cache.batch_size == len(rows)
    with torch.no_grad():
        step = torch.full((len(rows), 1), 7)
        logits = [model(step, past_key_values=c).logits for c in (cache, moved)]
    torch.testing.assert_close(*logits, rtol=1e-9, atol=1e-9)


def test_beam_search_equals_dynamic_cache_at_full_budget(model):
    inputs = prompt(2, 15, (6, 0))
    beams = [
        generate(model, inputs, cache, 40, sample=False, num_beams=3) for cache in (DynamicCache(), RaaSCache(256))
    ]
    assert torch.equal(*beams)


def test_deepcopy_continues_alike_and_apart(model, tokens):
    cache = grown(model, prompt(3, 15), tokens)
    twin = copy.deepcopy(cache)
    with torch.no_grad():
        first = model(tokens[:, :1], past_key_values=cache).logits
        before = [t.clone() for t in state_of(twin)[0].values()]
        model(tokens[:, 1:2], past_key_values=cache)
        assert all(map(torch.equal, before, state_of(twin)[0].values())), "the copy shares memory with the original"
        assert torch.equal(model(tokens[:, :1], past_key_values=twin).logits, first)


def test_pickle_mid_generation(model, tokens):
    cache = grown(model, prompt(3, 15), tokens)
    loaded = pickle.loads(pickle.dumps(cache))
    assert_same_state(cache, loaded)
    with torch.no_grad():
        logits = [model(tokens[:, :1], past_key_values=c).logits for c in (cache, loaded)]
    assert torch.equal(*logits)


def test_repr_says_it_all_in_one_line(model):
    cache = RaaSCache(64, page_size=4)
    assert repr(cache) == "RaaSCache(budget=64, held=0, seen=0, evicted=0 pages, 0 bytes)"
    generate(model, prompt(2, 20), cache, 101)
    # 120 tokens seen: 5 prompt pages, 100 decode tokens = 25 pages, of which 11 fit; 14 x 2 layers x 2 rows x 2 heads
    assert repr(cache) == f"RaaSCache(budget=64, held=64, seen=120, evicted=112 pages, {cache.nbytes} bytes)"


def test_linear_attention_layers_count_no_kv_bytes():
    config = Qwen3NextConfig(num_hidden_layers=4)
    cache = RaaSCache(64, config=config)
    assert [type(layer).__name__ for layer in cache.layers] == ["LinearAttentionLayer"] * 3 + ["PagedLayer"]
    assert repr(cache) == "RaaSCache(budget=64, held=0, seen=0, evicted=0 pages, 0 bytes)"


def test_answers_of_the_cache_api(model):
    cache = RaaSCache(64, page_size=4)
    assert (cache.get_seq_length(), cache.get_max_length(), cache.get_max_length(0)) == (0, -1, -1)
    assert cache.is_compileable
    generate(model, prompt(2, 20, (3, 0)), cache, 101)
    assert (cache.get_seq_length(), cache.get_max_length()) == (120, -1)
    assert cache.get_mask_sizes(1, 0) == (1, 120)
    positions = cache.resident_positions(0)
    assert positions.dtype == torch.int64 and positions.shape == (2, 2, 64)
    assert cache.resident_tokens(0).tolist() == [[61, 61], [64, 64]]
    assert cache.evicted_pages(0).tolist() == [[14, 14], [14, 14]]
    assert resident_set(cache, 0, 0, 0) >= set(range(3, 20)), "the prompt stays"
    cache.crop(0)
    assert cache.get_seq_length() == 120


def test_gradients_do_not_reach_into_the_store(model):
    cache = RaaSCache(64, page_size=4)
    model(**prompt(1, 8), past_key_values=cache)
    for _ in range(3):
        logits = model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache).logits
    assert not any(t.requires_grad for t in state_of(cache)[0].values())
    assert logits.shape == (1, 1, 97)


def test_a_masked_decode_token_is_padding(model):
    """A row that has finished may be fed padding: it is never attended again."""
    cache = RaaSCache(64, page_size=4)
    mask = torch.ones(2, 12, dtype=torch.long)
    with torch.no_grad():
        model(**prompt(2, 8), past_key_values=cache)
        for step in range(4):
            mask[0, 8 + step] = int(step == 0)
            model(torch.ones(2, 1, dtype=torch.long), attention_mask=mask[:, : 9 + step], past_key_values=cache)
    assert resident_set(cache, 0, 0, 0) == set(range(9))
    assert resident_set(cache, 0, 1, 0) == set(range(12))
