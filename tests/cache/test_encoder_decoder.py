"""Models with an encoder: the decoder's self-attention is paged, the encoder's keys have a cache of their own."""

import itertools

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MarianConfig,
    MarianMTModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from raas_cache import RaaSCache

from .. import architectures
from ..helpers import compile_anywhere, resident_set
from ..oracle import OracleCache


# More layers in the encoder than in the decoder, as in distilled models.
SIZES = {
    "vocab_size": 97, "d_model": 32, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "decoder_start_token_id": 3,
}  # fmt: skip
SMALL = {"budget": 32, "page_size": 4, "min_decode_pages": 2, "alpha": 0.1}
NAMES = ["bart", "marian", "whisper"]
MEND = r"past_key_values=EncoderDecoderCache\(RaaSCache\(\.\.\.\), DynamicCache\(\)\)"


def build(name):
    """A tiny random model with attention that has clear favourites, and a decoder that looks far back."""
    torch.manual_seed(0)
    if name == "bart":
        model = BartForConditionalGeneration(BartConfig(**SIZES, max_position_embeddings=512, forced_eos_token_id=None))
    elif name == "marian":
        model = MarianMTModel(MarianConfig(**SIZES, max_position_embeddings=512, forced_eos_token_id=None))
    else:
        of_audio = {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 512}
        model = WhisperForConditionalGeneration(WhisperConfig(**SIZES, **of_audio, begin_suppress_tokens=None))
    model = model.double().eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed_positions" not in parameter_name:
                parameter.normal_(0, 0.1 if "embed" in parameter_name else 0.35)
            if "decoder" in parameter_name and "self_attn.out_proj.weight" in parameter_name:
                parameter.mul_(4)
    model.generation_config = GenerationConfig(pad_token_id=0, decoder_start_token_id=3, bos_token_id=1)
    return model


def inputs_of(name):
    """Two rows; where the encoder reads text, the first is shorter."""
    generator = torch.Generator().manual_seed(0)
    if name == "whisper":
        return {"input_features": torch.randn(2, 8, 40, generator=generator, dtype=torch.float64)}
    ids = torch.randint(4, 97, (2, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, name, decoder_cache, steps, **kw):
    torch.manual_seed(0)
    cache = EncoderDecoderCache(decoder_cache, DynamicCache())
    return model.generate(**inputs_of(name), past_key_values=cache, max_new_tokens=steps, **{"do_sample": True, **kw})


@pytest.mark.parametrize("name", NAMES)
class TestServed:
    @pytest.mark.parametrize("kw", [{}, {"do_sample": False, "num_beams": 3}], ids=["sampled", "beams"])
    def test_full_budget_equals_dynamic_cache(self, name, kw):
        model, cache = build(name), RaaSCache(256)
        tokens = generate(model, name, cache, 100, **kw)
        assert torch.equal(tokens, generate(model, name, DynamicCache(), 100, **kw))
        assert cache.get_seq_length() >= 99 and cache.evictions == 0

    def test_small_budget_equals_the_oracle(self, name):
        model, cache, oracle = build(name), RaaSCache(**SMALL), OracleCache(**SMALL)
        tokens = generate(model, name, cache, 200)
        assert not torch.equal(tokens, generate(model, name, DynamicCache(), 200)), "evictions make no difference"
        model.set_attn_implementation("oracle")
        assert torch.equal(tokens, generate(model, name, oracle, 200))
        for layer, row, head in itertools.product(range(2), range(2), range(4)):
            assert resident_set(cache, layer, row, head) == oracle.resident_set(layer, row, head)

    def test_bytes_are_bounded(self, name):
        model, cache = build(name), RaaSCache(**SMALL)
        generate(model, name, cache, 60)
        after_60 = cache.nbytes
        cache.reset()
        generate(model, name, cache, 240)
        # Layers, keys and values, rows, heads, slots, head size, bytes of a number
        assert cache.nbytes == after_60 == 2 * 2 * 2 * 4 * SMALL["budget"] * 8 * 8
        assert cache.evictions > 0

    def test_compiled_step(self, name):
        model, cache = build(name), RaaSCache(**SMALL)
        tokens = generate(model, name, cache, 60, compile_config=compile_anywhere())
        assert torch.equal(tokens, generate(model, name, RaaSCache(**SMALL), 60))

    def test_reset_and_a_new_cache_for_the_encoder(self, name):
        model, cache = build(name), RaaSCache(**SMALL)
        first = generate(model, name, cache, 60)
        cache.reset()
        assert torch.equal(generate(model, name, cache, 60), first)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("has_config", [False, True])
def test_a_cache_for_both_attentions_is_refused(name, has_config):
    model = build(name)
    cache = RaaSCache(256, config=model.config if has_config else None)
    with pytest.raises(ValueError, match=MEND):
        model.generate(**inputs_of(name), past_key_values=cache, max_new_tokens=5)
    assert cache.get_seq_length() == 0
    both = EncoderDecoderCache(cache, DynamicCache())
    expected = generate(model, name, DynamicCache(), 5, do_sample=False)
    tokens = model.generate(**inputs_of(name), past_key_values=both, max_new_tokens=5, do_sample=False)
    assert torch.equal(tokens, expected), "the refused cache is of no use any more"


@pytest.mark.parametrize("length", [1, 9])
def test_as_many_tokens_in_the_encoder_as_in_the_decoder(length):
    """The number of keys does not tell the two attentions apart then: the logits were wrong, without a word."""
    ids = inputs_of("bart")["input_ids"][:, :length]
    with pytest.raises(ValueError, match="This model attends to an encoder"):
        build("bart")(input_ids=ids, decoder_input_ids=ids, past_key_values=RaaSCache(256))


def test_as_many_tokens_of_an_image_as_of_text():
    """Mllama writes an image's keys to a layer of the one cache, and reads them there as if all were still in order."""
    ids, image = torch.randint(97, (1, 9)), torch.randn(1, 9, 32, dtype=torch.float64)
    with pytest.raises(ValueError, match="stores the keys of an image in a layer of the cache"):
        architectures.build("mllama", torch.float64)(ids, cross_attention_states=image, past_key_values=RaaSCache(256))


def test_a_paged_cache_for_the_encoder_is_refused():
    both = EncoderDecoderCache(DynamicCache(), RaaSCache(256))
    with pytest.raises(ValueError, match=MEND):
        build("marian").generate(**inputs_of("marian"), past_key_values=both, max_new_tokens=5)


def test_a_decoder_that_makes_the_second_cache_by_itself():
    """GPT-2 with cross-attention puts the user's cache into an `EncoderDecoderCache`."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, add_cross_attention=True)
    model = GPT2LMHeadModel(config).double().eval()
    encoder, ids, cache = torch.randn(2, 5, 32).double(), torch.randint(97, (2, 9)), RaaSCache(256)
    with torch.no_grad():
        expected = model(ids, encoder_hidden_states=encoder).logits
        logits = model(ids, encoder_hidden_states=encoder, past_key_values=cache).logits
    assert torch.allclose(logits, expected) and cache.get_seq_length() == 9
