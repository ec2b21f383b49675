"""A decode step is one graph: compiled once, it serves every step of every cache of its shape, evictions and all."""

import itertools

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from transformers import DynamicCache

from raas_cache import DenseCache, QuestCache, RaaSCache, from_name, list_methods
from raas_cache.cache.paged_layer import PagedLayer

from ..architectures import build
from ..helpers import compile_anywhere, generate, prompt, resident_set, tiny_model, use_engine


STEPS = 40
SMALL = {"budget": 32, "page_size": 4, "min_decode_pages": 2}
EVICTING = [name for name in list_methods() if name not in ("dense", "quest")]
OPTIONS = [
    {"method": "raas", "top_ratio": 0.3},
    {"method": "h2o", "recent_ratio": 0.25},
    {"method": "raas", "scoring": "minmax", "granularity": "layer"},
    {"method": "raas", "prompt": "select"},
    {"method": "raas", "prompt": "evict"},
    {"method": "raas", "kv_dtype": "int8"},
    {"method": "h2o", "kv_dtype": "fp8"},
    {"method": "raas", "kv_dtype": "int4"},
    {"method": "random", "recent_tokens": 4},
    {"method": "lazy_eviction", "recent_tokens": 4},
    {"method": "vase", "kv_dtype": "fp8"},
]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()


def decode(model, cache, forward=None, steps=STEPS, padded=()):
    """Greedy tokens after an eager prefill, one `forward` a token; the steps `padded` are padding in row 0."""
    inputs = {name: tensor.to(model.device) for name, tensor in prompt(2, 9, (3, 0)).items()}
    forward, tokens = forward or model.forward, []
    with torch.no_grad():
        logits = model(**inputs, past_key_values=cache).logits
        for step in range(steps):
            tokens.append(logits[:, -1:].argmax(-1))
            positions = torch.full((2, 1), 9 + step, device=model.device)
            shown = torch.ones(2, 1, 1, 1, dtype=torch.bool, device=model.device)
            shown[0] = step not in padded
            torch.compiler.cudagraph_mark_step_begin()
            out = forward(tokens[-1], past_key_values=cache, position_ids=positions, attention_mask=shown)
            logits = out.logits.clone()
    return torch.cat(tokens, 1)


def label(options):
    return "-".join(map(str, options.values())) or "raas"


def paged_layers(cache):
    return [layer for layer in cache.layers if isinstance(layer, PagedLayer)]


def same_state(ours, theirs):
    for mine, other in zip(paged_layers(ours), paged_layers(theirs), strict=True):
        for name, counts in vars(mine.table.counts).items():
            assert np.array_equal(counts, getattr(other.table.counts, name)), name
        for name in ("positions", "bias", "priority", "open_slot", "clock"):
            assert torch.equal(getattr(mine.engine.kv, name), getattr(other.engine.kv, name)), name


def compiles_once(model, make_cache, backend="eager", **settings):
    """The compiled step gives eager's tokens and state, for two caches in turn, from one graph without a break."""
    eager = make_cache()
    expected = decode(model, eager, **settings)
    assert all((layer.table.evicted >= 2).all() for layer in paged_layers(eager))
    forward = torch.compile(model.forward, fullgraph=True, backend=backend)
    for _ in range(2):
        cache = make_cache()
        assert torch.equal(decode(model, cache, forward, **settings), expected)
        assert cache.is_compileable == model._can_compile_fullgraph
        same_state(cache, eager)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"] and not counters["recompiles"]


@pytest.mark.parametrize("options", [{"method": name} for name in EVICTING] + OPTIONS, ids=label)
def test_every_method_is_one_graph(options):
    settings = {**SMALL, **options}
    method = settings.pop("method")
    compiles_once(tiny_model(dtype=torch.float32), lambda: from_name(method, **settings))


@pytest.mark.parametrize("name", ["deepseek_v3", "falcon_h1", "qwen3_next", "cohere", "gpt2"])
def test_other_architectures_are_one_graph(name):
    """Latent attention, linear attention beside and between, another projection of its own."""
    model = build(name)
    model.set_experts_implementation("batched_mm")  # the eager loop over experts is a graph of its own every time
    compiles_once(model, lambda: RaaSCache(**SMALL, config=model.config))


def test_inductor():
    compiles_once(tiny_model(dtype=torch.float32), lambda: RaaSCache(**SMALL), backend="inductor")


def test_the_triton_engine_is_one_graph(monkeypatch):
    use_engine(monkeypatch, "triton")
    model = tiny_model(dtype=torch.float32, layers=1)
    compiles_once(model, lambda: RaaSCache(**SMALL, top_ratio=0.5, scoring="minmax"), backend="aot_eager", steps=30)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *itertools.product(["llama", "deepseek_v3"], [{}, {"scoring": "minmax"}, {"kv_dtype": "int8"}]),
        ("llama", {"kv_dtype": "int4"}),
    ],
    ids=str,
)
def test_padding_while_decoding(name, options):
    """A latent's token is stored before its mask is seen, any other's after; neither keeps what is hidden."""
    model, padded = build(name), (0, 3, 4, 17)
    model.set_experts_implementation("batched_mm")
    compiles_once(model, lambda: RaaSCache(**SMALL, **options), padded=padded)
    cache = RaaSCache(96, page_size=4, **options)
    decode(model, cache, padded=padded)
    hidden = {9 + step for step in padded}
    for row, missing in ((0, {0, 1, 2} | hidden), (1, set())):
        assert resident_set(cache, 0, row, 0) == set(range(9 + STEPS)) - missing


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_mask_that_is_written_to_from_step_to_step(mode, dtype):
    model = tiny_model(dtype=torch.float32)
    cache = RaaSCache(96, page_size=4)
    shown, hidden = (True, False) if dtype == torch.bool else (0.0, torch.finfo(dtype).min)
    with mode():
        mask = torch.full((1, 1, 1, 1), shown, dtype=dtype)
        model(prompt(1, 9)["input_ids"], past_key_values=cache)
        for step in range(20):
            mask.fill_(hidden if step % 3 == 0 else shown)
            model(torch.full((1, 1), 5), past_key_values=cache, attention_mask=mask)
    assert resident_set(cache, 1, 0, 1) == set(range(29)) - {9 + step for step in range(0, 20, 3)}


def test_prompts_of_other_lengths_take_the_same_graph():
    """Prompt and decode pages lie in one region, whose size is the budget's."""
    model = tiny_model(dtype=torch.float32)
    forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    for length in (8, 17, 25, 12):
        assert torch.equal(*(_after_a_prompt(model, step, length) for step in (model.forward, forward)))
    assert counters["stats"]["unique_graphs"] == 1


def _after_a_prompt(model, forward, length):
    cache, tokens = RaaSCache(64, page_size=4, alpha=0.1), []
    with torch.no_grad():
        logits = model(prompt(1, length)["input_ids"], past_key_values=cache).logits
        for position in range(length, length + 2 * STEPS):
            tokens.append(logits[:, -1:].argmax(-1))
            places = torch.full_like(tokens[-1], position)
            logits = forward(tokens[-1], past_key_values=cache, position_ids=places).logits
    assert cache.evicted_pages(0).min() >= 2
    return torch.cat(tokens, 1)


def test_eager_and_compiled_steps_may_alternate():
    model = tiny_model(dtype=torch.float32)
    plain, mixed = RaaSCache(**SMALL), RaaSCache(**SMALL)
    expected = decode(model, plain)
    compiled, calls = torch.compile(model.forward, fullgraph=True, backend="eager"), []

    def forward(*args, **kwargs):
        calls.append(mixed.get_seq_length())
        return (model.forward if len(calls) // 3 % 2 else compiled)(*args, **kwargs)

    assert torch.equal(decode(model, mixed, forward), expected)
    assert calls == list(range(9, 9 + STEPS))
    same_state(mixed, plain)


def test_positions_are_the_caches_own_where_none_are_given():
    model = tiny_model(dtype=torch.float32)
    tokens = torch.randint(1, 90, (1, 50))
    logits = []
    for compile_it in (False, True):
        cache, outputs = RaaSCache(**SMALL), []
        forward = torch.compile(model.forward, fullgraph=True, backend="eager") if compile_it else model.forward
        with torch.no_grad():
            model(tokens[:, :8], past_key_values=cache)
            for i in range(8, 50):
                outputs.append(forward(tokens[:, i : i + 1], past_key_values=cache).logits)
        logits.append(torch.cat(outputs))
    assert torch.equal(*logits)
    assert counters["stats"]["unique_graphs"] == 1 and cache.get_seq_length() == 50


@pytest.mark.parametrize("kw", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generate_compiles_by_itself(kw):
    """On a CPU only when told so; on CUDA this is what `generate` does."""
    model, inputs = tiny_model(dtype=torch.float32), prompt(2, 12, (5, 0))
    expected = generate(model, inputs, RaaSCache(**SMALL), STEPS, sample=False, **kw)
    assert not counters["stats"]
    for _ in range(2):
        cache = RaaSCache(**SMALL)
        assert torch.equal(
            generate(model, inputs, cache, STEPS, sample=False, compile_config=compile_anywhere(), **kw), expected
        )
        assert cache.evicted_pages(0).min() >= 2
    assert counters["stats"]["unique_graphs"] == (0 if kw else 1)  # transformers' beam search compiles nothing
    assert not counters["graph_break"]


def test_a_turn_between_compiled_steps():
    model, inputs, tokens = tiny_model(dtype=torch.float32), prompt(2, 12, (5, 0)), []
    for config in (None, compile_anywhere()):
        cache = RaaSCache(**SMALL)
        first = generate(model, inputs, cache, STEPS, sample=False, compile_config=config)
        turn = {"input_ids": torch.cat([first, first[:, :7]], 1)}
        tokens.append(generate(model, turn, cache, STEPS, sample=False, compile_config=config))
    assert torch.equal(*tokens)


@pytest.mark.parametrize(
    ("name", "kw"),
    [("raas", {}), ("raas", {"prompt_lookup_num_tokens": 3}), ("raas", {"prefill_chunk_size": 3}), ("quest", {})],
    ids=["prompt", "drafts", "chunks", "growing store"],
)
def test_what_is_not_one_graph_is_right_all_the_same(name, kw):
    """The whole forward compiled by hand: the prompt sizes buffers, drafts and growth look at counts. Graphs break."""
    model, inputs = tiny_model(layers=1, dtype=torch.float32), prompt(1, 9)
    expected = generate(model, inputs, from_name(name, **SMALL), STEPS, sample=False, **kw)
    model.forward = torch.compile(model.forward, backend="eager", dynamic=True)
    cache = from_name(name, **SMALL)
    assert torch.equal(generate(model, inputs, cache, STEPS, sample=False, **kw), expected)
    assert counters["stats"]["unique_graphs"] > 0
    assert cache.evicted_pages(0).min() >= 3 or name == "quest"


def test_is_compileable_says_the_truth():
    assert RaaSCache(64).is_compileable
    assert not DenseCache(64).is_compileable and not QuestCache(64).is_compileable
    cache = RaaSCache(64)
    cache.activate_past_recording()
    assert not cache.is_compileable
    for name, is_static in (("llama", True), ("deepseek_v3", True), ("falcon_h1", True), ("gemma2", False)):
        config = build(name).config
        assert RaaSCache(64, config=config).is_compileable == is_static


@pytest.mark.parametrize(("name", "graphs"), [("llama", 1), ("gemma2", 0)])
def test_generate_asks_before_the_cache_knows_the_model(name, graphs):
    """A window of transformers changes its size from step to step: then nothing is compiled, not anew at every step."""
    model = build(name)
    generate(model, prompt(1, 9), RaaSCache(**SMALL), 20, compile_config=compile_anywhere())
    assert counters["stats"]["unique_graphs"] == graphs


def test_past_recording_is_refused_a_graph():
    model = tiny_model(dtype=torch.float32)
    inputs = prompt(1, 12)
    cache = RaaSCache(**SMALL)
    cache.activate_past_recording()
    expected = generate(model, inputs, RaaSCache(**SMALL), STEPS, sample=False)
    assert torch.equal(generate(model, inputs, cache, STEPS, sample=False, compile_config=compile_anywhere()), expected)
    assert not counters["stats"]
    cache.crop(-5)
    assert cache.get_seq_length() == 12 + STEPS - 1 - 5


def test_dense_is_unchanged():
    """Compiling for one cache does not change what another gets."""
    model, inputs = tiny_model(dtype=torch.float32), prompt(2, 12, (5, 0))
    expected = generate(model, inputs, DynamicCache(), STEPS)
    decode(model, RaaSCache(**SMALL), torch.compile(model.forward, fullgraph=True, backend="eager"))
    assert torch.equal(generate(model, inputs, DynamicCache(), STEPS), expected)


# Not the 8-bit stores: inductor's own rounding decides there which of two codes a number gets. Nor H2O, whose pages are
# ranked by sums of scores, which that rounding makes another number of.
@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [{}, *(o for o in OPTIONS if o["method"] == "raas" and "kv_dtype" not in o)],
    ids=lambda o: "-".join(map(str, o.values())) or "raas",
)
def test_a_cuda_graph_of_every_step(options):
    settings = {**SMALL, **options}
    method = settings.pop("method", "raas")
    model = tiny_model(dtype=torch.float32, head_dim=16).cuda()
    eager = from_name(method, **settings)
    expected = decode(model, eager)
    forward = torch.compile(model.forward, fullgraph=True, mode="reduce-overhead")
    for _ in range(2):
        cache = from_name(method, **settings)
        assert torch.equal(decode(model, cache, forward), expected)
        same_state(cache, eager)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["recompiles"]
    assert not counters["inductor"]["cudagraph_skips"]


@pytest.mark.gpu
@pytest.mark.parametrize("kw", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generate_on_cuda_compiles_by_itself(kw):
    model = tiny_model(dtype=torch.float32, head_dim=16).cuda()
    inputs = {name: tensor.cuda() for name, tensor in prompt(2, 12, (5, 0)).items()}
    expected = generate(model, inputs, RaaSCache(**SMALL), STEPS, sample=False, disable_compile=True, **kw)
    for _ in range(2):
        cache = RaaSCache(**SMALL)
        assert torch.equal(generate(model, inputs, cache, STEPS, sample=False, **kw), expected)
    assert counters["stats"]["unique_graphs"] == (0 if kw else 1)
    assert not counters["inductor"]["cudagraph_skips"]
