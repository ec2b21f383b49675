"""A cache that was handed in and would not be used, or used wrongly, without a word from transformers."""

import inspect

import pytest
import torch
from transformers import (
    AttentionMaskInterface,
    ContinuousBatchingConfig,
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    GenerationMixin,
    RwkvConfig,
    RwkvForCausalLM,
)

import raas_cache
from raas_cache import RaaSCache
from raas_cache.attention.dispatch import DISPATCHED

from ..helpers import generate, prompt, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model(dtype=torch.float32)


@pytest.fixture
def unregistered():
    yield
    raas_cache.register()


GREEDY = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
SMALL = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32)


def test_continuous_batching_serves_a_paged_cache(model):
    """`tests/serving` compares the tokens. transformers' own `generate_batch` would drop the cache."""
    prompts, cache = prompt(2, 12)["input_ids"].tolist(), RaaSCache(256)
    found = [model.generate_batch(prompts, GREEDY, **{name: cache}) for name in ("cache", "past_key_values")]
    alone = generate(model, prompt(2, 12), RaaSCache(256), 4, sample=False)[:, 12:].tolist()
    for outputs in found:
        assert [output.generated_tokens for output in outputs.values()] == alone
    assert model.config._attn_implementation == "sdpa"


def test_continuous_batching_refuses_a_cache_that_it_cannot_serve(model):
    prompts, used = prompt(2, 12)["input_ids"].tolist(), RaaSCache(256)
    generate(model, prompt(), used, 4)
    both = EncoderDecoderCache(RaaSCache(256), DynamicCache())
    for cache, reason in ((used, "is not empty"), (both, "is for a model with an encoder")):
        with pytest.raises(
            ValueError, match=rf"cache=.* {reason}: generate_batch takes .* Pass a new cache, or call gen"
        ):
            model.generate_batch(prompts, generation_config=GREEDY, cache=cache)
    assert model.config._attn_implementation == "sdpa", "nothing has begun"


def test_generate_serves_a_paged_cache_where_it_runs_continuous_batching(model):
    inputs = prompt(2, 12)
    found = generate(model, inputs, RaaSCache(256), 4, sample=False, cache_implementation="paged", eos_token_id=-1)
    assert found.flatten(0, -2).tolist() == generate(model, inputs, RaaSCache(256), 4, sample=False).tolist()


def test_continuous_batching_without_a_paged_cache_is_as_before(model, unregistered):
    prompts = prompt(2, 12)["input_ids"].tolist()

    def tokens(**options):
        outputs = model.generate_batch(prompts, GREEDY, SMALL, **options)
        return [outputs[f"req_{i}"].generated_tokens for i in range(2)]

    RaaSCache(32)  # one that was made and thrown away
    found = tokens(), tokens(cache=DynamicCache())
    assert inspect.signature(GenerationMixin.generate_batch).parameters.keys() >= {"inputs", "generation_config"}
    raas_cache.unregister()
    assert found == (tokens(), tokens(cache=RaaSCache(32))), "transformers' own drops the cache"


def test_unregister_leaves_what_another_library_has_put_above(monkeypatch, unregistered):
    checked = GenerationMixin.generate_batch

    def theirs(*args, **options):
        return checked(*args, **options)

    monkeypatch.setattr(GenerationMixin, "generate_batch", theirs)
    raas_cache.unregister()
    assert GenerationMixin.generate_batch is theirs
    raas_cache.register()
    assert GenerationMixin.generate_batch is theirs


def test_use_cache_false_is_refused_before_anything_is_stored(model):
    cache, inputs = RaaSCache(512), prompt()
    for options in ({"use_cache": False}, {"generation_config": GenerationConfig(use_cache=False)}):
        with pytest.raises(ValueError, match="use_cache=False was given together with a cache"):
            generate(model, inputs, cache, 5, **options)
    assert cache.get_seq_length() == 0
    expected = generate(model, inputs, DynamicCache(), 5, sample=False)
    assert torch.equal(generate(model, inputs, cache, 5, sample=False), expected)


def test_a_forward_with_use_cache_false_fills_the_cache(model):
    cache = RaaSCache(512)
    with torch.no_grad():
        model(**prompt(), past_key_values=cache, use_cache=False)
    assert cache.get_seq_length() == 20


# QwenLM/Qwen3 #1826, where the text without its thinking is no longer than what the cache has seen.
@pytest.mark.parametrize("tokens", [10, 28, 29])
@pytest.mark.parametrize("given", ["mask", "no mask", "encoder-decoder cache"])
def test_a_turn_no_longer_than_the_cache_is_refused(model, tokens, given):
    cache = RaaSCache(512)
    generate(model, prompt(), cache, 10)
    before = cache.resident_positions(0)
    new = prompt(length=tokens, seed=1)
    if given == "no mask":
        del new["attention_mask"]
    handed_in = EncoderDecoderCache(cache, DynamicCache()) if given == "encoder-decoder cache" else cache
    with pytest.raises(ValueError, match=rf"input_ids has {tokens} tokens, and the cache has seen 29: .* cache.reset"):
        generate(model, new, handed_in, 5)
    assert cache.get_seq_length() == 29 and torch.equal(cache.resident_positions(0), before)
    cache.reset()
    expected = generate(model, new, DynamicCache(), 5, sample=False)
    assert torch.equal(generate(model, new, cache, 5, sample=False), expected)


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "raas"])
@pytest.mark.parametrize("tokens", [5, 24])
def test_a_mask_that_ends_before_the_new_tokens_is_refused(model, implementation, tokens):
    model.set_attn_implementation(implementation)
    cache, inputs = RaaSCache(512), prompt()
    new, mask = prompt(length=5, seed=1)["input_ids"], torch.ones(1, 25, dtype=torch.long)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        with pytest.raises(ValueError, match=rf"\(1, {tokens}\) is too short: .* 5 tokens are new, .* needs 25"):
            model(new, attention_mask=mask[:, :tokens], past_key_values=cache)
        assert cache.get_seq_length() == 20
        logits = model(new, attention_mask=mask, past_key_values=cache).logits
        whole = model(torch.cat([inputs["input_ids"], new], 1)).logits[:, -5:]
    torch.testing.assert_close(logits, whole)
    model.set_attn_implementation("sdpa")


def test_a_short_mask_is_refused_at_a_decode_step_too(model):
    cache = RaaSCache(512)
    with torch.no_grad():
        model(**prompt(), past_key_values=cache)
        with pytest.raises(ValueError, match=r"\(1, 1\) is too short"):
            model(prompt(length=1)["input_ids"], attention_mask=torch.ones(1, 1), past_key_values=cache)


def test_masks_of_other_caches_are_as_before(model, unregistered):
    """A short mask hides the newest tokens, in transformers' own caches: that is not ours to refuse."""
    logits = []
    for register in (raas_cache.register, raas_cache.unregister):
        register()
        guarded = [hasattr(AttentionMaskInterface()[name], "original") for name in DISPATCHED]
        assert guarded == [register is raas_cache.register] * len(guarded)
        cache = DynamicCache()
        with torch.no_grad():
            model(**prompt(), past_key_values=cache)
            new = prompt(length=5, seed=1)["input_ids"]
            logits.append(model(new, attention_mask=torch.ones(1, 22), past_key_values=cache).logits)
    assert torch.equal(*logits)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")  # of 5.24; 5.17 has no other name
def test_training_with_gradient_checkpointing_is_refused(model):
    cache, inputs = RaaSCache(512), prompt()
    model.gradient_checkpointing_enable()
    model.train()
    try:
        with pytest.raises(ValueError, match=r"gradient checkpointing, .* call model.eval\(\) first"):
            model(**inputs, past_key_values=cache)
        assert cache.get_seq_length() == 0
        model.eval()
        model(**inputs, past_key_values=cache)
        assert cache.get_seq_length() == 20
    finally:
        model.eval()
        model.gradient_checkpointing_disable()


def test_a_model_that_keeps_nothing_in_the_cache_is_refused():
    torch.manual_seed(0)
    config = RwkvConfig(vocab_size=97, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2, context_length=64)
    model = RwkvForCausalLM(config).eval()
    with pytest.raises(ValueError, match="RwkvForCausalLM has read its prompt without storing anything in the cache"):
        generate(model, prompt(), RaaSCache(512), 5)
