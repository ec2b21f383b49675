"""What an eviction policy is."""

from abc import ABC, abstractmethod

import torch


class Policy(ABC):
    """Orders the decode pages for eviction: when a page must go, the one with the smallest priority goes.

    The store sets the priority of the page that takes a new token to that token's sequence index (`on_append` of
    every policy here), takes the smallest `(priority, first sequence index)` as victim, and asks the policy, once a
    forward and layer, to bring the priorities up to date with the attention scores.
    """

    @abstractmethod
    def on_scores(self, priority: torch.Tensor, scores: torch.Tensor, first: torch.Tensor, clock: torch.Tensor) -> None:
        """Update `priority` in place, without a host synchronisation.

        Args:
            priority: `[batch, kv_heads, decode_pages]` float64; -inf marks a page that holds nothing: leave it.
            scores: `[batch, kv_heads, decode_pages]`, attention score of each decode page for this forward's queries.
            first: `[batch, kv_heads, decode_pages]` int32, sequence index of each page's first token.
            clock: `[2]` int64, (sequence index, decode-token index) of the present token.
        """
