"""Bad input: a clear error that names the argument, the value and the mend, before any wrong token."""

import pytest
import torch
from transformers import AttentionInterface, DeepseekV3Config, FalconH1Config, Gemma2Config, MistralConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from raas_cache import RaaSCache

from .helpers import generate, prompt, tiny_model


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"budget": 0}, ValueError, "budget=0 must be positive"),
        ({"budget": -64}, ValueError, "budget=-64 must be positive"),
        ({"budget": 10.5}, TypeError, "budget=10.5 must be an int, not float"),
        ({"budget": True}, TypeError, "budget=True must be an int, not bool"),
        ({"budget": "1024"}, TypeError, "budget='1024' must be an int, not str"),
        ({"budget": 15}, ValueError, "budget=15 is less than one page: make it at least page_size=16"),
        ({"page_size": 12}, ValueError, "page_size=12 must be a power of two: try 16"),
        ({"page_size": 0}, ValueError, "page_size=0 must be positive"),
        ({"min_decode_pages": 0}, ValueError, "min_decode_pages=0 must be positive"),
        ({"alpha": 0}, ValueError, r"alpha=0 must lie in \(0, 1\)"),
        ({"alpha": 1.0}, ValueError, r"alpha=1.0 must lie in \(0, 1\)"),
        ({"alpha": float("nan")}, ValueError, r"alpha=nan must lie in \(0, 1\)"),
        ({"alpha": "high"}, TypeError, "alpha='high' must be a float, not str"),
        ({"alpha": None}, ValueError, "give exactly one of the two stamping rules"),
        ({"alpha": 0.01, "top_ratio": 0.5}, ValueError, "alpha=0.01 and top_ratio=0.5: give exactly one"),
        ({"top_ratio": 0.0}, ValueError, r"top_ratio=0.0 must lie in \(0, 1\]"),
        ({"top_ratio": 1.5}, ValueError, r"top_ratio=1.5 must lie in \(0, 1\]"),
        ({"scoring": "mean"}, ValueError, "scoring='mean' is unknown: use one of 'exact', 'minmax'"),
        ({"granularity": "token"}, ValueError, "granularity='token' is unknown: use one of 'head', 'layer'"),
    ],
    ids=str,
)
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        RaaSCache(**{"budget": 1024, **kwargs})


def test_top_ratio_replaces_the_default_alpha():
    model = tiny_model(layers=1)
    cache = RaaSCache(256, top_ratio=0.5)
    generate(model, prompt(), cache, 2)
    assert (cache.layers[0].policy.alpha, cache.layers[0].policy.top_ratio) == (None, 0.5)


class TestUsedAgain:
    def test_another_batch_size(self):
        model, cache = tiny_model(), RaaSCache(256)
        generate(model, prompt(2), cache, 5)
        with pytest.raises(ValueError, match=r"24 tokens with batch size 2.*keys with batch size 3.*new cache.*reset"):
            model(torch.ones(3, 1, dtype=torch.long), past_key_values=cache)

    def test_another_dtype(self):
        cache = RaaSCache(256)
        generate(tiny_model(), prompt(2), cache, 5)
        with pytest.raises(ValueError, match=r"dtype torch.float64.*dtype torch.float32"):
            tiny_model(dtype=torch.float32)(torch.ones(2, 1, dtype=torch.long), past_key_values=cache)

    def test_reset_makes_it_new(self):
        model, cache = tiny_model(), RaaSCache(96, page_size=4)
        first = generate(model, prompt(2), cache, 100)
        cache.reset()
        assert cache.nbytes == 0 and cache.get_seq_length() == 0
        generate(model, prompt(3, 30), cache, 40)
        cache.reset()
        assert torch.equal(generate(model, prompt(2), cache, 100), first)


class TestAttentionThatDoesNotRead:
    @pytest.mark.parametrize("implementation", ["eager", "somebodys_own"])
    def test_is_named_before_a_wrong_token(self, implementation):
        AttentionInterface.register("somebodys_own", sdpa_attention_forward)
        model = tiny_model(dtype=torch.float32)
        model.set_attn_implementation(implementation)
        with pytest.raises(RuntimeError, match=rf"{implementation}.*did not read.*set_attn_implementation\(\"raas\"\)"):
            generate(model, prompt(), RaaSCache(256), 5)

    def test_with_a_single_layer(self):
        model = tiny_model(layers=1, dtype=torch.float32)
        model.set_attn_implementation("eager")
        with pytest.raises(RuntimeError, match="eager"):
            generate(model, prompt(), RaaSCache(256), 5)

    def test_a_latent_expanded_after_update(self):
        """DeepSeek-V3 caches a latent and expands it: the attention sees another key."""
        model = tiny_model(
            cls=DeepseekV3Config, dtype=torch.float32, head_dim=8, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8,
            qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=2, kv_heads=4,
        )  # fmt: skip
        with pytest.raises((RuntimeError, ValueError), match="did not read the paged cache"):
            generate(model, prompt(), RaaSCache(256), 5)


class TestLayersItCannotHold:
    def test_a_window_without_config_says_config(self):
        model = tiny_model(cls=MistralConfig, sliding_window=16, dtype=torch.float32)
        with pytest.raises(ValueError, match=r"sliding_window=16.*pass config=model.config"):
            generate(model, prompt(), RaaSCache(256), 5)

    def test_softcap(self):
        model = tiny_model(cls=Gemma2Config, dtype=torch.float32, layer_types=["full_attention"] * 2)
        model.set_attn_implementation("raas")
        with pytest.raises(ValueError, match=r"softcap=50.0, which the paged attention does not compute"):
            generate(model, prompt(), RaaSCache(256, config=model.config), 5)

    def test_config_with_an_unknown_layer(self):
        with pytest.raises(ValueError, match="layer 0 of 'falcon_h1' needs a LinearAttentionAndFullAttentionLayer"):
            RaaSCache(256, config=FalconH1Config(num_hidden_layers=2))

    def test_attention_of_evicted_tokens(self):
        model = tiny_model(dtype=torch.float32)
        with pytest.raises(ValueError, match="output_attentions"):
            model(**prompt(), past_key_values=RaaSCache(256), output_attentions=True)

    def test_training(self):
        model = tiny_model(dtype=torch.float32, attention_dropout=0.1).train()
        with pytest.raises(ValueError, match=r"dropout=0.1.*model.eval\(\)"):
            model(**prompt(), past_key_values=RaaSCache(256))


class TestMasks:
    def test_a_mask_over_the_past_is_refused(self):
        model, cache = tiny_model(), RaaSCache(256)
        generate(model, prompt(), cache, 5)
        with pytest.raises(ValueError, match=r"attention_mask of shape \(1, 1, 1, 25\) spans 25 keys where 1 "):
            model(
                torch.ones(1, 1, dtype=torch.long),
                attention_mask=torch.ones(1, 1, 1, 25, dtype=torch.bool),
                past_key_values=cache,
            )

    def test_new_tokens_that_see_each_other_are_refused(self):
        model, cache = tiny_model(), RaaSCache(256)
        generate(model, prompt(), cache, 5)
        with pytest.raises(ValueError, match="not causal among the new tokens"):
            model(
                torch.ones(1, 3, dtype=torch.long),
                attention_mask=torch.ones(1, 1, 3, 3, dtype=torch.bool),
                past_key_values=cache,
            )


@pytest.mark.parametrize("mode", ["prompt_lookup", "assistant"])
def test_assisted_decoding_is_refused(mode):
    model = tiny_model(dtype=torch.float32)
    extra = {"prompt_lookup_num_tokens": 3} if mode == "prompt_lookup" else {"assistant_model": tiny_model(seed=1)}
    with pytest.raises(RuntimeError, match="cannot take tokens back"):
        generate(model, prompt(), RaaSCache(256), 20, sample=False, **extra)


@pytest.mark.parametrize("question", ["resident_positions", "resident_tokens", "evicted_pages"])
def test_questions_about_a_layer_that_is_not_there(question):
    cache = RaaSCache(256)
    with pytest.raises(ValueError, match="layer_idx=0 is not a layer of this cache"):
        getattr(cache, question)(0)
    generate(tiny_model(), prompt(), cache, 2)
    with pytest.raises(ValueError, match="layer_idx=-1"):
        getattr(cache, question)(-1)
