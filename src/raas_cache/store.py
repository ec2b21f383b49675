"""The pages of one attention layer: static buffers, in-place writes. It knows pages, neither attention nor policies."""

import math
from collections.abc import Callable

import torch

import raas_kernels


class PageStore:
    """One layer's KV in pages of `page_size` tokens, at most `budget` tokens of them whatever the sequence's length.

    Pages `0 .. pinned_pages-1` hold input tokens (the prompt, later turns) and are never evicted; the `decode_pages`
    pages behind them hold generated tokens and are recycled in place. All rows and KV heads fill pages in step, so
    counts are host integers; what a page holds differs from head to head. Tensors are described in
    `raas_kernels.reference`. `seen` counts the tokens of the sequence, which positions depend on; the number of
    resident tokens is another.

    Args:
        budget: tokens to hold, the prompt counted in.
        page_size: tokens a page, a power of two.
        min_decode_pages: decode pages to hold even where the prompt leaves room for fewer.
        has_bounds: keep each page's element-wise minima and maxima.
    """

    def __init__(self, budget: int, page_size: int, min_decode_pages: int, has_bounds: bool):
        self.budget, self.page_size, self.min_decode_pages = budget, page_size, min_decode_pages
        self.has_bounds = has_bounds
        self.release()

    def release(self) -> None:
        """Hold nothing, and no memory."""
        self.keys = self.values = self.bias = self.positions = self.priority = self.open_slot = self.clock = None
        self.minima = self.maxima = None
        self.pinned_pages = self.decode_pages = 0
        self.seen = self.pinned = self.decoded = self.new = 0

    def allocate(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Take batch, heads, sizes, dtype and device from the first key and value; the first `store` sizes the rest."""
        self.dtype, self.device = key.dtype, key.device
        self.batch_size, self.num_heads = key.shape[:2]
        rows = (self.batch_size, self.num_heads)
        self.keys = key.new_empty(*rows, 0, key.shape[-1])
        self.values = value.new_empty(*rows, 0, value.shape[-1])
        accumulate = torch.promote_types(self.dtype, torch.float32)
        self.bias = torch.empty(*rows, 0, dtype=accumulate, device=self.device)
        self.positions = torch.empty(*rows, 0, dtype=torch.int32, device=self.device)
        self.priority = torch.empty(*rows, 0, dtype=torch.float64, device=self.device)
        self.open_slot = torch.zeros(rows, dtype=torch.int64, device=self.device)
        self.clock = torch.tensor([-1, -1], device=self.device)
        if self.has_bounds:
            self.minima, self.maxima = self.keys.clone(), self.keys.clone()

    @property
    def room_for_decode(self) -> int:
        """Decode pages that the budget leaves beside the pinned pages; may be less than `decode_pages`."""
        return self.budget // self.page_size - self.pinned_pages

    @property
    def evicted(self) -> int:
        """Pages evicted so far, the same for every row and head."""
        return max(0, math.ceil(self.decoded / self.page_size) - self.decode_pages)

    @property
    def held(self) -> int:
        """Tokens held now, the same for every row and head, padding counted in."""
        return self.pinned + self.decoded - self.evicted * self.page_size

    def check_same_use(self, key: torch.Tensor) -> None:
        """Raise a ValueError if a new key's batch, heads, head size, dtype or device are not those held."""
        held = (self.batch_size, self.num_heads, self.keys.shape[-1], self.dtype, self.device)
        given = (key.shape[0], key.shape[1], key.shape[-1], key.dtype, key.device)
        if held == given:
            return
        for name, old, new in zip(("batch size", "KV heads", "head size", "dtype", "device"), held, given, strict=True):
            if old != new:
                raise ValueError(
                    f"This cache holds {self.seen} tokens with {name} {old}, and was given keys with {name} {new}: "
                    "use a new cache for another input, or call reset() on this one first."
                )

    def store(self, key: torch.Tensor, value: torch.Tensor, pin: bool) -> None:
        """Write new tokens: input into pinned pages, one generated token into the open decode page.

        Args:
            key, value: `[batch, kv_heads, new, head_dim]`.
            pin: whether they are input; otherwise `new` is 1.
        """
        self.new = key.shape[2]
        if pin:
            self._pin(key, value)
        else:
            self._append(key, value)
        self.seen += self.new

    def _append(self, key: torch.Tensor, value: torch.Tensor) -> None:
        self.clock += 1
        self.decoded += 1
        raas_kernels.append(
            self.keys,
            self.values,
            self.bias,
            self.positions,
            self.priority,
            self.open_slot,
            self.clock,
            key,
            value,
            self.page_size,
            self.minima,
            self.maxima,
        )

    def _pin(self, key: torch.Tensor, value: torch.Tensor) -> None:
        start, end = self.pinned, self.pinned + self.new
        self._reserve(math.ceil(end / self.page_size))
        self.keys[:, :, start:end] = key
        self.values[:, :, start:end] = value
        self.bias[:, :, start:end] = 0
        self.positions[:, :, start:end] = torch.arange(self.seen, self.seen + self.new, device=self.device)
        self._move_open_page(self.new)
        self.clock[0] += self.new
        self.pinned = end

    def unpin(self, length: int) -> None:
        """Take back the last `length` tokens, all of them pinned; the stamps they gave are the caller's affair."""
        self.pinned -= length
        self.seen -= length
        self.clock[0] -= length
        self.bias[:, :, self.pinned : self.pinned + length] = float("-inf")
        self._move_open_page(-length)
        self._reserve(math.ceil(self.pinned / self.page_size))
        if self.minima is not None:
            self._summarise(slice(self.pinned // self.page_size, self.pinned_pages))

    def _move_open_page(self, by: int) -> None:
        """The open page goes on behind pinned tokens: what its unfilled slots will hold moves."""
        filled = self.decoded % self.page_size
        if filled:
            lane = torch.arange(filled, self.page_size, device=self.device)
            slots = self.open_slot[..., None] + lane
            self.positions.scatter_add_(2, slots, torch.full_like(slots, by, dtype=torch.int32))

    def _reserve(self, pinned_pages: int) -> None:
        """Move to buffers with `pinned_pages` pinned pages; the decode region keeps its size once it is in use."""
        old_pinned, self.pinned_pages = self.pinned_pages, pinned_pages
        if not self.decoded:
            self.decode_pages = max(self.room_for_decode, self.min_decode_pages)
            self.priority = self.priority.new_full((*self.priority.shape[:2], self.decode_pages), float("-inf"))
        pages = pinned_pages + self.decode_pages
        common = min(old_pinned, pinned_pages)

        def moved(old: torch.Tensor, unit: int, empty: float) -> torch.Tensor:
            new = old.new_full((*old.shape[:2], pages * unit, *old.shape[3:]), empty)
            new[:, :, : common * unit] = old[:, :, : common * unit]
            if self.decoded:
                new[:, :, pinned_pages * unit :] = old[:, :, old_pinned * unit :]
            return new

        self.keys = moved(self.keys, self.page_size, 0)
        self.values = moved(self.values, self.page_size, 0)
        self.bias = moved(self.bias, self.page_size, float("-inf"))
        self.positions = moved(self.positions, self.page_size, 0)
        self.open_slot += (pinned_pages - old_pinned) * self.page_size
        if self.minima is not None:
            self.minima, self.maxima = moved(self.minima, 1, 0), moved(self.maxima, 1, 0)

    def hide(self, visible: torch.Tensor | None) -> None:
        """Take note of padding among the tokens stored last, and finish their pages.

        Args:
            visible: `[batch, new]` bool, False for padding; None if there is none.
        """
        if visible is not None:
            first = self.seen - self.new
            index = (self.positions - first).clamp(min=0, max=self.new - 1)
            shown = visible[:, None].expand(-1, self.num_heads, -1).gather(-1, index.long())
            hidden = (self.positions >= first) & (self.bias == 0) & ~shown
            self.bias.masked_fill_(hidden, float("-inf"))
            # A padding token's K and V may be anything, NaN too, and 0 * NaN is NaN.
            self.keys.masked_fill_(hidden[..., None], 0)
            self.values.masked_fill_(hidden[..., None], 0)
        if self.minima is not None and (self.new > 1 or self.seen == 1):
            self._summarise(slice((self.pinned - self.new) // self.page_size, self.pinned_pages))

    def _summarise(self, pages: slice) -> None:
        """Min/max representatives of pinned pages, over their resident tokens."""
        slots = slice(pages.start * self.page_size, pages.stop * self.page_size)
        bounds = raas_kernels.page_extremes(self.keys[:, :, slots], self.bias[:, :, slots], self.page_size)
        self.minima[:, :, pages], self.maxima[:, :, pages] = bounds

    def apply_to_rows(self, function: Callable) -> None:
        """Make every tensor that has rows what `function` makes of it."""
        for name in ("keys", "values", "bias", "positions", "priority", "open_slot", "minima", "maxima"):
            if getattr(self, name) is not None:
                setattr(self, name, function(getattr(self, name)).contiguous())
        if self.keys is not None:
            self.batch_size = self.keys.shape[0]
