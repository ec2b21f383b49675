"""What a layer's forwards share: its page table, its policy, and how pages are scored and ranked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch

import raas_kernels
from raas_kernels import PagedKV

from .layer_settings import LayerSettings
from .page_table import PageTable
from .prefill import Places
from .prefill_eviction import enter_competition, keep_best
from .resize import movable
from .rollback import Rollback
from .step import rank


if TYPE_CHECKING:
    from .forward import Expanded, Forward, Softmax
    from .row_counts import Rows


class Tracer(Protocol):
    """Somebody who is told what the policy is told."""

    def note(self, table: PageTable, scores: torch.Tensor | None, is_prefill: bool) -> None: ...


class LayerEngine:
    """One layer's pages and everything that a forward does with them, apart from the model.

    Attributes:
        table: the pages.
        rollback: what can be taken back.
        pending: the forward that `begin` handed out and whose attention has not ended.
        rows: the rows of the batch that forwards touch now, None for all; `row_index` `[rows]` int64 on the device.
        batch_size: rows to make room for, where the first prefill fills only some of them; None for its own number.
        admits: whether the next forward is the first one of the rows that it touches, which hold nothing.
        on_module: returns whether the layer stays as it is; otherwise another layer has taken the tokens over.
        known_mask: stands for the mask of the past that the bias agrees with; None if another has been written.
        is_latent: whether the model caches a latent and expands it afterwards (MLA). Attention then gets the expanded
            keys and values, and all heads share one page table.
        records_past: whether forwards note what they overwrite, so that their tokens can be taken back.
        expects_turn: whether the next forward of several tokens is prefill although `records_past` is set.
        reads_prefill: whether single tokens are prefill, too (`PagedCache.prefilling`).
        tracer: told what the policy is told, if there is one.
    """

    def __init__(self, settings: LayerSettings):
        self.settings, self.policy = settings, settings.policy
        self.scoring, self.granularity = settings.scoring, settings.granularity
        self.has_key_bounds, self.reads_all = settings.has_key_bounds, settings.reads_all
        # Whether the scores that attention returns are not yet the scores that the policy is told.
        self.adjusts_scores = settings.scoring == "minmax" or settings.granularity == "layer" or not settings.reads_all
        self.closes_pages = settings.prompt == "evict"  # whether prefill closes an open page that is not full
        self.table = PageTable(settings)
        self.tracer: Tracer | None = None
        self.reset()

    def reset(self) -> None:
        """Forget everything, buffers included: the next prompt sizes new ones."""
        self.table.release()
        # Notes for a budget of tokens, so that recording that is left on stays O(budget) too.
        self.rollback = Rollback(self.settings.budget)
        self.pending: Forward | None = None
        self.admits = False
        # Called by the first attention with its module, key and value, while the cache does not know the model.
        self.on_module: Callable[[torch.nn.Module, torch.Tensor, torch.Tensor], bool] | None = None
        self.known_mask: object = None
        self.set_rows(None)
        self.batch_size: int | None = None
        self.is_latent = self.records_past = self.expects_turn = self.reads_prefill = False

    @property
    def kv(self) -> PagedKV:
        """The buffers."""
        assert self.table.kv is not None
        return self.table.kv

    def set_rows(self, rows: Rows | None) -> None:
        """From now on forwards touch `rows` only; None for all."""
        self.rows, self.row_index = rows, None if rows is None else rows.on_device

    def expect_latent(self) -> None:
        """From now on the table holds a latent, which comes to attention expanded."""
        self.is_latent = self.adjusts_scores = True
        # The key bounds of a latent say nothing about the expanded keys, whose bounds are computed at each step.
        self.kv.key_min = self.kv.key_max = None

    def expanded_kv(self, keys: torch.Tensor, values: torch.Tensor) -> PagedKV:
        """The table's pages with the keys and values `[rows, heads, slots, head_dim]` that a model made of a latent."""
        return self.kv_of_rows().with_contents(keys, values)

    def kv_of_rows(self) -> PagedKV:
        """The buffers of the rows that the forward touches: copies, except where it touches all rows."""
        kv, rows = self.kv, self.row_index
        if rows is None:
            return kv

        def taken(held: torch.Tensor) -> torch.Tensor:
            return movable(held)[rows].view(held.dtype)

        buffers: dict[str, Any] = {name: taken(held) for name, held in vars(kv).items() if torch.is_tensor(held)}
        return replace(kv, **buffers)

    def show(self, visible: torch.Tensor) -> None:
        """Let attention read the held tokens that `visible` `[rows, tokens]` names, by position, and no others."""
        self.known_mask = None
        kv, rows = self.kv_of_rows(), self.row_index
        raas_kernels.show([kv], visible.expand(len(kv.bias), -1))
        if rows is not None:
            for held, shown in ((self.kv.bias, kv.bias), (self.kv.key_min, kv.key_min), (self.kv.key_max, kv.key_max)):
                if held is not None and shown is not None:
                    held[rows] = shown

    # Scores.

    def logit_bounds(self, kv: PagedKV, query: torch.Tensor, softmax: Softmax) -> torch.Tensor:
        """Upper bounds of the pages' logits for one query, `[rows, kv_heads, pages]`."""
        rows = self.row_index if kv is self.table.kv else None
        bounds = raas_kernels.page_logit_bounds(kv, query, softmax["scale"], softmax["softcap"], rows)
        if self.is_latent:  # all heads are one query group
            return bounds.amax(1, keepdim=True).expand_as(bounds)
        return self.shared(bounds)

    def page_scores(
        self, scores: torch.Tensor, bounds: torch.Tensor | None, selected: torch.Tensor | None
    ) -> torch.Tensor:
        """The scores that the policy is told, `[rows, kv_heads, pages]`, of one decode step.

        Args:
            scores: `[rows, heads, pages]`, or of the pages `selected` `[rows, heads, selected]`.
            bounds: `[rows, heads, pages]`, with `scoring="minmax"` the pages are scored by them.
        """
        if self.scoring == "minmax" and bounds is not None:
            scores = bounds.softmax(-1)
        elif selected is not None:
            whole = scores.new_zeros(*scores.shape[:2], self.table.num_pages)
            scores = whole.scatter_add_(2, selected.clamp(min=0), scores.masked_fill(selected < 0, 0))
        return self.shared(scores)

    def shared(self, scores: torch.Tensor) -> torch.Tensor:
        """With `granularity="layer"`, every head gets the row's score; a latent serves all heads as one."""
        if self.granularity == "head" and not self.is_latent:
            return scores
        over_heads = torch.amax if self.policy.group_score == "max" else torch.mean
        shared = over_heads(scores, 1, keepdim=True)
        return shared if self.is_latent else shared.expand_as(scores)

    # Prefill.

    def attend_prefill(
        self,
        query: torch.Tensor,
        softmax: Softmax,
        expanded: Expanded | None = None,
        among: torch.Tensor | None = None,
        observed: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of the newest tokens, which are stored, over all stored ones.

        Args:
            query: `[rows, heads, new, head_dim]`.
            among: `[rows, new, new]` bool, whether a new token sees another; None for causal.
            observed: how many of the last queries give scores; None for all.

        Returns:
            Output `[rows, heads, new, value_dim]`; scores `[rows, kv_heads, pages]`.
        """
        length = query.shape[2]
        read = self.kv if expanded is None else self.expanded_kv(*expanded)
        rows = self.row_index if read is self.kv else None
        newest = self.kv.clock[:, 0, 0] if self.rows is None else self.kv.clock[self.row_index, 0, 0]
        positions = newest[:, None] + torch.arange(1 - length, 1, device=query.device)  # [rows, new]
        output, scores = raas_kernels.extend(
            read,
            query,
            positions,
            softmax["scale"],
            softcap=softmax["softcap"],
            sinks=softmax["sinks"],
            page_score=self.policy.page_score,
            group_score=self.policy.group_score,
            observed=observed,
            among=among if among is None else among[:, -length:],
            heads_share=self.granularity == "layer" or self.is_latent,
            rows=rows,
        )
        queries = length if observed is None else min(observed, length)
        if queries and self.scoring == "minmax":
            scores = self._bound_scores(
                read, query[:, :, length - queries :], positions[:, length - queries :], softmax
            )
        return output, self.shared(scores)

    def _bound_scores(
        self, kv: PagedKV, query: torch.Tensor, positions: torch.Tensor, softmax: Softmax
    ) -> torch.Tensor:
        """Softmax over the pages' upper bounds; over the queries the max or the sum, to which padding adds nothing."""
        rows = self.row_index if kv is self.kv else None
        counts = raas_kernels.resident(kv, positions, rows)  # [rows, heads, queries]
        scores = torch.stack(
            [
                self.logit_bounds(kv, query[:, :, i : i + 1], softmax).softmax(-1) * counts[..., i, None]
                for i in range(query.shape[2])
            ]
        )
        return scores.amax(0) if self.policy.page_score == "max" else scores.sum(0)

    def evict_prefill(self, places: Places, scores: torch.Tensor | None, queries: int) -> None:
        """With `prompt="evict"`, after a prefill: let its pages compete, and keep what the budget holds.

        Args:
            scores: `[rows, kv_heads, pages]`, or None where the policy looks at no query.
        """
        if self.tracer is not None:
            self.tracer.note(self.table, scores, True)
        enter_competition(self.table, places, self.rows)
        if scores is not None and queries:
            rank(self, scores, queries)
        keep_best(self.table, places, self.rows)
