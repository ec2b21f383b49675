"""The KV cache of one layer as the operators of this package take it: static buffers, divided into pages."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(eq=False)
class PagedKV:
    """One layer's KV in pages; the operators write its buffers in place.

    A page is `page_size` consecutive slots. Keys hold RoPE already, so attention may read slots in any order. One row
    of one KV head, with pages of 4 slots, after a prefill of tokens 0 to 2 (the mask hides token 0) and 10 decode
    tokens; `.` is a slot without a token, and one column is one page:

        page        pinned (prefill)      full decode page      open page             free page
        positions      0    1    2    .  |   7    8    9   10  |  11   12   13   14  |  -1   -1   -1   -1
        bias        -inf    0    0 -inf  |   0    0    0    0  |   0    0 -inf -inf  | -inf -inf -inf -inf
        priority    (no meaning)         |  10                 |  11                 | -inf
        evictable   False                |  True               |  True               |  True
        clock       (12, 9): the newest token is the 12th of the sequence and the 9th decode token, counted from 0
        open_slot   8, the first slot of the open page; its free slots have their positions already (13, 14)

    Shapes: B batch rows, H KV heads, P pages, S = `page_size`, N = P * S slots, Dk and Dv head sizes of K and V, K
    numbers of the policy. `keys` and `values` may be strided views of a caller's memory, with a contiguous last
    dimension. All other buffers are contiguous.

    With `blocks`, the contents of the slots lie in a pool of blocks that all rows share, and a block holds one page of
    one row, for all its KV heads. Rows then need no more memory than their own pages, and pages with the same tokens
    can be stored once. Two rows whose first page is the same, and whose other pages lie anywhere:

        blocks, row 0    [4, 1, 6, 0]    page 0 in block 4, page 1 in block 1, page 2 in block 6, page 3 without memory
        blocks, row 1    [4, 3, 0, 0]    page 0 in block 4, page 1 in block 3
        keys             block 0 | block 1     | block 2 | block 3     | block 4         | block 5 | block 6
        [7, H, S, Dk]    nothing | row 0, p. 1 | free    | row 1, p. 1 | both rows, p. 0 | free    | row 0, p. 2

    The pool has the buffers `keys`, `values`, `key_scales`, `value_scales`, `value_min` and `value_max`: their shapes
    begin with `[blocks, H, S]` instead of `[B, H, N]`. All other buffers stay as they are. A page without memory has
    block 0, its bias is -inf and its `evictable` is False. No operator writes block 0. What block 0 holds has no effect
    on a row whose first page has memory; other rows may read it.

    Args:
        keys: `[B, H, N, Dk]`, RoPE applied. In a 4-bit cache, codes: uint8 `[B, H, N, Dk / 2]`, see `pack`.
        values: `[B, H, N, Dv]`, of a dtype of its own. In a 4-bit cache, codes: uint8 `[B, H, N, Dv / 2]`.
        bias: `[B, H, N]` float32 (float64 for float64 keys): 0 where attention may read a token, -inf where a slot
            has no token or the attention mask hides it.
        positions: `[B, H, N]` int32, sequence index of each slot's token; -1, or past the clock, where there is none.
        priority: `[B, H, P]` float64. `append` recycles the evictable page with the smallest; -inf says that the page
            holds nothing. The priority of a page that is not evictable has no meaning.
        evictable: `[B, P]` bool, whether `append` may take the page: False for pinned pages, and for pages beyond the
            row's own limit.
        open_slot: `[B, H]` int64, first slot of the page that takes the next decode token.
        clock: `[B, H, 2]` int64, (sequence index, decode-token index) of the newest token, for each row and KV head.
        page_size: S, a power of two.
        key_scales, value_scales: `[B, H, N]` float32, for 8-bit caches only: `keys` and `values` are then int8 or
            float8_e4m3fn codes, and a slot's states are its codes times its scale.
        key_min, key_max: `[B, H, P, Dk]`, elementwise bounds of each page's visible keys, inf and -inf where a page
            has none; float32 for an 8-bit cache. None where nothing reads them. A 4-bit cache always has them, in the
            dtype of the model's keys, because its key codes count from key_min to key_max. They are those of the keys
            that were visible when the page was coded; if there were none, of all keys of the page.
        states: `[B, H, P, K]` float64, the policy's own numbers for each page. `append` zeroes them for the page that
            it opens.
        open_keys: `[B, H, S, Dk]`, for 4-bit caches only: the keys of the page of `open_slot` while it is not full, in
            the dtype of the model's keys. The page's key codes mean nothing until its last token comes.
        value_min, value_max: `[B, H, N]`, for 4-bit caches only: smallest and largest number of each slot's value, in
            the dtype of the model's values. The value's codes count from one to the other.
        row_states: `[B, H, V, Dk]` float64, V vectors of the policy for each row and KV head. No operator uses them.
        blocks: `[B, P]` int32, the block that holds each page. None if each row has its pages in memory of its own.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor
    positions: Tensor
    priority: Tensor
    evictable: Tensor
    open_slot: Tensor
    clock: Tensor
    page_size: int
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None
    key_min: Tensor | None = None
    key_max: Tensor | None = None
    states: Tensor | None = None
    open_keys: Tensor | None = None
    value_min: Tensor | None = None
    value_max: Tensor | None = None
    row_states: Tensor | None = None
    blocks: Tensor | None = None

    @classmethod
    def filled(cls, keys: Tensor, values: Tensor, page_size: int) -> PagedKV:
        """A cache whose slots all hold a visible token, in the order of the sequence, in evictable pages.

        Args:
            keys, values: `[B, H, N, Dk]` and `[B, H, N, Dv]`, the buffers to use; N is a multiple of `page_size`.
        """
        (batch, heads, slots), device = keys.shape[:3], keys.device
        positions = torch.arange(slots, dtype=torch.int32, device=device).expand(batch, heads, -1).contiguous()
        return cls(
            keys=keys,
            values=values,
            bias=torch.zeros(batch, heads, slots, dtype=torch.promote_types(keys.dtype, torch.float32), device=device),
            positions=positions,
            priority=positions[..., ::page_size].double(),
            evictable=torch.ones(batch, slots // page_size, dtype=torch.bool, device=device),
            open_slot=torch.full((batch, heads), slots - page_size, dtype=torch.int64, device=device),
            clock=torch.full((batch, heads, 2), slots - 1, dtype=torch.int64, device=device),
            page_size=page_size,
        )

    @property
    def num_pages(self) -> int:
        """P, the number of pages of each row."""
        return self.bias.shape[2] // self.page_size

    @property
    def is_packed(self) -> bool:
        """Whether keys and values are 4-bit codes, two to a byte."""
        return self.open_keys is not None

    @property
    def value_size(self) -> int:
        """Dv, the head size of V."""
        return self.values.shape[-1] * (2 if self.is_packed else 1)

    @property
    def is_open(self) -> Tensor:
        """`[B, H]` bool, whether the page of `open_slot` has room for another token."""
        return (self.clock[..., 1] + 1) % self.page_size != 0

    @property
    def first(self) -> Tensor:
        """`[B, H, P]` int32, sequence index of each page's first token."""
        return self.positions[..., :: self.page_size]

    @property
    def held(self) -> Tensor:
        """`[B, H, P]` bool, whether a page is evictable and holds a token."""
        return self.evictable[:, None] & (self.priority > float("-inf"))

    def with_contents(self, keys: Tensor, values: Tensor) -> PagedKV:
        """The same pages with the keys and values that a model expanded from a cached latent (MLA).

        Args:
            keys, values: `[B, heads, N, Dk]` and `[B, heads, N, Dv]`, for the slots of the latent.

        Returns:
            A PagedKV to read from. Its bias, positions and clock are views, expanded to `heads`. It has no scales, and
            no key_min and key_max, because the latent's would not bound the expanded keys.
        """
        heads = keys.shape[1]
        return PagedKV(
            keys=keys,
            values=values,
            bias=self.bias.expand(-1, heads, -1),
            positions=self.positions.expand(-1, heads, -1),
            priority=self.priority,
            evictable=self.evictable,
            open_slot=self.open_slot,
            clock=self.clock.expand(-1, heads, -1),
            page_size=self.page_size,
            states=self.states,
        )


def take_rows(tensor: Tensor, rows: Tensor | None) -> Tensor:
    """A copy of the batch rows `rows` `[R]` of `tensor` `[B, ...]`; the tensor itself for None."""
    if rows is None:
        return tensor
    if tensor.dtype == torch.float8_e4m3fn:  # torch cannot index float8 tensors
        return tensor.view(torch.int8).index_select(0, rows).view(tensor.dtype)
    return tensor.index_select(0, rows)


def resident(kv: PagedKV, tokens: Tensor, rows: Tensor | None = None) -> Tensor:
    """Whether attention may read each of `tokens`: it is in the cache, and the mask does not hide it.

    Args:
        tokens: `[R, T]` or `[T]` int, sequence indices.
        rows: `[R]` int64, the batch rows asked about; None for all.

    Returns:
        `[R, H, T]` bool.
    """
    positions, visible = take_rows(kv.positions, rows), take_rows(kv.bias, rows) == 0
    # [R, H, T, N]
    matches = positions[:, :, None] == (tokens if tokens.ndim == 1 else tokens[:, None])[..., None]
    return (matches & visible[:, :, None]).any(-1)


def finite(states: Tensor, hidden: Tensor) -> Tensor:
    """`states` with 0 for every NaN and infinity of a hidden token, because attention would make NaN of 0 * NaN.

    Finite values stay, because a later attention mask may show the token.

    Args:
        states: `[..., D]`.
        hidden: bool, broadcasts against `states`.
    """
    return torch.where(hidden & ~states.isfinite(), 0, states)
