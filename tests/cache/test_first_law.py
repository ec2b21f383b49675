"""The first law: as long as nothing is evicted, every token is DynamicCache's."""

import pytest
import torch
from transformers import (
    DynamicCache,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from raas_cache import RaaSCache

from ..helpers import generate, prompt, tiny_model


ARCHITECTURES = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {}),
    "mistral-no-window": (MistralConfig, {"sliding_window": None}),
    "phi3": (Phi3Config, {}),
    "granite": (GraniteConfig, {}),
    "olmo2": (Olmo2Config, {}),
    "smollm3": (SmolLM3Config, {}),
}
STEPS = 60
ROOMY = 256


@pytest.fixture(params=ARCHITECTURES, scope="module")
def model(request):
    cls, kw = ARCHITECTURES[request.param]
    return tiny_model(cls=cls, dtype=torch.float32, **kw)


def same(model, inputs, budget=ROOMY, cache_kw=None, **kw):
    expected = generate(model, inputs, DynamicCache(config=model.config), STEPS, **kw)
    cache = RaaSCache(budget, **(cache_kw or {}))
    assert torch.equal(generate(model, inputs, cache, STEPS, **kw), expected)
    assert cache.evicted_pages(0).max() == 0
    return cache


@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("padding", [(0,), (0, 7, 19)], ids=["one row", "padded batch"])
def test_equals_dynamic_cache(model, padding, sample):
    cache = same(model, prompt(len(padding), 20, padding), sample=sample)
    expected = torch.tensor(padding)[:, None].expand(-1, model.config.num_key_value_heads)
    assert torch.equal(cache.resident_tokens(1), 20 + STEPS - 1 - expected)


def test_equals_dynamic_cache_up_to_the_last_slot():
    """Budget to the token: the 59 decode tokens fill 60 slots; one page less would evict."""
    model = tiny_model(dtype=torch.float32)
    cache = same(model, prompt(1, 20), budget=80, cache_kw={"page_size": 4})
    assert cache.resident_positions(0).shape == (1, 2, 80)


@pytest.mark.parametrize("heads_and_kv_heads", [(4, 4), (4, 1), (6, 2)])
def test_any_query_group(heads_and_kv_heads):
    heads, kv_heads = heads_and_kv_heads
    same(tiny_model(heads=heads, kv_heads=kv_heads, dtype=torch.float32), prompt(2, 9, (3, 0)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_logits_stay_within_rounding(dtype):
    """Half-precision sums depend on their order, so logits agree to rounding, not to the bit."""
    model = tiny_model(head_dim=64, dtype=dtype, sharp=False)
    inputs = prompt(2, 20, (4, 0))
    tokens = generate(tiny_model(head_dim=64, dtype=torch.float32, sharp=False), inputs, DynamicCache(), STEPS)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, STEPS, dtype=torch.long)], 1)
    logits = []
    for cache in (DynamicCache(), RaaSCache(ROOMY)):
        with torch.no_grad():
            rows = [model(tokens[:, :20], attention_mask=mask[:, :20], past_key_values=cache).logits[:, -1]]
            for i in range(20, 20 + STEPS):
                rows.append(
                    model(tokens[:, i : i + 1], attention_mask=mask[:, : i + 1], past_key_values=cache).logits[:, -1]
                )
        logits.append(torch.stack(rows).double())
    assert ((logits[0] - logits[1]).norm() / logits[0].norm()).item() < 2e-2


def test_rows_do_not_influence_each_other():
    """Each row of a padded batch, evictions and all, generates what it generates alone with the same padding."""
    model = tiny_model()
    inputs = prompt(3, 20, (0, 7, 19))
    together = generate(model, inputs, RaaSCache(64, page_size=4, alpha=1e-2), 150, sample=False)
    for row in range(3):
        alone = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        cache = RaaSCache(64, page_size=4, alpha=1e-2)
        assert torch.equal(generate(model, alone, cache, 150, sample=False)[0], together[row])
        assert cache.evicted_pages(0).min() > 20


def test_prefill_chunks_hold_what_one_forward_holds():
    model = tiny_model()
    inputs = prompt(2, 30, (11, 0))
    caches = [RaaSCache(64, page_size=4, alpha=1e-2) for _ in range(2)]
    whole, chunked = (
        generate(model, inputs, cache, 120, prefill_chunk_size=size)
        for cache, size in zip(caches, (None, 7), strict=True)
    )
    assert torch.equal(whole, chunked)
    assert caches[0].nbytes == caches[1].nbytes
    for layer in range(2):
        held = [cache.resident_positions(layer).sort(-1).values for cache in caches]
        assert torch.equal(*held)


def test_hybrid_with_config_keeps_window_layers():
    layer_types = ["sliding_attention", "full_attention"] * 2
    model = tiny_model(
        cls=Qwen2Config, dtype=torch.float32, layers=4, use_sliding_window=True, sliding_window=16,
        layer_types=layer_types,
    )  # fmt: skip
    inputs = prompt(2, 20, (5, 0))
    expected = generate(model, inputs, DynamicCache(config=model.config), STEPS)
    cache = RaaSCache(ROOMY, config=model.config)
    assert torch.equal(generate(model, inputs, cache, STEPS), expected)
    assert [type(layer).__name__ for layer in cache.layers] == ["DynamicSlidingWindowLayer", "PagedLayer"] * 2
