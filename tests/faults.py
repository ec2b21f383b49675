"""A conversation that can be begun anywhere, with a cache that something has gone wrong in: goes it on right or not?"""

import copy
import functools

import torch

from raas_cache import from_name

from .helpers import resident_set, tiny_model


PROMPT, TURN = 9, 6
# Four tokens a page: the turn finds the open page half filled, and the last page opens behind it.
LENGTHS = [PROMPT, *[1] * 14, TURN, *[1] * 8]
AT_PROMPT, AT_TURN = 0, 15
METHODS = [
    ("raas", "pin"), ("raas", "select"), ("raas", "evict"), ("streaming_llm", "evict"), ("h2o", "evict"),
    ("tova", "evict"), ("rkv", "evict"), ("quest", "select"), ("dense", "pin"),
]  # fmt: skip
OPTIONS = {"raas": {"alpha": 0.3}, "quest": {"dense_layers": 0}}


class Conversation:
    """The same tokens for every cache, and what an undisturbed cache answers: `answers[i]` to forward number `i`."""

    def __init__(self, method, mode, layers):
        self.model = tiny_model(layers=layers)
        self.new_cache = functools.partial(
            from_name, method, 24, page_size=4, min_decode_pages=3, prompt=mode, **OPTIONS.get(method, {})
        )
        tokens = torch.randint(1, 97, (2, sum(LENGTHS)), generator=torch.Generator().manual_seed(3))
        self.mask = torch.ones_like(tokens)
        self.mask[0, :3] = 0
        self.chunks = tokens.split(LENGTHS, 1)
        cache = self.new_cache()
        self.before, self.answers = [], []
        for number in range(len(LENGTHS)):
            self.before.append(copy.deepcopy(cache))
            self.answers.append(self.forward(cache, number))
        self.before.append(cache)

    def cache_before(self, number):
        """A cache that has taken all forwards before number `number`."""
        return copy.deepcopy(self.before[number])

    def forward(self, cache, number, rows=slice(None), **kwargs):
        start = sum(LENGTHS[:number])
        arguments = {"attention_mask": self.mask[rows, : start + LENGTHS[number]], **kwargs}
        with torch.no_grad():
            return self.model(self.chunks[number][rows], past_key_values=cache, **arguments).logits

    def draft(self, cache, numbers):
        """Several forwards of one token as one forward."""
        tokens = torch.cat([self.chunks[number] for number in numbers], 1)
        with torch.no_grad():
            return self.model(
                tokens, attention_mask=self.mask[:, : sum(LENGTHS[: numbers[-1] + 1])], past_key_values=cache
            ).logits

    def assert_answer(self, logits, number, rows=slice(None)):
        start = sum(LENGTHS[:number])
        visible = self.mask[rows, start : start + LENGTHS[number]].bool()
        expected = self.answers[number][rows]
        torch.testing.assert_close(logits[visible], expected[visible], rtol=1e-6, atol=1e-6)

    def assert_goes_on(self, cache, number, rows=slice(None), forwards=7):
        """From forward number `number` on the cache answers as the undisturbed one, and holds the same tokens."""
        end = min(number + forwards, len(LENGTHS))
        for each in range(number, end):
            self.assert_answer(self.forward(cache, each, rows), each, rows)
        rows = range(2)[rows] if isinstance(rows, slice) else rows
        for layer in range(len(cache)):
            for row, source in enumerate(rows):
                for head in range(2):
                    expected = resident_set(self.before[end], layer, source, head)
                    assert resident_set(cache, layer, row, head) == expected, (layer, row, head)

    @property
    def at_eviction(self):
        """Number of the first forward of one token in which the cache evicts, or grows if it never evicts."""
        sizes = [(cache.evictions, cache.nbytes) for cache in self.before]
        return next(n for n in range(8, AT_TURN) if sizes[n] != sizes[n + 1])


def refusal(function, *args):
    """The message with which the cache refuses to go on, None if it does go on; any other error is a failure.

    A forward that has reached every layer may only be found out by its mask, which is shorter than what was seen.
    """
    try:
        function(*args)
    except (RuntimeError, ValueError) as error:
        is_refusal = type(error) is RuntimeError or (type(error) is ValueError and "attention_mask" in str(error))
        assert is_refusal and "reset()" in str(error), f"no refusal that helps: {error!r}"
        assert "set_attn_implementation" not in str(error), f"blames the attention implementation: {error}"
        return str(error)
    return None


def assert_right_or_refused(conversation, cache, number, rows=slice(None)):
    """Forward number `number` and those after it are right; or refused until `reset()`, and right after it.

    Returns:
        Whether the cache has refused.
    """
    if refusal(conversation.assert_goes_on, cache, number, rows) is None:
        return False
    assert refusal(conversation.forward, cache, number, rows), "refused once, and then went on"
    cache.reset()
    conversation.assert_goes_on(cache, 0, forwards=2)
    return True
