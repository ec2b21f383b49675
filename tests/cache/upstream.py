"""What the tests taken over from transformers share: small settings, and comparing a RaaSCache with a DynamicCache."""

import torch
from transformers import DynamicCache

from raas_cache import RaaSCache

from ..helpers import generate, prompt


STEPS = 6
LENGTH = 7
INPUTS = prompt(2, LENGTH, (0, 3))
ONE_ROW = prompt(1, LENGTH, seed=1)
# The settings that upstream gives to every strategy.
PROCESSORS = {"bad_words_ids": [[1, 0]], "repetition_penalty": 1.2, "remove_invalid_values": True}
GREEDY = {"sample": False, **PROCESSORS}
SAMPLE = {"sample": True, "top_k": 10, "top_p": 0.7, "temperature": 0.7, **PROCESSORS}
BEAM = {"num_beams": 2, "length_penalty": 2.0, "early_stopping": False}


def full_budget():
    """Small pages, so that a few tokens fill several; room for all of them."""
    return RaaSCache(256, page_size=4)


def run(model, inputs, cache, steps=STEPS, **kw):
    return generate(model, inputs, cache, steps, return_dict_in_generate=True, output_scores=True, **kw)


def sequence(cache, layer):
    """Keys and values of a layer in the order of the sequence, as DynamicCache has them; padding may hold anything."""
    keys, values = cache.layers[layer].keys, cache.layers[layer].values
    if isinstance(cache, RaaSCache):
        slots = cache.resident_positions(layer).argsort(-1)[..., -cache.get_seq_length() :, None]
        keys, values = (torch.take_along_dim(tensor, slots, 2) for tensor in (keys, values))
    return keys, values


def assert_same_cache(ours, expected, mask=None, **tolerance):
    assert isinstance(ours, RaaSCache) and len(ours) == len(expected)
    assert ours.get_seq_length() == expected.get_seq_length()
    for layer in range(len(expected)):
        assert ours.evicted_pages(layer).max() == 0
        for mine, theirs in zip(sequence(ours, layer), sequence(expected, layer), strict=True):
            visible = torch.ones(theirs.shape[0], theirs.shape[2])
            if mask is not None:
                visible[:, : mask.shape[1]] = mask.repeat_interleave(len(theirs) // len(mask), 0)
            visible = visible[:, None, :, None].bool()
            torch.testing.assert_close(mine.where(visible, 0), theirs.where(visible, 0), **tolerance)


def assert_similar(ours, expected, mask=None, **tolerance):
    """Upstream lets tokens differ where scores nearly tie; float64 has no need for that."""
    assert torch.equal(ours.sequences, expected.sequences)
    torch.testing.assert_close(ours.scores, expected.scores, **tolerance)
    assert_same_cache(ours.past_key_values, expected.past_key_values, mask, **tolerance)


def same_as_dynamic(model, inputs=INPUTS, **kw):
    """Run `generate` with DynamicCache and with RaaSCache, compare all there is, and return the latter's output."""
    cache = full_budget()
    ours, expected = run(model, inputs, cache, **kw), run(model, inputs, DynamicCache(), **kw)
    assert ours.past_key_values is cache
    assert_similar(ours, expected, inputs.get("attention_mask"))
    return ours


def longer(inputs, output):
    """Inputs that go on where `output` ended, its cache aside."""
    new = output.sequences.shape[1] - inputs["attention_mask"].shape[1]
    return {
        "input_ids": output.sequences,
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, new), value=1),
    }
