"""What `record` takes down is what happened: against the oracle, against the cache itself, and leaving no trace."""

from collections import Counter

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from raas_cache import DenseCache, RaaSCache, Recording, from_name, record

from ..architectures import build, require
from ..engine.test_step_ops import PAGE, Recorder, layer_steps
from ..helpers import compile_anywhere, generate, prompt, resident_set, tiny_model
from ..oracle import OracleCache
from .recorded import NEVER_PADDING, SMALL, one_by_one


pytestmark = pytest.mark.filterwarnings("ignore:budget=")
METHODS = [
    ("raas", {"alpha": 0.1}), ("raas", {"top_ratio": 0.5}), ("h2o", {}), ("tova", {}), ("rkv", {}),
    ("raas", {"alpha": 0.1, "scoring": "minmax"}),
]  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def recorded(model):
    """A cache that has evicted, the recording of it, and what was generated."""
    cache = RaaSCache(**SMALL, alpha=0.1)
    with record(cache) as recording:
        tokens = generate(model, prompt(2, 14, padding=(0, 6)), cache, 120, **NEVER_PADDING)
    return cache, recording, tokens


class NotingOracle(OracleCache):
    """Notes each page's score, priority and place whenever the policy is told."""

    def rate(self, heads, totals, keys, values, padding, now, queries):
        super().rate(heads, totals, keys, values, padding, now, queries)
        noted = self.__dict__.setdefault("noted", {})
        for state, scores in zip(heads, totals, strict=True):
            pages = {
                page.tokens[0]: (score, np.nan if page.pinned else page.priority)
                for page, score in zip(state.seen, scores, strict=True)
            }
            noted.setdefault(id(state), {})[now] = pages


@pytest.mark.parametrize(("method", "options"), METHODS, ids=str)
def test_scores_and_stamps_are_the_oracles(model, method, options):
    inputs = prompt(2, 14)
    cache, oracle = from_name(method, **SMALL, **options), NotingOracle(method=method, **SMALL, **options)
    with record(cache) as recording:
        generate(model, inputs, cache, 110, **NEVER_PADDING)
    model.set_attn_implementation("oracle")
    try:
        generate(model, inputs, oracle, 110, **NEVER_PADDING)
    finally:
        model.set_attn_implementation("sdpa")
    compared = 0
    for (layer, row, head), state in oracle.heads.items():
        history, noted = recording.history(layer, head, row), oracle.noted[id(state)]
        assert set(noted) <= set(history.steps.tolist())
        for at, step in enumerate(history.steps.tolist()):
            if cache.settings.prompt == "evict" and step < 14:
                continue  # before the prompt is cut, its pages have no priorities
            held = history.held[at]
            expected = noted[step]
            assert history.first[held].tolist() == sorted(expected), (step, layer, row, head)
            scores, priorities = zip(*(expected[first] for first in history.first[held].tolist()), strict=True)
            np.testing.assert_allclose(history.score[at, held], scores, rtol=1e-5, atol=1e-7)
            np.testing.assert_allclose(history.priority[at, held], priorities, rtol=1e-5, atol=1e-7)
            compared += held.sum()
        assert np.isfinite(history.evicted).sum() == state.evicted == cache.evicted_pages(layer)[row, head]
    assert compared > 5000 and cache.evictions > 50


@pytest.mark.parametrize(
    ("method", "prompt_mode"), [("raas", "pin"), ("raas", "evict"), ("h2o", "evict"), ("streaming_llm", "evict")]
)
def test_lives_are_what_the_cache_held(model, method, prompt_mode):
    """Births, evictions, tokens held, and which page a token went to, from the cache after every forward."""
    tokens = prompt(2, 130, seed=3)["input_ids"]
    cache = from_name(method, **SMALL, prompt=prompt_mode)
    held = {}
    with record(cache) as recording:
        for step in one_by_one(model, tokens, cache, start=33):
            held[step] = {(row, head): resident_set(cache, 1, row, head) for row in range(2) for head in range(2)}
    pages = recording.pages_of_tokens(1)
    assert len(pages) == 130
    for row, head in held[129]:
        history = recording.history(1, head, row)
        gone = dict(zip(history.first.tolist(), history.evicted.tolist(), strict=True))
        assert len(gone) == len(set(pages.tolist()))
        for at, step in enumerate(history.steps.tolist()):
            if step == 32:  # recorded before the prompt is cut down
                continue
            kept = {token for token in range(step + 1) if not gone[pages[token]] <= step}
            assert kept == held[step][row, head]
            assert history.resident[at] == len(kept)
        evicted = history.evicted[np.isfinite(history.evicted)]
        assert len(evicted) == cache.evicted_pages(1)[row, head] > 15
        assert set(history.first[history.is_pinned]) == ({0} if prompt_mode == "evict" else set(range(0, 33, 4)))


@pytest.mark.parametrize(
    "options",
    [
        {}, {"sample": False}, {"num_beams": 3}, {"num_return_sequences": 2}, {"prefill_chunk_size": 5},
        {"sample": False, "prompt_lookup_num_tokens": 6, "max_matching_ngram_size": 1},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("method", ["raas", "quest"])
def test_tokens_are_unchanged(model, method, options):
    inputs = prompt(1, 12)
    plain, cache = (from_name(method, **SMALL) for _ in range(2))
    expected = generate(model, inputs, plain, 80, **options)
    with record(cache, layers=[1], heads=[0]) as recording:
        tokens = generate(model, inputs, cache, 80, **options)
    assert torch.equal(tokens, expected)
    for layer in range(2):
        assert torch.equal(cache.layers[layer].engine.kv.priority, plain.layers[layer].engine.kv.priority)
        assert torch.equal(cache.resident_positions(layer), plain.resident_positions(layer))
    assert recording.history(1, 0).steps[-1] == cache.get_seq_length() - 1


def test_off_again_a_step_launches_what_it_did():
    cache = RaaSCache(8 * PAGE, page_size=PAGE, min_decode_pages=2)
    step = layer_steps(cache, PAGE * 20 + 3)

    def count():
        with torch.no_grad(), Recorder() as recorder:
            step()()
        return Counter(recorder.counts)

    before = count()
    with record(cache) as recording:
        while_on = count()
    assert count() == before != while_on
    assert len(recording.layers[0].entries) == 1
    assert recording.nbytes == cache.layers[0].table.num_heads * (8 * 12 + 4), "eight pages, and a count of tokens"


def test_a_recorded_step_is_not_compiled(model):
    """`generate` would compile it: `fullgraph` makes a break in the graph an error."""
    expected = generate(model, prompt(1, 12), DynamicCache(), 20, sample=False)
    cache = RaaSCache(budget=256)
    assert cache.is_compileable
    with record(cache) as recording:
        assert not cache.is_compileable
        tokens = generate(model, prompt(1, 12), cache, 20, sample=False, compile_config=compile_anywhere())
        assert not cache.layers[0].is_compileable
    assert cache.layers[0].is_compileable
    assert torch.equal(tokens, expected) and len(recording.history(0, 0).steps) == 19


def test_padding_is_in_no_page(recorded):
    _, recording, _ = recorded
    assert recording.history(0, 0, row=0).first[0] == 0
    assert recording.history(0, 0, row=1).first[0] == 6  # the six tokens of padding are not held
    assert recording.history(0, 0, row=1).resident[0] == 14 - 6 + 1


def test_layers_and_heads_are_chosen(model):
    cache = RaaSCache(**SMALL)
    with record(cache, layers=[1], heads=[1]) as recording:
        generate(model, prompt(1, 14), cache, 80)
    assert recording.heads(1) == (1,) and recording.recorded == [1]
    every = RaaSCache(**SMALL)
    with record(every) as whole:
        generate(model, prompt(1, 14), every, 80)
    np.testing.assert_array_equal(recording.history(1, 1).priority, whole.history(1, 1).priority)
    with pytest.raises(ValueError, match=r"layer=0 was not recorded, only the layers \[1\]"):
        recording.history(0, 1)
    with pytest.raises(ValueError, match=r"head=0 was not recorded, only the KV heads \[1\]"):
        recording.history(1, 0)
    with pytest.raises(ValueError, match="row=2: the batch has 1 rows"):
        recording.history(1, 1, row=2)


@pytest.mark.parametrize("name", ["gemma3_text", "qwen3_next", "deepseek_v3", "dory"])
def test_of_other_models_the_paged_layers(name):
    """Windows and linear attention have no pages, a latent has one page table for all heads, loops add layers."""
    require(name)
    model = build(name)
    cache = RaaSCache(**SMALL, config=model.config)
    with record(cache) as recording:
        generate(model, prompt(1, 14), cache, 80)
    paged = [index for index, layer in enumerate(cache.layers) if hasattr(layer, "trace")]
    assert paged and recording.recorded == paged
    for layer in paged:
        history = recording.history(layer, 0)
        assert np.isfinite(history.evicted).sum() == cache.evicted_pages(layer)[0, 0] > 0


def test_without_a_config_too():
    model = build("gemma3_text")
    cache = RaaSCache(**SMALL)
    with record(cache) as recording:
        generate(model, prompt(1, 14), cache, 80)
    paged = [index for index, layer in enumerate(cache.layers) if hasattr(layer, "trace")]
    assert paged and recording.recorded == paged
    assert all(recording.history(layer, 0).steps[-1] == 92 for layer in paged)


def test_table(recorded):
    """A row for each step and page held, with what `history` says."""
    pandas = pytest.importorskip("pandas")
    cache, recording, _ = recorded
    table = recording.to_pandas()
    columns = ["row", "layer", "head", "step", "page", "is_pinned", "score", "priority", "evicted"]
    assert table.columns.tolist() == columns
    for (row, layer, head), part in table.groupby(["row", "layer", "head"]):
        history = recording.history(layer, head, row)
        assert len(part) == history.held.sum()
        score = part.pivot(index="step", columns="page", values="score")
        np.testing.assert_array_equal(score.to_numpy(), history.score)
        priority = part.pivot(index="step", columns="page", values="priority")
        np.testing.assert_array_equal(priority.to_numpy(), history.priority)
        lives = part.groupby("page").first()
        np.testing.assert_array_equal(lives["evicted"], history.evicted)
        np.testing.assert_array_equal(lives["is_pinned"], history.is_pinned)
        evicted = part[part["step"] >= part["evicted"]]
        assert evicted.empty and lives["evicted"].notna().sum() == cache.evicted_pages(layer)[row, head]
    assert Recording("RaaSPolicy()", 48, 4, "pin").to_pandas().columns.tolist() == columns
    assert isinstance(table, pandas.DataFrame)


def test_last_use(recorded):
    history = recorded[1].history(1, 0)
    used = history.last_use(alpha=0.3)
    for page, expected in enumerate(used):
        steps = history.steps[np.nan_to_num(history.score[:, page]) >= 0.3]
        assert (steps[-1] == expected) if len(steps) else np.isnan(expected)
    assert np.isnan(used).any() and np.isfinite(used).any()


def test_what_cannot_be_recorded_is_refused(model):
    with pytest.raises(TypeError, match="must be a RaaSCache or another paged cache"), record(DynamicCache()):
        pass
    cache = RaaSCache(**SMALL)
    with record(cache), pytest.raises(ValueError, match="already recorded by another"), record(cache):
        pass
    for name, value in [("layers", []), ("heads", [-1]), ("layers", [True]), ("heads", ["0"])]:
        with pytest.raises(ValueError, match=f"{name}=.* must be indices"), record(cache, **{name: value}):
            pass
    no_such_head = pytest.raises(ValueError, match=r"heads=\[2\]: the layers of this model have 2 KV heads")
    with no_such_head, record(cache, heads=[2]):
        generate(model, prompt(1, 14), cache, 5)


def test_an_error_ends_the_recording(model):
    cache = RaaSCache(**SMALL)
    with pytest.raises(KeyError), record(cache):
        generate(model, prompt(1, 14), cache, 5)
        raise KeyError
    assert cache.layers[0].trace is None
    with record(cache) as recording:
        pass
    assert not recording.recorded
    with record(cache) as recording:
        cache.reset()
        generate(model, prompt(1, 14), cache, 5)
        cache.reset()
    generate(model, prompt(1, 14), cache, 5)
    assert not recording.recorded and all(layer.trace is None for layer in cache.layers)


def test_a_dense_recording_is_where_attention_went(model):
    """Each page's share of the attention, the mean over the query group: all pages together have all of it."""
    tokens, cache = prompt(1, 60, seed=3)["input_ids"], DenseCache(8, page_size=4)
    with record(cache) as recording:
        for _ in one_by_one(model, tokens, cache, start=12):
            pass
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            weights = model(tokens, output_attentions=True).attentions
    finally:
        model.set_attn_implementation("sdpa")
    for layer, head in [(0, 0), (1, 1)]:
        history = recording.history(layer, head)
        of_group = weights[layer][0, 2 * head : 2 * head + 2].mean(0).numpy()
        for at, step in enumerate(history.steps):
            ends = [*history.first[1:], 60]
            for page in np.flatnonzero(history.held[at]):
                expected = of_group[step, history.first[page] : ends[page]].sum()
                assert history.score[at, page] == pytest.approx(expected, abs=1e-6)


@pytest.mark.gpu
def test_on_a_gpu():
    """Unrecorded, `generate` runs a step from a CUDA graph; recorded, it does not, and writes and evicts the same."""
    model = tiny_model(dtype=torch.float32).cuda()
    inputs = {name: tensor.cuda() for name, tensor in prompt(2, 14, padding=(0, 6)).items()}
    plain, cache, after = (RaaSCache(**SMALL, alpha=0.1) for _ in range(3))
    expected = generate(model, inputs, plain, 120, sample=False, **NEVER_PADDING)
    with record(cache) as recording:
        tokens = generate(model, inputs, cache, 120, sample=False, **NEVER_PADDING)
    assert torch.equal(tokens, expected)
    assert torch.equal(generate(model, inputs, after, 120, sample=False, **NEVER_PADDING), expected)
    for layer, row, head in [(0, 0, 1), (1, 0, 0), (1, 1, 1)]:
        history, held = recording.history(layer, head, row), resident_set(cache, layer, row, head)
        assert held == resident_set(plain, layer, row, head)
        begin = (0, 6)[row]  # padding is not stored, so the first page of a row begins with its first token
        pages = {token - (token - (begin if token < 14 else 14)) % 4 for token in held}
        assert set(history.first[history.held[-1]].tolist()) == pages and history.resident[-1] == len(held)
        assert np.isfinite(history.evicted).sum() == cache.evicted_pages(layer)[row, head] > 15
