"""Caches that the kernel tests share, and the two engines side by side."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from raas_kernels import PagedKV, key_states, pack_page, pack_values, page_extremes, quantize, value_states
from raas_kernels.ops.append import reference as torch_append
from raas_kernels.ops.attend import reference as torch_attend
from raas_kernels.ops.page_bounds import reference as torch_page_bounds
from raas_kernels.ops.show import reference as torch_show
from raas_kernels.ops.stamp import reference as torch_stamp


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
CODES = [torch.int8, torch.float8_e4m3fn, torch.uint8]  # uint8: two 4-bit codes in a byte

reference = SimpleNamespace(
    append=torch_append.append,
    attend=torch_attend.attend,
    page_logit_bounds=torch_page_bounds.page_logit_bounds,
    show=torch_show.show,
    stamp=torch_stamp.stamp,
)


def triton_engine():
    """The Triton operators; skips the test file where there is no Triton."""
    pytest.importorskip("triton", reason="triton is not installed here", exc_type=ImportError)
    from raas_kernels.ops.append import triton as append
    from raas_kernels.ops.attend import triton as attend
    from raas_kernels.ops.page_bounds import triton as page_bounds
    from raas_kernels.ops.show import triton as show
    from raas_kernels.ops.stamp import triton as stamp

    return SimpleNamespace(
        append=append.append,
        attend=attend.attend,
        page_logit_bounds=page_bounds.page_logit_bounds,
        show=show.show,
        stamp=stamp.stamp,
    )


def make_kv(
    batch=1, heads=2, pages=5, decode_pages=3, page_size=8, dk=16, dv=16, dtype=torch.float32, seed=0, code=None,
    bounds=False, states=0, strided=False, rows_differ=False,
):  # fmt: skip
    """A cache in the middle of a generation, with a padded prompt, an open page and a page that holds nothing.

    Args:
        decode_pages: pages that are evictable, the last ones of each row.
        code: dtype of the codes of keys and values.
        bounds: keep key_min and key_max.
        states: numbers of the policy for each page.
        strided: keys and values are views of one larger buffer, tokens before heads.
        rows_differ: each row has pinned and evictable pages of its own, in any order.
    """
    torch.manual_seed(seed)
    slots, rows = pages * page_size, (batch, heads)
    keys = torch.randn(*rows, slots, dk, dtype=dtype, device=DEVICE)
    values = torch.randn(*rows, slots, dv, dtype=dtype, device=DEVICE)
    bias = torch.zeros(*rows, slots, dtype=torch.promote_types(dtype, torch.float32), device=DEVICE)
    bias[..., :3] = float("-inf")
    bias[..., -page_size - page_size // 2 :] = float("-inf")
    positions = torch.arange(slots, dtype=torch.int32, device=DEVICE).expand(*rows, -1).contiguous()
    positions[..., -page_size:] = -1
    priority = torch.randint(0, 9, (*rows, pages), device=DEVICE).double()
    priority[..., -1] = float("-inf")
    evictable = (torch.arange(pages, device=DEVICE) >= pages - decode_pages).expand(batch, -1).clone()
    if rows_differ:
        evictable[:, :-1] = torch.rand(batch, pages - 1, device=DEVICE) < 0.5
    clock = torch.tensor([slots - page_size - page_size // 2 - 1, page_size // 2 - 1], device=DEVICE)
    key_min = key_max = key_scales = value_scales = None
    open_slot, packed = torch.full(rows, slots - 2 * page_size, device=DEVICE), {}
    if bounds:
        key_min, key_max = page_extremes(keys, bias, page_size)
        if code is not None:
            key_min, key_max = key_min.float(), key_max.float()
    if code == torch.uint8:
        packed = packed_contents(keys, values, bias, open_slot, page_size)
        keys, values = packed.pop("keys"), packed.pop("values")
        key_min, key_max = packed.pop("key_min"), packed.pop("key_max")
    elif code is not None:
        (keys, key_scales), (values, value_scales) = quantize(keys, code), quantize(values, code)
    if strided:
        keys, values = as_views(keys, values)
    return PagedKV(
        keys=keys,
        values=values,
        bias=bias,
        positions=positions,
        priority=priority,
        evictable=evictable,
        open_slot=open_slot,
        clock=clock.expand(*rows, 2).contiguous(),
        page_size=page_size,
        key_scales=key_scales,
        value_scales=value_scales,
        key_min=key_min,
        key_max=key_max,
        states=torch.rand(*rows, pages, states, dtype=torch.float64, device=DEVICE) if states else None,
        **packed,
    )


def packed_contents(keys, values, bias, open_slot, page_size):
    """The fields of a 4-bit cache for exact keys and values; the open page's codes mean nothing."""
    pages = keys.unflatten(2, (-1, page_size))  # [B, H, P, S, Dk]
    codes, key_min, key_max = pack_page(pages, (bias != 0).unflatten(2, (-1, page_size)))
    index = (open_slot // page_size)[..., None, None, None].expand(-1, -1, 1, page_size, keys.shape[-1])
    open_keys = pages.gather(2, index)
    codes.scatter_(2, index[..., : codes.shape[-1]], torch.randint_like(codes, 256))
    value_codes, value_min, value_max = pack_values(values)
    return {
        "keys": codes.flatten(2, 3), "values": value_codes, "key_min": key_min, "key_max": key_max,
        "open_keys": open_keys[:, :, 0].contiguous(), "value_min": value_min, "value_max": value_max,
    }  # fmt: skip


def decoded(kv):
    """The same cache with its codes as the float64 numbers that they stand for."""
    plain = mapped(kv, lambda name, tensor: tensor.double() if name in ("bias", "key_min", "key_max") else tensor)
    plain.keys, plain.values = key_states(kv, torch.float64), value_states(kv, torch.float64)
    plain.key_scales = plain.value_scales = plain.open_keys = plain.value_min = plain.value_max = None
    return plain


def as_views(keys, values):
    """The same keys and values as views of a caller's memory: tokens before heads, K beside V, rows further apart."""
    batch, heads, slots, dk = keys.shape
    memory = torch.zeros(batch + 1, slots + 3, heads, dk + values.shape[-1], dtype=keys.dtype, device=keys.device)
    views = memory[1:, 2:-1].transpose(1, 2).split([dk, values.shape[-1]], -1)
    for view, states in zip(views, (keys, values), strict=True):
        byte_view, byte_states = (t.view(torch.int8) if t.element_size() == 1 else t for t in (view, states))
        byte_view.copy_(byte_states)
    assert not any(view.is_contiguous() for view in views)
    return views


def mapped(kv, function):
    """A PagedKV whose tensors are what `function(name, tensor)` makes of them."""
    return PagedKV(
        **{
            field.name: function(field.name, value) if torch.is_tensor(value) else value
            for field in dataclasses.fields(kv)
            for value in [getattr(kv, field.name)]
        }
    )


def copied(kv):
    """A copy, with views of a caller's memory where `kv` has them."""
    copy = mapped(kv, lambda name, tensor: tensor.clone(memory_format=torch.contiguous_format))
    if not kv.keys.is_contiguous():
        copy.keys, copy.values = as_views(copy.keys, copy.values)
    return copy


def exact(kv):
    """The same cache in float64, and its codes as float64 numbers: what the reference takes as the truth."""
    names = {"bias", "key_scales", "value_scales", "key_min", "key_max", "open_keys", "value_min", "value_max"}
    names |= set() if kv.is_packed else {"keys", "values"}  # two codes in a byte are no number
    return mapped(kv, lambda name, tensor: tensor.double() if name in names else tensor.clone())


def rows_of(kv, rows):
    """A cache of some rows alone."""

    def take(name, tensor):
        movable = tensor.view(torch.int8) if tensor.dtype == torch.float8_e4m3fn else tensor
        return movable[rows].view(tensor.dtype)

    return mapped(kv, take)


def same_bits(ours, theirs):
    """Whether two tensors hold the same bits, NaN included."""
    ours, theirs = (t.contiguous().view(torch.int8) for t in (ours, theirs))
    return torch.equal(ours, theirs)


def assert_same(ours, theirs, except_for=()):
    """Every buffer of two caches holds the same bits."""
    for field in dataclasses.fields(ours):
        one, other = getattr(ours, field.name), getattr(theirs, field.name)
        if torch.is_tensor(one) and field.name not in except_for:
            assert same_bits(one, other), field.name
        else:
            assert field.name in except_for or one == other, field.name


def relative_error(result, expected):
    result, expected = result.double(), expected.double()
    finite = torch.isfinite(expected)
    assert torch.equal(result[~finite], expected[~finite])
    return ((result - expected)[finite].norm() / expected[finite].norm()).item()


POOLED = ("keys", "values", "key_scales", "value_scales", "value_min", "value_max")


def in_blocks(kv, spare=3, strided=False, seed=0):
    """The same cache with its pages in shuffled blocks; the last page of each row has no memory and is not evictable.

    Block 0 and `spare` blocks belong to no page, and hold what would spoil a result.

    Args:
        strided: keys and values are views of one larger buffer, tokens before heads.
    """
    kv = copied(kv)
    batch, heads, size = len(kv.bias), kv.bias.shape[1], kv.page_size
    kv.evictable[:, -1] = False
    kv.bias[..., -size:] = float("-inf")
    pages = kv.num_pages - 1
    order = 1 + torch.randperm(batch * pages + spare, generator=torch.Generator().manual_seed(seed), device="cpu").to(
        DEVICE
    )
    blocks = torch.zeros(batch, pages + 1, dtype=torch.int32, device=DEVICE)
    blocks[:, :-1] = order[: batch * pages].view(batch, pages)
    for name in POOLED:
        rows = getattr(kv, name)
        if rows is None:
            continue
        rows = rows.contiguous()
        shape = (1 + len(order), heads, size, *rows.shape[3:])
        poison = torch.full(shape, float("nan") if rows.is_floating_point() else 77, device=DEVICE).to(rows.dtype)
        taken, held = (t.view(torch.int8) if t.element_size() == 1 else t for t in (rows, poison))
        for row in range(batch):
            for page in range(pages):
                held[blocks[row, page].item()] = taken[row, :, page * size : (page + 1) * size]
        setattr(kv, name, poison)
    if strided:
        kv.keys, kv.values = as_views(kv.keys, kv.values)
    kv.blocks = blocks
    return kv


def in_rows(kv, missing=None):
    """A cache in blocks as a cache whose rows have memory of their own.

    Args:
        missing: the page whose contents take the place of a page without memory; None for zeros.
    """
    plain = copied(kv)
    batch, heads, size = len(kv.bias), kv.bias.shape[1], kv.page_size
    for name in POOLED:
        pool = getattr(kv, name)
        if pool is None:
            continue
        rows = torch.zeros(batch, heads, kv.bias.shape[2], *pool.shape[3:], device=DEVICE).to(pool.dtype)
        taken, held = (t.view(torch.int8) if t.element_size() == 1 else t for t in (pool, rows))
        for row in range(batch):
            for page in range(kv.num_pages):
                block = kv.blocks[row, page].item()
                if not block and missing is not None:
                    block = kv.blocks[row, missing].item()
                if block:
                    held[row, :, page * size : (page + 1) * size] = taken[block]
        setattr(plain, name, rows)
    plain.blocks = None
    return plain
