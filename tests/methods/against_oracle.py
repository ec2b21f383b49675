"""One method and its oracle run side by side: the same tokens, the same pages held."""

import torch

from raas_cache import (
    GKVCache,
    H2OCache,
    LazyEvictionCache,
    QuestCache,
    RaaSCache,
    RandomCache,
    RKVCache,
    StreamingLLMCache,
    TOVACache,
    TriAttentionCache,
    VaSECache,
    WindowCache,
    from_name,
)
from raas_cache.methods.registry import POLICIES

from ..helpers import generate as generate_any
from ..helpers import resident_set
from ..oracle import OracleCache


CLASSES = {
    "raas": RaaSCache, "streaming_llm": StreamingLLMCache, "h2o": H2OCache, "tova": TOVACache, "rkv": RKVCache,
    "quest": QuestCache, "window": WindowCache, "random": RandomCache,
    "lazy_eviction": LazyEvictionCache, "gkv": GKVCache, "vase": VaSECache,
    "triattention": TriAttentionCache,
}  # fmt: skip
EVICTING = [
    "raas",
    "streaming_llm",
    "h2o",
    "tova",
    "rkv",
    "window",
    "random",
    "lazy_eviction",
    "gkv",
    "vase",
    "triattention",
]
RECENT = ["streaming_llm", "window"]  # evict the oldest page
EVICTING_MODES = [(method, mode) for method in EVICTING for mode in POLICIES[method].prompts]
MODES = [*EVICTING_MODES, ("quest", "pin"), ("quest", "select"), ("dense", "pin")]
EVICTING_PROMPTS = [method for method, mode in MODES if mode == "evict"]
LATENT_MODES = [mode for mode in MODES if mode[0] != "triattention"]
DRAFTED = [mode for mode in MODES if mode[1] != "evict"]
OWN_OPTIONS = {
    "raas": {"alpha": 0.1}, "quest": {"dense_layers": 0}, "random": {"recent_tokens": 8},
    "lazy_eviction": {"alpha": 0.1, "recent_tokens": 8}, "vase": {"protected_ratio": 0.3},
}  # fmt: skip
SMALL = {"budget": 48, "page_size": 4, "min_decode_pages": 5}


def generate(*args, **kw):
    """Never the padding token: its embedding is zero, to whose query all pages are equally good."""
    return generate_any(*args, **kw, suppress_tokens=[0])


def options(method, mode=None, **more):
    """Of `SMALL`, with what makes a method choose on so small a model."""
    own = OWN_OPTIONS.get(method, {})
    if method == "gkv":  # which keeps the newest 16 tokens
        own = {"budget": SMALL["budget"] + 8}
    return {**SMALL, **own, **({"prompt": mode} if mode else {}), **more}


def compare(method, model, inputs, steps, budget, sample=True, **settings):
    """Same tokens and same residents for both caches; returns the tokens, the cache and the oracle."""
    cache = from_name(method, budget, **settings)
    tokens = generate(model, inputs, cache, steps, sample)
    original = model.config._attn_implementation
    model.set_attn_implementation("oracle")
    oracle = OracleCache(budget, method=method, **settings)
    expected = generate(model, inputs, oracle, steps, sample)
    model.set_attn_implementation(original)
    assert torch.equal(tokens, expected)
    assert_same_residents(cache, oracle)
    return tokens, cache, oracle


def assert_same_residents(cache, oracle):
    assert oracle.heads
    for layer, row, head in oracle.heads:
        held = resident_set(cache, layer, row, head)
        assert held == oracle.resident_set(layer, row, head), (layer, row, head)
        assert cache.evicted_pages(layer)[row, head] == oracle.evicted(layer, row, head)
        assert cache.resident_tokens(layer)[row, head] == len(held)


def outlived(oracle):
    """Whether a page that could have been evicted is older than any in a sliding window of as many pages."""
    starts = [[page.tokens[0] for page in state.evictable()] for state in oracle.heads.values()]
    return any(min(held) < max(held) - (len(held) - 1) * oracle.page_size for held in starts)


def assert_evicts_by_its_own_rule(method, oracle, evicted):
    assert oracle.evicted(0, 0, 0) >= evicted, "the test evicts too little"
    assert outlived(oracle) == (method not in RECENT), "a sliding window would do the same"


def forward_both(model, cache, oracle, chunks, mask, tolerance=1e-9):
    """The same forwards for the cache and its oracle: the same logits, in the end the same residents."""
    original = model.config._attn_implementation
    seen = 0
    for chunk in chunks:
        start, seen = seen, seen + chunk.shape[1]
        logits = []
        for held, implementation in ((cache, original), (oracle, "oracle")):
            model.set_attn_implementation(implementation)
            with torch.no_grad():
                logits.append(model(chunk, attention_mask=mask[:, :seen], past_key_values=held).logits)
        visible = mask[:, start:seen].bool()
        torch.testing.assert_close(logits[0][visible], logits[1][visible], rtol=tolerance, atol=tolerance)
    model.set_attn_implementation(original)
    assert_same_residents(cache, oracle)


def conversation(*sizes, padding=3):
    """Random tokens in chunks of these sizes, and a mask: so many of the first row's are padding."""
    tokens = torch.randint(1, 97, (2, sum(sizes)), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(tokens)
    mask[0, :padding] = 0
    return tokens.split(sizes, dim=1), mask
