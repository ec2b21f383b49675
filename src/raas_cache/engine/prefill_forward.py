"""The forward of prefill tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

import raas_kernels

from .attention_inputs import Expanded, Seen, Softmax
from .forward_base import StoringForward
from .held_prompt import HeldPrompt, joined
from .hide import hide_newest
from .layer_engine import LayerEngine
from .packed_pages import write_prefill_keys
from .prefill import write_prefill
from .prefill_eviction import enter_competition, keep_best
from .resize import uncompiled
from .rollback import PrefillNote
from .step import rank


if TYPE_CHECKING:
    from .prefill import Places


class Prefill(StoringForward):
    """Prefill tokens: a prompt, a chunk of a prompt, or a user's turn."""

    def __init__(self, layer: LayerEngine, key: torch.Tensor, value: torch.Tensor, is_first: bool):
        super().__init__(layer, key, value)
        self.is_first = is_first
        self.among: torch.Tensor | None = None
        self.places: Places | None = None
        self.held: HeldPrompt | None = None  # the earlier chunks of this prompt
        self.exact: Expanded | None = None  # the tokens before they become codes, for rows that begin here
        self.competes = False  # whether its pages must still be reduced to the budget (prompt="evict")

    @uncompiled
    def store(self, seen: Seen) -> None:
        layer, self.among = self.layer, seen.get("among")
        self._note(PrefillNote)
        visible, leading, count = seen.get("visible"), seen.get("leading"), len(self.key)
        if visible is not None and len(visible) != count:  # one mask for all rows
            visible, leading = visible.expand(count, -1), leading and leading * count
        self.places = write_prefill(layer.table, self.key, self.value, visible, leading, layer.rows)
        self.held = None if layer.rows is None else layer.held_prompts.pop(int(layer.rows.on_host[0]), None)
        self.begins = self.places.begins | (self.held is not None)
        if layer.settings.kv_dtype is not None and not self.is_first and self.begins.any():
            self.exact = self.key, self.value
            if visible is not None:
                hidden = ~visible[:, None, :, None]
                self.exact = raas_kernels.finite(self.key, hidden), raas_kernels.finite(self.value, hidden)
            if self.held is not None and self.held.exact is not None:
                before = self.held.exact
                self.exact = joined(before[0], self.exact[0]), joined(before[1], self.exact[1])
        self.competes, layer.admits = layer.settings.prompt == "evict", False
        self.key = self.value = None  # type: ignore[assignment]

    @uncompiled
    def read(self, query: torch.Tensor, softmax: Softmax, expanded: Expanded | None) -> torch.Tensor | None:
        layer = self.layer
        if self.is_first:
            if self.competes:
                self._compete(query, softmax, expanded)
            return None
        if layer.rollback.notes:
            layer.rollback.note_read(query, softmax)
        if layer.prompt_continues or self.held is not None:
            return self._read_chunk(query, softmax)
        window = layer.policy.prompt_window if self.competes else None
        output, scores = layer.attend_prefill(query, softmax, expanded, self.among, window)
        if self.exact is not None and expanded is None:
            output, _ = layer.attend_prefill(query, softmax, self.states(), self.among)
        queries = query.shape[2] if window is None else min(window, query.shape[2])
        self._rank(scores, queries)
        return output

    def _read_chunk(self, query: torch.Tensor, softmax: Softmax) -> torch.Tensor:
        """Read a chunk of a prompt that is cut: the pages compete after the last chunk, as if it were not cut."""
        layer, rows, observed = self.layer, self.layer.rows, None
        assert rows is not None and self.places is not None
        row = int(rows.on_host[0])
        # 1. The output, from the exact keys and values if the pages hold codes.
        output, _ = layer.attend_prefill(query, softmax, None if self.exact is None else self.states(), observed=0)
        # 2. The queries so far that will score the pages.
        if self.competes:
            before = None if self.held is None else self.held.queries
            observed = joined(before, query, layer.policy.prompt_window)
        if layer.prompt_continues:
            layer.held_prompts[row] = HeldPrompt(observed, self.exact, self)
        else:
            self.end_prompt(observed, softmax)
        return output

    @uncompiled
    def end_prompt(self, observed: torch.Tensor | None, softmax: Softmax) -> None:
        """After the last chunk: code the pages that two chunks have filled, and reduce the prompt to the budget.

        Args:
            observed: `[1, heads, queries, head_dim]`, the queries of all chunks that score the pages; None if the pages
                of a prompt are not evicted.
        """
        layer, rows = self.layer, self.layer.rows
        assert rows is not None and self.places is not None
        self.places = self.places.of_whole_prompt(int(layer.table.counts.prefilled[int(rows.on_host[0])]))
        if layer.settings.is_packed and self.exact is not None:
            write_prefill_keys(layer.kv, self.places, self.exact[0], None, rows)
        if observed is not None:
            queries = observed.shape[2]
            self.evict(layer.attend_prefill(observed, softmax)[1] if queries else None, queries)

    def states(self) -> Expanded:
        """As `Forward.states`. A row that begins here reads its tokens as in a first forward: not as codes."""
        states = super().states()
        if self.exact is None or self.places is None:
            return states
        begins = torch.from_numpy(self.begins).to(self.layer.table.device)[:, None, None, None]
        keys, values = (
            torch.where(begins, self._by_slot(exact), stored) for exact, stored in zip(self.exact, states, strict=True)
        )
        return keys, values

    def _compete(self, query: torch.Tensor, softmax: Softmax, expanded: Expanded | None) -> None:
        """After a first forward: score the pages with the last queries, then reduce them to the budget."""
        layer, window = self.layer, self.layer.policy.prompt_window
        observed = self.new if window is None else min(window, self.new)
        scores = None
        if observed:
            if expanded is not None:
                expanded = self._by_slot(expanded[0]), self._by_slot(expanded[1])
            _, scores = layer.attend_prefill(query[:, :, -observed:], softmax, expanded, self.among)
        self._rank(scores, observed)

    def _by_slot(self, states: torch.Tensor) -> torch.Tensor:
        """Move states of the new tokens `[rows, heads, new, head_dim]` to slots, `[rows, heads, slots, head_dim]`."""
        assert self.places is not None
        slots = self.layer.kv.bias.shape[2]
        dropped = torch.from_numpy(self.places.dropped).to(states.device)
        token = (torch.arange(slots, device=states.device) + dropped[:, None]).clamp(max=states.shape[2] - 1)
        return torch.take_along_dim(states, token[:, None, :, None], 2)

    def _rank(self, scores: torch.Tensor | None, queries: int) -> None:
        layer = self.layer
        if self.competes:
            self.evict(scores, queries)
        elif layer.table.has_decoded(layer.rows) and scores is not None:
            rank(layer, scores, queries)
            if layer.tracer is not None:
                layer.tracer.note(layer.table, scores, is_prefill=True)

    def evict(self, scores: torch.Tensor | None, queries: int) -> None:
        """With `prompt="evict"`: make the pages of this prefill evictable, and evict pages down to the budget.

        Args:
            scores: `[rows, kv_heads, pages]`, or None if the policy uses no query of a prompt.
            queries: number of queries that the scores come from.
        """
        layer, places, self.competes = self.layer, self.places, False
        assert places is not None
        if layer.tracer is not None:
            layer.tracer.note(layer.table, scores, is_prefill=True)
        enter_competition(layer.table, places, layer.rows)
        if scores is not None and queries:
            rank(layer, scores, queries)
        keep_best(layer.table, places, layer.rows)

    @uncompiled
    def hide(self, seen: Seen) -> None:
        self.among = seen.get("among")
        visible = seen.get("visible")
        if visible is not None:
            hide_newest(self.layer.table, visible, self.layer.rows)


def end_prompt(layer: LayerEngine, softmax: Softmax) -> None:
    """End the prompt of the row that forwards touch, if its last forward said that more chunks of it would follow.

    This serves a caller that learns from the first decode token that the prompt has ended.
    """
    assert layer.rows is not None
    held = layer.held_prompts.pop(int(layer.rows.on_host[0]), None)
    if held is not None:
        held.last_chunk.end_prompt(held.queries, softmax)
