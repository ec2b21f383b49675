"""Sequences that each have a cache of their own, to compare the rows of a shared cache with."""

import torch

from raas_cache import from_name

from ..helpers import VOCAB, resident_set
from ..methods.against_oracle import EVICTING, OWN_OPTIONS


PAGE = 4
BUDGET = 6 * PAGE


def settings_of(method, mode, **more):
    """Settings with which each method chooses among few pages."""
    own = {"page_size": PAGE, "min_decode_pages": 2, "prompt": mode}
    return {"method": method, "budget": BUDGET, **own, **OWN_OPTIONS.get(method, {}), **more}


def make_cache(settings):
    rest = dict(settings)
    return from_name(rest.pop("method"), rest.pop("budget"), **rest)


def texts(lengths, seed=0):
    """Random tokens, never the padding token: one 1-d tensor for each length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCAB, (length,), generator=generator) for length in lengths]


def forward(model, cache, tokens, start, mask=None):
    """The logits `[rows, new, vocab]` of one forward.

    Args:
        tokens: `[rows, new]`.
        start: index of the first new token; an int, or one for each row.
        mask: `[rows, tokens so far]`; None if no token is hidden.
    """
    positions = torch.as_tensor(start).reshape(-1, 1) + torch.arange(tokens.shape[1])
    positions = positions.expand(len(tokens), -1)
    if mask is not None:
        positions = positions - (mask == 0).sum(1, keepdim=True)
    with torch.no_grad():
        return model(
            tokens, attention_mask=mask, position_ids=positions.clamp(min=0), past_key_values=cache
        ).logits  # fmt: skip


class Alone:
    """One sequence in a cache of its own.

    Attributes:
        logits: one `[new, vocab]` for each forward.
    """

    def __init__(self, model, cache):
        self.model, self.cache, self.seen, self.logits = model, cache, 0, []

    def read(self, tokens):
        """One forward of the 1-d `tokens`; nothing happens if there are none."""
        if len(tokens):
            self.logits.append(forward(self.model, self.cache, tokens[None], self.seen)[0])
            self.seen += len(tokens)
        return self

    def decode(self, tokens):
        """One forward for each of the 1-d `tokens`."""
        for token in tokens:
            self.read(token[None])
        return self


def paged_layers(cache):
    return [index for index, layer in enumerate(cache.layers) if hasattr(layer, "table")]


def same_row(cache, row, alone, shift=0):
    """Row `row` of `cache` holds what `alone` holds, its positions moved by `shift`, and has evicted as many pages."""
    for layer in paged_layers(cache):
        for head in range(cache.layers[layer].table.num_heads):
            held = resident_set(cache, layer, row, head)
            if hasattr(alone, "resident_positions"):
                expected = resident_set(alone, layer, 0, head)
                evicted = alone.evicted_pages(layer)[0, head]
            else:
                expected, evicted = alone.resident_set(layer, 0, head), alone.evicted(layer, 0, head)
            assert held == {position + shift for position in expected}, (layer, row, head)
            assert cache.evicted_pages(layer)[row, head] == evicted, (layer, row, head)


def chose(cache, method, row):
    """Whether the method had to choose in this row: to evict a page, or to leave a page unread."""
    for layer in paged_layers(cache):
        table = cache.layers[layer].table
        if method in EVICTING and not table.evicted[row] >= 1:
            return False
        if method == "quest" and not table.pages_read < table.num_pages:
            return False
    return True
