"""Caches filled without a model."""

import copy
import json

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from raas_cache import list_methods
from raas_cache.bench import filling
from raas_cache.bench.filling import Filler, build_model, fast_forward, load_config
from raas_cache.cache.shares_file import write_shares
from raas_cache.methods.registry import POLICIES

from .tiny import BUDGET, CONFIG, CPU, LAYERS, PAGE, TOKEN_BYTES


def filler(layers=LAYERS, page_size=PAGE, seed=0):
    options = {"batch": 2, "budget": BUDGET, "dtype": torch.float32, "device": CPU}
    return Filler(LlamaConfig(**{**CONFIG, "num_hidden_layers": layers}), page_size=page_size, seed=seed, **options)


def held(cache, layer, row, head):
    positions = cache.resident_positions(layer)[row, head]
    return positions[positions >= 0].tolist()


@pytest.mark.parametrize("method", list_methods())
@pytest.mark.parametrize("seen", [1, 50, 998, 100_000])
def test_filled_caches_have_seen_the_tokens_and_decode_on(model, method, seen):
    if not POLICIES[method].evicts:
        seen = min(seen, 998)
    cache = filler().paged(method, seen)

    def check(now):
        assert all(layer.get_seq_length() == now for layer in cache.layers)
        for layer in range(LAYERS):
            for row, head in ((0, 0), (1, 1)):
                positions = held(cache, layer, row, head)
                assert len(positions) == len(set(positions))
                assert {0, now - 1} <= set(positions) <= set(range(now)), "the prompt's first page, the newest token"
                if not POLICIES[method].evicts:
                    assert len(positions) == now
                elif now >= BUDGET + 2 * PAGE:
                    assert BUDGET - PAGE < len(positions) <= BUDGET

    check(seen)
    evicted = [cache.evicted_pages(layer) for layer in range(LAYERS)]
    with torch.no_grad():
        for step in range(3 * PAGE):
            position = torch.full((2, 1), seen + step)
            model(input_ids=torch.ones_like(position), past_key_values=cache, position_ids=position)
    check(seen + 3 * PAGE)
    if POLICIES[method].evicts and seen >= BUDGET + 2 * PAGE:
        for layer in range(LAYERS):
            assert torch.equal(cache.evicted_pages(layer), evicted[layer] + 3)


def test_the_newest_tokens_are_resident():
    for method in ("raas", "streaming_llm"):
        cache = filler().paged(method, 998)
        # 998 = 249 pages and two tokens, in an open page.
        assert set(held(cache, 0, 0, 0)) >= set(range(996 - PAGE, 998)), method
    assert set(held(cache, 0, 0, 0)) == {0, 1, 2, 3, *range(998 + 2 - BUDGET + PAGE, 998)}, "all but the sink is new"


def test_fast_forward_is_where_streaming_really_gets_to():
    """Its evictions do not depend on what the tokens are, so the long way can be gone too."""
    quick, slow = filler().paged("streaming_llm", 470), filler().paged("streaming_llm", 70)
    for _ in range(400):
        filler().feed(slow, 1)
    assert sorted(held(quick, 1, 1, 1)) == sorted(held(slow, 1, 1, 1))
    for ours, theirs in zip(quick.layers, slow.layers, strict=True):
        assert torch.equal(ours.engine.kv.clock, theirs.engine.kv.clock)
        priorities = [
            kv.priority.masked_fill(~kv.held, float("-inf")).sort(-1).values
            for kv in (ours.engine.kv, theirs.engine.kv)
        ]
        assert torch.equal(*priorities)
        assert np.array_equal(ours.table.counts.seen, theirs.table.counts.seen)
        assert np.array_equal(ours.table.evicted, theirs.table.evicted)


@pytest.mark.parametrize("method", ["raas", "h2o", "tova"])
def test_fast_forward_changes_when_but_not_what(method):
    here = filler().paged(method, 90)
    there = copy.deepcopy(here)
    fast_forward(there, 25)
    for cache in (here, there):
        source = filler(seed=7)
        for _ in range(5 * PAGE):
            source.feed(cache, 1)
    for one, other in zip(here.layers, there.layers, strict=True):
        assert torch.equal(one.keys, other.keys), "other pages were evicted"
        pinned = one.table.counts.pinned_pages[0] * PAGE
        before, after = one.engine.kv.positions, other.engine.kv.positions
        assert torch.equal(before[..., :pinned], after[..., :pinned])
        assert torch.equal(before[..., pinned:] + 25 * PAGE, after[..., pinned:])
        assert np.array_equal(other.table.evicted, one.table.evicted + 25)


def test_what_was_filled_once_serves_all_lengths():
    source = filler()
    caches = {seen: source.paged("raas", seen) for seen in (998, 30, 251, 998 + PAGE)}
    source.feed(caches[251], 1)
    assert {seen: cache.get_seq_length() for seen, cache in caches.items()} == {998: 998, 30: 30, 251: 252, 1002: 1002}
    keys = [caches[seen].layers[0].keys for seen in (251, 998, 1002)]
    assert len({key.data_ptr() for key in keys}) == 3
    assert [max(held(caches[seen], 0, 0, 0)) for seen in (251, 998, 1002)] == [251, 997, 1001]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("page_size", [1, 16, 32])
def test_the_prompt_leaves_room_in_small_budgets(page_size):
    for method in ("raas", "h2o"):
        cache = filler(page_size=page_size).paged(method, 998)
        assert BUDGET - page_size < cache.resident_tokens(0).max() <= BUDGET
        assert cache.nbytes == 2 * BUDGET * TOKEN_BYTES
        assert cache.evicted_pages(0).min() > 0


def test_layers_of_one_policy_are_copies_apart():
    cache = filler().paged("raas", 998)
    one, other = cache.layers
    assert torch.equal(one.keys, other.keys) and one.keys.data_ptr() != other.keys.data_ptr()
    quest = filler(layers=4).paged("quest", 100)
    assert [layer.settings.policy.name for layer in quest.layers] == ["dense", "dense", "quest", "quest"]
    assert [layer.settings.has_key_bounds for layer in quest.layers] == [False, False, True, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_are_built_in_their_dtype(dtype, config_folder):
    built = build_model(load_config(str(config_folder)), CPU, dtype)
    assert built.dtype == dtype and not built.training
    assert {parameter.dtype for parameter in built.parameters()} == {dtype}
    assert torch.equal(built.lm_head.weight, build_model(load_config(str(config_folder)), CPU, dtype).lm_head.weight)


def test_named_models():
    assert filling.kv_shape(load_config("small")) == (6, 6, 2, 64)
    assert filling.kv_shape(load_config("llama-3-8b")) == (32, 32, 8, 128)
    with torch.device("meta"):
        big = build_model(load_config("llama-3-8b"), torch.device("meta"), torch.bfloat16)
    assert sum(parameter.numel() for parameter in big.parameters()) == 8_030_261_248


def test_other_layers_than_full_attention_are_refused(tmp_path):
    config = {**CONFIG, "model_type": "mistral", "sliding_window": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"\(mistral\) has layers that do not cache plain keys"):
        load_config(str(tmp_path))


@pytest.fixture
def shares(tmp_path):
    """A file of shares by KV head."""
    write_shares(tmp_path / "shares.json", [[1.5, 0.5], [0.5, 1.5]], {})
    return tmp_path / "shares.json"


@pytest.mark.parametrize("seen", [20, 70, 998])
def test_shares_by_head(model, seen, shares):
    """Each KV head holds its own number of pages, whether the cache was fast-forwarded or not."""
    cache = filler().paged(f"raas:shares={shares}", seen)
    assert all(layer.get_seq_length() == seen for layer in cache.layers)
    with torch.no_grad():
        for step in range(2 * PAGE):
            position = torch.full((2, 1), seen + step)
            model(input_ids=torch.ones_like(position), past_key_values=cache, position_ids=position)
    # Half of the 16 pages are the prompt's: the heads have 12 and 4 decode pages.
    held = [cache.resident_tokens(layer)[0].tolist() for layer in range(LAYERS)]
    if seen == 998:
        assert [[-(-tokens // PAGE) for tokens in heads] for heads in held] == [[8 + 12, 8 + 4], [8 + 4, 8 + 12]]
        assert cache.evicted_pages(0)[0].tolist() == [(998 + 2 * PAGE - 32 + 3) // PAGE - pages for pages in (12, 4)]
    assert cache.nbytes <= filler().paged("raas", 998).nbytes
    positions = cache.resident_positions(0)[0, 0]
    assert positions.max() == seen + 2 * PAGE - 1


def test_fast_forward_with_shares_is_where_the_cache_really_gets_to(shares):
    method = f"streaming_llm:shares={shares}"
    quick, slow = filler().paged(method, 470), filler().paged(method, 70)
    for _ in range(400):
        filler().feed(slow, 1)
    for layer in range(LAYERS):
        for head in range(2):
            assert sorted(held(quick, layer, 1, head)) == sorted(held(slow, layer, 1, head))
        assert torch.equal(quick.evicted_pages(layer), slow.evicted_pages(layer))


@pytest.mark.parametrize("option", ["page_size=8", "min_decode_pages=1", "prompt='evict'", "offloading=True"])
def test_options_of_all_methods_are_refused(option):
    name = option.partition("=")[0]
    with pytest.raises(ValueError, match=f"bench times all methods with the same '{name}': remove it here"):
        filling.new_cache(f"raas:{option}", BUDGET)
