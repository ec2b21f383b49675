"""Attention over a layer's pages, and what it tells the policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypedDict

import torch
from torch.nn.functional import pad

import raas_kernels

from .layer_settings import LayerSettings
from .page_table import BOUNDS, PageStore, uncompiled
from .policy import Pages, Policy


if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..tracing.layer_trace import LayerRecording

Expanded = tuple[torch.Tensor, torch.Tensor]
"""What a model made of a latent, keys and values `[batch, heads, slots, head_dim]`."""


class Softmax(TypedDict):
    """Settings of the softmax, see `PagedLayer.attend`."""

    scale: float
    softcap: float | None
    sinks: torch.Tensor | None


class PagedAttention(PageStore):
    """Reads the pages of one layer, all or those a step should read, and lets the policy rank the evictable ones.

    `is_latent` says that the model caches a latent and expands it afterwards (MLA): attention then gets the expanded
    keys and values, and all heads share the one page table. `recorder`, if any, is told what the policy is told
    (see `raas_cache.record`).
    """

    policy: Policy
    reads_all: bool
    is_latent: bool

    def __init__(self, settings: LayerSettings):
        self.policy, self.scoring, self.granularity = settings.policy, settings.scoring, settings.granularity
        self.recorder: LayerRecording | None = None
        self.reads_all = self.policy.reads == "all" and (settings.prompt != "select" or not self.policy.evicts)
        super().__init__(
            settings.budget,
            settings.page_size,
            settings.min_decode_pages,
            prompt=settings.prompt,
            kv_dtype=settings.kv_dtype,
            has_bounds=settings.scoring == "minmax" or not self.reads_all,
            grows=not self.policy.evicts,
            num_states=len(self.policy.state),
        )

    def release(self) -> None:
        """Hold nothing, and no memory."""
        super().release()
        self.is_latent = False
        self.among: torch.Tensor | None = None

    def expect_latent(self) -> None:
        """From now on the store holds a latent, which comes to attention expanded."""
        self.is_latent = True
        for name in BOUNDS:  # those of a latent bound nothing: those of the expanded keys are taken
            setattr(self, name, None)

    def attend_stored(
        self, query: torch.Tensor, expanded: Expanded | None = None, **softmax: Unpack[Softmax]
    ) -> torch.Tensor:
        """Attention of the last `query.shape[2]` tokens, which are stored; the policy sees the scores. As `attend`."""
        if query.shape[2] > 1:
            observed = self.policy.prompt_window if self.holds_input else None
            return self._attend_input(query, observed, expanded, **softmax)
        keys, values = self.contents if expanded is None else expanded
        bias = self.bias if expanded is None else self._bias_for(keys)
        bounds = self._page_bounds(query, keys, bias, expanded, softmax) if self.has_bounds else None
        table = None if bounds is None or self.reads_all else self._pages_to_read(bounds)
        output, scores = raas_kernels.attend(
            query,
            keys,
            values,
            bias,
            page_size=self.page_size,
            table=table,
            scales=self.scales if expanded is None else None,
            page_score=self.policy.page_score,
            group_score=self.policy.group_score,
            **softmax,
        )
        if table is not None:
            scores = scores.new_zeros(*bias.shape[:2], bias.shape[2] // self.page_size).scatter_(2, table, scores)
        if self.is_decoding:
            if self.scoring == "minmax" and bounds is not None:
                scores = bounds.softmax(-1)
            self._tell_policy(self._shared(scores), queries=1, is_input=False)
        return output

    @uncompiled
    def attend_first(self, query: torch.Tensor, expanded: Expanded, **softmax: Unpack[Softmax]) -> None:
        """After the first forward, whose attention is the model's own: with `prompt="evict"`, cut it to the budget.

        Args:
            query: `[batch, heads, new, head_dim]`.
            expanded: for a latent, what the model made of it.
        """
        if not self.holds_input:
            return
        window = self.policy.prompt_window
        observed = self.new if window is None else min(window, self.new)
        if observed:
            whole = None
            if self.is_latent:
                missing = self.keys.shape[2] - self.new
                keys, values = (pad(states, (0, 0, 0, missing)) for states in expanded)
                whole = keys, values
            self._attend_input(query[:, :, -observed:], None, whole, **softmax)
        else:
            self._cut_input(None, queries=0)

    @uncompiled
    def _attend_input(
        self, query: torch.Tensor, observed: int | None, expanded: Expanded | None, **softmax: Unpack[Softmax]
    ) -> torch.Tensor:
        """Attention of several tokens that are input; the last `observed` of them (None: all) tell the policy."""
        keys, values = self.states() if expanded is None else expanded
        bias = self._bias_for(keys)
        length = query.shape[2]
        queries = length if observed is None else min(observed, length)
        indices = torch.arange(self.seen - length, self.seen, device=self.device)
        output, scores = raas_kernels.extend(
            query,
            keys,
            values,
            bias,
            self.positions.expand_as(bias),
            indices,
            page_size=self.page_size,
            page_score=self.policy.page_score,
            group_score=self.policy.group_score,
            observed=queries,
            heads_share=self.granularity == "layer" or self.is_latent,
            among=self.among if self.among is None else self.among[:, -length:],
            **softmax,
        )
        if queries and self.scoring == "minmax" and (self.is_decoding or self.holds_input):
            scores = self._representative_scores(query[:, :, length - queries :], keys, bias, expanded, softmax)
        scores = self._shared(scores)
        if self.holds_input:
            self._cut_input(scores, queries)
        elif self.is_decoding:
            self._tell_policy(scores, queries, is_input=True)
        return output

    def _bias_for(self, keys: torch.Tensor) -> torch.Tensor:
        """The bias, for as many heads as read the store: all heads of a model read its one latent."""
        return self.bias.expand(-1, keys.shape[1], -1).contiguous()

    def _tell_policy(self, scores: torch.Tensor, queries: int, is_input: bool) -> None:
        mean_keys = lambda: self.mean_keys()[:, :, self.pinned_pages :]  # noqa: E731
        evictable = scores[..., self.pinned_pages :]
        self._on_scores(evictable, self.priority, self.page_state, self.first, queries, mean_keys)
        if self.recorder is not None:
            self.recorder.note(self, scores, is_input)

    def _cut_input(self, scores: torch.Tensor | None, queries: int) -> None:
        """Let input compete with what else is held, once the policy has seen the scores `[batch, kv_heads, pages]`."""
        if self.recorder is not None:
            self.recorder.note(self, scores, is_input=True)
        sink, others, ranked = self.candidates()
        if scores is not None and queries and others.shape[-1]:
            mean_keys = lambda: torch.take_along_dim(self.mean_keys(), others[..., None], 2)  # noqa: E731
            priority, page_state, first = ranked["priority"], ranked["page_state"], ranked["first"]
            self._on_scores(scores.gather(-1, others), priority, page_state, first, queries, mean_keys)
        self.keep(sink, others, ranked)

    def _on_scores(
        self,
        scores: torch.Tensor,
        priority: torch.Tensor,
        page_state: torch.Tensor,
        first: torch.Tensor,
        queries: int,
        mean_keys: Callable[[], torch.Tensor],
    ) -> None:
        state = {name: page_state[..., i] for i, name in enumerate(self.policy.state)}
        pages = Pages(priority, scores, first, self.clock, state, self.limit, self.page_size, queries, mean_keys)
        self.policy.on_scores(pages)
        if self.granularity == "layer":  # a policy that looks at keys ranks head by head
            priority.copy_(priority.mean(1, keepdim=True).expand_as(priority))

    def _page_bounds(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        bias: torch.Tensor,
        expanded: Expanded | None,
        softmax: Softmax,
    ) -> torch.Tensor:
        """Upper bounds of the pages' logits for one query, `[batch, kv_heads, pages]`."""
        extremes = (self.minima, self.maxima)
        if expanded is not None:
            extremes = raas_kernels.page_extremes(keys, bias, self.page_size)
        scale, softcap = softmax["scale"], softmax["softcap"]
        bounds = raas_kernels.page_bounds(query, *extremes, bias, scale, self.page_size, softcap)
        if self.is_latent:  # all heads are one query group
            return bounds.amax(1, keepdim=True).expand_as(bounds)
        return self._shared(bounds)

    def _pages_to_read(self, bounds: torch.Tensor) -> torch.Tensor | None:
        """The pages that one decode step reads, `[batch, kv_heads, K]`: those of the highest bounds; None for all."""
        pages, budget = bounds.shape[-1], self.budget // self.page_size
        if self.policy.reads == "all":
            wanted = self.input_pages_read + self.decode_pages
        elif self.prompt == "select":
            wanted = max(budget, 1)
        else:
            wanted = self.pinned_pages + max(budget - self.pinned_pages, self.min_decode_pages)
        if wanted >= pages:
            return None
        bounds = bounds.clone()
        if self.prompt == "pin":
            bounds[..., : self.pinned_pages] = float("inf")
        if self.policy.reads == "all":
            bounds[..., self.pinned_pages :] = float("inf")
        else:
            newest = (self.open_slot // self.page_size)[..., None].expand(-1, bounds.shape[1], -1)
            bounds.scatter_(-1, newest, float("inf"))
        return bounds.argsort(dim=-1, descending=True, stable=True)[..., :wanted]  # ties to the older page

    def _representative_scores(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        bias: torch.Tensor,
        expanded: Expanded | None,
        softmax: Softmax,
    ) -> torch.Tensor:
        """Softmax over the resident pages' upper bounds, over the queries the max or sum; padding gives none."""
        tokens = torch.arange(self.seen - query.shape[2], self.seen, device=self.device)
        counts = raas_kernels.resident(self.positions.expand_as(bias), bias, tokens)
        scores = [
            self._page_bounds(one, keys, bias, expanded, softmax).softmax(-1) * counts[..., i, None]
            for i, one in enumerate(query.split(1, dim=2))
        ]
        return torch.stack(scores).amax(0) if self.policy.page_score == "max" else torch.stack(scores).sum(0)

    def _shared(self, scores: torch.Tensor) -> torch.Tensor:
        """With `granularity="layer"`, every head gets the row's score; a latent serves all heads as one."""
        if self.granularity == "head" and not self.is_latent:
            return scores
        over_heads = torch.amax if self.policy.group_score == "max" else torch.mean
        shared = over_heads(scores, 1, keepdim=True)
        return shared if self.is_latent else shared.expand_as(scores)
