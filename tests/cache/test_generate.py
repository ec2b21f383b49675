"""The modes of `generate` and of a session around it, with evictions: against the oracle, or against plain decoding."""

import copy
import io
import threading

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, TextGenerationPipeline
from transformers.generation.streamers import BaseStreamer

from raas_cache import RaaSCache, embedded_model

from ..architectures import build
from ..helpers import generate, prompt, resident_set, tiny_model
from ..oracle import OracleCache


# Turns are pinned on top of the budget, and a warning says so.
pytestmark = pytest.mark.filterwarnings("ignore:budget=48 leaves")
SMALL = {"budget": 48, "page_size": 4, "alpha": 1e-2, "min_decode_pages": 4}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def assert_same_as_oracle(model, inputs, steps, **kw):
    cache, oracle = RaaSCache(**SMALL), OracleCache(**SMALL)
    tokens = generate(model, inputs, cache, steps, **kw)
    original = model.config._attn_implementation
    model.set_attn_implementation("oracle")
    expected = generate(model, inputs, oracle, steps, **kw)
    model.set_attn_implementation(original)
    assert torch.equal(tokens, expected)
    for row in range(cache.batch_size):
        assert resident_set(cache, 1, row, 0) == oracle.resident_set(1, row, 0)
    assert cache.evicted_pages(1).min() >= 10


@pytest.mark.parametrize(
    "mode",
    [
        {"num_beams": 3},
        {"num_beams": 3, "do_sample": True},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 2.0},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": True, "top_k": 5, "repetition_penalty": 1.2},
    ],
    ids=str,
)
def test_strategies_with_evictions_equal_the_oracle(model, mode):
    assert_same_as_oracle(model, prompt(2, 12, (3, 0)), 80, **{"sample": False, **mode})


class Recorded(RaaSCache):
    """Notes how long the first kept draft made the input, and how many drafted tokens were taken back."""

    first, taken_back = None, 0

    def crop(self, tokens_to_remove):
        super().crop(tokens_to_remove)
        self.first = self.first or self.get_seq_length()
        self.taken_back -= tokens_to_remove


def assert_holds_the_same(cache, other):
    for ours, theirs in zip(cache.layers, other.layers, strict=True):
        for name, counts in vars(ours.table.counts).items():
            assert np.array_equal(counts, getattr(theirs.table.counts, name)), name
        kvs = ours.engine.kv, theirs.engine.kv
        orders = [torch.where(kv.bias == 0, kv.positions, torch.iinfo(torch.int32).max).argsort(-1) for kv in kvs]
        for name in ("positions", "bias", "keys", "values"):
            held = [
                torch.take_along_dim(
                    getattr(kv, name), order.view(*order.shape, *[1] * (name in ("keys", "values"))), 2
                )
                for kv, order in zip(kvs, orders, strict=True)
            ]
            visible = [kv.bias.take_along_dim(order, 2) == 0 for kv, order in zip(kvs, orders, strict=True)]
            assert torch.equal(*visible)
            torch.testing.assert_close(held[0][visible[0]], held[1][visible[1]], rtol=1e-9, atol=1e-9)
        priorities = [kv.priority.masked_fill(~kv.held, float("-inf")).sort(-1).values for kv in kvs]
        assert torch.equal(*priorities)


@pytest.mark.parametrize("scoring", ["exact", "minmax"])
@pytest.mark.parametrize("stamping", [{"alpha": 1e-2}, {"alpha": None, "top_ratio": 0.5}], ids=str)
@pytest.mark.parametrize("draft", ["prompt_lookup", "assistant", "early_exit"])
def test_assisted_decoding_holds_what_plain_decoding_holds(model, draft, stamping, scoring):
    """Many drafts are taken back, across page boundaries and evictions, and leave no trace."""
    torch.manual_seed(0)
    inputs = prompt(1, 12)
    extra = {
        "prompt_lookup": {"prompt_lookup_num_tokens": 6, "max_matching_ngram_size": 1},
        "assistant": {"assistant_model": tiny_model(seed=1)},
        "early_exit": {"assistant_early_exit": 1},
    }[draft]
    settings = {**SMALL, **stamping, "scoring": scoring}
    cache = Recorded(**settings)
    tokens = generate(model, inputs, cache, 150, sample=False, **extra)
    # The first draft comes with the prompt, and what is kept of it is pinned with the prompt.
    first, plain = cache.first, RaaSCache(**settings)
    with torch.no_grad():
        model(tokens[:, :first], past_key_values=plain)
        for position in range(first, cache.get_seq_length()):
            model(tokens[:, position : position + 1], past_key_values=plain)
    assert_holds_the_same(cache, plain)
    assert cache.evicted_pages(0).min() >= 20 and cache.taken_back >= (1 if draft == "early_exit" else 20)


@pytest.mark.parametrize("scoring", ["exact", "minmax"])
@pytest.mark.parametrize("kept", [8, 2, 0])
def test_a_turn_with_drafts_is_pinned(model, kept, scoring):
    """The user's second question stays; the draft behind it is taken back, and its stamps with it."""
    cache, plain = (RaaSCache(**SMALL, scoring=scoring) for _ in range(2))
    tokens = torch.cat([prompt(1, 12)["input_ids"], prompt(1, 150, seed=4)["input_ids"]], 1)
    with torch.no_grad():
        for held in (cache, plain):
            model(tokens[:, :12], past_key_values=held)
            for position in range(12, 72):
                model(tokens[:, position : position + 1], past_key_values=held)
        cache.activate_past_recording()
        model(tokens[:, 72:83], past_key_values=cache)
        cache.crop(kept - 11)
        if kept:
            model(tokens[:, 72 : 72 + kept], past_key_values=plain)
        assert_holds_the_same(cache, plain)
        for position in range(72 + kept, 150):
            for held in (cache, plain):
                model(tokens[:, position : position + 1], past_key_values=held)
    assert_holds_the_same(cache, plain)
    assert resident_set(cache, 0, 0, 0) >= {*range(12), *range(72, 72 + kept)}


def test_recording_ends(model):
    """After assisted decoding: the next turn is pinned again, and nothing of before can be taken back."""
    cache = RaaSCache(**SMALL)
    tokens = generate(model, prompt(1, 12), cache, 60, sample=False, prompt_lookup_num_tokens=4)
    seen = cache.get_seq_length()
    cache.deactivate_past_recording()
    with torch.no_grad():
        model(tokens[:, seen:], past_key_values=cache)
        model(tokens[:, :7], past_key_values=cache)
        for position in range(60):
            model(tokens[:, position : position + 1], past_key_values=cache)
    assert resident_set(cache, 0, 0, 0) >= set(range(tokens.shape[1], tokens.shape[1] + 7))
    with pytest.raises(RuntimeError, match="only 0 tokens"):
        cache.crop(-1)


@pytest.mark.parametrize("name", ["gemma3_text", "gpt_oss", "gemma3n_text", "deepseek_v3", "llama4_text", "qwen3_next"])
@pytest.mark.parametrize("mode", [{"prefill_chunk_size": 5}, {"num_beams": 3}], ids=str)
def test_modes_on_other_layers_equal_dynamic_cache(name, mode):
    """Also where the layers are learnt from the first attention call, in the middle of the first chunk's forward."""
    model, inputs = build(name, torch.float64), prompt(2, 24, (7, 0))
    caches = [DynamicCache(config=model.config), RaaSCache(256, config=model.config)]
    if name != "qwen3_next":
        caches.append(RaaSCache(256))
    tokens = [generate(model, inputs, cache, 40, sample=False, **mode) for cache in caches]
    assert all(torch.equal(tokens[0], other) for other in tokens[1:])


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "gpt_oss", "deepseek_v3", "longcat_flash", "lfm2"])
def test_prompt_lookup_on_other_layers(name):
    model = build(name, torch.float64)
    inputs = prompt(1, 12)
    kw = {"sample": False, "prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 1}
    expected = generate(model, inputs, DynamicCache(config=model.config), 60, **kw)
    assert torch.equal(generate(model, inputs, RaaSCache(256, config=model.config), 60, **kw), expected)


@pytest.mark.parametrize("name", ["llama", "youtu"])
def test_a_draft_equals_its_tokens_one_by_one(name):
    model = build(name, torch.float64)
    tokens = prompt(1, 120)["input_ids"]
    drafted, plain = RaaSCache(**SMALL), RaaSCache(**SMALL)
    with torch.no_grad():
        for cache in (drafted, plain):
            model(tokens[:, :12], past_key_values=cache)
            model(tokens[:, 12:13], past_key_values=cache)
        drafted.activate_past_recording()
        model(tokens[:, 13:14], past_key_values=drafted)
        logits = []
        for start in range(14, 114, 5):
            logits.append(model(tokens[:, start : start + 7], past_key_values=drafted).logits[:, :5])
            drafted.crop(-2)
        one_by_one = [model(tokens[:, i : i + 1], past_key_values=plain).logits for i in range(13, 114)]
    torch.testing.assert_close(torch.cat(logits, 1), torch.cat(one_by_one[1:], 1), rtol=1e-9, atol=1e-9)
    assert_holds_the_same(drafted, plain)
    assert plain.evicted_pages(0).min() >= 10


def test_a_conversation_of_three_turns(model):
    cache, oracle = RaaSCache(**SMALL), OracleCache(**SMALL)
    texts = []
    for implementation, held in ((model.config._attn_implementation, cache), ("oracle", oracle)):
        model.set_attn_implementation(implementation)
        text = prompt(2, 12, (5, 0))["input_ids"]
        for turn in range(3):
            text = torch.cat([text, prompt(2, 7, seed=turn)["input_ids"]], 1)
            mask = torch.ones_like(text)
            mask[0, :5] = 0
            text = generate(model, {"input_ids": text, "attention_mask": mask}, held, 50)
        texts.append(text)
    model.set_attn_implementation("sdpa")
    assert torch.equal(*texts)
    assert cache.evicted_pages(0).min() >= 20


def test_one_prompt_for_several_continuations(model):
    inputs = prompt(1, 20)
    prefix = RaaSCache(**SMALL)
    with torch.no_grad():
        model(inputs["input_ids"][:, :-1], past_key_values=prefix)
    results = []
    for seed in range(3):
        fresh = RaaSCache(**SMALL)
        with torch.no_grad():
            model(inputs["input_ids"][:, :-1], past_key_values=fresh)
        results.append(generate(model, inputs, copy.deepcopy(prefix), 100, seed=seed))
        assert torch.equal(results[-1], generate(model, inputs, fresh, 100, seed=seed))
    assert not torch.equal(results[0], results[1])
    assert prefix.get_seq_length() == 19


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_next", "deepseek_v3"])
def test_saved_and_loaded_mid_generation(name, tmp_path):
    model, inputs = build(name, torch.float64), prompt(2, 12, (3, 0))
    cache = RaaSCache(**SMALL, config=model.config)
    half = generate(model, inputs, cache, 60)
    buffer = io.BytesIO()
    torch.save(cache, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    more = {"input_ids": half, "attention_mask": torch.cat([inputs["attention_mask"], torch.ones(2, 60).long()], 1)}
    continuations = [generate(model, more, held, 60, seed=3) for held in (cache, loaded)]
    assert torch.equal(*continuations)


def test_pipeline_streamer_and_dict_output():
    class Collected(BaseStreamer):
        def __init__(self):
            self.tokens, self.is_done = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.is_done = True

    model = AutoModelForCausalLM.from_pretrained(embedded_model())
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    text = "#0 1 + 2\n"
    inputs = tokenizer(text, return_tensors="pt")
    kw = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False}
    streamer, cache = Collected(), RaaSCache(64, page_size=4)
    out = model.generate(**inputs, **kw, past_key_values=cache, streamer=streamer, return_dict_in_generate=True)
    assert out.past_key_values is cache and streamer.is_done
    assert streamer.tokens == out.sequences[0].tolist()
    pipeline = TextGenerationPipeline(model=model, tokenizer=tokenizer)
    result = pipeline(text, **kw, past_key_values=RaaSCache(64, page_size=4), return_tensors=True)
    assert result[0]["generated_token_ids"] == out.sequences[0].tolist()


def test_two_caches_in_turn_on_one_model(model):
    inputs = [prompt(2, 12, (3, 0)), prompt(2, 12, (0, 0), seed=7)]
    alone, in_turn, caches = [], [[], []], [RaaSCache(**SMALL), RaaSCache(**SMALL)]
    feed = [torch.randint(1, 97, (2, 90), generator=torch.Generator().manual_seed(i)) for i in range(2)]

    def step(which, index, cache):
        if index < 0:
            return model(**inputs[which], past_key_values=cache).logits[:, -1]
        return model(feed[which][:, index : index + 1], past_key_values=cache).logits[:, -1]

    with torch.no_grad():
        for which in range(2):
            cache = RaaSCache(**SMALL)
            alone.append(torch.stack([step(which, index, cache) for index in range(-1, 90)]))
        for index in range(-1, 90):
            for which in range(2):
                in_turn[which].append(step(which, index, caches[which]))
    for which in range(2):
        assert torch.equal(torch.stack(in_turn[which]), alone[which])


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_two_threads_with_a_model_each(name):
    """The latent's hand-off goes by thread; everything else travels on the tensors."""
    models = [build(name, torch.float64, seed=seed) for seed in range(2)]
    inputs = prompt(1, 12)
    expected = [generate(model, inputs, RaaSCache(**SMALL), 80, sample=False) for model in models]
    results, errors = [[], []], []

    def work(which):
        try:
            for _ in range(3):
                cache = RaaSCache(**SMALL)
                results[which].append(
                    models[which].generate(
                        **inputs, past_key_values=cache, max_new_tokens=80, min_new_tokens=80, do_sample=False
                    )
                )
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert all(torch.equal(tokens, expected[which]) for which in range(2) for tokens in results[which])
