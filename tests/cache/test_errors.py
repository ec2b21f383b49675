"""Bad input: a clear error that names the argument, the value and the mend, before any wrong token."""

import pytest
import torch
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    DiffLlamaConfig,
    DynamicCache,
    Gemma3TextConfig,
    GlmMoeDsaConfig,
    MistralConfig,
    Qwen3NextConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from raas_cache import RaaSCache

from ..architectures import build, require, tiny_config
from ..helpers import generate, prompt, tiny_model


def tiny_qwen3_next():
    return Qwen3NextConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, layer_types=["linear_attention", "full_attention"],
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, linear_key_head_dim=8, linear_value_head_dim=8,
        linear_num_key_heads=2, linear_num_value_heads=2, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16, shared_expert_intermediate_size=16,
    )  # fmt: skip


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
        ({"alpha": "high"}, TypeError, "alpha='high' must be a number, not str"),
        (
            {"alpha": 0.01, "top_ratio": 0.5},
            ValueError,
            "alpha=0.01 and top_ratio=0.5: give only one of the two",
        ),
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
    assert (cache.settings.policy.alpha, cache.settings.policy.top_ratio) == (None, 0.5)


class TestUsedAgain:
    def test_another_batch_size(self):
        model, cache = tiny_model(), RaaSCache(256)
        generate(model, prompt(2), cache, 5)
        with pytest.raises(ValueError, match=r"24 tokens with batch size 2.*keys have batch size 3.*new cache.*reset"):
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
    @pytest.mark.parametrize("implementation", ["flex_attention", "somebodys_own"])
    def test_is_named_before_a_wrong_token(self, implementation):
        AttentionInterface.register("somebodys_own", sdpa_attention_forward)
        model = tiny_model(dtype=torch.float32)
        model.set_attn_implementation(implementation)
        with pytest.raises(RuntimeError, match=rf"{implementation}.*did not read.*set_attn_implementation\(\"raas\"\)"):
            generate(model, prompt(), RaaSCache(256), 5)

    def test_with_a_single_layer(self):
        AttentionInterface.register("somebodys_own", sdpa_attention_forward)
        model = tiny_model(layers=1, dtype=torch.float32)
        model.set_attn_implementation("somebodys_own")
        with pytest.raises(RuntimeError, match="somebodys_own"):
            generate(model, prompt(), RaaSCache(256), 5)

    def test_a_model_that_changes_its_values(self):
        """Differential attention reads each key twice, with values mixed between the heads."""
        model = tiny_model(cls=DiffLlamaConfig, dtype=torch.float32)
        with pytest.raises(ValueError, match="DiffLlamaAttention changes its values between cache and attention"):
            generate(model, prompt(), RaaSCache(256), 5)

    def test_eager_attention_that_cannot_be_found(self):
        class Attention(torch.nn.Module):
            def forward(self, states):
                return states

        message = r"function eager_attention_forward .*Attention has none: call raas_cache.unregister\(\)"
        with pytest.raises(RuntimeError, match=message):
            AttentionInterface()["eager"](Attention(), *torch.zeros(3, 1, 1, 1, 8), None)


class TestLayersItCannotHold:
    def test_linear_attention_without_config_says_config(self):
        model = AutoModelForCausalLM.from_config(tiny_qwen3_next())
        with pytest.raises(ValueError, match=r"linear-attention layer.*RaaSCache\(budget, config=model.config\)"):
            generate(model, prompt(), RaaSCache(256), 5)

    def test_only_windows(self):
        config = MistralConfig(sliding_window=16, num_hidden_layers=2)
        with pytest.warns(UserWarning, match=r"No layer of 'mistral' has full attention.*budget=256 has no effect"):
            RaaSCache(256, config=config)

    def test_config_with_an_unknown_layer(self):
        with pytest.raises(ValueError, match="layer 0 of 'glm_moe_dsa' needs a DynamicIndexedLayer"):
            RaaSCache(256, config=GlmMoeDsaConfig(num_hidden_layers=2))

    @pytest.mark.parametrize("is_told", [False, True])
    def test_a_model_that_reads_its_cache_by_itself(self, is_told):
        require("dory")
        config = tiny_config("dory")
        config.recurrent_kv_cache_mode = "last_loop"
        model = AutoModelForCausalLM.from_config(config)
        with pytest.raises(ValueError, match="'dory' reads keys directly from the buffers of the cache"):
            generate(model, prompt(), RaaSCache(256, config=config if is_told else None), 5)

    def test_a_window_that_only_the_config_knows(self):
        """The layers that a looped model appends are copies, of which there is none yet without a config."""
        require("dory")
        model = AutoModelForCausalLM.from_config(tiny_config("dory"))
        with pytest.raises(ValueError, match=r"sliding_window=16.*pass config=model.config to the cache"):
            generate(model, prompt(), RaaSCache(256), 5)

    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    def test_attention_of_evicted_tokens(self, implementation):
        model = tiny_model(dtype=torch.float32)
        model.set_attn_implementation(implementation)
        with pytest.raises(ValueError, match=r"output_attentions=True.*evicted tokens have no attention weight"):
            model(**prompt(), past_key_values=RaaSCache(256), output_attentions=True)

    def test_attention_of_evicted_tokens_asked_for_by_the_config(self):
        model = tiny_model(dtype=torch.float32)
        model.set_attn_implementation("eager")
        model.config.output_attentions = True
        with pytest.raises(ValueError, match="output_attentions=True"):
            model(**prompt(), past_key_values=RaaSCache(256))

    def test_cross_attention(self):
        cache, module = RaaSCache(256), torch.nn.Module()
        key, value = cache.update(*torch.zeros(2, 1, 2, 9, 8), 0)
        message = "reads 9 new keys with 4 new queries: a paged cache serves self-attention.*EncoderDecoderCache"
        with pytest.raises(ValueError, match=message):
            AttentionInterface()["sdpa"](module, torch.zeros(1, 2, 4, 8), key, value, None)

    def test_training(self):
        model = tiny_model(dtype=torch.float32, attention_dropout=0.1).train()
        with pytest.raises(ValueError, match=r"dropout=0.1.*model.eval\(\)"):
            model(**prompt(), past_key_values=RaaSCache(256))


class TestMasks:
    @pytest.mark.parametrize("keys", [24, 26])
    def test_a_mask_of_another_length_is_refused(self, keys):
        model, cache = tiny_model(), RaaSCache(256)
        generate(model, prompt(), cache, 5)
        message = (
            rf"attention_mask of shape \(1, 1, 1, {keys}\) covers {keys} keys, but the sequence has 24 old and 1 new"
        )
        with pytest.raises(ValueError, match=message):
            model(
                torch.ones(1, 1, dtype=torch.long),
                attention_mask=torch.ones(1, 1, 1, keys, dtype=torch.bool),
                past_key_values=cache,
            )

    def test_a_past_that_differs_from_token_to_token_is_refused(self):
        model, cache = tiny_model(), RaaSCache(256)
        generate(model, prompt(), cache, 5)
        mask = torch.ones(1, 1, 3, 27, dtype=torch.bool).tril(24)
        mask[..., 1, 10:15] = False
        with pytest.raises(ValueError, match="hides a past token from some new tokens but not from all"):
            model(torch.ones(1, 3, dtype=torch.long), attention_mask=mask, past_key_values=cache)

    def test_new_tokens_that_see_each_other_are_no_draft(self):
        model, cache = tiny_model(), RaaSCache(256)
        generate(model, prompt(), cache, 5)
        cache.activate_past_recording()
        with pytest.raises(ValueError, match=r"not causal among the new tokens.*deactivate_past_recording\(\)"):
            model(
                torch.ones(1, 3, dtype=torch.long),
                attention_mask=torch.ones(1, 1, 3, 3, dtype=torch.bool),
                past_key_values=cache,
            )
        logits = model(torch.ones(1, 3, dtype=torch.long), past_key_values=cache).logits
        text = torch.cat([generate(model, prompt(), DynamicCache(), 5)[:, :-1], torch.ones(1, 3, dtype=torch.long)], 1)
        torch.testing.assert_close(logits, model(text).logits[:, -3:], rtol=1e-9, atol=1e-9)


class TestCrop:
    def test_without_a_record(self):
        cache = RaaSCache(256)
        generate(tiny_model(), prompt(), cache, 5)
        with pytest.raises(RuntimeError, match=r"tokens_to_remove=-1.*only 0 tokens.*activate_past_recording\(\)"):
            cache.crop(-1)

    def test_beyond_the_record_changes_nothing(self):
        model, cache = tiny_model(), RaaSCache(256)
        generate(model, prompt(), cache, 5)
        cache.activate_past_recording()
        model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
        with pytest.raises(RuntimeError, match=r"tokens_to_remove=-2.*only 1 tokens"):
            cache.crop(-2)
        assert cache.get_seq_length() == 25
        cache.crop(-1)
        assert cache.get_seq_length() == 24

    def test_positive(self):
        cache = RaaSCache(256)
        generate(tiny_model(), prompt(), cache, 5)
        with pytest.raises(ValueError, match="tokens_to_remove=3 must be 0 or the negative number"):
            cache.crop(3)

    def test_a_window_that_was_not_recorded_leaves_the_cache_usable(self):
        layer_types = ["sliding_attention", "full_attention"]
        model = tiny_model(cls=Gemma3TextConfig, sliding_window=8, layer_types=layer_types)
        cache = RaaSCache(256)
        with torch.no_grad():
            model(**prompt(), past_key_values=cache)
            with pytest.raises(RuntimeError, match="activate_past_recording"):
                cache.crop(-1)  # the pages could; the window, which is full, could not
            model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
        assert cache.layers[1].table.length == 21

    def test_a_recurrent_state(self):
        config = tiny_qwen3_next()
        cache = RaaSCache(256, config=config)
        with torch.no_grad():
            AutoModelForCausalLM.from_config(config)(**prompt(), past_key_values=cache)
        with pytest.raises(
            RuntimeError, match=r"layer 0 \(LinearAttentionLayer\) has one state .* and cannot take tokens back"
        ):
            cache.crop(-1)


def test_int4_of_an_odd_head_size():
    model, cache = tiny_model(head_dim=8), RaaSCache(256, kv_dtype="int4")
    with pytest.raises(ValueError, match=r"head sizes are 7 \(keys\) and 8 \(values\): use kv_dtype='int8'"):
        cache.update(torch.randn(1, 2, 5, 7), torch.randn(1, 2, 5, 8), 0)
    assert generate(model, prompt(), cache, 2).shape[1] > 2, "even ones are stored"


def test_int4_of_a_latent():
    require("deepseek_v3")
    with pytest.raises(ValueError, match="kv_dtype='int4' does not support models that cache a latent"):
        generate(build("deepseek_v3"), prompt(), RaaSCache(256, kv_dtype="int4"), 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to offload from")
def test_offloading_without_a_gpu():
    with pytest.raises(ValueError, match="offloading=True needs a CUDA GPU, and this machine has none"):
        RaaSCache(256, offloading=True)


@pytest.mark.parametrize("question", ["resident_positions", "resident_tokens", "evicted_pages"])
def test_questions_about_a_layer_that_is_not_there(question):
    cache = RaaSCache(256)
    with pytest.raises(ValueError, match="layer_idx=0 is not a layer of this cache"):
        getattr(cache, question)(0)
    generate(tiny_model(), prompt(), cache, 2)
    with pytest.raises(ValueError, match="layer_idx=-1"):
        getattr(cache, question)(-1)
