"""transformers' own tests of what happens to a cache: going on from one, its operations, and its layout.

A test here checks what the upstream test of the same name checks, see docs/upstream-tests.md.
"""

import copy

import pytest
import torch
from transformers import AttentionInterface, DynamicCache, LlamaConfig, Qwen3Config

from raas_cache.common.upstream import CACHE_ARGUMENT

from ..helpers import generate, prompt, tiny_model
from .test_upstream import embedded
from .upstream import (
    INPUTS,
    LENGTH,
    ONE_ROW,
    STEPS,
    assert_same_cache,
    assert_similar,
    full_budget,
    longer,
    run,
    same_as_dynamic,
    sequence,
)


@pytest.fixture(params=[LlamaConfig, Qwen3Config], ids=["llama", "qwen3"], scope="module")
def model(request):
    return tiny_model(cls=request.param)


class TestGoingOn:
    """A cache that one call of `generate` returned is the start of the next."""

    def test_generate_continue_from_past_key_values(self, model):
        whole = run(model, INPUTS, DynamicCache(), steps=4, sample=False)
        first = run(model, INPUTS, full_budget(), steps=3, sample=False)
        then = run(model, longer(INPUTS, first), first.past_key_values, steps=1, sample=False)
        then.scores = first.scores + then.scores
        assert_similar(then, whole, INPUTS["attention_mask"])

    def test_generate_continue_from_inputs_embeds(self, model):
        inputs = embedded(model, INPUTS, ids=False)
        whole = run(model, inputs, DynamicCache(), steps=4, sample=False)
        first = run(model, inputs, full_budget(), steps=3, sample=False)
        mask = torch.nn.functional.pad(INPUTS["attention_mask"], (0, 3), value=1)
        ids = torch.cat([INPUTS["input_ids"], first.sequences], 1)
        inputs = embedded(model, {"input_ids": ids, "attention_mask": mask}, ids=False)
        then = run(model, inputs, first.past_key_values, steps=1, sample=False)
        then.sequences = torch.cat([first.sequences, then.sequences], 1)
        then.scores = first.scores + then.scores
        assert_similar(then, whole, INPUTS["attention_mask"])

    def test_generate_can_restart_from_cache_and_new_tokens_only(self, model):
        whole = run(model, INPUTS, DynamicCache(), steps=4, sample=False)
        first = run(model, INPUTS, full_budget(), steps=2, sample=False)
        inputs, tail = longer(INPUTS, first), slice(None)
        for _ in range(2):
            then = run(model, inputs, copy.deepcopy(first.past_key_values), steps=2, sample=False)
            assert torch.equal(then.sequences, whole.sequences[:, tail])
            torch.testing.assert_close(then.scores, whole.scores[2:])
            assert_same_cache(then.past_key_values, whole.past_key_values, INPUTS["attention_mask"])
            inputs, tail = inputs | {"input_ids": first.sequences[:, -1:]}, slice(-3, None)

    def test_cache_copy(self, model):
        """One prompt, read once, and two questions after it."""
        start, caches = prompt(1, LENGTH), (full_budget(), DynamicCache())
        with torch.no_grad():
            for cache in caches:
                model(**start, past_key_values=cache)
        answers = []
        for seed in (3, 4):
            ids = torch.cat([start["input_ids"], prompt(1, 5, seed=seed)["input_ids"]], 1)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            ours, expected = (run(model, inputs, copy.deepcopy(cache), sample=False) for cache in caches)
            assert_similar(ours, expected)
            answers.append(ours.sequences[:, -STEPS:])
        assert not torch.equal(*answers)
        assert caches[0].get_seq_length() == LENGTH


class TestCache:
    def test_past_key_values_format(self, model):
        """The layers that `DynamicCache` has, with its heads; tokens lie in pages, one behind the other if read so."""
        cache, expected, config = full_budget(), DynamicCache(), model.config
        cache.preallocate()
        with torch.no_grad():
            output = model(**INPUTS, past_key_values=cache)
            model(**INPUTS, past_key_values=expected)
        assert output.past_key_values is cache and len(cache) == config.num_hidden_layers
        for layer in cache.layers:
            for held in (layer.keys, layer.values):
                assert held.shape == (2, config.num_key_value_heads, 256, config.head_dim)
        assert_same_cache(cache, expected, INPUTS["attention_mask"])

    @pytest.mark.parametrize("implementation", ["quantized", "static", "dynamic", "offloaded"])
    def test_generate_with_quant_cache(self, model, implementation):
        """The part that is about a passed cache: it excludes `cache_implementation`."""
        with pytest.raises(ValueError, match=rf"Passing both `cache_implementation`.*and `{CACHE_ARGUMENT}`"):
            generate(model, INPUTS, full_budget(), STEPS, cache_implementation=implementation)

    def test_cache_batched(self, model):
        together = same_as_dynamic(model, sample=False)
        for row, padding in enumerate((0, 3)):
            alone = {name: tensor[row : row + 1, padding:] for name, tensor in INPUTS.items()}
            tokens = same_as_dynamic(model, alone, sample=False).sequences[0]
            assert torch.equal(tokens, together.sequences[row, padding:])

    def test_cache_beam_search(self, model):
        output = same_as_dynamic(model, sample=False, num_beams=2, num_return_sequences=2)
        # Else no row had to move.
        assert any(len(set(beams)) > 1 for beams in output.beam_indices.tolist())

    def test_cache_extra_left_padding(self, model):
        padded = {name: torch.nn.functional.pad(tensor, (32 - LENGTH, 0)) for name, tensor in ONE_ROW.items()}
        plain, ours = (same_as_dynamic(model, inputs, sample=False) for inputs in (ONE_ROW, padded))
        assert torch.equal(ours.sequences[:, 32:], plain.sequences[:, LENGTH:])


def put(cache, states, layer=0):
    """One update as a model does it: `update`, then the attention function, which reads what that hands out."""
    keys, values = cache.update(states, states.clone(), layer)
    AttentionInterface()["sdpa"](torch.nn.Module(), states, keys, values, None)


class TestSyntheticCache:
    """No model: numbers go in, and the same ones are held."""

    def test_dynamic_cache(self):
        ours, expected = full_budget(), DynamicCache()
        for cache in (ours, expected):
            for tokens in ([1.0, 2.0], [3.0], [4.0], [5.0], [6.0], [7.0], [8.0]):
                for layer in range(2):
                    put(cache, torch.tensor(tokens)[None, None, :, None] * 10**layer, layer)
        assert_same_cache(ours, expected)
        assert [sequence(ours, layer)[0][0, 0, -1, 0].item() for layer in range(2)] == [8.0, 80.0]

    def rows(self, change):
        """Keys of a prompt and two steps, after `change` to a cache of three rows, and after one step more."""
        ours, expected, seen = full_budget(), DynamicCache(), []
        for cache in (ours, expected):
            for width in (2, 1, 1):
                put(cache, torch.arange(3.0)[:, None, None, None] + torch.arange(width)[:, None] * 10)
            change(cache)
            seen.append(sequence(cache, 0)[0][:, 0, 0, 0].tolist())
            put(cache, torch.full((len(seen[-1]), 1, 1, 1), 7.0))
        assert_same_cache(ours, expected)
        return seen

    def test_dynamic_cache_batch_select_indices(self):
        assert self.rows(lambda cache: cache.batch_select_indices((0, 2))) == [[0.0, 2.0]] * 2

    def test_reorder_cache_retrocompatibility(self):
        assert self.rows(lambda cache: cache.reorder_cache(torch.tensor([2, 2, 0]))) == [[2.0, 2.0, 0.0]] * 2
