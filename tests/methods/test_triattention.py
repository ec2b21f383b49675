"""TriAttention: the rotary embeddings of models, the score in closed form, and models that it refuses."""

import math

import pytest
import torch
from transformers import CohereConfig, DeepseekV3Config, GlmConfig, GPT2Config, Qwen3Config

from raas_cache import TriAttentionCache, from_name
from raas_cache.engine.rotation import Rotation

from ..architectures import build, require
from ..helpers import generate, prompt, resident_set, tiny_model


CPU = torch.device("cpu")
SMALL = {"budget": 48, "page_size": 4, "min_decode_pages": 5}
pytestmark = pytest.mark.filterwarnings("ignore:budget=")


def rotation_of(model):
    cache = TriAttentionCache(64)
    with torch.no_grad():
        model(**prompt(1, 5), past_key_values=cache)
    return cache.layers[0].engine.rotation


def test_the_rotation_of_llama():
    found, expected = rotation_of(tiny_model(head_dim=16)), Rotation.standard(16, 10_000.0, CPU)
    assert torch.equal(found.first, expected.first) and torch.equal(found.second, expected.second)
    torch.testing.assert_close(found.frequency, expected.frequency, rtol=1e-6, atol=1e-7)


def test_pairs_of_neighbours():
    found = rotation_of(tiny_model(cls=CohereConfig, head_dim=8, sharp=False))
    assert found.first.tolist() == [0, 2, 4, 6] and found.second.tolist() == [1, 3, 5, 7]


def test_a_rotation_of_half_of_the_components():
    found = rotation_of(tiny_model(cls=GlmConfig, head_dim=8, sharp=False))
    assert found.first.tolist() == [0, 2, 4, 6] and found.second.tolist() == [1, 3, 5, 7]
    assert (found.frequency > 0).tolist() == [True, True, False, False]


def test_each_layer_of_a_hybrid_has_its_own():
    require("gemma3_text")
    model = build("gemma3_text", torch.float64)
    cache = TriAttentionCache(64, config=model.config)
    with torch.no_grad():
        model(**prompt(1, 5), past_key_values=cache)
    found = [layer.engine.rotation for layer in cache.layers if hasattr(layer, "table")]
    expected = model.model.rotary_emb.full_attention_inv_freq.double()
    assert found
    for rotation in found:
        torch.testing.assert_close(rotation.frequency, expected, rtol=1e-5, atol=1e-7)


def test_rotations_add_up_and_keep_lengths():
    rotation = Rotation.standard(8, 100.0, CPU)
    states = torch.randn(3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    there = rotation.rotated(states, torch.arange(5))
    torch.testing.assert_close(rotation.rotated(there, -torch.arange(5)), states)
    torch.testing.assert_close(rotation.sizes(there), rotation.sizes(states))
    distances = torch.tensor([1, 2, 4])
    each = torch.stack([rotation.rotated(states, distance) for distance in distances])
    torch.testing.assert_close(rotation.averaged(states, distances), each.mean(0))


@pytest.mark.parametrize("matrix", [torch.eye(3), torch.ones(4, 4), torch.tensor([[0.0, 1, 0], [0, 0, 1], [1, 0, 0]])])
def test_a_matrix_that_is_no_rotation_of_pairs(matrix):
    with pytest.raises(ValueError, match="does not rotate pairs of components"):
        Rotation.from_matrix(matrix)


def test_it_is_not_a_window_and_heads_differ():
    cache = from_name("triattention", **SMALL)
    generate(tiny_model(), prompt(1, 21), cache, 100, sample=False)
    held = [resident_set(cache, 1, 0, head) for head in range(2)]
    assert held[0] != held[1] and min(token for token in held[0] if token >= 21) < 120 - 48


def test_the_centre_is_the_mean_query_of_the_chain():
    """A taken-back token leaves no trace in it, and a prompt has no part in it."""
    model, tokens = tiny_model(layers=1), prompt(1, 40)["input_ids"]
    centres = []
    for drafted in (False, True):
        cache = TriAttentionCache(64, page_size=4)
        if drafted:
            cache.activate_past_recording()
        with torch.no_grad():
            model(tokens[:, :20], past_key_values=cache)
            for start in range(20, 32):
                model(tokens[:, start : start + 1], past_key_values=cache)
            if drafted:
                model(tokens[:, 33:38], past_key_values=cache)
                cache.crop(-5)
        centres.append(cache.layers[0].engine.kv.row_states.clone())
    assert torch.equal(*centres) and centres[0].abs().max() > 0


@pytest.mark.parametrize(
    ("cls", "more", "message"),
    [
        (GPT2Config, {}, "GPT2Model has no rotary embedding that the cache can find"),
        (DeepseekV3Config, None, "caches a latent instead of keys"),
    ],
)
def test_refused_models(cls, more, message):
    model = build("deepseek_v3", torch.float64) if more is None else tiny_model(cls=cls, sharp=False, **more)
    with pytest.raises(ValueError, match=message):
        generate(model, prompt(1, 9), TriAttentionCache(64), 20)


def test_normalised_queries_and_keys():
    """Qwen3 has a norm between the projection and RoPE: the centre is taken behind it."""
    cache = from_name("triattention", **SMALL)
    generate(tiny_model(cls=Qwen3Config), prompt(1, 21), cache, 60, sample=False)
    centre = cache.layers[0].engine.kv.row_states[:, :, 0]
    assert cache.evictions > 0 and centre.norm(dim=-1).max() <= math.sqrt(8) * 1.01


def test_a_new_row_forgets_the_mean_of_the_row_before():
    """Also if that row's queries were not finite."""
    model, cache = tiny_model(layers=1), TriAttentionCache(64, page_size=4)
    tokens = prompt(1, 30)["input_ids"]

    @torch.no_grad()
    def row_states():
        with cache.admit(0, batch_size=1):
            model(tokens[:, :9], past_key_values=cache)
        for token in tokens[:, 9:].split(1, dim=1):
            model(token, position_ids=cache.seen_tokens[:, None], past_key_values=cache)
        return cache.layers[0].engine.kv.row_states

    first = row_states().clone()
    row_states().fill_(math.nan)
    cache.release_rows(0)
    centre, length = row_states().unbind(2)  # a length belongs to a pair: half of the vector is not used
    assert torch.equal(centre, first[:, :, 0]) and torch.equal(length[..., :4], first[:, :, 1, :4])
