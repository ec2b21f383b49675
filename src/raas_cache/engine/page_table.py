"""The pages of one attention layer: static buffers, in-place writes. It knows pages, neither attention nor policies."""

import functools
import math
import sys
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
EMPTY = {"bias": float("-inf"), "priority": float("-inf"), "positions": -1}
FIRST_TOKENS = 128  # that a store begins with evictable pages for; it takes more as they are needed
UNLIMITED = sys.maxsize
ROWS = (*SLOTS, *BOUNDS, *EVICTABLE, "open_slot", "clock")
"""Tensors of a store that have rows: `[batch, kv_heads, ...]`, an element a slot, a page, an evictable page, or few."""


def uncompiled(function: AnyFunction) -> AnyFunction:
    """Decorator: `torch.compile` leaves the function to Python. Unlike torch's own it keeps the types."""
    left: AnyFunction = torch.compiler.disable(function)
    return left


def allocating(function: AnyFunction) -> AnyFunction:
    """Decorator for what makes buffers: they can be written to in every mode, also if made under inference mode."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        # An inference tensor takes no in-place write outside inference mode, for as long as it lives.
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return run  # type: ignore[return-value]


class PageStore:
    """One layer's KV in pages of `page_size` tokens.

    Pages `0 .. pinned_pages-1` are never evicted: the prompt and later turns, with `prompt="evict"` the sink. Behind
    them lie `decode_pages` evictable ones. More are allocated as they are needed, up to `limit`; then pages are
    recycled in place. With `grows` there is no limit. All rows and KV heads fill pages in step, so sizes are host
    integers; what a page holds differs from head to head. Tensors are described in `raas_kernels.reference`. `seen`
    counts the tokens of the sequence, which positions depend on; the number of resident tokens is another.

    A decode step moves the `clock` alone, and writes into buffers that stay where they are: a compiled step or a CUDA
    graph can repeat it without the host. The host's own counts follow when somebody asks. So `append`,
    `hide_generated` and `mean_keys` may neither move a buffer nor look at a value; what runs between steps may.

    What changes sizes builds all of the new buffers before it assigns any: if memory runs out, the store is as before.

    In order: sizes and counts, writing (`append`, `pin`) and taking back (`retract`, `unpin`), buffers of another size,
    cutting input down to the budget (`candidates`, `keep`), what is hidden (`hide`, `hide_generated`, `held`), rows.

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
    preallocates: bool  # whether `limit` pages are allocated at once, as a compiled step needs them
    # Of the keys and values given, once there were any.
    dtypes: tuple[torch.dtype, torch.dtype]
    device: torch.device
    batch_size: int
    num_heads: int
    # Sizes and counts, see `release`.
    pinned_pages: int
    decode_pages: int
    limit: int
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
        self.preallocates = False
        self.release()

    def release(self) -> None:
        """Hold nothing, and no memory."""
        for name in ROWS:
            setattr(self, name, None)
        self.pinned_pages = self.decode_pages = self.limit = 0
        self.pinned = self.new = 0
        self._seen = self._decoded = 0
        self._lags = False  # whether compiled steps have moved the clock on without the host's counts
        self.is_filled = self.is_decoding = False  # whether any token was stored, any generated one
        self.released_pages = 0  # input pages that became evictable
        self.holds_input = False  # whether the last input is pinned only until `keep` has been called

    @allocating
    def allocate(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Take batch, heads, sizes, dtypes and device from the first key and value; the first `pin` sizes the rest.

        Raises:
            ValueError: the device cannot compute in the store's 8-bit dtype.
        """
        self.dtypes, self.device = (key.dtype, value.dtype), key.device
        if self.code == CODES["fp8"] and self.device.type == "cuda":
            capability = torch.cuda.get_device_capability(self.device)
            if capability < (8, 9):
                raise ValueError(
                    f"kv_dtype='fp8' needs a GPU of capability 8.9 or newer, not {capability}: use 'int8'."
                )
        self.batch_size, self.num_heads = key.shape[:2]
        accumulate = torch.promote_types(torch.promote_types(*self.dtypes), torch.float32)

        def empty(*size: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(self.batch_size, self.num_heads, *size, dtype=dtype, device=self.device)

        key_dtype, value_dtype = self.dtypes if self.code is None else (torch.int8, torch.int8)
        self.keys = empty(0, key.shape[-1], dtype=key_dtype)
        self.values = empty(0, value.shape[-1], dtype=value_dtype)
        self.bias, self.positions = empty(0, dtype=accumulate), empty(0, dtype=torch.int32)
        self.priority = empty(0, dtype=torch.float64)
        self.open_slot = empty(dtype=torch.int64).zero_()
        self.clock = empty(2, dtype=torch.int64).fill_(-1)
        if self.code is not None:
            self.key_scales, self.value_scales = empty(0, dtype=torch.float32), empty(0, dtype=torch.float32)
        if self.has_bounds:
            bounds_dtype = key.dtype if self.code is None else accumulate
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
            keys = raas_kernels.dequantize(keys, key_scales, self.dtypes[0])
            values = raas_kernels.dequantize(values, value_scales, self.dtypes[1])
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

    def room_beside(self, pinned_pages: int) -> int:
        """Decode pages that the budget leaves beside `pinned_pages` pages of input; may be negative."""
        return self.budget // self.page_size - self._budget_for_input(pinned_pages)

    @property
    def is_over_budget(self) -> bool:
        """Whether input left less room than `min_decode_pages`, so that more is held than the budget."""
        return not self.grows and self.room_beside(self.pinned_pages) < self.min_decode_pages

    @property
    def opened(self) -> int:
        """Evictable pages that were ever opened."""
        return self.released_pages + math.ceil(self.decoded / self.page_size)

    @property
    def evicted(self) -> int:
        """Pages evicted so far, the same for every row and head."""
        return max(0, self.opened - self.decode_pages) if self.decode_pages == self.limit else 0

    def check_same_use(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Raise a ValueError if batch, heads, head sizes, dtypes or device are not those of the tokens held."""
        held = (self.batch_size, self.num_heads, self.keys.shape[-1], self.values.shape[-1], *self.dtypes, self.device)
        batch, heads, _, head_size = key.shape
        given = (batch, heads, head_size, value.shape[-1], key.dtype, value.dtype, key.device)
        if held == given:
            return
        names = ("batch size", "KV heads", "head size", "head size of values", "dtype", "dtype of values", "device")
        for name, old, new in zip(names, held, given, strict=True):
            if old != new:
                raise ValueError(
                    f"This cache holds {self.seen} tokens with {name} {old}, and was given keys with {name} {new}: "
                    "use a new cache for another input, or call reset() on this one first."
                )

    def _pages_to_allocate(self, needed: int, limit: int) -> int:
        """Evictable pages to have where `needed` are needed now: half as many again, and at most `limit`."""
        if self.preallocates and not self.grows:
            return limit
        return min(limit, max(needed + needed // 2, FIRST_TOKENS // self.page_size, 1))

    def _limit_for(self, pinned_pages: int) -> int:
        """Evictable pages that may be held beside `pinned_pages` pinned ones."""
        return UNLIMITED if self.grows else max(self.room_beside(pinned_pages), self.min_decode_pages)

    def make_room(self) -> None:
        """Called before a decode step: take more pages when all are held and more may be."""
        if self.preallocates or (self.decoded % self.page_size == 0 and self.opened >= self.decode_pages):
            pages = self._pages_to_allocate(self.decode_pages + 1, self.limit)
            self._resize(self.pinned_pages, pages, self.limit)

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
            self.prompt == "evict",
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

    @allocating
    def pin(self, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor | None = None) -> None:
        """Write input tokens into pinned pages.

        Args:
            key, value: `[batch, kv_heads, new, head_dim]`.
            visible: `[batch, new]` bool, False where the attention mask hides a token; None if it hides none.
        """
        new = key.shape[2]
        start, end = self.pinned, self.pinned + new
        hidden = None if visible is None else ~visible[:, None]
        positions = torch.arange(self.seen, self.seen + new, device=self.device)
        if hidden is not None:
            key, value = (raas_kernels.finite(states, hidden[..., None]) for states in (key, value))
        if self.prompt == "evict":
            self._resize(math.ceil(end / self.page_size), self.decode_pages, self._limit_for(1))
            self.holds_input = True
        else:
            self._reserve(math.ceil(end / self.page_size))
        for name, states in (("key", key), ("value", value)):
            if self.code is not None:
                states, scale = raas_kernels.quantize(states, self.code)
                states = states.view(torch.int8)
                getattr(self, f"{name}_scales")[:, :, start:end] = scale
            getattr(self, f"{name}s")[:, :, start:end] = states
        self.bias[:, :, start:end] = 0
        if hidden is not None:
            self.bias[:, :, start:end].masked_fill_(hidden, float("-inf"))
        self.positions[:, :, start:end] = positions
        self._move_open_page(new)
        self.move_clock(new, 0)
        self.new, self.pinned = new, end
        if self.minima is not None:
            self._summarise(slice(start // self.page_size, self.pinned_pages))

    def unpin(self, length: int) -> None:
        """Take back the last `length` tokens, all of them pinned; the stamps they gave are the caller's affair."""
        self.pinned -= length
        self.move_clock(-length, 0)
        freed = slice(self.pinned, self.pinned + length)
        self.bias[:, :, freed], self.positions[:, :, freed] = float("-inf"), -1
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
        limit = self.limit if self.decoded else self._limit_for(pinned_pages)
        is_settled = self.decoded and not self.preallocates
        decode_pages = self.decode_pages if is_settled else self._pages_to_allocate(0, limit)
        self._resize(pinned_pages, decode_pages, limit)

    @allocating
    def _resize(self, pinned_pages: int, decode_pages: int, limit: int) -> None:
        """Move to buffers of another size; pages that no longer fit are dropped, those that are new hold nothing."""
        old_pinned, old_decode = self.pinned_pages, self.decode_pages
        pinned, decode = min(old_pinned, pinned_pages), min(old_decode, decode_pages)

        def moved(name: str, old: torch.Tensor, unit: int, has_pinned: bool) -> torch.Tensor:
            before, after = (old_pinned * unit, pinned_pages * unit) if has_pinned else (0, 0)
            new = old.new_full((*old.shape[:2], after + decode_pages * unit, *old.shape[3:]), EMPTY.get(name, 0))
            if has_pinned:
                new[:, :, : pinned * unit] = old[:, :, : pinned * unit]
            new[:, :, after : after + decode * unit] = old[:, :, before : before + decode * unit]
            return new

        if (pinned_pages, decode_pages) != (old_pinned, old_decode):
            tensors = {
                name: moved(name, old, unit, has_pinned)
                for names, unit, has_pinned in (
                    (SLOTS, self.page_size, True),
                    (BOUNDS, 1, True),
                    (EVICTABLE, 1, False),
                )
                for name, old in self.held_tensors(*names).items()
            }
            tensors["open_slot"] = self.open_slot + (pinned_pages - old_pinned) * self.page_size
            self._replace(tensors)
        self.pinned_pages, self.decode_pages, self.limit = pinned_pages, decode_pages, limit

    def _replace(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take `tensors` as buffers, by name."""
        for name, tensor in tensors.items():
            setattr(self, name, tensor)
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

    @allocating
    def keep(self, sink: torch.Tensor, others: torch.Tensor, ranked: dict[str, torch.Tensor]) -> None:
        """Hold the sink and, of what `candidates` returned, the pages of highest (priority, first token index)."""
        # 1. How many of the candidates stay: those of highest (priority, first token index), in their order.
        limit = self.limit
        by_age = ranked["first"].argsort(-1)
        order = by_age.gather(-1, ranked["priority"].gather(-1, by_age).argsort(dim=-1, stable=True))
        kept = order[..., -limit:].sort(-1).values
        index = torch.cat([sink, others.gather(-1, kept)], -1)
        decode_pages, pages = kept.shape[-1], self.pinned_pages + self.decode_pages
        # 2. Their contents, in new buffers.
        tensors = {"priority": ranked["priority"].gather(-1, kept)}
        if self.page_state is not None:
            tensors["page_state"] = torch.take_along_dim(ranked["page_state"], kept[..., None], 2)
        for names, unit in ((SLOTS, self.page_size), (BOUNDS, 1)):
            for name, old in self.held_tensors(*names).items():
                chosen = torch.take_along_dim(old.reshape(*old.shape[:2], pages, -1), index[..., None], 2)
                tensors[name] = chosen.view(*old.shape[:2], index.shape[-1] * unit, *old.shape[3:])
        # 3. Whatever is open is closed, for generated tokens open a page of their own: its free slots stay free.
        positions = tensors["positions"]
        tensors["positions"] = positions.masked_fill(positions > self.clock[..., :1], -1)
        closing = -self.decoded % self.page_size
        self._replace(tensors)
        self.released_pages += self.pinned_pages - 1
        self.move_clock(0, closing)
        self.pinned_pages, self.decode_pages, self.limit = 1, decode_pages, limit
        self.pinned, self.holds_input = self.page_size, False
        self._resize(1, self._pages_to_allocate(decode_pages, limit), limit)

    def held(self) -> raas_kernels.Held:
        """What `raas_kernels.show` needs, to apply a mask to the tokens held."""
        keys, scales = self.contents[0], None if self.code is None else self.key_scales
        return raas_kernels.Held(
            self.bias, self.positions, self.clock, keys, scales, self.minima, self.maxima, self.page_size
        )

    @uncompiled
    def hide(self, visible: torch.Tensor) -> None:
        """Take note that the attention mask hides some of the input stored last.

        Args:
            visible: `[batch, new]` bool, False where it hides a token.
        """
        first = self.seen - self.new
        index = (self.positions - first).clamp(min=0, max=self.new - 1)
        shown = visible[:, None].expand(-1, self.num_heads, -1).gather(-1, index.long())
        hidden = (self.positions >= first) & (self.bias == 0) & ~shown
        self.bias.masked_fill_(hidden, float("-inf"))
        self._make_finite(hidden)

    def hide_generated(self, visible: torch.Tensor) -> None:
        """Take note that the attention mask hides the token appended last where `visible` `[batch]` is False."""
        slot = (self.open_slot + self.clock[..., 1] % self.page_size)[..., None]
        lane = torch.arange(self.bias.shape[2], device=self.device)
        hidden = (lane == slot) & ~visible[:, None, None]
        self.bias.copy_(torch.where(hidden, float("-inf"), self.bias))
        self._make_finite(hidden)

    def _make_finite(self, hidden: torch.Tensor) -> None:
        """Clear the NaNs and infinities of `hidden` slots `[batch, kv_heads, slots]`, see `raas_kernels.finite`."""
        for states, scales in ((self.keys, self.key_scales), (self.values, self.value_scales)):
            if self.code is None:
                states.copy_(raas_kernels.finite(states, hidden[..., None]))
            else:  # a token that is not finite has a scale that is not
                bad = hidden & ~scales.isfinite()
                states.copy_(torch.where(bad[..., None], 0, states))
                scales.copy_(torch.where(bad, 0, scales))

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

    @allocating
    def apply_to_rows(self, function: RowFunction) -> None:
        """Make every tensor that has rows what `function` makes of it."""
        olds = self.held_tensors(*ROWS)
        news = {name: function(old).contiguous() for name, old in olds.items()}
        for name, new in news.items():
            if new.shape == olds[name].shape and new.is_cuda:
                # Beams change places at every step, and a CUDA graph may read the buffer.
                olds[name].copy_(new)
            else:
                setattr(self, name, new)
        if self.keys is not None:
            self.batch_size = self.keys.shape[0]
            self._fix_addresses()
