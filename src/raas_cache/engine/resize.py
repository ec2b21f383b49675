"""Create a `PagedKV`, or change its pages or rows: most functions return a new `PagedKV`, and keep the old one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch

from raas_kernels import PagedKV
from raas_kernels.contents import take_pages

from .layer_settings import CODES, LayerSettings
from .packed_pages import check_head_sizes, packed_buffers


AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])
RowFunction = Callable[[torch.Tensor], torch.Tensor]
"""Takes a tensor `[batch, ...]`, and returns a tensor `[new batch, ...]` whose rows are rows of the argument."""
PageFunction = Callable[[torch.Tensor, int, float], torch.Tensor]
"""Takes a buffer with pages, the number of its entries per page, and the value of an empty entry."""
CONTENTS = ("keys", "values", "key_scales", "value_scales", "value_min", "value_max")  # they may lie in a pool
BY_PAGE = ("priority", "key_min", "key_max", "states")  # they have one entry per page
EMPTY = {"bias": float("-inf"), "positions": -1, "priority": float("-inf")}  # values of empty entries that are not 0


def allocating(function: AnyFunction) -> AnyFunction:
    """Decorator for functions that allocate buffers: the buffers can then be written in and outside inference mode."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        # A tensor that was created in inference mode refuses in-place writes outside inference mode.
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return run  # type: ignore[return-value]


def uncompiled(function: AnyFunction) -> AnyFunction:
    """Decorator: `torch.compile` does not compile the function. Unlike `torch.compiler.disable`, it keeps the types."""
    left: AnyFunction = torch.compiler.disable(function)
    return left


def movable(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, with float8 codes viewed as int8, because most operators of torch 2.11 to 2.13 refuse float8."""
    return tensor.view(torch.int8) if tensor.dtype == torch.float8_e4m3fn else tensor


def new_kv(settings: LayerSettings, key: torch.Tensor, value: torch.Tensor, batch_size: int) -> PagedKV:
    """Buffers without pages.

    Args:
        key, value: the first ones of the layer, `[rows, kv_heads, new, head_dim]`.
        batch_size: number of rows to allocate.

    Raises:
        ValueError: the device cannot compute in the layer's 8-bit dtype, or 4-bit codes cannot store a head size.
    """
    code, device = settings.code, key.device
    if code == CODES["fp8"] and device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 9):
            raise ValueError(f"kv_dtype='fp8' needs a GPU of capability 8.9 or newer, not {capability}: use 'int8'.")
    is_packed = settings.is_packed
    if is_packed:
        check_head_sizes(key.shape[-1], value.shape[-1])
    heads, in_a_byte = key.shape[1], 2 if is_packed else 1
    accumulate = torch.promote_types(torch.promote_types(key.dtype, value.dtype), torch.float32)

    def empty(*size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(batch_size, heads, *size, dtype=dtype, device=device)

    has_bounds, has_scales = settings.has_key_bounds or is_packed, code is not None and not is_packed
    states, vectors = len(settings.policy.state), len(settings.policy.row_state)
    bounds_dtype = accumulate if has_scales else key.dtype
    return PagedKV(
        keys=empty(0, key.shape[-1] // in_a_byte, dtype=code or key.dtype),
        values=empty(0, value.shape[-1] // in_a_byte, dtype=code or value.dtype),
        bias=empty(0, dtype=accumulate),
        positions=empty(0, dtype=torch.int32),
        priority=empty(0, dtype=torch.float64),
        evictable=torch.empty(batch_size, 0, dtype=torch.bool, device=device),
        open_slot=empty(dtype=torch.int64).zero_(),
        clock=empty(2, dtype=torch.int64).fill_(-1),
        page_size=settings.page_size,
        key_scales=empty(0, dtype=torch.float32) if has_scales else None,
        value_scales=empty(0, dtype=torch.float32) if has_scales else None,
        key_min=empty(0, key.shape[-1], dtype=bounds_dtype) if has_bounds else None,
        key_max=empty(0, key.shape[-1], dtype=bounds_dtype) if has_bounds else None,
        states=empty(0, states, dtype=torch.float64) if states else None,
        row_states=empty(vectors, key.shape[-1], dtype=torch.float64).zero_() if vectors else None,
        **(packed_buffers(key, value, batch_size, settings.page_size) if is_packed else {}),
    )


def in_a_pool(kv: PagedKV, blocks: int, given: tuple[torch.Tensor, torch.Tensor] | None = None) -> PagedKV:
    """`kv`, which has no pages, with a pool of `blocks` blocks for the contents of its slots.

    Args:
        given: keys and values of the pool, `[blocks, kv_heads, page_size, head_dim]`; None to allocate the pool.
    """

    def pool(buffer: torch.Tensor | None) -> torch.Tensor | None:
        if buffer is None:
            return None
        size = blocks, buffer.shape[1], kv.page_size, *buffer.shape[3:]
        return torch.zeros(size, dtype=movable(buffer).dtype, device=buffer.device).view(buffer.dtype)

    batch, device = len(kv.bias), kv.bias.device
    contents: dict[str, Any]
    if given is None:
        contents = {name: pool(getattr(kv, name)) for name in CONTENTS}
    else:
        contents = dict(zip(("keys", "values"), given, strict=True))
    return replace(kv, **contents, blocks=torch.zeros(batch, 0, dtype=torch.int32, device=device))


def map_pages(kv: PagedKV, function: PageFunction, contents: PageFunction | None = None) -> PagedKV:
    """`kv` with `function(buffer, entries, empty)` in place of every buffer that has pages.

    Args:
        function: takes a buffer `[batch, kv_heads, pages * entries, ...]`, the number of entries per page (`page_size`
            or 1), and the value of an empty entry.
        contents: as `function`, for the buffers that lie in a pool if there is one; None for `function`.
    """

    def mapped(name: str) -> torch.Tensor | None:
        buffer = getattr(kv, name)
        if buffer is None:
            return None
        entries = 1 if name in BY_PAGE else kv.page_size
        run = contents if contents is not None and name in CONTENTS else function
        return run(movable(buffer), entries, EMPTY.get(name, 0)).view(buffer.dtype)

    buffers: dict[str, Any] = {name: mapped(name) for name in (*CONTENTS, *BY_PAGE, "bias", "positions")}
    return replace(kv, **buffers)


def map_rows(kv: PagedKV, function: RowFunction) -> PagedKV:
    """`kv` with `function(buffer)` in place of every buffer. On CUDA, a buffer keeps its address if its shape stays."""

    def moved(old: torch.Tensor) -> torch.Tensor:
        new = function(movable(old)).contiguous().view(old.dtype)
        if new.shape == old.shape and new.is_cuda:
            # A CUDA graph may read the buffer, and beam search reorders rows at every step.
            movable(old).copy_(movable(new))
            return old
        return new

    whole = map_pages(kv, lambda buffer, entries, empty: moved(buffer))
    return replace(
        whole,
        evictable=moved(kv.evictable),
        open_slot=moved(kv.open_slot),
        clock=moved(kv.clock),
        row_states=None if kv.row_states is None else moved(kv.row_states),
        open_keys=None if kv.open_keys is None else moved(kv.open_keys),
    )


def resized(kv: PagedKV, pages: int) -> PagedKV:
    """`kv` with `pages` pages: added pages are empty, or the last pages are removed. A pool stays as it is."""
    kept = min(pages, kv.num_pages)

    def moved(old: torch.Tensor, entries: int, empty: float) -> torch.Tensor:
        new = old.new_full((*old.shape[:2], pages * entries, *old.shape[3:]), empty)
        new[:, :, : kept * entries] = old[:, :, : kept * entries]
        return new

    return map_pages(kv, moved, None if kv.blocks is None else lambda pool, entries, empty: pool)


def gathered(kv: PagedKV, index: torch.Tensor) -> PagedKV:
    """`kv` with only the pages `index` `[batch, kv_heads, pages]` int64, in this order."""

    def moved(old: torch.Tensor, entries: int, empty: float) -> torch.Tensor:
        by_page = old.reshape(*old.shape[:2], kv.num_pages, -1)  # [batch, kv_heads, pages, entries * ...]
        chosen = torch.take_along_dim(by_page, index[..., None], 2)
        return chosen.view(*old.shape[:2], index.shape[-1] * entries, *old.shape[3:])

    return map_pages(kv, moved)


def take_out(kv: PagedKV, rows: torch.Tensor, index: torch.Tensor) -> PagedKV:
    """A copy of the pages `index` `[rows, kv_heads, n]` int64 of `rows` `[rows]` int64, outside the pool."""
    taken = map_pages(
        kv,
        lambda buffer, entries, empty: take_pages(buffer, rows, index, entries),
        lambda pool, entries, empty: take_pages(pool, rows, index, entries, kv.blocks),
    )
    return replace(taken, open_slot=kv.open_slot[rows], clock=kv.clock[rows], blocks=None)


def put_rows(kv: PagedKV, rows: torch.Tensor, taken: PagedKV) -> None:
    """Make the pages that `take_out` returned the first pages of `rows`; all other pages of these rows become empty.

    A page that holds a token must have a block in its new place.
    """
    kept = taken.num_pages
    for name in (*BY_PAGE, "bias", "positions"):
        buffer, new = getattr(kv, name), getattr(taken, name)
        if buffer is not None:
            buffer[rows] = EMPTY.get(name, 0)
            buffer[rows, :, : new.shape[2]] = new
    assert kv.blocks is not None
    block = kv.blocks[rows, :kept].long()  # [rows, kept]
    has_memory = block > 0
    for name in CONTENTS:
        buffer, new = getattr(kv, name), getattr(taken, name)
        if buffer is not None:
            pages = movable(new).unflatten(2, (kept, kv.page_size)).transpose(1, 2)  # [rows, kept, kv_heads, S, ...]
            movable(buffer)[block[has_memory]] = pages[has_memory]
    kv.open_slot[rows], kv.clock[rows] = taken.open_slot, taken.clock


def put_page(kv: PagedKV, page: torch.Tensor, contents: PagedKV) -> None:
    """Write one page per row and KV head, which `gathered` returned, to the page `page` `[batch, kv_heads]` int64."""

    def put(buffer: torch.Tensor | None, before: torch.Tensor | None) -> None:
        if buffer is None or before is None:
            return
        by_page = movable(buffer).view(*buffer.shape[:2], kv.num_pages, -1)  # [batch, kv_heads, pages, entries * ...]
        index = page[..., None, None].expand(-1, -1, 1, by_page.shape[-1])
        by_page.scatter_(2, index, movable(before).reshape(*before.shape[:2], 1, -1))

    for buffer, before in (
        (kv.keys, contents.keys),
        (kv.values, contents.values),
        (kv.bias, contents.bias),
        (kv.positions, contents.positions),
        (kv.key_scales, contents.key_scales),
        (kv.value_scales, contents.value_scales),
        (kv.value_min, contents.value_min),
        (kv.value_max, contents.value_max),
        (kv.key_min, contents.key_min),
        (kv.key_max, contents.key_max),
    ):
        put(buffer, before)


def fix_addresses(kv: PagedKV) -> None:
    """Tell `torch.compile` that the buffers keep their addresses, so that a CUDA graph does not copy them.

    `mark_static_address` is private in torch 2.11 to 2.13, and is what `StaticCache` of transformers calls, too.
    """
    if kv.keys.device.type == "cuda":
        for buffer in vars(kv).values():
            if isinstance(buffer, torch.Tensor):
                torch._dynamo.mark_static_address(buffer, guard=False)
