"""A layer whose KV heads hold different numbers of pages: one paged layer for each number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import CacheLayerMixin

from ..engine.attention_inputs import Expanded, Seen, Softmax
from ..engine.forward_base import INTERRUPTED, Forward
from ..engine.layer_settings import LayerSettings
from ..engine.resize import RowFunction
from .paged_layer import PagedLayer


if TYPE_CHECKING:
    from ..engine.layer_engine import LayerEngine, Pending
    from ..engine.page_table import PageTable
    from ..engine.row_counts import Rows


class GroupedForward(Forward):
    """One forward of each group of KV heads. The object that serves decode steps lives as long as the layer.

    Args:
        layer: what the attention function sees of the groups.
        forwards: one forward per group.
        heads: for each group, its KV heads.
    """

    def __init__(self, layer: GroupedEngine, forwards: Sequence[Forward], heads: Sequence[Sequence[int]]):
        self.layer, self.forwards, self.heads = layer, forwards, heads  # type: ignore[assignment]
        self.new = forwards[0].new
        order = [head for group in heads for head in group]  # as the outputs of the groups follow one another
        self.kv_heads, self.places = len(order), sorted(range(len(order)), key=order.__getitem__)

    @property
    def is_first(self) -> bool:  # type: ignore[override]
        return self.forwards[0].is_first

    @property
    def awaits_attention(self) -> bool:
        return self.forwards[0].awaits_attention

    @awaits_attention.setter
    def awaits_attention(self, awaits: bool) -> None:
        for forward in self.forwards:
            forward.awaits_attention = awaits

    @property
    def is_at_work(self) -> bool:  # type: ignore[override]
        return any(forward.is_at_work for forward in self.forwards)

    def attend(
        self, query: torch.Tensor, softmax: Softmax, seen: Seen | None = None, expanded: Expanded | None = None
    ) -> torch.Tensor | None:
        """As `Forward.attend`: each group attends with the queries of its KV heads."""
        # 1. Split the queries: query heads [group * h, group * (h + 1)) belong to KV head h.
        queries = query.unflatten(1, (self.kv_heads, -1))  # [rows, kv_heads, group, new, head_dim]
        sinks = softmax["sinks"]
        outputs = []
        for forward, heads in zip(self.forwards, self.heads, strict=True):
            if sinks is not None:
                softmax = {**softmax, "sinks": take_heads(sinks.view(1, self.kv_heads, -1), heads).flatten()}
            # 2. Attend.
            outputs.append(forward.attend(take_heads(queries, heads).flatten(1, 2), softmax, seen))
        if outputs[0] is None:
            return None
        # 3. Put the outputs back in the order of the heads, [rows, heads, new, value_dim].
        split = (output.unflatten(1, (-1, queries.shape[2])) for output in outputs if output is not None)
        by_group = torch.cat(list(split), 1)  # [rows, kv_heads, group, new, value_dim]
        return take_heads(by_group, self.places).flatten(1, 2)

    def stop(self) -> None:
        for forward in self.forwards:
            forward.stop()

    def begin(self, key: torch.Tensor, value: torch.Tensor) -> tuple[Forward, torch.Tensor, torch.Tensor]:
        """Receive the new tokens of the layer, as `engine.forward.Decode.begin`."""
        engine: GroupedEngine = self.layer  # type: ignore[assignment]
        engine.check(key)
        begun = [
            part.begin(take_heads(key, heads), take_heads(value, heads))[0]
            for part, heads in zip(engine.parts, self.heads, strict=True)
        ]
        is_decode = all(forward is part.decode for forward, part in zip(begun, engine.parts, strict=True))
        forward = self if is_decode else GroupedForward(engine, begun, self.heads)
        key.paged_forward = value.paged_forward = forward  # type: ignore[attr-defined]
        return forward, key, value


class GroupedEngine:
    """What the cache and the attention function need of a layer's engine, for all groups of its KV heads.

    Args:
        parts: one paged layer per group.
        kv_heads: number of KV heads of the layer.
    """

    is_latent = False
    on_module: Callable[[torch.nn.Module, torch.Tensor, torch.Tensor], bool] | None = None

    def __init__(self, parts: Sequence[PagedLayer], kv_heads: int):
        self.parts, self.kv_heads = parts, kv_heads

    @property
    def _first(self) -> LayerEngine:
        return self.parts[0].engine

    @property
    def table(self) -> PageTable:
        """The page table of the first group. Its counts of tokens are those of all groups."""
        return self._first.table

    @property
    def settings(self) -> LayerSettings:
        """The settings of the first group."""
        return self._first.settings

    @property
    def rows(self) -> Rows | None:
        """The rows that forwards touch."""
        return self._first.rows

    @property
    def admits(self) -> bool:
        """Whether the rows that the next forward touches are empty."""
        return self._first.admits

    @property
    def pending(self) -> Pending | None:
        """The forward that waits for its attention call."""
        return self._first.pending

    @pending.setter
    def pending(self, pending: Pending | None) -> None:
        for part in self.parts:
            part.engine.pending = pending

    def show(self, visible: torch.Tensor) -> None:
        """See `LayerEngine.show`."""
        for part in self.parts:
            part.engine.show(visible)

    def check(self, key: torch.Tensor) -> None:
        """Refuse keys `[rows, kv_heads, new, head_dim]` of another number of heads, and groups that are out of step.

        Raises:
            ValueError: the shares of this layer are for another number of KV heads.
            RuntimeError: an exception stopped the last forward after some of the groups.
        """
        if key.shape[1] != self.kv_heads:
            raise ValueError(
                f"shares has {self.kv_heads} entries for a layer, but the layer stores {key.shape[1]} KV heads: give "
                "one share per KV head, or one share for the whole layer."
            )
        if not torch.compiler.is_compiling() and len({part.table.tokens for part in self.parts}) > 1:
            raise RuntimeError(INTERRUPTED)


class HeadGroupsLayer(PagedLayer):
    """A paged layer in which KV heads have different shares of the decode pages.

    The KV heads of one share are a group. Each group is a paged layer of its own, which sees only its heads.

    Args:
        settings: the settings of the layer, with one share per KV head.
    """

    engine: GroupedEngine  # type: ignore[assignment]
    decode: GroupedForward  # type: ignore[assignment]

    def __init__(self, settings: LayerSettings):
        shares = settings.shares
        sizes = sorted(set(shares), reverse=True)
        self._heads = [[head for head, own in enumerate(shares) if own == share] for share in sizes]
        self._parts = [PagedLayer(replace(settings, shares=(share,))) for share in sizes]
        self.engine = GroupedEngine(self._parts, len(shares))
        self._make_decode()
        CacheLayerMixin.__init__(self)
        self._trace = None

    def _make_decode(self) -> None:
        self.decode = GroupedForward(self.engine, [part.decode for part in self.parts], self._heads)

    @property
    def parts(self) -> Sequence[PagedLayer]:
        """One paged layer for each group of KV heads."""
        return self._parts

    @property
    def head_groups(self) -> list[list[int]]:
        """The KV heads of each of `parts`."""
        return self._heads

    def reset(self) -> None:
        for part in self.parts:
            part.reset()
        self._make_decode()
        self.is_initialized = False

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        return all(part.is_compileable for part in self.parts)

    @property
    def record_past(self) -> bool:
        return self.parts[0].record_past

    @record_past.setter
    def record_past(self, records: bool) -> None:
        for part in self.parts:
            part.record_past = records

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        for part, heads in zip(self.parts, self._heads, strict=True):
            part.lazy_initialization(take_heads(key_states, heads), take_heads(value_states, heads))
        self.has_begun()

    def get_seq_length(self) -> int:
        return self.parts[0].get_seq_length()

    def activate_past_recording(self) -> None:
        for part in self.parts:
            part.activate_past_recording()

    def check_crop(self, tokens_to_remove: int) -> None:
        for part in self.parts:
            part.check_crop(tokens_to_remove)

    def crop(self, tokens_to_remove: int) -> None:
        self.check_crop(tokens_to_remove)
        for part in self.parts:
            part.crop(tokens_to_remove)

    def drop_decoded(self, seen: int) -> None:
        for part in self.parts:
            part.drop_decoded(seen)

    def apply_to_rows(self, function: RowFunction) -> None:
        for part in self.parts:
            part.apply_to_rows(function)
        self.batch_size = self.table.batch_size


def take_heads(states: torch.Tensor, heads: Sequence[int]) -> torch.Tensor:
    """The KV heads `heads` of `states` `[rows, kv_heads, ...]`: a view if they are adjacent, otherwise a copy.

    Slices, because an index would be copied from the host to the device in each step.
    """
    if list(heads) == list(range(heads[0], heads[-1] + 1)):
        return states[:, heads[0] : heads[-1] + 1]
    return torch.cat([states[:, head : head + 1] for head in heads], 1)


def new_layer(settings: LayerSettings) -> PagedLayer:
    """The paged layer for `settings`: with groups of KV heads if their shares differ."""
    return HeadGroupsLayer(settings) if len(set(settings.shares)) > 1 else PagedLayer(settings)
