"""Random settings and random forwards of a whole model against the oracle: logits and residents after every forward.

CI tries 200 examples, always the same ones, over all methods and prompt modes.
`RAAS_RANDOM_SETTINGS=2000 pytest tests/methods/test_random_settings.py` tries 2,000 new ones.
"""

import functools
import math
import os
import random
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from raas_cache import from_name

from ..helpers import VOCAB, prompt, tiny_model
from ..oracle import OracleCache
from .against_oracle import EVICTING, MODES, assert_same_residents


IS_FRESH = "RAAS_RANDOM_SETTINGS" in os.environ
EXAMPLES = int(os.environ.get("RAAS_RANDOM_SETTINGS", 200))
LAYERS, MAX_TOKENS = 2, 70
FOUND = {"page_size": 4, "min_decode_pages": 3}
OWN_OPTIONS = {
    "raas": st.one_of(
        st.fixed_dictionaries({"alpha": st.sampled_from([1e-6, 0.03, 0.1, 0.3, 0.6, 0.9, 0.999])}),
        st.fixed_dictionaries({"top_ratio": st.sampled_from([0.1, 0.3, 0.5, 1.0])}),
    ),
    "h2o": st.fixed_dictionaries({"recent_ratio": st.sampled_from([0, 0.3, 0.5, 0.9, 1])}),
    "rkv": st.fixed_dictionaries({"importance_weight": st.sampled_from([0, 0.1, 0.5, 1])}),
    "random": st.fixed_dictionaries({"recent_tokens": st.sampled_from([0, 3, 8, 20]), "seed": st.sampled_from([0, 7])}),
    "gkv": st.fixed_dictionaries(
        {
            "decay": st.sampled_from([0, 0.01, 0.8, 1]),
            "importance_weight": st.sampled_from([0, 0.5, 1]),
        }
    ),
    "lazy_eviction": st.fixed_dictionaries(
        {
            "alpha": st.sampled_from([1e-6, 0.03, 0.1, 0.3, 0.6]),
            "recent_tokens": st.sampled_from([0, 3, 8, 20]),
        }
    ),
    "vase": st.fixed_dictionaries(
        {
            "protected_ratio": st.sampled_from([0, 0.1, 0.5, 1]),
            "seed": st.sampled_from([0, 7]),
        }
    ),
    "quest": st.fixed_dictionaries({"dense_layers": st.integers(0, LAYERS)}),
}


@st.composite
def options(draw, method):
    """Arguments of the cache, and of its oracle."""
    page_size = draw(st.sampled_from([1, 2, 4, 8]))
    pages = draw(st.integers(1, max(4, 32 // page_size)))
    return {
        "budget": pages * page_size + draw(st.integers(0, page_size - 1)),
        "page_size": page_size,
        "min_decode_pages": draw(st.integers(1, 4)),
        "scoring": draw(st.sampled_from(["exact", "minmax"])),
        "granularity": draw(st.sampled_from(["head", "layer"])),
        **draw(OWN_OPTIONS.get(method, st.just({}))),
    }


def conversation(text):
    """Lengths of the forwards, and a mask `[rows, tokens]`: the prompt is padded on the left, turns on either side.

    `text` is the seed. What hypothesis draws repeats much of what it drew before, so it draws the settings alone.
    """
    draw = random.Random(text)
    rows = draw.randint(1, 2)
    lengths, hidden = [], []

    def add(length, left=(0, 0), right=(0, 0)):
        lengths.append(length)
        hidden.append([[t < left[row] or t >= length - right[row] for t in range(length)] for row in range(rows)])

    length = draw.randint(1, 24)
    add(length, left=(0, draw.randrange(length)))
    while sum(lengths) < MAX_TOKENS:
        kind = draw.choice(["generate", "generate", "turn", "chunks"])
        if kind == "generate":
            finished = draw.choice([(0, 0), (0, 0), (0, 1), (1, 0)])
            for _ in range(draw.randint(1, 17)):
                add(1, left=finished)
        elif kind == "turn":
            length = draw.randint(2, 13)
            left, right = ([draw.choice([0, 0, draw.randint(0, length // 2)]) for _ in range(2)] for _ in range(2))
            add(length, left, right)
        else:
            for _ in range(draw.randint(2, 3)):
                add(draw.randint(2, 6))
    return lengths, (~torch.cat([torch.tensor(part) for part in hidden], 1)).long()


@functools.cache
def model_of(kv_heads, implementation):
    model = tiny_model(kv_heads=kv_heads, layers=LAYERS)
    model.set_attn_implementation(implementation)
    return model


def logits_of(kv_heads, implementation, cache, tokens, mask):
    with torch.no_grad():
        return model_of(kv_heads, implementation)(tokens, attention_mask=mask, past_key_values=cache).logits


@pytest.mark.filterwarnings("ignore:budget=")
@pytest.mark.parametrize(("method", "mode"), MODES)
def test_random_settings(method, mode):
    met = Counter()

    @seed(random.randrange(1 << 32) if IS_FRESH else MODES.index((method, mode)))
    @settings(
        max_examples=math.ceil(EXAMPLES / len(MODES)),
        phases=[Phase.generate, Phase.shrink],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from([1, 2, 4]), options(method), st.integers(0, 1 << 32))
    def run(kv_heads, options, tokens_seed):
        lengths, mask = conversation(f"{kv_heads}, {options}, {tokens_seed}")
        met.update(compare(kv_heads, method, {**options, "prompt": mode}, lengths, mask, tokens_seed))

    run()
    assert met["turn inside a decode page"] and (method not in EVICTING or met["evictions"]), "it tries too little"


@pytest.mark.parametrize(
    ("method", "options", "lengths", "seeds"),
    [
        # A turn closes a page that is not full, and the page must have the index of its newest token as stamp.
        ("raas", {**FOUND, "budget": 16, "prompt": "evict", "top_ratio": 0.5}, [5, *[1] * 6, 4, *[1] * 14], [2, 3, 4]),
        ("raas", {**FOUND, "budget": 16, "prompt": "evict", "alpha": 0.6}, [5, *[1] * 6, 4, *[1] * 14], [1, 2, 3]),
        # A score is the mean over the heads, then the max over the queries: the other order gives another number.
        ("tova", {**FOUND, "budget": 24, "page_size": 1, "prompt": "pin"}, [4, *[1] * 20, 3, *[1] * 10], [0, 11]),
    ],
)
def test_found_by_random_settings(method, options, lengths, seeds):
    """Smaller than what was found, so that a failure can be read."""
    for tokens_seed in seeds:
        list(compare(2, method, options, lengths, torch.ones(1, sum(lengths), dtype=torch.long), tokens_seed))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_model_sees_far_tokens(kv_heads):
    """Otherwise the comparisons above would hardly notice a token that is wrongly held or wrongly dropped."""
    tokens = prompt(1, 25)["input_ids"]
    visible = torch.ones_like(tokens)
    hiding = visible.clone()
    hiding[:, 10:15] = 0
    logits = []
    for mask in (visible, hiding):
        cache = DynamicCache()
        logits_of(kv_heads, "sdpa", cache, tokens[:, :20], visible[:, :20])
        logits.append(logits_of(kv_heads, "sdpa", cache, tokens[:, 20:], mask))
    assert (logits[0] - logits[1]).norm() > 0.3 * logits[0].norm()


def compare(kv_heads, method, options, lengths, mask, tokens_seed):
    """The same forwards through a cache and through its oracle; yields what the forwards met."""
    cache, oracle = from_name(method, **options), OracleCache(method=method, **options)
    # Never token 0: its embedding is zero, and to a query of zeros all pages are equally good.
    tokens = torch.randint(1, VOCAB, mask.shape, generator=torch.Generator().manual_seed(tokens_seed))
    seen, decoded = 0, 0
    for chunk in tokens.split(lengths, 1):
        length, seen = chunk.shape[1], seen + chunk.shape[1]
        logits = [
            logits_of(kv_heads, implementation, held, chunk, mask[:, :seen])
            for implementation, held in (("sdpa", cache), ("oracle", oracle))
        ]
        visible = mask[:, seen - length : seen].bool()
        # The norms of a Llama compute in float32: the last bit of float64 may tip a rounding there.
        where = f"tokens {seen - length} to {seen - 1} of forwards {lengths}"
        torch.testing.assert_close(logits[0][visible], logits[1][visible], rtol=1e-6, atol=1e-6, msg=where)
        assert_same_residents(cache, oracle)
        assert cache.get_seq_length() == seen
        is_input = length > 1 or seen == 1
        if is_input and decoded % options["page_size"]:
            yield "turn inside a decode page"
            decoded = 0 if options["prompt"] == "evict" else decoded  # which closes the page
        decoded += not is_input
    if method in EVICTING and cache.evictions:
        yield "evictions"
