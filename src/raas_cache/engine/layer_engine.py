"""What the forwards of a layer share: its page table, its policy, its rollback, and the scores of pages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch

import raas_kernels
from raas_kernels import PagedKV

from .held_prompt import HeldPrompt
from .layer_settings import LayerSettings
from .page_table import PageTable
from .rollback import Rollback
from .rotation import Rotation


if TYPE_CHECKING:
    from .attention_inputs import Expanded, Softmax
    from .row_counts import Rows


NO_PACKED_LATENT = (
    "kv_dtype='int4' does not support models that cache a latent (MLA): use kv_dtype='int8', or do not pass kv_dtype."
)


class Tracer(Protocol):
    """Receives what the policy receives; see `raas_cache.tracing`."""

    def note(self, table: PageTable, scores: torch.Tensor | None, is_prefill: bool) -> None: ...


class Pending(Protocol):
    """A forward that waits for its attention call, see `raas_cache.engine.forward_base`."""

    awaits_attention: bool
    is_at_work: bool


class LayerEngine:
    """The pages of one layer, and what a forward needs to store tokens in them and to read them.

    Attributes:
        table: the pages.
        rollback: notes of the forwards that can be taken back.
        pending: the forward that `Decode.begin` returned and whose attention call has not ended, a `Stopped` if an
            exception ended this call; None if there is none.
        rows: the rows of the batch that forwards touch, None for all; `row_index` `[rows]` int64 is the same on the
            device.
        batch_size: number of rows to allocate if the first prefill fills only some of them; None for its own number.
        admits: whether the rows that the next forward touches are empty, so that it is their first forward.
        on_module: called by the first attention call with the attention module, key and value, while the cache does not
            know the model. Returns True if this layer keeps the tokens, False if a layer of transformers took them.
        known_mask: a token that stands for the attention mask that `bias` agrees with; None if it is not known.
        is_latent: whether the model caches a latent and expands it afterwards (MLA). Attention then gets the expanded
            keys and values, and all heads share one page table.
        announced: which new tokens of the next forward are visible, `[rows, new]` bool, for a latent, whose tokens are
            stored before its attention call brings the mask; None if it is not known.
        records_past: whether forwards note what they overwrite, so that their tokens can be taken back.
        expects_turn: whether the next forward of several tokens is prefill although `records_past` is set.
        reads_prefill: whether single tokens are prefill, too (`PagedCache.prefilling`).
        prompt_continues: whether more chunks of the same prompt follow the next prefill, which touches one row that
            holds nothing else. Its output, and what `prompt="evict"` evicts, are then as without chunks.
        held_prompts: by row, what is kept of the earlier chunks of its prompt.
        tracer: receives what the policy receives; None if the layer is not traced.
        rotation: the rotary embedding of the layer, for a policy with `uses_rotation`; None if it is not known.
    """

    def __init__(self, settings: LayerSettings):
        self.settings, self.policy = settings, settings.policy
        self.scoring, self.granularity = settings.scoring, settings.granularity
        self.has_key_bounds, self.reads_all = settings.has_key_bounds, settings.reads_all
        # Whether `page_scores` must change the scores of attention before the policy receives them.
        self.adjusts_scores = settings.scoring == "minmax" or settings.granularity == "layer" or not settings.reads_all
        self.closes_pages = settings.prompt == "evict"  # whether prefill closes an open page that is not full
        self.table = PageTable(settings)
        self.tracer: Tracer | None = None
        self.reset()

    def reset(self) -> None:
        """Forget all tokens and release the buffers; the next prefill allocates new buffers."""
        self.table.release()
        # At most one note per token of the budget, so that the notes are O(budget) if nobody ends the recording.
        self.rollback = Rollback(self.settings.budget)
        self.pending: Pending | None = None
        self.admits = False
        self.on_module: Callable[[torch.nn.Module, torch.Tensor, torch.Tensor], bool] | None = None
        self.known_mask: object = None
        self.rotation: Rotation | None = None
        self.set_rows(None)
        self.batch_size: int | None = None
        self.announced: torch.Tensor | None = None
        self.is_latent = self.records_past = self.expects_turn = self.reads_prefill = self.prompt_continues = False
        self.held_prompts: dict[int, HeldPrompt] = {}

    @property
    def kv(self) -> PagedKV:
        """The buffers."""
        assert self.table.kv is not None
        return self.table.kv

    def set_rows(self, rows: Rows | None) -> None:
        """Make forwards touch `rows` only; None for all rows."""
        self.rows, self.row_index = rows, None if rows is None else rows.on_device

    def release_rows(self, rows: Rows) -> None:
        """Forget everything about `rows`, so that other sequences can start there."""
        self.table.release_rows(rows)
        self.known_mask = None
        for row in rows.on_host.tolist():
            self.held_prompts.pop(row, None)

    def expect_latent(self) -> None:
        """Make the layer one that caches a latent, which the model expands before attention.

        Raises:
            RuntimeError: the pages of the rows lie in a pool.
            ValueError: the policy compares queries with the cached keys, which a latent does not allow. Or the cache
                stores 4-bit codes: the mask of a latent comes after its tokens, so a page would be coded before it is
                known which of its tokens are hidden.
        """
        self.table.check_no_pool("A model that caches a latent (MLA)")
        if self.settings.is_packed:
            raise ValueError(NO_PACKED_LATENT)
        if self.policy.uses_rotation:
            raise ValueError(
                f"{type(self.policy).__name__} compares queries with the keys in the cache, but this model caches a "
                "latent instead of keys (MLA): use another method, such as RaaSCache."
            )
        self.is_latent = self.adjusts_scores = True
        # key_min and key_max of a latent do not bound the expanded keys; each step computes new bounds.
        self.kv.key_min = self.kv.key_max = None

    def expanded_kv(self, keys: torch.Tensor, values: torch.Tensor) -> PagedKV:
        """The pages with the keys and values `[rows, heads, slots, head_dim]` that the model expanded from a latent."""
        return self.kv_of_rows().with_contents(keys, values)

    def kv_of_rows(self) -> PagedKV:
        """The buffers of the rows that the forward touches, for ranking: copies without keys and values.

        For a forward of all rows, the buffers themselves.
        """
        kv, rows = self.kv, self.row_index
        if rows is None:
            return kv
        return replace(
            kv,
            keys=kv.keys[:0],
            values=kv.values[:0],
            bias=kv.bias[rows],
            positions=kv.positions[rows],
            priority=kv.priority[rows],
            evictable=kv.evictable[rows],
            open_slot=kv.open_slot[rows],
            clock=kv.clock[rows],
            key_scales=None,
            value_scales=None,
            key_min=None,
            key_max=None,
            states=None if kv.states is None else kv.states[rows],
            open_keys=None,
            value_min=None,
            value_max=None,
            row_states=None if kv.row_states is None else kv.row_states[rows],
            blocks=None,
        )

    def show(self, visible: torch.Tensor) -> None:
        """Show the stored tokens at the positions where `visible` `[rows, tokens]` is True, and hide all others."""
        self.known_mask = None
        kv, rows = self.kv_of_rows(), self.row_index
        raas_kernels.show([kv], visible.expand(len(kv.bias), -1))
        if rows is not None:
            self.kv.bias[rows] = kv.bias
            self.table.summarise()

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
        """The scores of one decode step that the policy receives, `[rows, kv_heads, pages]`.

        Args:
            scores: `[rows, heads, pages]`, or `[rows, heads, selected]` if `selected` is given.
            bounds: `[rows, heads, pages]`, upper bounds of the logits; with `scoring="minmax"`, the softmax over them
                is the score.
            selected: `[rows, heads, selected]` int64, the pages that were read, -1 for none; None for all pages.
        """
        if self.scoring == "minmax" and bounds is not None:
            scores = bounds.softmax(-1)
        elif selected is not None:
            whole = scores.new_zeros(*scores.shape[:2], self.table.num_pages)
            scores = whole.scatter_add_(2, selected.clamp(min=0), scores.masked_fill(selected < 0, 0))
        return self.shared(scores)

    def shared(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores `[rows, heads, pages]`, reduced over all heads with `granularity="layer"` and for a latent."""
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
        """Attention of the newest tokens over all stored tokens; the newest tokens are stored already.

        Args:
            query: `[rows, heads, new, head_dim]`.
            expanded: for a latent, the keys and values that the model expanded from it.
            among: `[rows, new, new]` bool, whether a new token sees another; None for causal.
            observed: number of last queries that the scores come from; None for all queries.

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
        """Softmax over the upper bounds of the pages, reduced over the queries; hidden queries count as 0."""
        rows = self.row_index if kv is self.kv else None
        counts = raas_kernels.resident(kv, positions, rows)  # [rows, heads, queries]
        scores = torch.stack(
            [
                self.logit_bounds(kv, query[:, :, i : i + 1], softmax).softmax(-1) * counts[..., i, None]
                for i in range(query.shape[2])
            ]
        )
        return scores.amax(0) if self.policy.page_score == "max" else scores.sum(0)
