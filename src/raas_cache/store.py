"""The pages of one attention layer: static buffers, in-place writes. It knows pages, neither attention nor policies."""

import math
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch

import raas_kernels


AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])
RowFunction = Callable[[torch.Tensor], torch.Tensor]
"""Takes a tensor `[batch, ...]` and gives one whose rows are rows of it."""

CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
SLOTS = ("keys", "values", "bias", "positions", "key_scales", "value_scales")
BOUNDS = ("minima", "maxima")
EVICTABLE = ("priority", "page_state")
EMPTY = {"bias": float("-inf"), "priority": float("-inf")}
ROWS = (*SLOTS, *BOUNDS, *EVICTABLE, "open_slot", "clock")
"""Tensors of a store that have rows: `[batch, kv_heads, ...]`, an element a slot, a page, an evictable page, or few."""


def uncompiled(function: AnyFunction) -> AnyFunction:
    """Decorator: `torch.compile` leaves the function to Python. Unlike torch's own it keeps the types."""
    left: AnyFunction = torch.compiler.disable(function)
    return left


class PageStore:
    """One layer's KV in pages of `page_size` tokens.

    Pages `0 .. pinned_pages-1` are never evicted: the prompt and later turns, with `prompt="evict"` the sink. Behind
    them lie `decode_pages` evictable ones, recycled in place, or with `grows` more and more. All rows and KV heads fill
    pages in step, so sizes are host integers; what a page holds differs from head to head. Tensors are described in
    `raas_kernels.reference`. `seen` counts the tokens of the sequence, which positions depend on; the number of
    resident tokens is another.

    A decode step moves the `clock` alone, and writes into buffers that stay where they are: a compiled step or a CUDA
    graph can repeat it without the host. The host's own counts follow when somebody asks. So `append`,
    `hide_generated` and `mean_keys` may neither move a buffer nor look at a value; what runs between steps may.

    In order: sizes and counts, writing (`append`, `pin`) and taking back (`retract`, `unpin`), buffers of another size,
    cutting input down to the budget (`candidates`, `keep`), padding (`hide`, `hide_generated`), rows.

    Args:
        budget: tokens to hold, the prompt counted in.
        page_size: tokens a page, a power of two.
        min_decode_pages: evictable pages to hold even where the prompt leaves room for fewer.
        prompt: what becomes of input, see `PagedCache`.
        kv_dtype: `"int8"` or `"fp8"` to hold 8-bit codes, None for the dtype that comes.
        has_bounds: keep each page's element-wise minima and maxima.
        grows: take more pages when all are held, where others evict.
        num_states: numbers of the policy's own that are kept for each page.
    """

    budget: int
    page_size: int
    min_decode_pages: int
    code: torch.dtype | None
    has_bounds: bool
    grows: bool
    num_states: int
    # Of the keys and values given, once there were any.
    dtype: torch.dtype
    device: torch.device
    batch_size: int
    num_heads: int
    # Sizes and counts, see `release`.
    pinned_pages: int
    decode_pages: int
    released_pages: int
    pinned: int
    new: int
    is_filled: bool
    is_decoding: bool
    holds_input: bool
    # None where nothing is held, or the store has no use for them: `held_tensors` leaves those out.
    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor
    positions: torch.Tensor
    key_scales: torch.Tensor
    value_scales: torch.Tensor
    minima: torch.Tensor
    maxima: torch.Tensor
    priority: torch.Tensor
    page_state: torch.Tensor
    open_slot: torch.Tensor
    clock: torch.Tensor

    def __init__(
        self,
        budget: int,
        page_size: int,
        min_decode_pages: int,
        *,
        prompt: Literal["pin", "select", "evict"] = "pin",
        kv_dtype: Literal["int8", "fp8"] | None = None,
        has_bounds: bool = False,
        grows: bool = False,
        num_states: int = 0,
    ):
        self.budget, self.page_size, self.min_decode_pages = budget, page_size, min_decode_pages
        self.prompt, self.code = prompt, None if kv_dtype is None else CODES[kv_dtype]
        self.has_bounds, self.grows, self.num_states = has_bounds, grows, num_states
        self.release()

    def release(self) -> None:
        """Hold nothing, and no memory."""
        for name in ROWS:
            setattr(self, name, None)
        self.pinned_pages = self.decode_pages = 0
        self.pinned = self.new = 0
        self._seen = self._decoded = 0
        self._lags = False  # whether compiled steps have moved the clock on without the host's counts
        self.is_filled = self.is_decoding = False  # whether any token was stored, any generated one
        self.released_pages = 0  # input pages that became evictable
        self.holds_input = False  # whether the last input is pinned only until `keep` has been called

    def allocate(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Take batch, heads, sizes, dtype and device from the first key and value; the first `store` sizes the rest.

        Raises:
            ValueError: the device cannot compute in the store's 8-bit dtype.
        """
        self.dtype, self.device = key.dtype, key.device
        if self.code == CODES["fp8"] and self.device.type == "cuda":
            capability = torch.cuda.get_device_capability(self.device)
            if capability < (8, 9):
                raise ValueError(
                    f"kv_dtype='fp8' needs a GPU of capability 8.9 or newer, not {capability}: use 'int8'."
                )
        self.batch_size, self.num_heads = key.shape[:2]
        accumulate = torch.promote_types(self.dtype, torch.float32)

        def empty(*size: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(self.batch_size, self.num_heads, *size, dtype=dtype, device=self.device)

        self.keys = empty(0, key.shape[-1], dtype=self.dtype if self.code is None else torch.int8)
        self.values = empty(0, value.shape[-1], dtype=self.keys.dtype)
        self.bias, self.positions = empty(0, dtype=accumulate), empty(0, dtype=torch.int32)
        self.priority = empty(0, dtype=torch.float64)
        self.open_slot = empty(dtype=torch.int64).zero_()
        self.clock = empty(2, dtype=torch.int64).fill_(-1)
        if self.code is not None:
            self.key_scales, self.value_scales = empty(0, dtype=torch.float32), empty(0, dtype=torch.float32)
        if self.has_bounds:
            bounds_dtype = self.dtype if self.code is None else accumulate
            self.minima, self.maxima = (empty(0, key.shape[-1], dtype=bounds_dtype) for _ in BOUNDS)
        if self.num_states:
            self.page_state = empty(0, self.num_states, dtype=torch.float64)

    def held_tensors(self, *names: str) -> dict[str, torch.Tensor]:
        """Those of the tensors that this store has."""
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def contents(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values for the kernels: codes in their own dtype, which most of torch cannot move."""
        return (
            (self.keys, self.values) if self.code is None else (self.keys.view(self.code), self.values.view(self.code))
        )

    @property
    def scales(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What the codes of an 8-bit store are multiplied by, for the kernels."""
        return None if self.code is None else (self.key_scales, self.value_scales)

    def states(self, pages: slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of some pages as the model gave them, but for the rounding of an 8-bit store."""
        slots = slice(*(bound and bound * self.page_size for bound in (pages.start, pages.stop)))
        keys, values = (tensor[:, :, slots] for tensor in self.contents)
        if self.scales is not None:
            key_scales, value_scales = (tensor[:, :, slots] for tensor in self.scales)
            keys = raas_kernels.dequantize(keys, key_scales, self.dtype)
            values = raas_kernels.dequantize(values, value_scales, self.dtype)
        return keys, values

    @property
    def seen(self) -> int:
        """Tokens of the sequence so far, evicted ones included."""
        self._read_clock()
        return self._seen

    @property
    def decoded(self) -> int:
        """Generated tokens so far, counted on to a full page where input closed one."""
        self._read_clock()
        return self._decoded

    def _read_clock(self) -> None:
        if self._lags:
            self._seen, self._decoded = (self.clock[0, 0] + 1).tolist()
            self._lags = False

    def move_clock(self, seen: int, decoded: int) -> None:
        """Count so many tokens on, or back."""
        self._seen, self._decoded = self.seen + seen, self.decoded + decoded
        self.clock[..., 0] += seen
        self.clock[..., 1] += decoded
        self.is_filled, self.is_decoding = self._seen > 0, self._decoded > 0

    def _budget_for_input(self, pinned_pages: int) -> int:
        """Pages of the budget that are spent on input; the others are for decode pages."""
        if self.prompt == "evict":
            return 1
        half = max(1, self.budget // self.page_size // 2)
        return pinned_pages if self.prompt == "pin" else min(pinned_pages, half)

    @property
    def input_pages_read(self) -> int:
        """Pinned pages that a decode step reads: all, or with `prompt="select"` at most half of the budget."""
        return self._budget_for_input(self.pinned_pages)

    @property
    def room_for_decode(self) -> int:
        """Decode pages that the budget leaves beside input; may be less than `decode_pages`."""
        return self.budget // self.page_size - self.input_pages_read

    @property
    def is_over_budget(self) -> bool:
        """Whether input left less room than `min_decode_pages`, so that more is held than the budget."""
        return not self.grows and self.room_for_decode < self.min_decode_pages

    @property
    def limit(self) -> int:
        """Evictable pages that may be held: settled when decoding begins, but for where input is evictable too."""
        return max(self.room_for_decode, self.min_decode_pages) if self.prompt == "evict" else self.decode_pages

    @property
    def opened(self) -> int:
        """Evictable pages that were ever opened."""
        return self.released_pages + math.ceil(self.decoded / self.page_size)

    @property
    def evicted(self) -> int:
        """Pages evicted so far, the same for every row and head."""
        return max(0, self.opened - self.decode_pages)

    def check_same_use(self, key: torch.Tensor) -> None:
        """Raise a ValueError if a new key's batch, heads, head size, dtype or device are not those held."""
        held = (self.batch_size, self.num_heads, self.keys.shape[-1], self.dtype, self.device)
        batch, heads, _, head_size = key.shape
        given = (batch, heads, head_size, key.dtype, key.device)
        if held == given:
            return
        for name, old, new in zip(("batch size", "KV heads", "head size", "dtype", "device"), held, given, strict=True):
            if old != new:
                raise ValueError(
                    f"This cache holds {self.seen} tokens with {name} {old}, and was given keys with {name} {new}: "
                    "use a new cache for another input, or call reset() on this one first."
                )

    def make_room(self) -> None:
        """Called before a decode step: a store that grows takes more pages when all are held."""
        if self.grows and self.decoded % self.page_size == 0 and self.opened == self.decode_pages:
            self._resize(self.pinned_pages, self.decode_pages + max(self.decode_pages // 4, 8))

    def append(self, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor | None = None) -> None:
        """Write one generated token into the open decode page.

        Args:
            key, value: `[batch, kv_heads, 1, head_dim]`.
            visible: `[batch]` bool, False where it is padding; None if it is nowhere.
        """
        if torch.compiler.is_compiling():
            self._lags, may_open = True, True
        else:
            may_open = self.decoded % self.page_size == 0
            self._seen, self._decoded = self._seen + 1, self._decoded + 1
        self.new, self.is_decoding = 1, True
        raas_kernels.append(
            *self.contents,
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
            self.scales,
            visible,
        )
        if self.page_state is not None and may_open:  # a page begins with the present token if it opens now
            self.page_state.masked_fill_((self.first == self.clock[..., :1])[..., None], 0)

    def retract(self) -> None:
        """Count the last generated token off; what it has overwritten is the caller's affair."""
        self.move_clock(-1, -1)

    @property
    def first(self) -> torch.Tensor:
        """Sequence index of the first token of each evictable page, `[batch, kv_heads, decode_pages]`."""
        return self.positions[..., self.pinned_pages * self.page_size :: self.page_size]

    def pin(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write input tokens `[batch, kv_heads, new, head_dim]` into pinned pages."""
        self.new = key.shape[2]
        start, end = self.pinned, self.pinned + self.new
        pinned_pages = math.ceil(end / self.page_size)
        if self.prompt == "evict":
            self.holds_input = True
            self._resize(pinned_pages, self.decode_pages)
        else:
            self._reserve(pinned_pages)
        for name, states in (("key", key), ("value", value)):
            if self.code is not None:
                states, scale = raas_kernels.quantize(states, self.code)
                states = states.view(torch.int8)
                getattr(self, f"{name}_scales")[:, :, start:end] = scale
            getattr(self, f"{name}s")[:, :, start:end] = states
        self.bias[:, :, start:end] = 0
        self.positions[:, :, start:end] = torch.arange(self.seen, self.seen + self.new, device=self.device)
        self._move_open_page(self.new)
        self.move_clock(self.new, 0)
        self.pinned = end

    def unpin(self, length: int) -> None:
        """Take back the last `length` tokens, all of them pinned; the stamps they gave are the caller's affair."""
        self.pinned -= length
        self.move_clock(-length, 0)
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
        """Have `pinned_pages` pinned pages; what they leave of the budget is for decoding, settled when that begins."""
        room = self.budget // self.page_size - self._budget_for_input(pinned_pages)
        self._resize(pinned_pages, self.decode_pages if self.decoded else max(room, self.min_decode_pages))

    def _resize(self, pinned_pages: int, decode_pages: int) -> None:
        """Move to buffers of another size; pages that no longer fit are dropped, those that are new hold nothing."""
        old_pinned, old_decode = self.pinned_pages, self.decode_pages
        self.pinned_pages, self.decode_pages = pinned_pages, decode_pages
        pinned, decode = min(old_pinned, pinned_pages), min(old_decode, decode_pages)

        def moved(name: str, old: torch.Tensor, unit: int, has_pinned: bool) -> torch.Tensor:
            before, after = (old_pinned * unit, pinned_pages * unit) if has_pinned else (0, 0)
            new = old.new_full((*old.shape[:2], after + decode_pages * unit, *old.shape[3:]), EMPTY.get(name, 0))
            if has_pinned:
                new[:, :, : pinned * unit] = old[:, :, : pinned * unit]
            new[:, :, after : after + decode * unit] = old[:, :, before : before + decode * unit]
            return new

        for names, unit, has_pinned in ((SLOTS, self.page_size, True), (BOUNDS, 1, True), (EVICTABLE, 1, False)):
            for name, old in self.held_tensors(*names).items():
                setattr(self, name, moved(name, old, unit, has_pinned))
        self.open_slot += (pinned_pages - old_pinned) * self.page_size
        self._fix_addresses()

    def _fix_addresses(self) -> None:
        """Promise that the buffers stay where they are from step to step, which a CUDA graph needs to know."""
        if self.device.type == "cuda":
            for tensor in self.held_tensors(*ROWS).values():
                torch._dynamo.mark_static_address(tensor, guard=False)

    def candidates(self) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """With `prompt="evict"`, after input: the sink, and the pages that compete for the rest of the budget.

        Returns:
            Page indices `[batch, kv_heads, 1]` and `[batch, kv_heads, E]`, and the E pages' `priority`, `page_state`
            and `first`: an input page comes with the index of its newest token.
        """
        start = self.seen - self.new  # of the input
        rows, pages = (self.batch_size, self.num_heads), self.pinned_pages + self.decode_pages
        sink = torch.zeros(*rows, 1, dtype=torch.int64, device=self.device)
        if not start:
            # A row's first page that is not all padding; where there is none, argmax takes page 0.
            sink = (self.bias.view(*rows, pages, -1) == 0).any(-1).int().argmax(-1, keepdim=True)
        others = torch.arange(pages - 1, device=self.device)
        others = others + (others >= sink)
        input_pages = torch.arange(self.pinned_pages, device=self.device) - int(start > 0)
        newest = (start + (input_pages + 1) * self.page_size).clamp(max=self.seen) - 1
        priority = torch.cat([newest.double().expand(*rows, -1), self.priority], -1).gather(-1, others)
        state = self.page_state
        if state is not None:
            state = torch.cat([state.new_zeros(*rows, self.pinned_pages, self.num_states), state], 2)
            state = torch.take_along_dim(state, others[..., None], 2)
        first = self.positions[..., :: self.page_size].gather(-1, others)
        return sink, others, {"priority": priority, "page_state": state, "first": first}

    def keep(self, sink: torch.Tensor, others: torch.Tensor, ranked: dict[str, torch.Tensor]) -> None:
        """Hold the sink and, of what `candidates` returned, the pages of highest (priority, first token index)."""
        self.released_pages += self.pinned_pages - 1
        # Whatever is open is closed: generated tokens open a page of their own.
        closing = -self.decoded % self.page_size
        self.move_clock(0, closing)
        limit = self.limit
        by_age = ranked["first"].argsort(-1)
        order = by_age.gather(-1, ranked["priority"].gather(-1, by_age).argsort(dim=-1, stable=True))
        kept = order[..., -limit:].sort(-1).values
        self.priority = ranked["priority"].gather(-1, kept)
        if self.page_state is not None:
            self.page_state = torch.take_along_dim(ranked["page_state"], kept[..., None], 2)
        index = torch.cat([sink, others.gather(-1, kept)], -1)
        for names, unit in ((SLOTS, self.page_size), (BOUNDS, 1)):
            for name, old in self.held_tensors(*names).items():
                pages = old.reshape(*old.shape[:2], self.pinned_pages + self.decode_pages, -1)
                chosen = torch.take_along_dim(pages, index[..., None], 2)
                setattr(self, name, chosen.view(*old.shape[:2], index.shape[-1] * unit, *old.shape[3:]))
        self.pinned_pages, self.decode_pages = 1, kept.shape[-1]
        self._resize(1, limit)
        self.pinned, self.holds_input = self.page_size, False

    @uncompiled
    def hide(self, visible: torch.Tensor | None) -> None:
        """Take note of padding among the input stored last, and finish its pages.

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
            for tensor in self.held_tensors("keys", "values", "key_scales", "value_scales").values():
                tensor.masked_fill_(hidden if tensor.ndim == 3 else hidden[..., None], 0)
        if self.minima is not None:
            self._summarise(slice((self.pinned - self.new) // self.page_size, self.pinned_pages))

    def hide_generated(self, visible: torch.Tensor) -> None:
        """Take note that the token appended last is padding where `visible` `[batch]` is False."""
        slot = (self.open_slot + self.clock[..., 1] % self.page_size)[..., None]
        for name, tensor in self.held_tensors("bias", "keys", "values", "key_scales", "value_scales").items():
            index, hidden = slot, ~visible[:, None, None]
            if tensor.ndim == 4:
                index, hidden = slot[..., None].expand(-1, -1, -1, tensor.shape[-1]), hidden[..., None]
            tensor.scatter_(2, index, tensor.gather(2, index).masked_fill(hidden, EMPTY.get(name, 0)))

    def _summarise(self, pages: slice) -> None:
        """Min/max representatives of pinned pages, over their resident tokens."""
        bias = self.bias[:, :, pages.start * self.page_size : pages.stop * self.page_size]
        bounds = raas_kernels.page_extremes(self.states(pages)[0], bias, self.page_size)
        self.minima[:, :, pages], self.maxima[:, :, pages] = bounds

    def mean_keys(self) -> torch.Tensor:
        """Mean of each page's resident keys, `[batch, kv_heads, pages, head_dim]`; 0 where there is none."""
        keys: torch.Tensor = self.states()[0].unflatten(2, (-1, self.page_size))
        is_resident: torch.Tensor = (self.bias == 0).unflatten(2, (-1, self.page_size))[..., None]
        return keys.masked_fill(~is_resident, 0).sum(3) / is_resident.sum(3).clamp(min=1)

    def apply_to_rows(self, function: RowFunction) -> None:
        """Make every tensor that has rows what `function` makes of it."""
        for name, old in self.held_tensors(*ROWS).items():
            new = function(old).contiguous()
            if new.shape == old.shape and old.is_cuda:  # beams change places at every step, and a CUDA graph may be on
                old.copy_(new)
            else:
                setattr(self, name, new)
        if self.keys is not None:
            self.batch_size = self.keys.shape[0]
            self._fix_addresses()
