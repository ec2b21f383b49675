"""Sequences that come and go in the rows of one cache, each beside the same sequence alone in a cache of its own."""

import torch

from ..helpers import VOCAB
from .alone import Alone, chose, forward, make_cache, same_row


class SharedRows:
    """A cache with rows of their own; after each forward its logits must be those of each sequence alone.

    Attributes:
        alone: the sequence of each row that is not free.
        shift: left padding of each of these rows.
    """

    def __init__(self, model, settings, batch_size, seed=0, tolerance=1e-9):
        self.model, self.settings, self.batch_size = model, settings, batch_size
        self.tolerance = tolerance
        self.cache = make_cache(settings)
        self.alone, self.shift = {}, {}
        self.generator = torch.Generator().manual_seed(seed)

    def random(self, rows, length):
        return torch.randint(1, VOCAB, (rows, length), generator=self.generator)

    def compare(self, logits, row, expected):
        new = len(expected)
        torch.testing.assert_close(
            logits[-new:], expected, rtol=self.tolerance, atol=self.tolerance, msg=lambda m: f"row {row}: {m}"
        )

    def admit(self, lengths):
        """Prompts of these lengths, by row, in one forward, padded on the left."""
        rows, longest = list(lengths), max(lengths.values())
        tokens = self.random(len(rows), longest)
        shift = [longest - lengths[row] for row in rows]
        mask = (torch.arange(longest) >= torch.tensor(shift)[:, None]).long() if any(shift) else None
        if mask is not None:
            tokens = tokens * mask
        with self.cache.admit(rows, batch_size=self.batch_size):
            assert self.cache.get_seq_length() == 0
            logits = forward(self.model, self.cache, tokens, 0, mask)
            assert self.cache.get_seq_length() == longest
        for i, row in enumerate(rows):
            self.alone[row], self.shift[row] = Alone(self.model, make_cache(self.settings)), shift[i]
            self.compare(logits[i], row, self.alone[row].read(tokens[i, shift[i] :]).logits[-1])
        return self

    def read(self, rows, length):
        """A forward of so many tokens in these rows only; None for all rows, the free ones too."""
        touched = list(range(self.batch_size)) if rows is None else list(rows)
        tokens = self.random(len(touched), length)
        starts = [self.alone[row].seen if row in self.alone else 0 for row in touched]
        if rows is None:
            logits = forward(self.model, self.cache, tokens, starts)
        else:
            with self.cache.on_rows(rows):
                seen = max(self.alone[row].seen + self.shift[row] for row in touched)
                assert self.cache.get_seq_length() == seen
                logits = forward(self.model, self.cache, tokens, starts)
                assert self.cache.get_seq_length() == seen + length
        for i, row in enumerate(touched):
            if row in self.alone:
                self.compare(logits[i], row, self.alone[row].read(tokens[i]).logits[-1])
        return self

    def steps(self, count, rows=None):
        for _ in range(count):
            self.read(rows, 1)
        return self

    def release(self, *rows):
        self.cache.release_rows(list(rows))
        for row in rows:
            del self.alone[row]
        return self

    def check(self, evicts=()):
        """Every row holds what it holds alone; the rows `evicts` had to choose."""
        seen = self.cache.seen_tokens
        for row, alone in self.alone.items():
            assert seen[row] == alone.seen + self.shift[row]
            same_row(self.cache, row, alone.cache, self.shift[row])
        for row in evicts:
            assert chose(self.cache, self.settings["method"], row), row
        return self
