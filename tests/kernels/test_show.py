"""`raas_kernels.show`: the torch engine against a loop over slots, the Triton kernel against the torch engine."""

import pytest
import torch

from raas_kernels import PagedKV, dequantize, key_states, page_extremes, quantize

from . import by_hand
from .helpers import DEVICE, as_views, copied, mapped, packed_contents, reference, triton_engine


fused = triton_engine()


def make_layer(pages=5, page_size=4, dk=8, dtype=torch.float32, code=None, bounds=False, strided=False, seed=0):
    """Two rows of two KV heads, each with a clock of its own; the last page is half full, another holds nothing."""
    generator = torch.Generator().manual_seed(seed)
    slots = pages * page_size
    positions = torch.stack([torch.randperm(slots, generator=generator) for _ in range(4)]).view(2, 2, slots)
    positions[..., page_size : 2 * page_size] = -1
    clock = torch.tensor([[[slots - 3, 5]] * 2, [[slots - 6, 2]] * 2])
    keys, key_scales = torch.randn(2, 2, slots, dk, generator=generator).to(dtype), None
    if code not in (None, torch.uint8):
        keys, key_scales = quantize(keys, code)
    bias = torch.full((2, 2, slots), float("-inf"))
    bias.masked_fill_((positions >= 0) & (positions <= clock[..., :1]), 0)
    key_min = key_max = None
    if bounds:
        wide = keys if key_scales is None else dequantize(keys, key_scales, torch.float32)
        key_min, key_max = page_extremes(wide, bias, page_size)
    open_slot = torch.tensor([[0, 2 * page_size], [3 * page_size, 0]])
    contents = {"keys": keys, "values": keys, "key_min": key_min, "key_max": key_max}
    if code == torch.uint8:
        contents |= packed_contents(keys, keys, bias, open_slot, page_size)
    kv = PagedKV(
        **contents,
        bias=bias,
        positions=positions.int(),
        priority=torch.zeros(2, 2, pages).double(),
        evictable=torch.ones(2, pages, dtype=torch.bool),
        open_slot=open_slot,
        clock=clock,
        page_size=page_size,
        key_scales=key_scales,
        value_scales=key_scales,
    )
    kv = mapped(kv, lambda name, tensor: tensor.to(DEVICE))
    if strided:
        kv.keys, kv.values = as_views(kv.keys, kv.values)
    return kv


def draw_mask(tokens, share, seed):
    return (torch.rand(2, tokens, generator=torch.Generator().manual_seed(seed)) > 1 - share).to(DEVICE)


@pytest.mark.parametrize("bounds", [False, True])
def test_reference_shows_the_tokens_that_the_mask_names(bounds):
    kv = make_layer(bounds=bounds)
    before, expected = kv.bias.clone(), copied(kv)
    visible = draw_mask(12, 0.5, seed=1)
    reference.show([kv], visible)
    by_hand.show(expected, visible)
    assert torch.equal(kv.bias, expected.bias) and not torch.equal(kv.bias, before)
    if bounds:
        extremes = page_extremes(kv.keys, kv.bias, 4)
        assert all(map(torch.equal, (kv.key_min, kv.key_max), extremes))
    reference.show([kv], torch.ones_like(visible))
    assert torch.equal(kv.bias, before), "a hidden token can be shown again"


def test_the_bounds_of_coded_pages_stay_with_their_codes():
    """Only the open page's bounds follow the mask; the keys of all others are the same whatever is shown."""
    kv = make_layer(code=torch.uint8)
    before, keys = copied(kv), key_states(kv, torch.float64)
    reference.show([kv], draw_mask(20, 0.5, seed=1))
    assert torch.equal(key_states(kv, torch.float64), keys)
    page = (kv.open_slot // 4)[..., None]
    extremes = page_extremes(keys.float(), kv.bias, 4)
    for name, expected in zip(("key_min", "key_max"), extremes, strict=True):
        ours, old = getattr(kv, name), getattr(before, name)
        is_open = (torch.arange(5, device=DEVICE) == page) & kv.is_open[..., None]
        assert torch.equal(ours, torch.where(is_open[..., None], expected, old))
        assert not torch.equal(ours, old)


SHAPES = [
    {},
    {"bounds": True},
    {"bounds": True, "dk": 12, "page_size": 1, "pages": 7},
    {"bounds": True, "code": torch.int8},
    {"bounds": True, "code": torch.uint8},
    {"code": torch.uint8, "page_size": 8, "dk": 12, "dtype": torch.bfloat16, "strided": True},
    {"bounds": True, "dtype": torch.bfloat16},
    {"bounds": True, "strided": True},
    {"bounds": True, "strided": True, "code": torch.float8_e4m3fn},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_equals_the_reference(shape):
    """Layers of two sizes and of two kinds in one call."""
    layers = [make_layer(**shape), make_layer(**{**shape, "pages": 9}, seed=1), make_layer(dk=16, seed=2)]
    expected = [copied(kv) for kv in layers]
    for seed in range(3):
        visible = draw_mask(13, 0.7, seed)
        reference.show(expected, visible)
        fused.show(layers, visible)
        for kv, right in zip(layers, expected, strict=True):
            assert torch.equal(kv.bias, right.bias)
            if right.key_min is not None:
                assert torch.equal(kv.key_min, right.key_min) and torch.equal(kv.key_max, right.key_max)
