"""Models whose own code drops the user's cache within `generate`: kept where that is exact, refused elsewhere.

`prepare_inputs_for_generation` of Phi-3, PhiMoE and Phi-4-multimodal goes on with a new `DynamicCache` when the text
exceeds `original_max_position_embeddings`, and in some releases gives it the last token only. So what is expected here
comes from `use_cache=False`.
"""

import ast
import re
from pathlib import Path

import pytest
import torch
import transformers
from torch._dynamo.utils import counters
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GenerationConfig,
)

from raas_cache import RaaSCache

from ..architectures import build, tiny_config
from ..helpers import compile_anywhere, generate, prompt, resident_set, tiny_model
from ..oracle import OracleCache


NAMES = ["phi3", "phimoe", "phi4_multimodal"]
LIMIT = 64
SMALL = {"budget": 48, "page_size": 4, "min_decode_pages": 4, "alpha": 0.1}
SHORT, LONG = [1.0] * 4, [3.0, 4.0, 5.0, 6.0]


def phi(name, rope="default", limit=LIMIT):
    """A tiny model; `rope` is "default", "longrope", or "longrope, long factors only"."""
    config = tiny_config(name)
    config.original_max_position_embeddings = limit
    if rope != "default":
        has_two = rope == "longrope"
        config.rope_parameters = {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "partial_rotary_factor": 1.0,
            "original_max_position_embeddings": LIMIT,
            "short_factor": SHORT if has_two else LONG,
            "long_factor": LONG,
        }
        if name == "phimoe":
            config.rope_parameters |= {"short_mscale": 1.1 if has_two else 1.3, "long_mscale": 1.3}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").double().eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            # Attention with clear favourites, on which much of the output depends
            if any(part in parameter_name for part in ("q_proj", "k_proj", "qkv_proj", "o_proj", "lm_head")):
                parameter.mul_(2)
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model


def longer(text, by=40):
    """The same conversation, and a turn of so many tokens."""
    text = torch.cat([text, prompt(1, by, seed=1)["input_ids"]], 1)
    return {"input_ids": text, "attention_mask": torch.ones_like(text)}


@pytest.mark.parametrize("name", NAMES)
class TestKept:
    @pytest.mark.parametrize("has_config", [False, True])
    @pytest.mark.parametrize(
        ("rope", "length", "steps"),
        [
            ("default", 20, 100),  # grows beyond the limit
            ("default", 63, 3),
            ("default", 64, 3),
            ("default", 65, 3),
            ("default", 80, 30),  # begins beyond it
            ("longrope", 20, 45),  # stays within: the last token is not read
            ("longrope", 80, 30),
            ("longrope, long factors only", 20, 100),
        ],
    )
    def test_full_budget(self, name, rope, length, steps, has_config):
        model, inputs = phi(name, rope), prompt(1, length)
        cache = RaaSCache(256, config=model.config if has_config else None)
        tokens = generate(model, inputs, cache, steps)
        assert torch.equal(tokens, generate(model, inputs, None, steps, use_cache=False))
        assert cache.get_seq_length() == length + steps - 1

    @pytest.mark.parametrize(("length", "budget"), [(20, 48), (80, 112)])
    def test_small_budget_equals_the_oracle(self, name, length, budget):
        settings, inputs = SMALL | {"budget": budget}, prompt(1, length)
        cache, oracle = RaaSCache(**settings), OracleCache(**settings)
        tokens = generate(phi(name), inputs, cache, 150)
        model = phi(name, limit=1 << 12)
        assert not torch.equal(tokens, generate(model, inputs, DynamicCache(), 150)), "evictions make no difference"
        model.set_attn_implementation("oracle")
        assert torch.equal(tokens, generate(model, inputs, oracle, 150))
        for layer in range(2):
            assert resident_set(cache, layer, 0, 0) == oracle.resident_set(layer, 0, 0)

    def test_padded_batch(self, name):
        model, inputs = phi(name), prompt(2, 20, (5, 0))
        tokens = generate(model, inputs, RaaSCache(256), 80)
        assert torch.equal(tokens, generate(model, inputs, None, 80, use_cache=False))

    def test_a_turn_across_the_limit(self, name):
        model, cache = phi(name), RaaSCache(256)
        inputs = longer(generate(model, prompt(1, 20), cache, 20))
        tokens = generate(model, inputs, cache, 10)
        assert torch.equal(tokens, generate(model, inputs, None, 10, use_cache=False))

    def test_drafts_across_the_limit(self, name):
        model, inputs = phi(name), prompt(1, 20)
        tokens = generate(model, inputs, RaaSCache(256), 80, sample=False, prompt_lookup_num_tokens=3)
        assert torch.equal(tokens, generate(model, inputs, None, 80, sample=False, use_cache=False))


def test_without_a_limit():
    """PhiMoE's config names one only beside longrope."""
    model = build("phimoe", torch.float64)
    assert not hasattr(model.config, "original_max_position_embeddings")
    tokens = generate(model, prompt(1, 20), RaaSCache(256), 80)
    assert torch.equal(tokens, generate(model, prompt(1, 20), None, 80, use_cache=False))


def test_compiled_steps_across_the_limit():
    model, inputs, cache = phi("phi3"), prompt(1, 20), RaaSCache(**SMALL)
    counters.clear()
    tokens = generate(model, inputs, cache, 80, compile_config=compile_anywhere())
    assert counters["stats"]["unique_graphs"] == 1
    assert torch.equal(tokens, generate(model, inputs, RaaSCache(**SMALL), 80))
    assert cache.get_seq_length() == 99


@pytest.mark.parametrize("name", NAMES)
class TestRefused:
    def test_before_the_first_token(self, name):
        model, cache = phi(name, "longrope"), RaaSCache(256)
        message = rf"original_max_position_embeddings={LIMIT} tokens.*may come to 66 tokens.*short_factor.*long_factor"
        with pytest.raises(ValueError, match=message):
            generate(model, prompt(1, 20), cache, 46)
        assert cache.get_seq_length() == 0
        tokens = generate(model, prompt(1, 20), cache, 45)
        assert torch.equal(tokens, generate(model, prompt(1, 20), None, 45, use_cache=False))

    def test_a_turn_that_comes_to_the_limit(self, name):
        model, cache = phi(name, "longrope"), RaaSCache(256)
        text = generate(model, prompt(1, 20), cache, 20)
        inputs = {"input_ids": text, "attention_mask": torch.ones_like(text)}
        with pytest.raises(ValueError, match="may come to 80 tokens"):
            generate(model, longer(text, 10), cache, 30)
        with pytest.raises(ValueError, match="the cache holds 39 tokens, and the text is longer now"):
            generate(model, longer(text, 40), cache, 10)
        tokens = generate(model, inputs, cache, 10)
        assert torch.equal(tokens, generate(model, inputs, None, 10, use_cache=False))

    def test_factors_changed_after_loading(self, name):
        """The model has made its frequencies of the old ones, or (PhiMoE) has a scale besides that changes."""
        model = phi(name, "longrope")
        model.config.rope_parameters["short_factor"] = LONG
        with pytest.raises(ValueError, match="RoPE changes there"):
            generate(model, prompt(1, 20), RaaSCache(256), 60)


def test_these_are_all_models_that_drop_their_cache():
    """Where the installed transformers sets the cache to None in `prepare_inputs_for_generation`."""
    found = {}
    for path in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        text = path.read_text()
        if not re.search(r"^ +(cache|past_key_values) = None$", text, re.MULTILINE):
            continue
        methods = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef))
        for code in (ast.unparse(node) for node in methods if node.name == "prepare_inputs_for_generation"):
            if re.search(r"^ +(cache|past_key_values) = None$", code, re.MULTILINE):
                found[path.parent.name] = "original_max_position_embeddings" in code
    assert found == dict.fromkeys(NAMES, True)


IMAGE, BEGIN, END = 96, 95, 94
TEXT = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4, "projection_dim": 32,
}  # fmt: skip


def seeing(cls, config):
    torch.manual_seed(0)
    model = cls(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and ("language_model" in name or "projector" in name):
                parameter.normal_(0, 0.4)
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model


def gemma3():
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16, "query_pre_attn_scalar": 8}
    names = {"image_token_index": IMAGE, "image_token_id": IMAGE, "boi_token_index": BEGIN, "eoi_token_index": END}
    config = Gemma3Config(text_config=TEXT | layers, vision_config=VISION, mm_tokens_per_image=4, **names)
    return seeing(Gemma3ForConditionalGeneration, config)


def picture(seed):
    """Text, an image of 4 tokens, text; and its pixels."""
    generator = torch.Generator().manual_seed(seed)
    before, after = (torch.randint(3, 90, (1, 4), generator=generator) for _ in range(2))
    ids = torch.cat([before, torch.tensor([[BEGIN, *[IMAGE] * 4, END]]), after], 1)
    return ids, torch.randn(1, 3, 8, 8, generator=generator, dtype=torch.float64)


def see(model, ids, pixels, cache):
    types = (ids == IMAGE).long()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": types, "pixel_values": pixels}
    return generate(model, inputs, cache, 30)


class TestImageInALaterTurn:
    def conversation(self, model, cache):
        """The text of a first turn with an image and of a second, and the second one's image."""
        (ids, pixels), (turn, second) = picture(1), picture(2)
        return torch.cat([see(model, ids, pixels, cache), turn], 1), second

    def test_gemma3(self):
        model, cache = gemma3(), RaaSCache(256)
        dense = DynamicCache(config=model.config)
        (text, second), _ = (self.conversation(model, one) for one in (cache, dense))
        assert torch.equal(see(model, text, second, cache), see(model, text, second, dense))

    @pytest.mark.parametrize(
        "settings", [{}, {"page_size": 4, "prompt": "select"}, {"page_size": 4, "prompt": "evict"}]
    )
    def test_a_block_and_a_branch(self, settings):
        """Rows of different masks: tokens 2 to 5 see each other in row 0, token 7 sees none of the others in row 1."""
        model = tiny_model()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "v_proj" in name or "o_proj" in name:
                    parameter.mul_(8)  # so that attention decides on the output
        among = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
        among[0, :, 2:6, 2:6], among[1, :, 7, :7] = True, False
        whole = torch.cat([torch.ones(2, 1, 9, 12, dtype=torch.bool), among], 3)
        ids, turn = prompt(2, 12)["input_ids"], prompt(2, 9, seed=2)["input_ids"]
        with torch.no_grad():
            caches = cache, dense = RaaSCache(256, **settings), DynamicCache()
            for one in caches:
                model(ids, past_key_values=one)
            logits = model(turn, attention_mask=among, past_key_values=cache).logits
            expected = model(turn, attention_mask=whole, past_key_values=dense).logits
            assert torch.allclose(logits, expected)
            after = [model(turn[:, :1], past_key_values=one).logits for one in caches]
        assert torch.allclose(*after)
        causal = model(torch.cat([ids, turn], 1)).logits[:, 12:]
        assert (causal - expected).abs().amax((1, 2)).min() > 0.01 * expected.abs().max(), (
            "the mask makes no difference"
        )
