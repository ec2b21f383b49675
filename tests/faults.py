"""A conversation that can be begun anywhere, with a cache that something has gone wrong in: goes it on right or not?"""

import copy
import functools

import torch

from raas_cache import from_name

from .helpers import resident_set, tiny_model


PROMPT, TURN = 9, 6
# Four tokens a page: forward number 13 opens a page, for which methods that evict give one up, and the turn finds that
# page half filled.
LENGTHS = [PROMPT, *[1] * 14, TURN, *[1] * 8]
AT_PROMPT, AT_OPENING, AT_TURN = 0, 13, 15
METHODS = [
    ("raas", "pin"), ("raas", "select"), ("raas", "evict"), ("streaming_llm", "evict"), ("h2o", "evict"),
    ("tova", "evict"), ("rkv", "evict"), ("random", "evict"),
    ("gkv", "evict"), ("lazy_eviction", "evict"), ("vase", "evict"), ("triattention", "pin"), ("quest", "select"),
    ("dense", "pin"),
]  # fmt: skip
OPTIONS = {"raas": {"alpha": 0.3}, "quest": {"dense_layers": 0}, "random": {"recent_tokens": 4}}


class Conversation:
    """The same tokens for every cache, and what an undisturbed cache answers: `answers[i]` to forward number `i`."""

    def __init__(self, method, mode, layers, budget=24, lengths=LENGTHS):
        self.model, self.lengths = tiny_model(layers=layers), lengths
        self.new_cache = functools.partial(
            from_name, method, budget, page_size=4, min_decode_pages=3, prompt=mode, **OPTIONS.get(method, {})
        )
        tokens = torch.randint(1, 97, (2, sum(lengths)), generator=torch.Generator().manual_seed(3))
        self.mask = torch.ones_like(tokens)
        self.mask[0, :3] = 0
        self.chunks = tokens.split(lengths, 1)
        cache = self.new_cache()
        self.before, self.answers = [], []
        for number in range(len(lengths)):
            self.before.append(copy.deepcopy(cache))
            self.answers.append(self.forward(cache, number))
        self.before.append(cache)

    def cache_before(self, number):
        """A cache that has taken all forwards before number `number`."""
        return copy.deepcopy(self.before[number])

    def forward(self, cache, number, rows=slice(None), **kwargs):
        arguments = {"attention_mask": self.mask[rows, : sum(self.lengths[: number + 1])], **kwargs}
        with torch.no_grad():
            return self.model(self.chunks[number][rows], past_key_values=cache, **arguments).logits

    def draft(self, cache, numbers):
        """Several forwards of one token as one forward."""
        tokens = torch.cat([self.chunks[number] for number in numbers], 1)
        with torch.no_grad():
            return self.model(
                tokens, attention_mask=self.mask[:, : sum(self.lengths[: numbers[-1] + 1])], past_key_values=cache
            ).logits

    def assert_answer(self, logits, number, rows=slice(None)):
        start = sum(self.lengths[:number])
        visible = self.mask[rows, start : start + self.lengths[number]].bool()
        expected = self.answers[number][rows]
        torch.testing.assert_close(logits[visible], expected[visible], rtol=1e-6, atol=1e-6)

    def assert_goes_on(self, cache, number, rows=slice(None), forwards=7):
        """From forward number `number` on the cache answers as the undisturbed one, and holds the same tokens."""
        end = min(number + forwards, len(self.lengths))
        for each in range(number, end):
            self.assert_answer(self.forward(cache, each, rows), each, rows)
        rows = range(2)[rows] if isinstance(rows, slice) else rows
        for layer in range(len(cache)):
            for row, source in enumerate(rows):
                for head in range(2):
                    expected = resident_set(self.before[end], layer, source, head)
                    assert resident_set(cache, layer, row, head) == expected, (layer, row, head)

    @property
    def at_growth(self):
        """Number of the first forward of one token for which the cache takes more memory."""
        sizes = [cache.nbytes for cache in self.before]
        return next(n for n in range(1, len(self.lengths)) if sizes[n + 1] > sizes[n])


def refusal(function, *args):
    """The message with which the cache refuses to go on, None if it does go on; any other error is a failure.

    A forward that has reached every layer may only be found out by its mask, which is shorter than what was seen.
    """
    try:
        function(*args)
    except (RuntimeError, ValueError) as error:
        is_refusal = type(error) is RuntimeError or (type(error) is ValueError and "attention_mask" in str(error))
        assert is_refusal and "reset()" in str(error), f"no refusal that helps: {error!r}"
        return str(error)
    return None


def assert_right_or_refused(conversation, cache, number, rows=slice(None)):
    """Forward number `number` and those after it are right; or refused until `reset()`, and right after it.

    Returns:
        The message of the refusal, or None.
    """
    message = refusal(conversation.assert_goes_on, cache, number, rows)
    if message is None:
        return None
    assert refusal(conversation.forward, cache, number, rows), "refused once, and then went on"
    cache.reset()
    conversation.assert_goes_on(cache, 0, forwards=2)
    return message
