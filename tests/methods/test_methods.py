"""Every method, in every mode, against the brute-force oracle: tokens, and what every layer, row and head holds."""

import itertools

import pytest
import torch
from transformers import DynamicCache

from raas_cache import (
    PagedCache,
    QuestCache,
    StreamingLLMCache,
    from_name,
    list_methods,
)

from ..architectures import build
from ..helpers import prompt, resident_set, tiny_model, use_engine
from ..oracle import OracleCache
from .against_oracle import (
    CLASSES,
    DRAFTED,
    EVICTING,
    EVICTING_MODES,
    EVICTING_PROMPTS,
    MODES,
    RECENT,
    assert_evicts_by_its_own_rule,
    assert_same_residents,
    compare,
    conversation,
    forward_both,
    generate,
    options,
)


# A pinned prompt beside a small budget leaves the floor of decode pages, and a warning says so.
pytestmark = pytest.mark.filterwarnings("ignore:budget=")


@pytest.mark.parametrize("method", [*CLASSES, "dense"])
def test_defaults(method):
    model = tiny_model(layers=3 if method == "quest" else 2)
    tokens, _, oracle = compare(method, model, prompt(2, 21, (5, 0)), 190, budget=64)
    if method in EVICTING:
        assert oracle.evicted(0, 0, 0) >= 3
    else:
        dense = generate(model, prompt(2, 21, (5, 0)), DynamicCache(), 190)
        assert torch.equal(tokens, dense) == (method == "dense")


# Granularity and GQA in a rotation that brings each to every method, mode and page size.
@pytest.mark.parametrize(
    ("method", "mode", "page_size", "granularity", "kv_heads"),
    [
        (*case, page_size, *shape)
        for (case, page_size), shape in zip(
            itertools.product(EVICTING_MODES, [1, 4, 8]),
            itertools.cycle([("head", 2), ("layer", 2), ("head", 4), ("layer", 1)]),
            strict=False,
        )
    ],
)
def test_left_padded_batch(method, mode, page_size, granularity, kv_heads):
    settings = options(method, mode, page_size=page_size, granularity=granularity)
    steps = {1: 40, 4: 80, 8: 110}[page_size]
    _, _, oracle = compare(method, tiny_model(kv_heads=kv_heads), prompt(2, 33, (7, 0)), steps, **settings)
    assert_evicts_by_its_own_rule(method, oracle, evicted=8)
    sets = {frozenset(oracle.resident_set(1, 1, head)) for head in range(kv_heads)}
    if granularity == "layer":
        assert len(sets) == 1
    elif method not in RECENT:
        assert len(sets) > 1, "no head chooses for itself"


@pytest.mark.parametrize("granularity", ["head", "layer"])
@pytest.mark.parametrize("mode", ["pin", "select", "evict"])
@pytest.mark.parametrize("method", ["raas", "h2o", "rkv"])
def test_scores_by_page_bounds(method, mode, granularity):
    settings = options(method, mode, granularity=granularity, scoring="minmax")
    _, _, oracle = compare(method, tiny_model(), prompt(2, 33, (7, 0)), 60, **settings)
    assert_evicts_by_its_own_rule(method, oracle, evicted=8)


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("raas", {"alpha": None, "top_ratio": 0.3}),
        ("raas", {"alpha": None, "top_ratio": 0.3, "granularity": "layer"}),
        ("h2o", {"recent_ratio": 0}),
        ("h2o", {"recent_ratio": 0.8}),
        ("random", {"recent_tokens": 0, "seed": 7}),
        ("random", {"recent_tokens": 21, "granularity": "layer"}),
        ("lazy_eviction", {"alpha": 0.05, "recent_tokens": 0}),
        ("lazy_eviction", {"alpha": 0.3, "granularity": "layer"}),
        ("gkv", {"importance_weight": 0.9, "decay": 0.01}),
        ("gkv", {"importance_weight": 1, "decay": 1, "page_size": 2}),
        ("vase", {"protected_ratio": 0, "seed": 5}),
        ("vase", {"protected_ratio": 0.8, "granularity": "layer"}),
        ("rkv", {"importance_weight": 0.5}),
        ("rkv", {"importance_weight": 0.9}),
        ("rkv", {"importance_weight": 0, "page_size": 2}),
        ("tova", {"scoring": "minmax", "granularity": "head"}),
    ],
    ids=str,
)
def test_options(method, more):
    settings = options(method, "evict", **more)
    _, _, oracle = compare(method, tiny_model(), prompt(2, 33, (7, 0)), 80, **settings)
    assert_evicts_by_its_own_rule(method, oracle, evicted=10)


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("method", EVICTING_PROMPTS)
def test_a_prompt_longer_than_the_budget_is_evicted(method, page_size):
    """One row is almost only padding, which is not held: its sink is its first token's page."""
    settings = options(method, "evict", budget=24, min_decode_pages=3, page_size=page_size)
    inputs = prompt(3, 61, (9, 0, 56))
    _, cache, oracle = compare(method, tiny_model(), inputs, 2, **settings)
    for row, length in enumerate((52, 61, 5)):
        pages = len(range(0, length, page_size)) - 24 // page_size + 1
        assert (cache.evicted_pages(0)[row] == max(pages, 0)).all()
    _, cache, oracle = compare(method, tiny_model(), inputs, 50, sample=False, **settings)
    assert cache.resident_tokens(0).max() <= 24
    sink = {row: set(range(start, start + page_size)) for row, start in ((0, 9), (2, 56))}
    for row, layer, head in itertools.product(sink, range(2), range(2)):
        assert sink[row] <= resident_set(cache, layer, row, head)
    assert oracle.evicted(1, 0, 0) >= 20


@pytest.mark.parametrize("method", EVICTING)
def test_a_prompt_longer_than_the_budget_is_selected_from(method):
    settings = options(method, "select", budget=16)
    tokens, cache, oracle = compare(method, tiny_model(), prompt(2, 61, (9, 0)), 60, **settings)
    assert set(range(61)) <= resident_set(cache, 1, 1, 1) and oracle.evicted(0, 0, 0) >= 9
    reads_all = generate(tiny_model(), prompt(2, 61, (9, 0)), DynamicCache(), 20)
    assert not torch.equal(tokens[:, :81], reads_all), "before an eviction: the same as reading every page"


def test_streaming_llm_holds_the_sink_and_a_window():
    cache = StreamingLLMCache(24, page_size=4, min_decode_pages=3)
    generate(tiny_model(), prompt(2, 33, (9, 0)), cache, 60)
    window = set(range(73, 92))  # decode pages start at 33; the five newest of the fifteen
    for layer, head in itertools.product(range(2), range(2)):
        assert resident_set(cache, layer, 0, head) == {9, 10, 11, 12} | window
        assert resident_set(cache, layer, 1, head) == {0, 1, 2, 3} | window
    # 5 and 8 pages of the prompt, without the sink, and 15 decode pages; 5 are held.
    assert cache.evicted_pages(0).tolist() == [[15, 15], [18, 18]]


@pytest.mark.parametrize(
    ("mode", "dense_layers", "granularity", "page_size"),
    [
        ("select", 0, "head", 4),
        ("select", 2, "head", 4),
        ("select", 0, "layer", 8),
        ("select", 2, "head", 1),
        ("pin", 0, "head", 4),
        ("pin", 2, "head", 4),
        ("pin", 2, "layer", 8),
        ("pin", 0, "head", 1),
    ],
)
def test_quest(mode, dense_layers, granularity, page_size):
    settings = options(
        "quest", mode, budget=4 * min(page_size, 4), min_decode_pages=2, page_size=page_size, granularity=granularity
    )
    model, inputs = tiny_model(layers=4), prompt(2, 33, (7, 0))
    tokens, cache, _ = compare("quest", model, inputs, 60, **settings | {"dense_layers": dense_layers})
    assert cache.resident_tokens(2).tolist() == [[33 + 59 - 7] * 2, [33 + 59] * 2]
    assert not torch.equal(tokens, generate(model, inputs, DynamicCache(), 60)), "as if every page had been read"


def test_quest_reads_the_first_layers_in_full():
    """With as many dense layers as the model has, nothing is left to select."""
    model, inputs = tiny_model(), prompt(2, 33, (7, 0))
    tokens = generate(model, inputs, QuestCache(16, page_size=4, dense_layers=2), 60)
    assert torch.equal(tokens, generate(model, inputs, DynamicCache(), 60))
    tokens = generate(model, inputs, QuestCache(16, page_size=4, dense_layers=1), 60)
    assert not torch.equal(tokens, generate(model, inputs, DynamicCache(), 60))


def test_quest_refuses_to_evict_the_prompt():
    with pytest.raises(ValueError, match="evict"):
        from_name("quest", 64, prompt="evict")


@pytest.mark.parametrize(("method", "mode"), MODES)
def test_chunks_and_further_turns(method, mode):
    """One row's first chunk is all padding, and turns are padded; a turn finds a page half filled."""
    chunks, mask = conversation(10, 7, *[1] * 50, 13, *[1] * 31, 6, *[1] * 32, padding=12)
    mask[1, 67:70] = mask[0, 111:113] = 0
    settings = options(method, mode)
    cache, oracle = from_name(method, **settings), OracleCache(method=method, **settings)
    forward_both(tiny_model(), cache, oracle, chunks, mask)
    assert method not in EVICTING or oracle.evicted(0, 0, 0) >= 15


@pytest.mark.parametrize("scoring", ["exact", "minmax"])
@pytest.mark.parametrize("method", EVICTING_PROMPTS)
def test_a_turn_longer_than_the_budget_is_evicted(method, scoring):
    chunks, mask = conversation(6, *[1] * 9, 70, *[1] * 25)
    settings = options(method, "evict", scoring=scoring, budget=48)
    cache, oracle = from_name(method, **settings), OracleCache(method=method, **settings)
    forward_both(tiny_model(), cache, oracle, chunks, mask)
    assert oracle.evicted(0, 0, 0) >= 17


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8", "int4"])
@pytest.mark.parametrize(
    ("method", "mode"),
    [
        *itertools.product(["raas"], ["pin", "select", "evict"]),
        ("h2o", "evict"),
        ("quest", None),
        ("vase", "evict"),
        ("triattention", "pin"),
    ],
)
def test_quantised(method, mode, kv_dtype):
    """Through a prompt, decoding and a turn; one layer, for a second would quantise what rounding in the first gave."""
    settings = options(method, mode, kv_dtype=kv_dtype)
    _, cache, oracle = compare(method, tiny_model(), prompt(2, 33, (7, 0)), 80, **settings)
    plain = from_name(method, **options(method, mode))
    generate(tiny_model(), prompt(2, 33, (7, 0)), plain, 80)
    assert cache.nbytes < plain.nbytes
    if method in EVICTING:
        assert_evicts_by_its_own_rule(method, oracle, evicted=10)
    chunks, mask = conversation(15, *[1] * 40, 13, *[1] * 20)
    cache, oracle = from_name(method, **settings), OracleCache(method=method, **settings)
    forward_both(tiny_model(layers=1), cache, oracle, chunks, mask, tolerance=1e-5)


@pytest.mark.parametrize(("method", "mode"), MODES)
def test_equals_dynamic_cache_up_to_the_last_slot(method, mode):
    """20 + 59 tokens fill 20 pages of 4: one page less would evict, or leave a page unread."""
    model, inputs = tiny_model(), prompt(3, 20, (0, 7, 19))
    expected = generate(model, inputs, DynamicCache(), 60)
    cache = from_name(method, **options(method, mode, budget=80))
    assert torch.equal(generate(model, inputs, cache, 60), expected)
    assert cache.evicted_pages(0).max() == 0
    assert cache.resident_tokens(1).tolist() == [[79, 79], [72, 72], [60, 60]]


@pytest.mark.parametrize(("method", "mode"), MODES)
def test_bytes_grow_only_where_nothing_is_evicted(method, mode):
    model, sizes = tiny_model(), []
    cache = from_name(method, **options(method, mode))
    with torch.no_grad():
        model(**prompt(2, 33), past_key_values=cache)
        for step in range(210):
            model(torch.full((2, 1), 1 + step % 90), past_key_values=cache)
            sizes.append(cache.nbytes)
    assert cache.get_seq_length() == 243
    if method in EVICTING:
        assert len(set(sizes[40:])) == 1 and cache.evicted_pages(1).min() > 20
    else:
        assert sizes[209] > 1.5 * sizes[40] and cache.evicted_pages(1).max() == 0
        assert cache.resident_tokens(1).tolist() == [[243, 243]] * 2


@pytest.mark.parametrize(("method", "mode"), DRAFTED)
def test_a_draft_taken_back_leaves_no_trace(method, mode):
    """Rounds of assisted decoding, four of seven tokens kept, against an oracle that sees only those."""
    model, settings = tiny_model(), options(method, mode)
    tokens = prompt(1, 125)["input_ids"]
    cache, oracle = from_name(method, **settings), OracleCache(method=method, **settings)
    cache.activate_past_recording()
    logits = []
    with torch.no_grad():
        logits.append(model(tokens[:, :21], past_key_values=cache).logits)
        for start in range(21, 117, 4):
            logits.append(model(tokens[:, start : start + 7], past_key_values=cache).logits[:, :4])
            cache.crop(-3)
        model.set_attn_implementation("oracle")
        expected = [model(tokens[:, :21], past_key_values=oracle).logits]
        expected += [model(tokens[:, i : i + 1], past_key_values=oracle).logits for i in range(21, 117)]
    torch.testing.assert_close(torch.cat(logits, 1), torch.cat(expected, 1), rtol=1e-9, atol=1e-9)
    assert_same_residents(cache, oracle)
    if method in EVICTING:
        assert_evicts_by_its_own_rule(method, oracle, evicted=15)


@pytest.mark.parametrize("method", [*EVICTING, "quest"])
def test_beams(method):
    """What a policy remembers of a page goes with the row."""
    model, inputs, settings = tiny_model(), prompt(1, 33), options(method)
    cache, oracle = from_name(method, **settings), OracleCache(method=method, **settings)
    tokens = generate(model, inputs, cache, 60, sample=False, num_beams=3)
    model.set_attn_implementation("oracle")
    assert torch.equal(generate(model, inputs, oracle, 60, sample=False, num_beams=3), tokens)
    assert_same_residents(cache, oracle)


@pytest.mark.parametrize(("method", "mode"), MODES)
def test_reset_forgets_everything(method, mode):
    model, cache = tiny_model(), from_name(method, **options(method, mode))
    results = []
    for seed in (0, 1, 0):
        tokens = generate(model, prompt(2, 33, (7, 0), seed=seed), cache, 30, sample=False)
        results.append((tokens, cache.resident_positions(1).sort(-1).values, cache.evicted_pages(1)))
        cache.reset()
    assert all(torch.equal(*pair) for pair in zip(results[0], results[2], strict=True))
    assert not torch.equal(results[0][0], results[1][0])


@pytest.mark.parametrize("name", ["youtu", "gemma2", "gpt_oss", "gemma3n_text"])
@pytest.mark.parametrize(("method", "mode"), [("h2o", "evict"), ("tova", "select"), ("raas", "evict"), ("quest", None)])
def test_a_latent_a_cap_sinks_and_shared_kv(name, method, mode):
    model = build(name, torch.float64)
    if getattr(model.config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # sdpa leaves the cap out
    _, _, oracle = compare(method, model, prompt(1, 33), 50, sample=False, config=model.config, **options(method, mode))
    if method != "quest":
        assert max(state.evicted for state in oracle.heads.values()) >= 6


@pytest.mark.parametrize(
    ("method", "mode", "more"),
    [
        ("triattention", "pin", {"kv_dtype": "int8"}),
        ("vase", "pin", {"kv_dtype": "int8"}),
        ("raas", "select", {"kv_dtype": "int8"}),
        ("raas", "evict", {"kv_dtype": "fp8", "scoring": "minmax"}),
        ("raas", "pin", {"alpha": None, "top_ratio": 0.3}),
        ("h2o", "evict", {}),
        ("tova", "evict", {"page_size": 1}),
        ("rkv", "evict", {}),
        ("quest", "select", {"kv_dtype": "int8"}),
        ("raas", "pin", {"kv_dtype": "int4", "scoring": "minmax"}),
        ("rkv", "evict", {"kv_dtype": "int4"}),
        ("quest", "select", {"kv_dtype": "int4"}),
    ],
    ids=str,
)
def test_triton_kernels(method, mode, more, monkeypatch):
    """Tables, sums, means and codes in the kernels; in the interpreter where there is no GPU."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = tiny_model(layers=1, dtype=torch.float32).to(device)
    inputs = {name: tensor.to(device) for name, tensor in prompt(2, 33, (7, 0)).items()}
    results = []
    for engine in ("torch", "triton"):
        use_engine(monkeypatch, engine)
        cache = from_name(method, **options(method, mode, **more))
        results.append((generate(model, inputs, cache, 30, sample=False), cache.resident_positions(0).sort(-1).values))
        assert (cache.evicted_pages(0).min() >= 1) == (method in EVICTING)
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_names():
    assert {*CLASSES, "dense"} <= set(list_methods())
    for name, cls in CLASSES.items():
        assert type(from_name(name, 64)) is cls and issubclass(cls, PagedCache)
    with pytest.raises(ValueError, match="streaming_llm"):
        from_name("streaming", 64)
