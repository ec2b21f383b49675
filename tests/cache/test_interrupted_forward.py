"""A forward that ends in the middle, by Ctrl-C, by an error, or because we refuse it: what then uses the same cache
gets the right answer, or is told to call `reset()`; never a wrong answer.
"""

import functools
import itertools
from contextlib import contextmanager

import pytest
import torch
from transformers import AttentionInterface

from ..faults import AT_PROMPT, AT_TURN, LENGTHS, METHODS, Conversation, assert_right_or_refused


pytestmark = pytest.mark.filterwarnings("ignore:budget=")
LAYERS = 3
FORWARDS = {"prompt": AT_PROMPT, "turn": AT_TURN, "generated token": AT_TURN + 1}


@pytest.fixture(autouse=True)
def grows_early(monkeypatch):
    """A store begins with two evictable pages and not with 128 tokens, so that these short conversations outgrow it."""
    monkeypatch.setattr("raas_cache.engine.page_table.FIRST_TOKENS", 8)


@functools.cache
def conversation_of(method, mode):
    return Conversation(method, mode, LAYERS)


def before_update(model, layer, interrupt):
    return model.model.layers[layer].self_attn.register_forward_pre_hook(interrupt).remove


def in_attention(model, layer, interrupt):
    """After the update of the layer's cache, and before anything has read it."""
    implementation = model.config._attn_implementation
    attention = AttentionInterface()[implementation]

    def interrupted(module, *args, **kwargs):
        if module.layer_idx == layer:
            interrupt()
        return attention(module, *args, **kwargs)

    AttentionInterface.register(implementation, interrupted)
    return lambda: AttentionInterface.register(implementation, attention)


def after_attention(model, layer, interrupt):
    return model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(interrupt).remove


def in_mlp(model, layer, interrupt):
    return model.model.layers[layer].mlp.register_forward_pre_hook(interrupt).remove


PLACES = [before_update, in_attention, after_attention, in_mlp]


@contextmanager
def interruption(model, place, layer, error):
    def interrupt(*_):
        raise error

    undo = place(model, layer, interrupt)
    try:
        yield
    finally:
        undo()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("from a hook")], ids=["ctrl-c", "error"])
@pytest.mark.parametrize("what", FORWARDS)
@pytest.mark.parametrize(("method", "mode"), METHODS)
def test_going_on(method, mode, what, error):
    """As `generate` goes on: with the tokens that the cache, by its own count, has not seen."""
    conversation, number = conversation_of(method, mode), FORWARDS[what]
    start = sum(LENGTHS[:number])
    for place in PLACES:
        for layer in range(LAYERS):
            cache = conversation.cache_before(number)
            with pytest.raises(type(error)), interruption(conversation.model, place, layer, error):
                conversation.forward(cache, number)
            # Where the last layer has done its part, the cache has seen the forward, though the caller has no logits.
            seen = cache.get_seq_length()
            assert seen in (start, start + LENGTHS[number])
            assert_right_or_refused(conversation, cache, number if seen == start else number + 1)


@pytest.mark.parametrize("what", FORWARDS)
@pytest.mark.parametrize(("method", "mode"), METHODS)
def test_trying_again(method, mode, what):
    """The same call once more."""
    conversation, number = conversation_of(method, mode), FORWARDS[what]
    for place in PLACES:
        for layer in range(LAYERS):
            cache = conversation.cache_before(number)
            error = KeyboardInterrupt()
            with pytest.raises(KeyboardInterrupt), interruption(conversation.model, place, layer, error):
                conversation.forward(cache, number)
            assert_right_or_refused(conversation, cache, number)


def with_attentions(conversation, cache, number):
    conversation.forward(cache, number, output_attentions=True)


def while_training(conversation, cache, number):
    for layer in conversation.model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    conversation.model.train()
    try:
        conversation.forward(cache, number)
    finally:
        conversation.model.eval()


def with_a_bias(conversation, cache, number):
    """A mask that adds to the attention of tokens that are visible."""
    length = LENGTHS[number]
    bias = torch.linspace(-1, 0, length, dtype=torch.float64).expand(2, 1, length, length)
    conversation.forward(cache, number, attention_mask=bias)


def with_a_short_mask(conversation, cache, number):
    mask = conversation.mask[:, : sum(LENGTHS[: number + 1]) - 1]
    conversation.forward(cache, number, attention_mask=mask)


@pytest.mark.parametrize(
    ("what", "refused"),
    [
        *itertools.product(FORWARDS, [with_attentions, while_training]),
        *itertools.product(["prompt", "turn"], [with_a_bias]),
        *itertools.product(["turn", "generated token"], [with_a_short_mask]),
    ],
)
@pytest.mark.parametrize(("method", "mode"), METHODS)
def test_the_corrected_call_after_a_refusal(method, mode, what, refused):
    conversation, number = conversation_of(method, mode), FORWARDS[what]
    cache = conversation.cache_before(number)
    with pytest.raises(ValueError):
        refused(conversation, cache, number)
    assert assert_right_or_refused(conversation, cache, number) is None, "the refused call changed the cache"
