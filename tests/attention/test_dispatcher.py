"""The three doors of the hand-off: other caches and models notice nothing, and unregister puts everything back."""

import subprocess
import sys

import pytest
import torch
from transformers import AttentionInterface, DynamicCache

import raas_cache
from raas_cache import RaaSCache
from raas_cache.attention.dispatch import DISPATCHED, dispatcher
from raas_cache.attention.eager import _find_eager

from ..architectures import build
from ..helpers import generate, prompt, tiny_model


@pytest.fixture(autouse=True)
def registered():
    yield
    raas_cache.register()


def test_another_cache_gets_the_original_once_a_call_bit_for_bit(monkeypatch):
    model, inputs = tiny_model(dtype=torch.float32), prompt(2, 12, (5, 0))
    with torch.no_grad():
        raas_cache.unregister()
        expected = model(**inputs, past_key_values=DynamicCache()).logits
        original = AttentionInterface()["sdpa"]
        calls = []

        def spy(*args, **kwargs):
            calls.append(args[0])
            return original(*args, **kwargs)

        monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", dispatcher(spy))
        logits = model(**inputs, past_key_values=DynamicCache()).logits
    assert torch.equal(logits, expected)
    assert calls == [layer.self_attn for layer in model.model.layers]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "qwen3_next"])
def test_eager_is_the_models_own_bit_for_bit(name):
    model, inputs = build(name), prompt(2, 12, (5, 0))
    model.set_attn_implementation("eager")
    logits = []
    for register in (raas_cache.unregister, raas_cache.register):
        register()
        assert ("eager" in AttentionInterface()) == (register is raas_cache.register)
        with torch.no_grad():
            logits.append(model(**inputs, past_key_values=DynamicCache(config=model.config)).logits)
    assert torch.equal(*logits)


def test_eager_with_another_name_is_found():
    """phi4_multimodal's file has two eager functions: its vision and audio layers use the simple one."""
    from transformers.models.phi4_multimodal import modeling_phi4_multimodal as modeling

    assert _find_eager(modeling.Phi4MultimodalAttention) is modeling.eager_attention_forward
    assert _find_eager(modeling.Phi4MultimodalVisionAttention) is modeling.simple_eager_attention_forward


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_compiles_as_before_without_a_graph_break(implementation, recwarn):
    model, inputs = tiny_model(dtype=torch.float32), prompt(2, 12, (5, 0))
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
        assert torch.equal(compiled(**inputs, use_cache=False).logits, model(**inputs, use_cache=False).logits)
    assert not [warning for warning in recwarn if "raas_cache" in str(warning.message)]


def test_without_a_cache_training_is_untouched():
    model, inputs = tiny_model(dtype=torch.float32), prompt(2, 12)
    gradients = []
    for register in (raas_cache.unregister, raas_cache.register):
        register()
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
    assert torch.equal(*gradients)


def test_register_twice_wraps_once():
    raas_cache.register()
    before = {name: AttentionInterface()[name] for name in DISPATCHED if name in AttentionInterface()}
    raas_cache.register()
    assert before == {name: AttentionInterface()[name] for name in before}
    assert all(not hasattr(function.dense, "dense") for function in before.values())


def test_unregister_restores_the_originals_and_the_cache_then_refuses():
    raas_cache.unregister()
    interface = AttentionInterface()
    assert interface["sdpa"].__module__ == "transformers.integrations.sdpa_attention"
    assert not any(hasattr(interface[name], "dense") for name in DISPATCHED if name in interface)
    model = tiny_model(dtype=torch.float32)
    with pytest.raises(RuntimeError, match="'sdpa' did not read the paged cache"):
        generate(model, prompt(), RaaSCache(256), 5)
    model.set_attn_implementation("raas")
    generate(model, prompt(), RaaSCache(256), 5)


def test_raas_implementation_equals_the_default():
    model, inputs = tiny_model(dtype=torch.float32), prompt(2, 12, (5, 0))
    default = generate(model, inputs, RaaSCache(64, page_size=4), 100)
    model.set_attn_implementation("raas")
    assert torch.equal(generate(model, inputs, RaaSCache(64, page_size=4), 100), default)
    expected = generate(model, inputs, DynamicCache(), 100)
    model.set_attn_implementation("sdpa")
    assert torch.equal(generate(model, inputs, DynamicCache(), 100), expected)


def test_the_flash_dispatcher_serves_a_paged_cache_from_a_2d_mask():
    """Flash kernels are not at hand on a CPU: a stand-in takes the place of the prefill, which is all they are for."""
    model, inputs = tiny_model(dtype=torch.float32), prompt(2, 12, (5, 0))
    expected = generate(model, inputs, RaaSCache(64, page_size=4), 60)
    seen = []

    def flash_stand_in(module, query, key, value, attention_mask, **kwargs):
        seen.append(attention_mask)
        causal = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).tril()
        mask = causal & attention_mask[:, None, None].bool()
        return AttentionInterface()["sdpa"].dense(module, query, key, value, mask, **kwargs)

    from transformers import AttentionMaskInterface
    from transformers.masking_utils import flash_attention_mask

    AttentionInterface.register("stand_in", dispatcher(flash_stand_in))
    AttentionMaskInterface.register("stand_in", flash_attention_mask)
    model.set_attn_implementation("stand_in")
    assert torch.equal(generate(model, inputs, RaaSCache(64, page_size=4), 60), expected)
    assert len(seen) == 2 and seen[0].ndim == 2


def test_importing_raas_cache_is_all_the_set_up():
    code = (
        "import raas_cache, transformers; from transformers import AttentionInterface as A;"
        "print(hasattr(A()['sdpa'], 'dense'), 'raas' in A())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["True", "True"]
